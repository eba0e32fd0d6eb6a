"""Describes an ``nn.Sequential``: a chain of PC layers, each a chain of operations (spec.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import ModelError
from . import activations, sharding
from .graph import Graph
from .residual import Residual as ResidualModule
from .scaling import Scale as ScaleModule
from .spec import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Dropout,
    Elementwise,
    Flatten,
    LayerSpec,
    Linear,
    MaxPool2d,
    Network,
    Op,
    Opaque,
    Residual,
    Scale,
    Unflatten,
)

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
    ScaleModule: lambda path, m: Scale(path, _name(m), m.factor),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
}

_NORMALISATION = ("training", "track_running_stats", "momentum", "eps", "num_features")
#: Kinds of modules that are described by their names and, beside their tensors, by these attributes alone.
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Identity: (),
    **dict.fromkeys(_DROPOUTS, ("training", "p")),
    **dict.fromkeys(_ACTIVATIONS, ()),
    nn.LeakyReLU: ("negative_slope",),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.ReLU6: ("min_val", "max_val"),
    nn.GELU: ("approximate",),
    nn.Linear: (),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: (
        "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
    ),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    ScaleModule: ("factor",),
    nn.BatchNorm1d: _NORMALISATION,
    nn.BatchNorm2d: _NORMALISATION,
}  # fmt: skip

#: Kinds that register weight and bias, and running statistics.
PARAMETRISED = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
BUFFERED = (nn.BatchNorm1d, nn.BatchNorm2d)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Which of :data:`SETTINGS` a module is; None for those that hold others, and for unknown ones."""
    kind = sharding.original(type(module))
    return kind if kind in SETTINGS else None


def has_hooks(module: nn.Module) -> bool:
    """True where hooks of the user's are called with ``module``."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if not (before or after):
        return False
    return not all(map(sharding.is_sharding, (*before.values(), *after.values())))


def patched(module: nn.Module) -> bool:
    """True where this instance was given a forward of its own."""
    return "forward" in module.__dict__


def plain_sequential(module: nn.Module) -> bool:
    """True where calling ``module`` is to call its elements in order (hooks aside)."""
    kind = type(module)
    if kind is not nn.Sequential:
        if not isinstance(module, nn.Sequential) or kind.forward is not nn.Sequential.forward:
            return False
        if kind.__iter__ is not nn.Sequential.__iter__ or kind.__call__ is not nn.Module.__call__:
            return False
    return not patched(module)


#: What torch keeps hooks in that every module calls.
GLOBAL_HOOKS = tuple(
    hooks
    for hooks in (
        getattr(torch.nn.modules.module, f"_global_{name}_hooks", None)
        for name in ("forward", "forward_pre", "backward", "backward_pre")
    )
    if hooks is not None
)


def _of_torch(hook) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.")


def check_called_by_elements(model: nn.Sequential) -> None:
    """Raise ModelError where ``model(x)`` is more than its layers one after the other."""
    if has_hooks(model):
        raise ModelError(
            "model",
            f"a {_name(model)} that has hooks itself: model(x) is more than its layers one after the other",
            "hooks on its layers alone",
            "Register them on the first or the last layer, or make what they do a layer.",
        )
    # torch's own (torch.utils.flop_counter's) only look on
    if any(GLOBAL_HOOKS) and not all(_of_torch(hook) for hooks in GLOBAL_HOOKS for hook in hooks.values()):
        raise ModelError(
            "model",
            "hooks on every module (torch.nn.modules.module.register_module_forward_hook and its kin)",
            "hooks on its layers alone",
            "Remove them for the call (their handle's remove()).",
        )


#: Wrappers that deliver gradients, or gather parameters, by hooks of their own backward pass.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


def _opaque(path: str, module: nn.Module, why: str) -> Opaque:
    """The operation of a module that runs through autograd.

    Raises:
        ModelError: a wrapper inside it.
    """
    for inner in module.modules():
        _check_not_wrapped(path, inner)
    return Opaque(path, _name(module), why)


def _wrapper(module: nn.Module) -> str:
    """The name of the wrapper that ``module`` is; "" where it is none."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((name for name in names if name in _WRAPPERS), "")


def _check_not_wrapped(path: str, module: nn.Module) -> None:
    wrapper = _wrapper(module)
    if wrapper:
        raise ModelError(
            "model",
            f"{wrapper} round {path} or a part of it, which waits for a backward pass of its own",
            "layers as they are: predictive coding evaluates and differentiates each by itself",
            "Wrap the whole PredictiveCoding module, and it alone.",
        )


def _check_unwrapped_whole(model: nn.Module) -> None:
    wrapper = _wrapper(model)
    if wrapper:
        raise ModelError(
            "model",
            f"{wrapper} round the model: pcfast would call its layers past the wrapper, which would sum no updates",
            "the model itself, in a PredictiveCoding module that is wrapped",
            f"parallel = {wrapper}(pcfast.PredictiveCoding(model, ...)), and then parallel(x, y).backward().",
        )


def _plain_residual(module: nn.Module) -> bool:
    if not isinstance(module, ResidualModule) or type(module).forward is not ResidualModule.forward:
        return False
    return type(module).__iter__ is nn.Sequential.__iter__ and type(module).__call__ is nn.Module.__call__


def _children(path: str, module: nn.Sequential) -> Iterator[Op]:
    for name, child in module._modules.items():  # named_children would skip a repeated module
        yield from operations(f"{path}.{name}", child)


def operations(path: str, module: nn.Module) -> Iterator[Op]:
    """The operations of ``module`` in order; nested Sequentials are flattened, no-ops are left out."""
    kind = sharding.original(type(module))
    name = kind.__name__
    if has_hooks(module):
        yield _opaque(path, module, f"{name} has hooks")
    elif patched(module):
        yield _opaque(path, module, f"{name} was given another forward")
    elif plain_sequential(module):
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


def describe(model: nn.Module, *, hooks: bool = True) -> Network:
    """Describe ``model`` as a chain of PC layers.

    Args:
        model: an ``nn.Sequential``; each element is one PC layer (Torch2PC's convention).
        hooks: refuse hooks of the model itself, or of every module, that are there now.

    Raises:
        ModelError: not a Sequential, empty, or one whose call is more than that of its elements in order.
    """
    if not isinstance(model, nn.Sequential):
        _check_unwrapped_whole(model)
        raise ModelError(
            "model",
            f"a {type(model).__name__}",
            "an nn.Sequential whose elements are the predictive-coding layers",
            "This runs chains alone; graphs go to pc_loss, relax, incremental_step and training.train."
            if isinstance(model, Graph)
            else "Wrap the model: nn.Sequential(block1, block2, ...).",
        )
    if not plain_sequential(model):
        raise ModelError(
            "model",
            f"{type(model).__name__}, which overrides Sequential.forward, __call__ or __iter__",
            "a Sequential evaluated element by element",
        )
    if hooks:
        check_called_by_elements(model)
    if len(model) == 0:
        raise ModelError("model", "an empty Sequential", "at least one layer")
    return _same(
        Network(
            tuple(
                LayerSpec(index, tuple(operations(name, module)))
                for index, (name, module) in enumerate(model._modules.items(), start=1)
            )
        )
    )


@functools.lru_cache(maxsize=256)
def _same(network: Network) -> Network:
    """One object for equal descriptions: caches that are asked for it recognise it at a glance."""
    return network
