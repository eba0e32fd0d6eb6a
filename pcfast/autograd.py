"""Predictive-coding updates as gradients of a loss tensor: a thin ``torch.autograd.Function``."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from .losses import LossLike
from .model import sharding
from .model.describe import describe
from .model.graph import Graph
from .model.graph_spec import describe_graph
from .problem import reductions, validation
from .problem.belief_optimizers import BeliefOptimizer
from .problem.nudging import Nudging
from .problem.settings import Precisions, Settings, StepSizes
from .problem.types import NOTHING_BUT_UPDATES, Wanted
from .relaxation import on_graphs
from .relaxation.solve import forward_loss, solve
from .support import host


def scaled(updates: Sequence[Tensor], grad_output: Tensor, scale: float = 1.0) -> list[Tensor]:
    """What a backward pass gives the parameters: their updates times ``scale`` and the gradient of the loss.

    Raises:
        RuntimeError: the backward pass itself is to be differentiated.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "pc_loss cannot be differentiated twice: predictive-coding updates are not the gradient of a "
            "scalar function. Call backward() without create_graph=True."
        )
    return torch._foreach_mul(updates, grad_output if scale == 1.0 else grad_output * scale)


class _Updates(torch.autograd.Function):
    """Carries gradients computed in the forward; backward multiplies them by grad_output and ``scale``."""

    @staticmethod
    def forward(ctx, loss, scale, gradients, *parameters):
        ctx.save_for_backward(*gradients)
        ctx.scale, ctx.hooked = scale, _saved_tensors_hooks(True) is not None
        return loss.detach()  # another tensor, and no view: FSDP2 warns of those

    @staticmethod
    def backward(ctx, grad_output):
        gradients = ctx.saved_tensors
        if _may_be_handed_on(ctx, gradients, grad_output):
            return None, None, None, *gradients
        return None, None, None, *scaled(gradients, grad_output, ctx.scale)


def _may_be_handed_on(ctx, gradients: tuple[Tensor, ...], grad_output: Tensor) -> bool:
    """Whether the parameters may take the updates as they are, without a copy: nobody else has them or will."""
    return (
        ctx.scale == 1.0
        and type(grad_output) is Tensor  # torch traces with others
        and not torch.compiler.is_compiling()
        and host.readable(grad_output.device)
        and not torch.is_grad_enabled()
        and not _keeps_graph()
        and grad_output.item() == 1.0
        and not ctx.hooked  # hooks of saved tensors may give the user's own
        and not any(map(_is_sparse, gradients))
        and all(map(Tensor.is_contiguous, gradients))
    )


#: Whether the backward pass that runs keeps its graph, which may be differentiated once more.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
#: The hooks through which tensors that are saved now would go, or None.
_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda traced: "not known"
)
_is_sparse = operator.attrgetter("is_sparse")


def pc_loss(
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
    tolerance: float | None = None,
    check: str = "auto",
    clamp: Mapping[str, Tensor] | None = None,
    precision: Precisions | None = None,
    noise: float | None = None,
    generator: torch.Generator | None = None,
    return_output: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The forward-pass loss, whose backward gives the predictive-coding updates.

        loss = pcfast.pc_loss(model, x, y)
        loss.backward()            # .grad now holds the predictive-coding updates
        optimizer.step()

    Parameters that the loss itself uses (a temperature, a penalty on weights) get dLoss/dp at the forward pass's
    output besides.

    Relaxation and updates are computed here, with the weights of this moment; ``backward`` multiplies them by
    the gradient that reaches the loss. Scaling the returned loss (GradScaler, 1/k) scales the updates, never
    the relaxation. Under ``torch.no_grad()`` only the forward loss is computed.

    Strict relaxation is not linear in the loss's scale. Micro-batches of a batch of B rows accumulate to the full
    batch's updates, whatever the method, with a sum loss or with ``normalizer=B`` and a mean loss; "exact" and
    "fixed_prediction" also with a plain mean over k equal micro-batches and ``(loss / k).backward()``.

    Args: as :func:`pcfast.relax`, centred nudging included, and
        reduction: of loss and updates, too: with a mean for the weights both are divided by the rows.
        update_scale: a factor > 0 of the updates, not of the loss that is returned.
        return_output: also return the forward pass's output vhat_L (detached); a tuple of a graph's several.

    Returns:
        The loss, 0-dim: on a graph, and with ``precision``, the energy at the start, which is the loss where nothing
        but inputs is clamped and precision is 1; with ``return_output`` the pair ``(loss, output)``.

    Raises:
        ArgumentError and its kinds, BackendError, RelaxationDiverged: ``.grad`` is untouched then.
    """
    settings = Settings(
        loss, method, step_size, num_steps, belief_optimizer, nudging, backend, vinit, reduction, update_scale,
        normalizer, tolerance, check, precision, noise, generator,
    )  # fmt: skip
    return loss_with(settings, model, x, y, return_output, clamp)


def loss_with(
    settings: Settings,
    model: nn.Sequential | Graph,
    x: Tensor | Mapping[str, Tensor] | None,
    y: Tensor | Mapping[str, Tensor] | None,
    return_output: bool = False,
    clamp: Mapping[str, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`pc_loss`."""
    if torch.compiler.is_dynamo_compiling():
        from . import compiled  # here: it needs torch's compiler, which takes long to import

        return compiled.loss_with(settings, model, x, y, return_output, clamp)
    if isinstance(model, Graph) or settings.beyond_chains or clamp is not None:
        return _graph_loss_with(settings, model, x, y, return_output, clamp)
    if not torch.is_grad_enabled():
        value, output = forward_loss(model, x, y, settings)
        return (value, output) if return_output else value
    validation.check_trainable(model)
    outcome, _ = solve(model, x, y, settings)
    share = reductions.share(settings.reduction, x, settings.normalizer)
    value = reductions.reduced(outcome.loss, share)
    if outcome.gradients:
        scale = share * settings.update_scale
        value = _Updates.apply(value, scale, list(outcome.gradients.values()), *outcome.gradients)
    return (value, outcome.output) if return_output else value


def _graph_loss_with(
    settings: Settings, model: nn.Sequential | Graph, x, y, return_output: bool, clamp, settled: bool = False
) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
    """As :func:`pc_loss`, of a graph, or of a chain with settings that only graphs have.

    With ``settled`` loss and outputs are those of the last iteration.
    """
    chain = on_graphs.chain_of(model, settings, x, y, clamp)
    if chain is not None:
        return loss_with(settings, *chain, return_output)
    trains = torch.is_grad_enabled()
    if trains:
        validation.check_trainable(model)
    # without gradients the energy at the start is all that is wanted
    asked = settings if trains else replace(settings, method="strict", num_steps=0, step_size=0.1)
    wanted = NOTHING_BUT_UPDATES if trains else Wanted(gradients=False)
    outcome, _ = on_graphs.solve(model, x, y, asked, clamp, wanted)
    share = reductions.share(settings.reduction, on_graphs.given_tensor(x, y, clamp), settings.normalizer)
    outputs, value = outcome.outputs, outcome.loss
    if settled:
        outputs = list(outcome.settled.values())
        value = settings.described_loss().value(outputs[0], y)
    value = reductions.reduced(value, share)
    if trains and outcome.gradients:
        scale = share * settings.update_scale
        value = _Updates.apply(value, scale, list(outcome.gradients.values()), *outcome.gradients)
    return (value, outputs[0] if len(outputs) == 1 else tuple(outputs)) if return_output else value


def reconstruction_loss(
    settings: Settings, graph: Graph, x: Tensor, y: Tensor, return_output: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`loss_with`, of a graph with latent roots as relaxation leaves its only output.

    ``x`` is for the graph's inputs; one without any infers its roots from ``y`` alone.
    """
    return _graph_loss_with(
        settings, graph, x if graph.inputs else None, y, return_output, None, settled=True
    )


class PredictiveCoding(nn.Module):
    """:func:`pc_loss` as a module: ``pc(x)`` predicts, ``pc(x, y)`` gives the loss.

    Works wherever a module does: DistributedDataParallel, AMP, state_dict, checkpoints. The model is
    ``self.model``, the loss ``self.loss`` (its class weights move with ``.to(device)`` where it is a module).

    DistributedDataParallel averages gradients over its W processes. With equal shards of a batch of B rows the
    updates are those of the full batch with

        a sum loss, any method:                         (W * ddp(x, y)).backward()
        a mean loss, "exact" or "fixed_prediction":     ddp(x, y).backward()
        a mean loss and normalizer=B, any method:       (W * ddp(x, y)).backward()
        any reduction but "sum", and normalizer=B:      (W * ddp(x, y)).backward()

    "strict" with a plain mean relaxes each shard at W times the scale and differs.

    Args: as :func:`pc_loss`. All are attributes; what is assigned to them holds from the next call on.
    """

    def __init__(
        self,
        model: nn.Sequential | Graph,
        *,
        loss: LossLike | Mapping[str, LossLike] = "cross_entropy",
        method: str = "strict",
        step_size: StepSizes = 0.1,
        num_steps: int = 20,
        belief_optimizer: BeliefOptimizer | None = None,
        nudging: Nudging | None = None,
        backend: str = "auto",
        vinit: float | None = None,
        reduction: str = "sum",
        update_scale: float = 1.0,
        normalizer: int | None = None,
        tolerance: float | None = None,
        check: str = "auto",
        precision: Precisions | None = None,
        noise: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        settings = Settings(
            loss, method, step_size, num_steps, belief_optimizer, nudging, backend, vinit, reduction, update_scale,
            normalizer, tolerance, check, precision, noise, generator,
        )  # fmt: skip
        if isinstance(model, Graph) or settings.beyond_chains:
            describe_graph(model)
            relaxing = replace(settings.checked_on_graphs(), step_size=step_size)
        else:
            describe(model, hooks=False)  # those that are there in a call count
            relaxing = settings.checked()
            settings.described_loss()
            validation.check_start_of_all(vinit, relaxing.method)
        if normalizer is not None:
            validation.check_count("normalizer", normalizer)
        self.model = model
        for field in fields(settings):
            setattr(self, field.name, getattr(settings, field.name))
        self.method, self.step_size, self.num_steps = relaxing.method, relaxing.step_size, relaxing.num_steps

    def __setattr__(self, name: str, value) -> None:
        if name == "loss" and not isinstance(value, nn.Module):
            self.__dict__.get("_modules", {}).pop("loss", None)  # a name or a function after a module
        super().__setattr__(name, value)

    @property
    def settings(self) -> Settings:
        """Those of the next call."""
        return Settings(
            self.loss, self.method, self.step_size, self.num_steps, self.belief_optimizer, self.nudging, self.backend,
            self.vinit, self.reduction, self.update_scale, self.normalizer, self.tolerance, self.check,
            self.precision, self.noise, self.generator,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor | Mapping[str, Tensor] | None = None,
        y: Tensor | Mapping[str, Tensor] | None = None,
        *,
        clamp: Mapping[str, Tensor] | None = None,
        return_output: bool = False,
    ):
        """``model(x)`` without ``y`` and ``clamp``; with one of them what :func:`pc_loss` gives."""
        if y is None and clamp is None:
            return self.model(**x) if isinstance(x, Mapping) else self.model(x)
        sharding.check_whole(self, self.tolerance)
        return loss_with(self.settings, self.model, x, y, return_output, clamp)

    def extra_repr(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in fields(Settings)}
        if isinstance(self.loss, nn.Module):
            del shown["loss"]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)
