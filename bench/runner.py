"""One benchmark run: gate, prepare, take turns, and a record of plain values of everything that was found."""

from __future__ import annotations

import datetime
import gc
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import pcfast
from pcfast.precision import parameter_dtype
from pcfast.support.machine import describe_machine

from .contenders import CONTENDERS, Contender, PreparedStep, switches
from .floor import counts_of, floor_of
from .gate import Gate, Verdict
from .measure import QUICK_ROUNDS, ROUNDS, ceilings, peak_memory, take_turns
from .memory import in_a_process
from .sources import digest
from .workloads import WORKLOADS, Workload

FORMAT = 2
GATE_ROWS = {"cuda": None, "cpu": 16}  # None: the whole batch
LONGEST_STEP = {"cuda": 20.0, "cpu": 4.0}  # seconds: what would take longer is not started
GATE_PRODUCTS = 2e10  # multiply-adds of a float64 relaxation on a CPU that the gate may cost

OUT_OF_TIME = "out of time"

Progress = Callable[[int, int, str], None]
Keep = Callable[[dict], None]


def run(
    workloads: Sequence[str],
    contenders: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    *,
    quick: bool = False,
    seconds: float = math.inf,
    progress: Progress = lambda done, total, what: None,
    keep: Keep = lambda record: None,
) -> dict:
    """Time ``contenders`` on ``workloads`` in ``precisions``.

    Args:
        quick: few rounds.
        seconds: stop cleanly after about so long; what was not reached is in the record and says so.
        keep: gets the record after every workload and precision, not yet ``complete``.

    Returns:
        The record: plain values, see :func:`_row` for its rows. Times are in seconds.
    """
    deadline = time.monotonic() + seconds
    record = new_record(device, quick)
    record["ceilings"] = {precision: ceilings(precision, device, quick) for precision in precisions}
    cases = [(WORKLOADS[name], precision) for name in workloads for precision in precisions]
    taking_part = [CONTENDERS[name] for name in contenders]
    rows = {
        case: [_row(WORKLOADS[case[0]], case[1], c, reason=OUT_OF_TIME) for c in taking_part]
        for case in ((workload.name, precision) for workload, precision in cases)
    }
    gates: dict[str, Gate] = {}
    for done, (workload, precision) in enumerate(cases):
        record["rows"] = [row for result in rows.values() for row in result]
        _add_floors(record)
        keep(record)
        if time.monotonic() >= deadline:
            break

        def say(what: str, done: int = done, case: str = f"{workload.name} in {precision}") -> None:
            progress(done, len(cases), f"{case}: {what}")

        if workload.name not in gates:
            gates.clear()  # of the last workload: its networks
        result = _case(workload, precision, taking_part, device, record, quick, deadline, say, gates)
        rows[workload.name, precision] = result
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    record["rows"] = [row for result in rows.values() for row in result]
    for precision in precisions:  # the machine may have been busy the first time
        if time.monotonic() >= deadline:
            break
        again = ceilings(precision, device, quick)
        first = record["ceilings"][precision]
        record["ceilings"][precision] = {name: max(first[name], again[name]) for name in first}
    _add_floors(record)
    progress(len(cases), len(cases), "done")
    record["complete"] = True
    return record


def _add_floors(record: dict) -> None:
    for row in record["rows"]:
        if "multiply_adds" in row:
            row.update(floor_of(row, record["ceilings"][row["precision"]]))


def run_kernels(
    precisions: Sequence[str],
    device: torch.device,
    *,
    quick: bool = False,
    seconds: float = math.inf,
    progress: Progress = lambda done, total, what: None,
    keep: Keep = lambda record: None,
) -> dict:
    """Time the cuda and triton backends' kernels, each alone; arguments and record as of :func:`run`.

    Its rows are under ``kernels`` (:mod:`pcfast.bench.microbenchmarks.run`), and there are no others.

    Raises:
        BackendError: the kernels cannot run on ``device``.
    """
    from .microbenchmarks import run as microbenchmarks

    unable = microbenchmarks.unable(device)
    record = new_record(device, quick)
    able = [backend for backend, reason in unable.items() if not reason]
    cases = microbenchmarks.chosen_cases(precisions, able, device.type == "cpu", quick)
    absent = [microbenchmarks.absent(backend, reason) for backend, reason in unable.items() if reason]

    def keep_rows(result: dict[str, dict], rows: list[dict]) -> None:
        record["ceilings"], record["kernels"] = result, [*rows, *absent]
        keep(record)

    keep_rows(
        *microbenchmarks.run(cases, device, quick=quick, seconds=seconds, progress=progress, keep=keep_rows)
    )
    record["complete"] = True
    return record


def new_record(device: torch.device, quick: bool) -> dict:
    """A record without results: of training steps (rows), of kernels, of methods."""
    return {
        "format": FORMAT,
        "recorded": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "sources": digest(),
        "device": device.type,
        "machine": {**describe_machine(device), **(_gpu_state(device) if device.type == "cuda" else {})},
        "quick": quick,
        "complete": False,
        "ceilings": {},
        "rows": [],
        "kernels": [],
        "methods": [],
    }


def _case(
    workload: Workload,
    precision: str,
    contenders: list[Contender],
    device: torch.device,
    record: dict,
    quick: bool,
    deadline: float,
    say: Callable[[str], None],
    gates: dict[str, Gate],
) -> list[dict]:
    """The rows of one workload in one precision. gates: by workload, filled here."""
    model, x, y = drawn(workload, precision, device)
    limits = record["ceilings"][precision]
    counts = counts_of(workload, model)
    rows = {c.name: _row(workload, precision, c) for c in contenders}
    able: list[Contender] = []
    for contender in contenders:
        reason = why_left_out(contender, workload, precision, device, counts, limits)
        rows[contender.name]["reason"] = reason
        if not reason:
            able.append(contender)
    if not able:
        return list(rows.values())

    say("gate")
    if workload.name not in gates:
        gates[workload.name] = gate_of(workload, device)
    gate = gates[workload.name]
    steps: list[tuple[str, PreparedStep]] = []
    for contender in able:
        row = rows[contender.name]
        if time.monotonic() >= deadline:
            row["reason"] = OUT_OF_TIME
            continue
        try:
            say(f"gate of {contender.name}")
            verdict, step = judged_step(contender, precision, gate, (model, x, y))
            row.update(error=verdict.error, bound=verdict.bound, gate_rows=gate.rows)
            if step is None:
                row["reason"] = f"gate closed: {verdict.reason}"
                continue
        except Exception as error:  # of a compiler, of memory, of a baseline: the others go on
            row["reason"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        steps.append((contender.name, step))
    say("timing")
    rounds = QUICK_ROUNDS if quick else ROUNDS
    times = take_turns(steps, precision, device, rounds, lambda: time.monotonic() >= deadline)
    say("memory")
    for name, step in steps:
        result = times[name]
        rows[name].update(
            status="timed", seconds=result.median, p20=result.p20, p80=result.p80, host_seconds=result.host,
            samples=result.samples, clock=result.clock,
        )  # fmt: skip
        if device.type == "cuda":
            rows[name]["peak_bytes"] = peak_memory(step, precision, device)
        elif not quick:
            rows[name]["peak_bytes"] = in_a_process(workload.name, name, precision)
    energy = _energy_drop(workload, gate) if workload.method == "strict" else None
    for row in rows.values():
        row.update(**counts, energy_drop=energy)
    return list(rows.values())


def drawn(workload: Workload, precision: str, device: torch.device) -> tuple[nn.Sequential, Tensor, Tensor]:
    """(model, x, y) of a whole batch, in the dtype of ``precision``."""
    model, x, y = workload.draw(device)
    dtype = parameter_dtype(precision)
    return model.to(dtype), x.to(dtype), y


def why_left_out(
    contender: Contender,
    workload: Workload,
    precision: str,
    device: torch.device,
    counts: dict[str, int],
    limits: dict[str, float],
) -> str:
    """Why a contender is not timed: it cannot run, or a step would take too long; "" where it is.

    Args:
        counts: :func:`bench.floor.counts_of`. limits: :func:`bench.measure.ceilings`.
    """
    reason = contender.ineligible_reason(workload, precision, device)
    work = _guess(contender, workload, _forward_macs(workload), counts["multiply_adds"])
    seconds = work / limits["multiply_adds_per_s"]
    if not reason and seconds > LONGEST_STEP[device.type]:
        return f"a step would take about {seconds:.0f} s"
    return reason


def gate_of(workload: Workload, device: torch.device) -> Gate:
    """The gate for a workload, on as many rows as ``device`` can afford."""
    return Gate(workload, device, _gate_rows(workload, _forward_macs(workload), device))


def judged_step(
    contender: Contender, precision: str, gate: Gate, batch: tuple[nn.Sequential, Tensor, Tensor]
) -> tuple[Verdict, PreparedStep | None]:
    """What the gate says of a contender, and its step on ``batch``, run once; None where the gate is closed."""
    verdict = gate.judge(contender, precision)
    if verdict.reason:
        return verdict, None
    step = verdict.step
    if step is None:
        with switches(precision, gate.device):
            step = contender.prepare(gate.workload, *batch, precision)
            step.run()
            step.wait()
    return verdict, step


def _row(workload: Workload, precision: str, contender: Contender, reason: str = "") -> dict:
    """One contender on one workload in one precision; ``status`` "timed" or "skipped" with a ``reason``."""
    return {
        "workload": workload.name,
        "about": workload.about,
        "batch": workload.batch,
        "method": workload.method,
        "step_size": workload.step_size,
        "num_steps": workload.num_steps,
        "precision": precision,
        "contender": contender.name,
        "ours": contender.ours,
        "exact": contender.exact,
        "status": "skipped",
        "reason": reason,
    }


def _forward_macs(workload: Workload) -> int:
    """Multiply-adds of the forward pass of one batch."""
    with torch.device("meta"):
        model = workload.make()
    shape = (workload.batch, *workload.sample)
    return pcfast.explain(model, shape, "cpu", method="exact").plan.work.forward


def _guess(contender: Contender, workload: Workload, forward: int, ours: int) -> float:
    """Multiply-adds of a step, roughly: only to leave out what would take minutes."""
    if contender.ours:
        return ours
    steps = 0 if workload.method == "exact" else workload.num_steps
    return forward * (3 + contender.passes * steps)


def _gate_rows(workload: Workload, forward: int, device: torch.device) -> int:
    rows = GATE_ROWS[device.type]
    if rows is None:
        return workload.batch
    steps = 1 if workload.method == "exact" else workload.num_steps
    affordable = int(GATE_PRODUCTS / (3 * steps * forward / workload.batch))
    return max(1, min(rows, workload.batch, affordable))


def _energy_drop(workload: Workload, gate: Gate) -> float:
    """1 - E(last iteration) / E(first iteration): how far the relaxation got."""
    energies = pcfast.relax(
        gate.model, gate.x, gate.y, method="strict", step_size=workload.step_size, num_steps=workload.num_steps,
        energies=True, check="sync",
    ).energies.double()  # fmt: skip
    return 1 - float(energies[-1].sum() / energies[0].sum())


def _gpu_state(device: torch.device) -> dict[str, str]:
    """Driver and clocks as nvidia-smi tells them; empty where there is none."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        told = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in told.split(",")), strict=False))


def _commit() -> str | None:
    """The checkout's commit, with a "+" where its sources were changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "--", ".", "../pcfast", "../kernels", "../csrc", ":!results"],
            cwd=here, text=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
