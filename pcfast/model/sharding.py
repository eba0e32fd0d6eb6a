"""Layers that ``fully_shard`` (FSDP2) has sharded, inside a sharded PredictiveCoding module.

Sharded modules gather their parameters in a forward hook and reduce gradients in a backward pass that such a hook has
prepared. Predictive coding evaluates and differentiates each layer many times: for a step the parameters are whole
and those hooks are away. The one backward pass that follows is the outer module's, which reduces what it finds.
"""

from __future__ import annotations

import contextlib
import functools
import sys

from torch import nn

from ..errors import ArgumentError, ModelError

_FSDP = "torch.distributed.fsdp._fully_shard._fully_shard"  # imported by whoever shards


@functools.cache
def original(kind: type) -> type:
    """The class that a module had before ``fully_shard``."""
    sharding = sys.modules.get(_FSDP)
    if sharding is not None and sharding.FSDPModule in kind.__bases__ and len(kind.__bases__) == 2:
        return kind.__bases__[1]
    return kind


def is_sharding(hook) -> bool:
    """Whether a module's hook is one of ``fully_shard``."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


@contextlib.contextmanager
def gathered(model: nn.Module, *, for_backward: bool):
    """Sharded modules of ``model`` hold whole parameters, until the backward pass where one is to come.

    Raises:
        ModelError: no outer sharded module is being called, whose backward pass could reduce the gradients.
    """
    modules = _sharded(model)
    if not modules:
        yield
        return
    for module in modules:
        _check_root(module)
    removed = []
    try:
        for module in modules:
            module.reshard()  # what an earlier step without a backward pass left may be out of date
            module.unshard()
            removed += _without_hooks(module)
        yield
    finally:
        for hooks, before in removed:
            hooks.clear()
            hooks.update(before)
        if not for_backward:
            for module in modules:
                module.reshard()


def check_whole(module: nn.Module, tolerance: float | None) -> None:
    """Raise ArgumentError for a tolerance where ``module`` or a part of it is sharded."""
    if tolerance is not None and _sharded(module):
        raise ArgumentError(
            "tolerance",
            f"{tolerance} in a module that fully_shard has sharded",
            "None: the energy is that of this process's rows, and processes would end at different iterations",
            "Fix num_steps, or take DistributedDataParallel, whose processes decide together.",
        )


def _sharded(model: nn.Module) -> list[nn.Module]:
    sharding = sys.modules.get(_FSDP)
    if sharding is None or not isinstance(model, nn.Module):
        return []
    return [module for module in model.modules() if isinstance(module, sharding.FSDPModule)]


def _check_root(module: nn.Module) -> None:
    state = module._get_fsdp_state()
    if (
        state._is_root is False
        and state._state_ctx.iter_forward_root is not None
        and len(state._modules) == 1
    ):
        return
    raise ModelError(
        "model",
        f"a {original(type(module)).__name__} that fully_shard has sharded, outside of a sharded PredictiveCoding",
        "layers whose gradients an outer backward pass reduces",
        "Call fully_shard on the PredictiveCoding module too, after its layers, each by itself, and call that.",
    )


def _without_hooks(module: nn.Module) -> list[tuple[dict, dict]]:
    """Take the sharding's hooks away: (hooks, what they held) to put back."""
    removed = []
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        removed.append((hooks, dict(hooks)))
        for key in [key for key, hook in hooks.items() if is_sharding(hook)]:
            del hooks[key]
    return removed
