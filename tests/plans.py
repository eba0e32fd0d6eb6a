"""Plans of a network that no backend was chosen for, and with the Gram form by decree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pcfast.model.describe import describe
from pcfast.precision import choose_precision
from pcfast.problem import plan as planning
from pcfast.problem.plan import Plan, plan


def planned(
    model: nn.Sequential, x_shape: Sequence[int], device="cpu", dtype: torch.dtype = torch.float32, **asked
) -> Plan:
    """``asked``: as for :func:`pcfast.problem.plan.plan`."""
    device = torch.device(device)
    return plan(describe(model), device, dtype, tuple(x_shape), choose_precision(device.type, dtype), **asked)


_choose_gram = planning.choose_gram


def wherever_possible(monkeypatch, gram: bool) -> None:
    """Layer 1 in Gram form wherever it is possible, or nowhere, whatever costs less."""

    def choose(*arguments):
        _, reason = _choose_gram(*arguments)
        return gram and reason.endswith("without"), reason

    monkeypatch.setattr(planning, "choose_gram", choose)
    planning.plan.cache_clear()
