"""Model description: an ``nn.Sequential`` becomes a tuple of layer specs.

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

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ModelError, ShapeError
from ..support.hashing import hashed_once
from . import activations, sharding
from .residual import Residual as ResidualModule

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One operation inside a PC layer."""

    path: str  # of the module in the model, as for Module.get_submodule
    name: str  # the module's class

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


_ACTIVATIONS = {
    nn.ReLU: lambda m: activations.Relu(),
    nn.LeakyReLU: lambda m: activations.LeakyRelu(m.negative_slope),
    nn.Hardtanh: lambda m: activations.Hardtanh(m.min_val, m.max_val),
    nn.ReLU6: lambda m: activations.Hardtanh(m.min_val, m.max_val),
    nn.Tanh: lambda m: activations.Tanh(),
    nn.Sigmoid: lambda m: activations.Sigmoid(),
    nn.SiLU: lambda m: activations.Silu(),
    nn.GELU: lambda m: activations.GeluTanh() if m.approximate == "tanh" else activations.Gelu(),
}
_DROPOUTS = {nn.Dropout: "dropout", nn.Dropout1d: "dropout1d", nn.Dropout2d: "dropout2d"}


def _name(module: nn.Module) -> str:
    return sharding.original(type(module)).__name__


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _affine_shape(m: nn.Module, rank: int) -> tuple[int, ...] | None:
    """Sizes of the weight, which torch reads, and not those that the module was made with.

    None where weight and bias are no plain affine map's.
    """
    # a look-up of an attribute of a module takes longer than all the rest
    weight, bias = m._parameters.get("weight"), m._parameters.get("bias")
    weight = m.weight if weight is None else weight
    bias = m.bias if bias is None else bias
    shape = weight.shape
    if len(shape) != rank or (bias is not None and bias.shape != shape[:1]):
        return None
    return shape


def _linear(path: str, m: nn.Linear) -> Op | None:
    shape = _affine_shape(m, 2)
    return None if shape is None else Linear(path, _name(m), shape[1], shape[0])


def _conv2d(path: str, m: nn.Conv2d) -> Op | None:
    shape = _affine_shape(m, 4)
    if shape is None or shape[0] % m.groups:
        return None
    out_channels, in_channels, *kernel = shape
    kernel, dilation = tuple(kernel), _pair(m.dilation)
    if kernel != _pair(m.kernel_size) and isinstance(m.padding, str):
        return None  # torch pads by the kernel size that the module was made with
    padding = m.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(span % 2 for span in spans):
            return None  # torch pads such a kernel unevenly
        padding = tuple(span // 2 for span in spans)
    if m.padding_mode != "zeros":
        return None
    return Conv2d(
        path,
        _name(m),
        in_channels * m.groups,
        out_channels,
        kernel,
        _pair(m.stride),
        _pair(padding),
        dilation,
        m.groups,
    )


def _max_pool(path: str, m: nn.MaxPool2d) -> Op | None:
    if _pair(m.dilation) != (1, 1) or m.return_indices:
        return None
    return MaxPool2d(path, _name(m), _pair(m.kernel_size), _pair(m.stride), _pair(m.padding), m.ceil_mode)


def _avg_pool(path: str, m: nn.AvgPool2d) -> Op | None:
    return AvgPool2d(
        path,
        _name(m),
        _pair(m.kernel_size),
        _pair(m.stride),
        _pair(m.padding),
        m.ceil_mode,
        m.count_include_pad,
        m.divisor_override,
    )


def _adaptive_avg_pool(path: str, m: nn.AdaptiveAvgPool2d) -> Op | None:
    size = (m.output_size, m.output_size) if isinstance(m.output_size, int) else tuple(m.output_size)
    return None if None in size else AdaptiveAvgPool2d(path, _name(m), size)


def _unflatten(path: str, m: nn.Unflatten) -> Op | None:
    sizes = m.unflattened_size
    if isinstance(m.dim, str) or not all(isinstance(size, int) for size in sizes):
        return None  # named dimensions
    return Unflatten(path, _name(m), m.dim, tuple(sizes))


def _batch_norm(path: str, m: nn.BatchNorm1d | nn.BatchNorm2d) -> Op | None:
    weight, bias = m.weight, m.bias
    held = [t for t in (weight, bias, m.running_mean, m.running_var) if t is not None]
    features = len(held[0]) if held else m.num_features
    if (weight is None) != (bias is None) or any(t.shape != (features,) for t in held):
        return None
    batch_statistics = m.training or m.running_mean is None
    ranks = (4,) if isinstance(m, nn.BatchNorm2d) else (2, 3)
    moves = m.training and m.track_running_stats and m.running_mean is not None
    return BatchNorm(
        path, _name(m), features, m.eps, batch_statistics, weight is not None, m.momentum, moves, ranks
    )


_KNOWN = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool,
    nn.Flatten: lambda path, m: Flatten(path, _name(m), m.start_dim, m.end_dim),
    nn.Unflatten: _unflatten,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
}


def _has_hooks(module: nn.Module) -> bool:
    """True where hooks of the user's are called with ``module``."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if not (before or after):
        return False
    return not all(map(sharding.is_sharding, (*before.values(), *after.values())))


def _patched(module: nn.Module) -> bool:
    """True where this instance was given a forward of its own."""
    return "forward" in module.__dict__


def _plain_sequential(module: nn.Module) -> bool:
    """True where calling ``module`` is to call its elements in order (hooks aside)."""
    kind = type(module)
    if kind is not nn.Sequential:
        if not isinstance(module, nn.Sequential) or kind.forward is not nn.Sequential.forward:
            return False
        if kind.__iter__ is not nn.Sequential.__iter__ or kind.__call__ is not nn.Module.__call__:
            return False
    return not _patched(module)


#: What torch keeps hooks in that every module calls.
_GLOBAL_HOOKS = tuple(
    hooks
    for hooks in (
        getattr(torch.nn.modules.module, f"_global_{name}_hooks", None)
        for name in ("forward", "forward_pre", "backward", "backward_pre")
    )
    if hooks is not None
)


def _of_torch(hook) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.")


def _check_called_by_elements(model: nn.Sequential) -> None:
    """Raise ModelError where ``model(x)`` is more than its layers one after the other."""
    if _has_hooks(model):
        raise ModelError(
            "model",
            f"a {_name(model)} that has hooks itself: model(x) is more than its layers one after the other",
            "hooks on its layers alone",
            "Register them on the first or the last layer, or make what they do a layer.",
        )
    # torch's own (torch.utils.flop_counter's) only look on
    if any(_GLOBAL_HOOKS) and not all(_of_torch(hook) for hooks in _GLOBAL_HOOKS for hook in hooks.values()):
        raise ModelError(
            "model",
            "hooks on every module (torch.nn.modules.module.register_module_forward_hook and its kin)",
            "hooks on its layers alone",
            "Remove them for the call (their handle's remove()).",
        )


#: Wrappers that deliver gradients, or gather parameters, by hooks of their own backward pass.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def _opaque(path: str, module: nn.Module, why: str) -> Opaque:
    """The operation of a module that runs through autograd.

    Raises:
        ModelError: a wrapper inside it.
    """
    for inner in module.modules():
        _check_not_wrapped(path, inner)
    return Opaque(path, _name(module), why)


def _check_not_wrapped(path: str, module: nn.Module) -> None:
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS:
            raise ModelError(
                "model",
                f"{kind.__name__} round {path} or a part of it, which waits for a backward pass of its own",
                "layers as they are: predictive coding evaluates and differentiates each by itself",
                "Wrap the whole PredictiveCoding module, and it alone.",
            )


def _plain_residual(module: nn.Module) -> bool:
    if not isinstance(module, ResidualModule) or type(module).forward is not ResidualModule.forward:
        return False
    return type(module).__iter__ is nn.Sequential.__iter__ and type(module).__call__ is nn.Module.__call__


def _children(path: str, module: nn.Sequential) -> Iterator[Op]:
    for name, child in module._modules.items():  # named_children would skip a repeated module
        yield from _operations(f"{path}.{name}", child)


def _operations(path: str, module: nn.Module) -> Iterator[Op]:
    """The operations of ``module`` in order; nested Sequentials are flattened, no-ops are left out."""
    kind = sharding.original(type(module))
    name = kind.__name__
    if _has_hooks(module):
        yield _opaque(path, module, f"{name} has hooks")
    elif _patched(module):
        yield _opaque(path, module, f"{name} was given another forward")
    elif _plain_sequential(module):
        yield from _children(path, module)
    elif _plain_residual(module):
        yield Residual(path, name, tuple(_children(path, module)))
    elif kind is nn.Identity:
        return
    elif kind in _DROPOUTS:
        if module.training and module.p > 0:
            yield Dropout(path, name, module.p, _DROPOUTS[kind])
    elif kind in _ACTIVATIONS:
        yield Elementwise(path, name, _ACTIVATIONS[kind](module))
    else:
        op = _KNOWN[kind](path, module) if kind in _KNOWN else None
        yield op if op is not None else _opaque(path, module, f"pcfast has no spec for this {name}")


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

    @property
    def leaves(self) -> tuple[Op, ...]:
        """All operations in order, those of residual branches in place of their block."""
        return tuple(op for layer in self.layers for op in leaves(layer.ops))

    @property
    def opaque(self) -> tuple[Opaque, ...]:
        return tuple(op for op in self.leaves if isinstance(op, Opaque))

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


def describe(model: nn.Module, *, hooks: bool = True) -> Network:
    """Describe ``model`` as a chain of PC layers.

    Args:
        model: an ``nn.Sequential``; each element is one PC layer (Torch2PC's convention).
        hooks: refuse hooks of the model itself, or of every module, that are there now.

    Raises:
        ModelError: not a Sequential, empty, or one whose call is more than that of its elements in order.
    """
    if not isinstance(model, nn.Sequential):
        raise ModelError(
            "model",
            f"a {type(model).__name__}",
            "an nn.Sequential whose elements are the predictive-coding layers",
            "Wrap the model: nn.Sequential(block1, block2, ...).",
        )
    if not _plain_sequential(model):
        raise ModelError(
            "model",
            f"{type(model).__name__}, which overrides Sequential.forward, __call__ or __iter__",
            "a Sequential evaluated element by element",
        )
    if hooks:
        _check_called_by_elements(model)
    if len(model) == 0:
        raise ModelError("model", "an empty Sequential", "at least one layer")
    return _same(
        Network(
            tuple(
                LayerSpec(index, tuple(_operations(name, module)))
                for index, (name, module) in enumerate(model._modules.items(), start=1)
            )
        )
    )


@functools.lru_cache(maxsize=256)
def _same(network: Network) -> Network:
    """One object for equal descriptions: caches that are asked for it recognise it at a glance."""
    return network


#: Dtypes that relaxations run in, and the complex one of the same precision.
DTYPES = {
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
    torch.bfloat16: None,
    torch.float16: None,
}
_COMPLEX_OF = {**DTYPES, torch.complex64: torch.complex64, torch.complex128: torch.complex128}


def common_placement(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Device and floating dtype shared by all parameters and floating buffers; None where there are none.

    Real and complex tensors of one precision go together; the dtype is complex where a parameter is.

    Raises:
        ModelError: uninitialised (lazy) or distributed parameters, layers on different devices or of different
            dtypes, or of one that no relaxation runs in.
    """
    first, chosen = None, None
    parameters, buffers = tensors_of(model)
    for index, tensor in enumerate((*parameters, *buffers)):
        if is_lazy(tensor):
            raise ModelError(
                "model",
                f"the uninitialised parameter {_name_in(model, tensor)}",
                "initialised parameters",
                "Run one forward pass first: model(x).",
            )
        dtype = tensor.dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            continue
        if first is None:
            first, chosen = tensor, dtype
            _check_runs(model, tensor)
        elif dtype != first.dtype or tensor.device != first.device:
            _check_runs(model, tensor)
            pair = _COMPLEX_OF[dtype]
            if tensor.device != first.device or pair is None or pair != _COMPLEX_OF[first.dtype]:
                _raise_apart(model, first, tensor, (*parameters, *buffers))
            if index < len(parameters):
                chosen = pair
    return None if first is None else (first.device, chosen)


def _check_runs(model: nn.Module, tensor: torch.Tensor) -> None:
    """Raise ModelError for a parameter or buffer of a kind that no relaxation runs with."""
    given = None
    if type(tensor).__name__ == "DTensor":
        given, needed = "a DTensor whose parts lie on several devices", "whole tensors"
        remedy = "Shard the PredictiveCoding module with fully_shard, and call that."
    elif tensor.dtype not in _COMPLEX_OF:
        given = f"a tensor of {tensor.dtype}"
        needed = f"one of {sorted(str(dtype) for dtype in _COMPLEX_OF)}"
        remedy = "Relax a copy in one of these."
    if given is not None:
        raise ModelError("model", f"{_name_in(model, tensor)}, {given}", needed, remedy)


def _raise_apart(model, first, tensor, tensors) -> None:
    remedy = "Call model.to(device, dtype)."
    if any(t.is_complex() for t in tensors):
        remedy = "Convert the real ones by themselves: model.to(dtype) would drop the imaginary parts of the others."
    elif tensor.dtype == first.dtype:
        remedy = "Call model.to(device)."
    raise ModelError(
        "model",
        " and ".join(f"{_name_in(model, t)} on {t.device} as {t.dtype}" for t in (first, tensor)),
        "all layers on one device and of one dtype",
        remedy,
    )


def tensors_of(model: nn.Module) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """Parameters and buffers in the order of ``model.parameters()`` and ``buffers()``, each once.

    Every step asks for them, and the names that torch's own walk makes take longer than everything else.
    """
    parameters, buffers, seen, waiting = {}, {}, set(), [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for held, found in ((module._parameters, parameters), (module._buffers, buffers)):
            for tensor in held.values():
                if tensor is not None:
                    found[id(tensor)] = tensor
        if module._modules:
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(parameters.values()), list(buffers.values())


def _name_in(model: nn.Module, tensor: torch.Tensor) -> str:
    named = (*model.named_parameters(), *model.named_buffers())
    return next(name for name, candidate in named if candidate is tensor)
