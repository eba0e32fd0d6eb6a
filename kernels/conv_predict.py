"""Predict stage of a convolutional layer: errors and deltas in one launch, as an implicit GEMM.

    s = conv(d_{l-1}, W_l)                       deviation of the pre-activation (cross-correlation)
    eps_l = [f(uhat_l + s) - f(uhat_l)] - d_l    f = after . pool . before, the difference without cancellation
    delta_l = eps_l pulled back to u_l           pooled: one number a window, at its winner

With a_k = before(uhat_k) and b_k = before(uhat_k + s_k) - a_k over the elements k of a window,

    max:  m_k = (a_k - max a) + b_k,  winner = first k of the largest m_k (NaN is the largest),
          after's act_diff at (max a, m_winner),  delta = eps * after' * before'_winner
    avg:  after's act_diff at (mean uhat, mean s),  delta = eps * after'; before is the identity

Strict predictive coding in deviation form: Rosenbaum, PLOS ONE 17(3) e0266102 (2022); docs/method.md: max-pooling's
arg-max (fact 6) and deviation form (fact 8).

Implicit GEMM: M = B*OH*OW, N = C_out, K = KH*KW*C_in. A is the im2col matrix of d, of which only the tile at hand is
ever gathered; B is W^T.

    d (B, H, W, C_in)                                               +-------------------+   reshaped to
      im2col tile, BLOCK_M x BLOCK_K, row = an output position  --> | accumulator s     |   (SLOTS, WINDOWS, BLOCK_N)
    W (C_out, KH, KW, C_in)                                         | BLOCK_M x BLOCK_N |     | reduced over slots
      tile of BLOCK_K x BLOCK_N, k = (kh, kw, c_in)             --> | fp32              |     v
    uhat, one read -----------------------------------------------> +-------------------+   error, delta, winner
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

Sums run over the flat K index in steps of BLOCK_K, which depends on layer and precision alone: a sample's result does
not depend on its batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcfast.model.activations import Activation

from . import activations
from .activations import act, act_diff_and_derivative, exact_difference
from .codes import activation_code
from .conv_geometry import (
    MAX_POOL,
    NO_POOL,
    ConvGeometry,
    check_tensors,
    choose_tiles,
    tap_and_channel,
)
from .launching import launch
from .tf32 import input_precision, store_operand
from .tiles import Tiles

_ABOVE_ALL = tl.constexpr(0x7FFFFFFF)  # sort key of NaN, and what an int32 is masked with to drop its sign

# The main loop: s of a tile


@triton.jit
def _im2col_product(
    d,
    weight,
    sample,
    y,
    x,
    mask_m,
    offs_n,
    mask_n,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """s (BLOCK_M, BLOCK_N) at the output positions (sample, y, x) and the output channels offs_n."""
    K: tl.constexpr = KERNEL_H * KERNEL_W * CHANNELS
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # where the kernel's first tap meets the input; by the padding also outside of it
    top, left = y * STRIDE_H - PADDING_H, x * STRIDE_W - PADDING_W
    a_base = d + sample * (HEIGHT * WIDTH * CHANNELS) + (top * WIDTH + left) * CHANNELS  # [BLOCK_M]
    for step in range((K + BLOCK_K - 1) // BLOCK_K):
        tap, channel = tap_and_channel(step, CHANNELS, BLOCK_K)  # [BLOCK_K] each
        kh, kw = tap // KERNEL_W, tap % KERNEL_W
        mask_k = tap < KERNEL_H * KERNEL_W
        mask = mask_m[:, None] & mask_k[None, :]
        if PADDING_H > 0:
            h = top[:, None] + kh[None, :]
            mask = mask & (h >= 0) & (h < HEIGHT)
        if PADDING_W > 0:
            w = left[:, None] + kw[None, :]
            mask = mask & (w >= 0) & (w < WIDTH)
        a_ptrs = a_base[:, None] + ((kh * WIDTH + kw) * CHANNELS + channel)[None, :]
        im2col_tile = tl.load(a_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        b_ptrs = weight + offs_n[None, :] * K + (tap * CHANNELS + channel)[:, None]
        weight_tile = tl.load(b_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        s = tl.dot(im2col_tile, weight_tile, s, input_precision=INPUT_PRECISION)
    return s


# The epilogue: the pool, from uhat and s of all elements to one difference a window


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


@triton.jit
def _max_pooled(
    u,
    s,
    SLOTS: tl.constexpr,
    WINDOWS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEFORE: tl.constexpr,
    BEFORE_NEGATIVE_SLOPE: tl.constexpr,
    AFTER: tl.constexpr,
    AFTER_NEGATIVE_SLOPE: tl.constexpr,
):
    """act_diff, derivative and winner of each window, from u and s of its elements (SLOTS * WINDOWS, BLOCK_N)."""
    slot = tl.arange(0, SLOTS)[:, None, None]
    a = tl.reshape(act(u, BEFORE, BEFORE_NEGATIVE_SLOPE), (SLOTS, WINDOWS, BLOCK_N))
    b, derivative_before = act_diff_and_derivative(u, s, BEFORE, BEFORE_NEGATIVE_SLOPE)
    a_max, _ = _window_maximum(a, slot, WINDOW)  # [WINDOWS, BLOCK_N]
    # m_k: what the winner's is, is the pool's own difference
    to_max = exact_difference(a, tl.broadcast_to(a_max[None, :, :], a.shape))
    m = to_max + tl.reshape(b, (SLOTS, WINDOWS, BLOCK_N))
    m_winner, winner = _window_maximum(m, slot, WINDOW)  # [WINDOWS, BLOCK_N] each
    act_diff, derivative = act_diff_and_derivative(a_max, m_winner, AFTER, AFTER_NEGATIVE_SLOPE)
    if BEFORE != activations.IDENTITY:
        derivative_before = tl.reshape(derivative_before, (SLOTS, WINDOWS, BLOCK_N))
        derivative *= tl.sum(tl.where(slot == winner[None, :, :], derivative_before, 0.0), 0)
    return act_diff, derivative, winner


@triton.jit
def _average_pooled(
    u,
    s,
    SLOTS: tl.constexpr,
    WINDOWS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AFTER: tl.constexpr,
    AFTER_NEGATIVE_SLOPE: tl.constexpr,
):
    """act_diff and derivative of each window; slots past the window hold zeros."""
    mean_u = tl.sum(tl.reshape(u, (SLOTS, WINDOWS, BLOCK_N)), 0) * (1.0 / WINDOW)  # [WINDOWS, BLOCK_N]
    mean_s = tl.sum(tl.reshape(s, (SLOTS, WINDOWS, BLOCK_N)), 0) * (1.0 / WINDOW)  # [WINDOWS, BLOCK_N]
    return act_diff_and_derivative(mean_u, mean_s, AFTER, AFTER_NEGATIVE_SLOPE)


# The kernel


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    WINDOW: tl.constexpr = WINDOW_H * WINDOW_W
    WINDOWS: tl.constexpr = BLOCK_M // SLOTS  # of one tile
    tl.static_assert(BLOCK_M % SLOTS == 0, "a tile of conv_predict holds whole pooling windows")

    # Neighbouring programs share pid_m, whose im2col tiles are the larger operand.
    pid = tl.program_id(0)
    num_pid_n: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    pid_m = pid // num_pid_n
    if WIDE:
        pid_m = pid_m.to(tl.int64)
        windows = batch.to(tl.int64) * (POOLED_H * POOLED_W)
    else:
        windows = batch * (POOLED_H * POOLED_W)
    offs_n = (pid % num_pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < OUT_CHANNELS

    # from a row of the tile to its window, and to its position in the convolution's output
    row = tl.arange(0, BLOCK_M)
    window = pid_m * WINDOWS + row % WINDOWS
    element = row // WINDOWS
    mask_m = (window < windows) & (element < WINDOW)
    sample = window // (POOLED_H * POOLED_W)
    place = (window % (POOLED_H * POOLED_W)).to(tl.int32)
    y = (place // POOLED_W) * WINDOW_H + element // WINDOW_W
    x = (place % POOLED_W) * WINDOW_W + element % WINDOW_W

    if d is None:
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        s = _im2col_product(
            d, weight, sample, y, x, mask_m, offs_n, mask_n, HEIGHT, WIDTH, CHANNELS, KERNEL_H, KERNEL_W, STRIDE_H,
            STRIDE_W, PADDING_H, PADDING_W, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
        )  # fmt: skip

    u = tl.load(
        uhat
        + sample[:, None] * (OUT_H * OUT_W * OUT_CHANNELS)
        + ((y * OUT_W + x) * OUT_CHANNELS)[:, None]
        + offs_n[None, :],
        mask=mask_m[:, None] & mask_n[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_N]
    if POOL == NO_POOL:
        act_diff, derivative = act_diff_and_derivative(u, s, AFTER, AFTER_NEGATIVE_SLOPE)
    elif POOL == MAX_POOL:
        act_diff, derivative, first = _max_pooled(
            u, s, SLOTS, WINDOWS, WINDOW, BLOCK_N, BEFORE, BEFORE_NEGATIVE_SLOPE, AFTER, AFTER_NEGATIVE_SLOPE
        )
    else:
        act_diff, derivative = _average_pooled(
            u, s, SLOTS, WINDOWS, WINDOW, BLOCK_N, AFTER, AFTER_NEGATIVE_SLOPE
        )

    # one row a window from here on; without a pool that is one a position
    pooled = pid_m * WINDOWS + tl.arange(0, WINDOWS)
    offs = pooled[:, None] * OUT_CHANNELS + offs_n[None, :]
    mask = (pooled < windows)[:, None] & mask_n[None, :]
    eps = act_diff - tl.load(d_out + offs, mask=mask, other=0.0)  # [WINDOWS, BLOCK_N]
    tl.store(error + offs, eps, mask=mask)
    store_operand(delta + offs, eps * derivative, mask, INPUT_PRECISION)
    if POOL == MAX_POOL:
        tl.store(winner + offs, first.to(tl.uint8), mask=mask)


# On the host


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
    codes = (activation_code(activation)[0] for activation in (before, after))
    numbers = min(_NUMBERS_PER_THREAD.get(code, _WITH_EXP) for code in codes)
    if precision == "tf32x3":
        numbers = max(8, numbers // 2)  # the operands' low halves take registers, too
    return choose_tiles(geometry.out_channels, geometry.channels, geometry.taps, precision, numbers)


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
    before_code, before_negative_slope = activation_code(before)
    after_code, after_negative_slope = activation_code(after)
    return dict(
        **geometry.constants(),
        OUT_H=geometry.out[0],
        OUT_W=geometry.out[1],
        SLOTS=geometry.slots,
        BEFORE=before_code,
        BEFORE_NEGATIVE_SLOPE=before_negative_slope,
        AFTER=after_code,
        AFTER_NEGATIVE_SLOPE=after_negative_slope,
        **tiles.constants(),
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
    num_pid_m = triton.cdiv(windows * geometry.slots, tiles.block_m)
    num_pid_n = triton.cdiv(geometry.out_channels, tiles.block_n)
    launch(
        conv_predict,
        (num_pid_m * num_pid_n,),
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
