"""Device and dtype of a model's parameters and buffers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ModelError

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
        for held, result in ((module._parameters, parameters), (module._buffers, buffers)):
            for tensor in held.values():
                if tensor is not None:
                    result[id(tensor)] = tensor
        if module._modules:
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(parameters.values()), list(buffers.values())


def _name_in(model: nn.Module, tensor: torch.Tensor) -> str:
    named = (*model.named_parameters(), *model.named_buffers())
    return next(name for name, candidate in named if candidate is tensor)
