"""Numbers in their ranges."""

from __future__ import annotations

import math
import numbers

from .errors import ArgumentError, ArgumentTypeError


def checked_number(name: str, value, accepts, needed: str, remedy: str = "") -> float:
    """``value`` as a finite float that ``accepts`` takes.

    Raises:
        ArgumentTypeError, ArgumentError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(name, f"{value!r} ({type(value).__name__})", needed, remedy)
    if not math.isfinite(value) or not accepts(value):
        raise ArgumentError(name, repr(value), needed, remedy)
    return float(value)
