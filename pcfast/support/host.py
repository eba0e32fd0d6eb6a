"""What the host may read of a device without waiting for it."""

from __future__ import annotations

import torch


def readable(device: torch.device) -> bool:
    """Whether the host may read a value of ``device`` and choose by it what runs next."""
    return device.type == "cpu"
