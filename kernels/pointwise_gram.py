"""Feedback into the clamped layer below a convolution, in Gram form: one launch after the product with G.

Layer 1's prediction is constant, so its beliefs leave the loop: Gram form (docs/method.md, fact 7). With
s = u_2 - uhat_2, delta_2 the error above pulled back to u_2, and r = delta_2 * G, G being K correlated with itself:

    s <- (1 - eta) s - eta r            sum <- (1 - eta) sum + eta delta_2

and after the loop d_1 is minus the transposed convolution of sum. With momentum (momentum.py) both move along
velocities, whose steps are -(s + r) and delta_2 - sum. All arrays lie side by side, channels-last, so a program takes
BLOCK neighbours of each, whatever the map's shape.

Arguments of the kernel, contiguous (B, H, W, C):

    s           fp32          in place
    total       fp32          sum, in place
    delta       fp32, bf16    delta_2
    pulled      fp32, bf16    r
    velocity, total_velocity  fp32, in place: of s and sum; None without momentum
    first_bad   (layers,)     int32: as pointwise_update's, of s
    layer, iteration          int32: the element of first_bad, what is written there
    elements    int           B H W C
    step_size   fp32          eta of this iteration
    momentum    fp32          None without
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .first_bad import note_bad
from .launching import launch
from .momentum import check_velocity, with_momentum

#: Elements a program: 4 for each of its 128 threads, 16 bytes of fp32.
BLOCK = 512


@triton.jit(do_not_specialize=["layer", "iteration"])
def pointwise_gram_kernel(
    s,
    total,
    delta,
    pulled,
    velocity,
    total_velocity,
    first_bad,
    elements,
    layer,
    iteration,
    step_size,
    momentum,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    r = tl.load(pulled + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    delta_tile = tl.load(delta + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    old = tl.load(s + offs, mask=mask, other=0.0)  # [BLOCK]
    if momentum is None:
        moved = (1 - step_size) * old - step_size * r
    else:
        moved = old + step_size * with_momentum(-old - r, velocity + offs, momentum, mask)
    tl.store(s + offs, moved, mask=mask)
    total_old = tl.load(total + offs, mask=mask, other=0.0)  # [BLOCK]
    if momentum is None:
        total_new = (1 - step_size) * total_old + step_size * delta_tile
    else:
        total_new = total_old + step_size * with_momentum(
            delta_tile - total_old, total_velocity + offs, momentum, mask
        )
    tl.store(total + offs, total_new, mask=mask)
    note_bad(first_bad, layer, iteration, moved, mask)


def gram_update(
    *,
    s: Tensor,
    total: Tensor,
    delta: Tensor,
    pulled: Tensor,
    step_size: float,
    first_bad: Tensor,
    layer: int,
    iteration: int,
    velocity: Tensor | None = None,
    total_velocity: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """Move ``s`` and ``total`` in place, and note the iteration where s is no longer finite.

    Raises:
        ValueError: the tensors do not lie alike, or there are not two velocities exactly with momentum.
    """
    check_velocity(momentum, velocity, total_velocity)
    arrays = dict(total=total, delta=delta, pulled=pulled)
    if velocity is not None:
        arrays |= dict(velocity=velocity, total_velocity=total_velocity)
    for name, tensor in arrays.items():
        if tensor.shape != s.shape or not (tensor.is_contiguous() and s.is_contiguous()):
            raise ValueError(f"{name} {tuple(tensor.shape)} does not lie as s {tuple(s.shape)}, contiguous")
    if s.numel() == 0:
        return
    launch(
        pointwise_gram_kernel,
        (triton.cdiv(s.numel(), BLOCK),),
        s,
        total,
        delta,
        pulled,
        velocity,
        total_velocity,
        first_bad,
        s.numel(),
        layer,
        iteration,
        float(step_size),
        momentum or None,
        BLOCK=BLOCK,
    )
