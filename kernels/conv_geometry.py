"""Sizes of a convolutional layer, and what its two implicit GEMMs share.

The kernels take a layer  convolution -> `before` -> pool -> `after`: channels-last, groups = 1, dilation = 1, pooling
windows that tile the map. The K of their products is one flat index, so that three input channels cost three terms a
tap and not a whole block:

    k = tap * channels + channel        tap = kh * kernel_w + kw
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcfast.model.activations import Activation

from . import codes
from .tiles import Tiles

# The constexpr argument POOL.
NO_POOL = tl.constexpr(codes.NO_POOL)
MAX_POOL = tl.constexpr(codes.MAX_POOL)
AVG_POOL = tl.constexpr(codes.AVG_POOL)

_POOLS = {None: codes.NO_POOL, "max": codes.MAX_POOL, "avg": codes.AVG_POOL}
_MIN_BLOCK_M = 64  # what wgmma and tcgen05 take
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ConvGeometry:
    """A convolutional layer without its batch.

    Attributes:
        height, width, channels: of the input map.
        out_channels: of the output map.
        kernel, stride, padding: of the convolution, (vertical, horizontal).
        pool: "max", "avg" or None.
        window: of the pool, and its stride; (1, 1) without one.
    """

    height: int
    width: int
    channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: str | None = None
    window: tuple[int, int] = (1, 1)

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, strict=True)
        return tuple((size + 2 * pad - kernel) // stride + 1 for size, kernel, stride, pad in sizes)

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width after the pool; rows and columns that fill no window are dropped."""
        return tuple(size // window for size, window in zip(self.out, self.window, strict=True))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def slots(self) -> int:
        """Rows of conv_predict's product for one window: its elements, padded to a power of 2."""
        return triton.next_power_of_2(math.prod(self.window))

    @property
    def _numbers_per_sample(self) -> int:
        """The most that an index into one sample counts, rows that are padding included."""
        windows = math.prod(self.pooled) * self.slots
        outputs = max(math.prod(self.out), windows) * self.out_channels
        # a tap may lie outside the map, by the padding
        inputs = (self.height + 2 * self.padding[0]) * (self.width + 2 * self.padding[1]) * self.channels
        return max(outputs, inputs)

    def refusal(self, before: Activation | None = None) -> str:
        """Why the kernels cannot run this layer with ``before`` in front of its pool; "" if they can."""
        if self.pool not in _POOLS:
            return f"{self.pool!r} is no pool that the convolution kernels know"
        if self.pool is None and self.window != (1, 1):
            return "a window without a pool"
        if self.pool is None and before is not None:
            return "without a pool the activation is the one behind it"
        if self.pool == "avg" and before is not None:
            return "derivatives differ within a window that is averaged behind an activation"
        if math.prod(self.window) > _MIN_BLOCK_M:
            return f"pooling windows of more than {_MIN_BLOCK_M} elements, which a tile may not hold"
        if min(self.pooled) < 1:
            return "the map is smaller than the kernel or the pooling window"
        if max(self._numbers_per_sample, self.taps * self.channels * self.out_channels) > _INT32_MAX:
            return "more than 2^31 numbers in one sample's map or in the weight"
        return ""

    def wide(self, batch: int) -> bool:
        """True where an index of a launch on ``batch`` samples may exceed int32."""
        past_the_end = 128 * max(self.out_channels, self.channels)  # rows of the last tile
        return batch * self._numbers_per_sample + past_the_end > _INT32_MAX

    def constants(self) -> dict[str, int]:
        """The constexpr arguments that both kernels take."""
        return dict(
            HEIGHT=self.height,
            WIDTH=self.width,
            CHANNELS=self.channels,
            OUT_CHANNELS=self.out_channels,
            KERNEL_H=self.kernel[0],
            KERNEL_W=self.kernel[1],
            STRIDE_H=self.stride[0],
            STRIDE_W=self.stride[1],
            PADDING_H=self.padding[0],
            PADDING_W=self.padding[1],
            POOL=_POOLS[self.pool],
            WINDOW_H=self.window[0],
            WINDOW_W=self.window[1],
            POOLED_H=self.pooled[0],
            POOLED_W=self.pooled[1],
        )


def check_tensors(**expected: tuple[Tensor, tuple[int, ...], torch.dtype]) -> None:
    """Raise ValueError unless every ``name=(tensor, shape, dtype)`` is so, contiguous and on one device."""
    device = next(iter(expected.values()))[0].device
    for name, (tensor, shape, dtype) in expected.items():
        given = tuple(tensor.shape), tensor.dtype, tensor.device
        if given != (shape, dtype, device) or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"{name} is {given[0]} {given[1]} on {given[2]}, {layout}; "
                f"needed is {shape} {dtype} on {device}, contiguous"
            )


def choose_tiles(
    n: int, channels: int, taps: int, precision: str, numbers_per_thread: int, max_block_m: int = 128
) -> Tiles:
    """Tiles for a product of N = ``n`` columns whose sums run over K = ``taps`` times ``channels`` terms.

    Args:
        numbers_per_thread: of the accumulator, at most; a power of 2. What the epilogue keeps beside each of them
            decides how many fit into 255 registers.
        max_block_m: a power of 2.
    """
    # 8 warps. A tile that needs more fills an SM alone, and nothing runs beside its epilogue.
    numbers = 256 * numbers_per_thread
    # 16 columns are the fewest that tl.dot takes; from 64 x 128 on tiles read L2 at less than its rate on sm_90:
    # 24 KB for 512 cycles of wgmma.
    block_n = max(16, min(triton.next_power_of_2(n), 128, numbers // _MIN_BLOCK_M))
    # 128 rows where the columns leave room: weights are read half as often.
    block_m = max(_MIN_BLOCK_M, min(max_block_m, numbers // block_n))
    warps = max(4, block_m * block_n // (32 * numbers_per_thread))  # 4 are the warp group that wgmma needs
    # Channels of a row and step: 128 bytes, a cache line. Half a line with one tap a step is cheaper than index
    # arithmetic for every term, of which 8 warps have half as much each.
    line = 64 if precision == "bf16" else 32
    if channels % line == 0:
        block_k = line
    elif channels % (line // 2) == 0:
        block_k = line // 2
    else:
        block_k = max(16, min(line, triton.next_power_of_2(taps * channels)))
        warps = 8
    # Two steps in flight while one is multiplied, at most 82 KB: room for two programs an SM on sm_80, 90 and 100,
    # and for one where there are 99 KB (sm_86, sm_89, sm_120).
    return Tiles(block_m, block_n, block_k, warps, stages=3)


@triton.jit
def tap_and_channel(step, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tap and channel of the ``BLOCK_K`` flat indices of a step."""
    if CHANNELS % BLOCK_K == 0:
        # One tap for the whole step. Written as a multiple of BLOCK_K, from which the compiler sees that the step's
        # addresses are aligned; it does not see it in `k % CHANNELS`.
        steps_of_tap: tl.constexpr = CHANNELS // BLOCK_K
        tap = step // steps_of_tap + tl.zeros((BLOCK_K,), tl.int32)
        channel = (step % steps_of_tap) * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = offs_k // CHANNELS
        # Likewise: so many channels, a power of 2, lie side by side.
        together: tl.constexpr = CHANNELS & -CHANNELS
        channel = tl.max_contiguous(tl.multiple_of(offs_k % CHANNELS, together), together)
    return tap, channel
