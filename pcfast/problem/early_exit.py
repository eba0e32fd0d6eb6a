"""Early exit of strict relaxation: the first iteration that finds the energy at rest is the last.

    F(t): the energies that iteration t finds, summed over layers
    last iteration: the first t >= max(2, L) with |F(t) - F(t-1)| <= tolerance |F(t-1)|, or n

It still moves beliefs, so the result is that of num_steps = t. Not before iteration L, when errors from a
forward-pass start first reach layer 1: an early stop would leave lower layers without any update.

In a DistributedDataParallel F(t) is the sum over its processes: their relaxations are parts of one, and end together.
"""

from __future__ import annotations

import math
import numbers

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import ArgumentError, ArgumentTypeError


def checked(tolerance, method: str) -> float | None:
    """``tolerance`` as a finite float >= 0, or None.

    Raises:
        ArgumentTypeError, ArgumentError: it is neither, or ``method`` has no loop that could end early.
    """
    if tolerance is None:
        return None
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        given = f"{tolerance!r} ({type(tolerance).__name__})"
        raise ArgumentTypeError("tolerance", given, "a number >= 0, or None")
    if not 0 <= tolerance < math.inf:
        raise ArgumentError("tolerance", repr(tolerance), "a finite number >= 0, or None")
    if method != "strict":
        raise ArgumentError(
            "tolerance", f"{tolerance} with method {method!r}", 'None, or method="strict"',
            "Only strict relaxation looks at its energy in every iteration.",
        )  # fmt: skip
    return float(tolerance)


def deciding() -> dist.ProcessGroup | None:
    """The processes of the DistributedDataParallel that is being called; None where this one decides alone."""
    parallel = DistributedDataParallel._get_active_ddp_module()
    if parallel is None or parallel.process_group.size() == 1:
        return None
    return parallel.process_group


class EarlyExit:
    """Decides where the energies are, without waiting for that device.

    Attributes:
        going: 0-dim bool: the next iteration runs.
        iterations: 0-dim int64: those that ran.
        earliest: the first iteration that may be the last.
    """

    def __init__(self, tolerance: float, depth: int, device: torch.device) -> None:
        self.earliest = max(2, depth)
        self.going = torch.ones((), dtype=torch.bool, device=device)
        self.iterations = torch.zeros((), dtype=torch.int64, device=device)
        self._tolerance, self._group = tolerance, deciding()
        self._before: Tensor | None = None

    def see(self, iteration: int, energies: Tensor) -> None:
        """Note what ``iteration`` = 1, 2, ... found: (L,). NaN is never at rest."""
        total = energies.sum(dtype=torch.float64)
        if self._group is not None:  # gathered, and added up in one order: all decide by the same bits
            parts = [torch.empty_like(total) for _ in range(self._group.size())]
            dist.all_gather(parts, total, group=self._group)
            total = torch.stack(parts).sum()
        self.iterations = self.iterations + self.going
        if iteration >= self.earliest:
            at_rest = (total - self._before).abs() <= self._tolerance * self._before.abs()
            self.going = self.going & ~at_rest
        self._before = total


def repeated(rows: list[Tensor], count: int) -> list[Tensor]:
    """``rows``, the last one repeated until there are ``count``."""
    return rows + rows[-1:] * (count - len(rows))
