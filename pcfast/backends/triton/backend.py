"""Strict relaxation by fused Triton kernels (kernels/), state in global memory; the rest as in eager.

exact, fixed_prediction and zero_divergence have no loop: they are a forward and a backward pass through cuBLAS and
cuDNN, as in eager.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from ...kernels.limits import POINTWISE_MAX_BLOCK_N
from .. import chips, gpu_constants
from ..kernel_backend import KernelBackend, unknown_to_kernels, without_kernels
from . import failures, kinds

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 Tensor Cores


class Triton(KernelBackend):
    name = "triton"
    kind_names = kinds.NAMES

    def unavailable(self, device):
        return _unavailable(device, chips.named())

    def kinds(self, plan):
        from .designs import design_of

        return kinds.names_of(design_of(plan))

    def supports(self, plan):
        reason = self.unavailable(plan.device)
        if reason:
            return False, reason
        if plan.dtype not in _DTYPES:
            return False, f"its kernels compute in float32, not {plan.dtype}: use eager"
        network = plan.network
        reason = without_kernels(plan) or unknown_to_kernels(network)
        if reason:
            return False, reason
        reason = "" if chips.named() else failures.reason_of(plan)
        if not reason:
            reason = _too_large(network, plan.x_shape)
        return not reason, reason

    def relax(self, problem, plan, chains):
        from .relaxation import Relaxation

        return Relaxation(problem, plan, chains).outcome()

    def words(self, plan):
        from .describe import describe
        from .designs import design_of

        return describe(
            plan.network, plan.shapes, design_of(plan), gpu_constants.load(chip=chips.chip_of(plan.device))
        )


@functools.lru_cache(maxsize=16)
def _unavailable(device: torch.device, chip: chips.Chip | None) -> str:
    """Why the kernels cannot run on a device, or on a named chip in its place; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "it needs a CUDA device"
    if device.type not in ("cpu", "cuda"):
        return f"it needs a CUDA device, not {device.type}"
    if device.type == "cuda":
        if torch.version.hip and chip is None:
            return "it needs an NVIDIA GPU"
        capability = chips.chip_of(device).capability
        if capability < _MIN_CAPABILITY:
            return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    try:
        importlib.import_module("pcfast.backends.triton.loop")
    except Exception as failure:  # triton breaks in many ways where its parts do not fit together
        return f"its kernels cannot be imported: {type(failure).__name__}: {failure}"
    return ""


# Elements between samples that 32-bit offsets inside a tile of a linear layer reach; likewise samples times pixels.
_MAX_ROW = 2**24
_MAX_PIXELS = 2**31
# Programs that CUDA starts along a grid's second axis, times the channels of each (pointwise_error.tile).
_MAX_CHANNELS = 65535 * POINTWISE_MAX_BLOCK_N


@functools.lru_cache(maxsize=256)
def _too_large(network, x_shape: tuple[int, ...]) -> str:
    """Where an offset would not fit its integer, or a grid CUDA, by layer; "" where all fit."""
    from ..kernel_forms import LinearForm, layer_form
    from .tensor_layout import boundaries

    batch, shapes = x_shape[0], network.shapes(x_shape)
    bounds = boundaries(network, shapes)
    linear = [None, None]  # whether linear kernels run a layer, which stands outside the loop up to layer 1
    for layer, inner, below in zip(network.layers[1:], shapes[1:], bounds[1:-1], strict=True):
        linear.append(isinstance(layer_form(layer, inner, below.map), LinearForm))
    for layer, bound in zip(network.layers, bounds[1:], strict=True):
        # kernels of this layer and of the one above work on what lies between them
        kinds = linear[layer.index : layer.index + 2]
        channels, height, width = bound.map or (bound.size, 1, 1)
        pixels = batch * height * width
        limits = [(pixels, _MAX_PIXELS, "samples times pixels")]
        if True in kinds:
            limits.append((bound.stride, _MAX_ROW, "outputs a sample"))
        if False in kinds:
            limits.append((channels, _MAX_CHANNELS, "channels"))
        for count, limit, what in limits:
            if count >= limit:
                return (
                    f"{layer.label} has {count:,} {what}, of which its kernels take fewer than {limit:,}: use "
                    f"{'smaller batches' if what.startswith('samples') else 'smaller layers'} or eager"
                )
    return ""
