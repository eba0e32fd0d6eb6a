"""What a PC layer is to a kernel: a linear layer, a convolution or nothing, and a tail of elementwise operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..deviation.chain import pool_first
from ..kernels.limits import LARGEST_WINDOW
from ..model import spec as specs
from ..model.activations import Activation


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
        before: activation, or None. pool: or None. after: activation, or None.
    """

    convolution: int | None
    inner: tuple[int, int, int]
    before: Activation | None
    pool: specs.MaxPool2d | specs.AvgPool2d | None
    after: Activation | None


@dataclass(frozen=True)
class TorchForm:
    """Anything else that pcfast knows: torch's operations in deviation form. reason: why no kernel of ours."""

    reason: str


Form = LinearForm | PointwiseForm | TorchForm


def flattens(op: specs.Op) -> bool:
    """True for a Flatten that leaves one row a sample: nothing moves in memory."""
    return isinstance(op, specs.Flatten) and op.start_dim == 1 and op.end_dim == -1


def maps(network: specs.Network, shapes: tuple) -> list[tuple[int, int, int] | None]:
    """Of v_0..v_L: (channels, height, width) of what is a map, flattened or not; None elsewhere.

    Args:
        shapes: as :meth:`pcfast.model.spec.Network.shapes` gives them, none hidden.
    """
    first = shapes[0][0][1:]
    result = [first if len(first) == 3 else None]
    for layer, inner in zip(network.layers, shapes, strict=True):
        map = result[-1]
        for op, shape in zip(layer.ops, inner[1:], strict=True):
            if len(shape) == 4:
                map = shape[1:]
            elif not flattens(op) and not isinstance(op, specs.Elementwise):
                map = None
        result.append(map)
    return result


def _fused_pool(pool: specs.Pool2d, shape: tuple[int, ...]) -> bool:
    """True where every window is whole, none overlap and none is padded."""
    if pool.kernel != pool.stride or pool.padding != (0, 0):
        return False
    whole = all(size % window == 0 for size, window in zip(shape[2:], pool.kernel, strict=True))
    own_divisor = getattr(pool, "divisor_override", None) is not None
    return (whole or not pool.ceil_mode) and not own_divisor


def _adaptive(pool: specs.AdaptiveAvgPool2d, shape: tuple[int, ...]) -> specs.Op:
    """The AvgPool2d that ``pool`` is where its windows tile the map; else itself."""
    sizes = tuple(zip(shape[2:], pool.size, strict=True))
    if any(size % count for size, count in sizes):
        return pool
    window = tuple(size // count for size, count in sizes)
    return specs.AvgPool2d(
        pool.path,
        pool.name,
        window,
        window,
        (0, 0),
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    )


def _tail(ops: list[specs.Op], shapes: list[tuple[int, ...]], every_pool: bool):
    """``(before, pool, after)`` or, as a str, why the tail has no kernel. shapes: of each operation's input."""
    before = pool = after = None
    for op, shape in zip(ops, shapes, strict=True):
        if every_pool and isinstance(op, specs.AdaptiveAvgPool2d):
            op = _adaptive(op, shape)
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
            if not every_pool and not _fused_pool(op, shape):
                return f"the windows of its {op.name} overlap or are padded or cut"
            if not every_pool and math.prod(op.kernel) > LARGEST_WINDOW:
                return f"the windows of its {op.name} have more than {LARGEST_WINDOW} elements"
            pool = op
        else:
            return f"no kernel of ours does {op.name}"
    return before, pool, after


def elementwise_form(ops: tuple[specs.Op, ...], shape: tuple[int, ...]):
    """``(before, pool, after)`` of operations without a product, whatever the pool; or why no kernel has them."""
    kept = _kept(ops, shape)
    return _tail([op for _, op, _ in kept], [shape for _, _, shape in kept], every_pool=True)


def _kept(ops: tuple[specs.Op, ...], shape: tuple[int, ...]) -> list[tuple[int, specs.Op, tuple[int, ...]]]:
    """(index, operation, shape of its input) in the order in which they run, without those that only flatten."""
    kept = []
    for i, op in enumerate(pool_first(ops)):
        kept += [] if flattens(op) else [(i, op, shape)]
        shape = op.output_shape(shape)
    return kept


def layer_form(
    layer: specs.LayerSpec, inner: tuple, map: tuple[int, int, int] | None, *, every_pool: bool = False
) -> Form:
    """The form of one layer.

    Args:
        inner: shapes at its operations' boundaries. map: what it reads, as :func:`maps`.
        every_pool: the kernels know windows of any size that overlap, or are padded or cut, too.
    """
    kept = _kept(layer.ops, inner[0])
    first = kept[0][1] if kept else None
    if isinstance(first, specs.Linear):
        rest = [op for _, op, _ in kept[1:]]
        if len(kept[0][2]) != 2:
            return TorchForm("its input is not one row of features a sample")
        others = [op for op in rest if not isinstance(op, specs.Elementwise)]
        if others:
            return TorchForm(f"a {others[0].name} follows its linear layer")
        if len(rest) > 1:
            return TorchForm("more than one activation follows its linear layer")
        return LinearForm(first.in_features, first.out_features, rest[0].activation if rest else None)
    convolution = None
    shape = (inner[0][0], *map) if map is not None else inner[0]
    if isinstance(first, specs.Conv2d):
        convolution = kept[0][0]
        shape = first.output_shape(kept[0][2])
        kept = kept[1:]
    if convolution is None and map is None and len(shape) != 2:
        return TorchForm("its input is neither a map nor one row of features a sample")
    tail = _tail([op for _, op, _ in kept], [shape for _, _, shape in kept], every_pool)
    if isinstance(tail, str):
        return TorchForm(tail)
    channels, height, width = shape[1:] if len(shape) == 4 else (shape[1], 1, 1)
    return PointwiseForm(convolution, (height, width, channels), *tail)
