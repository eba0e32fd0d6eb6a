"""Feedback into the clamped layer below a convolution, in Gram form: one launch after the product with G.

Layer 1's prediction is constant, so its beliefs leave the loop (docs/method.md fact 7). With s = u_2 - uhat_2,
delta_2 the error above pulled back to u_2, and r = delta_2 * G, where G is K correlated with itself:

    s <- (1 - eta) s - eta r            sum <- (1 - eta) sum + eta delta_2

and after the loop d_1 is minus the transposed convolution of sum. All four lie side by side, channels-last, so a
program takes BLOCK neighbours of each, whatever the map's shape.

Arguments of the kernel, contiguous (B, H, W, C):

    s           fp32          in place
    total       fp32          sum, in place
    delta       fp32, bf16    delta_2
    pulled      fp32, bf16    r
    first_bad   (layers,)     int32: as pointwise_update's, of s
    layer, iteration          int32: the element of first_bad, what is written there
    elements    int           B H W C
    step_size   fp32          eta
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .first_bad import note_bad

#: Elements a program: 4 for each of its 128 threads, 16 bytes of fp32.
BLOCK = 512


@triton.jit(do_not_specialize=["layer", "iteration"])
def pointwise_gram_kernel(
    s,
    total,
    delta,
    pulled,
    first_bad,
    elements,
    layer,
    iteration,
    step_size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    r = tl.load(pulled + at, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
    moved = (1 - step_size) * tl.load(s + at, mask=inside, other=0.0) - step_size * r
    tl.store(s + at, moved, mask=inside)
    grown = (1 - step_size) * tl.load(total + at, mask=inside, other=0.0) + step_size * own
    tl.store(total + at, grown, mask=inside)
    note_bad(first_bad, layer, iteration, moved, inside)


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
) -> None:
    """Move ``s`` and ``total`` in place, and note the iteration where s is no longer finite.

    Raises:
        ValueError: the tensors do not lie alike.
    """
    for name, tensor in dict(total=total, delta=delta, pulled=pulled).items():
        if tensor.shape != s.shape or not (tensor.is_contiguous() and s.is_contiguous()):
            raise ValueError(f"{name} {tuple(tensor.shape)} does not lie as s {tuple(s.shape)}, contiguous")
    if s.numel() == 0:
        return
    pointwise_gram_kernel[(triton.cdiv(s.numel(), BLOCK),)](
        s,
        total,
        delta,
        pulled,
        first_bad,
        s.numel(),
        layer,
        iteration,
        float(step_size),
        BLOCK=BLOCK,
    )
