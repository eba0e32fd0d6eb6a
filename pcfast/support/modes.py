"""Train and eval mode of every part of a model: kept round work that needs another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, however that is, every part of ``model`` is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(modes[0][1])  # parts that do more than note their mode do it
        for module, training in modes:
            if module.training != training:
                module.training = training


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards every part is as before."""
    with modes_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """``model`` in the mode that it trains in; afterwards every part is as before.

    A model in train mode is trained as it is: parts in eval mode, such as a frozen BatchNorm, stay in it. One in
    eval mode is put in train mode as a whole.
    """
    with modes_kept(model):
        if not model.training:
            model.train()
        yield
