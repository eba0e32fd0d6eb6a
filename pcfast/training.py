"""Training with predictive coding: one plain function, :func:`train`, and the run folder that it keeps.

A run folder holds

- ``checkpoint.pt``: everything to go on with, readable by ``torch.load(path, weights_only=True)``;
- ``config.json``: the settings of the run and the machine it ran on;
- ``log.csv``: one line an epoch;
- ``curves.png``: loss and accuracy against the epoch.

Every file is replaced atomically, so a crash leaves the old or the new one, never half of one. On the command line:
``pcfast train``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import pcfast

from . import incremental, plots
from . import nudging as nudges
from .belief_optimizers import BeliefOptimizer
from .checkpoints import FORMAT, callable_name, load_checkpoint, loss_name, run_settings
from .datasets import Data, checked_data
from .errors import ArgumentError, ArgumentTypeError
from .files import results_folder, set_aside, write_atomically, write_csv, write_json
from .history import History
from .losses import LossLike, describe_loss
from .machine import describe_machine
from .nudging import Nudging
from .precision import check_precision, use_precision
from .progress import Display, Interrupt
from .status import synchronize
from .validation import check_count, check_optimizer, checked_device, checked_step_sizes, checked_steps

FILES = CHECKPOINT, CONFIG, LOG, CURVES = "checkpoint.pt", "config.json", "log.csv", "curves.png"
LEARNING_RATE = 0.002  # of the default optimiser, Adam
SECONDS_BETWEEN_DRAWINGS = 30.0  # drawing takes about 0.3 s, longer than an epoch of a small network

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
NudgingByEpoch = Callable[[int], Nudging | None]
MakeScheduler = Callable[[Optimizer, int], LRScheduler]


def train(
    model: nn.Sequential,
    data: Data | Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int = 64,
    loss: LossLike = F.cross_entropy,
    method: str = "strict",
    step_size: float | Sequence[float] = 0.1,
    num_steps: int = 20,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | NudgingByEpoch | None = None,
    nudging_growth: float = 0.0,
    optimizer: Optimizer | MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    drop_last: bool = False,
    backend: str = "auto",
    precision: str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    kept: dict | None = None,
) -> History:
    """Train ``model`` in place by predictive coding.

    The run is a function of its arguments: samples are shuffled by (seed, epoch), and torch's global random
    state, which dropout draws from, is seeded with ``seed`` for the run and restored afterwards. On the CPU a
    resumed run is bit-identical to one that was never interrupted (with the same number of threads).

    Ctrl-C finishes the current batch (or evaluation), writes the checkpoint, and raises KeyboardInterrupt; a
    second Ctrl-C stops at once and leaves the last checkpoint as it was. (Only in the main thread: others get
    no signals.)

    Args:
        model: each element is one PC layer; parameters of any floating dtype.
        data: ``Data`` or (x_train, y_train, x_test, y_test): inputs (N, ...) in the model's dtype; targets
            class indices, int64, (N,), or class probabilities, floating point, (N, C), where the loss takes
            them (MSE takes one-hot targets). Copied to the device once.
        epochs: passes over the training part in all, those of a resumed run included.
        batch_size: samples an update; the last batch of an epoch may be smaller, or is left out with ``drop_last``.
        loss: a callable loss(output, y) -> scalar, or a name, as for ``pcfast.pc_loss``. A callable that sums
            over the batch says so in an attribute ``reduction`` = "sum" (as torch's modules do); only the
            logged numbers depend on it.
        method, step_size, num_steps, belief_optimizer, nudging, backend: as for ``pcfast.pc_loss``; or method
            "incremental", as for ``pcfast.incremental_step``.
            ``nudging`` may be a function of the epoch 0, 1, ..., called for all epochs before the first.
        nudging_growth: what beta gains every epoch, as far as 1.
        optimizer: makes the optimiser from the parameters, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``, or
            an optimiser of the model's parameters. Default: Adam with learning rate 0.002.
        scheduler: makes a scheduler of torch.optim.lr_scheduler from the optimiser and the number of the optimiser's
            steps in all epochs; it is stepped after each of them. A resumed run then has as many epochs.
        augment: batch of training inputs -> what is learned instead, of the same shape, e.g.
            :class:`pcfast.datasets.FlipAndCrop`; random numbers from torch's global state.
        precision: "ieee", "tf32", "bf16" or "fp64", as for :func:`pcfast.precision.use_precision`; "fp64" needs
            float64 parameters. Default: torch's switches as they are.
        device: where to train; the model is moved there. Default: where the model is.
        seed: >= 0.
        out: the run folder, created if missing. Without ``resume`` the files of an earlier run in it are moved to
            ``earlier-1`` (or -2, ...) inside it.
        resume: go on from the checkpoint in ``out``. Settings must be those of that run; epochs (without a
            scheduler), backend and device may differ. Functions are told apart by their names.
        progress: show a progress bar (in a terminal) and print one line an epoch.
        kept: plain values for ``config.json`` beside the settings, e.g. what the model and the data were made from.

    Returns:
        The history, earlier epochs of a resumed run included.

    Raises:
        ArgumentError: an argument does not fit, or the checkpoint is missing or of another run; names it.
        RelaxationDiverged: the checkpoint of the last finished epoch stays.
        KeyboardInterrupt: after Ctrl-C.
        ImportError: matplotlib (out) is missing; the message says how to install it.
    """
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_count(name, value, least)
    if not isinstance(model, nn.Sequential):
        raise ArgumentTypeError("model", f"a {type(model).__name__}", "an nn.Sequential of PC layers")
    parameters = list(model.parameters())
    if not parameters:
        raise ArgumentError("model", "no parameters", "at least one parameter to train")
    if resume and out is None:
        raise ArgumentError("out", "None with resume=True", "the folder of the run to go on with")
    nudging_growth = nudges.checked_growth(nudging_growth, nudging)
    num_steps = checked_steps(num_steps)
    step_size = checked_step_sizes(step_size, num_steps)
    data = checked_data(data, parameters[0].dtype)
    samples = len(data.x_train)
    if not isinstance(drop_last, bool):
        raise ArgumentTypeError("drop_last", repr(drop_last), "True or False")
    if augment is not None:
        needed = "a function of a batch of inputs, e.g. datasets.FlipAndCrop(padding=4)"
        _check_function("augment", augment, needed, data.x_train)
    if drop_last:
        samples -= samples % batch_size
        if not samples:
            raise ArgumentError(
                "batch_size",
                f"{batch_size} with drop_last",
                f"at most the {len(data.x_train)} training samples",
            )
    device = parameters[0].device if device is None else checked_device(device)
    if precision == "fp64" and parameters[0].dtype != torch.float64:
        raise ArgumentError("precision", f"fp64 for a model of {parameters[0].dtype}", "model.double()")
    if precision is not None:
        check_precision(precision, device)
    folder = None if out is None else Path(out)

    model.to(device)
    optimizer = _made_optimizer(optimizer, parameters)
    updates = epochs * -(-samples // batch_size) * (num_steps if method == "incremental" else 1)
    schedule = None if scheduler is None else _made_scheduler(scheduler, optimizer, updates)
    settings = run_settings(
        model,
        data,
        optimizer,
        loss=loss_name(loss),
        method=method,
        step_size=step_size,
        num_steps=num_steps,
        belief_optimizer=None if belief_optimizer is None else repr(belief_optimizer),
        nudging=None if nudging is None else callable_name(nudging),
        nudging_growth=nudging_growth or None,
        batch_size=batch_size,
        drop_last=drop_last or None,
        augment=None if augment is None else callable_name(augment),
        scheduler=None if schedule is None else {"name": callable_name(scheduler), "steps": updates},
        precision=precision,
        seed=seed,
    )
    config = {
        "settings": settings,
        "epochs": epochs,
        "backend": backend,
        "device": str(device),
        "kept": kept or {},
        "machine": describe_machine(device),
    }
    learning = dict(
        loss=loss, step_size=step_size, num_steps=num_steps, belief_optimizer=belief_optimizer, backend=backend,
        return_output=True,
    )  # fmt: skip
    nudgings = nudges.by_epoch(nudging, nudging_growth, epochs, method)
    if method == "incremental":
        update = functools.partial(pcfast.incremental_step, model, optimizer=optimizer, **learning)
        kind = IncrementalRun
    else:

        def update(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            now = nudgings[len(run.history)]
            return pcfast.pc_loss(model, x, y, method=method, nudging=now, **learning)

        kind = Run
    run = kind(
        model,
        optimizer,
        data,
        loss,
        update,
        batch_size,
        seed,
        device,
        schedule=schedule,
        augment=augment,
        samples=samples,
    )
    with _switches(precision, device), seeded(seed, device):
        _rehearse(run)
    if resume:
        checkpoint = load_checkpoint(folder / CHECKPOINT, settings)
    if folder is not None:
        plots.require_matplotlib()

    was_training = model.training
    held = contextlib.nullcontext() if folder is None else results_folder(folder)
    try:
        with held, _switches(precision, device), seeded(seed, device):
            if resume:
                run.restore(checkpoint)
                if progress and len(run.history) >= epochs:
                    more = "its schedule ends there" if schedule else "ask for more epochs to go on"
                    print(f"the run has {len(run.history)} epochs already; {more}")
            with (
                Display(progress, epochs, run) as display,
                Interrupt() as interrupt,
                _stepping(schedule, optimizer),
            ):
                _train_epochs(run, epochs, folder, config, display, interrupt, aside=not resume)
    finally:
        model.train(was_training)
    return run.history


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: LossLike = F.cross_entropy, batch_size: int = 1024
) -> tuple[float, float]:
    """(loss per sample, accuracy in 0..1) of ``model`` in eval mode, over batches; the mode is restored.

    x: (N, ...), y: (N,) class indices or (N, C) class probabilities, on the model's device.
    """
    described = describe_loss(loss)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for x_batch, y_batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
                output = model(x_batch)
                value = described.value(output, y_batch)
                total += value if _sums(loss) else value * len(x_batch)
                correct += hits(output, y_batch)
    finally:
        model.train(was_training)
    return total.item() / len(x), correct.item() / len(x)


class Run:
    """The state of a training run: what a checkpoint holds, and the update of one batch."""

    def __init__(
        self, model, optimizer, data, loss, update, batch_size, seed, device, *, schedule=None, augment=None,
        samples=None,
    ):  # fmt: skip
        self.model, self.optimizer, self.schedule, self.loss = model, optimizer, schedule, loss
        self.update, self.augment = update, augment
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.samples = len(data.x_train) if samples is None else samples  # of one epoch
        self.data = Data(*(tensor.to(device) for tensor in data))
        self.history = History()
        self.position = 0  # samples of the running epoch that are done
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.seconds = 0.0

    def train_epoch(self, stop: Callable[[], bool], after_batch: Callable[[int], None]) -> None:
        """Go on from ``position`` to the end of the epoch, or to the first batch after which ``stop()``."""
        order = np.random.default_rng((self.seed, len(self.history))).permutation(len(self.data.x_train))
        order = torch.from_numpy(order).to(self.device)
        sums = _sums(self.loss)
        self.model.train()
        start, before = time.perf_counter(), self.seconds
        while self.position < self.samples and not stop():
            rows = order[self.position : self.position + self.batch_size]
            x, y = self.inputs(rows), self.data.y_train[rows]
            loss, output = self.learn(x, y)
            torch.clear_autocast_cache()  # under autocast for the whole run it would keep the weights of before
            with torch.no_grad():
                self.loss_sum += loss if sums else loss * len(rows)
                self.correct += hits(output, y)
            self.position += len(rows)
            self.seconds = before + time.perf_counter() - start
            after_batch(len(rows))
        synchronize()  # on CUDA a divergence is known only now; it must not reach the checkpoint
        self.seconds = before + time.perf_counter() - start

    def inputs(self, rows) -> Tensor:
        """Rows of the training part as they are learned."""
        x = self.data.x_train[rows]
        return x if self.augment is None else self.augment(x)

    def learn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Move the parameters by one batch: loss and output of its forward pass."""
        self.optimizer.zero_grad()
        loss, output = self.update(x, y)
        loss.backward()
        self.optimizer.step()
        return loss, output

    def rehearse(self, x: Tensor, y: Tensor) -> None:
        """Raise what does not fit; no parameter moves."""
        with torch.no_grad():
            self.update(x, y)

    def finish_epoch(self) -> None:
        """Evaluate, log, and get ready for the next epoch."""
        test_loss, test_accuracy = evaluate(
            self.model, self.data.x_test, self.data.y_test, loss=self.loss, batch_size=self.batch_size
        )
        self.history.append(
            train_loss=self.loss_sum.item() / self.samples,
            train_accuracy=self.correct.item() / self.samples,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            seconds=self.seconds,
        )
        self.position, self.seconds = 0, 0.0
        self.loss_sum.zero_()
        self.correct.zero_()

    def checkpoint(self, config: dict) -> dict:
        """Everything that :meth:`restore` needs, in types that weights_only loading accepts."""
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return {
            "format": FORMAT,
            "config": config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.schedule is None else self.schedule.state_dict(),
            "epoch": len(self.history),
            "position": self.position,
            "loss_sum": self.loss_sum.item(),
            "correct": self.correct.item(),
            "seconds": self.seconds,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "history": asdict(self.history),
        }

    def restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(checkpoint["scheduler"])
        self.position, self.seconds = checkpoint["position"], checkpoint["seconds"]
        self.loss_sum.fill_(checkpoint["loss_sum"])
        self.correct.fill_(checkpoint["correct"])
        self.history = History(**checkpoint["history"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and checkpoint["rng"]["cuda"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"][0], self.device)


class IncrementalRun(Run):
    """As :class:`Run`; ``update`` moves the parameters itself, in every iteration."""

    def learn(self, x, y):
        return self.update(x, y)

    def rehearse(self, x, y):
        incremental.rehearse(*self.update.args, x, y, **self.update.keywords)


def _switches(precision: str | None, device: torch.device):
    return contextlib.nullcontext() if precision is None else use_precision(precision, device)


def _rehearse(run: Run) -> None:
    """One loss without an update, so that whatever does not fit is found before any file is touched.

    In eval mode, inside :func:`seeded`: neither statistics nor torch's random numbers move.
    """
    was_training = run.model.training
    run.model.eval()
    try:
        rows = slice(run.batch_size)
        x = run.inputs(rows)
        if run.augment is not None and not (
            isinstance(x, Tensor) and x.shape == run.data.x_train[rows].shape
        ):
            given = f"{tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            needed = f"a batch of the shape of its input, {tuple(run.data.x_train[rows].shape)}"
            raise ArgumentError("augment", f"a callable that returned {given}", needed)
        run.rehearse(x, run.data.y_train[rows])
    finally:
        run.model.train(was_training)


def _train_epochs(
    run: Run,
    epochs: int,
    folder: Path | None,
    config: dict,
    display: Display,
    interrupt: Interrupt,
    *,
    aside: bool,
) -> None:
    """Train, and write the run folder after every epoch; with ``aside`` an earlier run is first moved away there.

    That waits for the first epoch: a run that fails before leaves everything as it was.
    """
    drawn = time.monotonic()
    while len(run.history) < epochs:
        run.train_epoch(lambda: interrupt.requested, display.after_batch)
        finished = run.position == run.samples and not interrupt.requested
        if finished:
            run.finish_epoch()
            display.after_epoch()
        if folder is not None:
            moved = set_aside(folder, FILES) if aside else None
            aside = False
            display.say(f"an earlier run was moved to {moved}" if moved else "")
            _save(run, folder, config)
            last = len(run.history) == epochs or interrupt.requested
            if len(run.history) and (last or time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS):
                title = f"{config['settings']['method']} predictive coding, {folder.name}"
                plots.training_curves(run.history, folder / CURVES, title=title)
                drawn = time.monotonic()
        if interrupt.requested:
            kept = "" if folder is None else f"; resuming goes on from {folder / CHECKPOINT}"
            raise KeyboardInterrupt(f"training stopped after {len(run.history)} epochs{kept}")


def _save(run: Run, folder: Path, config: dict) -> None:
    """Write checkpoint, configuration and log, each atomically."""
    checkpoint = run.checkpoint(config)
    write_atomically(folder / CHECKPOINT, lambda file: torch.save(checkpoint, file))
    write_json(folder / CONFIG, config, indent=2)
    columns = asdict(run.history)
    rows = ([epoch, *row] for epoch, row in enumerate(zip(*columns.values(), strict=True), start=1))
    write_csv(folder / LOG, ["epoch", *columns], rows)


def _made_optimizer(optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=LEARNING_RATE)
    if not isinstance(optimizer, Optimizer):
        needed = "an optimiser, or a callable that makes one from the parameters"
        if not callable(optimizer):
            raise ArgumentTypeError("optimizer", f"a {type(optimizer).__name__}", needed)
        made = optimizer(parameters)
        if not isinstance(made, Optimizer):
            raise ArgumentTypeError("optimizer", f"a callable that returned a {type(made).__name__}", needed)
        optimizer = made
    check_optimizer(optimizer, parameters)
    return optimizer


def _check_function(name: str, function, needed: str, *arguments) -> None:
    """Raise ArgumentTypeError unless ``function`` takes ``arguments``; a class is none, though it can be called."""
    if not callable(function) or isinstance(function, type):
        given = f"the class {function.__name__}" if isinstance(function, type) else repr(function)
        raise ArgumentTypeError(name, given, needed)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ArgumentTypeError(name, f"a callable that cannot be called so ({error})", needed) from None
    except ValueError:  # a callable without a signature
        pass


def _made_scheduler(make: MakeScheduler, optimizer: Optimizer, steps: int) -> LRScheduler:
    needed = "a function of the optimiser and its number of steps that makes a scheduler of torch.optim.lr_scheduler"
    _check_function("scheduler", make, needed, optimizer, steps)
    made = make(optimizer, steps)
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        given = f"a function that returned a {type(made).__name__}"
        raise ArgumentTypeError("scheduler", given, f"{needed}, whose step() needs nothing")
    if made.optimizer is not optimizer:
        raise ArgumentError("scheduler", "a function whose scheduler is another optimiser's", needed)
    return made


@contextlib.contextmanager
def _stepping(schedule: LRScheduler | None, optimizer: Optimizer):
    """``schedule`` steps after each of the optimiser's steps: an incremental update has several."""
    if schedule is None:
        yield
        return
    hook = optimizer.register_step_post_hook(lambda *_: schedule.step())
    try:
        yield
    finally:
        hook.remove()


def _sums(loss: LossLike) -> bool:
    """Whether ``loss`` sums over the batch, as far as it says so; only the logged numbers depend on it."""
    if isinstance(loss, functools.partial):
        return loss.keywords.get("reduction") == "sum"
    return getattr(loss, "reduction", "mean") == "sum"


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Torch's random state on the CPU and ``device`` seeded, and restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def hits(output: Tensor, y: Tensor) -> Tensor:
    """Number of rows of ``output`` (B, C) whose largest entry is the target's class: 0-dim int64."""
    return (output.argmax(1) == (y if y.dim() == 1 else y.argmax(1))).sum()
