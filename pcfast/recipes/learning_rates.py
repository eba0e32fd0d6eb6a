"""Schedules of the learning rate that published recipes use, as schedulers of torch.optim.lr_scheduler."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..arguments import checked_number
from ..problem.validation import check_count


def warmup_cosine(
    optimizer: Optimizer, steps: int, *, warmup: float, peak: float = 1.1, end: float = 0.1
) -> LambdaLR:
    """The optimiser's learning rate times a factor that grows linearly from 1, then falls along a cosine.

    optax's ``warmup_cosine_decay_schedule`` with init_value = lr, peak_value = peak lr, end_value = end lr.

    Args:
        optimizer: whose step t = 0, 1, ... takes factor t.
        steps: in all, >= 1; later ones stay at ``end``.
        warmup: steps up to the peak, 0 <= warmup < steps; need not be whole.
        peak, end: factors, >= 0.

    Raises:
        ArgumentError and its kinds: a value outside.
    """
    check_count("steps", steps)
    checked_number(
        "warmup", warmup, lambda w: 0 <= w < steps, f"a number from 0 to less than all {steps} steps"
    )
    for name, value in (("peak", peak), ("end", end)):
        checked_number(name, value, lambda v: v >= 0, "a finite number >= 0")

    def factor(step: int) -> float:
        if step < warmup:
            return 1 + (peak - 1) * step / warmup
        done = min((step - warmup) / (steps - warmup), 1.0)
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
