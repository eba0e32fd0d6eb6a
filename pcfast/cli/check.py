"""``pcfast check``: every backend against the reference in float64, on one's own network and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import click
import torch
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..backends import BACKENDS
from ..checking import checker as checking
from ..checking.copies import random_batches
from ..checking.report import Report, Row
from ..precision import PRECISIONS
from ..problem.plan import METHODS
from .building import device_of, network_and_sample_of
from .defaults import DEFAULTS, STEP_SIZE
from .options import (
    Count,
    Method,
    device_option,
    json_option,
    network_options,
    relaxation_options,
    seed_option,
    shape_options,
)
from .output import console, print_json, progress_bar, table

#: What a float64 reference of the data set's network can do in a minute or two on two CPU cores.
_BATCH_SIZE, _BATCH_SIZE_OF_DATA = 64, {"cifar10": 4, "cifar100": 4}
_RELATIVE_TO = {
    "layer": ("~", "relative to the layer's whole update, since this update is nothing but rounding"),
    "nothing": ("=", "absolute, since the truth is zero, as where the relaxation has not reached the layer"),
}


@click.command()
@network_options
@shape_options
@click.option(
    "--method", "methods", type=Method(METHODS), multiple=True, help="May be repeated.  [default: all]"
)
@relaxation_options
@click.option(
    "--backend",
    "backends",
    type=click.Choice(list(BACKENDS)),
    multiple=True,
    help="May be repeated.  [default: all but reference, which gives the truth]",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="May be repeated: ieee is float32; tf32 needs a GPU; bf16 is autocast.  [default: all that the device has]",
)
@device_option
@click.option(
    "--batch-size",
    metavar="N",
    type=Count(),
    help="Samples a draw.  [default: 64; 4 for cifar10, cifar100]",
)
@click.option(
    "--draws",
    metavar="N",
    type=Count(),
    default=5,
    show_default=True,
    help="Batches of random data.",
)
@seed_option
@click.option(
    "--summary", is_flag=True, help="Leave the tables by layer out; what is out of its bound is still listed."
)
@json_option
def check(
    net,
    widths,
    model,
    data,
    input_shape,
    methods,
    step_size,
    num_steps,
    loss,
    backends,
    precisions,
    device,
    batch_size,
    draws,
    seed,
    summary,
    as_json,
) -> int:
    """Hold every backend to the reference in float64.

    Beliefs, errors and updates of every layer are compared with the reference in float64, on your network, shapes
    and settings; inputs and targets are random. Exit status 1 where one is out of its bound. Bounds follow
    docs/method.md: fp64 may lose what rounding costs, ieee (float32), tf32 and bf16 three times what
    backpropagation or a forward pass in that precision loses.
    """
    torch.manual_seed(seed)
    network, sample, source = network_and_sample_of(net, widths, model, data, input_shape)
    batch_size = batch_size or _BATCH_SIZE_OF_DATA.get(source, _BATCH_SIZE)
    if step_size is None:
        step_size = DEFAULTS[source].step_size if source else STEP_SIZE
    batches = random_batches(network, (batch_size, *sample), loss=loss, draws=draws, seed=seed)
    methods = methods or METHODS
    reports = []
    with _progress(methods) as progress_of:
        for method in methods:
            reports.append(
                checking.check(
                    network, batches, loss=loss, method=method, step_size=step_size, num_steps=num_steps,
                    backends=backends or None, precisions=precisions or None, device=device_of(device), seed=seed,
                    progress=progress_of(method),
                )
            )  # fmt: skip
    ok = all(report.ok for report in reports)
    if as_json:
        print_json({"ok": ok, "reports": [{"ok": report.ok, **asdict(report)} for report in reports]})
    else:
        _print(reports, summary)
    return 0 if ok else 1


@contextmanager
def _progress(methods: Sequence[str]) -> Iterator[Callable]:
    """A progress bar on standard error, in a terminal; gives ``method -> progress(done, total, what)``."""
    with progress_bar(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as update:

        def progress_of(method: str) -> Callable[[int, int, str], None]:
            before = methods.index(method)

            def progress(done: int, total: int, what: str) -> None:
                update(
                    completed=before * total + done,
                    total=len(methods) * total,
                    description=f"{method}: {what}",
                )

            return progress

        yield progress_of


def _print(reports: Sequence[Report], summary: bool) -> None:
    """A table by layer for every method and backend, then the worst of each."""
    out = console()
    first = reports[0]
    out.print(
        f"{first.draws} draws of random x {tuple(first.x_shape)} on {first.device}, step size {first.step_size:g}, "
        f"{first.num_steps} iterations. Errors are relative Frobenius norms against the reference in float64."
    )
    for report in reports:
        for backend in dict.fromkeys(row.backend for row in report.rows):
            rows = [row for row in report.rows if row.backend == backend]
            if summary:
                out_of_bounds = {(row.layer, row.quantity) for row in rows if not row.ok}
                rows = [row for row in rows if (row.layer, row.quantity) in out_of_bounds]
            if rows:
                out.print()
                out.print(_by_layer(f"{report.method} on {backend}", rows))
    out.print()
    out.print(_worst(reports))
    # the same is said of several methods
    refused = dict.fromkeys(refusal for report in reports for refusal in report.refused)
    for refusal in refused:
        out.print(f"not run: {refusal.backend} in {refusal.precision}: {refusal.reason}")
    rows = [row for report in reports for row in report.rows]
    for kind, (mark, words) in _RELATIVE_TO.items():
        if any(row.relative_to == kind and not row.message for row in rows):
            out.print(f"{mark} {words}")
    for message in dict.fromkeys(row.message for row in rows if row.message):
        out.print(f"failed: {message}")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        out.print(f"note: {note}")
    failures = sum(not row.ok for row in rows)
    out.print(
        f"{failures} of {len(rows)} out of bounds" if failures else f"all {len(rows)} within their bounds"
    )


def _by_layer(title: str, rows: Sequence[Row]) -> Table:
    """One line a layer and quantity, a pair of columns a precision."""
    precisions = list(dict.fromkeys(row.precision for row in rows))
    result = {(row.layer, row.quantity, row.precision): row for row in rows}
    made = table(title, ">layer", "quantity", *(c for p in precisions for c in (f">{p}", ">bound")))
    for layer, quantity in dict.fromkeys((row.layer, row.quantity) for row in rows):
        cells = []
        for precision in precisions:
            row = result.get((layer, quantity, precision))
            cells += ["", ""] if row is None else [_error(row), _number(row.bound)]
        made.add_row("" if layer is None else str(layer), quantity, *cells)
    return made


def _worst(reports: Sequence[Report]) -> Table:
    """One line a method, backend and precision."""
    made = table(
        "Closest to its bound",
        "method",
        "backend",
        "precision",
        ">layer",
        "quantity",
        ">error",
        ">bound",
        "verdict",
    )
    for report in reports:
        for (backend, precision), row in report.worst().items():
            failures = sum(r.backend == backend and r.precision == precision for r in report.failures)
            verdict = Text(f"{failures} OUT", "bold red") if failures else Text("ok", "green")
            made.add_row(
                report.method, backend, precision, "" if row.layer is None else str(row.layer), row.quantity,
                _error(row), _number(row.bound), verdict,
            )  # fmt: skip
    return made


def _error(row: Row) -> Text:
    """The error, marked where it is out of its bound and where it is relative to something else than the truth."""
    if row.message:
        return Text("failed", "bold red")
    mark = _RELATIVE_TO.get(row.relative_to, ("", ""))[0]
    return Text(f"{mark}{_number(row.error)}", "" if row.ok else "bold red") + ("" if row.ok else " OUT")


def _number(value: float) -> str:
    return "none" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"
