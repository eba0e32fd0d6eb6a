"""Dtypes of a relaxation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .log import say_once


@dataclass(frozen=True)
class Precision:
    """Dtypes of a relaxation.

    Attributes:
        state: beliefs, errors, pre-activations, losses, sums.
        operand: what matrix products and convolutions read.
        autocast: dtype of the ambient autocast under which opaque modules run; None without autocast.
        note: what the user should know about the choice; "" where there is nothing to say.
    """

    state: torch.dtype
    operand: torch.dtype
    autocast: torch.dtype | None = None
    note: str = ""

    def to_operand(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.operand else tensor.to(self.operand)

    def to_state(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.state else tensor.to(self.state)


def choose_precision(device_type: str, dtype: torch.dtype) -> Precision:
    """Dtypes for parameters of ``dtype`` under the ambient autocast (docs/behaviour.md)."""
    state = dtype if dtype == torch.float64 or dtype.is_complex else torch.float32
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if autocast == torch.bfloat16 and state == torch.float32:
        return Precision(state, torch.bfloat16, autocast)
    if autocast == torch.float16 and state == torch.float32:
        note = (
            "float16 autocast: float32 operands (TF32 on CUDA), since small deviations underflow in float16"
        )
        say_once(note)
        return Precision(state, state, autocast, note)
    operand = torch.bfloat16 if dtype == torch.bfloat16 else state
    return Precision(state, operand, autocast)
