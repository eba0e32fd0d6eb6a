"""Training with predictive coding: one plain function, :func:`train`, and the run folder that it keeps.

A run folder holds

- ``checkpoint.pt``: everything to go on with, readable by ``torch.load(path, weights_only=True)``;
- ``config.json``: the settings of the run and the machine it ran on;
- ``log.csv``: one line an epoch;
- ``curves.png``: loss and accuracy against the epoch.

Every file is replaced atomically, so a crash leaves the old or the new one, never half of one. ``python -m
pcfast.training`` trains the default network on the digits data set.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import pcfast

from . import plots
from ._version import __version__
from .checkpoints import FORMAT, load_checkpoint, loss_name, run_settings
from .datasets import Data, digits
from .errors import ArgumentError, ArgumentTypeError, RelaxationDiverged
from .files import write_atomically
from .history import History
from .losses import LossLike, describe_loss
from .networks import digits_mlp
from .progress import Display, Interrupt
from .status import synchronize

CHECKPOINT, CONFIG, LOG, CURVES = "checkpoint.pt", "config.json", "log.csv", "curves.png"
LEARNING_RATE = 0.002  # of the default optimiser, Adam
SECONDS_BETWEEN_DRAWINGS = 30.0  # drawing takes about 0.3 s, longer than an epoch of a small network

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


def train(
    model: nn.Sequential,
    data: Data | Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int = 64,
    loss: LossLike = F.cross_entropy,
    method: str = "strict",
    step_size: float = 0.1,
    num_steps: int = 20,
    optimizer: Optimizer | MakeOptimizer | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
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
        batch_size: samples an update; the last batch of an epoch may be smaller.
        loss: a callable loss(output, y) -> scalar, or a name, as for ``pcfast.pc_loss``. A callable that sums
            over the batch says so in an attribute ``reduction`` = "sum" (as torch's modules do); only the
            logged numbers depend on it.
        method, step_size, num_steps, backend: as for ``pcfast.pc_loss``.
        optimizer: makes the optimiser from the parameters, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``, or
            an optimiser of the model's parameters. Default: Adam with learning rate 0.002.
        device: where to train; the model is moved there. Default: where the model is.
        seed: >= 0.
        out: the run folder, created if missing. Without ``resume`` the files of an earlier run in it are moved to
            ``earlier-1`` (or -2, ...) inside it.
        resume: go on from the checkpoint in ``out``. Settings must be those of that run; epochs, backend and
            device may differ.
        progress: show a progress bar (in a terminal) and print one line an epoch.

    Returns:
        The history, earlier epochs of a resumed run included.

    Raises:
        ArgumentError: an argument does not fit, or the checkpoint is missing or of another run; names it.
        RelaxationDiverged: the checkpoint of the last finished epoch stays.
        KeyboardInterrupt: after Ctrl-C.
        ImportError: rich (progress) or matplotlib (out) is missing; the message says how to install it.
    """
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(name, f"{value!r} ({type(value).__name__})", f"an int >= {least}")
        if value < least:
            raise ArgumentError(name, str(value), f"an int >= {least}")
    if not isinstance(model, nn.Sequential):
        raise ArgumentTypeError("model", f"a {type(model).__name__}", "an nn.Sequential of PC layers")
    parameters = list(model.parameters())
    if not parameters:
        raise ArgumentError("model", "no parameters", "at least one parameter to train")
    if resume and out is None:
        raise ArgumentError("out", "None with resume=True", "the folder of the run to go on with")
    data = _checked_data(data, parameters[0].dtype)
    device = parameters[0].device if device is None else torch.device(device)
    folder = None if out is None else Path(out)

    model.to(device)
    optimizer = _made_optimizer(optimizer, parameters)
    settings = run_settings(
        model,
        data,
        optimizer,
        loss=loss_name(loss),
        method=method,
        step_size=step_size,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=seed,
    )
    config = {
        "settings": settings,
        "epochs": epochs,
        "backend": backend,
        "device": str(device),
        "machine": {
            "pcfast": __version__,
            "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
            "python": platform.python_version(),
            "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        },
    }
    update = functools.partial(
        pcfast.pc_loss,
        model,
        loss=loss,
        method=method,
        step_size=step_size,
        num_steps=num_steps,
        backend=backend,
        return_output=True,
    )

    run = Run(model, optimizer, data, loss, update, batch_size, seed, device)
    if resume:
        checkpoint = load_checkpoint(folder / CHECKPOINT, settings)
    if folder is not None:
        plots.require_matplotlib()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArgumentError("out", str(folder), "a folder that can be created", str(error)) from error
        if not resume:
            _set_aside(folder, progress)

    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            if resume:
                run.restore(checkpoint)
            with Display(progress, epochs, run) as display, Interrupt() as interrupt:
                _train_epochs(run, epochs, folder, config, display, interrupt)
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
                correct += _hits(output, y_batch)
    finally:
        model.train(was_training)
    return total.item() / len(x), correct.item() / len(x)


class Run:
    """The state of a training run: what a checkpoint holds, and the update of one batch."""

    def __init__(self, model, optimizer, data, loss, update, batch_size, seed, device):
        self.model, self.optimizer, self.loss, self.update = model, optimizer, loss, update
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.data = Data(*(tensor.to(device) for tensor in data))
        self.history = History()
        self.position = 0  # samples of the running epoch that are done
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.seconds = 0.0

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        return len(self.data.x_train)

    def train_epoch(self, stop: Callable[[], bool], after_batch: Callable[[int], None]) -> None:
        """Go on from ``position`` to the end of the epoch, or to the first batch after which ``stop()``."""
        order = np.random.default_rng((self.seed, len(self.history))).permutation(self.samples)
        order = torch.from_numpy(order).to(self.device)
        sums = _sums(self.loss)
        self.model.train()
        start, before = time.perf_counter(), self.seconds
        while self.position < self.samples and not stop():
            rows = order[self.position : self.position + self.batch_size]
            x, y = self.data.x_train[rows], self.data.y_train[rows]
            self.optimizer.zero_grad()
            loss, output = self.update(x, y)
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                self.loss_sum += loss if sums else loss * len(rows)
                self.correct += _hits(output, y)
            self.position += len(rows)
            self.seconds = before + time.perf_counter() - start
            after_batch(len(rows))
        synchronize()  # on CUDA a divergence is known only now; it must not reach the checkpoint
        self.seconds = before + time.perf_counter() - start

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
        self.position, self.seconds = checkpoint["position"], checkpoint["seconds"]
        self.loss_sum.fill_(checkpoint["loss_sum"])
        self.correct.fill_(checkpoint["correct"])
        self.history = History(**checkpoint["history"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and checkpoint["rng"]["cuda"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"][0], self.device)


def _set_aside(folder: Path, say: bool) -> None:
    """Move the files of an earlier run into a folder of their own: nothing is lost."""
    files = [folder / name for name in (CHECKPOINT, CONFIG, LOG, CURVES) if (folder / name).is_file()]
    if not files:
        return
    number = next(n for n in itertools.count(1) if not (folder / f"earlier-{n}").exists())
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for file in files:
        file.rename(aside / file.name)
    if say:
        print(f"an earlier run was moved to {aside}")


def _train_epochs(
    run: Run, epochs: int, folder: Path | None, config: dict, display: Display, interrupt: Interrupt
) -> None:
    drawn = time.monotonic()
    while len(run.history) < epochs:
        run.train_epoch(lambda: interrupt.requested, display.after_batch)
        finished = run.position == run.samples and not interrupt.requested
        if finished:
            run.finish_epoch()
            display.after_epoch()
        if folder is not None:
            _save(run, folder, config)
            last = len(run.history) == epochs
            if finished and (last or time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS):
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
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))
    table = io.StringIO()
    columns = asdict(run.history)
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["epoch", *columns])
    writer.writerows([epoch, *row] for epoch, row in enumerate(zip(*columns.values(), strict=True), start=1))
    write_atomically(folder / LOG, lambda file: file.write(table.getvalue().encode()))


def _checked_data(data, dtype: torch.dtype) -> Data:
    names = ", ".join(Data._fields)
    if not isinstance(data, Sequence) or len(data) != 4 or not all(isinstance(t, Tensor) for t in data):
        raise ArgumentTypeError("data", f"a {type(data).__name__}", f"four tensors ({names})")
    data = Data(*(tensor.detach() for tensor in data))
    for part in ("train", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        if x.dim() < 2 or len(x) == 0 or y.dim() < 1 or len(x) != len(y):
            raise ArgumentError(
                "data",
                f"x_{part} {tuple(x.shape)} and y_{part} {tuple(y.shape)}",
                "x (N, ...) and y (N,) or (N, C) with the same N >= 1",
            )
        if x.dtype != dtype:
            remedy = f"Use x_{part}.to({dtype}) or model.to({x.dtype})."
            raise ArgumentError("data", f"x_{part} of {x.dtype}", f"the model's {dtype}", remedy)
        if not (y.dim() == 1 and y.dtype == torch.int64) and not (y.dim() == 2 and y.is_floating_point()):
            raise ArgumentError(
                "data",
                f"y_{part} {tuple(y.shape)} of {y.dtype}",
                "class indices, int64, (N,), or class probabilities, floating point, (N, C)",
            )
    if data.x_train.shape[1:] != data.x_test.shape[1:] or data.y_train.shape[1:] != data.y_test.shape[1:]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in data._asdict().items())
        raise ArgumentError("data", shapes, "the same shape of a sample in both parts")
    return data


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
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError("optimizer", "LBFGS", "an optimiser whose step() needs no closure", "E.g. Adam.")
    known = {id(p) for p in parameters}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError(
            "optimizer", "parameters that the model does not have", "parameters of this model"
        )
    return optimizer


def _sums(loss: LossLike) -> bool:
    """Whether ``loss`` sums over the batch, as far as it says so; only the logged numbers depend on it."""
    if isinstance(loss, functools.partial):
        return loss.keywords.get("reduction") == "sum"
    return getattr(loss, "reduction", "mean") == "sum"


def _hits(output: Tensor, y: Tensor) -> Tensor:
    """Number of rows of ``output`` (B, C) whose largest entry is the target's class: 0-dim int64."""
    return (output.argmax(1) == (y if y.dim() == 1 else y.argmax(1))).sum()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m pcfast.training``: train the default network by strict predictive coding on digits.

    Returns the exit status: 0; 1 where the relaxation diverged; 2 for arguments that do not fit; 130 after
    Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pcfast.training", description="Train the default network on digits."
    )
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training part (default: 40)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="run folder (default: runs/digits)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run folder")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initial weights, split and shuffling (default: 0)"
    )
    options = parser.parse_args(arguments)

    try:
        torch.manual_seed(options.seed)
        history = train(
            digits_mlp(),
            digits(seed=options.seed),
            epochs=options.epochs,
            batch_size=32,
            # A relaxation is stable while step_size * (1 + |W|)^2 < 2, |W| the largest singular value of a
            # hidden layer's weights, and training makes weights grow. With step_size 0.1 the limit, 3.5, is
            # passed within 20 epochs, and what was learned is lost. 0.05 has its limit at 5.3; some weight
            # decay keeps this network below it.
            step_size=0.05,
            optimizer=functools.partial(torch.optim.AdamW, lr=0.0005, weight_decay=0.3),
            device="cuda" if torch.cuda.is_available() else "cpu",
            seed=options.seed,
            out=options.out,
            resume=options.resume,
        )
    except (ArgumentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RelaxationDiverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"{interrupt or 'stopped at once; the last checkpoint is as it was'}", file=sys.stderr)
        return 130
    for name in (CHECKPOINT, CONFIG, LOG, CURVES):
        print(options.out / name)
    print(f"test accuracy {history.test_accuracy[-1]:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
