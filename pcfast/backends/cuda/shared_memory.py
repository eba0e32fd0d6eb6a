"""From shapes alone: which numbers lie where in a block's shared memory, or why a network does not fit."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from ...deviation.chain import pool_first
from ...model import spec as specs
from ...precision import Operands
from ..kernel_forms import LinearForm, PointwiseForm, TorchForm, layer_form, maps
from . import kernel_params as p

# A vector access has so many numbers; rows that products read start at multiples of it.
_QUAD = 4
_WARP = 32
#: Samples of a block that are tried, fewest first; in linear products a lane has up to four of them.
SAMPLES = (1, 2, 3, 4, 8, 12, 16)
_MOST_GROUP = 4
# Warps of a block: the kernel's registers allow no more.
_WARPS = 16
# Of shared memory, for every block, which the driver keeps.
_RESERVED_BYTES = 1024
# Numbers of a block: the kernel's quotients are exact below it.
_MOST_ELEMENTS = 1 << 16
# Registers of a multiprocessor, and of a thread (tests/native/compile_limits.json).
_SM_REGISTERS, _THREAD_REGISTERS = 65536, 128
# A part of a sum is no shorter than so many quads a lane: a shorter one costs more in the scratch than it saves.
_FEWEST_QUADS = 4
# csrc/resident/products.cuh
_FEEDBACK_ROWS_A_LANE = 4
_PIXELS_A_LANE = 4
_PIXEL_ROWS = (8, 5, 4, 1)
# csrc/resident/matrix_products.cuh: channels of a step, and what a unit may cover
_DEPTHS = {"tf32": 8, "bf16": 16}
_TILE_ROWS, _TILE_COLUMNS = 16, 8
_MOST_ROW_TILES = 4
_PLACE_TILES = {1: 4, 2: 4, 4: 2}
# As _FEWEST_QUADS, in steps.
_FEWEST_STEPS = 4


@dataclass(frozen=True)
class Array:
    """One array of a block's shared memory. elements: all samples' together; home: layer l, or 0."""

    name: str
    home: int
    first: int
    elements: int


@dataclass(frozen=True)
class Placement:
    """A network in shared memory.

    Attributes:
        arrays: what lies where, in elements. elements: in all. scalar_bytes: of one.
        operands: what products read.
        samples: of a block. group: of a lane in linear products. blocks, threads: of the launch.
        blocks_per_sm, waves: how the blocks fit the GPU.
        gram: layer 1's beliefs are out of the loop.
        program: what the kernel reads.
    """

    arrays: tuple[Array, ...]
    elements: int
    scalar_bytes: int
    operands: Operands
    samples: int
    group: int
    blocks: int
    threads: int
    blocks_per_sm: int
    waves: int
    gram: bool
    program: bytes = field(repr=False)

    @property
    def bytes(self) -> int:
        return self.elements * self.scalar_bytes


@dataclass(frozen=True)
class Chip:
    """What a placement has to fit. block_bytes, sm_bytes: shared memory of a block, with the opt-in, and of all."""

    sm_count: int
    block_bytes: int
    sm_bytes: int


def _padded(size: int, multiple: int = _QUAD) -> int:
    return -(-size // multiple) * multiple


def _odd_quads(size: int) -> int:
    """A row length whose quads are odd in number: lanes that read one row each hit different banks."""
    quads = -(-size // _QUAD)
    return _QUAD * (quads + 1 - quads % 2)


class _Memory:
    """Places arrays one after another. multiple: a sample's part of each is padded to, with zeros."""

    def __init__(self, samples: int, multiple: int) -> None:
        self.samples, self.multiple, self.arrays, self.elements = samples, multiple, [], 0
        # of a lane in linear products, of a thread in pointwise work: all samples that are tried are multiples of it
        self.group = min(samples, _MOST_GROUP)

    def padded(self, a_sample: int) -> int:
        return _padded(a_sample, self.multiple)

    def add(self, name: str, home: int, a_sample: int = 0, *, once: int = 0) -> int:
        """Place an array of so many elements for every sample, or once a block; returns where it begins."""
        first, elements = self.elements, self.padded(a_sample) * self.samples + _padded(once)
        self.arrays.append(Array(name, home, first, elements))
        self.elements += elements
        return first


@dataclass(frozen=True)
class _Shape:
    """One layer above the first: its form and its sizes."""

    form: LinearForm | PointwiseForm
    convolution: specs.Conv2d | None
    below: tuple[int, int, int]  # (channels, height, width) of what it reads; features have one pixel
    inner: tuple[int, int, int]  # of what its tail reads
    out: tuple[int, int, int]  # of its output, pooled
    operand: str  # of its product: a word of Operands

    @property
    def linear(self) -> bool:
        return isinstance(self.form, LinearForm)


def _as_map(shape: tuple[int, ...], map: tuple[int, int, int] | None) -> tuple[int, int, int]:
    return map if map is not None else (math.prod(shape[1:]), 1, 1)


def _shapes(network: specs.Network, shapes: tuple, operands: Operands) -> list[_Shape | None] | str:
    """Per layer from index 2 on, or why the kernel cannot run one."""
    around = maps(network, shapes)
    found: list[_Shape | None] = [None, None]
    for layer in network.layers[1:]:
        l, inner = layer.index, shapes[layer.index - 1]
        form = layer_form(layer, inner, around[l - 1])
        if isinstance(form, TorchForm):
            return f"{layer.label}: {form.reason}"
        below, out = _as_map(inner[0], around[l - 1]), _as_map(inner[-1], around[l])
        convolution, operand = None, "ieee"
        if isinstance(form, LinearForm):
            below, within = (form.in_features, 1, 1), (form.out_features, 1, 1)
            out, operand = within, operands.linear
        else:
            height, width, channels = form.inner
            within = (channels, height, width)
            if form.convolution is not None:
                convolution, operand = pool_first(layer.ops)[form.convolution], operands.convolution
                if convolution.groups != 1 or convolution.dilation != (1, 1):
                    return f"{layer.label}: its convolution is grouped or dilated"
        if l == network.depth and (len(inner[-1]) != 2 or getattr(form, "pool", None) is not None):
            return f"{layer.label}: the output layer pools, or gives more than one row of classes a sample"
        found.append(_Shape(form, convolution, below, within, out, operand))
    return found


# products


def _linear_splits(out_tiles: int, quads: int, sharing: int) -> tuple[int, int]:
    """(parts of the sum, channels in each) so that a warp has about one unit, whatever the batch."""
    splits = min(max(_WARPS // out_tiles, 1), max(quads // (sharing * _FEWEST_QUADS), 1))
    split = -(-quads // splits)
    return -(-quads // split), split * _QUAD


def _share(product: p.Product, groups: int, tiles: int, splits: int, split: int) -> None:
    """Units of a product: so many groups of samples or places, tiles of rows, and parts of the sum."""
    product.by_tiles, product.by_splits, product.split = p.divisor(tiles), p.divisor(splits), split
    product.units = groups * tiles * splits


def _log2(size: int) -> int:
    """Rounded up."""
    return max(size - 1, 0).bit_length()


def _linear(product: p.Product, out: int, channels: int, weights: int, input: p.Place) -> None:
    product.kind, product.out, product.height, product.width = p.LINEAR, out, 1, 1
    product.channels, product.taps_y, product.taps_x = channels, 1, 1
    product.weights, product.input = weights, input


def _linear_predict(
    memory: _Memory, product: p.Product, operand: str, out: int, channels: int, weights, stride, input
) -> None:
    _linear(product, out, channels, weights, input)
    product.weight_channel = stride
    if operand != "ieee":
        _row_tiles(memory, product, operand)
        return
    product.lanes_log2 = min(_log2(-(-out // _QUAD)), _log2(_WARP))
    tiles = -(-out // (product.lanes * _QUAD))
    splits = _linear_splits(tiles, -(-channels // _QUAD), _WARP // product.lanes)
    _share(product, memory.samples // memory.group, tiles, *splits)


def _linear_feedback(
    memory: _Memory, product: p.Product, operand: str, out: int, channels: int, weights, stride, input
) -> None:
    _linear(product, out, channels, weights, input)
    product.weight_row = stride
    if operand != "ieee":
        _row_tiles(memory, product, operand)
        return
    tiles = -(-out // (_WARP * _FEEDBACK_ROWS_A_LANE))
    splits = _linear_splits(tiles, -(-channels // _QUAD), 1)
    _share(product, memory.samples // memory.group, tiles, *splits)


def _row_tiles(memory: _Memory, product: p.Product, operand: str) -> None:
    """A linear product on matrix units. Tiles of a unit share what they read of the samples."""
    depth, tiles = _DEPTHS[operand], -(-product.out // _TILE_ROWS)
    product.channels = _padded(product.channels, depth)
    steps = product.channels // depth
    most_splits = max(steps // _FEWEST_STEPS, 1)
    product.tiles = max(min(-(-tiles * most_splits // _WARPS), tiles, _MOST_ROW_TILES), 1)
    units = -(-tiles // product.tiles)
    split = -(-steps // min(max(_WARPS // units, 1), most_splits))
    _share(product, -(-memory.samples // _TILE_COLUMNS), units, -(-steps // split), split * depth)


def _pixels(product: p.Product, out, channels, taps, weights, row, channel, tap_y, tap_x, place, steps):
    """out: (rows of A, height, width); taps: (y, x); place: of the input; steps: in it with a tap."""
    product.kind = p.PIXELS
    product.out, product.height, product.width = out
    product.by_area, product.by_width = p.divisor(out[1] * out[2]), p.divisor(out[2])
    product.channels, product.taps_y, product.taps_x = channels, *taps
    product.weights, product.weight_row, product.weight_channel = weights, row, channel
    product.weight_tap_y, product.weight_tap_x = tap_y, tap_x
    product.input, (product.input_tap_y, product.input_tap_x) = place, steps


def _share_pixels(memory: _Memory, product: p.Product, l: int, operand: str) -> None:
    """Units, and parts of the sum where one sample has too few for the warps."""
    area = product.height * product.width
    if operand == "ieee":
        rows = next(rows for rows in _PIXEL_ROWS if rows <= product.out)
        if product.out % rows and product.out in (6, 7):
            rows = 8
        product.rows_a_thread = rows
        tiles, places = -(-product.out // rows), _WARP * _PIXELS_A_LANE
        terms, depth, fewest = product.channels, 1, 1
    else:
        columns = -(-product.out // _TILE_COLUMNS)
        product.tiles = min(1 << _log2(columns), max(_PLACE_TILES))
        tiles, places = -(-columns // product.tiles), _PLACE_TILES[product.tiles] * _TILE_ROWS
        depth, fewest = _DEPTHS[operand], _FEWEST_STEPS
        terms = _padded(product.channels * product.taps_y * product.taps_x, depth)
        product.terms, product.term_count = memory.add("terms", l, once=2 * terms), terms
    steps = terms // depth
    splits = min(max(steps // fewest, 1), max(_WARPS // 2 // (-(-area // places) * tiles), 1))
    split = -(-steps // splits)
    groups = -(-memory.samples * area // places)
    _share(product, groups, tiles, -(-steps // split), split * depth)


def _copy(memory: _Memory, product: p.Product, shape: tuple[int, int, int], place: p.Place) -> None:
    product.kind, product.input = p.COPY, place
    _share(product, memory.samples, 1, 1, 0)
    product.out, product.height, product.width = shape


# arrays


def _packed(memory: _Memory, first: int, shape: tuple[int, int, int]) -> p.Place:
    _, height, width = shape
    return p.Place(first, memory.padded(math.prod(shape)), height * width, width, 1)


def _place_beliefs(
    memory: _Memory, l: int, shape: tuple[int, int, int], above: _Shape
) -> tuple[p.Place, int, int]:
    """d_l with the halo that the convolution above reads: its place, the array's start and its row length."""
    channels, height, width = shape
    top, left = (0, 0) if above.convolution is None else above.convolution.padding
    rows, columns = height + 2 * top, width + 2 * left
    a_sample = channels * rows * columns
    first = memory.add("d", l, a_sample)
    place = p.Place(first + top * columns + left, memory.padded(a_sample), rows * columns, columns, 1)
    return place, first, columns


def _place_linear_weights(
    memory: _Memory, layer: p.Layer, l: int, operand: str, inputs: int, out: int
) -> None:
    """[input][padded output]. On matrix units steps and tiles run past the end of a row, and of the last one."""
    layer.weight_inputs = inputs
    if operand == "bf16":
        # rows of an odd number of 16 bytes: eight of them lie in different banks
        layer.weight_stride = 8 * (-(-out // 8) | 1)
        once = _padded(inputs, _DEPTHS[operand]) * layer.weight_stride // 2 + _DEPTHS[operand] // 2
    else:
        layer.weight_stride = _odd_quads(out)
        depth = _DEPTHS.get(operand, _QUAD)
        once = _padded(inputs, depth) * layer.weight_stride + (_TILE_ROWS if operand in _DEPTHS else 0)
    layer.weights = memory.add("weights", l, once=once)


def _place_linear(memory: _Memory, layer: p.Layer, l: int, shape: _Shape, d_first: int) -> None:
    inputs, out = shape.form.in_features, shape.form.out_features
    _place_linear_weights(memory, layer, l, shape.operand, inputs, out)
    weights = layer.weights, layer.weight_stride
    _linear_predict(
        memory, layer.predict, shape.operand, out, inputs, *weights, _packed(memory, d_first, shape.below)
    )
    layer.delta = _packed(memory, memory.add("delta", l, out), shape.inner)
    _linear_feedback(memory, layer.feedback, shape.operand, inputs, out, *weights, layer.delta)


def _dilated(size: int, out: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """(elements before delta's first one, elements in all) along one axis, as the transposed convolution reads it."""
    before = max(kernel - 1 - padding, 0)
    last = max((out - 1) * stride, size - 1 + padding)
    return before, before + last + 1


def _place_convolution(
    memory: _Memory, layer: p.Layer, l: int, shape: _Shape, d_first: int, d_columns: int
) -> None:
    """Products and errors of a convolution outside the Gram form."""
    convolution, (channels, height, width), (out, out_height, out_width) = (
        shape.convolution,
        shape.below,
        shape.inner,
    )
    (ky, kx), (sy, sx), (py, px) = convolution.kernel, convolution.stride, convolution.padding
    stride, taps = _padded(out), ky * kx
    layer.weight_inputs, layer.weight_stride = channels * taps, stride
    layer.weights = memory.add("weights", l, once=channels * taps * stride)
    d_area = (height + 2 * py) * d_columns
    below = p.Place(d_first, memory.padded(channels * d_area), d_area, sy * d_columns, sx)
    _pixels(
        layer.predict, shape.inner, channels, (ky, kx), layer.weights, 1, taps * stride, kx * stride, stride,
        below, (d_columns, 1),
    )  # fmt: skip
    top, rows = _dilated(height, out_height, ky, sy, py)
    left, columns = _dilated(width, out_width, kx, sx, px)
    first = memory.add("delta", l, out * rows * columns)
    a_sample = memory.padded(out * rows * columns)
    layer.delta = p.Place(first + top * columns + left, a_sample, rows * columns, sy * columns, sx)
    errors = p.Place(first + (py + top) * columns + px + left, a_sample, rows * columns, columns, 1)
    _pixels(
        layer.feedback, shape.below, out, (ky, kx), layer.weights, taps * stride, 1, kx * stride, stride,
        errors, (-columns, -1),
    )  # fmt: skip
    for product in (layer.predict, layer.feedback):
        _share_pixels(memory, product, l, shape.operand)


def _place_gram(memory: _Memory, layer: p.Layer, l: int, shape: _Shape) -> None:
    """s = -S G; S takes the place of delta, -G that of the weights."""
    out, height, width = shape.inner
    layer.gram = 1
    if shape.linear:
        _place_linear_weights(memory, layer, l, shape.operand, out, out)
        layer.delta = _packed(memory, memory.add("sum", l, out), shape.inner)
        weights = layer.weights, layer.weight_stride
        _linear_predict(memory, layer.predict, shape.operand, out, out, *weights, layer.delta)
        return
    ky, kx = (2 * size - 1 for size in shape.convolution.kernel)
    stride, taps = _padded(out), ky * kx
    layer.weight_inputs, layer.weight_stride = out * taps, stride
    layer.weights = memory.add("weights", l, once=out * taps * stride)
    rows, columns = height + ky - 1, width + kx - 1
    first = memory.add("sum", l, out * rows * columns)
    a_sample = memory.padded(out * rows * columns)
    layer.delta = p.Place(first + ky // 2 * columns + kx // 2, a_sample, rows * columns, columns, 1)
    _pixels(
        layer.predict, shape.inner, out, (ky, kx), layer.weights, 1, taps * stride, kx * stride, stride,
        p.Place(first, a_sample, rows * columns, columns, 1), (columns, 1),
    )  # fmt: skip
    _share_pixels(memory, layer.predict, l, shape.operand)


def _place_layer(
    memory: _Memory, layer: p.Layer, l: int, shape: _Shape, d_first: int, d_columns: int
) -> None:
    if shape.linear:
        _place_linear(memory, layer, l, shape, d_first)
    elif shape.convolution is not None:
        _place_convolution(memory, layer, l, shape, d_first, d_columns)
    else:
        size = math.prod(shape.inner)
        _copy(memory, layer.predict, shape.inner, _packed(memory, d_first, shape.inner))
        layer.delta = _packed(memory, memory.add("delta", l, size), shape.inner)
        _copy(memory, layer.feedback, shape.below, layer.delta)


def _describe_output(memory: _Memory, layer: p.Layer, out: tuple[int, int, int]) -> None:
    layer.channels, height, width = out
    layer.size = math.prod(out)
    layer.by_area, layer.by_width = p.divisor(height * width), p.divisor(width)
    items = _padded(layer.size, _WARP)
    layer.items, layer.by_items = items * (memory.samples // memory.group), p.divisor(items)


def _describe_tail(memory: _Memory, layer: p.Layer, shape: _Shape) -> None:
    channels, layer.height, layer.width = shape.inner
    pool = None if shape.linear else shape.form.pool
    layer.window_y, layer.window_x = (1, 1) if pool is None else pool.kernel
    layer.by_window_x = p.divisor(layer.window_x)
    out = channels, layer.height // layer.window_y, layer.width // layer.window_x
    _describe_output(memory, layer, out)
    if shape.linear:
        layer.after, layer.after_negative_slope = p.activation_code(shape.form.activation)
        return
    form = shape.form
    if pool is None:
        layer.after, layer.after_negative_slope = p.activation_code(form.before)
        return
    layer.pool = p.MAX_POOL if isinstance(pool, specs.MaxPool2d) else p.AVG_POOL
    layer.before, layer.before_negative_slope = p.activation_code(form.before)
    layer.after, layer.after_negative_slope = p.activation_code(form.after)


def _place_scratch(memory: _Memory, what: p.Program) -> None:
    """The stages take turns with the scratch; inside one, every product has its own part."""
    ends = []
    first = memory.elements
    for stage in ("predict", "feedback"):
        end = first
        for l in range(2, what.depth + 1):
            product = getattr(what.layers[l - 1], stage)
            if product.kind == p.NO_PRODUCT:
                continue
            size = product.out * product.height * product.width
            product.scratch, product.scratch_sample = end, size
            product.scratch_split = size * memory.samples
            end += product.scratch_split * product.splits
        ends.append(end)
    # also a number for every warp (output.cuh)
    memory.add("scratch", 0, once=max(max(ends) - first, _WARPS))


def _place_velocity(memory: _Memory, layer: p.Layer, l: int, shape: tuple[int, int, int]) -> None:
    size = math.prod(shape)
    layer.velocity, layer.velocity_sample = memory.add("velocity", l, size), memory.padded(size)


def _program(
    network: specs.Network,
    shapes: tuple,
    layers: list[_Shape | None],
    gram: bool,
    loss: str,
    momentum: bool,
    samples: int,
) -> tuple[p.Program, _Memory]:
    operands = {shape.operand for shape in layers[2:]}
    memory = _Memory(samples, max(_DEPTHS.get(operand, _QUAD) for operand in operands))
    what = p.Program()
    what.depth, what.samples, what.group = network.depth, samples, memory.group
    what.loss, what.first_in_loop = p.LOSSES[loss], 2 if gram else 1
    _describe_output(memory, what.layers[0], layers[2].below)
    d_first = d_columns = 0
    if not gram:
        what.layers[0].d, d_first, d_columns = _place_beliefs(memory, 1, layers[2].below, layers[2])
    if momentum:
        _place_velocity(memory, what.layers[0], 1, layers[2].inner if gram else layers[2].below)
    for l in range(2, network.depth + 1):
        layer, shape = what.layers[l - 1], layers[l]
        layer.operand = p.OPERANDS[shape.operand]
        if gram and l == 2:
            _place_gram(memory, layer, l, shape)
        else:
            _place_layer(memory, layer, l, shape, d_first, d_columns)
        _describe_tail(memory, layer, shape)
        size = math.prod(shape.inner)
        layer.uhat, layer.uhat_sample = memory.add("uhat", l, size), memory.padded(size)
        if l < network.depth:
            layer.d, d_first, d_columns = _place_beliefs(memory, l, shape.out, layers[l + 1])
            if momentum:
                _place_velocity(memory, layer, l, shape.out)
    what.classes = layers[network.depth].out[0]
    what.classes_stride = memory.padded(what.classes)
    what.vhat = memory.add("vhat", network.depth, what.classes)
    what.dense = memory.add("target", network.depth, what.classes)
    what.mass = memory.add("mass", network.depth, once=samples)
    _place_scratch(memory, what)
    what.elements = memory.elements
    return what, memory


@functools.lru_cache(maxsize=256)
def place(
    network: specs.Network,
    shapes: tuple,
    gram: bool,
    loss: str,
    operands: Operands,
    scalar_bytes: int,
    chip: Chip,
    momentum: bool = False,
) -> Placement | str:
    """Place a network of at least two layers, or say why it cannot be.

    Args:
        shapes: as :meth:`pcfast.model.spec.Network.shapes` gives them, none hidden.
        gram: layer 1's beliefs leave the loop (docs/method.md fact 7).
        loss: "cross_entropy" or "mse".
        operands: what products read; matrix units need a state of float32.
        scalar_bytes: of a number of the state.
        momentum: beliefs move with it.
    """
    if network.depth > p.MOST_LAYERS:
        return f"it has {network.depth} layers; the kernel's argument has room for {p.MOST_LAYERS}"
    layers = _shapes(network, shapes, operands)
    if isinstance(layers, str):
        return layers
    batch, chosen = shapes[0][0][0], None
    room = min(chip.block_bytes, _MOST_ELEMENTS * scalar_bytes)
    for samples in SAMPLES:
        what, memory = _program(network, shapes, layers, gram, loss, momentum, samples)
        needed = memory.elements * scalar_bytes
        if needed > room:
            if chosen is None:
                return (
                    f"one sample and the loop's weights take {needed:,} bytes of shared memory, "
                    f"a block has {room:,}"
                )
            break
        threads = _WARPS * _WARP
        by_registers = _SM_REGISTERS // (_THREAD_REGISTERS * threads)
        per_sm = max(min(chip.sm_bytes // (needed + _RESERVED_BYTES), by_registers), 1)
        blocks = -(-batch // samples)
        waves = -(-blocks // (chip.sm_count * per_sm))
        if chosen is None or waves < chosen.waves:
            chosen = Placement(
                tuple(memory.arrays), memory.elements, scalar_bytes, operands, samples, what.group, blocks, threads,
                per_sm, waves, gram, bytes(what),
            )  # fmt: skip
        if waves == 1:
            break
    return chosen
