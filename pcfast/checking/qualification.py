"""The children's side of a qualification: tests kinds of kernels one after another, and says so as it goes.

pcfast/backends/qualification/run.py starts this, and takes a crash or an endless kernel for the verdict on the kind
whose test had begun.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import astuple

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..backends.kernel_backend import KernelBackend
from ..backends.kernel_kinds import KernelKind
from ..backends.qualification.record import FAILED, QUALIFIED, UNTESTED
from ..backends.triton import config_cache
from ..backends.triton.configs import NONE, Choices, ConvolutionKey
from ..precision import numerics, use_precision
from ..problem.belief_optimizers import GradientDescent
from ..problem.plan import Plan
from ..problem.settings import Settings
from ..problem.types import Outcome, Wanted
from ..relaxation import cuda_graphs
from ..relaxation.solve import prepare, solve
from ..support.timing import reason_of
from .cases import CASES, Case
from .checker import check, default_precisions
from .copies import random_batches

NUM_STEPS, STEP_SIZE = 6, 0.1
#: Batches that one bound is made of: a GPU does more in no time, interpreted kernels do not.
DRAWS = {"cuda": 5, "cpu": 1}
#: A first run, one that records a CUDA graph, one that replays it.
_REPEATS = 3


class _WrongResult(Exception):
    """A kind of kernels that ran, and gave what it should not."""


class _FailedRun(Exception):
    """A kind of kernels that raised."""


def kinds_on(device: torch.device) -> tuple[list[KernelKind], dict[str, str]]:
    """The kinds to test on a device, and why those of some backends are not."""
    names: list[tuple[str, str]] = []
    unavailable = {}
    for backend in BACKENDS.values():
        if isinstance(backend, KernelBackend):
            reason = backend.unavailable(device)
            if reason:
                unavailable[backend.name] = reason
            else:
                names += [(backend.name, name) for name in backend.kind_names]
    precisions = [name for name in default_precisions(device) if name != "fp64"]
    return [KernelKind(*name, precision) for precision in precisions for name in names], unavailable


def check_kind(kind: KernelKind, device: torch.device) -> None:
    """Raise what is wrong with a kind of kernels."""
    for case in CASES[kind.backend, kind.name]:
        if case.large and device.type != "cuda":
            continue
        torch.manual_seed(0)
        model = case.model().to(device)
        with config_cache.using(_forced(kind, case, model, device)):
            _check_bounds(kind, case, model, device)
            _check_bits(kind, case, model, device)
        cuda_graphs.CACHE.clear()  # those hold the launches of these choices
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _settings(kind: KernelKind, case: Case) -> Settings:
    return Settings(
        case.loss, "strict", STEP_SIZE, NUM_STEPS, _optimizer(case), backend=kind.backend, vinit=case.vinit,
        check="sync",
    )  # fmt: skip


def _optimizer(case: Case) -> GradientDescent | None:
    return GradientDescent(momentum=case.momentum) if case.momentum else None


def _batch(case: Case, model: nn.Sequential, device: torch.device) -> tuple[Tensor, Tensor]:
    ((x, y),) = random_batches(model, (case.batch, *case.sample), loss=case.loss, draws=1)
    return x.to(device), y.to(device)


def _forced(kind: KernelKind, case: Case, model: nn.Sequential, device: torch.device) -> Choices:
    """Choices by which the triton backend runs what the case is for.

    Raises:
        _WrongResult: what it is for does not run all the same.
    """
    x, y = _batch(case, model, device)
    with use_precision(kind.precision, device), config_cache.using(NONE):
        _, planned = prepare(model, x, y, _settings(kind, case))
        forced = _choices(case, planned) if kind.backend == "triton" else NONE
    with config_cache.using(forced):
        if kind not in BACKENDS[kind.backend].kernel_kinds(planned):
            raise _WrongResult(f"nothing here runs {kind}")
    return forced


def _choices(case: Case, planned: Plan) -> Choices:
    from ..backends.triton.conv_form import conv_form
    from ..backends.triton.designs import design_of

    with numerics(planned.device, planned.precision):
        design = design_of(planned)
    entries = {} if design.loop is None else {design.loop: case.loop}
    for layer in planned.network.layers[1:]:
        form = conv_form(design.forms[layer.index], layer, design.boundaries[layer.index - 1])
        if form is not None:
            entries[ConvolutionKey(design.target.convolutions, astuple(form.geometry))] = case.convolutions
    return Choices(entries)


def _check_bounds(kind: KernelKind, case: Case, model: nn.Sequential, device: torch.device) -> None:
    """Against the reference in float64, by the bounds of ``pcfast check``."""
    report = check(
        model, (case.batch, *case.sample), loss=case.loss, step_size=STEP_SIZE, num_steps=NUM_STEPS,
        belief_optimizer=_optimizer(case), vinit=case.vinit, backends=[kind.backend], precisions=[kind.precision],
        device=device, draws=DRAWS[device.type],
    )  # fmt: skip
    if not report.ok:
        row = max(report.failures, key=lambda row: row.ratio)
        raise _FailedRun(row.message) if row.message else _WrongResult(row.words)


def _check_bits(kind: KernelKind, case: Case, model: nn.Sequential, device: torch.device) -> None:
    """Repeated runs give the same bits."""
    x, y = _batch(case, model, device)
    with use_precision(kind.precision, device):
        runs = [
            _tensors(model, solve(model, x, y, _settings(kind, case), Wanted(states=True))[0])
            for _ in range(_REPEATS if device.type == "cuda" else 2)
        ]
    for name, first in runs[0].items():
        if any(not torch.equal(first, run[name]) for run in runs[1:]):
            raise _WrongResult(f"{name} has other bits when the same relaxation runs again")


def _tensors(model: nn.Sequential, outcome: Outcome) -> dict[str, Tensor]:
    states = {"belief": outcome.beliefs, "error": outcome.errors}
    result = {f"{name} {l}": value for name, values in states.items() for l, value in enumerate(values)}
    result |= {f"update {name}": outcome.gradients.get(p) for name, p in model.named_parameters()}
    return {name: value for name, value in result.items() if value is not None} | {"loss": outcome.loss}


def main() -> None:
    """Test the kinds that are not left out; arguments as run.py gives them."""
    device, writer, left_out = torch.device(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    done = {KernelKind(*kind) for kind in left_out}

    def say(**message) -> None:
        os.write(writer, json.dumps(message).encode() + b"\n")

    kinds, unavailable = kinds_on(device)
    say(kinds=[astuple(kind) for kind in kinds], unavailable=unavailable)
    for kind in kinds:
        if kind in done:
            continue
        say(begin=astuple(kind))
        try:
            check_kind(kind, device)
        except _WrongResult as wrong:
            say(verdict=(FAILED, str(wrong)))
        except (
            torch.OutOfMemoryError
        ) as failure:  # others use the device: this says nothing about the kernels
            say(verdict=(UNTESTED, reason_of(failure)))
            return
        except Exception as failure:
            # it may have broken the device's context: the next kind needs another process
            say(verdict=(FAILED, str(failure) if isinstance(failure, _FailedRun) else reason_of(failure)))
            return
        else:
            say(verdict=(QUALIFIED, ""))
    say(end=True)
