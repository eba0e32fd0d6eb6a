"""``pcfast bench``: training steps timed against what others run, behind a correctness gate."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench import runner
from ..bench.contenders import CONTENDERS
from ..bench.tables import cells, headings
from ..bench.workloads import WORKLOADS
from ..checking import default_precisions
from ..errors import ArgumentError
from ..files import write_atomically
from ..precision import PRECISIONS, check_precision
from .building import device_of
from .output import console, table


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
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, ...; auto: a GPU if any.",
)
@click.option("--quick", is_flag=True, help="A few small workloads and few rounds: about a minute.")
@click.option(
    "--minutes", type=click.FloatRange(min=0), metavar="X", help="Stop cleanly after about so long."
)
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the record.",
)
def bench(workloads, contenders, precisions, device, quick, minutes, path) -> int:
    """Time whole training steps of WORKLOADS (default: all) against what others run.

    Nothing is timed before it has computed the right updates. Contenders take turns; times are medians. Exit status 1
    where the gate was closed to one of pcfast's backends.
    """
    device = device_of(device)
    if not precisions:
        precisions = (
            ("ieee",) if device.type == "cpu" else tuple(p for p in default_precisions(device) if p != "fp64")
        )
    for precision in precisions:
        check_precision(precision, device)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError(
                "json", str(path), f"a file that can be written ({error.strerror})"
            ) from error
    names = workloads or tuple(name for name, w in WORKLOADS.items() if w.quick or not quick)
    contenders = contenders or tuple(name for name, c in CONTENDERS.items() if c.quick or not quick)
    seconds = math.inf if minutes is None else 60 * minutes
    with _progress() as progress:
        record = runner.run(
            names, contenders, precisions, device, quick=quick, seconds=seconds, progress=progress
        )
    if path is not None:
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
    _print(record)
    return 1 if _failed(record) else 0


def _failed(record: dict) -> list[dict]:
    """Rows of pcfast's own that the gate stopped, or that broke."""
    return [r for r in record["rows"] if r["ours"] and r["reason"].startswith(("gate closed", "failed"))]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error, in a terminal."""
    to = console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _print(record: dict) -> None:
    """A table a workload and precision."""
    out = console()
    machine = record["machine"]
    out.print(
        f"Whole training steps (forward pass, relaxation, weight gradients) on {machine['processor']}, "
        f"torch {machine['torch']}. Medians of contenders that took turns."
    )
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in record["rows"]:
        cases.setdefault((row["workload"], row["precision"]), []).append(row)
    for (name, precision), rows in cases.items():
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
