"""``pcfast.relax``: the beliefs and errors of one relaxation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..losses import LossLike
from ..model.graph import Graph
from ..problem.belief_optimizers import BeliefOptimizer
from ..problem.nudging import Nudging
from ..problem.plan import canonical
from ..problem.settings import Precisions, Settings, StepSizes
from ..problem.types import Wanted
from . import on_graphs
from .solve import Run, solve


@dataclass(frozen=True)
class Relaxation:
    """Result of :func:`relax`. Lists run over l = 0..L.

    Attributes:
        activations: forward-pass values vhat_0..vhat_L; vhat_0 equals x.
        loss: Loss(vhat_L, y), 0-dim.
        output_gradient: dLoss/dvhat_L, as vhat_L.
        beliefs: v_l after the last iteration, as vhat_l.
        errors: eps_l of the last iteration, prediction minus belief; eps_L = dLoss/dmu_L. eps_0 is None
            except for fixed prediction of a floating x. "error_based": at the beliefs, after the last iteration;
            "zero_divergence": errors and beliefs of layer l as they are when its error arrives, t = L - l.
        energies: (n, L) on request: 0.5 |eps_l|^2 summed over batch and units for l < L, and the loss at mu_L
            (a nudged one to its target) in the last column, as each iteration found them before its update; rows
            after an early exit repeat the last; else None.
        run: which backend ran, and how.
        iterations: with a tolerance how many iterations moved beliefs, 0-dim int64 on the device; else None.
    """

    activations: list[Tensor]
    loss: Tensor
    output_gradient: Tensor
    beliefs: list[Tensor]
    errors: list[Tensor | None]
    energies: Tensor | None
    run: Run
    iterations: Tensor | None = None


@dataclass(frozen=True)
class GraphRelaxation:
    """Result of :func:`relax` on a graph, by the nodes' names.

    Attributes:
        activations: values of the forward pass: what is clamped, the roots' starts, predictions.
        loss: the energy there, with the losses: 0-dim.
        beliefs: after the last iteration; of a clamped node its value, of a loss's node its prediction at the start.
        errors: of the last iteration, prediction minus belief; of a loss's node the gradient of what the loss counts
            in the energy; None for roots without a prior.
        energies: of every node (n,) on request, pi |eps|^2 / 2 or the loss, as each iteration found them; else None.
        run: which backend ran, and how.
        iterations: as in :class:`Relaxation`.
    """

    activations: dict[str, Tensor]
    loss: Tensor
    beliefs: dict[str, Tensor]
    errors: dict[str, Tensor | None]
    energies: dict[str, Tensor] | None
    run: Run
    iterations: Tensor | None = None


def relax(
    model: nn.Sequential | Graph,
    x: Tensor | Mapping[str, Tensor] | None = None,
    y: Tensor | Mapping[str, Tensor] | None = None,
    *,
    loss: LossLike | Mapping[str, LossLike] = "cross_entropy",
    method: str = "strict",
    step_size: StepSizes = 0.1,
    num_steps: int = 20,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
    backend: str = "auto",
    vinit: list[Tensor | None] | Mapping[str, Tensor] | float | None = None,
    reduction: str = "sum",
    update_scale: float = 1.0,
    normalizer: int | None = None,
    energies: bool = False,
    tolerance: float | None = None,
    check: str = "auto",
    clamp: Mapping[str, Tensor] | None = None,
    precision: Precisions | None = None,
    noise: float | None = None,
    generator: torch.Generator | None = None,
) -> Relaxation | GraphRelaxation:
    """Relax beliefs and errors; parameters and their ``.grad`` stay as they are.

    Rosenbaum (2022), algorithms 1 to 3; docs/method.md. The other methods: docs/methods.md.

    Args:
        model: ``nn.Sequential`` of PC layers, or a :class:`pcfast.Graph`, of which docs/graphs.md says more.
        x: input (B, ...), the model's dtype and device; of a graph's roots, by name where there are several.
        y: target, as ``loss`` needs it: int64 class indices (B,) or probabilities (B, C) for cross-entropy, the
            output's shape for mse, anything for a callable.
        loss: "cross_entropy", "mse" or a callable ``loss(output, y) -> scalar``.
        method: "exact", "fixed_prediction", "strict", "error_based" or "zero_divergence". The field's other words
            for them are understood: "bp", "pc" or "spc" (strict), "epc" (error_based).
        step_size: eta >= 0, or a sequence of ``num_steps`` of them: iteration t uses step_size[t-1]. Of the
            beliefs, of the errors for "error_based".
        num_steps: n >= 0. "exact" has no iterations and ignores both; "zero_divergence" fixes both: 1 and L.
        belief_optimizer: :class:`pcfast.GradientDescent` or :class:`pcfast.Adam`; None is plain gradient descent.
        nudging: strict with mse: :class:`pcfast.Nudging` of the target, not centred (which is two relaxations).
        backend: "auto", or a backend by name.
        vinit: strict only: beliefs v_0..v_L to start from (v_0 must be x or None; None entries start at the
            forward pass), or a number that all hidden beliefs start at.
        reduction: "sum": beliefs descend the energy summed over rows, updates are of the loss as it is given;
            "mean": both are of the mean over rows, as in programs whose energy is a mean;
            "sum_beliefs_mean_weights": a sum for the beliefs, the mean for the weights. The last two want a loss
            that sums. Here it says what ``step_size``, Adam's eps and the weight decay refer to; results are
            sums whatever it is.
        update_scale: of the weights' updates, of which there are none here: taken so that a preset fits.
        normalizer: rows of the global batch, for a mean loss, or the mean of ``reduction``, over a shard or
            micro-batch.
        energies: also record the energies of every iteration.
        tolerance: strict only: the first iteration t >= max(2, L) that finds the energy, summed over layers, changed
            by no more than this part of it is the last; results are those of num_steps = t. Decided on the device:
            on CUDA nothing waits, and later iterations change nothing. None runs all. In float32 the energy itself
            is known to about 1e-7 of it.
        check: when bad values are reported: "sync" at once, "deferred" by a later call or
            :func:`pcfast.synchronize`, "auto" (sync on CPU, deferred on CUDA), "off". The reference backend
            never defers.
        clamp: of a graph, or of a Sequential ("input" and its layers' names): further nodes that are held at values,
            instead of or beside ``x`` and ``y``. Nodes that are not given are free.
        precision: what each layer's energy counts: pi |eps|^2 / 2; the loss counts pi, too. A number, one for each
            layer, of a graph a mapping from names; tensors have one for each unit. None is 1.
        noise: strict only: temperature T of Langevin noise: every iteration adds sqrt(2 step_size T) times standard
            normal numbers to every belief.
        generator: draws the noise; None for torch's own.

    A ``step_size`` for each layer is a :class:`pcfast.PerLayer`, of a graph a mapping from names.

    Returns:
        :class:`Relaxation`; :class:`GraphRelaxation` for a graph, and where ``clamp``, ``precision``, ``noise`` or a
        step size a layer are given. State tensors are float32 for float32, bfloat16 and float16 models and under
        autocast, float64 for float64 models (the reference backend keeps the model's own dtype).

    Raises:
        ArgumentError and its kinds, BackendError, RelaxationDiverged.
    """
    method = canonical(method)
    if energies and method == "exact":
        raise ArgumentError("energies", "True with method 'exact'", "a method with iterations")
    if energies and method == "zero_divergence":
        raise ArgumentError(
            "energies",
            "True with method 'zero_divergence', which reads every layer in another iteration",
            "a method that reads all layers at once",
            "Its loop is method='strict' with step_size=1.",
        )
    if isinstance(nudging, Nudging) and len(nudging.pushes) > 1:
        raise ArgumentError(
            "nudging", f"{nudging}", 'kind "positive" or "negative"',
            "Centred nudging is two relaxations: ask for one after the other.",
        )  # fmt: skip
    settings = Settings(
        loss, method, step_size, num_steps, belief_optimizer, nudging, backend, vinit, reduction, update_scale,
        normalizer, tolerance, check, precision, noise, generator,
    )  # fmt: skip
    if isinstance(model, Graph) or settings.beyond_chains or clamp is not None:
        return _on_graph(model, x, y, settings, clamp, energies)
    return _on_chain(model, x, y, settings, energies)


def _on_graph(model, x, y, settings: Settings, clamp, energies: bool) -> GraphRelaxation:
    chain = on_graphs.chain_of(model, settings, x, y, clamp)
    if chain is not None:
        return _by_name(model, _on_chain(chain[0], chain[1], chain[2], settings, energies))
    wanted = Wanted(gradients=False, states=True, energies=energies)
    outcome, run = on_graphs.solve(model, x, y, settings, clamp, wanted)
    names = run.plan.spec.names
    given = on_graphs.given_tensor(x, y, clamp)
    rows = None if outcome.energies is None else dict(zip(names, outcome.energies.unbind(1), strict=True))
    return GraphRelaxation(
        dict(zip(names, dealias(outcome.activations, given), strict=True)),
        outcome.loss,
        dict(zip(names, dealias(outcome.beliefs, given), strict=True)),
        dict(zip(names, outcome.errors, strict=True)),
        rows,
        run,
        outcome.iterations,
    )


def _by_name(graph: Graph, relaxation: Relaxation) -> GraphRelaxation:
    """A chain's relaxation by the names of the graph that it is."""
    names, energies = graph.names, None
    if relaxation.energies is not None:
        columns = [torch.zeros_like(relaxation.energies[:, 0]), *relaxation.energies.unbind(1)]
        energies = dict(zip(names, columns, strict=True))
    return GraphRelaxation(
        dict(zip(names, relaxation.activations, strict=True)),
        relaxation.loss,
        # fixed prediction moves v_0, which is clamped here
        dict(zip(names, [relaxation.activations[0], *relaxation.beliefs[1:]], strict=True)),
        dict(zip(names, [None, *relaxation.errors[1:]], strict=True)),
        energies,
        relaxation.run,
        relaxation.iterations,
    )


def _on_chain(model, x, y, settings: Settings, energies: bool) -> Relaxation:
    method = settings.method
    input_error = method == "fixed_prediction"
    wanted = Wanted(gradients=False, states=True, input_error=input_error, energies=energies)
    outcome, run = solve(model, x, y, settings, wanted)
    return Relaxation(
        dealias(outcome.activations, x),
        outcome.loss,
        outcome.output_gradient,
        dealias(outcome.beliefs, x),
        outcome.errors,
        outcome.energies,
        run,
        outcome.iterations,
    )


def dealias(values: list[Tensor], x: Tensor) -> list[Tensor]:
    """``values``, copied where they lie in the caller's ``x`` (v_0, and what reshapes it)."""
    memory = x.untyped_storage().data_ptr()
    return [value.clone() if value.untyped_storage().data_ptr() == memory else value for value in values]
