"""Over a batch: what beliefs and what weights descend, the sum over rows or its mean.

Programs of predictive coding differ in this more often than in anything else (docs/conventions.md). pcfast relaxes
the energy summed over rows; beliefs on its mean move as on the sum with another step size.
"""

from __future__ import annotations

from torch import Tensor

from ..arguments import checked_number
from ..errors import ArgumentError
from ..losses import Loss
from .belief_optimizers import BeliefOptimizer, StepSize
from .validation import check_count

#: What each reduces to the mean over rows: the energy that beliefs descend, and the weights' gradient.
REDUCTIONS = {
    "sum": (False, False),
    "mean": (True, True),
    "sum_beliefs_mean_weights": (False, True),
}


def checked(reduction: str, method: str) -> str:
    """``reduction``.

    Raises:
        ArgumentError: none, or one that the method has no use for.
    """
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ArgumentError("reduction", repr(reduction), f"one of {tuple(REDUCTIONS)}")
    if reduction == "mean" and method == "zero_divergence":
        raise ArgumentError(
            "reduction", "'mean' with method 'zero_divergence', whose step size is fixed to 1",
            "'sum' or 'sum_beliefs_mean_weights'",
        )  # fmt: skip
    return reduction


def checked_scale(update_scale: float) -> float:
    """``update_scale`` as a finite float > 0; ArgumentError and its kinds for others."""
    remedy = "1 leaves the updates as they are; their sign is that of .grad."
    return checked_number("update_scale", update_scale, lambda s: s > 0, "a finite number > 0", remedy)


def check_loss(reduction: str, loss: Loss | None) -> None:
    """Raise ArgumentError where ``loss`` is known to be a mean already, which would be divided by the rows twice."""
    if reduction != "sum" and loss is not None and loss.known and loss.settings[0] == "mean":
        raise ArgumentError(
            "reduction", f"{reduction!r} with a loss that is a mean over the batch", "a loss summed over the batch",
            "pcfast.losses.half_squared_error, or torch's with reduction='sum'.",
        )  # fmt: skip


def rows_of(x: Tensor, normalizer: int | None) -> int:
    """The rows that a mean is over: those of ``x``, or of the global batch where ``normalizer`` says so."""
    if normalizer is None:
        return max(len(x), 1)
    check_count("normalizer", normalizer)
    return normalizer


def of_beliefs(
    reduction: str, rows: int, optimizer: BeliefOptimizer, step_size: StepSize
) -> tuple[BeliefOptimizer, StepSize]:
    """Belief optimiser and step size with which the sum over ``rows`` rows is descended as ``reduction`` asks."""
    return optimizer.on_mean(rows, step_size) if REDUCTIONS[reduction][0] else (optimizer, step_size)


def share(reduction: str, x: Tensor, normalizer: int | None) -> float:
    """What the summed loss, and the weights' summed gradient, are multiplied by."""
    return 1 / rows_of(x, normalizer) if REDUCTIONS[reduction][1] else 1.0


def reduced(loss: Tensor, share: float) -> Tensor:
    """The summed ``loss`` times ``share``; itself where that is 1: no launch."""
    return loss if share == 1.0 else loss * share
