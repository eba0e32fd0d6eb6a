"""What every backend is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..network import Network, Opaque, Residual
from ..planning import LOOPS, Plan
from ..precision import Precision
from ..problem import Outcome, Problem, Request


def on_device(device: torch.device):
    """Makes ``device`` CUDA's current one, where kernels start whatever device their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def without_closed_form(request: Request) -> str:
    """Why one backward pass does not give the updates of fixed prediction; "" where it does, or for other methods."""
    optimizer = request.belief_optimizer
    if request.method != "fixed_prediction" or optimizer.linear:
        return ""
    return f"fixed prediction has no closed form with {optimizer}: only the literal loop computes it"


def without_kernels(request: Request, *, momentum: bool = False) -> str:
    """Which of a request's settings the kernels of strict relaxation do not know; "" where they know all.

    Args:
        momentum: they move beliefs with momentum, and by schedules of step sizes.
    """
    if request.method != "strict":
        if request.method in LOOPS:
            return f"its kernels relax strict predictive coding, not {request.method}: use eager"
        return without_closed_form(request)
    optimizer = request.belief_optimizer
    if not optimizer.plain and not (momentum and optimizer.linear):
        known = "gradient descent without weight decay" if momentum else "plain gradient descent"
        return f"its kernels move beliefs by {known}, not by {optimizer}: use eager"
    if request.schedule and not momentum:
        return "its kernels take one step size for all iterations, not a schedule: use eager"
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
    return ""


class Backend(ABC):
    """Runs a planned relaxation. Nothing outside backends/ knows a backend by name."""

    name: str
    #: True where the loop runs as published, without the short cuts that a plan describes.
    literal = False

    @abstractmethod
    def supports(self, request: Request) -> tuple[bool, str]:
        """``(ok, reason)``: whether this backend can run what is asked for; the reason is "" where it can."""

    def automatic(self, device: torch.device) -> tuple[bool, str]:
        """``(ok, reason)``: whether ``backend="auto"`` may choose this backend on a device."""
        return True, ""

    def describe(self, plan: Plan, network: Network, device: torch.device) -> list[str]:
        """Lines for :func:`pcfast.explain`: what runs each layer, and why."""
        return []

    def replays(self, problem: Problem, plan: Plan) -> tuple[bool, str]:
        """``(ok, reason)``: whether :meth:`run` may be captured in a CUDA graph."""
        return False, f"the {self.name} backend is not captured"

    @abstractmethod
    def updates(
        self,
        model: nn.Sequential,
        network: Network,
        precision: Precision,
        x: Tensor,
        beliefs: list[Tensor] | None,
        errors: list[Tensor],
    ) -> dict[nn.Parameter, Tensor]:
        """Parameter updates from given beliefs (None: a forward pass from x) and errors."""

    @abstractmethod
    def run(self, problem: Problem, plan: Plan) -> Outcome:
        """Run the relaxation under no_grad. Never touches ``.grad``."""
