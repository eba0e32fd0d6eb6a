"""``pcfast tune``: the triton backend's configuration for one network, batch size and GPU, timed and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click
import torch
from rich.progress import BarColumn, TextColumn
from rich.text import Text

from ..checking.copies import random_batches
from ..precision import use_precision
from ..tuning.tuner import Decision, TuningReport
from ..tuning.tuner import tune as tune_model
from .building import device_of, network_and_sample_of
from .defaults import DEFAULTS, STEP_SIZE
from .options import (
    Count,
    device_option,
    json_option,
    network_options,
    relaxation_options,
    seed_option,
    shape_options,
)
from .output import console, print_json, progress_bar, table

_BATCH_SIZE = 64  # for --model without --data


@click.command()
@network_options
@shape_options
@relaxation_options
@click.option(
    "--precision",
    type=click.Choice(("ieee", "tf32", "bf16")),
    default="ieee",
    show_default=True,
    help="Of the training to come: ieee is float32; bf16 is autocast.",
)
@device_option
@click.option(
    "--batch-size",
    metavar="N",
    type=Count(),
    help="Samples an update, as in the training to come.  [default: the data set's; 64 for --model]",
)
@seed_option
@click.option("--dry-run", is_flag=True, help="Time and verify, and write nothing.")
@json_option
def tune(
    net, widths, model, data, input_shape, step_size, num_steps, loss, precision, device, batch_size, seed, dry_run,
    as_json,
) -> int:  # fmt: skip
    """Choose the triton backend's configuration for a network, batch size and GPU.

    Candidates are timed in turns: tiles of each launch, one launch or stages, how convolutions run. The winner is
    held to the reference in float64 and written to a file that later runs read.
    """
    where = device_of(device)
    torch.manual_seed(seed)
    network, sample, source = network_and_sample_of(net, widths, model, data, input_shape)
    defaults = DEFAULTS.get(source)
    batch_size = batch_size or (defaults.batch_size if defaults else _BATCH_SIZE)
    if step_size is None:
        step_size = defaults.step_size if defaults else STEP_SIZE
    ((x, y),) = random_batches(network, (batch_size, *sample), loss=loss, draws=1, seed=seed)
    with _progress() as progress, use_precision(precision, where):
        report = tune_model(
            network.to(where), x.to(where), y.to(where), loss=loss, num_steps=num_steps, step_size=step_size,
            save=not dry_run, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(_as_json(report))
    else:
        _print(report, tuple(x.shape), dry_run)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on standard error, in a terminal."""
    with progress_bar(TextColumn("{task.description}"), BarColumn()) as update:
        yield lambda done, total, what: update(completed=done, total=total, description=what)


def _as_json(report: TuningReport) -> dict:
    return {
        "device": report.device,
        "precision": report.precision,
        "before_s": report.before,
        "after_s": report.after,
        "changed": len(report.choices) > 0,
        "decisions": [asdict(decision) for decision in report.decisions],
        "path": None if report.path is None else str(report.path),
    }


def _print(report: TuningReport, x_shape: tuple[int, ...], dry_run: bool) -> None:
    out = console()
    out.print(f"{report.device}, x {x_shape}, products of linear layers in {report.precision}")
    made = table("Decisions", "what", "old", ">old time", "new", ">new time")
    for decision in report.decisions:
        changed = decision.before != decision.chosen
        made.add_row(
            decision.what, decision.before, _time(_seconds(decision, decision.before)),
            Text(decision.chosen, "bold" if changed else ""), _time(_seconds(decision, decision.chosen)),
        )  # fmt: skip
    out.print(made)
    for decision in report.decisions:
        for trial in decision.trials:
            if trial.seconds is None:
                out.print(f"out: {decision.what}: {trial.choice}: {trial.reason}")
    if not len(report.choices):
        out.print(
            f"nothing is faster than what runs now: {_time(report.before)} a relaxation; nothing was written"
        )
        return
    out.print(f"a relaxation with its updates: {_time(report.before)} before, {_time(report.after)} after")
    checked = f"verified: all {len(report.check.rows)} quantities within their bounds"
    out.print(f"{checked}; " + ("--dry-run: nothing was written" if dry_run else f"written to {report.path}"))


def _seconds(decision: Decision, choice: str) -> float | None:
    return next(trial.seconds for trial in decision.trials if trial.choice == choice)


def _time(seconds: float | None) -> str:
    return (
        "out"
        if seconds is None
        else f"{1e6 * seconds:.1f} us"
        if seconds < 1e-3
        else f"{1e3 * seconds:.3f} ms"
    )
