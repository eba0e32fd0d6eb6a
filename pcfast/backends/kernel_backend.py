"""What backends share whose loop runs in kernels."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..deviation import Chain
from ..deviation.affine import Conv2dStep, LinearStep
from ..errors import RelaxationDiverged
from ..model.spec import Elementwise, Network, Opaque, Residual, leaves
from ..precision import numerics
from ..problem.belief_optimizers import StepSize
from ..problem.plan import LOOPS, Plan
from ..problem.types import Outcome, Problem
from .base import Backend, on_device, without_closed_form
from .eager import backend as eager
from .forward import Chains, layer_chains, undone_on_failure
from .kernel_kinds import at_precisions

#: Types of devices on which "auto" considers kernels. Elsewhere they are interpreted or compiled for tests.
AUTOMATIC_DEVICES = ("cuda",)


def without_kernels(plan: Plan) -> str:
    """Which of a plan's settings the kernels of strict relaxation do not know; "" where they know all."""
    if plan.method != "strict":
        if plan.method in LOOPS:
            return f"its kernels relax strict predictive coding, not {plan.method}: use eager"
        return without_closed_form(plan)
    optimizer = plan.belief_optimizer
    if not optimizer.linear:
        return f"its kernels move beliefs by gradient descent without weight decay, not by {optimizer}: use eager"
    if optimizer.nesterov:
        return "its kernels know no Nesterov momentum: use eager"
    if plan.nudging is not None:
        return "its kernels take no nudged target: use eager"
    if plan.tolerance is not None:
        return "its kernels run all iterations, whatever the tolerance: use eager"
    if plan.wanted.belief_gradients:
        return "its kernels do not record the beliefs' gradients: use eager"
    return ""


def unknown_to_kernels(network: Network, *, skips: bool = False) -> str:
    """The first layer that no kernel runs, and why; "" where there is none. skips: they run residual layers."""
    for layer in network.layers:
        for op in leaves(layer.ops) if skips else layer.ops:
            if isinstance(op, Opaque):
                return f"{layer.label}: {op.why}"
            if isinstance(op, Residual):  # of which leaves() has the inside
                return f"{layer.label}: no kernel adds a skip: use eager"
            if isinstance(op, Elementwise) and not op.activation.in_kernels:
                return f"{layer.label}: no kernel has {op.name}: use eager"
    return ""


class KernelBackend(Backend):
    """Runs strict relaxation in kernels and, as eager, what has no loop."""

    #: Names of its kinds of kernels, in the order in which they are tested.
    kind_names: tuple[str, ...]

    @abstractmethod
    def unavailable(self, device: torch.device) -> str:
        """Why no kernel runs on a device, whatever the plan; "" where they run."""

    @abstractmethod
    def kinds(self, plan: Plan) -> set[str]:
        """Which of :attr:`kind_names` strict relaxation by a plan needs; called inside its numerics."""

    def kernel_kinds(self, plan):
        if not _in_kernels(plan):
            return frozenset()
        with numerics(plan.device, plan.precision):
            return at_precisions(self.name, self.kinds(plan), plan)

    def automatic(self, device):
        if device.type in AUTOMATIC_DEVICES or self.unavailable(device):
            return True, ""  # supports says why it is not available
        return False, "its kernels run on the CPU for tests alone: ask for it by name"

    @abstractmethod
    def relax(self, problem: Problem, plan: Plan, chains: Chains) -> Outcome:
        """One strict relaxation; called inside its numerics."""

    @abstractmethod
    def words(self, plan: Plan) -> list[str]:
        """As :meth:`describe`, for strict relaxation; called inside its numerics."""

    def run(self, problem, plan):
        if not _in_kernels(plan):
            return eager.run(problem, plan)
        # kernels start on the current device, whatever device the tensors are on
        with numerics(plan.device, plan.precision), on_device(plan.device):
            chains = layer_chains(problem, plan)
            with undone_on_failure(chains):
                return self.relax(problem, plan, chains)

    def replays(self, problem, plan):
        return eager.replays(problem, plan)

    def updates(self, model, network, precision, x, beliefs, errors):
        return eager.updates(model, network, precision, x, beliefs, errors)

    def describe(self, plan):
        if not _in_kernels(plan):
            return ["no loop: one forward and one backward pass through torch"]
        with numerics(plan.device, plan.precision):
            return self.words(plan)


def _in_kernels(plan: Plan) -> bool:
    return plan.method == "strict" and plan.depth > 1


def first_product(chain: Chain) -> int | None:
    """Index of the first linear layer or convolution among the chain's steps, or None."""
    return next((i for i, step in enumerate(chain.steps) if isinstance(step, LinearStep | Conv2dStep)), None)


def raise_first_bad(first_bad: Tensor, num_steps: int, step_size: StepSize) -> None:
    """Raise where a kernel's record says that values first were not finite.

    Args:
        first_bad: (L-1,), int32: the iteration whose update left v_l NaN or infinite, larger than ``num_steps`` where
            none did.
    """
    iteration, layer = min((t, l) for l, t in enumerate(first_bad.tolist(), start=1))
    if iteration <= num_steps:
        raise RelaxationDiverged(iteration, layer, step_size)
