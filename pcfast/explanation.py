"""What would run, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backends import BACKENDS, choose_backend
from .backends.choice import requested
from .errors import ArgumentTypeError, ShapeError
from .losses import LossLike
from .model.describe import describe
from .model.placement import common_placement
from .model.spec import Network
from .precision import choose_precision
from .problem import validation
from .problem.belief_optimizers import BeliefOptimizer
from .problem.nudging import Nudging
from .problem.plan import ALIASES, Plan, plan
from .problem.settings import Settings
from .relaxation import cuda_graphs


@dataclass(frozen=True, repr=False)
class Explanation:
    """A plan in words; ``print`` it.

    Attributes:
        network: the model as pcfast reads it.
        plan: backend, Gram form, precision, exact work.
        refused: backend -> why it does not run.
        kernels: what the backend says about the layers, where it has kernels of its own.
    """

    network: Network
    plan: Plan
    refused: dict[str, str]
    kernels: tuple[str, ...] = ()

    def __repr__(self) -> str:
        plan = self.plan
        said = [alias for alias, method in ALIASES.items() if method == plan.method]
        method = f"{plan.method} ({' or '.join(said)})" if said else plan.method
        lines = [f"{method}, {plan.num_steps} iterations, on backend {plan.backend}"]
        lines += [f"  {name} refused: {reason}" for name, reason in self.refused.items()]
        if not plan.belief_optimizer.plain:
            lines.append(f"beliefs move by {plan.belief_optimizer}")
        state, operand = (
            str(d).removeprefix("torch.") for d in (plan.precision.state, plan.precision.operand)
        )
        if plan.literal:
            lines.append("precision: the model's own")
        else:
            lines.append(f"precision: state {state}, matrix operands {operand}")
        if plan.precision.note:
            lines.append(f"  {plan.precision.note}")
        lines.append(f"Gram form of layer 1: {'yes' if plan.gram else 'no'} ({plan.gram_reason})")
        if plan.literal:
            lines.append("multiply-adds a step: not counted for the literal loop")
        elif plan.method == "incremental":
            lines.append("multiply-adds a step: not counted where parameters move between iterations")
        elif plan.work is None:
            lines.append("multiply-adds a step: not known, an opaque layer hides its shapes")
        else:
            work = plan.work
            lines.append(
                f"multiply-adds a step: {work.total:,} = {work.forward:,} forward + {work.relaxation:,} relaxation "
                f"+ {work.gradients:,} weight gradients"
            )
        for layer, shapes in zip(self.network.layers, plan.shapes, strict=True):
            size = "shape not known" if shapes is None else f"{shapes[0]} -> {shapes[-1]}"
            lines.append(f"{layer.label}: {size}")
        lines += [f"  {op.name} runs through torch autograd: {op.why}" for op in self.network.opaque]
        lines += self.kernels
        return "\n".join(lines)


def explain(
    model: nn.Sequential,
    x_shape: tuple[int, ...],
    device: str | torch.device | None = None,
    *,
    method: str = "strict",
    num_steps: int = 20,
    backend: str = "auto",
    step_size: float | Sequence[float] = 0.1,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
    vinit: list[Tensor | None] | float | None = None,
    loss: LossLike | None = None,
    reduction: str = "sum",
    update_scale: float = 1.0,
    tolerance: float | None = None,
) -> Explanation:
    """Say which backend would run, why the others were passed over, and the exact work.

    Args:
        model: ``nn.Sequential`` of PC layers.
        x_shape: shape of the input, batch included.
        device: where it would run; None means where the model is.
        method, num_steps, backend, step_size, belief_optimizer, nudging, vinit, reduction, update_scale, tolerance:
            as for :func:`pcfast.pc_loss`, or method "incremental"; the work is that of all iterations.
        loss: as for :func:`pcfast.pc_loss`; None where it is not decided yet.

    Raises:
        ArgumentError and its kinds, BackendError.
    """
    network = describe(model)
    settings = Settings(
        loss, method, step_size, num_steps, belief_optimizer, nudging, backend, vinit, reduction, update_scale,
        tolerance=tolerance,
    )  # fmt: skip
    relaxing = settings.checked(moves=True)
    method, optimizer = relaxing.method, relaxing.belief_optimizer
    _, num_steps = validation.fixed_settings(method, network.depth, relaxing.step_size, relaxing.num_steps)
    described = settings.described_loss(known=False)
    try:
        shape = tuple(int(size) for size in x_shape)
    except (TypeError, ValueError):
        raise ArgumentTypeError("x_shape", repr(x_shape), "a tuple of ints, batch included") from None
    if len(shape) < 2 or min(shape) < 1:
        raise ShapeError("x_shape", str(shape), "(batch, ...) with positive sizes")
    where, dtype = common_placement(model) or (torch.device("cpu"), torch.get_default_dtype())
    where = where if device is None else validation.checked_device(device)
    if not isinstance(vinit, list | tuple):
        validation.check_start_of_all(vinit, method)
    fresh = vinit is None and (optimizer.rests or num_steps == 0)
    kind = "cross_entropy" if described is None else described.kind
    chosen, planned = choose_backend(
        backend,
        plan(
            network, where, dtype, shape, choose_precision(where.type, dtype), method, num_steps, fresh,
            loss=kind, belief_optimizer=optimizer, nudging=nudging, tolerance=relaxing.tolerance,
        ),
        graphs=cuda_graphs.switched_on(),
    )  # fmt: skip
    refused, asked = dict(planned.refusals), requested(backend)
    for name in BACKENDS:
        if name != chosen.name and name not in refused:
            wanted = f'backend="{asked}" was asked for' if asked != "auto" else f"{chosen.name} comes first"
            refused[name] = wanted
    return Explanation(network, planned, refused, tuple(chosen.describe(planned)))
