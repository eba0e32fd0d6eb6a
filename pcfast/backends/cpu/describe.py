"""What the CPU kernels do with a plan, in words, for pcfast.explain."""

from __future__ import annotations

import torch

from ...problem.plan import Plan
from . import native


def describe(plan: Plan) -> list[str]:
    """The kernels, their threads, and where state lies."""
    threads = torch.get_num_threads()
    return [f"one native call ({native.load().used()}), {threads} thread{'s' * (threads > 1)} of torch's"]
