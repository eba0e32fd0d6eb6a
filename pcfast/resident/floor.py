"""The least time that an iteration can take a block: multiply-adds and bytes of shared memory, counted exactly.

Of an iteration in which every layer is live, and a block that has all of its samples. Bytes are those of the kernel's
own loads, as it shares out the work: numbers that several lanes of a warp read in one instruction count once, and the
next instruction counts anew. Pointwise work counts each number that it reads or writes once a stage. Left out are
addresses, barriers, bank conflicts, lanes without work, and products with the zeros of a halo; of the compiled
kernel: tests/native/sass.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ..constants import Constants
from . import program as p
from .placement import Placement

#: Multiply-adds in float32 of a multiprocessor in a clock. Published: CUDA C++ Programming Guide, throughput of
#: arithmetic instructions, compute capability 8.6 and newer; 8.0 has half of it.
MULTIPLY_ADDS_A_CLOCK = 128

# csrc/resident/products.cuh
_QUAD, _WARP = 4, 32
_FEEDBACK_ROWS_A_LANE = 4
_PIXELS_A_LANE = 4


@dataclass(frozen=True)
class Floor:
    """Of one layer, or of all.

    Attributes:
        multiply_adds: of its products. bytes: of shared memory, read and written.
        clocks: the larger of both at a multiprocessor's rates.
        binding: "multiply-adds" or "shared memory".
    """

    multiply_adds: int
    bytes: int
    clocks: float
    binding: str


def live_products(program: p.Program) -> Iterator[tuple[int, bool, p.Product]]:
    """(layer, whether it is the feedback's, product), a stage after the other, in the order of the kernel."""
    for feedback in (False, True):
        for l in range(program.depth, 1, -1):
            layer = program.layers[l - 1]
            product = layer.feedback if feedback else layer.predict
            if product.kind != p.NO_PRODUCT:
                yield l, feedback, product


def multiply_adds(layer: p.Layer, samples: int) -> int:
    """What the mathematics asks of one of the layer's products, whose feedback is the transpose of its prediction."""
    product = layer.predict
    if product.kind == p.COPY:
        return 0
    taps = product.taps_y * product.taps_x
    return samples * product.out * product.height * product.width * product.channels * taps


def channels_of_splits(product: p.Product) -> list[int]:
    """Channels that each part of the sum has."""
    return [min(product.split, product.channels - i * product.split) for i in range(product.splits)]


def words_read(product: p.Product, feedback: bool, samples: int, group: int) -> int:
    """Numbers that the product's loads need."""
    area = product.height * product.width
    if product.kind == p.COPY:
        return samples * product.out * area
    if product.kind == p.PIXELS:
        places, rows = samples * area, product.rows_a_thread
        tiles = -(-places // (_WARP * _PIXELS_A_LANE))
        # lanes past the end read the last place again
        inputs = sum(
            max(min(_WARP, places - first), 1) for first in range(0, tiles * _WARP * _PIXELS_A_LANE, _WARP)
        )
        row_tiles = -(-product.out // rows)
        terms = product.channels * product.taps_y * product.taps_x
        return terms * row_tiles * (tiles * rows + inputs)
    if product.kind != p.LINEAR:
        raise ValueError(f"the loads of products of kind {product.kind} are not counted here")
    quads = sum(-(-channels // _QUAD) for channels in channels_of_splits(product))
    groups = -(-samples // group)
    if feedback:
        rows = _WARP * _FEEDBACK_ROWS_A_LANE
        tiles = -(-product.out // rows)
        # as above, the last row
        weights = sum(max(min(_WARP, product.out - first), 1) for first in range(0, tiles * rows, _WARP))
    else:
        tiles = -(-product.out // (product.lanes * _QUAD))
        weights = _QUAD * -(-product.out // _QUAD)
    return groups * quads * _QUAD * (tiles * group + weights)


def words_written(product: p.Product, samples: int) -> int:
    """Numbers that go to the scratch."""
    return samples * product.out * product.height * product.width * product.splits


def pointwise_words(program: p.Program, l: int) -> tuple[int, int]:
    """Of layer l's error, and of the update of the beliefs below it: numbers read and written."""
    layer, samples = program.layers[l - 1], program.samples
    inner = layer.channels * layer.height * layer.width
    # uhat and the parts of s; delta, or S, which is read too
    error = inner * (1 + layer.predict.splits + (2 if layer.gram else 1))
    if l == program.depth:
        error += 2 * program.classes  # vhat and target
    else:
        error += 2 * layer.by_size.value  # d
    update = 0
    if layer.feedback.kind != p.NO_PRODUCT:
        below = layer.feedback.out * layer.feedback.height * layer.feedback.width
        update = below * (layer.feedback.splits + 2)
    return samples * error, samples * update


@functools.lru_cache(maxsize=64)
def floors(placement: Placement, constants: Constants) -> dict[int, Floor]:
    """Layer -> its floor, for layers 2..L; 0 -> that of all together."""
    program = p.Program.from_buffer_copy(placement.program)
    samples = program.samples
    macs = dict.fromkeys(range(2, program.depth + 1), 0)
    words = {l: sum(pointwise_words(program, l)) for l in macs}
    for l, feedback, product in live_products(program):
        macs[l] += multiply_adds(program.layers[l - 1], samples)
        words[l] += words_read(product, feedback, samples, program.group) + words_written(product, samples)
    macs[0], words[0] = sum(macs.values()), sum(words.values())
    return {l: _floor(macs[l], words[l] * placement.scalar_bytes, constants) for l in macs}


def _floor(macs: int, moved: int, constants: Constants) -> Floor:
    by_products = macs / MULTIPLY_ADDS_A_CLOCK
    by_memory = moved / constants.shared_memory_bytes_per_clk_sm
    binding = "multiply-adds" if by_products >= by_memory else "shared memory"
    return Floor(macs, moved, max(by_products, by_memory), binding)
