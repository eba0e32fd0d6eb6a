"""The correctness gate: no number comes from a contender that computes something else.

pcfast's backends are held to the rules of :mod:`pcfast.checking`, in the precision that is timed. The others are held
to the float64 reference in float64, which says that they are the same algorithm: each update within what a literal
float64 program may lose itself (:func:`pcfast.checking.bounds.allowed_update_errors`), which can be all of its digits
far from the output of a deep network. In the precision that is timed belief form loses what it loses, which the
tables show beside the time.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcfast
from pcfast.checking import checker as checking
from pcfast.checking.bounds import (
    allowed_update_errors,
    relative_error,
    same_precision_bound,
    with_forward_errors_of,
)
from pcfast.checking.report import UPDATE
from pcfast.problem.settings import Settings
from pcfast.problem.types import Wanted
from pcfast.relaxation.solve import solve

from .contenders import Contender, PreparedStep, switches
from .workloads import Workload

DRAWS = 3


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        error: largest relative error of an update in the timed precision, against float64; for the others, of the
            updates that float64 itself tells from rounding.
        bound: what ours is allowed; None for the others.
        reason: why the gate is closed; "" where it is open.
        step: what was judged, where it is a step of the whole batch: compilers need not run again.
    """

    error: float
    bound: float | None = None
    reason: str = ""
    step: PreparedStep | None = None


@dataclass(frozen=True)
class _Update:
    """A parameter's update as the float64 reference computes it.

    Attributes:
        name: the parameter's.
        value: the update.
        allowed: how far from it another float64 program may end, in Frobenius norm.
    """

    name: str
    value: Tensor
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """No larger than what may be lost: no digit of it is sure."""
        return float(self.value.norm()) <= self.allowed


def _worst(updates: Sequence[Tensor], truth: Sequence[_Update]) -> float:
    """The largest relative error, of updates that are more than rounding."""
    pairs = zip(updates, truth, strict=True)
    return max(relative_error(update, true.value) for update, true in pairs if not true.is_rounding)


class Gate:
    """Truth for one workload on a batch of ``rows``."""

    def __init__(self, workload: Workload, device: torch.device, rows: int) -> None:
        self.workload, self.device, self.rows = workload, device, rows
        self.model, self.x, self.y = workload.draw(device, rows)
        self.truths: dict[str, list[_Update]] = {}  # by method
        self._in_float64: dict[Contender, list[float]] = {}  # how far its updates are off

    def _truth(self, method: str) -> list[_Update]:
        if method not in self.truths:
            self.truths[method] = self._updates_in_float64(method)
        return self.truths[method]

    def _updates_in_float64(self, method: str) -> list[_Update]:
        w = self.workload
        num_steps = 0 if method == "exact" else w.num_steps  # exact has none to lose digits in
        model = copy.deepcopy(self.model).double()
        # incremental keeps no states; those of strict relaxation at its first parameters are as large
        settings = Settings(
            "cross_entropy", "strict" if method == "incremental" else method, w.step_size, num_steps,
            backend="reference", check="sync",
        )  # fmt: skip
        result, _ = solve(model, self.x.double(), self.y, settings, Wanted(states=True))
        updates = result.gradients
        if method == "incremental":
            updates = dict(zip(model.parameters(), self._incremental(copy.deepcopy(model)), strict=True))
        errors = [None, *result.errors[1:]]  # the input is clamped: nothing is lost there
        allowed = allowed_update_errors(model, result.beliefs, errors, updates, num_steps)
        return [_Update(name, updates[p], allowed[p]) for name, p in model.named_parameters()]

    def _incremental(self, model: nn.Sequential, kept_in: torch.dtype = torch.float64) -> list[Tensor]:
        """Updates of the reference's last iteration on ``model``, float64, whose parameters move.

        kept_in: the parameters are rounded to it whenever they have moved.
        """
        w, parameters = self.workload, list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=w.lr)
        optimizer.register_step_post_hook(
            lambda *_: torch._foreach_copy_(parameters, [p.detach().to(kept_in) for p in parameters])
        )
        pcfast.incremental_step(
            model, self.x.double(), self.y, optimizer, step_size=w.step_size, num_steps=w.num_steps,
            backend="reference", check="sync",
        )  # fmt: skip
        return [p.grad for p in parameters]

    def judge(self, contender: Contender, precision: str) -> Verdict:
        """Whether ``contender`` may be timed in ``precision``."""
        return self._ours(contender, precision) if contender.ours else self._other(contender, precision)

    def _ours(self, contender: Contender, precision: str) -> Verdict:
        w = self.workload
        if w.method == "incremental":
            return self._ours_incremental(contender, precision)
        batches = [w.draw(self.device, self.rows, seed)[1:] for seed in range(DRAWS)]
        report = checking.check(
            self.model, batches, method=w.method, step_size=w.step_size, num_steps=w.num_steps,
            backends=[contender.name], precisions=[precision],
        )  # fmt: skip
        updates = [row for row in report.rows if row.quantity.startswith(UPDATE)]
        worst = max(updates or report.rows, key=lambda row: row.error)
        if report.ok:
            return Verdict(worst.error, worst.bound)
        out = max(report.failures, key=lambda row: row.ratio)
        return Verdict(
            out.error, out.bound, f"layer {out.layer}, {out.quantity}: {out.error:.1e} > {out.bound:.1e}"
        )

    def _ours_incremental(self, contender: Contender, precision: str) -> Verdict:
        """By the same rules, which :mod:`pcfast.checking` applies to relaxations with fixed parameters alone."""
        verdict = self._other(contender, precision)
        if verdict.reason or precision == "fp64":
            return verdict
        exact, truth = self._truth("exact"), self._truth("incremental")
        with switches(precision, self.device):
            model, parameters = self.model, list(self.model.parameters())
            lost = torch.autograd.grad(F.cross_entropy(model(self.x), self.y), parameters)
            # float32 parameters lose digits whenever they move, which no backend can mend
            rounded = self._incremental(with_forward_errors_of(model, self.x), torch.float32)
        bound = same_precision_bound(_worst(lost, exact), _worst(rounded, truth))
        off = "" if verdict.error <= bound else f"an update is {verdict.error:.1e} off, more than {bound:.1e}"
        return replace(verdict, bound=bound, reason=off)

    def _other(self, contender: Contender, precision: str) -> Verdict:
        truth = self._truth("exact" if contender.exact else self.workload.method)
        off = zip(self._off_in_float64(contender, truth), truth, strict=True)
        step = self._step(contender, precision)
        error = _worst(step.updates(), truth)
        out = [(distance, true) for distance, true in off if not distance <= true.allowed]
        if not out:
            return Verdict(error, step=step if self.rows == self.workload.batch else None)
        distance, true = max(out, key=lambda pair: pair[0] / pair[1].allowed)
        return Verdict(
            error, None, f"update {true.name} is {distance:.1e} off in float64, more than {true.allowed:.1e}"
        )

    def _off_in_float64(self, contender: Contender, truth: list[_Update]) -> list[float]:
        """Distances of ``contender``'s updates in float64: the same whatever precision is timed."""
        if contender not in self._in_float64:
            result = self._step(contender, "fp64").updates()
            self._in_float64[contender] = [
                float((update - true.value).norm()) for update, true in zip(result, truth, strict=True)
            ]
        return self._in_float64[contender]

    def _step(self, contender: Contender, precision: str) -> PreparedStep:
        """``contender``'s step in ``precision``, run once."""
        model, x = copy.deepcopy(self.model), self.x
        if precision == "fp64":
            model, x = model.double(), x.double()
        with switches(precision, self.device), _wide_jax(contender, precision):
            step = contender.prepare(self.workload, model, x, self.y, precision)
            step.run()
            step.wait()
        return step


def _wide_jax(contender: Contender, precision: str):
    """float64 in jax, which rounds it to float32 unless told."""
    if contender.name != "jax" or precision != "fp64":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
