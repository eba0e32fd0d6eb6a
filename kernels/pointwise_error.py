"""All that is elementwise after a product: one launch turns s into a layer's error and what is pulled back from it.

A layer is an affine map with result u = uhat + s, then ``before`` (activation), a pool over windows that tile the
map, ``after`` (activation); any of the three may be missing. In deviation form (docs/method.md, fact 8) with
max-pooling's arg-max (fact 6), at the elements k of a window:

    a_k = before(uhat_k)               b_k = before(uhat_k + s_k) - a_k
    max pool:      pooled = max_k a_k, pooled_diff = m_k* of the winner k*, where m_k = (a_k - max_k a_k) + b_k
    average pool:  pooled = mean_k a_k, pooled_diff = mean_k b_k
    act_diff, derivative = after's at pooled, moved by pooled_diff
    eps = act_diff - d
    delta_k = eps * derivative * before'(uhat_k + s_k), for k* alone or for every k / (size of the window)

k* is torch's: the first maximum in row-major order, and NaN wins. No pool is the average over windows of 1 x 1.

What lives where: a program holds a tile of pooled elements, BLOCK_M positions (sample, row, column) by BLOCK_N
channels, in registers, and walks their windows in a static loop. uhat is read for all of a window before s is judged
(the maximum of a_k has to be known); nothing but the results is written.

Arguments of the kernel, channels-last views whose last stride is 1; the three other strides follow each other in the
argument list as NAME_batch, NAME_row, NAME_column. (B, H, W, C) is the map, (B, P, Q, C) the pooled map,
P = H // WINDOW_ROWS, Q = W // WINDOW_COLUMNS; features are (B, 1, 1, N).

    product     (B, H, W, C)  fp32, bf16    s; None is zero: the prediction has not pooled_diff
    uhat        (B, H, W, C)  fp32
    deviation   (B, P, Q, C)  fp32          d; None is zero
    error       (B, P, Q, C)  float         eps; read where ERROR_GIVEN, else written
    delta       (B, H, W, C)  fp32, bf16    written where a window covers it, the rest is left alone; None: not wanted
    positions   int32                       B P Q
    pooled_rows, pooled_columns, channels   P, Q, C
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pcfast.model.activations import Activation

from . import codes
from .activations import act, act_diff_and_derivative, exact_difference
from .launching import launch
from .limits import LARGEST_WINDOW, POINTWISE_MAX_BLOCK_N

# The constexpr argument POOL.
MAX_POOL = tl.constexpr(codes.MAX_POOL)
AVG_POOL = tl.constexpr(codes.AVG_POOL)

# Pooled elements a program: 4 for each of its 128 threads. A thread then reads 4 neighbours, 16 bytes of fp32, and
# bf16 in the same places; with 8 the compiler reads bf16 by eights and moves it through shared memory.
_TILE = 512
# Elements of the map a program. A larger window leaves fewer pooled elements to a thread, one at least, so that what
# it holds stays in registers.
_MAP_TILE = 4 * _TILE
_MIN_TILE = 128


@triton.jit
def tile_indices(positions, rows, columns, channels, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``sample, row, column`` (BLOCK_M, 1), ``channel`` (1, BLOCK_N) and ``mask`` of this program.

    int64, as an offset in elements may be: they are few, a pointer has 64 bits anyway.
    """
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (position < positions) & (channel < channels)
    column = position % columns
    row = position // columns % rows
    sample = position // columns // rows
    return sample.to(tl.int64), row.to(tl.int64), column.to(tl.int64), channel, mask


@triton.jit
def _load_or_zero(pointer, offs, mask):
    if pointer is None:
        value = tl.zeros(mask.shape, tl.float32)
    else:
        value = tl.load(pointer + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    return value


@triton.jit(do_not_specialize=["positions", "pooled_rows", "pooled_columns"])
def pointwise_error_kernel(
    product,
    product_batch,
    product_row,
    product_column,
    uhat,
    uhat_batch,
    uhat_row,
    uhat_column,
    deviation,
    deviation_batch,
    deviation_row,
    deviation_column,
    error,
    error_batch,
    error_row,
    error_column,
    delta,
    delta_batch,
    delta_row,
    delta_column,
    positions,
    pooled_rows,
    pooled_columns,
    channels,
    ERROR_GIVEN: tl.constexpr,
    BEFORE: tl.constexpr,
    BEFORE_NEGATIVE_SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr,
    AFTER: tl.constexpr,
    AFTER_NEGATIVE_SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sample, row, column, channel, mask = tile_indices(
        positions, pooled_rows, pooled_columns, channels, BLOCK_M, BLOCK_N
    )
    product_base = sample * product_batch + channel
    uhat_base = sample * uhat_batch + channel
    first_row, first_column = row * WINDOW_ROWS, column * WINDOW_COLUMNS
    share = 1.0 / (WINDOW_ROWS * WINDOW_COLUMNS)

    # pooled and pooled_diff, [BLOCK_M, BLOCK_N]. Loads that the loops repeat are one in the compiled kernel: nothing
    # is stored between them.
    if POOL == MAX_POOL:
        pooled = tl.full(mask.shape, float("-inf"), tl.float32)
        for i in tl.static_range(WINDOW_ROWS):
            for j in tl.static_range(WINDOW_COLUMNS):
                u_offs = uhat_base + (first_row + i) * uhat_row + (first_column + j) * uhat_column
                a = act(tl.load(uhat + u_offs, mask=mask, other=0.0), BEFORE, BEFORE_NEGATIVE_SLOPE)
                pooled = tl.maximum(pooled, a)  # passes over NaN, which is then in m_k alone
        pooled_diff = tl.full(mask.shape, float("-inf"), tl.float32)
        winner = tl.zeros(mask.shape, tl.int32)
        winner_derivative = tl.zeros(mask.shape, tl.float32)
    else:
        pooled = tl.zeros(mask.shape, tl.float32)
        pooled_diff = tl.zeros(mask.shape, tl.float32)
    for i in tl.static_range(WINDOW_ROWS):
        for j in tl.static_range(WINDOW_COLUMNS):
            u_offs = uhat_base + (first_row + i) * uhat_row + (first_column + j) * uhat_column
            s_offs = product_base + (first_row + i) * product_row + (first_column + j) * product_column
            u = tl.load(uhat + u_offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
            s = _load_or_zero(product, s_offs, mask)
            a = act(u, BEFORE, BEFORE_NEGATIVE_SLOPE)
            b, derivative = act_diff_and_derivative(u, s, BEFORE, BEFORE_NEGATIVE_SLOPE)
            if POOL == MAX_POOL:
                m = exact_difference(a, pooled) + b
                wins = (m > pooled_diff) | (m != m)
                pooled_diff = tl.where(wins, m, pooled_diff)
                winner = tl.where(wins, i * WINDOW_COLUMNS + j, winner)
                winner_derivative = tl.where(wins, derivative, winner_derivative)
            else:
                pooled += a * share
                pooled_diff += b * share

    act_diff, derivative_after = act_diff_and_derivative(pooled, pooled_diff, AFTER, AFTER_NEGATIVE_SLOPE)
    error_offs = sample * error_batch + row * error_row + column * error_column + channel
    if ERROR_GIVEN:
        e = tl.load(error + error_offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    else:
        d_offs = sample * deviation_batch + row * deviation_row + column * deviation_column + channel
        e = act_diff - _load_or_zero(deviation, d_offs, mask)
        tl.store(error + error_offs, e.to(error.dtype.element_ty), mask=mask)

    if delta is not None:
        pooled_delta = e * derivative_after
        delta_base = sample * delta_batch + channel
        for i in tl.static_range(WINDOW_ROWS):
            for j in tl.static_range(WINDOW_COLUMNS):
                if POOL == MAX_POOL:
                    value = tl.where(winner == i * WINDOW_COLUMNS + j, pooled_delta * winner_derivative, 0.0)
                else:
                    u_offs = uhat_base + (first_row + i) * uhat_row + (first_column + j) * uhat_column
                    s_offs = (
                        product_base + (first_row + i) * product_row + (first_column + j) * product_column
                    )
                    u = tl.load(uhat + u_offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
                    s = _load_or_zero(product, s_offs, mask)
                    _, derivative = act_diff_and_derivative(u, s, BEFORE, BEFORE_NEGATIVE_SLOPE)
                    value = pooled_delta * share * derivative
                delta_offs = delta_base + (first_row + i) * delta_row + (first_column + j) * delta_column
                tl.store(delta + delta_offs, value.to(delta.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tail:
    """What follows a layer's product.

    Attributes:
        before: activation before the pool, None for none.
        pool: "max", "average" or None. Windows tile the map; what fills no window is dropped.
        window: rows and columns of a window, of 16 elements at most.
        after: activation after the pool, None for none.

    Raises:
        ValueError: there is no kernel for this pool.
    """

    before: Activation | None = None
    pool: str | None = None
    window: tuple[int, int] = (1, 1)
    after: Activation | None = None

    def __post_init__(self):
        rows, columns = self.window
        known = self.pool in ("max", "average") or (self.pool is None and self.window == (1, 1))
        if not known or not 1 <= rows * columns <= LARGEST_WINDOW:
            raise ValueError(f"no kernel for pool={self.pool!r} with window={self.window}")


def tile(positions: int, channels: int, window: int = 1) -> tuple[int, int]:
    """``BLOCK_M, BLOCK_N`` for so many pooled positions, channels and elements a window."""
    elements = max(_MIN_TILE, min(_TILE, _MAP_TILE // triton.next_power_of_2(window)))
    block_n = min(triton.next_power_of_2(channels), POINTWISE_MAX_BLOCK_N)
    return min(triton.next_power_of_2(positions), elements // block_n), block_n


def strides(view: Tensor | None) -> tuple[int, int, int]:
    """Strides of (batch, row, column) of a channels-last view; 0 where there is one place, for fewer variants.

    Raises:
        ValueError: channels do not lie side by side.
    """
    if view is None:
        return 0, 0, 0
    batch, row, column, channel = view.stride()
    if channel != 1 and view.shape[3] > 1:
        raise ValueError(
            f"a channels-last view needs a last stride of 1, this one has strides {view.stride()}"
        )
    sizes = view.shape
    return batch if sizes[0] > 1 else 0, row if sizes[1] > 1 else 0, column if sizes[2] > 1 else 0


def error_and_delta(
    *, product: Tensor | None, uhat: Tensor, deviation: Tensor, error: Tensor, delta: Tensor, tail: Tail
) -> None:
    """Write ``error`` = act_diff - ``deviation``, and ``delta``, it pulled back to the product."""
    _launch(product, uhat, deviation, error, delta, tail, error_given=False)


def deviate(*, product: Tensor | None, uhat: Tensor, out: Tensor, tail: Tail) -> None:
    """Write how far the layer's output moves from the forward pass, act_diff, into ``out``."""
    _launch(product, uhat, None, out, None, tail, error_given=False)


def pull(*, product: Tensor | None, uhat: Tensor, error: Tensor, delta: Tensor, tail: Tail) -> None:
    """Write ``delta``, the given ``error`` pulled back to the product at uhat + s."""
    _launch(product, uhat, None, error, delta, tail, error_given=True)


def _launch(product, uhat, deviation, error, delta, tail: Tail, *, error_given: bool) -> None:
    batch, rows, columns, channels = error.shape
    window_rows, window_columns = tail.window
    positions = batch * rows * columns
    if positions == 0 or channels == 0:
        return
    block_m, block_n = tile(positions, channels, window_rows * window_columns)
    before, before_negative_slope = codes.activation_code(tail.before)
    after, after_negative_slope = codes.activation_code(tail.after)
    grid = (triton.cdiv(positions, block_m), triton.cdiv(channels, block_n))
    launch(
        pointwise_error_kernel,
        grid,
        product,
        *strides(product),
        uhat,
        *strides(uhat),
        deviation,
        *strides(deviation),
        error,
        *strides(error),
        delta,
        *strides(delta),
        positions,
        rows,
        columns,
        channels,
        ERROR_GIVEN=error_given,
        BEFORE=before,
        BEFORE_NEGATIVE_SLOPE=before_negative_slope,
        POOL=codes.MAX_POOL if tail.pool == "max" else codes.AVG_POOL,
        WINDOW_ROWS=window_rows,
        WINDOW_COLUMNS=window_columns,
        AFTER=after,
        AFTER_NEGATIVE_SLOPE=after_negative_slope,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
