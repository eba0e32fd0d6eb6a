"""Predict stage of linear layers: errors and deltas of many layers in one launch.

    s = d_{l-1} W_l^T                                            deviation of the pre-activation
    eps_l = [act(uhat_l + s) - act(uhat_l)] - d_l                the bracket without cancellation
    delta_l = eps_l * act'(uhat_l + s)                           what the feedback stage multiplies

and at the top eps_L = dLoss/dmu_L at mu_L = vhat_L + bracket. Strict predictive coding in deviation form: Rosenbaum,
PLOS ONE 17(3) e0266102 (2022); docs/method.md facts 3, 5, 7, 8.

    d_{l-1} (batch, K)  --tiles of ROWS x REDUCTION-->  +--------------------+
                                                        | accumulator, fp32  | --epilogue--> error, delta
    W_l (N, K)       --tiles of REDUCTION x COLUMNS-->  | ROWS x COLUMNS     |     ^
                                                        +--------------------+     uhat, d (one read each)

Arguments of the kernel:

    state       arena, fp32                 uhat, d, s, vhat, dense, mass read; error and s written
    operand     arena, fp32 or bf16         d_{l-1} and W read, both rounded where products are TF32; delta written so
    table       (rows, WIDTH) int64         rows as linear_rows.PredictRow, highest layer first
    products    int32                       the first so many rows take part ...
    front       int32                       ... and this one, unless it is negative (docs/method.md fact 3)
    loss_scale  fp32                        factor of (mu - y) for mean squared error

Programs are persistent: ``programs`` of them share out all tiles of all rows. No tile is split along the reduction,
so the order of sums depends on REDUCTION alone and a sample's result does not depend on its batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activations import IDENTITY, bracket_and_slope
from .launching import launch
from .linear_rows import PRODUCT, TOP, WIDTH
from .output_error import output_error_tile
from .tf32 import store_operand

# Tiles of so many rows of tiles are computed together: their operands stay in L2 in between.
_SUPER_ROWS = tl.constexpr(8)
# Elements of a tile that are finished together once their products are done: 16 a thread of 8 warps.
PART = tl.constexpr(64 * 64)
# A program has a multiprocessor to itself. Left alone, ptxas makes room for two, and spills.
MAX_REGISTERS = 255


@triton.jit
def tile_position(tile, tile_rows, tile_columns):
    """Row and column of a tile, in an order in which neighbours share operands."""
    per_group = _SUPER_ROWS * tile_columns
    group = tile // per_group
    first = group * _SUPER_ROWS
    rows_here = tl.minimum(tile_rows - first, _SUPER_ROWS)
    inside = tile % per_group
    return first + inside % rows_here, inside // rows_here


@triton.jit
def halves(accumulator, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    pair = tl.permute(tl.reshape(accumulator, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    return tl.split(pair)


@triton.jit
def _finish(
    accumulator,
    first_row,
    first_column,
    state,
    operand,
    row,
    loss_scale,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TOP_ACT: tl.constexpr,
    TOP_NEGATIVE_SLOPE: tl.constexpr,
    LOSS: tl.constexpr,
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
    uhat = state + tl.multiple_of(tl.load(row + 9), 16) + corner
    error = state + tl.multiple_of(tl.load(row + 11), 16) + corner
    delta = operand + tl.multiple_of(tl.load(row + 12), 16) + corner
    s = state + tl.multiple_of(tl.load(row + 13), 16) + corner
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    where = rows[:, None] * stride.to(tl.int32) + columns[None, :]
    in_batch = rows < batch - first_row
    inside = in_batch[:, None] & (columns < stride.to(tl.int32) - first_column)[None, :]
    if tl.load(row + 17) != 0:  # s_given
        accumulator = tl.load(s + where, mask=inside, other=0.0)
    if kind == PRODUCT:
        tl.store(s + where, accumulator, mask=inside)
    else:
        base = tl.load(uhat + where, mask=inside, other=0.0)
        if LOSS >= 0 and kind == TOP:
            vhat = state + tl.multiple_of(tl.load(row + 14), 16) + corner
            dense = state + tl.multiple_of(tl.load(row + 15), 16) + corner
            mass = state + tl.multiple_of(tl.load(row + 16), 16) + first_row
            bracket, slope = bracket_and_slope(base, accumulator, TOP_ACT, TOP_NEGATIVE_SLOPE)
            mu = tl.load(vhat + where, mask=inside, other=0.0) + bracket
            target = tl.load(dense + where, mask=inside, other=0.0)
            share = tl.load(mass + rows, mask=in_batch, other=0.0)
            in_width = columns < tl.load(row + 2).to(tl.int32) - first_column
            gradient = output_error_tile(mu, target, share[:, None], loss_scale, in_width[None, :], LOSS)
            tl.store(error + where, gradient, mask=inside)
            store_operand(delta + where, gradient * slope, inside, INPUT_PRECISION)
        else:
            d = state + tl.multiple_of(tl.load(row + 10), 16) + corner
            bracket, slope = bracket_and_slope(base, accumulator, ACT, NEGATIVE_SLOPE)
            difference = bracket - tl.load(d + where, mask=inside, other=0.0)
            tl.store(error + where, difference, mask=inside)
            store_operand(delta + where, difference * slope, inside, INPUT_PRECISION)


@triton.jit
def _finish_in_parts(
    accumulator, first_row, first_column, arguments, constants, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """As _finish, part by part where a tile is too large for the registers that it needs.

    arguments, constants: tuples, of _finish from ``state`` on and from ``ACT`` on.
    """
    if ROWS * COLUMNS > PART:
        left, right = halves(accumulator, ROWS, COLUMNS)
        HALF: tl.constexpr = COLUMNS // 2
        _finish_in_parts(left, first_row, first_column, arguments, constants, ROWS, HALF)
        _finish_in_parts(right, first_row, first_column + HALF, arguments, constants, ROWS, HALF)
    else:
        _finish(accumulator, first_row, first_column, *arguments, *constants, ROWS, COLUMNS)


@triton.jit
def predict_tile(
    state,
    operand,
    row,
    tile_row,
    tile_column,
    loss_scale,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TOP_ACT: tl.constexpr,
    TOP_NEGATIVE_SLOPE: tl.constexpr,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One tile of one row of the table. LOSS is -1 where no row is of kind TOP."""
    # fields in the order of linear_rows.PredictRow
    batch = tl.load(row + 1).to(tl.int32)
    reduction = tl.multiple_of(tl.load(row + 3).to(tl.int32), ALIGNED)
    d_below = operand + tl.multiple_of(tl.load(row + 4), 16)
    d_below_stride = tl.multiple_of(tl.load(row + 5), ALIGNED)
    weight = operand + tl.multiple_of(tl.load(row + 6), 16)
    weight_stride = tl.multiple_of(tl.load(row + 7), ALIGNED)
    stride = tl.load(row + 8).to(tl.int32)

    # Offsets inside a tile fit into 32 bits and cost half the registers; only the tile's corner needs 64. Columns run
    # over the padding, which holds zeros and stays zero: a bound that is a multiple of 16 lets whole vectors through.
    first_row, first_column = tile_row * ROWS, tile_column * COLUMNS
    d_below += d_below_stride * first_row
    weight += weight_stride * first_column
    d_below_stride, weight_stride = d_below_stride.to(tl.int32), weight_stride.to(tl.int32)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_batch, in_stride = rows < batch - first_row, columns < stride - first_column
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, reduction, REDUCTION):
        k = start + tl.arange(0, REDUCTION)
        in_reduction = k < reduction
        left = tl.load(
            d_below + (rows[:, None] * d_below_stride + k[None, :]),
            mask=in_batch[:, None] & in_reduction[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + (columns[None, :] * weight_stride + k[:, None]),
            mask=in_stride[None, :] & in_reduction[:, None],
            other=0.0,
        )
        accumulator = tl.dot(left, right, accumulator, input_precision=INPUT_PRECISION)
    if ROWS * COLUMNS > PART:
        tl.static_assert(LOSS < 0, "the loss needs whole rows of the output in one part")
    _finish_in_parts(
        accumulator,
        first_row,
        first_column,
        (state, operand, row, loss_scale),
        (ACT, NEGATIVE_SLOPE, TOP_ACT, TOP_NEGATIVE_SLOPE, LOSS, INPUT_PRECISION, ALIGNED),
        ROWS,
        COLUMNS,
    )


@triton.jit(do_not_specialize=["products", "front"])
def linear_predict(
    state,
    operand,
    table,
    products,
    front,
    loss_scale,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TOP_ACT: tl.constexpr,
    TOP_NEGATIVE_SLOPE: tl.constexpr,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = products + tl.where(front >= 0, 1, 0)
    earlier = 0  # tiles of the rows before
    for index in range(count):
        row = table + tl.where(index < products, index, front) * WIDTH
        tile_rows = tl.cdiv(tl.load(row + 1).to(tl.int32), ROWS)
        tile_columns = tl.cdiv(tl.load(row + 2).to(tl.int32), COLUMNS)
        tiles = tile_rows * tile_columns
        # tile number i of the launch belongs to program i % programs
        tile = (program + programs - earlier % programs) % programs
        while tile < tiles:
            tile_row, tile_column = tile_position(tile, tile_rows, tile_columns)
            predict_tile(
                state,
                operand,
                row,
                tile_row,
                tile_column,
                loss_scale,
                ACT,
                NEGATIVE_SLOPE,
                TOP_ACT,
                TOP_NEGATIVE_SLOPE,
                LOSS,
                ROWS,
                COLUMNS,
                REDUCTION,
                INPUT_PRECISION,
                ALIGNED,
            )
            tile += programs
        earlier += tiles


def launch_linear_predict(
    state: Tensor,
    operand: Tensor,
    table: Tensor,
    *,
    products: int,
    front: int,
    loss_scale: float,
    programs: int,
    constants: dict,
    warps: int,
    stages: int,
) -> None:
    """Launch on the current stream.

    Args:
        products, front: which rows of ``table`` take part: the first ``products``, and row ``front`` unless negative.
        programs: size of the grid.
        constants: the kernel's constexpr arguments by name.
    """
    launch(
        linear_predict,
        (programs,),
        state,
        operand,
        table,
        products,
        front,
        loss_scale,
        **constants,
        num_warps=warps,
        num_stages=stages,
        maxnreg=MAX_REGISTERS,
    )


#: Constants of a launch without a row of kind TOP.
NO_TOP = dict(TOP_ACT=IDENTITY.value, TOP_NEGATIVE_SLOPE=0.0, LOSS=-1)
