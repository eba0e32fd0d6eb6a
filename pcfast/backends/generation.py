"""A number that changes whenever "auto" might choose otherwise than before."""

from __future__ import annotations

_number = 0


def current() -> int:
    """What a choice was made under."""
    return _number


def advance() -> None:
    """Something that choices depend on has changed: choose anew."""
    global _number
    _number += 1
