"""``pcfast qualify``: which kernels give right numbers on a device, so that ``auto`` may run them."""

from __future__ import annotations

import click
import torch
from rich.progress import BarColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ..backends.qualification import record
from ..backends.qualification.record import QUALIFIED, Qualification
from ..backends.qualification.run import KIND_LIMIT_S, LIMIT_S
from ..backends.qualification.run import qualify as qualify_device
from .building import device_of
from .options import Finite, device_option, json_option
from .output import console, print_json, progress_bar, table


@click.command()
@device_option
@click.option(
    "--limit", metavar="SECONDS", type=Finite(min=1), default=LIMIT_S, show_default=True,
    help="For all kinds of kernels; those that are not reached are not qualified.",
)  # fmt: skip
@click.option(
    "--kind-limit", metavar="SECONDS", type=Finite(min=1), default=KIND_LIMIT_S, show_default=True,
    help="For one kind; one that takes longer is taken to hang.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Test, and write nothing.")
@json_option
def qualify(device, limit, kind_limit, dry_run, as_json) -> int:
    """Test the kernels of a device, so that the backend "auto" may run them.

    Each kind of kernels of the backends triton and cuda relaxes small networks in each precision, in a child process:
    numbers are held to the float64 reference, repeated runs to equal bits. A crash, a kernel that does not end and a
    wrong number disqualify that kind alone. The record goes to the cache folder, which later runs read. Exit status 1
    where a kind is not qualified.
    """
    where = device_of(device)
    with progress_bar(TextColumn("{task.description}"), BarColumn()) as update:
        result = qualify_device(
            where, limit_s=limit, kind_limit_s=kind_limit, save=not dry_run,
            progress=lambda done, total, what: update(completed=done, total=total, description=what),
        )  # fmt: skip
    if as_json:
        print_json(as_dict(where, result, dry_run))
        return 0 if result.ok else 1
    out = console()
    out.print(kinds_table(str(where), result))
    for name, reason in result.unavailable.items():
        out.print(f"not tested: {name}: {reason}")
    fine = sum(verdict.status == QUALIFIED for verdict in result.verdicts.values())
    end = "--dry-run: nothing was written" if dry_run else f"recorded in {record.path_of(where)}"
    out.print(
        f"{fine} of {len(result.verdicts)} kinds of kernels qualified on {result.identity.device}; {end}"
    )
    return 0 if result.ok else 1


def as_dict(device: torch.device, result: Qualification, dry_run: bool = False) -> dict:
    """For --json."""
    path = None if dry_run else str(record.path_of(device))
    return {"device": str(device), "ok": result.ok, "path": path, **result.to_json()}


def kinds_table(device: str, result: Qualification) -> Table:
    """A line a kind of kernels, a column a precision, reasons below."""
    precisions = list(dict.fromkeys(kind.precision for kind in result.verdicts))
    found = {(kind.backend, kind.name, kind.precision): v for kind, v in result.verdicts.items()}
    made = table(f"Kernels on {device}, tested {result.when}", "backend", "kind", *precisions, "why not")
    for backend, name in dict.fromkeys((kind.backend, kind.name) for kind in result.verdicts):
        cells, reasons = [], {}
        for precision in precisions:
            verdict = found[backend, name, precision]
            cells.append(Text(verdict.status, "" if verdict.status == QUALIFIED else "bold"))
            if verdict.reason:
                reasons.setdefault(verdict.reason, []).append(precision)
        words = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in reasons.items())
        made.add_row(backend, name, *cells, words)
    return made
