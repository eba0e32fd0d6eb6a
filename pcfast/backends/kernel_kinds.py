"""Kinds of kernels: what a qualification tests one by one, and what a plan may need several of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..precision import kernel_operands
from ..problem.plan import Plan


@dataclass(frozen=True, order=True)
class KernelKind:
    """Kernels that run or fail together.

    Attributes:
        backend: whose. name: one of the backend's ``kind_names``.
        precision: of products: "ieee", "tf32" or "bf16"; "fp64" for the CPU's build alone.
    """

    backend: str
    name: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} {self.name} in {self.precision}"


def at_precisions(backend: str, names: Iterable[str], plan: Plan) -> frozenset[KernelKind]:
    """``names`` at each precision of the plan's products; call it inside the plan's numerics.

    Where torch's switches for linear layers and convolutions differ, every kind is needed at both: layers without a
    product write what the products of both read.
    """
    if plan.precision.state == torch.float64:
        precisions = {"fp64"}
    else:
        operands = kernel_operands(plan.device, plan.precision)
        precisions = {operands.linear, operands.convolution}
    return frozenset(KernelKind(backend, name, precision) for name in names for precision in precisions)
