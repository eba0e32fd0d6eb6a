"""The least time that an iteration can take a block: multiply-adds and bytes of shared memory, counted exactly.

Of an iteration in which every layer is live, and a block that has all of its samples. Bytes are those of the kernel's
own loads, as it shares out the work: numbers that several lanes of a warp read in one instruction count once, and the
next instruction counts anew. Pointwise work counts each number that it reads or writes once a stage. Left out are
addresses, barriers, bank conflicts, lanes without work, rows and columns of a Tensor Core's tile that stand for
nothing, rounding to its operands, and products with the zeros of a halo. What the compiled kernel executes:
docs/kernels.md, "What the kernels execute".
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..chips import Rates
from ..gpu_constants import Constants
from . import geometry as g
from . import kernel_params as p
from .shared_memory import Placement

_BYTES = 4  # of a number of the state, and of a term's place
_BF16_BYTES = 2
_LANES_ALONG_K = 4  # of a fragment of mma.sync
_HALF = g.MMA_M // 2  # rows of a tile that one register of a lane covers


@dataclass(frozen=True)
class Floor:
    """The least time of one layer, or of all.

    Attributes:
        multiply_adds: the multiply-adds of its products.
        bytes: the bytes of shared memory, read and written.
        clocks: the largest of these at an SM's rates; its float32 units and its Tensor Cores may work at the same
            time.
        binding: "multiply-adds" or "shared memory".
    """

    multiply_adds: int
    bytes: int
    clocks: float
    binding: str


def operand_of(layer: p.Layer) -> str:
    """Returns what the layer's products read, a word of :class:`pcfast.precision.Operands`."""
    return next(word for word, code in p.OPERANDS.items() if code == layer.operand)


def live_products(program: p.Program) -> Iterator[tuple[int, bool, p.Product]]:
    """Yields (layer, whether it is the feedback's, product), stage by stage, in the order of the kernel."""
    for feedback in (False, True):
        for l in range(program.depth, 1, -1):
            layer = program.layers[l - 1]
            product = layer.feedback if feedback else layer.predict
            if product.kind != g.NO_PRODUCT:
                yield l, feedback, product


def multiply_adds(layer: p.Layer, samples: int) -> int:
    """Returns the multiply-adds of one of the layer's products, whose feedback is the transpose of its prediction."""
    product = layer.predict
    if product.kind == g.COPY:
        return 0
    # on Tensor Cores a linear product's channels are padded to a step
    channels = layer.weight_inputs if product.kind == g.LINEAR else product.channels
    taps = product.taps_y * product.taps_x
    return samples * product.out * product.height * product.width * channels * taps


def splits_of(product: p.Product, matrix: bool) -> list[range]:
    """Returns the channels of each part of a split sum; the terms, of a convolution on Tensor Cores."""
    count = product.term_count if matrix and product.kind == g.CONV else product.channels
    return [range(first, min(first + product.split, count)) for first in range(0, count, product.split)]


def bytes_read(product: p.Product, operand: str, feedback: bool, samples: int, group: int) -> int:
    """Returns the bytes that the product's loads need.

    Args:
        group: samples per lane of a linear product in IEEE arithmetic.
    """
    if product.kind == g.COPY:
        return _BYTES * samples * product.out * product.height * product.width
    if product.kind not in (g.CONV, g.LINEAR):
        raise ValueError(f"the loads of products of kind {product.kind} are not counted here")
    if operand != "ieee":
        if product.kind == g.CONV:
            return _BYTES * _implicit_gemm_words(product, operand, samples)
        return _linear_tiles_bytes(product, operand, feedback, samples)
    if product.kind == g.CONV:
        return _BYTES * _direct_conv_words(product, samples)
    return _BYTES * _linear_words(product, feedback, samples, group)


def _direct_conv_words(product: p.Product, samples: int) -> int:
    positions, rows = samples * product.height * product.width, product.rows_per_thread
    tiles = -(-positions // (g.WARP_SIZE * g.POSITIONS_PER_LANE))
    inputs = sum(
        _in_range(positions, range(0, tiles * g.WARP_SIZE * g.POSITIONS_PER_LANE, g.WARP_SIZE), g.WARP_SIZE)
    )
    row_tiles = -(-product.out // rows)
    terms = product.channels * product.taps_y * product.taps_x
    return terms * row_tiles * (tiles * rows + inputs)


def _linear_words(product: p.Product, feedback: bool, samples: int, group: int) -> int:
    quads = sum(-(-len(channels) // g.VEC_SIZE) for channels in splits_of(product, False))
    groups = -(-samples // group)
    if feedback:
        rows = g.WARP_SIZE * g.FEEDBACK_ROWS_PER_LANE
        tiles = -(-product.out // rows)
        weights = sum(_in_range(product.out, range(0, tiles * rows, g.WARP_SIZE), g.WARP_SIZE))
    else:
        tiles = -(-product.out // (product.lanes * g.VEC_SIZE))
        weights = g.VEC_SIZE * -(-product.out // g.VEC_SIZE)
    return groups * quads * g.VEC_SIZE * (tiles * group + weights)


def _linear_tiles_bytes(product: p.Product, operand: str, feedback: bool, samples: int) -> int:
    depth, tiles = g.MMA_K[operand], -(-product.out // g.MMA_M)
    units, groups = -(-tiles // product.tiles), range(0, samples, g.MMA_N)
    inputs = _BYTES * depth * units * sum(_in_range(samples, groups, g.MMA_N))
    if operand == "tf32" and not feedback:
        weights = _BYTES * depth * tiles * g.MMA_M
    elif operand == "tf32":
        weights = _BYTES * depth * sum(_in_range(product.out, range(0, tiles * g.MMA_M, _HALF), _HALF))
    elif feedback:
        rows = _in_range(product.out, range(0, tiles * g.MMA_M, g.MMA_M), g.MMA_M)
        # where a row is shorter than a step, which then runs into the next row, that is read by the same instruction
        stride = min(product.weight_row, depth)
        weights = _BF16_BYTES * sum(count * stride + depth - stride for count in rows)
    else:
        # eight numbers of a row at a time, up to its padded end
        weights = _BF16_BYTES * depth * min(tiles * g.MMA_M, product.weight_channel)
    return product.channels // depth * (inputs + len(groups) * weights)


def terms_of(product: p.Product) -> list[tuple[int, int | None]]:
    """Returns where the input and the weight of each term lie, from the first ones on; None: no weight."""
    taps = [(y, x) for y in range(product.taps_y) for x in range(product.taps_x)]
    terms: list[tuple[int, int | None]] = [
        (
            channel * product.input.channels + y * product.input_tap_y + x * product.input_tap_x,
            channel * product.weight_channel + y * product.weight_tap_y + x * product.weight_tap_x,
        )
        for channel in range(product.channels)
        for y, x in taps
    ]
    return terms + [(0, None)] * (product.term_count - len(terms))


def input_offset(product: p.Product, position: int) -> int:
    """Returns where a position of the map, all samples' one after another, reads its first number."""
    sample, inside = divmod(position, product.height * product.width)
    y, x = divmod(inside, product.width)
    at = product.input
    return at.first + sample * at.samples + y * at.rows + x * at.columns


def lanes_terms(operand: str, first: int) -> list[range]:
    """Returns the terms that the four lanes of a row read in the step from term ``first`` on, by instruction."""
    return [range(k, k + _LANES_ALONG_K) for k in range(first, first + g.MMA_K[operand], _LANES_ALONG_K)]


def _implicit_gemm_words(product: p.Product, operand: str, samples: int) -> int:
    terms, depth = terms_of(product), g.MMA_K[operand]
    weighted = sum(weight is not None for _, weight in terms)
    positions = samples * product.height * product.width
    a_unit = g.conv_tiles_m(product.tiles) * g.MMA_M
    position_units = -(-positions // a_unit)
    columns = product.tiles * g.MMA_N
    column_units = -(-product.out // columns)
    table = position_units * column_units * 2 * len(terms)
    # of every column a number for each term that has a weight
    starts = range(0, column_units * columns, g.MMA_N)
    weights = position_units * weighted * sum(_in_range(product.out, starts, g.MMA_N))
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
    for first in range(0, position_units * a_unit, _HALF):
        rows = [input_offset(product, min(first + i, positions - 1)) for i in range(_HALF)]
        inputs += distinct(tuple(row - rows[0] for row in rows))
    return table + weights + column_units * inputs


def _in_range(size: int, firsts: Iterable[int], width: int) -> list[int]:
    """Counts those of ``width`` from each first on that are below ``size``; the others read the last one again."""
    return [max(min(width, size - first), 1) for first in firsts]


def words_written(product: p.Product, samples: int) -> int:
    """Returns how many numbers go to the scratch."""
    return samples * product.out * product.height * product.width * product.splits


def pointwise_words(program: p.Program, l: int) -> tuple[int, int]:
    """Returns the numbers read and written by layer l's error, and by the update of the beliefs below it."""
    layer, samples = program.layers[l - 1], program.samples
    inner = layer.channels * layer.height * layer.width
    # uhat and the parts of s; delta, or S, which is read too
    error = inner * (1 + layer.predict.splits + (2 if layer.gram else 1))
    if l == program.depth:
        error += 2 * program.classes  # vhat and target
    else:
        error += 2 * layer.size  # d
    update = 0
    if layer.feedback.kind != g.NO_PRODUCT:
        below = layer.feedback.out * layer.feedback.height * layer.feedback.width
        update = below * (layer.feedback.splits + 2)
    return samples * error, samples * update


@functools.lru_cache(maxsize=64)
def floors(placement: Placement, constants: Constants) -> dict[int, Floor]:
    """Returns layer -> its floor, for layers 2..L; 0 -> that of all together."""
    program = p.Program.from_buffer_copy(placement.program)
    samples = program.samples
    macs = {l: dict.fromkeys(p.OPERANDS, 0) for l in range(2, program.depth + 1)}
    moved = {l: placement.scalar_bytes * sum(pointwise_words(program, l)) for l in macs}
    for l, feedback, product in live_products(program):
        layer = program.layers[l - 1]
        operand = operand_of(layer)
        macs[l][operand] += multiply_adds(layer, samples)
        read = bytes_read(product, operand, feedback, samples, program.group)
        # counted for a state of float32, which Tensor Cores need
        moved[l] += read * placement.scalar_bytes // _BYTES
        moved[l] += words_written(product, samples) * placement.scalar_bytes
    macs[0] = {operand: sum(each[operand] for each in macs.values()) for operand in p.OPERANDS}
    moved[0] = sum(moved.values())
    return {l: _floor(macs[l], moved[l], constants) for l in macs}


def product_clocks(macs: dict[str, int], rates: Rates) -> float:
    """Returns the clocks at the published rates, float32 units and Tensor Cores beside each other.

    Whether mma.sync reaches the rates of the Tensor Cores is not published.
    """
    clocks = {operand: count / getattr(rates, operand) for operand, count in macs.items()}
    return max(clocks["ieee"], clocks["tf32"] + clocks["bf16"])


def _floor(macs: dict[str, int], moved: int, constants: Constants) -> Floor:
    by_products = product_clocks(macs, constants.chip.multiply_adds_per_clock)
    by_memory = moved / constants.shared_memory_bytes_per_clk_sm
    binding = "multiply-adds" if by_products >= by_memory else "shared memory"
    return Floor(sum(macs.values()), moved, max(by_products, by_memory), binding)
