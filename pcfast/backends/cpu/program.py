"""A planned network as the CPU kernels read it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...deviation.chain import pool_first
from ...kernels.codes import AVG_POOL, MAX_POOL, NO_POOL, activation_code
from ...model import spec as specs
from ...problem.plan import Plan
from ...support import cpu_module
from ..kernel_forms import LinearForm, TorchForm, layer_form, maps

#: Kind of csrc/cpu/program.h.
NOTHING, LINEAR, CONVOLUTION = range(3)

Map = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """A layer as csrc/cpu/module.cpp takes it. Maps are (channels, height, width); features have one pixel.

    Attributes:
        head: path of the module whose product it begins with; "" where there is none.
        kind: of the product.
        below, inner, out: what the layer reads, what the product gives, what the layer gives.
        kernel, stride, padding: of a convolution.
        pool, window: between the activations ``before`` and ``after``, each a code and a negative slope.
    """

    head: str
    kind: int
    below: Map
    inner: Map
    out: Map
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: int = NO_POOL
    window: tuple[int, int] = (1, 1)
    before: tuple[int, float] = (0, 0.0)
    after: tuple[int, float] = (0, 0.0)

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
            self.kind, self.below, self.inner, self.out, self.kernel, self.stride, self.padding, self.pool,
            self.window, self.before, self.after,
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
        if layer.index == network.depth and (len(inner[-1]) != 2 or described.pool != NO_POOL):
            return f"{layer.label}: the output layer pools, or gives more than one row of classes a sample"
        result.append(described)
    return tuple(result)


def _layer(layer: specs.LayerSpec, inner: tuple, map: Map | None, below: Map, out: Map) -> Layer | str:
    form = layer_form(layer, inner, map)
    if isinstance(form, TorchForm):
        return form.reason
    if isinstance(form, LinearForm):
        head = next(op for op in layer.ops if isinstance(op, specs.Linear))
        below, out = (form.in_features, 1, 1), (form.out_features, 1, 1)
        return Layer(head.path, LINEAR, below, out, out, before=activation_code(form.activation))
    height, width, channels = form.inner
    before, after = activation_code(form.before), activation_code(form.after)
    pool, window = NO_POOL, (1, 1)
    if form.pool is not None:
        pool = MAX_POOL if isinstance(form.pool, specs.MaxPool2d) else AVG_POOL
        window = form.pool.kernel
    within = (channels, height, width)
    if form.pool is None:
        out = within
    if form.convolution is None:
        return Layer("", NOTHING, within, within, out, pool=pool, window=window, before=before, after=after)
    head = pool_first(layer.ops)[form.convolution]
    if head.groups != 1 or head.dilation != (1, 1):
        return "its convolution is grouped or dilated"
    return Layer(
        head.path, CONVOLUTION, below, within, out, head.kernel, head.stride, head.padding, pool, window, before,
        after,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def program_of(plan: Plan):
    """The native program of a plan that the kernels run."""
    program = cpu_module.load().Program()
    for layer in layers_of(plan.network, plan.shapes):
        program.add(*layer.arguments)
    return program
