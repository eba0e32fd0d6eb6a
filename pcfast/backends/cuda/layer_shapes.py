"""Which layers the resident kernel can run, and their shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...deviation.chain import pool_first
from ...model import spec as specs
from ...precision import Operands
from ..kernel_forms import LinearForm, PointwiseForm, TorchForm, layer_form, maps


@dataclass(frozen=True)
class LayerShape:
    """A layer above the first. Shapes are (channels, height, width); features have one pixel.

    Attributes:
        form: its form in the kernels.
        convolution: its convolution, if it has one.
        below: the shape that it reads.
        inner: the shape that its tail reads.
        out: the shape of its output, pooled.
        operand: what its product reads, a word of Operands.
    """

    form: LinearForm | PointwiseForm
    convolution: specs.Conv2d | None
    below: tuple[int, int, int]
    inner: tuple[int, int, int]
    out: tuple[int, int, int]
    operand: str

    @property
    def linear(self) -> bool:
        return isinstance(self.form, LinearForm)


def _as_map(shape: tuple[int, ...], map: tuple[int, int, int] | None) -> tuple[int, int, int]:
    return map if map is not None else (math.prod(shape[1:]), 1, 1)


def layer_shapes(network: specs.Network, shapes: tuple, operands: Operands) -> list[LayerShape | None] | str:
    """Returns the shapes of layers from index 2 on, or why the kernel cannot run one of them."""
    around = maps(network, shapes)
    layers: list[LayerShape | None] = [None, None]
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
        layers.append(LayerShape(form, convolution, below, within, out, operand))
    return layers
