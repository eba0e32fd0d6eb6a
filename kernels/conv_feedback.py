"""Feedback stage of a convolutional layer: the beliefs below it move, in one launch, as an implicit GEMM.

    r = conv_transpose(delta_{l+1}, W_{l+1})     the error above, pulled back to v_l
    d_l <- d_l + eta (eps_l - r)                 with momentum along a velocity (momentum.py), whose step is eps_l - r

Layer 1, whose prediction is constant, the clamped input (docs/method.md, fact 2), has eps_1 = -d_1. Row h of the
input map meets row oh = (h + padding - kh) / stride of the output map where that is an integer on the map; columns
likewise. delta is read pooled, by max-pooling's arg-max (fact 6): (oh, ow) lies in window (oh // window_h,
ow // window_w) as element k, and takes of its delta

    max:  all where winner == k, else nothing          avg:  1 / window's size of it          no pool: all

Strict predictive coding in deviation form: Rosenbaum, PLOS ONE 17(3) e0266102 (2022); docs/method.md: max-pooling's
arg-max (fact 6) and deviation form (fact 8).

Implicit GEMM: M = B*H*W, N = C_in, K = KH*KW*C_out. A is the im2col matrix of the un-pooled delta, of which only the
tile at hand is ever gathered.

    delta (B, PH, PW, C_out), winner                               +--------------------+
      im2col tile, BLOCK_M x BLOCK_K, row = an input position  --> | accumulator r      | --epilogue--> d, copy of d
    W (C_out, KH, KW, C_in)                                        | BLOCK_M x BLOCK_N  |     ^
      tile of BLOCK_K x BLOCK_N, k = (kh, kw, c_out)           --> | fp32               |     d, error, velocity
                                                                   +--------------------+     (one read each)

Where winners are read the product is transposed: weights on the left.

Arguments of the kernel:

    delta       (batch, PH, PW, Cout)   fp32 or bf16   read; channels-last, as all maps; "tf32": rounded to TF32, like
                                                       weight and copy
    winner      (batch, PH, PW, Cout)   uint8          read; None unless max-pooled
    weight      (Cout, KH, KW, Cin)     as delta       read
    d           (batch, H, W, Cin)      fp32           updated
    error       (batch, H, W, Cin)      fp32           read; CLAMPED: written, -d before the update
    copy        (batch, H, W, Cin)      as delta       written: d for the next product; None: "tf32x3" reads d
    velocity    (batch, H, W, Cin)      fp32           updated; None without momentum
    first_bad   (layers,)               int32          [layer] lowered to `iteration` where a new d is NaN or infinite
    batch, layer, iteration             int32
    eta         fp32                                   step size of this iteration
    momentum    fp32                                   None without

Sums run over the flat K index in steps of BLOCK_K, which depends on layer and precision alone: a sample's result does
not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_geometry import (
    AVG_POOL,
    MAX_POOL,
    ConvGeometry,
    check_tensors,
    choose_tiles,
    tap_and_channel,
)
from .first_bad import note_bad
from .launching import launch
from .momentum import check_velocity, with_momentum
from .tf32 import input_precision, store_operand
from .tiles import Tiles


@triton.jit
def _im2col_product(
    delta,
    winner,
    weight,
    pixel,
    mask_m,
    offs_n,
    mask_n,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The main loop: r (BLOCK_M, BLOCK_N) at some pixels of the input map and the input channels offs_n."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    sample = pixel // (HEIGHT * WIDTH)
    place = (pixel % (HEIGHT * WIDTH)).to(tl.int32)
    # stride times the output position that meets the pixel by the kernel's first tap
    bottom, right = place // WIDTH + PADDING_H, place % WIDTH + PADDING_W
    map_base = sample * (POOLED_H * POOLED_W * OUT_CHANNELS)

    # What winners choose is made in registers. wgmma would read a left operand there, and they may be written anew
    # before it has (docs/kernels.md, Releases of triton); a right one goes through shared memory.
    r = tl.zeros((BLOCK_N, BLOCK_M) if POOL == MAX_POOL else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range((TAPS * OUT_CHANNELS + BLOCK_K - 1) // BLOCK_K):
        tap, channel = tap_and_channel(step, OUT_CHANNELS, BLOCK_K)  # [BLOCK_K] each
        mask_k = tap < TAPS
        y, x = bottom[:, None] - (tap // KERNEL_W)[None, :], right[:, None] - (tap % KERNEL_W)[None, :]
        mask = mask_m[:, None] & mask_k[None, :] & (y >= 0) & (x >= 0)
        if STRIDE_H > 1:
            mask = mask & (y % STRIDE_H == 0)
        if STRIDE_W > 1:
            mask = mask & (x % STRIDE_W == 0)
        # output position, then window; rows and columns that fill no window lie past the last one
        oh, ow = y // STRIDE_H, x // STRIDE_W
        ph, pw = oh // WINDOW_H, ow // WINDOW_W
        mask = mask & (ph < POOLED_H) & (pw < POOLED_W)
        offs = map_base[:, None] + (ph * POOLED_W + pw) * OUT_CHANNELS + channel[None, :]
        im2col_tile = tl.load(delta + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        offs_k = channel * (TAPS * CHANNELS) + tap * CHANNELS
        if POOL == MAX_POOL:
            element = (oh % WINDOW_H) * WINDOW_W + ow % WINDOW_W
            won = tl.load(winner + offs, mask=mask, other=0) == element  # [BLOCK_M, BLOCK_K]
            im2col_tile = tl.where(won, im2col_tile, 0.0)
            weight_ptrs = weight + offs_k[None, :] + offs_n[:, None]
            weight_tile = tl.load(
                weight_ptrs, mask=mask_k[None, :] & mask_n[:, None], other=0.0
            )  # [BLOCK_N, BLOCK_K]
            r = tl.dot(weight_tile, tl.trans(im2col_tile), r, input_precision=INPUT_PRECISION)
        else:
            weight_ptrs = weight + offs_k[:, None] + offs_n[None, :]
            weight_tile = tl.load(
                weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            r = tl.dot(im2col_tile, weight_tile, r, input_precision=INPUT_PRECISION)
    if POOL == MAX_POOL:
        r = tl.trans(r)
    if POOL == AVG_POOL:
        r *= 1.0 / (WINDOW_H * WINDOW_W)
    return r


@triton.jit(do_not_specialize=["batch", "layer", "iteration"])
def conv_feedback(
    delta,
    winner,
    weight,
    d,
    error,
    copy,
    velocity,
    first_bad,
    batch,
    layer,
    iteration,
    eta,
    momentum,
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
    CLAMPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    # Neighbouring programs share pid_m, whose im2col tiles are the larger operand.
    pid = tl.program_id(0)
    num_pid_n: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    pid_m = pid // num_pid_n
    if WIDE:
        pid_m = pid_m.to(tl.int64)
        pixels = batch.to(tl.int64) * (HEIGHT * WIDTH)
    else:
        pixels = batch * (HEIGHT * WIDTH)
    offs_n = (pid % num_pid_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < CHANNELS
    pixel = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = pixel < pixels

    r = _im2col_product(
        delta, winner, weight, pixel, mask_m, offs_n, mask_n, HEIGHT, WIDTH, CHANNELS, OUT_CHANNELS, KERNEL_H,
        KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, POOL, WINDOW_H, WINDOW_W, POOLED_H, POOLED_W, BLOCK_M,
        BLOCK_N, BLOCK_K, INPUT_PRECISION,
    )  # fmt: skip

    # the epilogue: beliefs move
    offs = pixel[:, None] * CHANNELS + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    old = tl.load(d + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    if CLAMPED:
        eps = -old
        tl.store(error + offs, eps, mask=mask)
    else:
        eps = tl.load(error + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    step = eps - r
    if momentum is not None:
        step = with_momentum(step, velocity + offs, momentum, mask)
    moved = old + eta * step
    tl.store(d + offs, moved, mask=mask)
    if copy is not None:
        store_operand(copy + offs, moved, mask, INPUT_PRECISION)
    note_bad(first_bad, layer, iteration, moved, mask)


# On the host


def feedback_tiles(geometry: ConvGeometry, precision: str) -> Tiles:
    """The tiles for a layer: a function of its sizes and precision, never of the batch."""
    # The epilogue has d, error and r of each number in flight, tf32x3 the operands' low halves before. Where winners
    # are read, a gathered row takes twice the addresses.
    numbers = 16 if precision == "tf32x3" else 32
    max_block_m = 64 if geometry.pool == "max" else 128
    return choose_tiles(
        geometry.channels, geometry.out_channels, geometry.taps, precision, numbers, max_block_m=max_block_m
    )


def feedback_constants(
    geometry: ConvGeometry, *, clamped: bool, precision: str, operand: torch.dtype, tiles: Tiles, wide: bool
) -> dict:
    """The kernel's constexpr arguments by name."""
    return dict(
        **geometry.constants(),
        CLAMPED=clamped,
        **tiles.constants(),
        INPUT_PRECISION=input_precision(precision, operand),
        WIDE=wide,
    )


def launch_conv_feedback(
    geometry: ConvGeometry,
    *,
    delta: Tensor,
    winner: Tensor | None = None,
    weight: Tensor,
    d: Tensor,
    error: Tensor,
    copy: Tensor | None = None,
    velocity: Tensor | None = None,
    first_bad: Tensor,
    layer: int,
    iteration: int,
    eta: float,
    momentum: float = 0.0,
    clamped: bool = False,
    precision: str,
    tiles: Tiles | None = None,
) -> None:
    """Launch on the current stream; the tensors are described at the top of this file.

    Args:
        geometry: of the layer above the beliefs ``d``, whose ``delta`` and ``weight`` these are.
        layer: entry of ``first_bad`` that the beliefs report to.
        clamped: the beliefs are layer 1's: the error is -d, and is written.
        precision: "bf16", "tf32" or "tf32x3".
        tiles: other than :func:`feedback_tiles` gives.

    Raises:
        ValueError: the kernel cannot work on this layer, or a tensor is not as described.
    """
    reason = geometry.refusal()
    if reason:
        raise ValueError(f"conv_feedback cannot run this layer: {reason}")
    if (winner is None) == (geometry.pool == "max"):
        raise ValueError("conv_feedback reads winners exactly where the layer is max-pooled")
    check_velocity(momentum, velocity)
    batch, pooled = d.shape[0], (d.shape[0], *geometry.pooled, geometry.out_channels)
    below = (batch, geometry.height, geometry.width, geometry.channels)
    optional = {} if winner is None else dict(winner=(winner, pooled, torch.uint8))
    if copy is not None:
        optional["copy"] = (copy, below, delta.dtype)
    if velocity is not None:
        optional["velocity"] = (velocity, below, torch.float32)
    check_tensors(
        delta=(delta, pooled, delta.dtype),
        weight=(weight, (geometry.out_channels, *geometry.kernel, geometry.channels), delta.dtype),
        d=(d, below, torch.float32),
        error=(error, below, torch.float32),
        first_bad=(first_bad, (first_bad.numel(),), torch.int32),
        **optional,
    )
    tiles = tiles or feedback_tiles(geometry, precision)
    constants = feedback_constants(
        geometry,
        clamped=clamped,
        precision=precision,
        operand=delta.dtype,
        tiles=tiles,
        wide=geometry.wide(batch),
    )
    pixels = batch * geometry.height * geometry.width
    grid = triton.cdiv(pixels, tiles.block_m) * triton.cdiv(geometry.channels, tiles.block_n)
    launch(
        conv_feedback, (grid,),
        delta, winner, weight, d, error, copy, velocity, first_bad, batch, layer, iteration, eta, momentum or None,
        **constants, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
