"""Predict stage of a convolutional layer: errors and deltas in one launch, as an implicit matrix product.

    s = conv(d_{l-1}, W_l)                       deviation of the pre-activation (cross-correlation)
    eps_l = [f(uhat_l + s) - f(uhat_l)] - d_l    f = after . pool . before, the bracket without cancellation
    delta_l = eps_l pulled back to u_l           pooled: one number a window, at its winner

With a_k = before(uhat_k) and b_k = before(uhat_k + s_k) - a_k over the elements k of a window,

    max:  m_k = (a_k - max a) + b_k,  winner = first k of the largest m_k (NaN is the largest),
          after's bracket at (max a, m_winner),  delta = eps * after' * before'_winner
    avg:  after's bracket at (mean uhat, mean s),  delta = eps * after'; before is the identity

Strict predictive coding in deviation form: Rosenbaum, PLOS ONE 17(3) e0266102 (2022); docs/method.md facts 6 and 8.

    d (batch, H, W, Cin)                                       +-------------------+   reshaped to
      gathered: ROWS x REDUCTION, row = an output position --> | accumulator s     |   (SLOTS, WINDOWS, COLUMNS)
    W (Cout, KH, KW, Cin)                                      | ROWS x COLUMNS    |     | reduced over slots
      REDUCTION x COLUMNS, index = (kh, kw, cin)           --> | fp32              |     v
    uhat, one read ------------------------------------------> +-------------------+   error, delta, winner
                                                                     d_out, one read -----^

A window has SLOTS rows, its elements padded to a power of 2. A tile has WINDOWS windows, in the order (sample, ph,
pw), and its row is slot * WINDOWS + window: a window lies in one tile, and its elements, far apart there, mostly fall
to one thread, so that the reduction stays in registers.

Arguments of the kernel:

    d           (batch, H, W, Cin)      fp32 or bf16   read; channels-last, as all maps; None while it is zero: s is 0
                                                       "tf32": rounded to TF32, like weight and delta
    weight      (Cout, KH, KW, Cin)     fp32 or bf16   read, with d and as d
    uhat        (batch, OH, OW, Cout)   fp32           read; the bias is in it
    d_out       (batch, PH, PW, Cout)   fp32           read; belief deviation of this layer's output
    error       (batch, PH, PW, Cout)   fp32           written
    delta       (batch, PH, PW, Cout)   as weight      written
    winner      (batch, PH, PW, Cout)   uint8          written: row-major index in the window; None unless max-pooled
    batch       int32

Sums run over the flat reduction index in steps of REDUCTION, which depends on layer and precision alone: a sample's
result does not depend on its batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcfast.model.activations import Activation

from . import activations
from .activations import act, bracket_and_slope, exact_difference
from .conv_geometry import (
    MAX_POOL,
    NO_POOL,
    ConvGeometry,
    Tiles,
    check_tensors,
    choose_tiles,
    tap_and_channel,
)
from .launching import launch
from .tf32 import input_precision, store_operand

_ABOVE_ALL = tl.constexpr(0x7FFFFFFF)  # sort key of NaN, and what an int32 is masked with to drop its sign


# Numbers of the accumulator that a thread holds without spilling. Its epilogue has uhat, s and d_out of each in
# flight, inside an activation as many temporaries, and is unrolled over them: compile time grows with them, too.
_PLAIN = 32
_WITH_EXP = 16
_WITH_ERFC = 8
_NUMBERS_PER_THREAD = {
    activations.IDENTITY.value: _PLAIN,
    activations.RELU.value: _PLAIN,
    activations.LEAKY_RELU.value: _PLAIN,
    activations.GELU.value: _WITH_ERFC,
}


def predict_tiles(
    geometry: ConvGeometry, precision: str, before: Activation | None = None, after: Activation | None = None
) -> Tiles:
    """The tiles for a layer: a function of its sizes, activations and precision, never of the batch."""
    codes = (activations.code(activation)[0] for activation in (before, after))
    numbers = min(_NUMBERS_PER_THREAD.get(code, _WITH_EXP) for code in codes)
    if precision == "tf32x3":
        numbers = max(8, numbers // 2)  # the operands' low halves take registers, too
    return choose_tiles(geometry.out_channels, geometry.channels, geometry.taps, precision, numbers)


@triton.jit
def _sort_key(x):
    """int32 in the order of the fp32 x: NaN above everything, -0 equal to 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & _ABOVE_ALL), _ABOVE_ALL)


@triton.jit
def _from_sort_key(key):
    return (key ^ ((key >> 31) & _ABOVE_ALL)).to(tl.float32, bitcast=True)


@triton.jit
def _window_maximum(value, slot, WINDOW: tl.constexpr):
    """``maximum, its first slot`` over the first axis, of which the slots past WINDOW are padding; NaN wins."""
    # Keys, since the hardware's maximum drops NaN and its arg-max leaves ties open.
    lowest: tl.constexpr = -_ABOVE_ALL - 1
    key = tl.where(slot < WINDOW, _sort_key(value), lowest)
    largest = tl.max(key, 0)
    first = tl.min(tl.where(key == largest[None, :, :], slot, WINDOW), 0)
    return _from_sort_key(largest), first


@triton.jit(do_not_specialize=["batch"])
def conv_predict(
    d,
    weight,
    uhat,
    d_out,
    error,
    delta,
    winner,
    batch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    POOL: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    SLOTS: tl.constexpr,
    BEFORE: tl.constexpr,
    BEFORE_NEGATIVE_SLOPE: tl.constexpr,
    AFTER: tl.constexpr,
    AFTER_NEGATIVE_SLOPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    WINDOW: tl.constexpr = WINDOW_H * WINDOW_W
    WINDOWS: tl.constexpr = ROWS // SLOTS  # of one tile
    TERMS: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    tl.static_assert(ROWS % SLOTS == 0, "a tile of conv_predict holds whole pooling windows")

    # Neighbouring programs share rows, whose gathered operand is the larger one.
    program = tl.program_id(0)
    column_tiles: tl.constexpr = (OUT_CHANNELS + COLUMNS - 1) // COLUMNS
    tile_row = program // column_tiles
    if WIDE:
        tile_row = tile_row.to(tl.int64)
        windows = batch.to(tl.int64) * (POOLED_H * POOLED_W)
    else:
        windows = batch * (POOLED_H * POOLED_W)
    columns = (program % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < OUT_CHANNELS

    row = tl.arange(0, ROWS)
    window = tile_row * WINDOWS + row % WINDOWS
    element = row // WINDOWS
    in_rows = (window < windows) & (element < WINDOW)
    sample = window // (POOLED_H * POOLED_W)
    place = (window % (POOLED_H * POOLED_W)).to(tl.int32)
    y = (place // POOLED_W) * WINDOW_H + element // WINDOW_W
    x = (place % POOLED_W) * WINDOW_W + element % WINDOW_W

    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    if d is not None:
        top, left = y * STRIDE_H - PADDING_H, x * STRIDE_W - PADDING_W
        corner = d + sample * (HEIGHT * WIDTH * CHANNELS) + (top * WIDTH + left) * CHANNELS
        for step in range((TERMS + REDUCTION - 1) // REDUCTION):
            tap, channel = tap_and_channel(step, CHANNELS, REDUCTION)
            kh, kw = tap // KERNEL_W, tap % KERNEL_W
            in_terms = tap < KERNEL_H * KERNEL_W
            inside = in_rows[:, None] & in_terms[None, :]
            if PADDING_H > 0:
                h = top[:, None] + kh[None, :]
                inside = inside & (h >= 0) & (h < HEIGHT)
            if PADDING_W > 0:
                w = left[:, None] + kw[None, :]
                inside = inside & (w >= 0) & (w < WIDTH)
            gathered = tl.load(
                corner[:, None] + ((kh * WIDTH + kw) * CHANNELS + channel)[None, :], mask=inside, other=0.0
            )
            taps = tl.load(
                weight + columns[None, :] * TERMS + (tap * CHANNELS + channel)[:, None],
                mask=in_columns[None, :] & in_terms[:, None],
                other=0.0,
            )
            s = tl.dot(gathered, taps, s, input_precision=INPUT_PRECISION)

    base = tl.load(
        uhat
        + sample[:, None] * (OUT_H * OUT_W * OUT_CHANNELS)
        + ((y * OUT_W + x) * OUT_CHANNELS)[:, None]
        + columns[None, :],
        mask=in_rows[:, None] & in_columns[None, :],
        other=0.0,
    )
    if POOL == NO_POOL:
        bracket, slope = bracket_and_slope(base, s, AFTER, AFTER_NEGATIVE_SLOPE)
    elif POOL == MAX_POOL:
        slot = tl.arange(0, SLOTS)[:, None, None]
        value = tl.reshape(act(base, BEFORE, BEFORE_NEGATIVE_SLOPE), (SLOTS, WINDOWS, COLUMNS))
        moved, slope_before = bracket_and_slope(base, s, BEFORE, BEFORE_NEGATIVE_SLOPE)
        highest, _ = _window_maximum(value, slot, WINDOW)
        to_highest = exact_difference(value, tl.broadcast_to(highest[None, :, :], value.shape))
        relative = to_highest + tl.reshape(moved, (SLOTS, WINDOWS, COLUMNS))
        deviation, first = _window_maximum(relative, slot, WINDOW)
        bracket, slope = bracket_and_slope(highest, deviation, AFTER, AFTER_NEGATIVE_SLOPE)
        if BEFORE != activations.IDENTITY:
            slope_before = tl.reshape(slope_before, (SLOTS, WINDOWS, COLUMNS))
            slope *= tl.sum(tl.where(slot == first[None, :, :], slope_before, 0.0), 0)
    else:
        # slots past the window hold zeros
        mean_base = tl.sum(tl.reshape(base, (SLOTS, WINDOWS, COLUMNS)), 0) * (1.0 / WINDOW)
        mean_s = tl.sum(tl.reshape(s, (SLOTS, WINDOWS, COLUMNS)), 0) * (1.0 / WINDOW)
        bracket, slope = bracket_and_slope(mean_base, mean_s, AFTER, AFTER_NEGATIVE_SLOPE)

    pooled = tile_row * WINDOWS + tl.arange(0, WINDOWS)
    where = pooled[:, None] * OUT_CHANNELS + columns[None, :]
    inside = (pooled < windows)[:, None] & in_columns[None, :]
    difference = bracket - tl.load(d_out + where, mask=inside, other=0.0)
    tl.store(error + where, difference, mask=inside)
    store_operand(delta + where, difference * slope, inside, INPUT_PRECISION)
    if POOL == MAX_POOL:
        tl.store(winner + where, first.to(tl.uint8), mask=inside)


def predict_constants(
    geometry: ConvGeometry,
    *,
    before: Activation | None,
    after: Activation | None,
    precision: str,
    operand: torch.dtype,
    tiles: Tiles,
    wide: bool,
) -> dict:
    """The kernel's constexpr arguments by name."""
    before_code, before_negative_slope = activations.code(before)
    after_code, after_negative_slope = activations.code(after)
    return dict(
        **geometry.constants(),
        OUT_H=geometry.out[0],
        OUT_W=geometry.out[1],
        SLOTS=geometry.slots,
        BEFORE=before_code,
        BEFORE_NEGATIVE_SLOPE=before_negative_slope,
        AFTER=after_code,
        AFTER_NEGATIVE_SLOPE=after_negative_slope,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        REDUCTION=tiles.reduction,
        INPUT_PRECISION=input_precision(precision, operand),
        WIDE=wide,
    )


def launch_conv_predict(
    geometry: ConvGeometry,
    *,
    d: Tensor | None,
    weight: Tensor,
    uhat: Tensor,
    d_out: Tensor,
    error: Tensor,
    delta: Tensor,
    winner: Tensor | None = None,
    before: Activation | None = None,
    after: Activation | None = None,
    precision: str,
    tiles: Tiles | None = None,
) -> None:
    """Launch on the current stream; the tensors are described at the top of this file.

    Args:
        before, after: activations in front of and behind the pool; None is the identity. A monotone activation in
            front of a max-pool belongs behind it: the numbers are the same, and there are fewer.
        precision: "bf16", "tf32" or "tf32x3".
        tiles: other than :func:`predict_tiles` gives.

    Raises:
        ValueError: the kernel cannot work on this layer, or a tensor is not as described.
    """
    reason = geometry.refusal(before)
    if reason:
        raise ValueError(f"conv_predict cannot run this layer: {reason}")
    if (winner is None) == (geometry.pool == "max"):
        raise ValueError("conv_predict writes winners exactly where the layer is max-pooled")
    batch, operand = d_out.shape[0], weight.dtype
    pooled = (batch, *geometry.pooled, geometry.out_channels)
    optional = {} if winner is None else dict(winner=(winner, pooled, torch.uint8))
    if d is not None:
        optional["d"] = (d, (batch, geometry.height, geometry.width, geometry.channels), operand)
    check_tensors(
        weight=(weight, (geometry.out_channels, *geometry.kernel, geometry.channels), operand),
        uhat=(uhat, (batch, *geometry.out, geometry.out_channels), torch.float32),
        d_out=(d_out, pooled, torch.float32),
        error=(error, pooled, torch.float32),
        delta=(delta, pooled, operand),
        **optional,
    )
    tiles = tiles or predict_tiles(geometry, precision, before, after)
    constants = predict_constants(
        geometry,
        before=before,
        after=after,
        precision=precision,
        operand=operand,
        tiles=tiles,
        wide=geometry.wide(batch),
    )
    windows = batch * math.prod(geometry.pooled)
    grid = triton.cdiv(windows * geometry.slots, tiles.rows) * triton.cdiv(
        geometry.out_channels, tiles.columns
    )
    launch(
        conv_predict,
        (grid,),
        d,
        weight,
        uhat,
        d_out,
        error,
        delta,
        winner,
        batch,
        **constants,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
