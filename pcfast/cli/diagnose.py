"""``pcfast diagnose``: how one relaxation goes, and how far its updates are from backpropagation's."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import click
import torch
from torch import nn

from ..comparison.compare import WHOLE
from ..diagnostics import diagnosis as diagnostics
from ..diagnostics import plots as diagnostics_plots
from ..diagnostics.diagnosis import METHODS, Diagnosis
from ..errors import ArgumentError, RelaxationDiverged
from ..precision import check_precision, use_precision
from ..problem.validation import checked_step_size, checked_steps
from ..support.figures import evenly
from ..support.files import results_folder, set_aside, write_csv, write_json
from ..support.machine import describe_machine
from ..support.naming import module_text
from ..support.plotting import drawn, require_matplotlib
from ..training.checkpoints import load_weights
from ..training.trainer import CHECKPOINT
from .building import belief_optimizer_of, data_of, device_of, network_of, with_defaults
from .defaults import DEFAULTS
from .options import (
    Count,
    Folder,
    Method,
    belief_optimizer_options,
    by_data,
    data_options,
    json_option,
    machine_options,
    network_options,
    relaxation_options,
    seed_option,
)
from .output import console, print_json, table

CONFIG, FIGURE = "config.json", "diagnose.png"
ENERGIES, ITERATIONS, UPDATES = "energies.csv", "iterations.csv", "updates.csv"
FILES = (CONFIG, ENERGIES, ITERATIONS, UPDATES, FIGURE)
_MAX_ROWS = 25  # of iterations on a screen


@click.command()
@data_options
@network_options
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="checkpoint.pt of a run of train with this network: its weights instead of initial ones.",
)
@click.option("--method", type=Method(METHODS), default="strict", show_default=True, help="Relaxation.")
@relaxation_options
@belief_optimizer_options
@click.option(
    "--batch-size",
    metavar="N",
    type=Count(),
    help="Samples of the batch, the first of the training part." + by_data("batch_size"),
)
@machine_options
@seed_option
@click.option("--out", type=Folder(), help="Folder of the results.  [default: runs/diagnose-<data>]")
@json_option
def diagnose(as_json: bool, out: Path | None, **options) -> int:
    """Relax one batch and show how it went: energies, convergence, updates against backpropagation.

    Writes tables (CSV) and a figure (PNG); earlier results in the folder are moved to earlier-N. Exit status 1: the
    relaxation diverged; what it left is written nevertheless.
    """
    chosen = with_defaults(options)
    checked_step_size(chosen["step_size"])
    checked_steps(chosen["num_steps"])
    device = device_of(chosen["device"])
    check_precision(chosen["precision"], device)
    belief_optimizer = belief_optimizer_of(chosen)
    require_matplotlib()
    out = out or Path("runs") / f"diagnose-{chosen['data']}"
    if (out / CHECKPOINT).exists():
        given = f"{out}, the folder of a training run"
        raise ArgumentError("out", given, "another folder", "Its config.json would be moved away.")
    torch.manual_seed(chosen["seed"])
    model = network_of(
        chosen["net"], chosen["widths"], chosen["model"], data=chosen["data"], precision=chosen["precision"]
    )
    if chosen["checkpoint"] is not None:
        load_weights(chosen["checkpoint"], model)
    model.to(device)
    with results_folder(out), use_precision(chosen["precision"], device):
        data = data_of(
            chosen["data"], chosen["data_dir"], model, seed=chosen["seed"], loss=chosen["loss"], spec=chosen["model"]
        )  # fmt: skip
        x, y = (part[: chosen["batch_size"]].to(device) for part in (data.x_train, data.y_train))
        settings = {name: chosen[name] for name in ("loss", "method", "step_size", "num_steps", "backend")}
        settings["belief_optimizer"] = belief_optimizer
        diverged = None
        try:
            result = diagnostics.diagnose(model, x, y, check="sync", **settings)
        except RelaxationDiverged as error:
            diverged = error
            result = diagnostics.diagnose(model, x, y, check="off", **settings)
        moved, unwritten = None, None
        try:
            moved = set_aside(out, FILES)
            _write(out, result, model, chosen, device)
        except OSError as error:  # raised when the tables are printed
            unwritten = error
    files = [str(out / name) for name in FILES if (out / name).exists()]
    rises = [] if result.rising is None else [int(t) + 1 for t in result.rising.nonzero()]
    if as_json and unwritten is None:
        print_json(
            {
                "backend": result.run.plan.backend,
                "iterations": [dict(zip(_ITERATION, row, strict=True)) for row in _iterations(result)],
                "energies": result.energies.tolist(),
                "belief_gradients": result.belief_gradients.tolist(),
                "updates": [dict(zip(_UPDATE, row, strict=True)) for row in _updates(result)],
                "rising": None if result.rising is None else rises,
                "diverged": None if diverged is None else str(diverged),
                "files": files,
                "earlier_results": None if moved is None else str(moved),
            }
        )
    elif not as_json:
        say = console()
        for shown in _tables(result, chosen):
            say.print(shown)
        if rises:
            say.print(
                f"the energy rises in {len(rises)} iterations, first in {rises[0]}: the step size, "
                f"{chosen['step_size']:g}, is too large here, or momentum overshoots"
            )
        if moved is not None:
            say.print(f"earlier results were moved to {moved}")
        for file in files:
            say.print(file)
    if unwritten is not None:
        raise unwritten
    if diverged is not None:
        raise diverged
    return 0


_ITERATION = ("iteration", "energy", "relaxed", "rising")
_ENERGY = ("iteration", "layer", "energy", "belief_gradient")
_UPDATE = ("layer", "relative_error", "angle_degrees")


def _iterations(result: Diagnosis) -> list[tuple]:
    """Rows of :data:`_ITERATION`: the energy summed over layers."""
    energies = result.energies.sum(1, dtype=torch.float64).tolist()
    rising = [None] * len(energies) if result.rising is None else result.rising.tolist()
    return [
        (t, *row)
        for t, row in enumerate(zip(energies, result.convergence.tolist(), rising, strict=True), start=1)
    ]


def _updates(result: Diagnosis) -> list[tuple]:
    """Rows of :data:`_UPDATE`, "all" last."""
    rows = zip(result.relative_error.tolist(), result.angle_degrees.tolist(), strict=True)
    whole = (WHOLE, float(result.whole_relative_error), float(result.whole_angle_degrees))
    return [*((layer, *row) for layer, row in enumerate(rows, start=1)), whole]


def _tables(result: Diagnosis, chosen: dict) -> list:
    relaxation = f"{chosen['method']}, step size {chosen['step_size']:g}, n = {chosen['num_steps']}"
    depth = result.energies.shape[1]
    heading = f"{relaxation}, backend {result.run.plan.backend}"
    by_iteration = table("As each iteration found the beliefs", ">iteration", ">energy", ">convergence", "")
    rows = _iterations(result)
    for index in evenly(len(rows), _MAX_ROWS):
        t, energy, convergence, rising = rows[index]
        by_iteration.add_row(str(t), _number(energy, 6), _number(convergence, 4), "rises" if rising else "")
    by_layer = table(
        "By layer", ">layer", ">energy at first", ">at last", ">gradient of beliefs at last",
        ">update: relative error", ">angle (degrees)",
    )  # fmt: skip
    for layer, error, angle in _updates(result):
        cells = [""] * 3
        if layer != WHOLE and len(rows):
            cells = [_number(float(result.energies[t, layer - 1])) for t in (0, -1)]
            cells.append(_number(float(result.belief_gradients[-1, layer - 1])) if layer < depth else "")
        by_layer.add_row(str(layer), *cells, _number(error), _number(angle))
    return [heading, by_iteration, by_layer]


def _write(out: Path, result: Diagnosis, model: nn.Sequential, chosen: dict, device: torch.device) -> None:
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
    config = {
        "settings": settings,
        "network": [module_text(layer) for layer in model],
        "backend": result.run.plan.backend,
        "device": str(device),
        "machine": describe_machine(device),
    }
    write_json(out / CONFIG, config, indent=2)
    gradients = [[*row, math.nan] for row in result.belief_gradients.tolist()]  # the output has no beliefs
    rows = (
        (t, layer, *values)
        for t, (energies, norms) in enumerate(zip(result.energies.tolist(), gradients, strict=True), start=1)
        for layer, values in enumerate(zip(energies, norms, strict=True), start=1)
    )
    write_csv(out / ENERGIES, _ENERGY, rows)
    write_csv(out / ITERATIONS, _ITERATION, _iterations(result))
    write_csv(out / UPDATES, _UPDATE, _updates(result))
    network = chosen["model"] or chosen["net"] or DEFAULTS[chosen["data"]].net
    relaxation = f"{chosen['method']}, step size {chosen['step_size']:g}, n = {chosen['num_steps']}"
    title = f"{chosen['data']}, {network}: {relaxation}"
    drawn(out / FIGURE, partial(diagnostics_plots.diagnosis_figure, result, title=title))


def _number(value: float, digits: int = 3) -> str:
    """``digits`` digits; "none" for what does not exist."""
    return "none" if math.isnan(value) else f"{value:.{digits}g}"
