"""What objects are called in records and messages: the same in every process."""

from __future__ import annotations

import re

from torch import nn

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def without_address(text: str) -> str:
    """``text`` without the memory addresses that a default repr shows."""
    return _ADDRESS.sub("", text)


def module_text(module: nn.Module) -> str:
    """What ``module`` prints as, in one line and without memory addresses; its parts' names where it cannot print."""
    try:
        text = " ".join(str(module).split())
    except Exception:  # a repr of the user's own
        text = ", ".join(type(part).__qualname__ for part in module.modules())
    return without_address(text)
