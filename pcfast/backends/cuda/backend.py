"""Strict relaxation of small networks in one launch of the shared-memory-resident CUDA kernel (csrc/resident/).

exact, fixed_prediction and zero_divergence have no loop: they are a forward and a backward pass through cuBLAS and
cuDNN, as in eager.
"""

from __future__ import annotations

import torch

from ...kernels.codes import LOSSES
from ...precision import numerics
from .. import chips, gpu_constants
from ..kernel_backend import KernelBackend, unknown_to_kernels, without_kernels
from . import kinds, native
from .placements import placement_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 Tensor Cores
# int32 in the kernel, whose largest value stands for "never"
_MAX_STEPS = torch.iinfo(torch.int32).max - 1


class Cuda(KernelBackend):
    name = "cuda"
    kind_names = kinds.NAMES

    def unavailable(self, device):
        return _unavailable(device)

    def kinds(self, plan):
        return kinds.names_of(plan)

    def supports(self, plan):
        reason = self.unavailable(plan.device)
        if reason:
            return False, reason
        doubles = plan.dtype == torch.float64 and native.on_host() and plan.device.type == "cpu"
        if plan.dtype not in _DTYPES and not doubles:
            return False, f"its kernels compute in float32, not {plan.dtype}: use eager"
        reason = without_kernels(plan) or unknown_to_kernels(plan.network)
        if reason:
            return False, reason
        if plan.method != "strict" or plan.depth == 1:
            return True, ""
        if plan.num_steps > _MAX_STEPS:
            return False, f"its kernel counts up to {_MAX_STEPS:,} iterations, not {plan.num_steps:,}"
        if plan.wanted.energies:
            return False, "energies need every iteration's errors, which stay on chip"
        if plan.loss not in LOSSES:
            return False, "its kernel evaluates cross-entropy and mse, and torch cannot inside a launch"
        with numerics(plan.device, plan.precision):
            placement = placement_of(plan)
        return (False, placement) if isinstance(placement, str) else (True, "")

    def relax(self, problem, plan, chains):
        from .relaxation import Relaxation

        return Relaxation(problem, plan, chains).outcome()

    def words(self, plan):
        from .describe import describe

        return describe(plan.network, placement_of(plan), gpu_constants.load(chip=chips.chip_of(plan.device)))


def _unavailable(device: torch.device) -> str:
    """Returns why the kernel cannot run on a device; "" where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it needs a CUDA device, not {device.type}"
    if device.type == "cpu" and not native.on_host():
        return "it needs a CUDA device"
    if not chips.named():  # what is planned for a chip that is not here is not compiled here
        reason = native.load_error()
        if reason or device.type == "cpu":
            return reason
        if native.on_host():
            return "the kernels were built for the CPU"
        if torch.version.hip:
            return "it needs an NVIDIA GPU"
    capability = chips.chip_of(device).capability
    if capability < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return ""
