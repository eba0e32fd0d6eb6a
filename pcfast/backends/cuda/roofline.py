"""The least time that an iteration can take a block: multiply-adds and bytes of shared memory, counted exactly.

Of an iteration in which every layer is live, and a block that has all of its samples. Bytes are those of the kernel's
own loads, as it shares out the work: numbers that several lanes of a warp read in one instruction count once, and the
next instruction counts anew. Pointwise work counts each number that it reads or writes once a stage. Left out are
addresses, barriers, bank conflicts, lanes without work, rows and columns of a matrix unit's tile that stand for
nothing, rounding to its operands, and products with the zeros of a halo. What the compiled kernel executes:
docs/kernels.md, "What the kernels execute".
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..gpu_constants import Constants
from . import kernel_params as p
from .shared_memory import Placement

#: What products read -> multiply-adds of a multiprocessor in a clock. Published. ieee: CUDA C++ Programming Guide,
#: throughput of arithmetic instructions, compute capability 8.6 and newer; 8.0 has half of it. Matrix units: from the
#: dense 494.7 and 989.4 TFLOP/s of the NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5, by 132
#: multiprocessors and the 1830 MHz that these are quoted at; whether mma.sync reaches them is not published.
MULTIPLY_ADDS_A_CLOCK = {"ieee": 128, "tf32": 1024, "bf16": 2048}

_BYTES = 4  # of a number of the state, and of a term's place
_BF16_BYTES = 2
# csrc/resident/products.cuh
_QUAD, _WARP = 4, 32
_FEEDBACK_ROWS_A_LANE = 4
_PIXELS_A_LANE = 4
# csrc/resident/matrix_products.cuh
DEPTHS = {"tf32": 8, "bf16": 16}
TILE_ROWS, TILE_COLUMNS = 16, 8
_LANES_ALONG_K = 4
_HALF = 8  # rows of a tile that one register of a lane covers


@dataclass(frozen=True)
class Floor:
    """Of one layer, or of all.

    Attributes:
        multiply_adds: of its products. bytes: of shared memory, read and written.
        clocks: the largest of these at a multiprocessor's rates; its float32 units and its matrix units may work at
            the same time.
        binding: "multiply-adds" or "shared memory".
    """

    multiply_adds: int
    bytes: int
    clocks: float
    binding: str


def operand_of(layer: p.Layer) -> str:
    """A word of :class:`pcfast.precision.Operands`."""
    return next(word for word, code in p.OPERANDS.items() if code == layer.operand)


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
    # on matrix units a linear product's channels are padded to a step
    channels = layer.weight_inputs if product.kind == p.LINEAR else product.channels
    taps = product.taps_y * product.taps_x
    return samples * product.out * product.height * product.width * channels * taps


def splits_of(product: p.Product, matrix: bool) -> list[range]:
    """Channels that each part of the sum has; terms, of PIXELS on matrix units."""
    count = product.term_count if matrix and product.kind == p.PIXELS else product.channels
    return [range(first, min(first + product.split, count)) for first in range(0, count, product.split)]


def bytes_read(product: p.Product, operand: str, feedback: bool, samples: int, group: int) -> int:
    """That the product's loads need. group: samples of a lane in linear products off matrix units."""
    if product.kind == p.COPY:
        return _BYTES * samples * product.out * product.height * product.width
    if product.kind not in (p.PIXELS, p.LINEAR):
        raise ValueError(f"the loads of products of kind {product.kind} are not counted here")
    if operand != "ieee":
        if product.kind == p.PIXELS:
            return _BYTES * _pixel_tiles_words(product, operand, samples)
        return _linear_tiles_bytes(product, operand, feedback, samples)
    if product.kind == p.PIXELS:
        return _BYTES * _pixels_words(product, samples)
    return _BYTES * _linear_words(product, feedback, samples, group)


def _pixels_words(product: p.Product, samples: int) -> int:
    places, rows = samples * product.height * product.width, product.rows_a_thread
    tiles = -(-places // (_WARP * _PIXELS_A_LANE))
    inputs = sum(_in_range(places, range(0, tiles * _WARP * _PIXELS_A_LANE, _WARP), _WARP))
    row_tiles = -(-product.out // rows)
    terms = product.channels * product.taps_y * product.taps_x
    return terms * row_tiles * (tiles * rows + inputs)


def _linear_words(product: p.Product, feedback: bool, samples: int, group: int) -> int:
    quads = sum(-(-len(channels) // _QUAD) for channels in splits_of(product, False))
    groups = -(-samples // group)
    if feedback:
        rows = _WARP * _FEEDBACK_ROWS_A_LANE
        tiles = -(-product.out // rows)
        weights = sum(_in_range(product.out, range(0, tiles * rows, _WARP), _WARP))
    else:
        tiles = -(-product.out // (product.lanes * _QUAD))
        weights = _QUAD * -(-product.out // _QUAD)
    return groups * quads * _QUAD * (tiles * group + weights)


def _linear_tiles_bytes(product: p.Product, operand: str, feedback: bool, samples: int) -> int:
    depth, tiles = DEPTHS[operand], -(-product.out // TILE_ROWS)
    units, groups = -(-tiles // product.tiles), range(0, samples, TILE_COLUMNS)
    inputs = _BYTES * depth * units * sum(_in_range(samples, groups, TILE_COLUMNS))
    if operand == "tf32" and not feedback:
        weights = _BYTES * depth * tiles * TILE_ROWS
    elif operand == "tf32":
        weights = _BYTES * depth * sum(_in_range(product.out, range(0, tiles * TILE_ROWS, _HALF), _HALF))
    elif feedback:
        rows = _in_range(product.out, range(0, tiles * TILE_ROWS, TILE_ROWS), TILE_ROWS)
        # where a row is shorter than a step, which then runs into the next row, that is read by the same instruction
        stride = min(product.weight_row, depth)
        weights = _BF16_BYTES * sum(count * stride + depth - stride for count in rows)
    else:
        # eight numbers of a row at a time, up to its padded end
        weights = _BF16_BYTES * depth * min(tiles * TILE_ROWS, product.weight_channel)
    return product.channels // depth * (inputs + len(groups) * weights)


def place_tiles(product: p.Product) -> int:
    """Tiles of places that a unit of PIXELS has on matrix units."""
    return 4 if product.tiles < 4 else 2


def terms_of(product: p.Product) -> list[tuple[int, int | None]]:
    """Where the input and the weight of each term lie, from the first ones on; None: no weight."""
    taps = [(y, x) for y in range(product.taps_y) for x in range(product.taps_x)]
    found: list[tuple[int, int | None]] = [
        (
            channel * product.input.channels + y * product.input_tap_y + x * product.input_tap_x,
            channel * product.weight_channel + y * product.weight_tap_y + x * product.weight_tap_x,
        )
        for channel in range(product.channels)
        for y, x in taps
    ]
    return found + [(0, None)] * (product.term_count - len(found))


def input_place(product: p.Product, place: int) -> int:
    """Of a place of the map, all samples' one after another: where it reads its first number."""
    sample, inside = divmod(place, product.height * product.width)
    y, x = divmod(inside, product.width)
    at = product.input
    return at.first + sample * at.samples + y * at.rows + x * at.columns


def lanes_terms(operand: str, first: int) -> list[range]:
    """Of a step from term ``first`` on: the terms that the four lanes of a row read, instruction by instruction."""
    return [range(k, k + _LANES_ALONG_K) for k in range(first, first + DEPTHS[operand], _LANES_ALONG_K)]


def _pixel_tiles_words(product: p.Product, operand: str, samples: int) -> int:
    terms, depth = terms_of(product), DEPTHS[operand]
    weighted = sum(weight is not None for _, weight in terms)
    places = samples * product.height * product.width
    a_unit = place_tiles(product) * TILE_ROWS
    place_units = -(-places // a_unit)
    columns = product.tiles * TILE_COLUMNS
    column_units = -(-product.out // columns)
    table = place_units * column_units * 2 * len(terms)
    # of every column a number for each term that has a weight
    starts = range(0, column_units * columns, TILE_COLUMNS)
    weights = place_units * weighted * sum(_in_range(product.out, starts, TILE_COLUMNS))
    # windows overlap: the same number may be of several terms
    steps = [
        tuple(terms[k][0] for k in lanes)
        for first in range(0, len(terms), depth)
        for lanes in lanes_terms(operand, first)
    ]

    @functools.cache
    def distinct(rows: tuple[int, ...]) -> int:
        return sum(len({row + step for row in rows for step in lanes}) for lanes in steps)

    inputs = 0
    for first in range(0, place_units * a_unit, _HALF):
        rows = [input_place(product, min(first + i, places - 1)) for i in range(_HALF)]
        inputs += distinct(tuple(row - rows[0] for row in rows))
    return table + weights + column_units * inputs


def _in_range(size: int, firsts: Iterable[int], width: int) -> list[int]:
    """How many of ``width`` from each first on are below ``size``: those past the end read the last one again."""
    return [max(min(width, size - first), 1) for first in firsts]


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
        error += 2 * layer.size  # d
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
    macs = {l: dict.fromkeys(MULTIPLY_ADDS_A_CLOCK, 0) for l in range(2, program.depth + 1)}
    moved = {l: placement.scalar_bytes * sum(pointwise_words(program, l)) for l in macs}
    for l, feedback, product in live_products(program):
        layer = program.layers[l - 1]
        operand = operand_of(layer)
        macs[l][operand] += multiply_adds(layer, samples)
        read = bytes_read(product, operand, feedback, samples, program.group)
        # counted for a state of float32, which matrix units need
        moved[l] += read * placement.scalar_bytes // _BYTES
        moved[l] += words_written(product, samples) * placement.scalar_bytes
    macs[0] = {operand: sum(each[operand] for each in macs.values()) for operand in MULTIPLY_ADDS_A_CLOCK}
    moved[0] = sum(moved.values())
    return {l: _floor(macs[l], moved[l], constants) for l in macs}


def product_clocks(macs: dict[str, int]) -> float:
    """By what products read: at the published rates, the two kinds of units beside each other."""
    clocks = {operand: count / MULTIPLY_ADDS_A_CLOCK[operand] for operand, count in macs.items()}
    return max(clocks["ieee"], clocks["tf32"] + clocks["bf16"])


def _floor(macs: dict[str, int], moved: int, constants: Constants) -> Floor:
    by_products = product_clocks(macs)
    by_memory = moved / constants.shared_memory_bytes_per_clk_sm
    binding = "multiply-adds" if by_products >= by_memory else "shared memory"
    return Floor(sum(macs.values()), moved, max(by_products, by_memory), binding)
