"""The conventions of other programs, as keyword arguments of pc_loss and relax (docs/conventions.md: what was read).

    preset = pcfast.presets.jpc(len(x), step_size=0.5, num_steps=10)
    loss = pcfast.pc_loss(model, x, y, **preset)
    (preset.scale * loss).backward()           # .grad is that program's gradient of its energy

Programs that take the weights' errors at the last beliefs get one more iteration, of step size 0: it evaluates the
errors that the updates use, and moves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F

from . import validation
from .belief_optimizers import StepSize
from .errors import ArgumentError
from .losses import LossLike, half_squared_error

#: Losses as the programs with an energy sum them over a batch.
_SUMS = {"mse": half_squared_error, "cross_entropy": functools.partial(F.cross_entropy, reduction="sum")}


@dataclass(frozen=True)
class Preset:
    """``pc_loss(model, x, y, **preset)``; other arguments beside it, where the program has them too.

    Attributes:
        loss, method, step_size, num_steps: as for :func:`pcfast.pc_loss`.
        scale: the program's updates are ``scale`` times what these give; ``scale`` times the loss is its energy of
            the output at the forward pass.
    """

    loss: LossLike
    method: str
    step_size: StepSize
    num_steps: int
    scale: float = 1.0

    def keys(self) -> Iterator[str]:
        """The names of the keyword arguments."""
        return iter(("loss", "method", "step_size", "num_steps"))

    def __getitem__(self, name: str):
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


def torch2pc(
    *,
    loss: LossLike = "cross_entropy",
    method: str = "strict",
    step_size: float = 0.1,
    num_steps: int = 20,
) -> Preset:
    """``PCInfer`` of Torch2PC: any loss with the reduction that it has, updates from the last iteration's errors.

    Args:
        loss, step_size, num_steps: its LossFun, eta and n.
        method: "strict", "fixed_prediction" or "exact".

    Raises:
        ArgumentError and its kinds.
    """
    if method not in ("strict", "fixed_prediction", "exact"):
        raise ArgumentError("method", repr(method), 'one of "strict", "fixed_prediction", "exact"')
    num_steps = validation.checked_steps(num_steps)
    return Preset(loss, method, validation.checked_step_size(step_size), num_steps)


def pcx(
    rows: int,
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str = "mse",
    reduction: str = "sum",
) -> Preset:
    """PCX: ``se_energy`` at hidden vodes, optax.sgd on the beliefs; the batch is reduced by the caller's ``energy``.

    Args:
        rows: of the batch.
        step_size: of optax.sgd on the beliefs, or one an iteration. Its momentum:
            ``belief_optimizer=pcfast.GradientDescent(momentum)`` beside the preset.
        num_steps: T.
        loss: of the last vode: "mse" (``se_energy``) or "cross_entropy" (``ce_energy``).
        reduction: "sum" for lax.psum over the batch, "mean" for lax.pmean.

    Raises:
        ArgumentError and its kinds.
    """
    if reduction not in ("sum", "mean"):
        raise ArgumentError("reduction", repr(reduction), '"sum" (lax.psum) or "mean" (lax.pmean)')
    validation.check_count("rows", rows)
    return _with_fresh_errors(loss, step_size, num_steps, 1 if reduction == "sum" else rows)


def jpc(rows: int, *, step_size: float | Sequence[float], num_steps: int, loss: str = "mse") -> Preset:
    """JPC, discrete updates: ``update_pc_activities`` with optax.sgd, then ``update_pc_params``.

    Its energy is a mean over the batch. Standard parameterisation, no regularisers.

    Args:
        rows: of the batch.
        step_size: of optax.sgd on the activities, or one an iteration; momentum as for :func:`pcx`.
        num_steps: calls of ``update_pc_activities``.
        loss: loss_id: "mse", or "cross_entropy" for its "ce".

    Raises:
        ArgumentError and its kinds.
    """
    validation.check_count("rows", rows)
    return _with_fresh_errors(loss, step_size, num_steps, rows)


def epc(rows: int, *, step_size: float, num_steps: int, loss: str = "mse") -> Preset:
    """The program of Goemaere et al., class PCE: errors descend the summed energy, weights its mean.

    The mean is divided by min(1, e_lr iters) once more, as that program does.

    Args:
        rows: its batch_size.
        step_size, num_steps: e_lr > 0 and iters >= 1.
        loss: its output_loss: "mse", or "cross_entropy" for its "ce".

    Raises:
        ArgumentError and its kinds.
    """
    validation.check_count("rows", rows)
    validation.check_count("num_steps", num_steps)
    step_size = validation.checked_step_size(step_size)
    if step_size == 0:
        raise ArgumentError("step_size", "0", "a finite number > 0", "Updates are divided by it.")
    energy_scale = min(1.0, step_size * num_steps)
    return Preset(_sum_of(loss), "error_based", step_size, num_steps, 1 / (rows * energy_scale))


def _sum_of(loss: str) -> LossLike:
    if loss not in _SUMS:
        raise ArgumentError("loss", repr(loss), f"one of {sorted(_SUMS)}", "These programs know no others.")
    return _SUMS[loss]


def _with_fresh_errors(loss: str, step_size, num_steps: int, divisor: int) -> Preset:
    """Gradient descent on the summed energies over ``divisor``, updates from errors at the last beliefs."""
    num_steps = validation.checked_steps(num_steps)
    sizes = validation.checked_step_sizes(step_size, num_steps)
    sizes = sizes if isinstance(sizes, tuple) else (sizes,) * num_steps
    schedule = (*(size / divisor for size in sizes), 0.0)
    return Preset(_sum_of(loss), "strict", schedule, num_steps + 1, 1 / divisor)
