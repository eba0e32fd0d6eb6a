"""The error of the output layer from its product: prediction, the loss's gradient there, and what is pulled back.

    mu = vhat + (act(uhat + s) - act(uhat))                                vhat = act(uhat)
    cross-entropy           eps = softmax(mu) mass - dense
    mean squared error      eps = (mu - dense) scale
    delta = eps act'(uhat + s)

``dense``, ``mass`` and ``scale`` are what pcfast.losses.Loss.prepare makes of the target; reduction, label smoothing
and class weights are in them.

What lives where: a row of classes that fits one tile stays in registers, several rows a program where they are
short. A longer row under cross-entropy is read twice: once for its maximum and the sum of its exponentials, kept for
each lane and combined at the end (Milakov and Gimelshein, arXiv 1805.02867), once for the error. Mean squared error
couples no columns: its tiles are independent.

Arguments of the kernels, matrices whose last stride is 1, each followed by its stride of rows:

    product     (B, C)  fp32, bf16    s; None is zero: the prediction has not moved
    uhat        (B, C)  fp32
    vhat        (B, C)  fp32
    dense       (B, C)  fp32
    error       (B, C)  fp32          written
    delta       (B, C)  fp32, bf16    written, rounded as INPUT_PRECISION says (tf32.py)
    mass        (B, 1)  fp32          cross-entropy; else None
    scale       fp32                  mean squared error
    rows, columns                     B, C
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from pcfast.model.activations import Activation

from .activations import bracket_and_slope, code
from .launching import launch
from .tf32 import input_precision, store_operand

# The constexpr argument LOSS.
CROSS_ENTROPY = tl.constexpr(0)
MSE = tl.constexpr(1)

# Widest row of one tile: 8 elements for each thread of 4 warps.
_WIDEST_TILE = 1024
# Elements of a tile of short rows. Small, so that a batch of a few hundred rows is spread over many multiprocessors.
_SHORT_TILE = 256
_ELEMENTS_PER_WARP = 256

# A maximum to begin with that is no -inf, whose difference from another -inf is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def output_error_tile(mu, dense, mass, scale, valid_columns_mask, LOSS: tl.constexpr):
    """eps of a tile (BLOCK_B, BLOCK_C) that holds whole rows; zero where ``valid_columns_mask`` is not set.

    ``mass`` is (BLOCK_B, 1) or one number, for cross-entropy alone; ``scale`` is for mean squared error alone.
    """
    if LOSS == CROSS_ENTROPY:
        mu = tl.where(valid_columns_mask, mu, float("-inf"))
        # tl.max passes over NaN, the exponential of NaN does not: the whole row becomes NaN
        e = libdevice.exp(mu - tl.max(mu, 1, keep_dims=True))
        error = e / tl.sum(e, 1, keep_dims=True) * mass - dense
    else:
        error = (mu - dense) * scale
    return tl.where(valid_columns_mask, error, 0.0)


@triton.jit
def _prediction(
    product,
    product_row,
    uhat,
    uhat_row,
    vhat,
    vhat_row,
    row,
    column,
    inside,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
):
    """mu and act'(u) of a tile; ``row`` is int64."""
    u = tl.load(uhat + row * uhat_row + column, mask=inside, other=0.0)
    v = tl.load(vhat + row * vhat_row + column, mask=inside, other=0.0)
    if product is None:
        s = tl.zeros(inside.shape, tl.float32)
    else:
        s = tl.load(product + row * product_row + column, mask=inside, other=0.0).to(tl.float32)
    bracket, slope = bracket_and_slope(u, s, ACT, NEGATIVE_SLOPE)
    return v + bracket, slope


@triton.jit(do_not_specialize=["rows"])
def output_error_kernel(
    product,
    product_row,
    uhat,
    uhat_row,
    vhat,
    vhat_row,
    dense,
    dense_row,
    error,
    error_row,
    delta,
    delta_row,
    mass,
    mass_row,
    scale,
    rows,
    columns,
    LOSS: tl.constexpr,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile a program; under cross-entropy BLOCK_COLUMNS covers the row and the grid has one column."""
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    mu, slope = _prediction(
        product, product_row, uhat, uhat_row, vhat, vhat_row, row, column, inside, ACT, NEGATIVE_SLOPE
    )
    y = tl.load(dense + row * dense_row + column, mask=inside, other=0.0)
    row_mass = 1.0
    if LOSS == CROSS_ENTROPY:
        row_mass = tl.load(mass + row * mass_row, mask=row < rows, other=0.0)
    e = output_error_tile(mu, y, row_mass, scale, column < columns, LOSS)
    tl.store(error + row * error_row + column, e, mask=inside)
    store_operand(delta + row * delta_row + column, e * slope, inside, INPUT_PRECISION)


@triton.jit(do_not_specialize=["columns"])
def wide_cross_entropy_kernel(
    product,
    product_row,
    uhat,
    uhat_row,
    vhat,
    vhat_row,
    dense,
    dense_row,
    error,
    error_row,
    delta,
    delta_row,
    mass,
    mass_row,
    columns,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One row a program, in blocks."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_COLUMNS)
    highest = tl.full((BLOCK_COLUMNS,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + lane
        inside = column < columns
        mu, _ = _prediction(
            product, product_row, uhat, uhat_row, vhat, vhat_row, row, column, inside, ACT, NEGATIVE_SLOPE
        )
        mu = tl.where(inside, mu, float("-inf"))
        higher = tl.maximum(highest, mu)
        total = total * libdevice.exp(highest - higher) + libdevice.exp(mu - higher)
        highest = higher
    top = tl.max(highest, 0)
    total = tl.sum(total * libdevice.exp(highest - top), 0)
    row_mass = tl.load(mass + row * mass_row)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + lane
        inside = column < columns
        mu, slope = _prediction(
            product, product_row, uhat, uhat_row, vhat, vhat_row, row, column, inside, ACT, NEGATIVE_SLOPE
        )
        y = tl.load(dense + row * dense_row + column, mask=inside, other=0.0)
        e = libdevice.exp(mu - top) / total * row_mass - y
        tl.store(error + row * error_row + column, e, mask=inside)
        store_operand(delta + row * delta_row + column, e * slope, inside, INPUT_PRECISION)


def output_tile(rows: int, columns: int) -> tuple[int, int, int]:
    """``BLOCK_ROWS, BLOCK_COLUMNS, num_warps`` for an output (rows, columns)."""
    block_columns = min(triton.next_power_of_2(columns), _WIDEST_TILE)
    block_rows = min(triton.next_power_of_2(rows), max(1, _SHORT_TILE // block_columns))
    return block_rows, block_columns, max(1, block_rows * block_columns // _ELEMENTS_PER_WARP)


def output_error(
    *,
    product: Tensor | None,
    uhat: Tensor,
    vhat: Tensor,
    dense: Tensor,
    error: Tensor,
    delta: Tensor,
    mass: Tensor | None = None,
    scale: float = 1.0,
    activation: Activation | None = None,
    precision: str,
) -> None:
    """Write ``error`` = dLoss/dmu and ``delta``, it pulled back to the product.

    The loss is cross-entropy where ``mass`` is given, else mean squared error. ``precision`` is that of the product
    which reads ``delta``: "bf16", "tf32" or "tf32x3".
    """
    rows, columns = uhat.shape
    if rows == 0 or columns == 0:
        return
    act, negative_slope = code(activation)
    block_rows, block_columns, num_warps = output_tile(rows, columns)
    matrices = [
        argument
        for matrix in (product, uhat, vhat, dense, error, delta, mass)
        for argument in (matrix, 0 if matrix is None else _row_stride(matrix))
    ]
    if mass is not None and columns > block_columns:
        launch(
            wide_cross_entropy_kernel,
            (rows,),
            *matrices,
            columns,
            ACT=act,
            NEGATIVE_SLOPE=negative_slope,
            INPUT_PRECISION=input_precision(precision, delta.dtype),
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps,
        )
        return
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns))
    launch(
        output_error_kernel,
        grid,
        *matrices,
        float(scale),
        rows,
        columns,
        LOSS=MSE.value if mass is None else CROSS_ENTROPY.value,
        ACT=act,
        NEGATIVE_SLOPE=negative_slope,
        INPUT_PRECISION=input_precision(precision, delta.dtype),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
    )


def _row_stride(matrix: Tensor) -> int:
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"a matrix needs a last stride of 1, this one has strides {matrix.stride()}")
    return matrix.stride(0)
