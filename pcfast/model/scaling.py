"""Multiplication by a constant, as muPC and other parameterisations put it behind their weights."""

from __future__ import annotations

import math
import numbers

from torch import Tensor, nn

from ..errors import ArgumentError


class Scale(nn.Module):
    """``factor * x``, for x of any shape; the factor is a setting, no parameter.

    Raises:
        ArgumentError: a factor that is no finite number.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real) or not math.isfinite(factor):
            raise ArgumentError("factor", repr(factor), "a finite number")
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"
