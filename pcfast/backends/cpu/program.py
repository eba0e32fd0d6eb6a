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
from ..kernel_forms import LinearForm, TorchForm, flattens, layer_form, maps

#: Kind of csrc/cpu/program.h.
NOTHING, LINEAR, CONVOLUTION = range(3)

Map = tuple[int, int, int]
Ops = tuple[specs.Op, ...]
NO_ACTIVATION = activation_code(None)


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
            return NOT_POOLED
        if isinstance(op, specs.MaxPool2d):
            return cls(MAX_POOL, op.kernel, op.stride, op.padding)
        return cls(AVG_POOL, op.kernel, op.stride, op.padding, op.divisor_override or 0, op.count_include_pad)


NOT_POOLED = Pool()


@dataclass(frozen=True)
class Layer:
    """A layer as csrc/cpu/module.cpp takes it. Maps are (channels, height, width); features have one pixel.

    Attributes:
        head: path of the module whose product it begins with; "" where there is none.
        kind: of the product.
        below, inner, out: what the layer reads, what the product gives, what the layer gives.
        kernel, stride, padding: of a convolution.
        entry: activation of what the product reads. Activations are a code and a negative slope.
        pool: between the activations ``before`` and ``after``.
        skip: the layer adds what it reads. scale: of the product with its bias.
    """

    head: str
    kind: int
    below: Map
    inner: Map
    out: Map
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    entry: tuple[int, float] = NO_ACTIVATION
    pool: Pool = NOT_POOLED
    before: tuple[int, float] = NO_ACTIVATION
    after: tuple[int, float] = NO_ACTIVATION
    skip: bool = False
    scale: float = 1.0

    @property
    def weights(self) -> int:
        """How many its product has."""
        if self.kind == NOTHING:
            return 0
        return self.inner[0] * (
            math.prod(self.below) if self.kind == LINEAR else self.below[0] * math.prod(self.kernel)
        )

    @property
    def arguments(self) -> tuple:
        return (
            self.kind, self.below, self.inner, self.out, self.kernel, self.stride, self.padding, self.entry,
            tuple(self.pool), self.before, self.after, self.skip, self.scale,
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
        if layer.index == network.depth and (len(inner[-1]) != 2 or described.pool.kind != NO_POOL):
            return f"{layer.label}: the output layer pools, or gives more than one row of classes a sample"
        result.append(described)
    return tuple(result)


def _layer(layer: specs.LayerSpec, inner: tuple, map: Map | None, below: Map, out: Map) -> Layer | str:
    ops, skip = _branch(layer.ops)
    ops, entry, scale = _around_product(ops)
    form = layer_form(replace(layer, ops=ops), inner, map, every_pool=True)
    if isinstance(form, TorchForm):
        return form.reason
    around = {"entry": entry, "skip": skip, "scale": scale}
    if isinstance(form, LinearForm):
        head = next(op for op in ops if isinstance(op, specs.Linear))
        below, out = (form.in_features, 1, 1), (form.out_features, 1, 1)
        return Layer(head.path, LINEAR, below, out, out, before=activation_code(form.activation), **around)
    if skip and (form.convolution is None or form.pool is not None):
        return "its skip leads around no linear layer or convolution, or around a pool"
    height, width, channels = form.inner
    before, after = activation_code(form.before), activation_code(form.after)
    pool = Pool.of(form.pool)
    within = (channels, height, width)
    if form.pool is None:
        out = within
    if form.convolution is None:
        return Layer("", NOTHING, within, within, out, pool=pool, before=before, after=after)
    head = pool_first(ops)[form.convolution]
    if head.groups != 1 or head.dilation != (1, 1):
        return "its convolution is grouped or dilated"
    return Layer(
        head.path, CONVOLUTION, below, within, out, head.kernel, head.stride, head.padding, pool=pool, before=before,
        after=after, **around,
    )  # fmt: skip


def _branch(ops: Ops) -> tuple[Ops, bool]:
    """The operations under the skip of a layer that is one residual block, and whether it is one."""
    blocks = [op for op in ops if not flattens(op)]
    if len(blocks) != 1 or not isinstance(blocks[0], specs.Residual):
        return ops, False
    at = ops.index(blocks[0])
    return (*ops[:at], *blocks[0].ops, *ops[at + 1 :]), True


def _around_product(ops: Ops) -> tuple[Ops, tuple[int, float], float]:
    """The operations without the activation before and the factor behind a product, if it has them; and these."""
    heads = [i for i, op in enumerate(ops) if isinstance(op, specs.Linear | specs.Conv2d)]
    if not heads:
        return ops, NO_ACTIVATION, 1.0
    before, behind = ops[: heads[0]], ops[heads[0] + 1 :]
    entry, scale = NO_ACTIVATION, 1.0
    activations = [op for op in before if not flattens(op)]
    if len(activations) == 1 and isinstance(activations[0], specs.Elementwise):
        entry = activation_code(activations[0].activation)
        before = tuple(op for op in before if flattens(op))
    if behind and isinstance(behind[0], specs.Scale):
        scale, behind = behind[0].factor, behind[1:]
    return (*before, ops[heads[0]], *behind), entry, scale


@functools.lru_cache(maxsize=256)
def program_of(plan: Plan):
    """The native program of a plan that the kernels run."""
    program = cpu_module.load().Program()
    for layer in layers_of(plan.network, plan.shapes):
        program.add(*layer.arguments)
    return program
