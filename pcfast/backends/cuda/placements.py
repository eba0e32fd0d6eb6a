"""Where a planned relaxation's state lies in a chip's shared memory."""

from __future__ import annotations

import torch

from ...precision import Operands, kernel_operands
from ...problem.plan import Plan
from .. import gpu_constants
from .shared_memory import Chip, Placement, place


def placement_of(plan: Plan) -> Placement | str:
    """See :func:`pcfast.backends.cuda.shared_memory.place`, which keeps it; call it inside the plan's numerics."""
    scalar_bytes = plan.precision.state.itemsize
    # doubles, which only the CPU's build has, have no Tensor Cores
    operands = kernel_operands(plan.device, plan.precision) if scalar_bytes == 4 else Operands("ieee", "ieee")
    return place(
        plan.network, plan.shapes, plan.gram, plan.loss, operands, scalar_bytes, _chip(plan.device, scalar_bytes),
        plan.belief_optimizer.momentum > 0,
    )  # fmt: skip


def _chip(device: torch.device, scalar_bytes: int) -> Chip:
    known = gpu_constants.load()
    if device.type == "cuda":
        result = torch.cuda.get_device_properties(device)
        return Chip(
            result.multi_processor_count,
            result.shared_memory_per_block_optin,
            result.shared_memory_per_multiprocessor,
        )
    # doubles, which only the CPU's build has, are placed as floats would be
    scale = scalar_bytes // torch.float32.itemsize
    return Chip(
        known.sm_count, scale * known.shared_memory_per_block_bytes, scale * known.shared_memory_per_sm_bytes
    )
