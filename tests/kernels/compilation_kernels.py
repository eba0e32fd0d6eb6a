"""Small kernels on which the tests of `compilation` try the harness itself."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_and_add(x, y, factor, n, SIZE: tl.constexpr):
    r = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = r < n
    tl.store(
        y + r, tl.load(y + r, mask=mask, other=0.0) + factor * tl.load(x + r, mask=mask, other=0.0), mask=mask
    )


@triton.jit
def product(
    left,
    right,
    out,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """One tile of left (., K) right (K, BLOCK_N). IN_REGISTERS: the loop changes what it loaded, then multiplies."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    steps = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + steps
        a = tl.load(left + rows * K + k[None, :])
        b = tl.load(right + k[:, None] * BLOCK_N + columns)
        if IN_REGISTERS:
            a = tl.where(a > 0, a, 0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    tl.store(out + rows * BLOCK_N + columns, accumulator)


@triton.jit
def ill_typed(x):
    tl.store(x, tl.arange(0, 4) + tl.arange(0, 8))
