"""Every whole training step and every kernel as a case of pytest-benchmark: ``pytest bench --benchmark-only``.

The cases, their gates and their floors are those of ``pcfast bench``. A case is timed only after its gate has opened;
where it is closed the benchmark fails. pytest-benchmark reads the host's clock: its timer waits for the GPU first,
once before and once after as many calls as fill a round, which share the wait. A call is one training step, or of a
kernel the replay of a CUDA graph of many launches.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools

import pytest
import torch

from pcfast.bench import measure, runner
from pcfast.bench.contenders import CONTENDERS, switches
from pcfast.bench.floor import counts_of, floor_of
from pcfast.bench.microbenchmarks import run as microbenchmarks
from pcfast.bench.microbenchmarks.case import Case, Way, torch_precision
from pcfast.bench.report import GPU_BACKENDS
from pcfast.bench.workloads import WORKLOADS
from pcfast.checking.checker import default_precisions
from pcfast.errors import BackendError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The packages that a backend's cases import.
NEEDED = {"cuda": (), "triton": ("triton",)}

pytestmark = pytest.mark.benchmark(timer=measure.when_done)


@functools.cache
def ceilings(precision: str) -> dict[str, float]:
    return measure.ceilings(precision, DEVICE, quick=False)


@functools.cache
def kernel_ceilings(precision: str) -> dict[str, float]:
    return microbenchmarks.ceilings_of({precision}, DEVICE, quick=False)[precision]


@pytest.fixture
def released():
    """Gives what a case held back to the device."""
    yield
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


gate_of = functools.lru_cache(maxsize=1)(lambda name: runner.gate_of(WORKLOADS[name], DEVICE))


def keep(benchmark, work: dict[str, int], ceilings: dict[str, float], times: int = 1, **extra) -> None:
    """Put the floor, the share of it that the median reached, and ``extra`` beside the times.

    Args:
        work: multiply_adds and bytes. times: how often one call does it.
    """
    floor = floor_of(work, ceilings)
    benchmark.extra_info |= {**work, **floor, **extra}
    if benchmark.stats is not None:  # --benchmark-disable
        seconds = benchmark.stats.stats.median / times
        benchmark.extra_info |= {"seconds": seconds, "of_floor": floor["floor_seconds"] / seconds}


# whole steps


def steps() -> list[tuple[str, str, str]]:
    precisions = [
        p for p in default_precisions(DEVICE) if p == "ieee" or (p != "fp64" and DEVICE.type == "cuda")
    ]
    return list(itertools.product(WORKLOADS, precisions, CONTENDERS))


@pytest.mark.parametrize(("workload", "precision", "contender"), steps())
def test_step(benchmark, released, workload: str, precision: str, contender: str) -> None:
    workload, contender = WORKLOADS[workload], CONTENDERS[contender]
    if DEVICE.type == "cpu" and contender.name in GPU_BACKENDS:
        pytest.skip("its kernels need a GPU: interpreted, or compiled for a CPU, their times say nothing")
    if reason := contender.ineligible_reason(workload, precision, DEVICE):
        pytest.skip(reason)
    batch, limits = runner.drawn(workload, precision, DEVICE), ceilings(precision)
    counts = counts_of(workload, batch[0])
    if reason := runner.why_left_out(contender, workload, precision, DEVICE, counts, limits):
        pytest.skip(reason)
    gate = gate_of(workload.name)
    verdict, step = runner.judged_step(contender, precision, gate, batch)
    if step is None:
        pytest.fail(f"gate closed: {verdict.reason}", pytrace=False)

    def call() -> None:
        step.run()
        if step.off_stream:  # torch's wait does not see it
            step.wait()

    benchmark.group = f"{workload.name} in {precision}: {workload.about}, batch {workload.batch}"
    with switches(precision, DEVICE):
        for _ in range(2):  # libraries set themselves up, graphs are recorded on the second call
            call()
        benchmark(call)
    keep(benchmark, counts, limits, error=verdict.error, bound=verdict.bound, gate_rows=gate.rows)


# kernels


def no_kernels() -> dict[str, str]:
    """Backend with kernels -> why none of them is timed here; "" where they are."""
    if DEVICE.type == "cpu":
        reason = "kernels are timed on a GPU alone: there is none, and interpreted times say nothing"
        return dict.fromkeys(NEEDED, reason)
    try:
        return microbenchmarks.unable(DEVICE)
    except BackendError as error:
        return dict.fromkeys(NEEDED, str(error))


def kernels() -> dict[str, tuple[Case | None, str]]:
    """Name -> a case, None in the place of all of a backend that cannot be listed, and why it is not timed or ""."""
    result: dict[str, tuple[Case | None, str]] = {}
    for backend, reason in no_kernels().items():
        if not all(map(importlib.util.find_spec, NEEDED[backend])):
            result[f"those of {backend}"] = None, reason
            continue
        for case in microbenchmarks.chosen_cases(("ieee", "tf32", "bf16"), [backend], False, False):
            result[f"{case.kernel}, {case.size}, {case.precision}"] = case, reason
    return result


CASES = kernels()


def launches() -> list:
    return [
        pytest.param(name, label, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for name, (case, reason) in CASES.items()
        for label in (case.labels if case else ("",))
    ]


@functools.lru_cache(maxsize=1)  # one case's inputs at a time
def ways_of(name: str) -> dict[str, Way]:
    return {way.label: way for way in microbenchmarks.ways_of(CASES[name][0], DEVICE)}


@pytest.mark.parametrize(("case", "way"), launches())
def test_kernel(benchmark, released, case: str, way: str) -> None:
    name, (case, _) = case, CASES[case]
    if reason := microbenchmarks.why_left_out(case, DEVICE):
        pytest.skip(reason)
    way, precision = ways_of(name)[way], torch_precision(case.precision, DEVICE)
    verdict, step = microbenchmarks.judged_launches(way, precision, microbenchmarks.LAUNCHES, DEVICE)
    if step is None:
        pytest.fail(f"gate closed: {verdict.excess:.3g} times what rounding explains", pytrace=False)
    benchmark.group = f"{case.kernel} in {case.precision}, {case.size}"
    with switches(precision, DEVICE):
        step.run()
        benchmark(step.run)
    times = microbenchmarks.LAUNCHES * way.times
    work = {"multiply_adds": case.multiply_adds, "bytes": case.bytes}
    extra = {"launches": microbenchmarks.LAUNCHES, "iterations": way.times, "tiles": way.tiles}
    keep(benchmark, work, kernel_ceilings(case.precision), times, error=verdict.error, **extra)
