"""A layer's beliefs move: one launch after the product that pulls the error above back to them.

With d = v - vhat, eps of this layer and r, the error above pulled back to this layer (docs/method.md):

    d <- d + eta (eps - r)            with momentum along a velocity (momentum.py), whose step is eps - r

CLAMPED is layer 1, whose prediction never moves, the clamped input (fact 2): eps = -d at the d before the update is
written here.

What lives where: a program holds one tile of d, BLOCK_M positions (sample, row, column) by BLOCK_N channels, in
registers, and writes it in place; besides, rounded, as the operand of the next product.

Arguments of the kernel, channels-last views (B, H, W, C) whose last stride is 1; the three other strides follow each
other in the argument list as NAME_batch, NAME_row, NAME_column; features are (B, 1, 1, N).

    deviation   (B, H, W, C)  fp32          d, in place
    error       (B, H, W, C)  fp32          eps; written where CLAMPED, else read
    pulled      (B, H, W, C)  fp32, bf16    r
    operand     (B, H, W, C)  float         the new d, rounded; None: not wanted
    velocity    (B, H, W, C)  fp32          in place; lies as d does; None without momentum
    first_bad   (layers,)     int32         by layer the first iteration that left NaN or infinity in d; starts large
    layer, iteration          int32         the element of first_bad, what is written there
    positions, rows, columns, channels      B H W, H, W, C
    step_size   fp32                        eta of this iteration
    momentum    fp32                        None without
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .first_bad import note_bad
from .launching import launch
from .momentum import check_velocity, with_momentum
from .pointwise_error import strides, tile, tile_indices


@triton.jit(do_not_specialize=["positions", "rows", "columns", "layer", "iteration"])
def pointwise_update_kernel(
    deviation,
    deviation_batch,
    deviation_row,
    deviation_column,
    error,
    error_batch,
    error_row,
    error_column,
    pulled,
    pulled_batch,
    pulled_row,
    pulled_column,
    operand,
    operand_batch,
    operand_row,
    operand_column,
    velocity,
    first_bad,
    positions,
    rows,
    columns,
    channels,
    layer,
    iteration,
    step_size,
    momentum,
    CLAMPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample, row, column, channel, mask = tile_indices(positions, rows, columns, channels, BLOCK_M, BLOCK_N)
    d_offs = sample * deviation_batch + row * deviation_row + column * deviation_column + channel
    e_offs = sample * error_batch + row * error_row + column * error_column + channel
    r_offs = sample * pulled_batch + row * pulled_row + column * pulled_column + channel
    d = tl.load(deviation + d_offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    r = tl.load(pulled + r_offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if CLAMPED:
        e = -d
        tl.store(error + e_offs, e, mask=mask)
    else:
        e = tl.load(error + e_offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    step = e - r
    if momentum is not None:
        step = with_momentum(step, velocity + d_offs, momentum, mask)
    d += step_size * step
    tl.store(deviation + d_offs, d, mask=mask)
    if operand is not None:
        operand_offs = sample * operand_batch + row * operand_row + column * operand_column + channel
        tl.store(operand + operand_offs, d.to(operand.dtype.element_ty), mask=mask)
    note_bad(first_bad, layer, iteration, d, mask)


def update(
    *,
    deviation: Tensor,
    error: Tensor,
    pulled: Tensor,
    step_size: float,
    first_bad: Tensor,
    layer: int,
    iteration: int,
    operand: Tensor | None = None,
    clamped: bool = False,
    velocity: Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """Move ``deviation`` in place, copy it to ``operand``, and note the iteration where it is no longer finite.

    With ``clamped`` the ``error`` is written too: minus the old deviation.

    Raises:
        ValueError: ``velocity`` does not lie as ``deviation`` does, or is not there exactly with momentum.
    """
    check_velocity(momentum, velocity)
    if velocity is not None and (velocity.shape, velocity.stride()) != (deviation.shape, deviation.stride()):
        raise ValueError(
            f"velocity {tuple(velocity.shape)} does not lie as deviation {tuple(deviation.shape)} does"
        )
    batch, rows, columns, channels = deviation.shape
    positions = batch * rows * columns
    if positions == 0 or channels == 0:
        return
    block_m, block_n = tile(positions, channels)
    grid = (triton.cdiv(positions, block_m), triton.cdiv(channels, block_n))
    launch(
        pointwise_update_kernel,
        grid,
        deviation,
        *strides(deviation),
        error,
        *strides(error),
        pulled,
        *strides(pulled),
        operand,
        *strides(operand),
        velocity,
        first_bad,
        positions,
        rows,
        columns,
        channels,
        layer,
        iteration,
        float(step_size),
        momentum or None,
        CLAMPED=clamped,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
