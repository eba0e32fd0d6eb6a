"""Strict relaxation of small networks in one launch of the shared-memory-resident CUDA kernel (csrc/resident/).

exact, fixed_prediction and zero_divergence have no loop: they are a forward and a backward pass through cuBLAS and
cuDNN, as in eager.
"""

from __future__ import annotations

import torch

from ...deviation import Chain
from ...precision import Operands, choose_precision, kernel_operands, numerics
from ...problem.belief_optimizers import BeliefOptimizer, schedule_on_device
from ...problem.plan import choose_gram
from ...problem.types import check_start
from .. import gpu_constants
from ..kernel_backend import KernelBackend, KernelRun, first_product, unknown_to_kernels, without_kernels
from . import native
from .shared_memory import Chip, Placement, place

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)  # bfloat16 and TF32 Tensor Cores
# int32 in the kernel, whose largest value stands for "never"
_MAX_STEPS = torch.iinfo(torch.int32).max - 1


class Cuda(KernelBackend):
    name = "cuda"

    def automatic(self, device):
        if device.type == "cuda":
            return False, "it has not been measured on a GPU yet: ask for it by name"
        return False, "it needs a CUDA device"

    def supports(self, request):
        reason = _unavailable(request.device)
        if reason:
            return False, reason
        if request.dtype not in _DTYPES and not (native.on_host() and request.dtype == torch.float64):
            return False, f"its kernels compute in float32, not {request.dtype}: use eager"
        network = request.network
        reason = without_kernels(request) or unknown_to_kernels(network)
        if reason:
            return False, reason
        if request.x_shape is None or request.method != "strict" or network.depth == 1:
            return True, ""
        if request.num_steps > _MAX_STEPS:
            return False, f"its kernel counts up to {_MAX_STEPS:,} iterations, not {request.num_steps:,}"
        if request.energies:
            return False, "energies need every iteration's errors, which stay on chip"
        if request.loss not in ("cross_entropy", "mse"):
            return False, "its kernel evaluates cross-entropy and mse, and torch cannot inside a launch"
        shapes = network.shapes(request.x_shape)
        gram, _ = choose_gram(
            network, shapes, request.method, request.num_steps, request.fresh, request.energies,
            request.belief_optimizer,
        )  # fmt: skip
        precision = choose_precision(request.device.type, request.dtype)
        with numerics(request.device, precision):
            placed = _place(
                network, shapes, gram, request.loss, precision, request.device, request.belief_optimizer
            )
        return (False, placed) if isinstance(placed, str) else (True, "")

    def relaxation(self, problem, plan):
        return _Run(problem, plan)

    def words(self, plan, network, device):
        from .describe import describe

        placed = _place(
            network, plan.shapes, plan.gram, "cross_entropy", plan.precision, device, plan.belief_optimizer
        )
        return describe(network, placed, gpu_constants.load())


def _unavailable(device: torch.device) -> str:
    """Returns why the kernel cannot run on a device; "" where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"it needs a CUDA device, not {device.type}"
    if device.type == "cpu" and not native.on_host():
        return "it needs a CUDA device"
    reason = native.why_missing()
    if reason or device.type == "cpu":
        return reason
    if native.on_host():
        return "the kernels were built for the CPU"
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return ""


def _chip(device: torch.device, scalar_bytes: int) -> Chip:
    known = gpu_constants.load()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Chip(
            properties.multi_processor_count,
            properties.shared_memory_per_block_optin,
            properties.shared_memory_per_multiprocessor,
        )
    # doubles, which only the CPU's build has, are placed as floats would be
    scale = scalar_bytes // torch.float32.itemsize
    return Chip(
        known.sm_count, scale * known.shared_memory_per_block_bytes, scale * known.shared_memory_per_sm_bytes
    )


def _place(
    network, shapes, gram: bool, loss: str, precision, device: torch.device, optimizer: BeliefOptimizer
) -> Placement | str:
    """See :func:`pcfast.backends.cuda.shared_memory.place`; call it inside the relaxation's numerics."""
    scalar_bytes = precision.state.itemsize
    # doubles, which only the CPU's build has, have no Tensor Cores
    operands = kernel_operands(device, precision) if scalar_bytes == 4 else Operands("ieee", "ieee")
    chip = _chip(device, scalar_bytes)
    return place(network, shapes, gram, loss, operands, scalar_bytes, chip, optimizer.momentum > 0)


class _Run(KernelRun):
    """One strict relaxation. The kernel runs the forward pass, too: only its lowest product is torch's."""

    def _forward(self):
        from .launch import relax

        problem = self.problem
        shapes, loss = [inner[-1] for inner in self.plan.shapes], problem.loss
        loss.check_target(shapes[-1], problem.y)
        if problem.raise_now and loss.kind == "cross_entropy":  # labels
            loss.prepare(torch.empty(shapes[-1]), problem.y, raise_now=True)
        self.starts = None
        if problem.start is not None:
            check_start(problem.start, [self.plan.shapes[0][0], *shapes])
            self.starts = [
                torch.full(shape, v, dtype=self.precision.state, device=problem.x.device)
                if isinstance(v, float)
                else v
                if v is None
                else self.precision.to_state(v)
                for v, shape in zip(problem.start, [self.plan.shapes[0][0], *shapes], strict=True)
            ]
        self.heads = [None if chain is None else first_product(chain) for chain in self.chains]
        x = self.precision.to_state(problem.x)
        first = self.chains[1].forward(x)
        self.outputs = relax(
            *self.arguments(first), problem.num_steps, gradients=problem.wanted.gradients,
            output_gradient=problem.wanted.states or problem.wanted.activations or problem.check,
        )  # fmt: skip
        return [x, first, *self.outputs.vhat[2:]]

    def arguments(self, first: torch.Tensor):
        """Placement and inputs of :func:`pcfast.backends.cuda.launch.relax`. first: vhat_1."""
        from .launch import Inputs

        problem, plan = self.problem, self.plan
        placed = _place(
            problem.network, plan.shapes, plan.gram, problem.loss.kind, self.precision, problem.x.device,
            problem.belief_optimizer,
        )  # fmt: skip
        steps = [None if head is None else self.chains[l].steps[head] for l, head in enumerate(self.heads)]
        weights = [None if step is None else step.weight for step in steps]
        biases = [None if step is None else step.bias for step in steps]
        below = first
        if plan.gram:
            below = steps[2].forward(first)
            weights[2], biases[2] = steps[2].gram(), None
        self.step_size = problem.step_size
        if isinstance(self.step_size, tuple):
            self.step_size = schedule_on_device(self.step_size, first.dtype, first.device)
        inner_shapes = (self._inner_shape(l) for l in range(2, self.depth + 1))
        return placed, Inputs(
            [None, None, *weights[2:]], [None, None, *biases[2:]], below, self.starts, problem.loss, problem.y,
            self.step_size, problem.belief_optimizer.momentum, [None, *(inner[-1] for inner in plan.shapes)],
            [None, None, *inner_shapes],
        )  # fmt: skip

    def _inner_shape(self, l: int) -> tuple[int, ...]:
        inner, head = self.plan.shapes[l - 1], self.heads[l]
        return inner[0] if head is None else inner[head + 1]

    def _prepare_loss(self):
        self.loss, self.output_gradient = self.outputs.loss_rows.sum(), self.outputs.output_gradient
        self.flaw = self.outputs.first_bad[-1] == 0

    def _strict(self):
        problem, plan, depth, steps = self.problem, self.plan, self.depth, self.problem.num_steps
        outputs, out = self.outputs, self.result
        out.resources = self.step_size  # what the cache may let go
        beliefs, errors = [self.vhat[0], *outputs.beliefs[1:depth], self.vhat[depth]], [None] * (depth + 1)
        # active front (fact 3): error l is there from iteration L - l + 1 on
        lowest = max(depth - max(steps, 1) + 1, 1) if plan.fresh else 1
        for l in range(lowest, depth + 1):
            errors[l] = outputs.errors[l]
        if plan.gram:
            head = self.chains[2].steps[self.heads[2]]
            beliefs[1] = self.vhat[1] - head.pullback(outputs.gram_sum)
            errors[1] = head.pullback(outputs.gram_sum_before)
        elif lowest == 1 and not steps:
            errors[1] = self.vhat[1] - beliefs[1]  # written in the feedback stage, of which there was none
        self.first_bad = outputs.first_bad[:-1]
        if self.builder is not None:
            self.builder.observe_first(self.first_bad, steps)
        self.checked = [(l, v) for l, v in enumerate(beliefs) if 0 < l < depth]
        self.checked.append((depth, errors[depth]))
        if problem.wanted.gradients:
            for l in range(1, depth + 1):
                out.add_gradients(self._gradients(l, beliefs[l - 1], errors[l]), l)
        if problem.wanted.states:
            top = None if self.starts is None else self.starts[depth]
            out.beliefs = [beliefs[0].clone(), *beliefs[1:-1], (beliefs[-1] if top is None else top).clone()]
            out.errors = self._filled(errors)

    def _gradients(self, l, below, error):
        """Updates of layer l's parameters: its input's beliefs and the local error that the kernel left."""
        chain, head = self.chains[l], self.heads[l]
        if error is None:
            return chain.zero_gradients()
        if l == 1:  # at its forward pass, where it stayed
            return chain.gradients(error)
        if head is None:
            return []
        step = chain.steps[head]
        step.at_input(Chain(chain.steps[:head]).forward(below))
        return step.gradients(self.outputs.local_errors[l])
