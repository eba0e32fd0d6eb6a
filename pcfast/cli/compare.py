"""``pcfast compare``: predictive coding against backpropagation, as in figures 1 to 7 of Rosenbaum (2022)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from torch import nn

from .. import networks
from ..autograd import pc_loss
from ..backends.qualification.automatic import local_rank
from ..comparison import compare as comparison
from ..comparison import plots as comparison_plots
from ..comparison.compare import ITERATIONS, METHODS, STEP_SIZES, WHOLE, TrainingComparison
from ..datasets import Data
from ..errors import ArgumentError
from ..model.describe import describe
from ..precision import check_precision, parameter_dtype, use_precision
from ..problem.plan import METHODS as ALL_METHODS
from ..problem.validation import checked_step_size, checked_steps
from ..support.files import results_folder, set_aside, write_csv, write_json
from ..support.machine import describe_machine
from ..support.naming import module_text
from ..support.plotting import drawn, require_matplotlib
from ..training.distributed import ALONE, Alone
from ..training.trainer import CHECKPOINT, MAX_EPOCHS, MAX_STEPS, MakeOptimizer
from .building import data_of, network_of, optimizer_of, with_defaults
from .defaults import DEFAULTS
from .launch import Launch, joined
from .options import (
    Count,
    Folder,
    Method,
    Numbers,
    by_data,
    data_options,
    json_option,
    machine_options,
    network_options,
    optimizer_options,
    relaxation_options,
    seed_option,
)
from .output import console, print_json, progress_bar, table

T = TypeVar("T")
PARTS = ("training", "iterations", "errors")
CONFIG, OVERVIEW = "config.json", "compare.png"
FILES = (
    CONFIG, OVERVIEW, "training.csv", "updates.csv", "training.png", "iterations.csv", "iterations.png", "errors.csv",
    "errors.png",
)  # fmt: skip
_MAX_WIDTH = 2**14  # of images and networks in part errors: beyond it no memory is enough
IMAGES = 2  # in the batch of part errors


_STEP_SIZES = Numbers(float, lambda v: math.isfinite(v) and v >= 0, "numbers >= 0, e.g. 0.1,0.5,1")
_COUNTS = Numbers(int, lambda v: 1 <= v <= MAX_STEPS, f"whole numbers from 1 to {MAX_STEPS}, e.g. 1,10,100")


@click.command()
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS[:2], show_default=True,
    help="What to compare; may be repeated. training: learning curves and every update. iterations: an update "
    "against the number of iterations. errors: errors by layer in a network shaped as VGG-19.",
)  # fmt: skip
@data_options
@network_options
@click.option(
    "--method", "methods", type=Method(ALL_METHODS), multiple=True, default=METHODS, show_default=True,
    help="Relaxation; may be repeated.",
)  # fmt: skip
@relaxation_options
@optimizer_options
@click.option(
    "--epochs", "compare_epochs", type=Count(max=MAX_EPOCHS),
    help="Passes over the training part." + by_data("compare_epochs"),
)  # fmt: skip
@click.option(
    "--test-every", type=Count(), metavar="STEPS",
    help="Steps between evaluations of the test part.  [default: about 20 evaluations in all]",
)  # fmt: skip
@click.option(
    "--step-sizes", type=_STEP_SIZES, default=STEP_SIZES,
    help=f"Of part iterations.  [default: {','.join(f'{s:g}' for s in STEP_SIZES)}]",
)  # fmt: skip
@click.option(
    "--iterations", type=_COUNTS, default=ITERATIONS,
    help="Numbers of iterations n of part iterations; the number of layers L is added."
    f"  [default: {','.join(map(str, ITERATIONS))}]",
)  # fmt: skip
@click.option(
    "--vgg-width", type=Count(max=_MAX_WIDTH), default=8, show_default=True,
    help="Channels of the first stage in part errors; 64 is VGG-19.",
)  # fmt: skip
@click.option(
    "--image-size",
    type=Count(max=_MAX_WIDTH),
    default=32,
    show_default=True,
    help="Of part errors, a multiple of 32; VGG-19's is 224.",
)
@click.option(
    "--errors-step-size", type=float, metavar="ETA", default=0.05, show_default=True, help="Of part errors."
)
@click.option(
    "--errors-num-steps",
    type=Count(None, MAX_STEPS),
    metavar="N",
    default=500,
    show_default=True,
    help="Of part errors.",
)
@machine_options
@seed_option
@click.option("--out", type=Folder(), help="Folder of the results.  [default: runs/compare-<data>]")
@json_option
def compare(as_json: bool, out: Path | None, **options) -> int:
    """Compare predictive coding with backpropagation, as in Rosenbaum (2022), figures 1 to 7.

    Every part writes its tables (CSV) and figures (PNG) into the folder as soon as it is finished; compare.png shows
    them all. Earlier results there are moved to earlier-N. Exit status 1: a relaxation diverged in training.

    Under torchrun its processes share out the methods.
    """
    chosen = with_defaults(options)
    out = out or Path("runs") / f"compare-{chosen['data']}"
    with joined() as launch, contextlib.ExitStack() as held:
        processes = launch.processes
        with processes.agreed():
            work = _made(chosen, launch)
            if processes.leads:
                _check_out(out)
                held.enter_context(results_folder(out))
            held.enter_context(use_precision(chosen["precision"], work.device))
        for turn in (local_rank() == 0, local_rank() != 0):  # one process on a machine fetches the data
            with processes.agreed():
                if turn and work.model is not None:
                    _load(work)
        parts = [part for part in PARTS if part in chosen["parts"]]
        if processes.leads:
            return _compared(work, parts, out, as_json)
        results = _Results()
        for part in parts:
            _RUN[part](work, results, None)
        return 1 if results.training and results.training.ended else 0


def _made(chosen: dict, launch: Launch) -> _Work:
    """Networks and device; raises what the options say that cannot be."""
    for name, check in (("step_size", checked_step_size), ("num_steps", checked_steps)):
        check(chosen[name])
        _named(f"errors_{name}", check, chosen[f"errors_{name}"])
    device = launch.device(chosen["device"])
    check_precision(chosen["precision"], device)
    make_optimizer = optimizer_of(chosen)
    require_matplotlib()
    work = _Work(chosen, device, make_optimizer, launch.processes)
    if set(chosen["parts"]) != {"errors"}:
        work.model = _model(chosen, device)
    if "errors" in chosen["parts"]:
        work.vgg = _vgg(chosen, device)
    return work


def _check_out(out: Path) -> None:
    if (out / CHECKPOINT).exists():
        given = f"{out}, the folder of a training run"
        raise ArgumentError("out", given, "another folder", "Its config.json would be moved away.")


def _load(work: _Work) -> None:
    chosen = work.chosen
    work.data = data_of(
        chosen["data"],
        chosen["data_dir"],
        work.model,
        seed=chosen["seed"],
        loss=chosen["loss"],
        spec=chosen["model"],
    )
    _rehearse(work)


def _compared(work: _Work, parts: list[str], out: Path, as_json: bool) -> int:
    """Run the parts, print and write what they find; the exit status."""
    chosen = work.chosen
    say, aside, results = console(), None, _Results()
    for part in parts:
        with _bar(part) as progress:
            shown = _RUN[part](work, results, progress)
        if part == parts[0]:  # a run that fails before leaves earlier results where they are
            aside = set_aside(out, FILES)
            write_json(out / CONFIG, _config(work, parts), indent=2)
        if not as_json:  # before the files, whose disk may be full
            for printed in shown:
                say.print(printed)
        _write(part, out, results, chosen)
    if aside is not None and not as_json:
        say.print(f"earlier results were moved to {aside}")
    ended = results.training.ended if results.training else {}
    files = [str(out / name) for name in FILES if (out / name).exists()]
    if as_json:
        moved = None if aside is None else str(aside)
        print_json({**results.summary, "ended": ended, "files": files, "earlier_results": moved})
    else:
        for file in files:
            say.print(file)
    for method, why in ended.items():
        console(stderr=True).print(f"error: training by {method} ended at {why}", soft_wrap=True)
    return 1 if ended else 0


@dataclass
class _Work:
    """What the parts work on; ``model``, ``data`` and ``vgg`` where a part needs them."""

    chosen: dict
    device: torch.device
    make_optimizer: MakeOptimizer
    processes: Alone = ALONE
    model: nn.Sequential | None = None
    data: Data | None = None
    vgg: nn.Sequential | None = None

    @property
    def common(self) -> dict:
        """Arguments of every comparison."""
        return {"loss": self.chosen["loss"], "backend": self.chosen["backend"]}

    def dealt(self, compare: Callable[[Sequence[str]], T]) -> list[T]:
        """What ``compare(methods)`` gives on every process for its share of the methods, where it has one."""
        mine = self.processes.dealt(self._methods)
        with self.processes.agreed():
            made = compare(mine) if mine else None
        return [one for one in self.processes.gathered(made) if one is not None]

    def in_order(self, rows: Iterable) -> tuple:
        """``rows`` by their methods as the command line has them, backpropagation's first."""
        place = {method: number for number, method in enumerate(self._methods)}
        return tuple(sorted(rows, key=lambda row: place.get(row.method, -1)))

    @property
    def _methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.chosen["methods"]))

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first rows of the training part, on the device."""
        rows = slice(self.chosen["batch_size"])
        return self.data.x_train[rows].to(self.device), self.data.y_train[rows].to(self.device)


@dataclass
class _Results:
    """What the parts that are finished found; ``summary`` is what is printed of it, in plain values."""

    training: TrainingComparison | None = None
    iterations: tuple[comparison.Iterations, ...] | None = None
    errors: tuple[comparison.LayerError, ...] | None = None
    summary: dict = field(default_factory=dict)


def _model(chosen: dict, device: torch.device) -> nn.Sequential:
    torch.manual_seed(chosen["seed"])
    made = network_of(
        chosen["net"], chosen["widths"], chosen["model"], data=chosen["data"], precision=chosen["precision"]
    )
    return made.to(device)


def _vgg(chosen: dict, device: torch.device) -> nn.Sequential:
    torch.manual_seed(chosen["seed"])
    made = networks.vgg19(width=chosen["vgg_width"], image_size=chosen["image_size"])
    return made.to(device, parameter_dtype(chosen["precision"]))


def _rehearse(work: _Work) -> None:
    """One loss and its update, so that whatever does not fit is found before any file is touched."""
    with torch.random.fork_rng([work.device] if work.device.type == "cuda" else []):
        pc_loss(
            copy.deepcopy(work.model), *work.batch, loss=work.chosen["loss"], method="exact",
            backend=work.chosen["backend"], check="sync",
        )  # fmt: skip


def _training(work: _Work, results: _Results, progress) -> list:
    chosen = work.chosen
    names = ("batch_size", "step_size", "num_steps", "seed", "test_every")
    first, *others = work.dealt(lambda methods: comparison.compare_training(
        work.model, work.data, methods=methods, epochs=chosen["compare_epochs"], optimizer=work.make_optimizer,
        progress=progress, **{name: chosen[name] for name in names}, **work.common,
    ))  # fmt: skip
    steps = (row for other in others for row in other.steps if row.method != comparison.BACKPROPAGATION)
    updates = (row for other in others for row in other.updates)
    result = results.training = replace(
        first,
        steps=work.in_order((*first.steps, *steps)),
        updates=work.in_order((*first.updates, *updates)),
    )
    curves = table(
        "Learning curves: training as mean of the last epoch, test at its end",
        "", ">training loss", ">training accuracy", ">test loss", ">test accuracy",
    )  # fmt: skip
    final = {method: result.final(method) for method in result.methods}
    for method, values in final.items():
        cells = [f"{values['train_loss']:.4f}", f"{values['train_accuracy']:.2%}"]
        cells += [f"{values['test_loss']:.4f}", f"{values['test_accuracy']:.2%}"]
        curves.add_row(method, *(["diverged"] * 4 if method in result.ended else cells))
    updates = table(
        f"Updates, step size {result.step_size:g}, n = {result.num_steps}: medians over steps",
        "", ">layer", ">relative error", ">angle (degrees)",
    )  # fmt: skip
    medians = []
    for (method, layer), (error, angle) in result.medians().items():
        updates.add_row(method, str(layer), _number(error), _number(angle))
        medians.append({"method": method, "layer": layer, "relative_error": error, "angle_degrees": angle})
    results.summary["training"] = {"final": final, "median_updates": medians}
    return [curves, updates]


def _iterations(work: _Work, results: _Results, progress) -> list:
    chosen = work.chosen
    every = work.dealt(lambda methods: comparison.compare_iterations(
        work.model, *work.batch, methods=methods, step_sizes=chosen["step_sizes"], iterations=chosen["iterations"],
        progress=progress, **work.common,
    ))  # fmt: skip
    rows = results.iterations = work.in_order(row for rows in every for row in rows)
    whole = {(row.method, row.step_size, row.num_steps): row for row in rows if row.layer == WHOLE}
    methods, step_sizes, counts = (list(dict.fromkeys(column)) for column in zip(*whole, strict=True))
    shown = []
    for method in methods:
        grid = table(
            f"Relative error of the whole update, initial weights: {method}",
            ">n", *(f">step size {step_size:g}" for step_size in step_sizes),
        )  # fmt: skip
        for n in counts:
            result = [whole[method, step_size, n] for step_size in step_sizes]
            grid.add_row(str(n), *("diverged" if r.note else _number(r.relative_error) for r in result))
        shown.append(grid)
    depth = len(describe(work.model).layers)
    exact = whole.get(("fixed_prediction", 1.0, depth))
    if exact is not None:
        shown.append(
            f"fixed_prediction with step size 1 and n = L = {depth}: relative error {_number(exact.relative_error)}, "
            f"angle {_number(exact.angle_degrees)} degrees"
        )
    results.summary["iterations"] = [asdict(row) for row in rows]
    return shown


def _errors(work: _Work, results: _Results, progress) -> list:
    chosen = work.chosen
    generator = torch.Generator().manual_seed(chosen["seed"])
    size, classes = chosen["image_size"], work.vgg[-1].out_features
    dtype = parameter_dtype(chosen["precision"])
    x = torch.randn(IMAGES, 3, size, size, generator=generator, dtype=dtype).to(work.device)
    y = torch.randint(classes, (IMAGES,), generator=generator).to(work.device)
    if chosen["loss"] == "mse":
        y = F.one_hot(y, classes).to(dtype)
    every = work.dealt(lambda methods: comparison.compare_errors(
        work.vgg, x, y, methods=methods, num_steps=chosen["errors_num_steps"],
        step_size=chosen["errors_step_size"], progress=progress, **work.common,
    ))  # fmt: skip
    rows = results.errors = work.in_order(row for rows in every for row in rows)
    methods = list(dict.fromkeys(row.method for row in rows))
    grid = table(
        f"Errors by layer: {_errors_of(chosen)}", ">layer", ">backpropagation: norm",
        *(f">{method}: {quantity}" for method in methods for quantity in ("norm", "relative error")),
    )  # fmt: skip
    by_layer: dict[int, list] = {}
    for row in rows:
        by_layer.setdefault(row.layer, []).append(row)
    for layer, result in by_layer.items():
        cells = [
            "diverged" if row.note else _number(value)
            for row in result
            for value in (row.error_norm, row.relative_error)
        ]
        grid.add_row(str(layer), _number(result[0].exact_norm), *cells)
    results.summary["errors"] = [asdict(row) for row in rows]
    return [grid]


_RUN = {"training": _training, "iterations": _iterations, "errors": _errors}


def _write(part: str, out: Path, results: _Results, chosen: dict) -> None:
    """The files of a finished part, and the overview of all that are."""
    network = chosen["model"] or chosen["net"] or DEFAULTS[chosen["data"]].net
    title = f"{chosen['data']}, {network}"
    if part == "training":
        _write_rows(out / "training.csv", comparison.Step, results.training.steps)
        _write_rows(out / "updates.csv", comparison.Update, results.training.updates)
        relaxation = f"step size {chosen['step_size']:g}, n = {chosen['num_steps']}"
        draw = partial(comparison_plots.training_figure, results.training, title=f"{title}: {relaxation}")
        drawn(out / "training.png", draw)
    elif part == "iterations":
        _write_rows(out / "iterations.csv", comparison.Iterations, results.iterations)
        about = f"{title}: initial weights, one batch"
        draw = partial(comparison_plots.iterations_figure, results.iterations, title=about)
        drawn(out / "iterations.png", draw)
    else:
        _write_rows(out / "errors.csv", comparison.LayerError, results.errors)
        draw = partial(comparison_plots.errors_figure, results.errors, title=_errors_of(chosen))
        drawn(out / "errors.png", draw)
    overview = partial(
        comparison_plots.overview,
        training=results.training,
        iterations=results.iterations,
        errors=results.errors,
        title="Predictive coding against backpropagation"
        + ("" if results.training is None and results.iterations is None else f": {title}"),
        errors_of=_errors_of(chosen),
    )
    drawn(out / OVERVIEW, overview)


def _write_rows(path: Path, kind: type, rows: Sequence) -> None:
    write_csv(path, [column.name for column in fields(kind)], map(astuple, rows))


def _errors_of(chosen: dict) -> str:
    size = chosen["image_size"]
    shape = "VGG-19" if chosen["vgg_width"] == 64 else f"VGG-19 of width {chosen['vgg_width']}"
    relaxation = f"step size {chosen['errors_step_size']:g}, n = {chosen['errors_num_steps']}"
    return f"{shape}, random {size} x {size} images, {relaxation}"


def _config(work: _Work, parts: list[str]) -> dict:
    """What ``config.json`` says: the settings, the network, and where they ran."""
    chosen, device = work.chosen, work.device
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
    settings["epochs"] = settings.pop("compare_epochs")
    return {
        "settings": {**settings, "parts": parts},
        "network": None if work.model is None else [module_text(layer) for layer in work.model],
        "device": str(device),
        "machine": describe_machine(device),
    }


@contextlib.contextmanager
def _bar(part: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, in a terminal; Ctrl-C says that finished parts stay."""
    try:
        with progress_bar(TextColumn(part), BarColumn(), TimeRemainingColumn()) as update:
            yield lambda done, total: update(completed=done, total=total)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped in part {part}; the parts finished before are written") from None


def _number(value: float) -> str:
    """Three digits; "none" for what does not exist."""
    return "none" if math.isnan(value) else f"{value:.3g}"


def _named(name: str, check: Callable, value) -> None:
    """``check(value)``, whose ArgumentError names the option ``name``."""
    try:
        check(value)
    except ArgumentError as error:
        raise ArgumentError(name, error.given, error.needed, error.remedy) from None
