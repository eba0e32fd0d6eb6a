"""Plans of a network that no backend was chosen for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pcfast.model.describe import describe
from pcfast.precision import choose_precision
from pcfast.problem.plan import Plan, plan


def planned(
    model: nn.Sequential, x_shape: Sequence[int], device="cpu", dtype: torch.dtype = torch.float32, **asked
) -> Plan:
    """``asked``: as for :func:`pcfast.problem.plan.plan`."""
    device = torch.device(device)
    return plan(describe(model), device, dtype, tuple(x_shape), choose_precision(device.type, dtype), **asked)
