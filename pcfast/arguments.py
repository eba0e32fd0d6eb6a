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
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        number = math.inf
    if not math.isfinite(number) or not accepts(number):
        given = (
            repr(value) if math.isfinite(number) or isinstance(value, float) else "a number beyond float64"
        )
        raise ArgumentError(name, given, needed, remedy)
    return number
