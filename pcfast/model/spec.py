"""What a described model consists of: PC layers, each a chain of operations, as plain values.

Each element of the outer Sequential is one predictive-coding (PC) layer; a nested Sequential is a chain of
operations inside that layer. Operations that pcfast knows become specs with static attributes; every other
module becomes :class:`Opaque` and is evaluated and differentiated by torch autograd. Specs are plain values:
they name their module by its path in the model and hold no tensor, so plans can be cached by them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from .._moved import names_of
from ..errors import ShapeError
from ..support.hashing import hashed_once
from . import activations

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operation inside a PC layer."""

    path: str  # of the module in the model, as for Module.get_submodule
    name: str  # the module's class

    @property
    def has_parameters(self) -> bool:
        """Whether its module has parameters of its own."""
        return False

    @property
    def label(self) -> str:
        """In messages."""
        return self.name

    def output_shape(self, shape: Shape) -> Shape:
        """Shape of the output, batch included, for an input of ``shape``; raises ValueError in words."""
        return shape

    def macs(self, shape: Shape) -> int:
        """Multiply-adds of one product with this operation's weights for an input of ``shape``."""
        return 0


@dataclass(frozen=True)
class Linear(Op):
    in_features: int
    out_features: int

    @property
    def has_parameters(self):
        return True

    def output_shape(self, shape):
        if len(shape) < 2 or shape[-1] != self.in_features:
            raise ValueError(f"(batch, ..., {self.in_features})")
        return (*shape[:-1], self.out_features)

    def macs(self, shape):
        return math.prod(shape) * self.out_features


@dataclass(frozen=True)
class Conv2d(Op):
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def has_parameters(self):
        return True

    def output_shape(self, shape):
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(f"(batch, {self.in_channels}, height, width)")
        out = tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        if min(out) < 1:
            raise ValueError(f"(batch, {self.in_channels}, height, width) no smaller than the kernel")
        return (shape[0], self.out_channels, *out)

    def macs(self, shape):
        per_output = self.in_channels // self.groups * math.prod(self.kernel)
        return math.prod(self.output_shape(shape)) * per_output


@dataclass(frozen=True)
class Elementwise(Op):
    activation: activations.Activation


@dataclass(frozen=True)
class Pool2d(Op):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    def _out(self, size: int, axis: int, dilation: int = 1) -> int:
        kernel, stride, pad = self.kernel[axis], self.stride[axis], self.padding[axis]
        span = size + 2 * pad - dilation * (kernel - 1) - 1
        out = (math.ceil(span / stride) if self.ceil_mode else span // stride) + 1
        if self.ceil_mode and (out - 1) * stride >= size + pad:
            out -= 1  # the last window must start inside the input or its left padding
        return out

    def output_shape(self, shape):
        if len(shape) != 4:
            raise ValueError("(batch, channels, height, width)")
        out = tuple(self._out(size, axis) for axis, size in enumerate(shape[2:]))
        if min(out) < 1:
            raise ValueError("(batch, channels, height, width) no smaller than the pooling window")
        return (*shape[:2], *out)


@dataclass(frozen=True)
class MaxPool2d(Pool2d):
    @property
    def tiles(self) -> bool:
        """True where every input element belongs to at most one window and none is padded."""
        return self.kernel == self.stride and self.padding == (0, 0)


@dataclass(frozen=True)
class AvgPool2d(Pool2d):
    count_include_pad: bool
    divisor_override: int | None


@dataclass(frozen=True)
class AdaptiveAvgPool2d(Op):
    size: tuple[int, int]

    def output_shape(self, shape):
        if len(shape) != 4:
            raise ValueError("(batch, channels, height, width)")
        return (*shape[:2], *self.size)


@dataclass(frozen=True)
class Flatten(Op):
    start_dim: int
    end_dim: int

    def output_shape(self, shape):
        rank = len(shape)
        if not (-rank <= self.start_dim < rank and -rank <= self.end_dim < rank):
            raise ValueError(f"dimensions {self.start_dim} and {self.end_dim}")
        start, end = self.start_dim % rank, self.end_dim % rank
        if start == 0:
            raise ValueError("a batch dimension that Flatten leaves alone (start_dim >= 1)")
        return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


@dataclass(frozen=True)
class Unflatten(Op):
    dim: int
    sizes: tuple[int, ...]

    def output_shape(self, shape):
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(f"a dimension {self.dim}")
        dim = self.dim % len(shape)
        sizes = list(self.sizes)
        if -1 in sizes:
            sizes[sizes.index(-1)] = shape[dim] // -math.prod(sizes)
        if dim == 0 or math.prod(sizes) != shape[dim]:
            raise ValueError(
                f"dimension {self.dim} of size {math.prod(self.sizes)} (not the batch dimension)"
            )
        return (*shape[:dim], *sizes, *shape[dim + 1 :])


@dataclass(frozen=True)
class Scale(Op):
    factor: float


@dataclass(frozen=True)
class Dropout(Op):
    """Dropout in training mode (in eval mode it is no operation): one mask a step."""

    p: float
    kind: str  # the nn.functional function that draws the mask


@dataclass(frozen=True)
class BatchNorm(Op):
    features: int
    eps: float
    batch_statistics: bool
    affine: bool
    momentum: float | None  # of the running statistics; None averages over all batches
    moves_statistics: bool
    ranks: tuple[int, ...]  # numbers of dimensions that the module takes

    @property
    def has_parameters(self):
        return self.affine

    def output_shape(self, shape):
        if len(shape) not in self.ranks or shape[1] != self.features:
            raise ValueError(" or ".join(f"(batch, {self.features}{', size' * (r - 2)})" for r in self.ranks))
        if self.batch_statistics and math.prod(shape) == self.features:
            raise ValueError(
                "more than one value per channel in training mode (a larger batch, or model.eval())"
            )
        return shape


@dataclass(frozen=True)
class Opaque(Op):
    """A module that pcfast does not know: evaluated and differentiated by torch autograd."""

    why: str


@dataclass(frozen=True)
class Residual(Op):
    """x + f(x): ``ops`` are f, a chain that keeps the shape; empty for the identity."""

    ops: tuple[Op, ...]

    @property
    def label(self) -> str:
        return f"{self.name}({chain_label(self.ops)})"

    def inner_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes at the operations' boundaries; raises ValueError as :meth:`output_shape`."""
        shapes = [shape]
        for op in self.ops:
            try:
                shapes.append(op.output_shape(shapes[-1]))
            except ValueError as needed:
                if isinstance(op, Residual):
                    raise  # says where
                raise ValueError(f"{needed} at the {op.name} inside, not {shapes[-1]}") from None
        if shapes[-1] != shape:
            raise ValueError(f"a branch that keeps the shape, not one that gives {shapes[-1]}")
        return tuple(shapes)

    def output_shape(self, shape):
        return self.inner_shapes(shape)[-1]

    def macs(self, shape):
        inner = self.inner_shapes(shape)
        return sum(op.macs(before) for op, before in zip(self.ops, inner[:-1], strict=True))


def chain_label(ops: tuple[Op, ...]) -> str:
    """The operations in words."""
    return " - ".join(op.label for op in ops) or "identity"


def leaves(ops: tuple[Op, ...]) -> Iterator[Op]:
    """The operations in order, those of residual branches in place of their block."""
    for op in ops:
        if isinstance(op, Residual):
            yield from leaves(op.ops)
        else:
            yield op


@dataclass(frozen=True)
class LayerSpec:
    """One PC layer f_l: a chain of operations, :class:`Residual` ones with a chain of their own inside.

    Attributes:
        index: l, 1-based.
        ops: the operations in order; may be empty (identity).
    """

    index: int
    ops: tuple[Op, ...]

    @property
    def label(self) -> str:
        return f"layer {self.index} ({chain_label(self.ops)})"

    def check_batch_stays(self) -> None:
        """Raise ShapeError for a Flatten or Unflatten of the batch dimension, whatever comes before it."""
        for op in leaves(self.ops):
            if (isinstance(op, Flatten) and op.start_dim == 0) or (isinstance(op, Unflatten) and op.dim == 0):
                raise ShapeError(
                    "model",
                    f"{op.name} of the batch dimension in {self.label}",
                    "the batch dimension left alone",
                    "Reshape in the loss instead: loss=lambda output, y: F.cross_entropy(output.flatten(0, 1), y).",
                )

    def shapes(self, shape: Shape) -> tuple[Shape, ...] | None:
        """Input shape of every operation, then the output shape; None where an opaque one hides it.

        Raises ShapeError naming the layer where a shape does not fit.
        """
        shapes = [shape]
        for op in self.ops:
            if any(isinstance(leaf, Opaque) for leaf in leaves((op,))):
                return None
            try:
                shapes.append(op.output_shape(shapes[-1]))
            except ValueError as needed:
                raise ShapeError(
                    "x" if self.index == 1 else "model",
                    f"shape {shapes[-1]} at the input of {op.name} in {self.label}",
                    str(needed),
                    "Check the shape of x, the layer sizes, and whether a Flatten is missing.",
                ) from None
        return tuple(shapes)


@hashed_once
@dataclass(frozen=True)
class Network:
    """A model described: ``layers`` are f_1..f_L."""

    layers: tuple[LayerSpec, ...]

    @property
    def depth(self) -> int:
        """L, the number of PC layers."""
        return len(self.layers)

    @functools.cached_property
    def leaves(self) -> tuple[Op, ...]:
        """All operations in order, those of residual branches in place of their block."""
        return tuple(op for layer in self.layers for op in leaves(layer.ops))

    @functools.cached_property
    def opaque(self) -> tuple[Opaque, ...]:
        return tuple(op for op in self.leaves if isinstance(op, Opaque))

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether cuDNN may run some of it: convolutions, normalisation, or modules of unknown kind."""
        return any(isinstance(op, Conv2d | BatchNorm | Opaque) for op in self.leaves)

    @property
    def takes_integers(self) -> bool:
        """Whether layer 1 begins with a module of unknown kind, which may embed tokens (reshaping aside)."""
        ops = (op for op in self.layers[0].ops if not isinstance(op, Flatten | Unflatten))
        return isinstance(next(ops, None), Opaque)

    def shapes(self, x_shape: Shape) -> tuple[tuple[Shape, ...] | None, ...]:
        """Per layer what :meth:`LayerSpec.shapes` gives; None from the first opaque operation on."""
        result: list[tuple[Shape, ...] | None] = []
        shape: Shape | None = tuple(x_shape)
        for layer in self.layers:
            inner = layer.shapes(shape) if shape is not None else None
            if inner is None:
                layer.check_batch_stays()
            result.append(inner)
            shape = inner[-1] if inner is not None else None
        return tuple(result)


__getattr__ = names_of(__package__, "describe", "placement")
