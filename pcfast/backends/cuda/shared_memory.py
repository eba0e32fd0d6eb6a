"""Lays a network's arrays out in a block's shared memory, from shapes alone, or says why it does not fit.

How each product's work is shared out: tiling.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from ...kernels.codes import LOSSES, activation_code
from ...model import spec as specs
from ...precision import Operands
from . import geometry as g
from . import kernel_params as p
from .layer_shapes import LayerShape, layer_shapes
from .tiling import WARPS, padded, share_conv, share_copy, share_linear, step

#: Samples per thread block that are tried, fewest first; all are multiples of the samples per lane (_Memory.group).
SAMPLES = (1, 2, 3, 4, 8, 12, 16)
# Shared memory that the driver keeps for every block.
_RESERVED_BYTES = 1024
_SM_REGISTERS = 65536
_THREAD_REGISTERS = 128  # tests/native/compile_limits.json


@dataclass(frozen=True)
class Array:
    """One array of a block's shared memory.

    Attributes:
        home: the layer l that it belongs to; 0 for all layers.
        first: its first element.
        elements: the size, of all samples together.
    """

    name: str
    home: int
    first: int
    elements: int


@dataclass(frozen=True)
class Placement:
    """A network laid out in shared memory.

    Attributes:
        arrays: the arrays, in the order in which they lie.
        elements: the size of all of them.
        scalar_bytes: the bytes of one element.
        operands: what products read.
        samples: samples per thread block.
        group: samples per lane of a linear product.
        blocks, threads: thread blocks of the launch, and threads per block.
        blocks_per_sm, waves: how the blocks fit the GPU.
        gram: layer 1's beliefs are out of the loop: Gram form (docs/method.md fact 7).
        program: what the kernel reads (:class:`~pcfast.backends.cuda.kernel_params.Program`).
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
class Room:
    """What a placement has to fit.

    Attributes:
        sm_count: SMs.
        block_bytes: shared memory per block, with the opt-in.
        sm_bytes: shared memory per SM.
    """

    sm_count: int
    block_bytes: int
    sm_bytes: int


def _odd_vectors(size: int) -> int:
    """Returns a row length of an odd number of vectors: lanes that read one row each hit different banks."""
    vectors = -(-size // g.VEC_SIZE)
    return g.VEC_SIZE * (vectors + 1 - vectors % 2)


class _Memory:
    """Lays arrays out one after another; a sample's part of each is padded with zeros to ``multiple``."""

    def __init__(self, samples: int, multiple: int) -> None:
        self.samples, self.multiple, self.arrays, self.elements = samples, multiple, [], 0
        # samples per lane of a linear product, and per thread of pointwise work
        self.group = min(samples, g.MAX_GROUP)

    def padded(self, per_sample: int) -> int:
        return padded(per_sample, self.multiple)

    def add(self, name: str, home: int, per_sample: int = 0, *, per_block: int = 0) -> int:
        """Adds an array of so many elements per sample, or once per block; returns its first element."""
        first, elements = self.elements, self.padded(per_sample) * self.samples + padded(per_block)
        self.arrays.append(Array(name, home, first, elements))
        self.elements += elements
        return first


# products


def _linear(
    memory: _Memory,
    product: p.Product,
    operand: str,
    feedback: bool,
    out: int,
    channels: int,
    weights: int,
    stride: int,
    input: p.StridedView,
) -> None:
    product.kind, product.out, product.height, product.width = g.LINEAR, out, 1, 1
    product.channels, product.taps_y, product.taps_x = channels, 1, 1
    product.weights, product.input = weights, input
    # prediction reads the weights down their columns, feedback along their rows
    if feedback:
        product.weight_row = stride
    else:
        product.weight_channel = stride
    share_linear(product, operand, feedback, memory.samples, memory.group)


def _conv(product: p.Product, out, channels, taps, weights, row, channel, tap_y, tap_x, input, steps):
    """Describes a convolution.

    Args:
        out: (rows of A, height, width).
        taps: (y, x).
        row, channel, tap_y, tap_x: strides of the weights.
        input: the view that it reads.
        steps: (y, x), strides of the input with a tap.
    """
    product.kind = g.CONV
    product.out, product.height, product.width = out
    product.by_area, product.by_width = p.divisor(out[1] * out[2]), p.divisor(out[2])
    product.channels, product.taps_y, product.taps_x = channels, *taps
    product.weights, product.weight_row, product.weight_channel = weights, row, channel
    product.weight_tap_y, product.weight_tap_x = tap_y, tap_x
    product.input, (product.input_tap_y, product.input_tap_x) = input, steps


def _share_conv(memory: _Memory, product: p.Product, l: int, operand: str) -> None:
    """Shares out a convolution and, on Tensor Cores, adds the table of its terms."""
    share_conv(product, operand, memory.samples)
    if operand != "ieee":
        product.terms = memory.add("terms", l, per_block=2 * product.term_count)


def _copy(memory: _Memory, product: p.Product, shape: tuple[int, int, int], input: p.StridedView) -> None:
    product.kind, product.input = g.COPY, input
    product.out, product.height, product.width = shape
    share_copy(product, memory.samples)


# arrays


def _packed(memory: _Memory, first: int, shape: tuple[int, int, int]) -> p.StridedView:
    _, height, width = shape
    return p.StridedView(first, memory.padded(math.prod(shape)), height * width, width, 1)


def _place_beliefs(
    memory: _Memory, l: int, shape: tuple[int, int, int], above: LayerShape
) -> tuple[p.StridedView, int, int]:
    """Adds d_l with the halo that the convolution above reads; returns its view, first element and row length."""
    channels, height, width = shape
    top, left = (0, 0) if above.convolution is None else above.convolution.padding
    rows, columns = height + 2 * top, width + 2 * left
    per_sample = channels * rows * columns
    first = memory.add("d", l, per_sample)
    view = p.StridedView(first + top * columns + left, memory.padded(per_sample), rows * columns, columns, 1)
    return view, first, columns


def _place_linear_weights(
    memory: _Memory, layer: p.Layer, l: int, operand: str, inputs: int, out: int
) -> None:
    """Adds the weights, [input][padded output].

    On Tensor Cores steps and tiles run past the end of a row, and of the last one.
    """
    layer.weight_inputs = inputs
    if operand == "bf16":
        # rows of an odd number of 16 bytes: eight of them lie in different banks
        layer.weight_stride = 8 * (-(-out // 8) | 1)
        per_block = padded(inputs, g.BF16_MMA_K) * layer.weight_stride // 2 + g.BF16_MMA_K // 2
    else:
        layer.weight_stride = _odd_vectors(out)
        per_block = padded(inputs, step(operand)) * layer.weight_stride + (
            g.MMA_M if operand == "tf32" else 0
        )
    layer.weights = memory.add("weights", l, per_block=per_block)


def _place_linear(memory: _Memory, layer: p.Layer, l: int, shape: LayerShape, d_first: int) -> None:
    inputs, out = shape.form.in_features, shape.form.out_features
    _place_linear_weights(memory, layer, l, shape.operand, inputs, out)
    weights = layer.weights, layer.weight_stride
    below = _packed(memory, d_first, shape.below)
    _linear(memory, layer.predict, shape.operand, False, out, inputs, *weights, below)
    layer.delta = _packed(memory, memory.add("delta", l, out), shape.inner)
    _linear(memory, layer.feedback, shape.operand, True, inputs, out, *weights, layer.delta)


def _dilated(size: int, out: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Returns (elements before delta's first one, elements in all) along an axis that the feedback reads."""
    before = max(kernel - 1 - padding, 0)
    last = max((out - 1) * stride, size - 1 + padding)
    return before, before + last + 1


def _place_convolution(
    memory: _Memory, layer: p.Layer, l: int, shape: LayerShape, d_first: int, d_columns: int
) -> None:
    """Describes products and errors of a convolution outside the Gram form (fact 7)."""
    convolution, (channels, height, width), (out, out_height, out_width) = (
        shape.convolution,
        shape.below,
        shape.inner,
    )
    (ky, kx), (sy, sx), (py, px) = convolution.kernel, convolution.stride, convolution.padding
    stride, taps = padded(out), ky * kx
    layer.weight_inputs, layer.weight_stride = channels * taps, stride
    layer.weights = memory.add("weights", l, per_block=channels * taps * stride)
    d_area = (height + 2 * py) * d_columns
    below = p.StridedView(d_first, memory.padded(channels * d_area), d_area, sy * d_columns, sx)
    _conv(
        layer.predict, shape.inner, channels, (ky, kx), layer.weights, 1, taps * stride, kx * stride, stride,
        below, (d_columns, 1),
    )  # fmt: skip
    top, rows = _dilated(height, out_height, ky, sy, py)
    left, columns = _dilated(width, out_width, kx, sx, px)
    first = memory.add("delta", l, out * rows * columns)
    per_sample = memory.padded(out * rows * columns)
    layer.delta = p.StridedView(first + top * columns + left, per_sample, rows * columns, sy * columns, sx)
    errors = p.StridedView(first + (py + top) * columns + px + left, per_sample, rows * columns, columns, 1)
    _conv(
        layer.feedback, shape.below, out, (ky, kx), layer.weights, taps * stride, 1, kx * stride, stride,
        errors, (-columns, -1),
    )  # fmt: skip
    for product in (layer.predict, layer.feedback):
        _share_conv(memory, product, l, shape.operand)


def _place_gram(memory: _Memory, layer: p.Layer, l: int, shape: LayerShape) -> None:
    """Describes layer 2 in Gram form (fact 7), s = -S G: S takes the place of delta, -G that of the weights."""
    out, height, width = shape.inner
    layer.gram = 1
    if shape.linear:
        _place_linear_weights(memory, layer, l, shape.operand, out, out)
        layer.delta = _packed(memory, memory.add("sum", l, out), shape.inner)
        weights = layer.weights, layer.weight_stride
        _linear(memory, layer.predict, shape.operand, False, out, out, *weights, layer.delta)
        return
    ky, kx = (2 * size - 1 for size in shape.convolution.kernel)
    stride, taps = padded(out), ky * kx
    layer.weight_inputs, layer.weight_stride = out * taps, stride
    layer.weights = memory.add("weights", l, per_block=out * taps * stride)
    rows, columns = height + ky - 1, width + kx - 1
    first = memory.add("sum", l, out * rows * columns)
    per_sample = memory.padded(out * rows * columns)
    layer.delta = p.StridedView(first + ky // 2 * columns + kx // 2, per_sample, rows * columns, columns, 1)
    _conv(
        layer.predict, shape.inner, out, (ky, kx), layer.weights, 1, taps * stride, kx * stride, stride,
        p.StridedView(first, per_sample, rows * columns, columns, 1), (columns, 1),
    )  # fmt: skip
    _share_conv(memory, layer.predict, l, shape.operand)


def _place_layer(
    memory: _Memory, layer: p.Layer, l: int, shape: LayerShape, d_first: int, d_columns: int
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
    items = padded(layer.size, g.WARP_SIZE)
    layer.items, layer.by_items = items * (memory.samples // memory.group), p.divisor(items)


def _describe_tail(memory: _Memory, layer: p.Layer, shape: LayerShape) -> None:
    channels, layer.height, layer.width = shape.inner
    pool = None if shape.linear else shape.form.pool
    layer.window_y, layer.window_x = (1, 1) if pool is None else pool.kernel
    layer.by_window_x = p.divisor(layer.window_x)
    out = channels, layer.height // layer.window_y, layer.width // layer.window_x
    _describe_output(memory, layer, out)
    if shape.linear:
        layer.after, layer.after_negative_slope = activation_code(shape.form.activation)
        return
    form = shape.form
    if pool is None:
        layer.after, layer.after_negative_slope = activation_code(form.before)
        return
    layer.pool = g.MAX_POOL if isinstance(pool, specs.MaxPool2d) else g.AVG_POOL
    layer.before, layer.before_negative_slope = activation_code(form.before)
    layer.after, layer.after_negative_slope = activation_code(form.after)


def _place_scratch(memory: _Memory, program: p.Program) -> None:
    """Adds the scratch, with which the stages take turns; inside one, every product has its own part."""
    ends = []
    first = memory.elements
    for stage in ("predict", "feedback"):
        end = first
        for l in range(2, program.depth + 1):
            product = getattr(program.layers[l - 1], stage)
            if product.kind == g.NO_PRODUCT:
                continue
            size = product.out * product.height * product.width
            product.scratch, product.scratch_sample = end, size
            product.scratch_split = size * memory.samples
            end += product.scratch_split * product.splits
        ends.append(end)
    # batch_weight (output.cuh) keeps a number per warp there
    memory.add("scratch", 0, per_block=max(max(ends) - first, WARPS))


def _place_velocity(memory: _Memory, layer: p.Layer, l: int, shape: tuple[int, int, int]) -> None:
    size = math.prod(shape)
    layer.velocity, layer.velocity_sample = memory.add("velocity", l, size), memory.padded(size)


def _program(
    network: specs.Network,
    shapes: tuple,
    layers: list[LayerShape | None],
    gram: bool,
    loss: str,
    momentum: bool,
    samples: int,
) -> tuple[p.Program, _Memory]:
    operands = {shape.operand for shape in layers[2:]}
    memory = _Memory(samples, max(map(step, operands)))
    program = p.Program()
    program.depth, program.samples, program.group = network.depth, samples, memory.group
    program.loss, program.first_in_loop = LOSSES[loss], 2 if gram else 1
    _describe_output(memory, program.layers[0], layers[2].below)
    d_first = d_columns = 0
    if not gram:
        program.layers[0].d, d_first, d_columns = _place_beliefs(memory, 1, layers[2].below, layers[2])
    if momentum:
        _place_velocity(memory, program.layers[0], 1, layers[2].inner if gram else layers[2].below)
    for l in range(2, network.depth + 1):
        layer, shape = program.layers[l - 1], layers[l]
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
    program.classes = layers[network.depth].out[0]
    program.classes_stride = memory.padded(program.classes)
    program.vhat = memory.add("vhat", network.depth, program.classes)
    program.target = memory.add("target", network.depth, program.classes)
    program.target_sum = memory.add("target_sum", network.depth, per_block=samples)
    _place_scratch(memory, program)
    program.elements = memory.elements
    return program, memory


@functools.lru_cache(maxsize=256)
def place(
    network: specs.Network,
    shapes: tuple,
    gram: bool,
    loss: str,
    operands: Operands,
    scalar_bytes: int,
    room: Room,
    momentum: bool = False,
) -> Placement | str:
    """Lays a network of at least two layers out, or says why it cannot be.

    Args:
        shapes: as :meth:`pcfast.model.spec.Network.shapes` gives them, none hidden.
        gram: layer 1's beliefs leave the loop: Gram form (docs/method.md fact 7).
        loss: "cross_entropy" or "mse".
        operands: what products read; Tensor Cores need a state of float32.
        scalar_bytes: the bytes of a number of the state.
        momentum: whether beliefs move with momentum.
    """
    if network.depth > g.MAX_LAYERS:
        return f"it has {network.depth} layers; the kernel's argument has room for {g.MAX_LAYERS}"
    layers = layer_shapes(network, shapes, operands)
    if isinstance(layers, str):
        return layers
    batch, chosen = shapes[0][0][0], None
    most = min(room.block_bytes, g.MAX_ELEMENTS * scalar_bytes)
    for samples in SAMPLES:
        program, memory = _program(network, shapes, layers, gram, loss, momentum, samples)
        needed = memory.elements * scalar_bytes
        if needed > most:
            if chosen is None:
                return (
                    f"one sample and the loop's weights take {needed:,} bytes of shared memory, "
                    f"a block has {most:,}"
                )
            break
        threads = g.MAX_THREADS
        by_registers = _SM_REGISTERS // (_THREAD_REGISTERS * threads)
        per_sm = max(min(room.sm_bytes // (needed + _RESERVED_BYTES), by_registers), 1)
        blocks = -(-batch // samples)
        waves = -(-blocks // (room.sm_count * per_sm))
        if chosen is None or waves < chosen.waves:
            chosen = Placement(
                tuple(memory.arrays), memory.elements, scalar_bytes, operands, samples, program.group, blocks,
                threads, per_sm, waves, gram, bytes(program),
            )  # fmt: skip
        if waves == 1:
            break
    return chosen
