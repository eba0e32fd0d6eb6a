"""The design of a planned relaxation's loop on its device, under torch's switches of the moment."""

from __future__ import annotations

from ...kernels.codes import LOSSES
from ...precision import kernel_operands
from ...problem.plan import Plan
from ..chips import chip_of
from .config_cache import active
from .launch_plan import CompileTarget, Design, design

# What Tensor Cores read, by operand: three TF32 products make one of float32's accuracy.
_OPERANDS = {"ieee": "tf32x3", "tf32": "tf32", "bf16": "bf16"}


def target_of(plan: Plan) -> CompileTarget:
    """The device that a plan runs on, as the design sees it; call it inside the relaxation's numerics."""
    chip, operands, device = chip_of(plan.device), kernel_operands(plan.device, plan.precision), plan.device
    return CompileTarget(
        _OPERANDS[operands.linear],
        chip.sm_count,
        chip.shared_memory_per_sm_bytes,
        interpreted=device.type == "cpu",
        choices=active(device),
        convolution_precision=_OPERANDS[operands.convolution],
    )


def fuses_loss(plan: Plan) -> bool:
    """Whether kernels may evaluate the loss."""
    return plan.loss in LOSSES and len(plan.shapes[-1][-1]) == 2 and not plan.wanted.energies


def design_of(plan: Plan) -> Design:
    """The design of a strict relaxation, as it runs; call it inside the relaxation's numerics."""
    loss, momentum = plan.loss if fuses_loss(plan) else None, plan.belief_optimizer.momentum > 0
    return design(plan.network, plan.shapes, plan.gram, loss, plan.fresh, target_of(plan), momentum)
