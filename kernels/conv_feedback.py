"""Feedback stage of a convolutional layer: the beliefs below it move, in one launch, as an implicit matrix product.

    r = conv_transpose(delta_{l+1}, W_{l+1})     the error above, pulled back to v_l
    d_l <- d_l + eta (eps_l - r)                 with momentum along a velocity (momentum.py), whose step is eps_l - r

Layer 1, whose prediction is constant (docs/method.md fact 2), has eps_1 = -d_1. Row h of the input map meets row
oh = (h + padding - kh) / stride of the output map where that is an integer on the map; columns likewise. delta is
read pooled (fact 6): (oh, ow) lies in window (oh // window_h, ow // window_w) as element k, and takes of its delta

    max:  all where winner == k, else nothing          avg:  1 / window's size of it          no pool: all

Strict predictive coding in deviation form: Rosenbaum, PLOS ONE 17(3) e0266102 (2022); docs/method.md facts 6 and 8.

    delta (batch, PH, PW, Cout), winner                       +-------------------+
      gathered: ROWS x REDUCTION, row = an input position --> | accumulator r     | --epilogue--> d, copy of d
    W (Cout, KH, KW, Cin)                                     | ROWS x COLUMNS    |     ^
      REDUCTION x COLUMNS, index = (kh, kw, cout)         --> | fp32              |     d, error, velocity (read once)
                                                              +-------------------+

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

Sums run over the flat reduction index in steps of REDUCTION, which depends on layer and precision alone: a sample's
result does not depend on its batch.
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
    Tiles,
    check_tensors,
    choose_tiles,
    tap_and_channel,
)
from .first_bad import note_bad
from .launching import launch
from .momentum import check_velocity, with_momentum
from .tf32 import input_precision, store_operand


def feedback_tiles(geometry: ConvGeometry, precision: str) -> Tiles:
    """The tiles for a layer: a function of its sizes and precision, never of the batch."""
    # The epilogue has d, error and r of each number in flight, tf32x3 the operands' low halves before. Where winners
    # are read, a gathered row takes twice the addresses.
    numbers = 16 if precision == "tf32x3" else 32
    most_rows = 64 if geometry.pool == "max" else 128
    return choose_tiles(
        geometry.channels, geometry.out_channels, geometry.taps, precision, numbers, most_rows=most_rows
    )


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REDUCTION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W

    # Neighbouring programs share rows, whose gathered operand is the larger one.
    program = tl.program_id(0)
    column_tiles: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    tile_row = program // column_tiles
    if WIDE:
        tile_row = tile_row.to(tl.int64)
        pixels = batch.to(tl.int64) * (HEIGHT * WIDTH)
    else:
        pixels = batch * (HEIGHT * WIDTH)
    columns = (program % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < CHANNELS

    pixel = tile_row * ROWS + tl.arange(0, ROWS)
    in_rows = pixel < pixels
    sample = pixel // (HEIGHT * WIDTH)
    place = (pixel % (HEIGHT * WIDTH)).to(tl.int32)
    bottom, right = place // WIDTH + PADDING_H, place % WIDTH + PADDING_W
    map_start = sample * (POOLED_H * POOLED_W * OUT_CHANNELS)

    # What winners choose is made in registers. wgmma would read a left operand there, and they may be written anew
    # before it has (docs/kernels.md, Releases of triton); a right one goes through shared memory.
    r = tl.zeros((COLUMNS, ROWS) if POOL == MAX_POOL else (ROWS, COLUMNS), tl.float32)
    for step in range((TAPS * OUT_CHANNELS + REDUCTION - 1) // REDUCTION):
        tap, channel = tap_and_channel(step, OUT_CHANNELS, REDUCTION)
        in_terms = tap < TAPS
        y, x = bottom[:, None] - (tap // KERNEL_W)[None, :], right[:, None] - (tap % KERNEL_W)[None, :]
        inside = in_rows[:, None] & in_terms[None, :] & (y >= 0) & (x >= 0)
        if STRIDE_H > 1:
            inside = inside & (y % STRIDE_H == 0)
        if STRIDE_W > 1:
            inside = inside & (x % STRIDE_W == 0)
        # output position, then window; rows and columns that fill no window lie past the last one
        oh, ow = y // STRIDE_H, x // STRIDE_W
        ph, pw = oh // WINDOW_H, ow // WINDOW_W
        inside = inside & (ph < POOLED_H) & (pw < POOLED_W)
        source = map_start[:, None] + (ph * POOLED_W + pw) * OUT_CHANNELS + channel[None, :]
        gathered = tl.load(delta + source, mask=inside, other=0.0)
        terms = channel * (TAPS * CHANNELS) + tap * CHANNELS
        if POOL == MAX_POOL:
            element = (oh % WINDOW_H) * WINDOW_W + ow % WINDOW_W
            won = tl.load(winner + source, mask=inside, other=0) == element
            gathered = tl.where(won, gathered, 0.0)
            taps = tl.load(
                weight + terms[None, :] + columns[:, None],
                mask=in_terms[None, :] & in_columns[:, None],
                other=0.0,
            )
            r = tl.dot(taps, tl.trans(gathered), r, input_precision=INPUT_PRECISION)
        else:
            taps = tl.load(
                weight + terms[:, None] + columns[None, :],
                mask=in_terms[:, None] & in_columns[None, :],
                other=0.0,
            )
            r = tl.dot(gathered, taps, r, input_precision=INPUT_PRECISION)
    if POOL == MAX_POOL:
        r = tl.trans(r)
    if POOL == AVG_POOL:
        r *= 1.0 / (WINDOW_H * WINDOW_W)

    where = pixel[:, None] * CHANNELS + columns[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    old = tl.load(d + where, mask=inside, other=0.0)
    if CLAMPED:
        difference = -old
        tl.store(error + where, difference, mask=inside)
    else:
        difference = tl.load(error + where, mask=inside, other=0.0)
    step = difference - r
    if momentum is not None:
        step = with_momentum(step, velocity + where, momentum, inside)
    moved = old + eta * step
    tl.store(d + where, moved, mask=inside)
    if copy is not None:
        store_operand(copy + where, moved, inside, INPUT_PRECISION)
    note_bad(first_bad, layer, iteration, moved, inside)


def feedback_constants(
    geometry: ConvGeometry, *, clamped: bool, precision: str, operand: torch.dtype, tiles: Tiles, wide: bool
) -> dict:
    """The kernel's constexpr arguments by name."""
    return dict(
        **geometry.constants(),
        CLAMPED=clamped,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        REDUCTION=tiles.reduction,
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
    grid = triton.cdiv(pixels, tiles.rows) * triton.cdiv(geometry.channels, tiles.columns)
    launch(
        conv_feedback, (grid,),
        delta, winner, weight, d, error, copy, velocity, first_bad, batch, layer, iteration, eta, momentum or None,
        **constants, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
