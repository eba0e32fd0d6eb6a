"""Rounding to TF32. A matrix unit ignores the low 13 bits of what it reads: unrounded operands are all truncated
towards zero, and the bias adds up over layers and iterations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def round_to_tf32(x):
    """x (fp32) to the nearest TF32 number, ties away from zero as cvt.rna does; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """The same for a tensor on the host's side of a launch."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x == x, rounded, x)
