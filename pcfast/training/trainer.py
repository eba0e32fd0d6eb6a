"""Training with predictive coding: one plain function, :func:`train`, and the run folder that it keeps.

A run folder holds

- ``checkpoint.pt``: everything to go on with, readable by ``torch.load(path, weights_only=True)``, and a checksum;
- ``config.json``: the settings of the run and the machine it ran on;
- ``log.csv``: one line an epoch;
- ``curves.png``: loss and accuracy against the epoch.

Every file is replaced atomically, so a crash leaves the old or the new one, never half of one. The checkpoint comes
first; what a crash kept from following it is made up for by the next run that resumes. On the command line: ``pcfast
train``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .. import incremental
from ..autograd import loss_with, reconstruction_loss
from ..datasets import Data, checked_data
from ..errors import ArgumentError, ArgumentTypeError, BackendError
from ..losses import LossLike
from ..model.graph import Graph
from ..precision import check_precision, use_precision
from ..problem import nudging as nudges
from ..problem import reductions
from ..problem.belief_optimizers import BeliefOptimizer
from ..problem.nudging import Nudging
from ..problem.per_layer import PerLayer
from ..problem.plan import canonical
from ..problem.settings import Precisions, Settings, StepSizes
from ..problem.validation import (
    check_count,
    check_optimizer,
    check_start_of_all,
    checked_device,
    checked_step_sizes,
    checked_steps,
)
from ..support import files, modes, plotting
from ..support.files import checked_folder, results_folder, set_aside, write_atomically
from ..support.machine import describe_machine
from . import curves
from .checkpoints import (
    callable_name,
    load_checkpoint,
    loss_name,
    run_settings,
)
from .distributed import processes_of
from .generation import latent_roots, reconstructions
from .history import History
from .optimizers import adam
from .progress import Display, Interrupt
from .run import IncrementalRun, TrainingRun
from .writers import SCALARS

# Beyond them a number is a slip of the keyboard, or the run a wait of years; some fit in no 64 bits.
MAX_EPOCHS, MAX_STEPS, MAX_SAMPLES, HIGHEST_SEED = 10**6, 10**6, 2**31 - 1, 2**63 - 1

FILES = CHECKPOINT, CONFIG, LOG, CURVES = "checkpoint.pt", "config.json", "log.csv", "curves.png"
LEARNING_RATE = 0.002  # of the default optimiser, Adam
SECONDS_BETWEEN_DRAWINGS = 30.0  # drawing takes about 0.3 s, longer than an epoch of a small network

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
NudgingByEpoch = Callable[[int], Nudging | None]
MakeScheduler = Callable[[Optimizer, int], LRScheduler]


def train(
    model: nn.Sequential | Graph,
    data: Data | Sequence[Tensor],
    *,
    task: str = "predict",
    epochs: int,
    batch_size: int = 64,
    loss: LossLike = F.cross_entropy,
    method: str = "strict",
    step_size: StepSizes = 0.1,
    num_steps: int = 20,
    node_precision: Precisions | None = None,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | NudgingByEpoch | None = None,
    nudging_growth: float = 0.0,
    vinit: float | None = None,
    reduction: str = "sum",
    update_scale: float = 1.0,
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
    process_group: dist.ProcessGroup | None = None,
    after_epoch: Callable[[nn.Sequential, History], None] | None = None,
) -> History:
    """Train ``model`` in place by predictive coding.

    The run is a function of its arguments: samples are shuffled by (seed, epoch), and torch's global random
    state, which dropout draws from, is seeded with ``seed`` for the run and restored afterwards. On the CPU a
    resumed run is bit-identical to one that was never interrupted (with the same number of threads).

    Ctrl-C, SIGTERM and SIGHUP finish the current batch (or evaluation), write the checkpoint, and raise
    KeyboardInterrupt; a second one stops at once and leaves the last checkpoint as it was. (Only in the main thread:
    others get no signals. Of SIGTERM and SIGHUP a program's own handler stays, and so does what nohup ignores.)

    A model in train mode is trained as it is: parts in eval mode, such as a frozen BatchNorm, stay in it. A model in
    eval mode is put in train mode as a whole. Afterwards every part is in the mode in which it was.

    Args:
        model: each element is one PC layer, or a :class:`pcfast.Graph` of one input and one output; parameters of any
            floating dtype.
        task: "predict" targets from inputs; "reconstruct" the targets of a Graph with latent roots, which have a
            prior and are inferred from the targets: scores are those of reconstructions. Where the graph has no
            other root, inputs are not read.
        data: ``Data`` or (x_train, y_train, x_test, y_test): inputs (N, ...) in the model's dtype; targets
            class indices, int64, (N,), or class probabilities, floating point, (N, C), where the loss takes
            them (MSE takes one-hot targets), or any values (regression): see :class:`History`. Copied to the device
            once.
        epochs: passes over the training part in all, those of a resumed run included; at most a million.
        batch_size: samples an update; the last batch of an epoch may be smaller, or is left out with ``drop_last``.
        loss: a callable loss(output, y) -> scalar, or a name, as for ``pcfast.pc_loss``. A callable that sums
            over the batch says so in an attribute ``reduction`` = "sum" (as torch's modules do); only the
            logged numbers depend on it.
        method, step_size, num_steps, node_precision, belief_optimizer, nudging, vinit, reduction, update_scale,
            backend: as for ``pcfast.pc_loss``, whose ``precision`` is ``node_precision`` here; or method
            "incremental", as for ``pcfast.incremental_step``. So ``**preset`` fits.
            ``nudging`` may be a function of the epoch 0, 1, ..., called for all epochs before the first.
        nudging_growth: what beta gains every epoch, as far as 1.
        optimizer: makes the optimiser from the parameters, e.g. ``lambda p: torch.optim.SGD(p, lr=0.1)``, or
            an optimiser of the model's parameters. Default: Adam with learning rate 0.002, fused where it can be.
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
        process_group: train on its processes together, e.g. on ``torch.distributed.group.WORLD``; each calls
            ``train`` with the same model, data and arguments, ``batch_size`` being that of all. Rank 0 alone writes
            files and progress and needs ``out``. See docs/distributed.md.
        after_epoch: called with the model and the history after every finished epoch and its checkpoint, on the
            process that writes. What it draws from torch's random state is missing from the run.

    Returns:
        The history, earlier epochs of a resumed run included.

    Raises:
        ArgumentError: an argument does not fit, or the checkpoint is missing or of another run; names it.
        RelaxationDiverged: the checkpoint of the last finished epoch stays.
        OSError: a file of the run folder could not be written; it names the file, which is as it was.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP.
        ImportError: matplotlib (out) is missing; the message says how to install it.
    """
    with torch.inference_mode(False), torch.enable_grad():  # the caller's modes are no matter of the training
        return _train(**locals())


def _train(
    model, data, *, task, epochs, batch_size, loss, method, step_size, num_steps, node_precision, belief_optimizer,
    nudging, nudging_growth, vinit, reduction, update_scale, optimizer, scheduler, augment, drop_last, backend,
    precision, device, seed, out, resume, progress, kept, process_group, after_epoch,
) -> History:  # fmt: skip
    """:func:`train`, with gradients."""
    processes = processes_of(process_group)
    with processes.agreed():
        for name, value, least, most in (
            ("epochs", epochs, 1, MAX_EPOCHS), ("batch_size", batch_size, 1, MAX_SAMPLES),
            ("seed", seed, 0, HIGHEST_SEED),
        ):  # fmt: skip
            check_count(name, value, least)
            _check_most(name, value, most)
        if not isinstance(model, nn.Sequential | Graph):
            needed = "an nn.Sequential of PC layers, or a pcfast.Graph"
            raise ArgumentTypeError("model", f"a {type(model).__name__}", needed)
        _check_task(task, model, method)
        parameters = list(model.parameters())
        if not parameters:
            raise ArgumentError("model", "no parameters", "at least one parameter to train")
        if resume and out is None:
            raise ArgumentError("out", "None with resume=True", "the folder of the run to go on with")
        method = canonical(method)
        reductions.checked(reduction, method)
        check_start_of_all(vinit, method)
        update_scale = reductions.checked_scale(update_scale)
        nudging_growth = nudges.checked_growth(nudging_growth, nudging)
        num_steps = checked_steps(num_steps)
        _check_most("num_steps", num_steps, MAX_STEPS)
        if not isinstance(step_size, Mapping | PerLayer):
            step_size = checked_step_sizes(step_size, num_steps)
        if any(parameter.is_inference() for parameter in parameters):
            given = "parameters made under torch.inference_mode, which have no gradients"
            raise ArgumentError("model", given, "a model made outside of it")
        data = checked_data(data, parameters[0].dtype)
        data = Data(*(tensor.clone() if tensor.is_inference() else tensor for tensor in data))
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
        processes.check_rows(min(batch_size, samples))
        processes.check_model(model)
        folder = None if out is None else checked_folder("out", out)

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
            step_size=repr(step_size) if isinstance(step_size, PerLayer) else step_size,
            num_steps=num_steps,
            task=None if task == "predict" else task,
            node_precision=None if node_precision is None else repr(node_precision),
            belief_optimizer=None if belief_optimizer is None else repr(belief_optimizer),
            nudging=None if nudging is None else callable_name(nudging),
            nudging_growth=nudging_growth or None,
            vinit=vinit,
            reduction=None if reduction == "sum" else reduction,
            update_scale=None if update_scale == 1 else update_scale,
            batch_size=batch_size,
            drop_last=drop_last or None,
            augment=None if augment is None else callable_name(augment),
            scheduler=None if schedule is None else {"name": callable_name(scheduler), "steps": updates},
            precision=precision,
            seed=seed,
        )
        config = _plain({
            "settings": settings,
            "epochs": epochs,
            "backend": backend,
            "device": str(device),
            "kept": kept or {},
            "machine": describe_machine(device),
            **({"processes": processes.size} if processes.size > 1 else {}),
        })  # fmt: skip
        relaxation = Settings(
            loss, method, step_size, num_steps, belief_optimizer, backend=backend, vinit=vinit, reduction=reduction,
            update_scale=update_scale, precision=node_precision,
        )  # fmt: skip
        nudging_of = nudges.by_epoch(nudging, nudging_growth, epochs, method)
    processes.check_same({**settings, "device": device.type}, model)
    predict = functools.partial(reconstructions, model, relaxation) if task == "reconstruct" else None
    if method == "incremental":
        step = processes.step(incremental.step_with)
        update = functools.partial(step, relaxation, model, optimizer=optimizer)
        kind = IncrementalRun
    else:
        loss_of = processes.loss(loss_with if predict is None else reconstruction_loss, model, relaxation)

        def update(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            now = replace(relaxation, nudging=nudging_of(len(run.history)))
            return loss_of(now, model, x, y, return_output=True)

        kind = TrainingRun
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
        reduction=reduction,
        processes=processes,
        predict=predict,
    )
    with modes.modes_kept(model), contextlib.ExitStack() as held:
        with processes.agreed(), _switches(precision, device), seeded(seed, device):
            rehearse(run)
        if resume:
            checkpoint = processes.first(lambda: load_checkpoint(folder / CHECKPOINT, settings))
        with processes.agreed():
            if folder is not None and processes.leads:
                plotting.require_matplotlib()
                held.enter_context(results_folder(folder))
        with (
            _switches(precision, device),
            seeded(processes.seed(seed), device),
            Display(progress and processes.leads, epochs, run) as display,
            Interrupt(display.enabled) as interrupt,
            _stepping(schedule, optimizer),
        ):
            if resume:
                with processes.agreed():
                    run.restore(checkpoint, folder / CHECKPOINT)
                    if processes.leads:
                        _repair(run, folder, checkpoint["config"])
                if len(run.history) >= epochs:
                    more = "its schedule ends there" if schedule else "ask for more epochs to go on"
                    display.say(f"the run has {len(run.history)} epochs already; {more}")
            _train_epochs(run, epochs, folder, config, display, interrupt, after_epoch, aside=not resume)
    return run.history


def _check_task(task: str, model: nn.Sequential | Graph, method: str) -> None:
    if task not in ("predict", "reconstruct"):
        raise ArgumentError("task", repr(task), '"predict" or "reconstruct"')
    if task == "predict":
        return
    if not isinstance(model, Graph) or not latent_roots(model):
        given = "a Graph without priors" if isinstance(model, Graph) else f"a {type(model).__name__}"
        needed = "a pcfast.Graph with a pcfast.Prior"
        remedy = "E.g. pcfast.networks.decoder."
        raise ArgumentError("model", f"{given} with task 'reconstruct'", needed, remedy)
    if method == "incremental":
        raise ArgumentError("method", "'incremental' with task 'reconstruct'", "another method")


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ArgumentError(
            name, str(value) if value < 10**30 else "a number of more than 30 digits", f"at most {most}"
        )


def _plain(config: dict) -> dict:
    """``config`` as JSON gives it back."""
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError) as error:
        needed = "plain values: dicts, lists, numbers, strings, None"
        raise ArgumentTypeError("kept", f"values that JSON cannot hold ({error})", needed) from error


def _switches(precision: str | None, device: torch.device):
    return contextlib.nullcontext() if precision is None else use_precision(precision, device)


def rehearse(run: TrainingRun) -> None:
    """One loss without an update, so that whatever does not fit is found before any file is touched.

    In eval mode, inside :func:`seeded`: neither statistics nor torch's random numbers move. Then one of the last
    batch of an epoch in train mode where that one is smaller than the others: BatchNorm takes no single row.
    """
    with modes.evaluating(run.model):
        rows = run.processes.first_rows(run.batch_size)
        x = run.inputs(rows)
        if run.augment is not None and not (
            isinstance(x, Tensor) and x.shape == run.data.x_train[rows].shape
        ):
            given = f"{tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            needed = f"a batch of the shape of its input, {tuple(run.data.x_train[rows].shape)}"
            raise ArgumentError("augment", f"a callable that returned {given}", needed)
        run.rehearse(x, run.data.y_train[rows])
    last = run.samples % run.batch_size
    if not last:
        return
    rows = run.processes.first_rows(last)
    with modes.training(run.model), _buffers_kept(run.model):
        try:
            run.rehearse(run.inputs(rows), run.data.y_train[rows])
        except BackendError:
            raise
        except (ValueError, RuntimeError) as error:
            given = f"{run.batch_size}, with {last} left for an epoch's last batch, where training fails ({error})"
            raise ArgumentError(
                "batch_size", given, "another size", "Or leave that batch out, with drop_last=True."
            ) from error


@contextlib.contextmanager
def _buffers_kept(model: nn.Module):
    """On leaving, the buffers of ``model`` hold what they held."""
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in held:
                module._buffers[name] = buffer.copy_(value)


def _train_epochs(
    run: TrainingRun,
    epochs: int,
    folder: Path | None,
    config: dict,
    display: Display,
    interrupt: Interrupt,
    after_epoch: Callable[[nn.Sequential, History], None] | None = None,
    *,
    aside: bool,
) -> None:
    """Train, and write the run folder after every epoch; with ``aside`` an earlier run is first moved away there.

    That waits for the first epoch: a run that fails before leaves everything as it was. An epoch is saved before
    anything is said of it. Of several processes one writes.
    """
    drawn = time.monotonic()
    stop = run.processes.stop(lambda: interrupt.requested)
    writes = folder is not None and run.processes.leads
    while len(run.history) < epochs:
        run.train_epoch(stop, display.after_batch)
        finished = run.position == run.samples and not stop.now()
        if finished:
            run.finish_epoch()
        random_state = run.random_state()
        if writes:
            moved = set_aside(folder, (*FILES, SCALARS)) if aside else None
            aside = False
            _save(run, folder, config, random_state)
            display.say(f"an earlier run was moved to {moved}" if moved else "")
        if finished:
            display.after_epoch()
            if after_epoch is not None and run.processes.leads:
                after_epoch(run.model, run.history)
        stopped = stop.now()
        if writes:
            last = len(run.history) == epochs or stopped
            if len(run.history) and (last or time.monotonic() - drawn > SECONDS_BETWEEN_DRAWINGS):
                _draw(run, folder, config)
                drawn = time.monotonic()
        if stopped or stop.now():
            kept = "" if folder is None else f"; resuming continues from {folder / CHECKPOINT}"
            raise KeyboardInterrupt(f"training stopped after {len(run.history)} epochs{kept}")


def _save(run: TrainingRun, folder: Path, config: dict, random_state: dict) -> None:
    """Write checkpoint, configuration and log, each atomically."""
    checkpoint = run.checkpoint(config, random_state)
    write_atomically(folder / CHECKPOINT, lambda file: torch.save(checkpoint, file))
    _write_beside(run, folder, config)


def _write_beside(run: TrainingRun, folder: Path, config: dict, *, only_changed: bool = False) -> None:
    """Configuration and log, which follow from the checkpoint."""
    columns = run.history.columns
    rows = ([epoch, *row] for epoch, row in enumerate(zip(*columns.values(), strict=True), start=1))
    texts = {CONFIG: files.json_text(config, indent=2), LOG: files.csv_text(["epoch", *columns], rows)}
    for name, text in texts.items():
        if not (only_changed and files.holds(folder / name, text)):
            files.write_text(folder / name, text)


def _draw(run: TrainingRun, folder: Path, config: dict) -> None:
    title = f"{config['settings']['method']} predictive coding, {folder.name}"
    plotting.drawn(folder / CURVES, functools.partial(curves.training_curves, run.history, title=title))


def _repair(run: TrainingRun, folder: Path, config: dict) -> None:
    """Write what should lie beside the checkpoint and does not: a run was killed before it came to it."""
    _write_beside(run, folder, config, only_changed=True)
    if len(run.history) and files.is_older(folder / CURVES, folder / CHECKPOINT):
        _draw(run, folder, config)


def _made_optimizer(optimizer, parameters: list[nn.Parameter]) -> Optimizer:
    if optimizer is None:
        return adam(parameters, lr=LEARNING_RATE)
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


# Trainings in threads come one after another: torch's random state is one for all of a process's threads.
_SEEDED = threading.RLock()


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Torch's random state on the CPU and ``device`` seeded, and restored afterwards; for one thread at a time."""
    with _SEEDED, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
