"""The resident tier: strict relaxation of small networks in one launch of a CUDA kernel (csrc/, resident/).

exact and fixed_prediction have no loop: they are a forward and a backward pass through cuBLAS and cuDNN, as in eager.
"""

from __future__ import annotations

import torch

from .. import constants, native
from ..deviation import Chain
from ..planning import choose_gram
from ..precision import choose_precision, numerics
from ..resident.placement import Chip, Placement, place
from .base import on_device
from .eager import Eager
from .kernel_run import KernelRun

_LEAST_CAPABILITY = (8, 0)


class Cuda(Eager):
    name = "cuda"

    def automatic(self, device):
        if device.type == "cuda":
            return False, "it has not been measured on a GPU yet: ask for it by name"
        return False, "it needs a CUDA device"

    def supports(self, request):
        reason = _unavailable(request.device)
        if reason:
            return False, reason
        if request.dtype not in (torch.float32, torch.float64 if native.on_host() else torch.float32):
            return False, f"its kernels compute in float32, not {request.dtype}: use eager"
        precision = choose_precision(request.device.type, request.dtype)
        if precision.operand != precision.state:
            return False, f"its products read float32, not {precision.operand}: use triton or eager"
        network = request.network
        if network.opaque:
            op = network.opaque[0]
            layer = next(layer for layer in network.layers if op in layer.ops)
            return False, f"{layer.label}: {op.why}"
        if request.x_shape is None or request.method != "strict" or network.depth == 1:
            return True, ""
        if request.energies:
            return False, "energies need every iteration's errors, which stay on chip"
        if request.loss not in ("cross_entropy", "mse"):
            return (
                False,
                "its kernel evaluates cross-entropy and mse, and torch cannot inside a launch",
            )
        shapes = network.shapes(request.x_shape)
        gram, _ = choose_gram(
            network, shapes, request.method, request.num_steps, request.fresh, request.energies
        )
        found = _place(network, shapes, gram, request.loss, precision, request.device)
        return (False, found) if isinstance(found, str) else (True, "")

    def run(self, problem, plan):
        if problem.method != "strict" or problem.network.depth == 1:
            return super().run(problem, plan)
        device = problem.x.device
        with numerics(device, plan.precision), on_device(device):
            return _Run(problem, plan).outcome()

    def describe(self, plan, network, device):
        if plan.method != "strict" or network.depth == 1:
            return ["no loop: one forward and one backward pass through torch"]
        from ..resident.words import describe

        placed = _place(network, plan.shapes, plan.gram, "cross_entropy", plan.precision, device)
        return describe(network, placed, constants.load())


def _unavailable(device: torch.device) -> str:
    """Why the kernel cannot run on a device; "" where it can."""
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
    if capability < _LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
    return ""


def _chip(device: torch.device, scalar_bytes: int) -> Chip:
    known = constants.load()
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Chip(
            found.multi_processor_count,
            found.shared_memory_per_block_optin,
            found.shared_memory_per_multiprocessor,
        )
    # doubles, which only the CPU's build has, are placed as floats would be
    scale = scalar_bytes // torch.float32.itemsize
    return Chip(
        known.sm_count, scale * known.shared_memory_per_block_bytes, scale * known.shared_memory_per_sm_bytes
    )


def _place(network, shapes, gram: bool, loss: str, precision, device: torch.device) -> Placement | str:
    return place(
        network, shapes, gram, loss, precision.state.itemsize, _chip(device, precision.state.itemsize)
    )


class _Run(KernelRun):
    """One strict relaxation."""

    def arguments(self):
        """Placement and inputs of the loop, of :mod:`pcfast.resident.loop`, after the forward pass."""
        from ..resident.loop import Inputs

        problem, plan, depth = self.problem, self.plan, self.depth
        placed = _place(
            problem.network, plan.shapes, plan.gram, problem.loss.kind, self.precision, problem.x.device
        )
        weights = [None, None, *(self._weight(l) for l in range(2, depth + 1))]
        # a layer without a product has what it reads in that place
        around = zip(self.pre_activations, [None, *self.vhat[:-1]], strict=True)
        uhat = [below if product is None else product for product, below in around]
        return placed, Inputs(weights, [None, None, *uhat[2:]], self.vhat, self._starts(), self.target)

    def _relax(self, observe):
        from ..resident.loop import relax

        problem, plan, depth, steps = self.problem, self.plan, self.depth, self.problem.num_steps
        found = relax(*self.arguments(), steps, problem.step_size, gradients=problem.wanted.gradients)
        self.local_errors = found.local_errors
        # from a forward pass on, belief l moves from iteration L - l on, and error l is there one later (fact 3)
        for l in range(max(depth - steps, 1) if plan.fresh else 1, depth):
            if l == 1 and plan.gram:
                self.links[1].adopt(None, found.gram_sum, found.gram_sum_before)
            else:
                self.links[l].adopt(found.d[l])
        errors = [None] * (depth + 1)
        for l in range(max(depth - max(steps, 1) + 1, 1) if plan.fresh else 1, depth + 1):
            if not (l == 1 and plan.gram):
                errors[l] = found.errors[l] if steps or l > 1 else found.d[1].neg()
        self.first_bad = found.first_bad
        if self.builder is not None:
            self.builder.observe_first(self.first_bad[: depth - 1], steps)
        return errors

    def _weight(self, l: int) -> torch.Tensor | None:
        if l == 2 and self.plan.gram:
            return self.links[1].gram
        head = self.heads[l]
        return None if head is None else self.chains[l].steps[head].weight

    def _settle(self):
        # the kernel has evaluated masks and arg-maxima at the last beliefs: only inputs of products are left
        for l, link in enumerate(self.links):
            if link is None or not link.moved:
                continue
            if l == 1 and self.plan.gram:
                link.find_beliefs()
            head = self.heads[l + 1]
            if head is not None:
                Chain(self.chains[l + 1].steps[: head + 1]).at(link.d)

    def _gradients(self, l, error):
        head = self.heads[l]
        if l == 1 or head is None:
            return super()._gradients(l, error)
        return self.chains[l].steps[head].gradients(self.local_errors[l])
