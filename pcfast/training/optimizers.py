"""The optimisers that pcfast makes where it was given none: torch's, in the fastest form that fits the parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer


def adam(
    parameters: Iterable[nn.Parameter], *, kind: type[Optimizer] = torch.optim.Adam, **settings
) -> Optimizer:
    """``kind``, Adam or AdamW, with ``settings``: fused where every parameter is real and has no gaps in memory.

    Torch's default is one operation after the other, which on a CPU takes a small network a quarter of its training
    step; fused, a parameter's update is one pass over it. That pass goes through memory and does not look at strides,
    so that a parameter which is a part of another tensor would change what lies beside it.
    """
    parameters = list(parameters)
    return kind(parameters, fused=all(map(_fits, parameters)) or None, **settings)


def _fits(parameter: nn.Parameter) -> bool:
    # memory without gaps or overlaps keeps its strides
    return parameter.is_floating_point() and torch.empty_like(parameter).stride() == parameter.stride()
