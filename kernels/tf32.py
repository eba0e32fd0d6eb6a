"""Operands of products, rounded where they are stored.

A Tensor Core ignores the low 13 bits of a float32 operand of TF32: unrounded operands are all truncated towards zero,
and the bias adds up over layers and iterations. They are rounded once, by the kernel that writes them. Loops of
products then only load, straight into shared memory, where Hopper's wgmma reads its left operand; one that is made in
registers may be overwritten while a wgmma still reads it (docs/kernels.md, Releases of triton).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What tl.dot is asked for; products of bf16 operands are exact whatever is said.
_INPUT_PRECISION = {"tf32": "tf32", "tf32x3": "tf32x3", "bf16": "ieee"}


def input_precision(precision: str, operand: torch.dtype) -> str:
    """``precision`` ("bf16", "tf32" or "tf32x3") as ``tl.dot`` takes it, for operands of dtype ``operand``.

    Raises:
        ValueError: the two do not go together.
    """
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    if precision not in _INPUT_PRECISION or operand != expected:
        raise ValueError(
            f"{precision!r} products of {operand} operands; bf16 reads bfloat16, tf32 and tf32x3 float32"
        )
    return _INPUT_PRECISION[precision]


@triton.jit
def round_to_tf32(x):
    """x (fp32) to the nearest TF32 number, ties away from zero as cvt.rna does; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def store_operand(pointers, x, mask, INPUT_PRECISION: tl.constexpr):
    """Store x (fp32) as a product of INPUT_PRECISION ("ieee" of bf16, "tf32" or "tf32x3") reads it."""
    if INPUT_PRECISION == "tf32":
        x = round_to_tf32(x)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """round_to_tf32 of a tensor, on the host's side of a launch."""
    rounded = ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x == x, rounded, x)


def as_read(operand: Tensor, precision: str) -> Tensor:
    """What products of ``precision`` ("bf16", "tf32" or "tf32x3") read of an operand, on the host's side."""
    return rounded_to_tf32(operand) if precision == "tf32" else operand
