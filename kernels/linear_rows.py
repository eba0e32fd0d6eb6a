"""Descriptor rows: how the linear kernels learn which products belong to a launch.

A launch works on many layers at once. Each is one row of a table in device memory, ``WIDTH`` int64 numbers in the
order of the fields below. Matrices lie in two arenas, ``state`` (fp32) and ``operand`` (what matrix units read;
the same memory as ``state`` where products read fp32), and a row names them by their first element's index in the
arena: nothing in a table depends on an address, so it can be cached and uploaded before a CUDA graph is recorded.

Every matrix is row-major with a stride between rows of its own, and zeros between its columns and that stride, so
that products may run over the padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import triton.language as tl

WIDTH = tl.constexpr(20)

# what the epilogue of a predict row does
HIDDEN = tl.constexpr(0)  # error and delta of a hidden layer
TOP = tl.constexpr(1)  # error and delta at the output, from the loss
PRODUCT = tl.constexpr(2)  # s is stored, nothing else

# what the epilogue of a feedback row does
UPDATE = tl.constexpr(0)  # d += eta (error - r)
CLAMPED = tl.constexpr(1)  # layer 1, whose prediction is constant: error = -d, d += eta (error - r)
GRAM_UPDATE = tl.constexpr(2)  # s and its running sum instead of layer 1's beliefs (docs/method.md fact 7)


@dataclass(frozen=True)
class PredictRow:
    """One layer f_l of a predict launch: s = d W^T, then its epilogue.

    Attributes:
        kind: HIDDEN, TOP or PRODUCT.
        batch, width: rows and columns of the result.
        reduction: columns of d that are multiplied, padding included; 0 where d is still zero, or s is given.
        d_below, d_below_stride: (batch, reduction), operand.
        weight, weight_stride: W (width, reduction), operand.
        stride: between rows of all (batch, width) matrices of this row.
        uhat, d, error, delta, s: (batch, width); delta is an operand, the others are state.
        vhat, dense, mass: of TOP: output of the forward pass, target (batch, width), its row sums (batch).
        s_given: 1 where s is state and is read instead of multiplied (docs/method.md fact 7), else 0.
    """

    kind: int
    batch: int
    width: int
    reduction: int
    d_below: int
    d_below_stride: int
    weight: int
    weight_stride: int
    stride: int
    uhat: int
    d: int
    error: int
    delta: int
    s: int
    vhat: int
    dense: int
    mass: int
    s_given: int


@dataclass(frozen=True)
class FeedbackRow:
    """One coupling of a feedback launch: r = delta W through layer f_{l+1}, then the update of v_l.

    Attributes:
        kind: UPDATE, CLAMPED or GRAM_UPDATE.
        batch, width: rows and columns of r.
        reduction: columns of delta that are multiplied, padding included.
        delta, delta_stride: (batch, reduction), operand.
        weight, weight_stride: W (reduction, width), operand; the Gram matrix for GRAM_UPDATE.
        stride: between rows of all (batch, width) matrices of this row.
        d, error: (batch, width) state; d_operand: copy of d for products.
        s, sum: of GRAM_UPDATE, (batch, width) state.
        layer: index l of the belief, for reports of divergence.
        velocity, sum_velocity: with momentum, of d, or of s and sum, (batch, width) state.
    """

    kind: int
    batch: int
    width: int
    reduction: int
    delta: int
    delta_stride: int
    weight: int
    weight_stride: int
    stride: int
    d: int
    d_operand: int
    error: int
    s: int
    sum: int
    layer: int
    velocity: int
    sum_velocity: int


def as_numbers(row: PredictRow | FeedbackRow) -> list[int]:
    """The row as the kernels read it."""
    numbers = [int(getattr(row, field.name)) for field in fields(row)]
    return numbers + [0] * (WIDTH.value - len(numbers))
