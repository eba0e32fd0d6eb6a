"""Feedback stage of linear layers: beliefs of many layers move in one launch.

    r = delta_{l+1} W_{l+1}                                      the error above, pulled back to v_l
    d_l <- d_l + eta (eps_l - r)

Layer 1, whose prediction is constant (docs/method.md fact 2), has eps_1 = -d_1. In Gram form (fact 7) layer 1's
beliefs leave the loop and, with G = W_2 W_2^T in the place of W,

    s <- (1 - eta) s - eta delta_2 G            sum <- (1 - eta) sum + eta delta_2

With momentum (momentum.py) d, s and sum move along velocities, whose steps are eps_l - r, -(s + delta_2 G) and
delta_2 - sum.

Strict predictive coding in deviation form: Rosenbaum, PLOS ONE 17(3) e0266102 (2022).

    delta_{l+1} (batch, K)  --tiles of ROWS x REDUCTION-->  +--------------------+
                                                            | accumulator r      | --epilogue--> d, copy of d
    W_{l+1} (K, N)       --tiles of REDUCTION x COLUMNS-->  | ROWS x COLUMNS     |     ^
                                                            +--------------------+     d, error, velocity (read once)

Arguments of the kernel:

    state       arena, fp32                 error read; d (or s and sum) updated, with momentum their velocities too;
                                            error of layer 1 written
    operand     arena, fp32 or bf16         delta and W read; d is copied into it, rounded, unless products are
                                            tf32x3: these read float32, and ``operand`` is ``state``
    table       (rows, WIDTH) int64         rows as linear_rows.FeedbackRow, highest layer first
    first_bad   (layers,) int32             lowered to ``iteration`` where a new state is NaN or infinite
    count       int32                       the first so many rows take part (docs/method.md fact 3)
    iteration   int32                       for first_bad
    eta         fp32                        step size of this iteration
    momentum    fp32, or None for none

Programs are persistent and no tile is split along the reduction, as in linear_predict.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .first_bad import note_bad
from .launching import launch
from .linear_predict import MAX_REGISTERS, PART, halves, tile_position
from .linear_rows import CLAMPED, GRAM_UPDATE, WIDTH
from .momentum import with_momentum
from .tf32 import store_operand


@triton.jit
def _finish(
    accumulator,
    first_row,
    first_column,
    state,
    operand,
    first_bad,
    row,
    iteration,
    eta,
    momentum,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What follows the product, for a tile whose corner is at (first_row, first_column)."""
    kind = tl.load(row + 0)
    batch = tl.load(row + 1).to(tl.int32)
    stride = tl.multiple_of(tl.load(row + 8), ALIGNED)
    corner = stride * first_row + first_column
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    where = rows[:, None] * stride.to(tl.int32) + columns[None, :]
    inside = (rows < batch - first_row)[:, None] & (columns < stride.to(tl.int32) - first_column)[None, :]
    if kind == GRAM_UPDATE:
        s = state + tl.multiple_of(tl.load(row + 12), 16) + corner
        total = state + tl.multiple_of(tl.load(row + 13), 16) + corner
        old = tl.load(s + where, mask=inside, other=0.0)
        if momentum is None:
            moved = (1 - eta) * old - eta * accumulator
        else:
            velocity = state + tl.multiple_of(tl.load(row + 15), 16) + corner
            moved = old + eta * with_momentum(-old - accumulator, velocity + where, momentum, inside)
        tl.store(s + where, moved, mask=inside)
        # delta's own tile: G is square, so delta lies as s does
        delta = operand + tl.multiple_of(tl.load(row + 4), 16) + corner
        own = tl.load(delta + where, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(total + where, mask=inside, other=0.0)
        if momentum is None:
            grown = (1 - eta) * before + eta * own
        else:
            velocity = state + tl.multiple_of(tl.load(row + 16), 16) + corner
            grown = before + eta * with_momentum(own - before, velocity + where, momentum, inside)
        tl.store(total + where, grown, mask=inside)
    else:
        d = state + tl.multiple_of(tl.load(row + 9), 16) + corner
        error = state + tl.multiple_of(tl.load(row + 11), 16) + corner
        old = tl.load(d + where, mask=inside, other=0.0)
        if kind == CLAMPED:
            difference = -old
            tl.store(error + where, difference, mask=inside)
        else:
            difference = tl.load(error + where, mask=inside, other=0.0)
        step = difference - accumulator
        if momentum is not None:
            velocity = state + tl.multiple_of(tl.load(row + 15), 16) + corner
            step = with_momentum(step, velocity + where, momentum, inside)
        moved = old + eta * step
        tl.store(d + where, moved, mask=inside)
        if INPUT_PRECISION != "tf32x3":
            copy = operand + tl.multiple_of(tl.load(row + 10), 16) + corner
            store_operand(copy + where, moved, inside, INPUT_PRECISION)
    note_bad(first_bad, tl.load(row + 14), iteration, moved, inside)


@triton.jit
def _finish_in_parts(
    accumulator,
    first_row,
    first_column,
    arguments,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """As linear_predict's. arguments: a tuple, of _finish from ``state`` on."""
    if ROWS * COLUMNS > PART:
        left, right = halves(accumulator, ROWS, COLUMNS)
        HALF: tl.constexpr = COLUMNS // 2
        _finish_in_parts(left, first_row, first_column, arguments, INPUT_PRECISION, ALIGNED, ROWS, HALF)
        _finish_in_parts(
            right, first_row, first_column + HALF, arguments, INPUT_PRECISION, ALIGNED, ROWS, HALF
        )
    else:
        _finish(accumulator, first_row, first_column, *arguments, INPUT_PRECISION, ALIGNED, ROWS, COLUMNS)


@triton.jit
def feedback_tile(
    state,
    operand,
    first_bad,
    row,
    tile_row,
    tile_column,
    iteration,
    eta,
    momentum,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of one row of the table."""
    # fields in the order of linear_rows.FeedbackRow
    batch = tl.load(row + 1).to(tl.int32)
    reduction = tl.multiple_of(tl.load(row + 3).to(tl.int32), 16)
    delta = operand + tl.multiple_of(tl.load(row + 4), 16)
    delta_stride = tl.multiple_of(tl.load(row + 5), 16)
    weight = operand + tl.multiple_of(tl.load(row + 6), 16)
    weight_stride = tl.multiple_of(tl.load(row + 7), 16)

    # as in predict_tile: 32 bits inside a tile, columns over the padding of the weights
    first_row, first_column = tile_row * ROWS, tile_column * COLUMNS
    delta += delta_stride * first_row
    delta_stride_32, weight_stride_32 = delta_stride.to(tl.int32), weight_stride.to(tl.int32)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_batch, in_weight = rows < batch - first_row, columns < weight_stride_32 - first_column
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, reduction, REDUCTION):
        k = tl.arange(0, REDUCTION)
        in_reduction = k < reduction - start
        left = tl.load(
            delta + start + (rows[:, None] * delta_stride_32 + k[None, :]),
            mask=in_batch[:, None] & in_reduction[None, :],
            other=0.0,
        )
        right = tl.load(
            weight
            + (weight_stride * start + first_column)
            + (k[:, None] * weight_stride_32 + columns[None, :]),
            mask=in_reduction[:, None] & in_weight[None, :],
            other=0.0,
        )
        accumulator = tl.dot(left, right, accumulator, input_precision=INPUT_PRECISION)
    _finish_in_parts(
        accumulator,
        first_row,
        first_column,
        (state, operand, first_bad, row, iteration, eta, momentum),
        INPUT_PRECISION,
        ALIGNED,
        ROWS,
        COLUMNS,
    )


@triton.jit(do_not_specialize=["count", "iteration"])
def linear_feedback(
    state,
    operand,
    table,
    first_bad,
    count,
    iteration,
    eta,
    momentum,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    earlier = 0  # tiles of the rows before
    for index in range(count):
        row = table + index * WIDTH
        tile_rows = tl.cdiv(tl.load(row + 1).to(tl.int32), ROWS)
        tile_columns = tl.cdiv(tl.load(row + 2).to(tl.int32), COLUMNS)
        tiles = tile_rows * tile_columns
        # tile number i of the launch belongs to program i % programs
        tile = (program + programs - earlier % programs) % programs
        while tile < tiles:
            tile_row, tile_column = tile_position(tile, tile_rows, tile_columns)
            feedback_tile(
                state,
                operand,
                first_bad,
                row,
                tile_row,
                tile_column,
                iteration,
                eta,
                momentum,
                ROWS,
                COLUMNS,
                REDUCTION,
                INPUT_PRECISION,
                ALIGNED,
            )
            tile += programs
        earlier += tiles


def launch_linear_feedback(
    state: Tensor,
    operand: Tensor,
    table: Tensor,
    first_bad: Tensor,
    *,
    count: int,
    iteration: int,
    eta: float,
    momentum: float = 0.0,
    programs: int,
    constants: dict,
    warps: int,
    stages: int,
) -> None:
    """Launch on the current stream: the first ``count`` rows of ``table``, on a grid of ``programs``."""
    launch(
        linear_feedback,
        (programs,),
        state,
        operand,
        table,
        first_bad,
        count,
        iteration,
        eta,
        momentum or None,
        **constants,
        num_warps=warps,
        num_stages=stages,
        maxnreg=MAX_REGISTERS,
    )
