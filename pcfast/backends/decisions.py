"""What decides about a backend beside a plan: what this process has learned, and torch's switches."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

import torch

_count = itertools.count(1)
_learned = 0


def learned() -> None:
    """This process has learned something by which another backend may be chosen for the same plan."""
    global _learned
    _learned = next(_count)


def state(device: torch.device) -> Hashable:
    """Equal for as long as the same backend is chosen for the same plan on a device."""
    if device.type != "cuda":
        return _learned
    # the resident kernel's placement depends on what its products read (precision.kernel_operands)
    products, convolutions = (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
    )
    return _learned, products, convolutions
