"""Predictive coding against backpropagation, measured as in figures 1 to 7 of Rosenbaum, PLOS ONE 17(3) (2022).

- :func:`compare_training` (figures 1 to 4): learning curves of both, and how far every update is from the gradient;
- :func:`compare_iterations` (figure 5): how far, against the number of iterations;
- :func:`compare_errors` (figures 6 and 7): the errors eps_l against backpropagated ones, layer by layer.

What updates are held against is :func:`true_gradient`, plain torch autograd, which shares no code with pcfast's
relaxations. A quantity that does not exist (the angle of a zero update) is NaN.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import gradients
from ..autograd import pc_loss
from ..datasets import Data, checked_data
from ..errors import ArgumentError, ArgumentTypeError, RelaxationDiverged
from ..gradients import in_full, parameters_of_layers, true_gradient, vector
from ..losses import LossLike, describe_loss
from ..model.describe import describe
from ..problem import validation
from ..relaxation.result import relax
from ..support.replay import replaying
from ..training import scores
from ..training.optimizers import adam
from ..training.run import TrainingRun, evaluate
from ..training.scores import hits
from ..training.trainer import LEARNING_RATE, MakeOptimizer, rehearse, seeded

BACKPROPAGATION = "backpropagation"
WHOLE = "all"  # in place of a layer: the update of all parameters as one vector
METHODS = ("strict", "fixed_prediction")
STEP_SIZES = (0.1, 0.2, 0.5, 1.0)
#: Numbers of iterations of :func:`compare_iterations`; it adds the number of layers.
ITERATIONS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
EVALUATIONS = 20  # of the test part along a learning curve, where not said otherwise

Progress = Callable[[int, int], None]  # called with what is done and what there is to do, in units of its own


@dataclass(frozen=True)
class Step:
    """One step of a learning curve; all values are those of the parameters after ``step`` updates.

    Attributes:
        method: a method, or "backpropagation".
        step: updates made before, from 0; the last row, after the last update, has no batch.
        train_loss, train_accuracy: of this step's batch, before its update; accuracy in 0..1, NaN for regression.
        test_loss, test_accuracy: of the test part, per sample, in eval mode; NaN where not evaluated.
        note: why the curve ends here before its time; "" everywhere else.
    """

    method: str
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    note: str = ""


@dataclass(frozen=True)
class Update:
    """How far the update of one PC layer is from the true gradient, at one step of a training run.

    Attributes:
        layer: 1..L; layers without parameters have no rows.
        relative_error: |dtheta_PC - dtheta_BP| / |dtheta_BP|.
        angle_degrees: between the two.
    """

    method: str
    step: int
    layer: int
    relative_error: float
    angle_degrees: float


@dataclass(frozen=True)
class TrainingComparison:
    """Result of :func:`compare_training`.

    Attributes:
        steps: the learning curves, one after the other, backpropagation first.
        updates: the updates of the methods.
        steps_per_epoch: updates of one epoch.
        step_size, num_steps: of the relaxations.
    """

    steps: tuple[Step, ...]
    updates: tuple[Update, ...]
    steps_per_epoch: int
    step_size: float
    num_steps: int

    @property
    def ended(self) -> dict[str, str]:
        """Why curves ended before their time, by method."""
        return {row.method: f"step {row.step}: {row.note}" for row in self.steps if row.note}

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the curves, in order."""
        return tuple(dict.fromkeys(row.method for row in self.steps))

    def curve(self, method: str) -> list[Step]:
        return [row for row in self.steps if row.method == method]

    def final(self, method: str) -> dict[str, float]:
        """Training loss and accuracy as means over the steps of the last epoch, test values after it.

        NaN where the curve ended before its time.
        """
        curve = self.curve(method)
        if curve[-1].note:
            return dict.fromkeys(("train_loss", "train_accuracy", "test_loss", "test_accuracy"), math.nan)
        last = curve[-1 - self.steps_per_epoch : -1]
        return {
            "train_loss": statistics.fmean(row.train_loss for row in last),
            "train_accuracy": statistics.fmean(row.train_accuracy for row in last),
            "test_loss": curve[-1].test_loss,
            "test_accuracy": curve[-1].test_accuracy,
        }

    def medians(self) -> dict[tuple[str, int], tuple[float, float]]:
        """Per (method, layer) the medians of relative error and angle over the steps where they exist."""
        rows: dict[tuple[str, int], list[Update]] = {}
        for row in self.updates:
            rows.setdefault((row.method, row.layer), []).append(row)
        return {
            key: (_median(r.relative_error for r in result), _median(r.angle_degrees for r in result))
            for key, result in rows.items()
        }


@dataclass(frozen=True)
class Iterations:
    """How far an update is from the true gradient after ``num_steps`` iterations of one relaxation.

    Attributes:
        layer: 1..L, or "all".
        relative_error, angle_degrees: as in :class:`Update`.
        note: why there are none: the relaxation diverged; else "".
    """

    method: str
    step_size: float
    num_steps: int
    layer: int | str
    relative_error: float
    angle_degrees: float
    note: str = ""


@dataclass(frozen=True)
class LayerError:
    """The errors of one layer after a relaxation, against backpropagated ones; Frobenius norms over the batch.

    Attributes:
        error_norm: |eps_l|. exact_norm: |g_l|, g_l = dLoss/dvhat_l, from method "exact".
        relative_error: |eps_l - g_l| / |g_l|.
        note: as in :class:`Iterations`.
    """

    method: str
    layer: int
    error_norm: float
    exact_norm: float
    relative_error: float
    note: str = ""


def relative_error(a: Tensor, b: Tensor) -> float:
    """:func:`pcfast.gradients.relative_error` as a number."""
    return float(gradients.relative_error(a, b))


def angle_degrees(a: Tensor, b: Tensor) -> float:
    """:func:`pcfast.gradients.angle_degrees` as a number."""
    return float(gradients.angle_degrees(a, b))


@torch.enable_grad()
def compare_training(
    model: nn.Sequential,
    data: Data | Sequence[Tensor],
    *,
    methods: Sequence[str] = METHODS,
    epochs: int = 1,
    batch_size: int = 64,
    loss: LossLike = "cross_entropy",
    step_size: float = 0.1,
    num_steps: int = 20,
    optimizer: MakeOptimizer | None = None,
    backend: str = "auto",
    seed: int = 0,
    test_every: int | None = None,
    progress: Progress | None = None,
) -> TrainingComparison:
    """Train copies of ``model`` by backpropagation and by every method: same weights, batches and optimiser settings.

    The gradient that an update is held against is taken at the same parameters, those of the network that
    predictive coding trains. Batches, and dropout's masks, are those of :func:`pcfast.training.train` with this seed.

    Args:
        model: stays as it is.
        data, epochs, batch_size, loss, step_size, num_steps, backend, seed: as for :func:`pcfast.training.train`.
        methods: as for :func:`pcfast.pc_loss`.
        optimizer: makes an optimiser from parameters; default: Adam with learning rate 0.002.
        test_every: updates between evaluations of the test part; default: such that there are about 20. The first
            and the last parameters are always evaluated.
        progress: called after every step with the steps done and the steps of all curves.

    Returns:
        :class:`TrainingComparison`. A relaxation that diverges ends that method's curve, a loss that is not finite
        backpropagation's; the last row's note says why.

    Raises:
        ArgumentError and its kinds, BackendError.
    """
    methods = _checked_methods(methods)
    step_size, num_steps = validation.checked_step_size(step_size), validation.checked_steps(num_steps)
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("test_every", test_every)):
        if not (name == "test_every" and value is None):
            validation.check_count(name, value)
    layers = parameters_of_layers(model)
    data = checked_data(data, next(iter(layers.values()))[0].dtype)
    optimizer = functools.partial(adam, lr=LEARNING_RATE) if optimizer is None else optimizer
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        given = f"a {type(optimizer).__name__}"
        needed = "a callable that makes an optimiser from parameters: every curve needs its own"
        raise ArgumentTypeError("optimizer", given, needed)
    steps_per_epoch = math.ceil(len(data.x_train) / batch_size)
    total = epochs * steps_per_epoch
    test_every = max(1, total // EVALUATIONS) if test_every is None else test_every
    settings = {"step_size": step_size, "num_steps": num_steps, "backend": backend}

    _rehearse(model, data, loss, batch_size, seed)
    of_classes = scores.are_classes(data.y_train, loss)

    steps: list[Step] = []
    updates: list[Update] = []
    for index, method in enumerate((BACKPROPAGATION, *methods)):
        trained = copy.deepcopy(model)
        parameters = list(trained.parameters())
        device = parameters[0].device
        curve = _Curve(trained, method, loss, settings, test_every, of_classes)
        run = TrainingRun(trained, optimizer(parameters), data, loss, curve.update, batch_size, seed, device)
        curve.data = run.data

        def after_batch(_, done=index * total, curve=curve):
            if progress is not None:
                progress(done + curve.step, (1 + len(methods)) * total)

        with seeded(seed, device):
            curve.train(run, epochs, after_batch)
        steps += curve.steps
        updates += curve.updates
    return TrainingComparison(tuple(steps), tuple(updates), steps_per_epoch, step_size, num_steps)


def _rehearse(model: nn.Sequential, data: Data, loss: LossLike, batch_size: int, seed: int) -> None:
    """Raise, before any step, what an epoch's batches would; the last one may be of one row."""
    trained = copy.deepcopy(model)
    device = next(trained.parameters()).device
    update = functools.partial(pc_loss, trained, loss=loss, method="exact", check="sync")
    with seeded(seed, device):
        rehearse(TrainingRun(trained, None, data, loss, update, batch_size, seed, device))


class _NotFinite(Exception):
    """A loss of backpropagation that is not finite."""


class _Curve:
    """One learning curve: the update of a batch, as a training run calls it, and what it measured."""

    def __init__(self, model, method, loss, settings, test_every, of_classes):
        self.model, self.method, self.loss, self.test_every = model, method, loss, test_every
        self.of_classes = of_classes
        self.layers = parameters_of_layers(model)
        self.relaxed_loss = functools.partial(
            # check="sync": on CUDA a divergence would else be reported in a later step.
            pc_loss, model, loss=loss, method=method, check="sync", return_output=True, **settings,
        )  # fmt: skip
        self.data: Data | None = None  # where the model is
        self.step = 0
        self.steps: list[Step] = []
        self.updates: list[Update] = []

    def train(self, run: TrainingRun, epochs: int, after_batch: Callable[[int], None]) -> None:
        try:
            for _ in range(epochs):
                run.train_epoch(lambda: False, after_batch)
                run.finish_epoch()
        except (RelaxationDiverged, _NotFinite) as error:
            self._add(math.nan, math.nan, note=str(error))
        else:
            self._add(math.nan, math.nan, test=True)

    def update(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, output) of a batch, whose backward is this method's update; both measured."""
        if self.method == BACKPROPAGATION:
            output = self.model(x.clone())
            loss = describe_loss(self.loss).value(output, y)
            if not math.isfinite(loss.item()):
                raise _NotFinite("the loss is not finite; lower the optimiser's learning rate")
        else:
            gradient = true_gradient(self.model, x, y, loss=self.loss)
            loss, output = self.relaxed_loss(x, y)
            for layer, error, angle in _differences(self.layers, _update_of(loss, self.layers), gradient):
                self.updates.append(Update(self.method, self.step, layer, error, angle))
        output = output.detach()
        accuracy = hits(output, y).item() / len(x) if self.of_classes else math.nan
        self._add(loss.item(), accuracy, test=self.step % self.test_every == 0)
        self.step += 1
        return loss, output

    def _add(self, loss: float, accuracy: float, *, test: bool = False, note: str = "") -> None:
        on_test = (math.nan, math.nan)
        if test:
            on_test = evaluate(self.model, self.data.x_test, self.data.y_test, loss=self.loss)
            if not self.of_classes:
                on_test = (on_test[0], math.nan)
        self.steps.append(Step(self.method, self.step, loss, accuracy, *on_test, note))


@torch.enable_grad()
def compare_iterations(
    model: nn.Sequential,
    x: Tensor,
    y,
    *,
    methods: Sequence[str] = METHODS,
    step_sizes: Sequence[float] = STEP_SIZES,
    iterations: Sequence[int] = ITERATIONS,
    loss: LossLike = "cross_entropy",
    backend: str = "auto",
    progress: Progress | None = None,
) -> tuple[Iterations, ...]:
    """Updates of one batch against the true gradient, for every method, step size and number of iterations.

    Args:
        model: stays as it is, in its mode; dropout draws the same masks for every row.
        x, y, loss, backend: as for :func:`pcfast.pc_loss`.
        methods, step_sizes, iterations: repetitions count once. iterations: >= 1; the number of layers L, from
            which on fixed prediction with step size 1 is exact, is added.
        progress: called after every relaxation with the iterations done and those of all relaxations.

    Returns:
        Rows ordered by method, step size, number of iterations (rising) and layer, "all" last. Where a relaxation
        diverged they hold NaN and the reason.

    Raises:
        ArgumentError and its kinds, BackendError.
    """
    methods = _checked_methods(methods)
    step_sizes = dict.fromkeys(map(validation.checked_step_size, step_sizes))
    for count in iterations:
        validation.check_count("iterations", count)
    model = copy.deepcopy(model)
    counts = sorted({*iterations, len(describe(model).layers)})
    layers = parameters_of_layers(model)
    gradient = true_gradient(model, x, y, loss=loss)
    replay = replaying(x.device)
    done, total = 0, len(methods) * len(step_sizes) * sum(counts)
    rows = []
    for method in methods:
        for step_size in step_sizes:
            for num_steps in counts:
                note = ""
                try:
                    with torch.enable_grad(), replay():
                        value = pc_loss(
                            model, x, y, loss=loss, method=method, step_size=step_size, num_steps=num_steps,
                            backend=backend, check="sync",
                        )  # fmt: skip
                        update = _update_of(value, layers)
                    result = _differences(layers, update, gradient, whole=True)
                except RelaxationDiverged as error:
                    note = str(error)
                    result = [(layer, math.nan, math.nan) for layer in (*layers, WHOLE)]
                rows += [Iterations(method, step_size, num_steps, *values, note) for values in result]
                done += num_steps
                if progress is not None:
                    progress(done, total)
    return tuple(rows)


def compare_errors(
    model: nn.Sequential,
    x: Tensor,
    y,
    *,
    methods: Sequence[str] = METHODS,
    num_steps: int = 500,
    step_size: float = 0.05,
    loss: LossLike = "cross_entropy",
    backend: str = "auto",
    progress: Progress | None = None,
) -> tuple[LayerError, ...]:
    """The errors eps_l of every layer against the exact ones, those of backpropagation.

    Args:
        model: stays as it is, in its mode. x, y, loss, backend: as for :func:`pcfast.relax`.
        methods: repetitions count once. num_steps, step_size: the paper's by default.
        progress: called after every relaxation with their number so far and in all.

    Returns:
        Rows ordered by method and layer 1..L; where a relaxation diverged they hold NaN and the reason.

    Raises:
        ArgumentError and its kinds, BackendError, RelaxationDiverged (the forward pass is not finite).
    """
    methods = _checked_methods(methods)
    model = copy.deepcopy(model)
    replay = replaying(x.device)

    def errors(method: str) -> list[Tensor]:
        with replay():
            relaxed = relax(
                model, x, y, loss=loss, method=method, step_size=step_size, num_steps=num_steps, backend=backend,
                check="sync",
            )  # fmt: skip
        return relaxed.errors[1:]

    exact = errors("exact")
    norms = [_norm(error) for error in exact]
    rows = []
    for done, method in enumerate(methods, start=1):
        if progress is not None:
            progress(done, 1 + len(methods))
        try:
            result, note = errors(method), ""
        except RelaxationDiverged as error:
            result, note = None, str(error)
        for layer, (g, norm) in enumerate(zip(exact, norms, strict=True), start=1):
            eps = None if result is None else result[layer - 1]
            measured = (
                (math.nan, norm, math.nan) if eps is None else (_norm(eps), norm, relative_error(eps, g))
            )
            rows.append(LayerError(method, layer, *measured, note))
    if progress is not None:
        progress(1 + len(methods), 1 + len(methods))
    return tuple(rows)


def _update_of(loss: Tensor, layers: dict[int, list[nn.Parameter]]) -> dict[nn.Parameter, Tensor]:
    """The update that ``loss.backward()`` would bring; the graph stays, and so does ``.grad``."""
    parameters = list(dict.fromkeys(p for result in layers.values() for p in result))
    result = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return in_full(parameters, result)


def _differences(
    layers: dict[int, list[nn.Parameter]],
    update: dict[nn.Parameter, Tensor],
    gradient: dict[nn.Parameter, Tensor],
    *,
    whole: bool = False,
) -> list[tuple[int | str, float, float]]:
    """(layer, relative error, angle) of ``update`` against ``gradient``; with ``whole`` "all" comes last."""
    groups: dict[int | str, Iterable[nn.Parameter]] = {**layers, WHOLE: update} if whole else layers
    rows = []
    for layer, parameters in groups.items():
        a, b = (vector([values[p] for p in parameters]) for values in (update, gradient))
        rows.append((layer, relative_error(a, b), angle_degrees(a, b)))
    return rows


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector([tensor])))


def _median(values: Iterable[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return statistics.median(there) if there else math.nan


def _checked_methods(methods: Sequence[str]) -> tuple[str, ...]:
    if isinstance(methods, str) or not methods:
        raise ArgumentError("methods", repr(methods), "a list of at least one method")
    return tuple(dict.fromkeys(map(validation.checked_method, methods)))
