"""What goes into a backend and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError
from ..losses import Loss
from ..model.snapshot import Snapshot
from ..model.spec import Network
from .belief_optimizers import StepSize, step_size_of
from .status import Status


@dataclass(frozen=True)
class Wanted:
    """What the caller will read; backends skip the rest.

    Attributes:
        gradients: the parameters' updates.
        states: beliefs and errors of every layer, and what ``activations`` gives.
        activations: forward-pass values of every layer and the gradient at the output.
        input_error: for fixed prediction also g_0, v_0 and eps_0.
        energies: energy per iteration and layer.
        belief_gradients: with energies: also the norms of the beliefs' gradients.
    """

    gradients: bool = True
    states: bool = False
    activations: bool = False
    input_error: bool = False
    energies: bool = False
    belief_gradients: bool = False


NOTHING_BUT_UPDATES = Wanted()


@dataclass(eq=False)  # frozen, it would take 2.5 us more to make, in every step
class Problem:
    """One relaxation to run, validated: what its :class:`pcfast.problem.plan.Plan` does not say. Nobody changes it.

    Attributes:
        model: the Sequential.
        known: what is known of it.
        x: input (B, ...).
        y: target; None where ``output_gradient`` is given and no loss is evaluated.
        loss: the loss described; None as for y.
        step_size: eta, or a tuple of one for each iteration.
        start: beliefs v_0..v_L to start strict relaxation from, a number for all units of a layer, or None for the
            forward pass.
        activations: vhat_0..vhat_L given instead of a forward pass (exact and fixed prediction).
        output_gradient: dLoss/dvhat_L given instead of a loss (fixed prediction).
        raise_now: raise at once on labels out of range and divergence (waits for the device); otherwise the
            outcome's ``status`` tells.
        deferred: what ``status`` tells is raised by a later call; otherwise at the end of this one.
        check: False leaves all such checks out.
        move: "incremental" alone: takes every iteration's updates, parameter -> update, and moves the parameters.
        may_fall_back: the backend was not asked for by name: another may run the loop where its kernels do not
            compile.
    """

    model: nn.Sequential
    known: Snapshot
    x: Tensor
    y: object
    loss: Loss | None
    step_size: StepSize
    start: list[Tensor | float | None] | None = None
    activations: list[Tensor] | None = None
    output_gradient: Tensor | None = None
    raise_now: bool = True
    deferred: bool = False
    check: bool = True
    move: Callable[[dict[nn.Parameter, Tensor]], None] | None = None
    may_fall_back: bool = False

    def check_loss_updates(self, updates: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Raise ArgumentError where the loss has parameters of its own and the method moves the model's alone."""
        if updates and self.move is not None:
            raise ArgumentError(
                "loss",
                "a loss that uses parameters itself, with method 'incremental'",
                "a loss of the output and the target alone",
                "Use another method; for a penalty on weights use the optimiser's weight_decay.",
            )

    def step_size_at(self, iteration: int) -> float:
        """eta_t of iteration t = 1..n."""
        return step_size_of(self.step_size, iteration)


@dataclass
class Outcome:
    """What a backend gives back. Lists run over l = 0..L; entries are None where there is nothing.

    Attributes:
        loss: Loss(vhat_L, y), 0-dim; None where no loss was given.
        output: vhat_L.
        gradients: parameter -> update, for parameters in use that require it; summed over uses.
        owners: PC layers and the parameters that they gave updates, for messages.
        activations: vhat_l.
        output_gradient: dLoss/dvhat_L.
        beliefs: v_l after the last iteration.
        errors: eps_l of the last iteration.
        energies: (n, L): 0.5 |eps_l|^2 for l < L and the loss at mu_L, as each iteration found them.
        belief_gradients: (n, L-1): |g_l| of docs/method.md, g_l at the beliefs that each iteration found.
        iterations: 0-dim int64, how many moved beliefs (in the last relaxation, of several); None without a
            tolerance.
        status: for deferred checks (see status.py), or None.
        resources: what a recorded graph reads and nothing else keeps alive, or None.
        fell_back: the backend that ran instead of the planned one, and why; None where the planned one did.
    """

    loss: Tensor | None
    output: Tensor
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    owners: list[tuple[int, list[nn.Parameter]]] = field(default_factory=list)
    activations: list[Tensor] | None = None
    output_gradient: Tensor | None = None
    beliefs: list[Tensor | None] | None = None
    errors: list[Tensor | None] | None = None
    energies: Tensor | None = None
    belief_gradients: Tensor | None = None
    iterations: Tensor | None = None
    status: Status | None = None
    resources: object | None = None
    fell_back: tuple[str, str] | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Outcome:
        """A copy with ``change`` applied to every tensor."""

        def visit(value):
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, list):
                return [visit(entry) for entry in value]
            if isinstance(value, dict):
                return {key: visit(entry) for key, entry in value.items()}
            if isinstance(value, Status):
                return replace(value, word=change(value.word))
            return value

        return Outcome(**{f.name: visit(getattr(self, f.name)) for f in fields(self)})

    def record(
        self, wanted: Wanted, depth: int, energies: list[Tensor], belief_gradients: list[Tensor]
    ) -> None:
        """Keep what is wanted of the iterations' rows: energies (L,), norms of the beliefs' gradients (L-1,)."""
        if wanted.energies:
            self.energies = torch.stack(energies) if energies else self.output.real.new_zeros((0, depth))
        if wanted.belief_gradients:
            empty = self.output.real.new_zeros((0, depth - 1))
            self.belief_gradients = torch.stack(belief_gradients) if belief_gradients else empty

    def updates_by_layer(self) -> list[tuple[int, Tensor]]:
        """The updates with the last PC layer that each belongs to."""
        layers = {parameter: layer for layer, parameters in self.owners for parameter in parameters}
        return [(layers[parameter], update) for parameter, update in self.gradients.items()]

    def add_gradients(self, result: list[tuple[nn.Parameter, Tensor]], layer: int = 0) -> None:
        """Add one layer's gradients; a parameter used twice gets the sum."""
        self.owners.append((layer, [parameter for parameter, _ in result]))
        for parameter, gradient in result:
            if gradient.dtype != parameter.dtype:
                gradient = gradient.to(parameter.dtype)
            if parameter in self.gradients:
                gradient = self.gradients[parameter] + gradient
            self.gradients[parameter] = gradient


def check_start(start: list[Tensor | float | None], shapes: list[tuple[int, ...]]) -> None:
    """Check the shapes of ``start``'s tensors against those of the forward pass.

    Raises:
        ShapeError: naming the entry of vinit.
    """
    for l, (given, shape) in enumerate(zip(start, shapes, strict=True)):
        if isinstance(given, Tensor) and given.shape != shape:
            raise ShapeError(
                f"vinit[{l}]", f"shape {tuple(given.shape)}", f"{tuple(shape)}, as in the forward pass"
            )


def filled_start(start: list[Tensor | float | None], vhat: list[Tensor]) -> list[Tensor]:
    """``start`` with None replaced by the forward pass, a number by beliefs of it; raises as :func:`check_start`."""
    check_start(start, [v.shape for v in vhat])
    return [
        s if isinstance(s, Tensor) else f if s is None else torch.full_like(f, s)
        for s, f in zip(start, vhat, strict=True)
    ]


def layer_of_parameters(network: Network, model: nn.Sequential) -> dict[nn.Parameter, int]:
    """Each parameter's (last) PC layer, 1-based."""
    owners: dict[nn.Parameter, int] = {}
    for layer, module in zip(network.layers, model, strict=True):
        for parameter in module.parameters():
            owners[parameter] = layer.index
    return owners


def _squared_norm(error: Tensor) -> Tensor:
    return (torch.view_as_real(error.resolve_conj()) if error.is_complex() else error).pow(2).sum()


@torch.no_grad()
def energy_row(errors: list[Tensor | None], top: Tensor) -> Tensor:
    """One iteration's energies (L,): 0.5 |eps_l|^2 for l = 1..L-1, then ``top``, the loss at mu_L."""
    hidden = [
        top.new_zeros(()) if error is None else 0.5 * _squared_norm(error).to(top.dtype)
        for error in errors[1:-1]
    ]
    return torch.stack([*hidden, top])


@torch.no_grad()
def gradient_row(gradients: list[Tensor | None], like: Tensor) -> Tensor:
    """One iteration's norms of the beliefs' gradients, l = 1..L-1, None for zero: (L-1,), real, as ``like``."""
    row = like.new_zeros(len(gradients), dtype=like.real.dtype)
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            row[index] = torch.linalg.vector_norm(gradient)
    return row
