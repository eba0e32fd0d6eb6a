"""``pcfast bench``: training steps timed against what others run, behind a correctness gate."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from pathlib import Path

import click
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from ..bench import runner
from ..bench import workers as bench_workers
from ..bench.contenders import CONTENDERS
from ..bench.tables import by_case, by_kernel, cells, growth_lines, headings, kernel_cells, kernel_headings
from ..bench.workloads import WORKLOADS
from ..checking.checker import default_precisions
from ..errors import ArgumentError
from ..precision import PRECISIONS, check_precision
from ..support.files import write_json
from .building import check_record, device_of, kept_so_far
from .launch import Launch, check_alone, joined
from .options import Finite, device_option, record_option
from .output import console, print_cells, progress_bar, table

#: What the kernels compute in: ieee by three TF32 products in the place of one.
KERNEL_PRECISIONS = ("ieee", "tf32", "bf16")


@click.command()
@click.argument("workloads", metavar="[WORKLOAD]...", nargs=-1, type=click.Choice(list(WORKLOADS)))
@click.option(
    "--contender",
    "contenders",
    type=click.Choice(list(CONTENDERS)),
    multiple=True,
    help="May be repeated.  [default: all; plain_compiled not with --quick]",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="May be repeated.  [default: ieee on a CPU; ieee, tf32, bf16 on a GPU]",
)
@click.option(
    "--kernels",
    is_flag=True,
    help="Time the kernels of the cuda and triton backends instead, each alone. Needs a GPU.",
)
@click.option(
    "--workers",
    is_flag=True,
    help="Time steps of all processes of torchrun together instead, with the all-reduce of updates and without.",
)
@device_option
@click.option("--quick", is_flag=True, help="A few small workloads and few rounds: about a minute.")
@click.option("--minutes", type=Finite(min=0), metavar="X", help="Stop cleanly after about so long.")
@record_option
def bench(workloads, contenders, precisions, kernels, workers, device, quick, minutes, path) -> int:
    """Time whole training steps of WORKLOADS (default: all) against what others run.

    Nothing is timed before it has computed the right updates. Contenders take turns; times are medians. Exit status 1
    where the gate was closed to one of pcfast's backends.
    """
    if workers:
        for name, given in (("contender", contenders), ("kernels", kernels), ("minutes", minutes)):
            if given:
                raise ArgumentError(name, f"--{name} with --workers", "one of the two", "Run them in turn.")
        with joined() as launch:
            return _together(launch, workloads, precisions, device, quick, path)
    check_alone("bench without --workers")
    device = device_of(device)
    if kernels:
        _check_for_kernels(workloads, contenders, precisions)
        precisions = precisions or KERNEL_PRECISIONS
    if not precisions:
        precisions = (
            ("ieee",) if device.type == "cpu" else tuple(p for p in default_precisions(device) if p != "fp64")
        )
    if not kernels:
        for precision in precisions:
            check_precision(precision, device)
    check_record(path)
    names = workloads or tuple(name for name, w in WORKLOADS.items() if w.quick or not quick)
    contenders = contenders or tuple(name for name, c in CONTENDERS.items() if c.quick or not quick)
    seconds = math.inf if minutes is None else 60 * minutes
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with progress_bar(*columns) as update:

        def progress(done: int, total: int, what: str) -> None:
            update(completed=done, total=total, description=what)

        limits = dict(quick=quick, seconds=seconds, progress=progress, keep=partial(kept_so_far, path))
        if kernels:
            record = runner.run_kernels(precisions, device, **limits)
        else:
            record = runner.run(names, contenders, precisions, device, **limits)
    (_print_kernels if kernels else _print)(record)  # before the file, whose disk may be full
    if path is not None:
        write_json(path, record)
    return 1 if _failed(record) else 0


def _together(launch: Launch, workloads, precisions, device: str, quick: bool, path: Path | None) -> int:
    """``--workers``."""
    processes = launch.processes
    with processes.agreed():
        if launch.group is None:
            remedy = "torchrun --nproc-per-node 2 -m pcfast bench --workers"
            raise ArgumentError("workers", "--workers in one process", "the processes of torchrun", remedy)
        device = launch.device(device)
        precisions = precisions or ("ieee",)
        for precision in precisions:
            check_precision(precision, device)
        names = workloads or tuple(name for name, w in WORKLOADS.items() if w.quick)
        for name in names:
            if WORKLOADS[name].method == "incremental":
                given = f"{name}, which moves parameters in every iteration"
                raise ArgumentError("workloads", given, "others, whose updates one backward pass adds up")
        if processes.leads:
            check_record(path)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with progress_bar(*columns) if processes.leads else contextlib.nullcontext() as update:

        def progress(done: int, total: int, what: str) -> None:
            if update is not None:
                update(completed=done, total=total, description=what)

        record = bench_workers.run(names, precisions, device, processes, quick=quick, progress=progress)
    if processes.leads:
        print_cells("Training steps of all processes, medians of the slowest", bench_workers.cells(record))
        if path is not None:
            write_json(path, record)
    return 1 if any(row["reason"] for row in record["workers"]) else 0


def _check_for_kernels(workloads, contenders, precisions) -> None:
    """Raise ArgumentError for what does not go together with --kernels."""
    for name, given in (("workloads", workloads), ("contender", contenders)):
        if given:
            raise ArgumentError(
                name, f"{', '.join(given)} with --kernels", "one of the two", "Run them in turn."
            )
    for precision in precisions:
        if precision not in KERNEL_PRECISIONS:
            raise ArgumentError("precision", f"{precision} with --kernels", f"some of {KERNEL_PRECISIONS}")


def _failed(record: dict) -> list[dict]:
    """Rows of pcfast's own that the gate stopped, or that broke; of the kernels all, which are few and known."""
    ours = [row for row in record["rows"] if row["ours"]] + record["kernels"]
    return [row for row in ours if row["reason"].startswith(("gate closed", "failed"))]


def _print_kernels(record: dict) -> None:
    """A table a kernel."""
    out = console()
    machine = record["machine"]
    interpreted = "" if record["device"] == "cuda" else ", on a CPU, which says nothing of their speed"
    out.print(
        f"Kernels on {machine['processor']}, torch {machine['torch']}{interpreted}. Medians of ways that took turns, "
        "a launch or, where a loop is timed, an iteration."
    )
    for kernel, rows in by_kernel(record["kernels"]).items():
        shown = table(kernel, *kernel_headings())
        for row in rows:
            shown.add_row(*kernel_cells(row))
        out.print()
        out.print(shown)
    out.print(
        "\nof floor: the share of the time that its multiply-adds, or its arrays moved once, need at the rates of "
        "this machine, measured in this run; more than all where the arrays stay in L2. error: relative, against "
        "float64. For what was not timed the last column says why."
    )
    for line in growth_lines(record["kernels"]):
        out.print(line)
    timed = sum(row["status"] == "timed" for row in record["kernels"])
    left_out = len(record["kernels"]) - timed
    out.print(f"{timed} timed, {left_out} left out, {len(_failed(record))} refused or broken")


def _print(record: dict) -> None:
    """A table a workload and precision."""
    out = console()
    machine = record["machine"]
    out.print(
        f"Whole training steps (forward pass, relaxation, weight gradients) on {machine['processor']}, "
        f"torch {machine['torch']}. Medians of contenders that took turns."
    )
    for (name, precision), rows in by_case(record["rows"]).items():
        first = rows[0]
        drop = first.get("energy_drop")
        energy = "" if drop is None else f", energy falls by {drop:.2%}"
        relaxation = "" if first["method"] == "exact" else f", n = {first['num_steps']}"
        what = f"{first['about']}, batch {first['batch']}, {first['method']}"
        title = f"{name} in {precision}: {what}{relaxation}{energy}"
        shown = table(title, *headings())
        for row in rows:
            shown.add_row(*cells(row, rows))
        out.print()
        out.print(shown)
    out.print(
        "\nof floor: the share of the time that products and memory traffic need at the rates of this machine, "
        "measured in this run. error: largest relative error of an update against float64. For a contender that did "
        "not run the last column says why."
    )
    timed = sum(row["status"] == "timed" for row in record["rows"])
    out.print(
        f"{timed} timed, {len(record['rows']) - timed} left out, {len(_failed(record))} of pcfast's refused"
    )
