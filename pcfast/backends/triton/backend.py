"""Strict relaxation by fused Triton kernels (kernels/), state in global memory; the rest as in eager.

exact, fixed_prediction and zero_divergence have no loop: they are a forward and a backward pass through cuBLAS and
cuDNN, as in eager.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import traceback
from collections.abc import Callable

import torch

from ...errors import BackendError
from ...kernels.limits import POINTWISE_MAX_BLOCK_N
from ...model.spec import Network
from ...precision import kernel_operands
from ...problem.types import energy_row, filled_start
from .. import gpu_constants
from ..eager.run import Eager, Run
from ..kernel_backend import KernelBackend, KernelRun, first_product, unknown_to_kernels, without_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 Tensor Cores


class Triton(KernelBackend):
    name = "triton"

    def automatic(self, device):
        if device.type == "cuda":
            return False, "it has not been measured on a GPU yet: ask for it by name"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return False, "interpreted kernels are for tests: ask for it by name"
        return True, ""

    def supports(self, request):
        reason = _unavailable(request.device.type, request.device.index)
        if reason:
            return False, reason
        if request.dtype not in _DTYPES:
            return False, f"its kernels compute in float32, not {request.dtype}: use eager"
        network = request.network
        reason = without_kernels(request) or unknown_to_kernels(network)
        if reason:
            return False, reason
        reason = _failures.get(_place(network, request.device), "")
        if not reason and request.x_shape:
            reason = _too_large(network, request.x_shape)
        return not reason, reason

    def relaxation(self, problem, plan):
        return _Run(problem, plan)

    def words(self, plan, network, device):
        from .describe import describe

        planned = _design(network, plan, "cross_entropy", _target(device, plan.precision))
        return describe(network, plan.shapes, planned, gpu_constants.load())


@functools.lru_cache(maxsize=16)
def _unavailable(device_type: str, index: int | None) -> str:
    """Why the kernels cannot run on a device; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "it needs a CUDA device"
    if device_type not in ("cpu", "cuda"):
        return f"it needs a CUDA device, not {device_type}"
    if device_type == "cuda":
        if torch.version.hip:
            return "it needs an NVIDIA GPU"
        capability = torch.cuda.get_device_capability(index)
        if capability < _MIN_CAPABILITY:
            return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    try:
        importlib.import_module("pcfast.backends.triton.loop")
    except Exception as failure:  # triton breaks in many ways where its parts do not fit together
        return f"its kernels cannot be imported: {type(failure).__name__}: {failure}"
    return ""


# What Tensor Cores read, by operand: three TF32 products make one of float32's accuracy.
_OPERANDS = {"ieee": "tf32x3", "tf32": "tf32", "bf16": "bf16"}


def _target(device: torch.device, precision):
    from .config_cache import active
    from .launch_plan import CompileTarget

    known, operands = gpu_constants.load(), kernel_operands(device, precision)
    sm_count = known.sm_count
    if device.type == "cuda":
        sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    return CompileTarget(
        _OPERANDS[operands.linear],
        sm_count,
        known.shared_memory_per_sm_bytes,
        interpreted=device.type == "cpu",
        choices=active(device),
        convolution_precision=_OPERANDS[operands.convolution],
    )


def _design(network, plan, loss: str | None, target):
    from .launch_plan import design

    momentum = plan.belief_optimizer.momentum > 0
    return design(network, plan.shapes, plan.gram, loss, plan.fresh, target, momentum)


def _fuses_loss(problem, plan) -> bool:
    """Whether kernels may evaluate the loss."""
    return problem.loss.known and len(plan.shapes[-1][-1]) == 2 and not problem.wanted.energies


def design_of(problem, plan):
    """The design of a strict relaxation, as it runs; call it inside the relaxation's numerics."""
    target = _target(problem.x.device, plan.precision)
    return _design(problem.network, plan, problem.loss.kind if _fuses_loss(problem, plan) else None, target)


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


# Why kernels did not compile for a network on a device: "auto" does not try them there again.
_failures: dict[tuple[Network, str, int | None], str] = {}


def _place(network: Network, device: torch.device) -> tuple[Network, str, int | None]:
    unnamed = device.type == "cuda" and device.index is None
    return network, device.type, torch.cuda.current_device() if unnamed else device.index


class KernelsFailed(BackendError):
    """Triton could not compile or launch a kernel, or what it made of one is not safe to run."""


@contextlib.contextmanager
def _compiling(labels: Callable[[], str]):
    """Kernels are compiled at their first launch: say so where triton fails at it. labels: of layers at work."""
    try:
        yield
    except Exception as failure:
        from ...kernels.launching import UnsafeKernel

        if isinstance(failure, UnsafeKernel):
            raise KernelsFailed(f"{labels()}: {failure}") from failure
        frames = {
            frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(failure.__traceback__)
        }
        interpreted = (
            "triton.runtime.interpreter" in frames
        )  # nothing is compiled: the fault is a kernel's own
        if interpreted or not any(name.split(".")[0] == "triton" for name in frames):
            raise
        raise KernelsFailed(
            f"{labels()}: triton could not compile or launch a kernel: {type(failure).__name__}: {failure}. Check "
            "that triton fits torch and the driver (pcfast info) and that a C compiler is installed, or use "
            'backend="eager".'
        ) from failure


class _Run(KernelRun):
    """One strict relaxation."""

    def _forward(self):
        """The forward pass, keeping what comes out of each layer's first product."""
        from .loop import arena_of

        self.planned = design_of(self.problem, self.plan)
        self.arena = arena_of(self.planned, self.problem.x.device, self.precision.operand)
        vhat = [self.precision.to_state(self.problem.x)]
        self.pre_activations = [None]
        for l, chain in enumerate(self.chains[1:], start=1):
            value, pre_activation = vhat[-1], None
            head = first_product(chain)
            for i, step in enumerate(chain.steps):
                value = step.forward(value)
                if i == head:
                    value = pre_activation = self._placed(l, value)
            if l > 1:  # kernels find the loop's arg-maxima, and the last beliefs have others
                chain.release()
            # the arena is the loop's own
            vhat.append(value.clone() if value is pre_activation else value)
            self.pre_activations.append(pre_activation)
        return vhat

    def _starts(self) -> list[torch.Tensor] | None:
        """Beliefs to start from, as deviations; None from the forward pass."""
        if self.problem.start is None:
            return None
        start = filled_start(self.problem.start, self.vhat)
        return [self.precision.to_state(v) - vhat for v, vhat in zip(start, self.vhat, strict=True)]

    def _placed(self, l: int, uhat: torch.Tensor) -> torch.Tensor:
        """uhat where the loop reads it, so that no second copy lives."""
        name = f"uhat{l}"
        if name in self.arena:
            return self.arena.matrix(name).copy_(uhat)
        return uhat.contiguous(memory_format=torch.channels_last) if uhat.dim() == 4 else uhat

    def _relax(self, observe):
        from .loop import ForwardState, Loop

        if self.result.fell_back:
            return super()._relax(observe)
        problem, plan, depth = self.problem, self.plan, self.depth
        steps = problem.num_steps
        planned = self.planned
        fused = _fuses_loss(problem, plan)
        inputs = ForwardState(
            self.chains, self.vhat, self.pre_activations, self._starts(), self.target if fused else None,
            self.gradient_at, self.links[1] if plan.gram else None,
        )  # fmt: skip
        loop = Loop(planned, self.arena, inputs, problem.step_size, problem.belief_optimizer.momentum)
        errors = [None] * (depth + 1)
        front = loop.front(max(steps, 1))

        def record(t: int) -> None:
            lowest = loop.front(t)
            errors_now = [None if l < max(lowest, 1) else self._error(loop, l) for l in range(depth + 1)]
            self.energies.append(energy_row(errors_now, self.loss_at(loop.output)))

        try:
            with _compiling(
                lambda: ", ".join(problem.network.layers[l - 1].label for l in sorted(loop.at_work))
            ):
                loop.run(steps, record if problem.wanted.energies else None)
        except KernelsFailed as failure:
            if not problem.may_fall_back:
                raise
            return self._relax_in_eager(str(failure), observe)
        for l in range(1, depth):
            if plan.fresh and l < depth - steps:
                continue
            if l == 1 and plan.gram:
                if not planned.gram_by_torch:
                    self.links[1].adopt(*loop.gram_state())
            else:
                self.links[l].adopt(loop.deviation(l))
        for l in range(max(front, 1), depth + 1):
            if not (l == 1 and plan.gram):
                error = loop.error(l) if steps or l > 1 else loop.deviation(1).neg()
                # a caller's errors do not keep the arena alive
                errors[l] = error.clone() if problem.wanted.states else error
        self.first_bad = loop.first_bad[1:]
        if self.builder is not None:
            self.builder.observe_first(self.first_bad, steps)
        self.result.resources = loop.resources
        return errors

    def _relax_in_eager(self, why: str, observe):
        """The loop from the same forward pass on, which has drawn masks and moved statistics already."""
        _failures[_place(self.problem.network, self.problem.x.device)] = why
        self.result.fell_back = (Eager.name, why)
        self.energies.clear()
        return super()._relax(observe)

    def _locate(self):
        if self.result.fell_back:
            Run._locate(self)
        else:
            super()._locate()

    def _error(self, loop, l: int):
        """eps_l between the stages, where layer 1's has not been written yet."""
        return loop.deviation(1).neg() if l == 1 else loop.error(l)
