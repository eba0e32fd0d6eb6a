"""The iteration in which a layer's state was first NaN or infinite, noted by the kernels that move it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def note_bad(first_bad, layer, iteration, value, mask):
    """Lower first_bad[layer] to ``iteration`` where a value of the tile is NaN or infinite."""
    # written so that NaN counts as bad: it compares false
    bad = tl.where(tl.abs(value) < float("inf"), 0, 1) & mask.to(tl.int32)
    tl.atomic_min(first_bad + layer, iteration, mask=tl.max(bad) > 0, sem="relaxed")
