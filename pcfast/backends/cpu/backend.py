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
from .program import CONVOLUTION, LINEAR, Layer, layers_of

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
        if given or not _natively(plan):
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
        if not _natively(plan):
            return ["no loop: one forward and one backward pass through torch"]
        return describe(plan)


@functools.lru_cache(maxsize=256)
def _refusal(plan: Plan) -> str:
    """Why the kernels cannot run a plan, or should not; "" where they run it."""
    reason = without_kernels(plan) or unknown_to_kernels(plan.network)
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
    return layers if isinstance(layers, str) else _slower_than_torch(plan, layers)


# Where torch's products are faster, measured on one core of a Xeon with AVX-512 and 2 MB of L2 (time of eager over
# time of this backend, relu, n = 5 to 20). Linear layers of one width, batch 64 to 512: 1.2 to 1.9 at 600, 1.5 at
# 800, 0.5 to 0.9 from 1024 on, where a layer's weights leave the cache. With 1 or 4 rows, which fill few lanes: 1.1
# and 2.8 at 384, 0.9 at 600; 1.2 with 8 rows. Convolutions of 3x3 in maps of 16x16 to 32x32: 1.1 and more up to 64
# channels in and out, 0.6 and 0.8 with 128. One forward and one backward pass: 1.1 and 1.2 with layers of 784x128
# and 128x128, 0.9 with 784x600.
_MAX_WEIGHT_BYTES = 3 << 20
_MAX_WEIGHT_BYTES_ONCE = 1 << 20
_FEW_ROWS = 8
_MAX_CONVOLUTION_WEIGHTS = 1 << 16


def _slower_than_torch(plan: Plan, layers: tuple[Layer, ...]) -> str:
    """Why torch's products are faster; "" where they are not."""
    few = plan.x_shape[0] < _FEW_ROWS
    limit = _MAX_WEIGHT_BYTES_ONCE if few else _MAX_WEIGHT_BYTES
    for spec, layer in zip(plan.network.layers, layers, strict=True):
        if layer.kind == CONVOLUTION and layer.weights > _MAX_CONVOLUTION_WEIGHTS:
            return (
                f"{spec.label}: torch's convolutions are faster from {_MAX_CONVOLUTION_WEIGHTS:,} weights on, here "
                f"{layer.weights:,}: use eager"
            )
        size = layer.weights * plan.dtype.itemsize
        if layer.kind == LINEAR and spec.index > 1 and size > limit:
            rows = f" for fewer than {_FEW_ROWS} rows" if few else ""
            return (
                f"{spec.label}: torch's products are faster from {limit >> 20} MiB of weights on{rows}, here "
                f"{size / 2**20:.1f} MiB: use eager"
            )
    return ""


@functools.lru_cache(maxsize=256)
def _natively(plan: Plan) -> bool:
    """Whether the kernels run a plan that :func:`_refusal` lets pass; else torch does, as in eager."""
    if plan.method == "strict" and plan.depth > 1:
        return True
    wanted = plan.wanted
    if wanted.states or wanted.activations or plan.loss not in LOSSES:
        return False
    layers = layers_of(plan.network, plan.shapes)
    return not isinstance(layers, str) and all(
        layer.weights <= _MAX_CONVOLUTION_WEIGHTS
        if layer.kind == CONVOLUTION
        else layer.weights * plan.dtype.itemsize <= _MAX_WEIGHT_BYTES_ONCE
        for layer in layers
    )
