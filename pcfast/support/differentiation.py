"""Torch autograd on what a module really used: parameters are found in the graph, registered or not.

A module may read a parameter that it does not register (a tied weight in a list), or whose tensor somebody lends it
(``torch.func.functional_call``). Its output's graph names them all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError

_REENTRANT = "CheckpointFunctionBackward"  # the node of torch.utils.checkpoint with use_reentrant=True

_hooks_lock = threading.RLock()


def trained(output: Tensor, registered: Iterable[Tensor] = (), apart: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors that require grad and that ``output``'s graph begins with.

    Args:
        registered: come first, in this order; one computed from others (functional_call) is not looked behind.
        apart: tensors that are left out.

    Raises:
        ModelError: the graph holds a reentrant checkpoint, which cannot be differentiated here.
    """
    if output.grad_fn is None:
        return []
    computed = {(p.grad_fn, p.output_nr): p for p in registered if p.grad_fn is not None}
    result: dict[int, Tensor] = {}
    seen, waiting = {output.grad_fn}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node.name() == _REENTRANT:
            raise ModelError(
                "model",
                "torch.utils.checkpoint with use_reentrant=True inside a layer",
                "layers that torch.autograd.grad can differentiate",
                "Pass use_reentrant=False to checkpoint.",
            )
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if leaf is not None:
            result[id(leaf)] = leaf
        for edge in node.next_functions:
            if edge[0] is None:
                continue
            if edge in computed:
                result[id(computed[edge])] = computed[edge]
            elif edge[0] not in seen:
                seen.add(edge[0])
                waiting.append(edge[0])
    for tensor in apart:
        result.pop(id(tensor), None)
    first = [p for p in registered if result.pop(id(p), None) is not None]
    return [*first, *result.values()]


def gradients(
    output: Tensor, tensors: Sequence[Tensor], error: Tensor | None = None, *, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """(d output / d tensor)^T error; None for what ``output`` does not depend on.

    Hooks of the tensors stay out: they act on the gradient that ``backward`` delivers, once. With ``keep`` the graph
    stays.
    """
    if not tensors:
        return ()
    with _without_hooks(tensors):
        return torch.autograd.grad(output, tensors, error, retain_graph=keep, allow_unused=True)


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[Tensor]):
    hooked = [tensor for tensor in tensors if tensor.is_leaf and tensor._backward_hooks]
    if not hooked:
        yield
        return
    with _hooks_lock:
        held = [tensor._backward_hooks for tensor in hooked]
        try:
            for tensor in hooked:
                tensor._backward_hooks = None
            yield
        finally:
            for tensor, hooks in zip(hooked, held, strict=True):
                tensor._backward_hooks = hooks


def registered(module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters that require grad, as they are at this moment.

    Raises:
        ModelError: autograd cannot keep them.
    """
    result = [p for p in module.parameters() if p.requires_grad]
    if any(p.is_inference() for p in result):
        raise ModelError(
            "model",
            f"parameters of a {type(module).__name__} that were made inside torch.inference_mode()",
            "parameters that autograd can keep",
            "Build the model outside of it, or take copy.deepcopy(model) there.",
        )
    return result


def assign_gradient(parameter: Tensor, gradient: Tensor | None) -> None:
    """Make ``gradient`` what ``parameter.grad`` is, laid out in memory as autograd does it: as the parameter.

    Fused optimisers of torch go through the memory of both and do not look at strides.
    """
    if gradient is not None and gradient.layout == torch.strided and gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    parameter.grad = gradient
