"""What backends share whose loop runs in kernels."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ..deviation import Chain
from ..deviation.affine import Conv2dStep, LinearStep
from ..errors import RelaxationDiverged
from ..model.spec import Elementwise, Network, Opaque, Residual
from ..precision import numerics
from ..problem.plan import LOOPS, Plan
from ..problem.types import Problem, Request
from .base import on_device, without_closed_form
from .eager.run import Eager, Run


def without_kernels(request: Request) -> str:
    """Which of a request's settings the kernels of strict relaxation do not know; "" where they know all."""
    if request.method != "strict":
        if request.method in LOOPS:
            return f"its kernels relax strict predictive coding, not {request.method}: use eager"
        return without_closed_form(request)
    optimizer = request.belief_optimizer
    if not optimizer.linear:
        return f"its kernels move beliefs by gradient descent without weight decay, not by {optimizer}: use eager"
    if optimizer.nesterov:
        return "its kernels know no Nesterov momentum: use eager"
    if request.nudging is not None:
        return "its kernels take no nudged target: use eager"
    if request.tolerance is not None:
        return "its kernels run all iterations, whatever the tolerance: use eager"
    if request.belief_gradients:
        return "its kernels do not record the beliefs' gradients: use eager"
    return ""


def unknown_to_kernels(network: Network) -> str:
    """The first layer that no kernel runs, and why; "" where there is none."""
    for layer in network.layers:
        for op in layer.ops:
            if isinstance(op, Opaque):
                return f"{layer.label}: {op.why}"
            if isinstance(op, Residual):
                return f"{layer.label}: no kernel adds a skip: use eager"
            if isinstance(op, Elementwise) and not op.activation.in_kernels:
                return f"{layer.label}: no kernel has {op.name}: use eager"
    return ""


class KernelBackend(Eager):
    """Runs strict relaxation in kernels and, as eager, what has no loop."""

    @abstractmethod
    def relaxation(self, problem: Problem, plan: Plan) -> KernelRun:
        """One strict relaxation, ready to run. Called, and run, inside its numerics."""

    @abstractmethod
    def words(self, plan: Plan, network: Network, device: torch.device) -> list[str]:
        """As :meth:`describe`, for strict relaxation; called inside its numerics."""

    def run(self, problem, plan):
        if problem.method != "strict" or problem.network.depth == 1:
            return super().run(problem, plan)
        device = problem.x.device
        # kernels start on the current device, whatever device the tensors are on
        with numerics(device, plan.precision), on_device(device):
            return self.relaxation(problem, plan).outcome()

    def describe(self, plan, network, device):
        if plan.method != "strict" or network.depth == 1:
            return ["no loop: one forward and one backward pass through torch"]
        with numerics(device, plan.precision):
            return self.words(plan, network, device)


def first_product(chain: Chain) -> int | None:
    """Index of the first linear layer or convolution among the chain's steps, or None."""
    return next((i for i, step in enumerate(chain.steps) if isinstance(step, LinearStep | Conv2dStep)), None)


class KernelRun(Run):
    """One strict relaxation.

    Attributes:
        first_bad: (L-1,) or longer, int32: the iteration whose update left v_l NaN or infinite.
    """

    first_bad: Tensor

    def _locate(self):
        found = min((t, l) for l, t in enumerate(self.first_bad.tolist(), start=1))
        if found[0] <= self.problem.num_steps:
            raise RelaxationDiverged(found[0], found[1], self.problem.step_size)
