"""Momentum of beliefs: their velocity, a state array beside them (docs/method.md, Belief optimisers).

    m <- momentum m + step            step: minus the gradient of the energy, eps - r

from m = 0, and d <- d + eta_t m: m is minus the m of docs/method.md. Kernels take ``momentum`` None where beliefs
move plainly; it is then no argument of the compiled kernel, nor is there a velocity.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def with_momentum(step, velocity, momentum, mask):
    """The new m of a tile, ``velocity`` its pointers; it takes the old one's place."""
    moved = momentum * tl.load(velocity, mask=mask, other=0.0) + step
    tl.store(velocity, moved, mask=mask)
    return moved


def check_velocity(momentum: float, *velocities: Tensor | None) -> None:
    """Raise ValueError unless there are velocities exactly where there is momentum."""
    if any((velocity is None) == (momentum != 0) for velocity in velocities):
        raise ValueError(
            f"beliefs have a velocity exactly where they have momentum, which is {momentum} here"
        )
