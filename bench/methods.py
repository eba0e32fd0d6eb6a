"""Every method under equal iterations: time of a training step and test accuracy, on digits and MNIST.

    python -m pcfast.bench.methods --data digits --data mnist --data-dir FOLDER --json .benchmarks/methods.json
    python -m pcfast.bench.report --record .benchmarks/methods.json    # keep it; the table in docs/methods.md

All entries relax for as many iterations, with the mean squared error on one-hot targets and the defaults of
pcfast/cli/defaults.py; what an entry has of its own stands in ``ENTRIES``. Steps are timed first, and by turns: a
machine that is shared spoils times, not accuracies.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
import torch
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from torch import nn

import pcfast
from pcfast.cli import main
from pcfast.cli.building import check_record, data_of, device_of, kept_so_far, network_of
from pcfast.cli.defaults import DEFAULTS, NUM_STEPS
from pcfast.cli.options import OPTIMIZERS, device_option, record_option
from pcfast.cli.output import console, progress_bar, table
from pcfast.datasets import SOURCES, Data
from pcfast.errors import ArgumentError, RelaxationDiverged
from pcfast.problem.belief_optimizers import BeliefOptimizer
from pcfast.problem.nudging import Nudging
from pcfast.problem.status import synchronize
from pcfast.support.files import write_json
from pcfast.training import trainer as training

from .contenders import PreparedStep
from .measure import QUICK_ROUNDS, ROUNDS, Times, take_turns
from .runner import Progress, new_record
from .tables import by_data, data_heading, method_cells, method_headings, method_notes

DATA = ("digits", "mnist", "fashion-mnist")
LOSS, PRECISION = "mse", "ieee"  # nudging takes the squared error alone
SEEDS = 3
#: Of a timed step, which repeats one batch: rounding swallows what the optimiser subtracts, so the weights stay.
STANDING_STILL = 1e-12


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        name: as shown.
        method, belief_optimizer, nudging: as for ``training.train``.
        waning: eta_t = step size / (1 + waning t), t = 0, 1, ...
        step_size, lr: by data set, where not the data set's default.
    """

    name: str
    method: str = "strict"
    belief_optimizer: BeliefOptimizer | None = None
    nudging: Nudging | None = None
    waning: float = 0.0
    step_size: Mapping[str, float] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=dict)

    def relaxation(self, data: str) -> dict:
        """What ``pc_loss`` takes, but for method, belief optimiser and nudging."""
        step_size = self.step_size.get(data, DEFAULTS[data].step_size)
        if self.waning:
            step_size = [step_size / (1 + self.waning * t) for t in range(NUM_STEPS)]
        return {"loss": LOSS, "step_size": step_size, "num_steps": NUM_STEPS}

    def variant(self) -> dict:
        """What ``pc_loss`` and ``train`` take beside."""
        return {
            "method": self.method, "belief_optimizer": self.belief_optimizer, "nudging": self.nudging,
        }  # fmt: skip


def _of_data(digits: float | None = None, mnist: float | None = None) -> dict[str, float]:
    """Values by data set, where given; Fashion-MNIST, which has MNIST's network and defaults, has its values too."""
    values = {"digits": digits, "mnist": mnist, "fashion-mnist": mnist}
    return {data: value for data, value in values.items() if value is not None}


ENTRIES: tuple[Entry, ...] = (
    Entry("exact (backpropagation)", "exact"),
    Entry("zero_divergence", "zero_divergence"),
    Entry("fixed_prediction", "fixed_prediction"),
    Entry("strict"),
    # Momentum 0.9 makes of one step up to ten. On digits the default is as good as less.
    Entry(
        "strict, momentum 0.9", belief_optimizer=pcfast.GradientDescent(0.9), step_size=_of_data(mnist=0.02)
    ),
    Entry("strict, step sizes waning by 1 / (1 + 0.2 t)", waning=0.2),
    # Adam moves beliefs by its step size however small the errors are, and those of a mean loss are small.
    Entry(
        "strict, Adam on beliefs", belief_optimizer=pcfast.Adam(), step_size=_of_data(digits=1e-4, mnist=3e-7)
    ),
    Entry("strict, nudging positive, beta 0.5", nudging=Nudging("positive", 0.5)),
    Entry("strict, nudging negative, beta 0.5", nudging=Nudging("negative", 0.5)),
    Entry("strict, nudging centred, beta 0.5", nudging=Nudging("centred", 0.5)),
    Entry("error_based", "error_based"),
    # It takes 20 optimiser steps a batch. On MNIST the default learning rate is better than less or more, and beliefs
    # have to follow predictions that move by it.
    Entry("incremental", "incremental", step_size=_of_data(mnist=0.5), lr=_of_data(digits=5e-5)),
)


def settings_of(entry: Entry, data: str, epochs: int | None = None) -> dict:
    """Everything that decides ``entry``'s result on ``data`` but the seed, in plain values."""
    defaults = DEFAULTS[data]
    reads = entry.method not in ("exact", "zero_divergence")  # they have no step size and no iterations
    return {
        "data": data,
        "network": _network(data),
        "name": entry.name,
        **{name: None if value is None else str(value) for name, value in entry.variant().items()},
        **entry.relaxation(data),
        **({} if reads else {"step_size": None, "num_steps": None}),
        "optimizer": defaults.optimizer,
        "lr": entry.lr.get(data, defaults.lr),
        "weight_decay": defaults.weight_decay,
        "batch_size": defaults.batch_size,
        "epochs": epochs or defaults.epochs,
    }


def is_current(result: dict) -> bool:
    """Whether the record's methods have the settings that they have here today."""
    rows = result["methods"]
    return [row["settings"] for row in rows] == [
        settings_of(entry, data) for data in dict.fromkeys(row["settings"]["data"] for row in rows)
        for entry in ENTRIES
    ]  # fmt: skip


def _network(data: str) -> str:
    """The data set's network in a few words."""
    defaults, source = DEFAULTS[data], SOURCES[data]
    if defaults.net != "mlp":
        return "the paper's network"
    pixels = torch.Size(source.image_shape).numel()
    return "-".join(map(str, (pixels, *defaults.widths, source.classes)))


def run(
    names: Sequence[str],
    device: torch.device,
    *,
    folder: Path | None = None,
    seeds: int = SEEDS,
    epochs: int | None = None,
    progress: Progress = lambda done, total, what: None,
    keep: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Time, then train every entry on the data sets ``names``.

    Args:
        folder: with the files of those that do not come with scikit-learn; None: fetch them.
        seeds: 0 .. seeds - 1 of initial weights, order of samples and the split of digits.
        epochs: instead of the data sets' own; fewer make a quick run, with few rounds of timing.
        keep: gets the record after every run of training, not yet ``complete``.

    Returns:
        The record; under ``methods`` a row an entry and data set: ``settings`` (:func:`settings_of`); ``seconds``,
        ``p20``, ``p80``, ``samples``, ``clock`` of a training step, None where it diverged; ``runs``, a seed's
        final ``test_accuracy``, or ``diverged`` with iteration and layer.

    Raises:
        ArgumentError: a data set is not there; before anything is timed.
    """
    quick = epochs is not None and any(epochs < DEFAULTS[name].epochs for name in names)
    record = new_record(device, quick)
    first = {name: _load(name, folder if name != "digits" else None, 0) for name in names}
    total, done = len(names) * len(ENTRIES) * seeds, 0
    rows: dict[tuple[str, str], dict] = {}
    for name in names:
        progress(done, total, f"{name}: timing")
        times = _times(name, first[name], device, QUICK_ROUNDS if quick else ROUNDS)
        for entry in ENTRIES:
            rows[name, entry.name] = {
                "settings": settings_of(entry, name, epochs), **_timing(times.get(entry.name)), "runs": [],
            }  # fmt: skip
    record["methods"] = list(rows.values())
    for name in names:
        for seed in range(seeds):
            # MNIST's parts are the same for every seed, and reading them from OpenML takes a minute
            data = _load(name, None, seed) if name == "digits" else first[name]
            for entry in ENTRIES:
                progress(done, total, f"{name}, seed {seed}: {entry.name}")
                rows[name, entry.name]["runs"].append(_trained(entry, name, data, device, seed, epochs))
                done += 1
                keep(record)
    progress(total, total, "done")
    record["complete"] = True
    return record


def _load(name: str, folder: Path | None, seed: int) -> Data:
    return data_of(name, folder, _model(name, seed), seed=seed, loss=LOSS)


def _model(name: str, seed: int) -> nn.Sequential:
    """As `pcfast train --data name --seed seed` draws it."""
    torch.manual_seed(seed)
    return network_of(None, None, None, data=name)


def _optimizer(entry: Entry, name: str, lr: float | None = None):
    """What makes the data set's optimiser from the parameters."""
    defaults = DEFAULTS[name]
    lr = entry.lr.get(name, defaults.lr) if lr is None else lr
    return partial(OPTIMIZERS[defaults.optimizer], lr=lr, weight_decay=defaults.weight_decay)


def _times(name: str, data: Data, device: torch.device, rounds: int) -> dict[str, Times]:
    """Entry -> times of a whole training step at the initial weights, without those that diverge."""
    rows = DEFAULTS[name].batch_size
    x, y = data.x_train[:rows].to(device), data.y_train[:rows].to(device)
    model = _model(name, 0).to(device)
    steps = []
    for entry in ENTRIES:
        step = _step(entry, name, copy.deepcopy(model), x, y)
        try:
            step.run()
            synchronize()  # on CUDA a divergence is known only now
        except RelaxationDiverged:
            continue
        steps.append((entry.name, step))
    return take_turns(steps, PRECISION, device, rounds, lambda: False)


def _step(entry: Entry, name: str, model: nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> PreparedStep:
    """One training step as ``training.train`` takes it, with the optimiser's."""
    optimizer = _optimizer(entry, name, STANDING_STILL)(model.parameters())
    relaxation = entry.relaxation(name)

    def learn() -> None:
        optimizer.zero_grad()
        pcfast.pc_loss(model, x, y, **relaxation, **entry.variant()).backward()
        optimizer.step()

    def learn_incrementally() -> None:
        pcfast.incremental_step(model, x, y, optimizer, **relaxation)

    return PreparedStep(
        learn_incrementally if entry.method == "incremental" else learn,
        lambda: [p.grad for p in model.parameters()],
        partial(torch.cuda.synchronize, x.device) if x.is_cuda else lambda: None,
    )


def _timing(result: Times | None) -> dict:
    names = {"seconds": "median", "p20": "p20", "p80": "p80", "samples": "samples", "clock": "clock"}
    return {name: None if result is None else getattr(result, attribute) for name, attribute in names.items()}


def _trained(
    entry: Entry, name: str, data: Data, device: torch.device, seed: int, epochs: int | None
) -> dict:
    """One run: its final test accuracy, or where it diverged."""
    defaults = DEFAULTS[name]
    try:
        history = training.train(
            _model(name, seed), data, epochs=epochs or defaults.epochs, batch_size=defaults.batch_size,
            optimizer=_optimizer(entry, name), precision=PRECISION, device=device, seed=seed, progress=False,
            **entry.relaxation(name), **entry.variant(),
        )  # fmt: skip
    except RelaxationDiverged as error:
        return {"seed": seed, "diverged": {"iteration": error.iteration, "layer": error.layer}}
    return {"seed": seed, "test_accuracy": history.test_accuracy[-1]}


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--data", "names", type=click.Choice(DATA), multiple=True, default=("digits",), show_default=True,
    help="May be repeated.",
)  # fmt: skip
@click.option(
    "--data-dir",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder with the IDX files of mnist or fashion-mnist.  [default: fetch them from OpenML]",
)
@click.option("--seeds", type=click.IntRange(min=1), default=SEEDS, show_default=True, metavar="N")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="With fewer than the data set's own the run is a quick one, which is not kept.",
)
@device_option
@record_option
def methods(names, folder, seeds, epochs, device, path) -> None:
    device = device_of(device)
    names = tuple(dict.fromkeys(names))
    _check_folder(names, folder)
    check_record(path)
    with progress_bar(BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")) as update:

        def progress(done: int, total: int, what: str) -> None:
            update(completed=done, total=total, description=what)

        keep = partial(kept_so_far, path)
        record = run(names, device, folder=folder, seeds=seeds, epochs=epochs, progress=progress, keep=keep)
    out = console()
    for rows in by_data(record["methods"]).values():
        shown = table(data_heading(rows), *method_headings())
        for row in rows:
            shown.add_row(*method_cells(row, rows))
        out.print(shown)
        for note in method_notes(rows):
            out.print(note)
    if path is not None:  # last: its disk may be full
        write_json(path, record)


def _check_folder(names: Sequence[str], folder: Path | None) -> None:
    """Raise ArgumentError unless ``folder`` is that of one data set."""
    of_files = [name for name in names if name != "digits"]
    if folder is not None and len(of_files) != 1:
        given = f"{folder} for {' and '.join(of_files) or 'digits, which come with scikit-learn'}"
        raise ArgumentError(
            "data_dir", given, "the folder of one data set", "Leave it out, or run them in turn."
        )


if __name__ == "__main__":
    sys.exit(main(command=methods, name="python -m pcfast.bench.methods"))
