"""A run of microbenchmarks: gate, graphs, turns, and rows for the record."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Sequence
from itertools import chain, zip_longest

import torch
from torch import nn

from pcfast.backends import BACKENDS
from pcfast.errors import BackendError
from pcfast.model.describe import describe
from pcfast.precision import choose_precision, numerics
from pcfast.problem.plan import plan

from .. import measure
from ..contenders import PreparedStep, graphed, switches
from ..floor import floor_of
from .case import TORCH_PRECISION, Case, Way, torch_precision
from .rounding import Judgement

#: Launches of one CUDA graph: what lies between two launches counts, as it does in a relaxation.
LAUNCHES = 20
#: Sizes of every kernel in a quick run.
QUICK_SIZES = 2

OUT_OF_TIME = "out of time"

Progress = Callable[[int, int, str], None]
Keep = Callable[[dict[str, dict], list[dict]], None]


def unable(device: torch.device) -> dict[str, str]:
    """Backend with kernels -> why they cannot run on ``device``, "" where they can.

    On a CPU those of triton are interpreted, and those of cuda compiled for it: only small sizes then, and times that
    say nothing.

    Raises:
        BackendError: none can.
    """
    with torch.device("meta"):
        network = describe(nn.Sequential(nn.Linear(1, 1)))
    planned = plan(network, device, torch.float32, (1, 1), choose_precision(device.type, torch.float32))
    result = {name: BACKENDS[name].supports(planned)[1] for name in ("cuda", "triton")}
    if all(result.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in result.items())
        raise BackendError(
            f"--kernels times the cuda and triton backends' kernels, and none runs on {device}: {reasons}"
        )
    return result


def chosen_cases(
    precisions: Sequence[str], backends: Collection[str], small: bool, quick: bool
) -> list[Case]:
    """Those that serve some of torch's ``precisions``, for each kernel what matters most first.

    Kernels take turns: a run that has to stop early has what matters most of all.

    Args:
        backends: whose kernels. small: sizes that say nothing, for a CPU.
    """
    modules = []
    if "cuda" in backends:
        from . import resident

        modules.append(resident)
    if "triton" in backends:
        from . import conv, linear, pointwise, relaxation

        modules += [conv, relaxation, linear, pointwise]
    by_kernel: dict[str, list[Case]] = {}
    for module in modules:
        for case in module.cases(small):
            if TORCH_PRECISION[case.precision] in precisions:
                by_kernel.setdefault(case.kernel, []).append(case)
    if quick:
        sizes = {kernel: list(dict.fromkeys(c.size for c in cases)) for kernel, cases in by_kernel.items()}
        by_kernel = {
            kernel: [case for case in cases if case.size in sizes[kernel][:QUICK_SIZES]]
            for kernel, cases in by_kernel.items()
        }
    return [case for cases in zip_longest(*by_kernel.values()) for case in cases if case is not None]


def absent(backend: str, reason: str) -> dict:
    """A row in the place of all cases of a backend whose kernels cannot run."""
    names = dict.fromkeys(("size", "precision", "way", "tiles"), "")
    return {"kernel": f"those of {backend}", **names, "status": "skipped", "reason": reason}


def run(
    cases: Sequence[Case],
    device: torch.device,
    *,
    quick: bool = False,
    seconds: float = math.inf,
    progress: Progress = lambda done, total, what: None,
    keep: Keep = lambda ceilings, rows: None,
) -> tuple[dict[str, dict], list[dict]]:
    """Time ``cases``; ``seconds``: stop cleanly after about so long; ``keep`` gets the result after every case.

    Returns:
        Ceilings by precision, and a row for each way of each case: see :func:`_row`. Times are in seconds.
    """
    deadline = time.monotonic() + seconds
    ceilings = ceilings_of({case.precision for case in cases}, device, quick)
    rows = [[_row(case, ceilings, reason=OUT_OF_TIME)] for case in cases]
    for done, case in enumerate(cases):
        progress(done, len(cases), f"{case.kernel} in {case.precision}, {case.size}")
        keep(ceilings, list(chain.from_iterable(rows)))
        if time.monotonic() >= deadline:
            break
        rows[done] = _timed(case, ceilings, device, quick, deadline)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    progress(len(cases), len(cases), "done")
    return ceilings, list(chain.from_iterable(rows))


def ceilings_of(precisions: set[str], device: torch.device, quick: bool) -> dict[str, dict]:
    """Rates of this machine for each of the kernels' precisions."""
    by_name = {}
    for name in sorted({torch_precision(precision, device) for precision in precisions | {"tf32"}}):
        by_name[name] = measure.ceilings(name, device, quick)
    result = {precision: dict(by_name[torch_precision(precision, device)]) for precision in precisions}
    if "tf32x3" in result:  # three TF32 products for one
        tf32 = by_name[torch_precision("tf32", device)]["multiply_adds_per_s"]
        result["tf32x3"]["multiply_adds_per_s"] = tf32 / 3
    return result


def _timed(case: Case, ceilings: dict, device: torch.device, quick: bool, deadline: float) -> list[dict]:
    precision = torch_precision(case.precision, device)
    launches = LAUNCHES if device.type == "cuda" else 1
    steps: list[tuple[str, PreparedStep]] = []
    try:
        reason = why_left_out(case, device)
        if reason:
            return [_row(case, ceilings, reason=reason)]
        ways = ways_of(case, device)
    except Exception as error:  # of memory, say: the other cases go on
        return [_row(case, ceilings, reason=_failure(error))]
    rows = {way.label: _row(case, ceilings, way) for way in ways}
    for way in ways:
        row = rows[way.label]
        if time.monotonic() >= deadline:
            row["reason"] = OUT_OF_TIME
            continue
        try:
            verdict, step = judged_launches(way, precision, launches, device)
            row.update(error=verdict.error, of_bound=verdict.excess)
            if step is None:
                row["reason"] = f"gate closed: {verdict.excess:.3g} times what rounding explains"
                continue
            steps.append((way.label, step))
        except Exception as error:  # of a compiler: the other way continues
            row["reason"] = _failure(error)
    rounds = measure.QUICK_ROUNDS if quick else measure.ROUNDS
    # interpreted times say nothing: the fewest rounds will do
    times = measure.take_turns(
        steps, precision, device, rounds, lambda: device.type == "cpu" or time.monotonic() >= deadline
    )
    for way in ways:
        if way.label in times:
            _add_times(rows[way.label], times[way.label], launches * way.times, ceilings[case.precision])
    return list(rows.values())


def judged_launches(
    way: Way, precision: str, launches: int, device: torch.device
) -> tuple[Judgement, PreparedStep | None]:
    """What the gate says of a way, and so many calls of it as one step; None where the gate is closed.

    Args:
        precision: torch's (:func:`bench.microbenchmarks.case.torch_precision`).
    """
    with switches(precision, device), numerics(device, choose_precision(device.type, torch.float32)):
        verdict = way.judge()
        return verdict, _prepared(way, launches, device) if verdict.right else None


def why_left_out(case: Case, device: torch.device) -> str:
    """Why none of a case's ways can run on ``device``; "" where they can."""
    with switches(torch_precision(case.precision, device), device):
        return case.ineligible_reason(device)


def ways_of(case: Case, device: torch.device) -> list[Way]:
    """A case's ways with their inputs drawn, in the order of :attr:`Case.labels`."""
    with switches(torch_precision(case.precision, device), device), torch.no_grad():
        ways = case.ways(device)
    assert tuple(way.label for way in ways) == case.labels, "a case names its ways before they are drawn"
    return ways


def _prepared(way: Way, launches: int, device: torch.device) -> PreparedStep:
    """``launches`` calls of a way; on a GPU from a graph."""

    def repeated() -> list:
        for _ in range(launches):
            way.launch()
        return []

    return graphed(device, repeated) if device.type == "cuda" else PreparedStep(repeated, list, lambda: None)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _row(case: Case, ceilings: dict, way: Way | None = None, reason: str = "") -> dict:
    """One way of one case; ``status`` "timed", or "skipped" with a ``reason``."""
    work = {"multiply_adds": case.multiply_adds, "bytes": case.bytes}
    return {
        "kernel": case.kernel,
        "size": f"{case.size}, {way.size}" if way and way.size else case.size,
        "precision": case.precision,
        "way": way.name if way else "",
        "tiles": way.tiles if way else "",
        "status": "skipped",
        "reason": reason,
        **work,
        **floor_of(work, ceilings[case.precision]),
    }


def _add_times(row: dict, result: measure.Times, times: int, ceilings: dict) -> None:
    """``times``: how often the row's work was done in one call."""
    seconds = result.median / times
    row.update(
        status="timed", seconds=seconds, p20=result.p20 / times, p80=result.p80 / times, samples=result.samples,
        clock=result.clock, tflops=2e-12 * row["multiply_adds"] / seconds, gbs=1e-9 * row["bytes"] / seconds,
        of_products=row["multiply_adds"] / seconds / ceilings["multiply_adds_per_s"],
        of_copy=row["bytes"] / seconds / ceilings["copy_bytes_per_s"],
    )  # fmt: skip
