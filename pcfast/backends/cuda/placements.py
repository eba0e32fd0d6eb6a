"""Where a planned relaxation's state lies in a chip's shared memory."""

from __future__ import annotations

import torch

from ...precision import Operands, kernel_operands
from ...problem.plan import Plan
from ..chips import chip_of
from .shared_memory import Placement, Room, place


def placement_of(plan: Plan) -> Placement | str:
    """See :func:`pcfast.backends.cuda.shared_memory.place`, which keeps it; call it inside the plan's numerics."""
    scalar_bytes = plan.precision.state.itemsize
    # doubles, which only the CPU's build has, have no Tensor Cores
    operands = kernel_operands(plan.device, plan.precision) if scalar_bytes == 4 else Operands("ieee", "ieee")
    return place(
        plan.network, plan.shapes, plan.gram, plan.loss, operands, scalar_bytes, _room(plan.device, scalar_bytes),
        plan.belief_optimizer.momentum > 0,
    )  # fmt: skip


def _room(device: torch.device, scalar_bytes: int) -> Room:
    chip = chip_of(device)
    # doubles, which only the CPU's build has, are placed as floats would be
    scale = scalar_bytes // torch.float32.itemsize
    return Room(
        chip.sm_count, scale * chip.shared_memory_per_block_bytes, scale * chip.shared_memory_per_sm_bytes
    )
