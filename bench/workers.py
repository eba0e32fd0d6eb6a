"""Training steps on the processes of a launcher: with the all-reduce of the updates, and without it.

    torchrun --nproc-per-node N -m pcfast bench --workers [WORKLOAD]...

Every process has a batch of the workload's size. Nothing is timed before the updates are the sum of all processes'.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import pcfast
from pcfast.training.distributed import Processes, added_up

from . import tables
from .contenders import switches
from .measure import QUICK_ROUNDS, ROUNDS
from .runner import new_record
from .scaling import all_reduces, payload_bytes
from .workloads import WORKLOADS, Workload

#: Relative, of an update: two sums of as many terms, in another order, in float32 or less.
TOLERANCE = 1e-4
GATE_CLOSED = "gate closed: updates are not the sum of all processes'"


def run(
    workloads: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    processes: Processes,
    *,
    quick: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict:
    """The record, on every process; ``workers`` has a row a workload and precision.

    Times in seconds are the slowest process's, as medians of rounds in which both kinds of step took turns.
    """
    record = {**new_record(device, quick), "workers": []}
    cases = [(WORKLOADS[name], precision) for name in workloads for precision in precisions]
    for done, (workload, precision) in enumerate(cases):
        progress(done, len(cases), f"{workload.name} in {precision}")
        with switches(precision, device):
            record["workers"].append(_row(workload, precision, device, processes, quick))
    return {**record, "complete": True}


def _row(workload: Workload, precision: str, device: torch.device, processes: Processes, quick: bool) -> dict:
    model, _, _ = workload.draw(device, rows=1)
    _, x, y = workload.draw(device, seed=1 + processes.rank)
    row = {
        "workload": workload.name,
        "precision": precision,
        "processes": processes.size,
        "rows": workload.batch,
        "bytes": payload_bytes(model),
        "all_reduces": all_reduces(model),
        "seconds": None,
        "alone_seconds": None,
        "reason": "",
    }
    pc = pcfast.PredictiveCoding(
        model,
        method=workload.method,
        step_size=workload.step_size,
        num_steps=workload.num_steps,
        normalizer=workload.batch * processes.size,
    )
    ddp = DistributedDataParallel(pc, process_group=processes.group, gradient_as_bucket_view=True)
    ddp.register_comm_hook(processes.group, added_up)
    if _error(ddp, pc, x, y, processes) > TOLERANCE:
        return {**row, "reason": GATE_CLOSED}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(QUICK_ROUNDS if quick else ROUNDS):
        for together in (True, False) if round_ % 2 else (False, True):
            seconds[together].append(_seconds(ddp, x, y, together, processes))
    medians = {together: statistics.median(times) for together, times in seconds.items()}
    return {**row, "seconds": medians[True], "alone_seconds": medians[False]}


def _step(ddp: DistributedDataParallel, x: Tensor, y: Tensor) -> None:
    ddp.zero_grad()
    ddp(x, y).backward()


def _error(ddp: DistributedDataParallel, pc, x: Tensor, y: Tensor, processes: Processes) -> float:
    """The worst relative difference of an update from the sum, on any process; second steps count, as all later."""
    pc.zero_grad()
    pc(x, y).backward()
    truth = [parameter.grad.clone() for parameter in pc.parameters()]
    processes.add_up(*truth)
    for _ in range(2):
        _step(ddp, x, y)
    pairs = zip(pc.parameters(), truth, strict=True)
    worst = max(float((p.grad - t).norm() / t.norm().clamp(min=1e-30)) for p, t in pairs)
    return max(processes.gathered(worst))


def _seconds(
    ddp: DistributedDataParallel, x: Tensor, y: Tensor, together: bool, processes: Processes
) -> float:
    _wait(x.device)
    dist.barrier(processes.control)
    start = time.perf_counter()
    with contextlib.nullcontext() if together else ddp.no_sync():
        _step(ddp, x, y)
    _wait(x.device)
    return max(processes.gathered(time.perf_counter() - start))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cells(record: dict) -> list[list[str]]:
    """The table: heading, then a row a workload and precision."""
    result = [
        ["training step", ">rows", ">time", ">without all-reduce", ">all-reduces", ">bytes", ">rows/s", ""]
    ]
    for row in record["workers"]:
        timed = row["seconds"] is not None
        result.append([
            f"{row['workload']}, {row['precision']}, {row['processes']} processes",
            f"{row['processes']} x {row['rows']}",
            tables.time(row["seconds"]) if timed else "",
            tables.time(row["alone_seconds"]) if timed else "",
            str(row["all_reduces"]),
            f"{row['bytes']:,}",
            f"{row['processes'] * row['rows'] / row['seconds']:,.0f}" if timed else "",
            row["reason"],
        ])  # fmt: skip
    return result
