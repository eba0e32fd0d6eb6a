"""A whole relaxation in one native call on the CPU; methods without a loop too, where networks are small."""

from __future__ import annotations

import functools

import torch

from ...kernels.codes import LOSSES
from ...problem.plan import Plan
from ...support import cpu_module
from ..base import Backend
from ..eager import backend as eager
from ..kernel_backend import unknown_to_kernels, without_kernels
from .describe import describe
from .program import layers_of
from .speed import natively, slower_than_torch

_DTYPES = (torch.float32, torch.float64)


class Cpu(Backend):
    name = "cpu"

    def automatic(self, device):
        return (True, "") if device.type == "cpu" else (False, "it runs on a CPU")

    def supports(self, plan):
        if plan.device.type != "cpu":
            return False, f"it runs on a CPU, not on {plan.device.type}"
        reason = cpu_module.load_error() or _refusal(plan)
        return not reason, reason

    def run(self, problem, plan):
        from .relaxation import Call

        given = problem.activations is not None or problem.output_gradient is not None
        if given or not natively(plan):
            return eager.run(problem, plan)
        with torch.no_grad():
            call = Call(problem, plan)
            out = call.outcome()
        if call.bad is not None and not call.relaxes and problem.check and problem.raise_now:
            # which finds the layer, and says so in the words of a backward pass
            return eager.run(problem, plan)
        return out

    def updates(self, model, network, precision, x, beliefs, errors):
        return eager.updates(model, network, precision, x, beliefs, errors)

    def describe(self, plan):
        return describe(plan)


@functools.lru_cache(maxsize=256)
def _refusal(plan: Plan) -> str:
    """Why the kernels cannot run a plan, or should not; "" where they run it."""
    reason = without_kernels(plan) or unknown_to_kernels(plan.network, skips=True)
    if reason:
        return reason
    if plan.dtype not in _DTYPES:
        return f"its kernels compute in float32 and float64, not {plan.dtype}: use eager"
    if plan.precision.operand != plan.precision.state:
        return f"its kernels' products read the state's dtype, not {plan.precision.operand}: use eager"
    if plan.wanted.energies:
        return "energies sum errors over the batch in every iteration, and a thread has its samples' alone: use eager"
    if plan.method != "strict":
        return ""
    if plan.loss not in LOSSES:
        return "its kernels evaluate cross-entropy and mse, and torch cannot inside a call: use eager"
    layers = layers_of(plan.network, plan.shapes)
    return layers if isinstance(layers, str) else slower_than_torch(plan, layers)
