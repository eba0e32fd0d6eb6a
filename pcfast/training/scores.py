"""How good outputs are: accuracy where targets are classes, R^2 where they are values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import LossLike, describe_loss

_SUM_TOLERANCE = 1e-3  # of probabilities in 16 bits


def are_classes(y: Tensor, loss: LossLike) -> bool:
    """Whether targets ``y`` are class indices (N,), or class probabilities (N, C) with C >= 2.

    Cross-entropy takes nothing else. For every other loss rows of numbers in [0, 1] that add up to 1, as one-hot
    rows do, are probabilities; all others are values: regression.
    """
    if not (y.is_floating_point() or y.is_complex()) or describe_loss(loss).kind == "cross_entropy":
        return True
    if y.is_complex() or y.dim() != 2 or y.shape[1] < 2:
        return False
    return bool(((y >= 0) & (y <= 1)).all() and ((y.double().sum(1) - 1).abs() <= _SUM_TOLERANCE).all())


def hits(output: Tensor, y: Tensor) -> Tensor:
    """Number of rows of ``output`` (B, C) whose largest entry is the target's class: 0-dim int64."""
    return (output.argmax(1) == (y if y.dim() == 1 else y.argmax(1))).sum()


def residual(output: Tensor, y: Tensor) -> Tensor:
    """Sum of |output - y|^2 over the batch: 0-dim float64."""
    difference = (output - y).abs()
    return difference.double().square().sum()


def spread(y: Tensor) -> Tensor:
    """Sum of |y - mean(y)|^2, with a mean for every number of a target: 0-dim float64."""
    y = y.to(torch.complex128 if y.is_complex() else torch.float64)
    return (y - y.mean(0)).abs().square().sum()


def r2(residual: float, spread: float) -> float:
    """R^2 = 1 - residual / spread: 1 for exact outputs, 0 for the mean target; NaN where all targets are the same."""
    return 1 - residual / spread if spread > 0 else float("nan")
