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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """One tile of left (., K) right (K, COLUMNS). IN_REGISTERS: the loop changes what it loaded, then multiplies."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    steps = tl.arange(0, REDUCTION)
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, REDUCTION):
        k = start + steps
        a = tl.load(left + rows * K + k[None, :])
        b = tl.load(right + k[:, None] * COLUMNS + columns)
        if IN_REGISTERS:
            a = tl.where(a > 0, a, 0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    tl.store(out + rows * COLUMNS + columns, accumulator)


@triton.jit
def ill_typed(x):
    tl.store(x, tl.arange(0, 4) + tl.arange(0, 8))
