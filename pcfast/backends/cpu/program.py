"""A planned network as the CPU kernels read it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...deviation.chain import pool_first
from ...kernels.codes import AVG_POOL, MAX_POOL, NO_POOL, activation_code
from ...model import spec as specs
from ...problem.plan import Plan
from ...support import cpu_module
from ..kernel_forms import LinearForm, TorchForm, elementwise_form, flattens, layer_form, maps

#: Kind of csrc/cpu/program.h.
NOTHING, LINEAR, CONVOLUTION = range(3)

Map = tuple[int, int, int]
Ops = tuple[specs.Op, ...]


class Pool(NamedTuple):
    """Windows of rows and columns.

    Attributes:
        divisor: of an average; 0: its elements. counts_padding: those in the padding, too.
    """

    kind: int = NO_POOL
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    divisor: int = 0
    counts_padding: bool = True

    @classmethod
    def of(cls, op: specs.MaxPool2d | specs.AvgPool2d | None) -> Pool:
        if op is None:
            return cls()
        if isinstance(op, specs.MaxPool2d):
            return cls(MAX_POOL, op.kernel, op.stride, op.padding)
        return cls(AVG_POOL, op.kernel, op.stride, op.padding, op.divisor_override or 0, op.count_include_pad)


class Pointwise(NamedTuple):
    """What needs no product: an activation (a code and a negative slope), a pool or nothing, an activation."""

    from_: Map
    to: Map
    before: tuple[int, float]
    pool: Pool
    after: tuple[int, float]

    @classmethod
    def of(cls, from_: Map, to: Map, before=None, pool=None, after=None) -> Pointwise:
        """Of activations and a pool as pcfast/model describes them."""
        return cls(from_, to, activation_code(before), Pool.of(pool), activation_code(after))

    @property
    def acts(self) -> bool:
        return self != Pointwise.of(self.from_, self.to)


@dataclass(frozen=True)
class Layer:
    """A layer as csrc/cpu/module.cpp takes it. Maps are (channels, height, width); features have one pixel.

    Attributes:
        head: path of the module whose product it begins with; "" where there is none.
        kind: of the product.
        entry, tail: what stands before the product and behind it.
        kernel, stride, padding: of a convolution.
        skip: the layer adds what it reads. scale: of the product with its bias.
    """

    head: str
    kind: int
    entry: Pointwise
    tail: Pointwise
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    skip: bool = False
    scale: float = 1.0

    @property
    def weights(self) -> int:
        """How many its product has."""
        if self.kind == NOTHING:
            return 0
        below = self.entry.to
        terms = math.prod(below) if self.kind == LINEAR else below[0] * math.prod(self.kernel)
        return self.tail.from_[0] * terms

    @property
    def product_alone(self) -> bool:
        """Nothing stands before the product or around it."""
        return not self.entry.acts and not self.skip and self.scale == 1

    @property
    def arguments(self) -> tuple:
        return (
            self.kind, tuple(self.entry), self.kernel, self.stride, self.padding, tuple(self.tail), self.skip,
            self.scale,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def layers_of(network: specs.Network, shapes: tuple) -> tuple[Layer, ...] | str:
    """The layers, or why the kernels cannot run one of them. shapes: as Plan.shapes, none hidden."""
    around = maps(network, shapes)
    result = []
    for layer in network.layers:
        inner = shapes[layer.index - 1]
        below, out = (
            map or (math.prod(shape[1:]), 1, 1)
            for map, shape in ((around[layer.index - 1], inner[0]), (around[layer.index], inner[-1]))
        )
        described = _layer(layer, inner, around[layer.index - 1], below, out)
        if isinstance(described, str):
            return f"{layer.label}: {described}"
        if layer.index == network.depth and (len(inner[-1]) != 2 or described.tail.pool.kind != NO_POOL):
            return f"{layer.label}: the output layer pools, or gives more than one row of classes a sample"
        result.append(described)
    return tuple(result)


def _layer(layer: specs.LayerSpec, inner: tuple, map: Map | None, below: Map, out: Map) -> Layer | str:
    ops, skip = _branch(layer.ops)
    before, ops, scale = _around_product(ops)
    entry = elementwise_form(before, inner[0])
    if isinstance(entry, str):
        return f"before its product, {entry}"
    shape, entered = inner[0], below
    for op in before:
        shape = op.output_shape(shape)
        entered = tuple(shape[1:]) if len(shape) == 4 else entered
    entry = Pointwise.of(below, entered, *entry)
    form = layer_form(replace(layer, ops=ops), (shape,), map, every_pool=True)
    if isinstance(form, TorchForm):
        return form.reason
    around = {"skip": skip, "scale": scale}
    if isinstance(form, LinearForm):
        head = next(op for op in ops if isinstance(op, specs.Linear))
        out = (form.out_features, 1, 1)
        return Layer(head.path, LINEAR, entry, Pointwise.of(out, out, form.activation), **around)
    if skip and (form.convolution is None or form.pool is not None or entry.from_ != entry.to):
        return "its skip leads around no linear layer or convolution, or around a pool"
    height, width, channels = form.inner
    within = (channels, height, width)
    tail = Pointwise.of(within, within if form.pool is None else out, form.before, form.pool, form.after)
    if form.convolution is None:
        return Layer("", NOTHING, entry, tail)
    head = pool_first(ops)[form.convolution]
    if head.groups != 1 or head.dilation != (1, 1):
        return "its convolution is grouped or dilated"
    return Layer(head.path, CONVOLUTION, entry, tail, head.kernel, head.stride, head.padding, **around)


def _branch(ops: Ops) -> tuple[Ops, bool]:
    """The operations under the skip of a layer that is one residual block, and whether it is one."""
    blocks = [op for op in ops if not flattens(op)]
    if len(blocks) != 1 or not isinstance(blocks[0], specs.Residual):
        return ops, False
    at = ops.index(blocks[0])
    return (*ops[:at], *blocks[0].ops, *ops[at + 1 :]), True


def _around_product(ops: Ops) -> tuple[Ops, Ops, float]:
    """What stands before a product; the operations from there on without a factor directly behind it; the factor."""
    head = next((i for i, op in enumerate(ops) if isinstance(op, specs.Linear | specs.Conv2d)), None)
    if head is None:
        return (), ops, 1.0
    behind, scale = ops[head + 1 :], 1.0
    if behind and isinstance(behind[0], specs.Scale):
        scale, behind = behind[0].factor, behind[1:]
    return ops[:head], (ops[head], *behind), scale


@functools.lru_cache(maxsize=256)
def program_of(plan: Plan):
    """The native program of a plan that the kernels run."""
    program = cpu_module.load().Program()
    for layer in layers_of(plan.network, plan.shapes):
        program.add(*layer.arguments)
    return program
