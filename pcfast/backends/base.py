"""What every backend is."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..model.spec import Network
from ..precision import Precision
from ..problem.plan import Plan
from ..problem.types import Outcome, Problem
from .kernel_kinds import KernelKind


def on_device(device: torch.device):
    """Makes ``device`` CUDA's current one, where kernels start whatever device their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def without_closed_form(plan: Plan) -> str:
    """Why one backward pass does not give the updates of fixed prediction; "" where it does, or for other methods."""
    optimizer = plan.belief_optimizer
    if plan.method != "fixed_prediction" or optimizer.linear:
        return ""
    return f"fixed prediction has no closed form with {optimizer}: only the literal loop computes it"


class Backend(ABC):
    """Runs a planned relaxation. Nothing outside backends/ knows a backend by name."""

    name: str
    #: True where the loop runs as published, without the short cuts that a plan describes.
    literal = False

    @abstractmethod
    def supports(self, plan: Plan) -> tuple[bool, str]:
        """``(ok, reason)``: whether this backend can run a plan; the reason is "" where it can."""

    def automatic(self, device: torch.device) -> tuple[bool, str]:
        """``(ok, reason)``: whether ``backend="auto"`` may choose this backend on a device."""
        return True, ""

    def kernel_kinds(self, plan: Plan) -> frozenset[KernelKind]:
        """The kinds of its own kernels that a plan needs; "auto" takes them where all are qualified."""
        return frozenset()

    def describe(self, plan: Plan) -> list[str]:
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
