"""What becomes of each layer: which kernels run it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import network as specs
from ..activations import Activation
from ..deviation.chain import pool_first
from ..kernels.conv_geometry import ConvGeometry
from ..kernels.pointwise_error import LARGEST_WINDOW
from .boundary import Boundary, flattens


@dataclass(frozen=True)
class LinearForm:
    """One linear layer and at most one activation: linear_predict and linear_feedback.

    Attributes:
        in_features, out_features: sizes. activation: or None.
    """

    in_features: int
    out_features: int
    activation: Activation | None


@dataclass(frozen=True)
class PointwiseForm:
    """A tail of known elementwise operations, after a convolution or alone: pointwise_error and pointwise_update.

    Attributes:
        convolution: index of the layer's Conv2d among its steps; None where the tail stands alone.
        inner: (height, width, channels) of what the tail reads; (1, 1, features) for features.
        before: activation, or None. pool: that tiles the map, or None. after: activation, or None.
    """

    convolution: int | None
    inner: tuple[int, int, int]
    before: Activation | None
    pool: specs.MaxPool2d | specs.AvgPool2d | None
    after: Activation | None


@dataclass(frozen=True)
class ConvForm:
    """A convolution and its tail as implicit matrix products: conv_predict and conv_feedback.

    Attributes:
        convolution: index of the layer's Conv2d among its steps.
        geometry: sizes, the pool's included.
        before, after: activations in front of and behind the pool, or None; without a pool the one is ``after``.
    """

    convolution: int
    geometry: ConvGeometry
    before: Activation | None
    after: Activation | None


@dataclass(frozen=True)
class TorchForm:
    """Anything else that pcfast knows: torch's operations in deviation form. reason: why no kernel of ours."""

    reason: str


Form = LinearForm | PointwiseForm | ConvForm | TorchForm


def _fused_pool(pool: specs.Pool2d, shape: tuple[int, ...]) -> bool:
    """True where every window is whole, none overlap and none is padded."""
    if pool.kernel != pool.stride or pool.padding != (0, 0):
        return False
    whole = all(size % window == 0 for size, window in zip(shape[2:], pool.kernel, strict=True))
    own_divisor = getattr(pool, "divisor_override", None) is not None
    return (whole or not pool.ceil_mode) and not own_divisor


def _tail(ops: list[specs.Op], shapes: list[tuple[int, ...]]):
    """``(before, pool, after)`` or, as a str, why the tail has no kernel. shapes: of each operation's input."""
    before = pool = after = None
    for op, shape in zip(ops, shapes, strict=True):
        if isinstance(op, specs.Elementwise):
            if pool is None and before is None:
                before = op.activation
            elif after is None:
                after = op.activation
            else:
                return "it has more activations than one kernel takes"
            if pool is None and after is not None:
                return "two activations follow each other"
        elif isinstance(op, specs.MaxPool2d | specs.AvgPool2d):
            if pool is not None:
                return "it pools twice"
            if not _fused_pool(op, shape):
                return f"the windows of its {op.name} overlap or are padded or cut"
            if math.prod(op.kernel) > LARGEST_WINDOW:
                return f"the windows of its {op.name} have more than {LARGEST_WINDOW} elements"
            pool = op
        else:
            return f"no kernel of ours does {op.name}"
    return before, pool, after


def layer_form(layer: specs.LayerSpec, inner: tuple, below: Boundary) -> Form:
    """The form of one layer. inner: shapes at its operations' boundaries; below: what it reads."""
    ops = pool_first(layer.ops)
    shapes: list[tuple[int, ...]] = [inner[0]]
    for op in ops:
        shapes.append(op.output_shape(shapes[-1]))
    kept = [(i, op, shapes[i]) for i, op in enumerate(ops) if not flattens(op)]
    first = kept[0][1] if kept else None
    if isinstance(first, specs.Linear):
        rest = [op for _, op, _ in kept[1:]]
        if len(kept[0][2]) != 2:
            return TorchForm("its input is not one row of features a sample")
        if any(not isinstance(op, specs.Elementwise) for op in rest) or len(rest) > 1:
            return TorchForm("more than one activation follows its linear layer")
        return LinearForm(first.in_features, first.out_features, rest[0].activation if rest else None)
    convolution = None
    shape = (inner[0][0], *below.map) if below.map is not None else inner[0]
    if isinstance(first, specs.Conv2d):
        convolution = kept[0][0]
        shape = first.output_shape(kept[0][2])
        kept = kept[1:]
    if convolution is None and below.map is None and len(shape) != 2:
        return TorchForm("its input is neither a map nor one row of features a sample")
    tail = _tail([op for _, op, _ in kept], [shape for _, _, shape in kept])
    if isinstance(tail, str):
        return TorchForm(tail)
    channels, height, width = shape[1:] if len(shape) == 4 else (shape[1], 1, 1)
    return PointwiseForm(convolution, (height, width, channels), *tail)


def conv_form(form: Form, layer: specs.LayerSpec, below: Boundary) -> ConvForm | None:
    """``form`` of a layer as one implicit product a stage; None where the kernels cannot do that."""
    if not isinstance(form, PointwiseForm) or form.convolution is None:
        return None
    convolution = pool_first(layer.ops)[form.convolution]
    if convolution.groups != 1 or convolution.dilation != (1, 1):
        return None
    channels, height, width = below.map
    kind, window, before, after = None, (1, 1), form.before, form.after
    if form.pool is not None:
        kind = "max" if isinstance(form.pool, specs.MaxPool2d) else "avg"
        window = form.pool.kernel
    else:
        before, after = None, form.before
    geometry = ConvGeometry(
        height, width, channels, convolution.out_channels, convolution.kernel, convolution.stride,
        convolution.padding, kind, window,
    )  # fmt: skip
    return None if geometry.refusal(before) else ConvForm(form.convolution, geometry, before, after)
