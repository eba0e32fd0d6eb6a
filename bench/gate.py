"""The correctness gate: no number comes from a contender that computes something else.

pcfast's backends are held to the rules of :mod:`pcfast.checking`, in the precision that is timed. The others are held
to the float64 reference in float64, which says that they are the same algorithm; in the precision that is timed
belief form loses what it loses, which the tables show beside the time.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor

import pcfast
from pcfast import checking
from pcfast.accuracy import relative_error

from .contenders import Contender, switches
from .workloads import Workload

SAME_ALGORITHM = 1e-8  # allowed relative error of a baseline's updates in float64
DRAWS = 3


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        error: largest relative error of an update in the timed precision, against float64.
        bound: what ours is allowed; None for the others.
        reason: why the gate is closed; "" where it is open.
    """

    error: float
    bound: float | None = None
    reason: str = ""


class Gate:
    """Truth for one workload on a batch of ``rows``."""

    def __init__(self, workload: Workload, device: torch.device, rows: int) -> None:
        self.workload, self.device, self.rows = workload, device, rows
        self.model, self.x, self.y = workload.draw(device, rows)
        self.truths: dict[str, list[Tensor]] = {}  # by method

    def _truth(self, method: str) -> list[Tensor]:
        if method not in self.truths:
            self.truths[method] = self._updates_in_float64(method)
        return self.truths[method]

    def _updates_in_float64(self, method: str) -> list[Tensor]:
        w = self.workload
        model = copy.deepcopy(self.model).double()
        pcfast.pc_loss(
            model, self.x.double(), self.y, method=method, step_size=w.step_size, num_steps=w.num_steps,
            backend="reference",
        ).backward()  # fmt: skip
        return [p.grad for p in model.parameters()]

    def judge(self, contender: Contender, precision: str) -> Verdict:
        """Whether ``contender`` may be timed in ``precision``."""
        return self._ours(contender, precision) if contender.ours else self._other(contender, precision)

    def _ours(self, contender: Contender, precision: str) -> Verdict:
        w = self.workload
        batches = [w.draw(self.device, self.rows, seed)[1:] for seed in range(DRAWS)]
        report = checking.check(
            self.model, batches, method=w.method, step_size=w.step_size, num_steps=w.num_steps,
            backends=[contender.name], precisions=[precision],
        )  # fmt: skip
        updates = [row for row in report.rows if row.quantity.startswith(checking.UPDATE)]
        worst = max(updates or report.rows, key=lambda row: row.error)
        if report.ok:
            return Verdict(worst.error, worst.bound)
        out = max(report.failures, key=lambda row: row.ratio)
        return Verdict(
            out.error, out.bound, f"layer {out.layer}, {out.quantity}: {out.error:.1e} > {out.bound:.1e}"
        )

    def _other(self, contender: Contender, precision: str) -> Verdict:
        exactly = self._error(contender, "fp64")
        error = self._error(contender, precision)
        if not exactly <= SAME_ALGORITHM:
            return Verdict(error, None, f"its updates are {exactly:.1e} off in float64")
        return Verdict(error)

    def _error(self, contender: Contender, precision: str) -> float:
        model, x = copy.deepcopy(self.model), self.x
        if precision == "fp64":
            model, x = model.double(), x.double()
        with switches(precision, self.device), _wide_jax(contender, precision):
            step = contender.prepare(self.workload, model, x, self.y, precision)
            step.run()
            step.wait()
            found = step.updates()
            truth = self._truth("exact" if contender.exact else self.workload.method)
            return max(map(relative_error, found, truth))


def _wide_jax(contender: Contender, precision: str):
    """float64 in jax, which rounds it to float32 unless told."""
    if contender.name != "jax" or precision != "fp64":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
