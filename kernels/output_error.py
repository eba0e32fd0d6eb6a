"""The error of the output layer from its product: prediction, the loss's gradient there, and what is pulled back.

    mu = vhat + (act(uhat + s) - act(uhat))                                vhat = act(uhat)
    cross-entropy           eps = softmax(mu) target_sum - target
    mean squared error      eps = (mu - target) scale
    delta = eps act'(uhat + s)

``target``, its sum over each row and ``scale`` are what pcfast.losses.Loss.prepare makes of the labels; reduction,
label smoothing and class weights are in them.

What lives where: a row of classes that fits one tile stays in registers, several rows a program where they are
short. A longer row under cross-entropy is read twice: once for its maximum and the sum of its exponentials, kept for
each column of the block and combined at the end (Milakov and Gimelshein, arXiv 1805.02867), once for the error. Mean
squared error couples no columns: its tiles are independent.

Arguments of the kernels, matrices whose last stride is 1, each followed by its stride of rows:

    product     (B, C)  fp32, bf16    s; None is zero: the prediction has not moved
    uhat        (B, C)  fp32
    vhat        (B, C)  fp32
    target      (B, C)  fp32
    error       (B, C)  fp32          written
    delta       (B, C)  fp32, bf16    written, rounded as INPUT_PRECISION says (tf32.py)
    target_sum  (B, 1)  fp32          cross-entropy; else None
    scale       fp32                  mean squared error
    rows, columns                     B, C
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from pcfast.model.activations import Activation

from .activations import act_diff_and_derivative
from .codes import LOSSES, activation_code
from .launching import launch
from .tf32 import input_precision, store_operand

# The constexpr argument LOSS.
CROSS_ENTROPY = tl.constexpr(LOSSES["cross_entropy"])
MSE = tl.constexpr(LOSSES["mse"])

# Widest row of one tile: 8 elements for each thread of 4 warps.
_MAX_BLOCK_N = 1024
# Elements of a tile of short rows. Small, so that a batch of a few hundred rows is spread over many SMs.
_SHORT_TILE = 256
_ELEMENTS_PER_WARP = 256

# A maximum to begin with that is no -inf, whose difference from another -inf is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def output_error_tile(mu, target, target_sum, scale, mask_n, LOSS: tl.constexpr):
    """eps of a tile (BLOCK_M, BLOCK_N) that holds whole rows; zero where ``mask_n`` is not set.

    ``target_sum`` is (BLOCK_M, 1) or one number, for cross-entropy alone; ``scale`` is for mean squared error alone.
    """
    if LOSS == CROSS_ENTROPY:
        mu = tl.where(mask_n, mu, float("-inf"))
        # tl.max passes over NaN, the exponential of NaN does not: the whole row becomes NaN
        e = libdevice.exp(mu - tl.max(mu, 1, keep_dims=True))
        error = e / tl.sum(e, 1, keep_dims=True) * target_sum - target
    else:
        error = (mu - target) * scale
    return tl.where(mask_n, error, 0.0)


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
    mask,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
):
    """mu and act'(u) of a tile, in the shape of ``mask``; ``row`` is int64."""
    u = tl.load(uhat + row * uhat_row + column, mask=mask, other=0.0)
    v = tl.load(vhat + row * vhat_row + column, mask=mask, other=0.0)
    if product is None:
        s = tl.zeros(mask.shape, tl.float32)
    else:
        s = tl.load(product + row * product_row + column, mask=mask, other=0.0).to(tl.float32)
    act_diff, derivative = act_diff_and_derivative(u, s, ACT, NEGATIVE_SLOPE)
    return v + act_diff, derivative


@triton.jit(do_not_specialize=["rows"])
def output_error_kernel(
    product,
    product_row,
    uhat,
    uhat_row,
    vhat,
    vhat_row,
    target,
    target_row,
    error,
    error_row,
    delta,
    delta_row,
    target_sum,
    target_sum_row,
    scale,
    rows,
    columns,
    LOSS: tl.constexpr,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile a program; under cross-entropy BLOCK_N covers the row and the grid has one column."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (column < columns)
    mu, derivative = _prediction(
        product, product_row, uhat, uhat_row, vhat, vhat_row, row, column, mask, ACT, NEGATIVE_SLOPE
    )
    y = tl.load(target + row * target_row + column, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    y_sum = 1.0
    if LOSS == CROSS_ENTROPY:
        y_sum = tl.load(target_sum + row * target_sum_row, mask=row < rows, other=0.0)  # [BLOCK_M, 1]
    e = output_error_tile(mu, y, y_sum, scale, column < columns, LOSS)
    tl.store(error + row * error_row + column, e, mask=mask)
    store_operand(delta + row * delta_row + column, e * derivative, mask, INPUT_PRECISION)


@triton.jit(do_not_specialize=["columns"])
def wide_cross_entropy_kernel(
    product,
    product_row,
    uhat,
    uhat_row,
    vhat,
    vhat_row,
    target,
    target_row,
    error,
    error_row,
    delta,
    delta_row,
    target_sum,
    target_sum_row,
    columns,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program, in blocks."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    running_max = tl.full((BLOCK_N,), _LOWEST, tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        column = start + offs_n
        mask = column < columns
        mu, _ = _prediction(
            product, product_row, uhat, uhat_row, vhat, vhat_row, row, column, mask, ACT, NEGATIVE_SLOPE
        )
        mu = tl.where(mask, mu, float("-inf"))
        new_max = tl.maximum(running_max, mu)
        # online softmax: what was summed below the old maximum is scaled to the new one
        running_sum = running_sum * libdevice.exp(running_max - new_max) + libdevice.exp(mu - new_max)
        running_max = new_max
    top = tl.max(running_max, 0)
    running_sum = tl.sum(running_sum * libdevice.exp(running_max - top), 0)
    y_sum = tl.load(target_sum + row * target_sum_row)
    for start in range(0, columns, BLOCK_N):
        column = start + offs_n
        mask = column < columns
        mu, derivative = _prediction(
            product, product_row, uhat, uhat_row, vhat, vhat_row, row, column, mask, ACT, NEGATIVE_SLOPE
        )
        y = tl.load(target + row * target_row + column, mask=mask, other=0.0)  # [BLOCK_N]
        e = libdevice.exp(mu - top) / running_sum * y_sum - y
        tl.store(error + row * error_row + column, e, mask=mask)
        store_operand(delta + row * delta_row + column, e * derivative, mask, INPUT_PRECISION)


def output_tile(rows: int, columns: int) -> tuple[int, int, int]:
    """``BLOCK_M, BLOCK_N, num_warps`` for an output (rows, columns)."""
    block_n = min(triton.next_power_of_2(columns), _MAX_BLOCK_N)
    block_m = min(triton.next_power_of_2(rows), max(1, _SHORT_TILE // block_n))
    return block_m, block_n, max(1, block_m * block_n // _ELEMENTS_PER_WARP)


def output_error(
    *,
    product: Tensor | None,
    uhat: Tensor,
    vhat: Tensor,
    target: Tensor,
    error: Tensor,
    delta: Tensor,
    target_sum: Tensor | None = None,
    scale: float = 1.0,
    activation: Activation | None = None,
    precision: str,
) -> None:
    """Write ``error`` = dLoss/dmu and ``delta``, it pulled back to the product.

    The loss is cross-entropy where ``target_sum`` is given, else mean squared error. ``precision`` is that of the
    product which reads ``delta``: "bf16", "tf32" or "tf32x3".
    """
    rows, columns = uhat.shape
    if rows == 0 or columns == 0:
        return
    act, negative_slope = activation_code(activation)
    block_m, block_n, num_warps = output_tile(rows, columns)
    matrices = [
        argument
        for matrix in (product, uhat, vhat, target, error, delta, target_sum)
        for argument in (matrix, 0 if matrix is None else _row_stride(matrix))
    ]
    if target_sum is not None and columns > block_n:
        launch(
            wide_cross_entropy_kernel,
            (rows,),
            *matrices,
            columns,
            ACT=act,
            NEGATIVE_SLOPE=negative_slope,
            INPUT_PRECISION=input_precision(precision, delta.dtype),
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
        return
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))
    launch(
        output_error_kernel,
        grid,
        *matrices,
        float(scale),
        rows,
        columns,
        LOSS=MSE.value if target_sum is None else CROSS_ENTROPY.value,
        ACT=act,
        NEGATIVE_SLOPE=negative_slope,
        INPUT_PRECISION=input_precision(precision, delta.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
    )


def _row_stride(matrix: Tensor) -> int:
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"a matrix needs a last stride of 1, this one has strides {matrix.stride()}")
    return matrix.stride(0)
