"""Kernels with the three faults that executing PTX found, as they once stood in pcfast's."""

from __future__ import annotations

import triton
import triton.language as tl

from pcfast.kernels.activations import act, exact_difference
from pcfast.kernels.tf32 import round_to_tf32


@triton.jit
def distance_to_maximum(u, out, ACT: tl.constexpr, EXACT: tl.constexpr):
    """out = max(a - max(a, b), b - max(a, b)), a and b the activations of two rows of u: 0 by the source."""
    at = tl.arange(0, 128)
    a, b = act(tl.load(u + at), ACT, 0.0), act(tl.load(u + 128 + at), ACT, 0.0)
    highest = tl.maximum(a, b)
    if EXACT:
        tl.store(out + at, tl.maximum(exact_difference(a, highest), exact_difference(b, highest)))
    else:
        tl.store(out + at, tl.maximum(a - highest, b - highest))


@triton.jit
def product_of_rounded(a, b, out, K, ROUND: tl.constexpr):
    """out (64, 64) = a (64, K) b^T (64, K)^T in TF32; where ROUND, a is rounded in registers on its way."""
    i, j, k = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for start in range(0, K, 32):
        left = tl.load(a + i[:, None] * K + start + k[None, :])
        if ROUND:
            left = round_to_tf32(left)
        right = tl.load(b + j[None, :] * K + start + k[:, None])
        total = tl.dot(left, right, total, input_precision="tf32")
    tl.store(out + i[:, None] * 64 + j[None, :], total)
