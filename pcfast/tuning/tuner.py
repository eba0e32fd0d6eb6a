"""Tuning of the triton backend on the device at hand: candidates are timed, the winner is verified, then it is saved.

Decisions are made one at a time, with the others at their best so far. Nothing is tuned before :func:`tune` is
called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..backends.triton import config_cache
from ..backends.triton.configs import (
    COMPOSED,
    FUSED,
    IMPLICIT,
    NONE,
    STAGED,
    Choices,
    ConvolutionKey,
    Key,
    LoopKey,
    Value,
)
from ..backends.triton.tiles import LinearTiles
from ..checking import checker as checking
from ..checking import copies
from ..errors import ArgumentError, BackendError, ModelError
from ..losses import LossLike
from ..precision import numerics
from ..problem.settings import Settings
from ..problem.types import Outcome, Problem, Wanted
from ..relaxation import cuda_graphs
from ..relaxation.cuda_graphs import kept_alive
from ..relaxation.solve import prepare, solve
from ..support.timing import PRUNE_RATIO, Clock, clock_of, in_turns, reason_of

Progress = Callable[[int, int, str], None]

ROUNDS = 7
# How many times the untuned configuration's distance from float64 a candidate's may be. It tells faults from
# rounding; the winner is held to pcfast check's bounds.
_TOLERANCE_FACTOR = 10.0
_DRAWS = 5
_CHECKED_AS = {"bf16": "bf16", "tf32": "tf32", "tf32x3": "ieee"}


@dataclass(frozen=True)
class Trial:
    """One candidate: its median seconds, or None and the reason why it is out. choice: in words."""

    choice: str
    seconds: float | None
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    """One decision. what: in words. before, chosen: of the trials' choices. trials: the one before first."""

    what: str
    before: str
    chosen: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class TuningReport:
    """What :func:`tune` did.

    Attributes:
        device, precision: where it was timed; of products: "bf16", "tf32" or "tf32x3".
        before, after: median seconds of a relaxation with its updates, measured in turns; before is None where what
            ran so far does not run or is wrong.
        decisions: in the order in which they were made.
        choices: what is faster than before; empty where nothing is.
        check: the winner's verification; None where nothing is faster.
        path: the file written; None where nothing was.
    """

    device: str
    precision: str
    before: float | None
    after: float
    decisions: tuple[Decision, ...]
    choices: Choices
    check: checking.Report | None
    path: Path | None


def tune(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossLike = "cross_entropy",
    num_steps: int = 20,
    step_size: float = 0.1,
    save: bool = True,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> TuningReport:
    """Choose the configuration of strict relaxation by kernels for this network, batch size, device and precision.

    Tiles depend on the batch size; one launch or stages, and how convolutions run, do not, so that a row's result
    does not depend on its batch. The model, its gradients and torch's random state stay as they are: everything runs
    on a copy, with dropout off.

    Args:
        model, x, y, loss, num_steps, step_size: as for :func:`pcfast.relax`, under the autocast and the switches of
            the training to come.
        save: write the winner to the file of this device, which later processes read at their first plan.
        clock: what measures; None: the device's own time between CUDA events.
        progress: called as ``progress(done, total, what)``.

    Raises:
        ArgumentError and its kinds; RelaxationDiverged; BackendError: the kernels cannot run the network, or the
            winner is out of its bounds (nothing is written then).
    """
    if x.device.type != "cuda" and clock is None:
        raise ArgumentError(
            "device", str(x.device), "a CUDA device: kernels are timed where they run", "Tune on a GPU."
        )
    if save:
        config_cache.check_writable()
    on_device = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
    with copies.forked(x.device), on_device:
        return _Tuner(model, x, y, loss, num_steps, step_size, clock or clock_of(x.device), progress).run(
            save
        )


class IncorrectResult(Exception):
    """A candidate that computes something else."""


class _CorrectnessCheck:
    """Tells whether a candidate computes what it should: errors and updates against the reference in float64."""

    def __init__(self, problem: Problem, num_steps: int, loss: LossLike) -> None:
        device, double = problem.x.device, torch.float64
        model = copies.copied(problem.model, device).to(double)
        x, y = (copies.in_dtype(value, device, double) for value in (problem.x, problem.y))
        with torch.autocast(device.type, enabled=False):
            settings = Settings(
                copies.loss_in(loss, device, double), "strict", problem.step_size, num_steps, backend="reference",
                check="sync",
            )  # fmt: skip
            outcome, _ = solve(model, x, y, settings, Wanted(states=True))
        self._truth = self._quantities(model, outcome)
        self._allowed: dict[str, float] | None = None

    def _quantities(self, model: nn.Sequential, outcome: Outcome) -> dict[str, Tensor]:
        errors = {f"error {l}": e for l, e in enumerate(outcome.errors) if l and e is not None}
        named = {f"update {name}": outcome.gradients.get(p) for name, p in model.named_parameters()}
        return errors | {name: update for name, update in named.items() if update is not None}

    def _distances(self, problem: Problem, outcome: Outcome) -> dict[str, float]:
        quantities = self._quantities(problem.model, outcome)
        return {name: float((quantities[name].double() - true).norm()) for name, true in self._truth.items()}

    def calibrate(self, problem: Problem, outcome: Outcome) -> None:
        """Take the untuned configuration's outcome as what rounding costs."""
        distances = self._distances(problem, outcome)
        sizes = {name: float(true.norm()) for name, true in self._truth.items()}
        relative = max(
            (distances[n] / sizes[n] for n in sizes if n.startswith("error") and sizes[n]), default=0.0
        )
        self._allowed = {
            name: _TOLERANCE_FACTOR * (distances[name] + relative * sizes[name]) for name in sizes
        }

    def check(self, problem: Problem, outcome: Outcome) -> None:
        """Raise IncorrectResult for an outcome that is further off than rounding explains."""
        for name, distance in self._distances(problem, outcome).items():
            if not distance <= self._allowed[name]:
                raise IncorrectResult(
                    f"wrong: {name} is {distance:.1e} from float64, allowed {self._allowed[name]:.1e}"
                )


class _Tuner:
    """One call of :func:`tune`."""

    def __init__(self, model, x, y, loss, num_steps, step_size, clock: Clock, progress) -> None:
        settings = Settings(loss, "strict", step_size, num_steps, backend="triton", check="deferred")
        self.problem, self.plan = prepare(copies.copied(model, x.device), x, y, settings)
        if self.plan.depth == 1 or self.plan.num_steps == 0:
            raise ModelError("model", "no loop", "two layers and one iteration, so that there is one")
        self.backend = BACKENDS[self.plan.backend]
        self.loss, self.clock = loss, clock
        self.device = x.device
        self.progress = progress or (lambda done, total, what: None)
        self.start = self.current = config_cache.active(self.device)
        self.decisions: list[Decision] = []
        self.correctness = _CorrectnessCheck(self.problem, self.plan.num_steps, loss)
        self.recordable = False

    def run(self, save: bool) -> TuningReport:
        self._calibrate()
        design = self._design(self.current)
        steps = list(self._steps(design))
        for done, (what, decide) in enumerate(steps):
            self.progress(done, len(steps) + 2, what)
            decide()
        self.progress(len(steps), len(steps) + 2, "before and after")
        before, after = self._measured([("before", self.start), ("after", self.current)])
        faster = after.seconds is not None and (before.seconds is None or after.seconds < before.seconds)
        if faster and self._configuration(self.start) != self._configuration(self.current):
            chosen = self._in_force()
        elif before.seconds is None:
            raise BackendError(f"tuning: nothing runs: {before.reason}; {after.reason}")
        else:
            chosen, after = NONE, before
        check = path = None
        if len(chosen):
            self.progress(len(steps) + 1, len(steps) + 2, "verification")
            winner = self.start.with_entries(dict(chosen.items()))
            check = self._verified(winner, design.target.precision)
            if save:
                path = config_cache.save(self.device, chosen)
                cuda_graphs.CACHE.clear()
        self.progress(len(steps) + 2, len(steps) + 2, "done")
        return TuningReport(
            config_cache.identity(self.device).device, design.target.precision, before.seconds, after.seconds,
            tuple(self.decisions), chosen, check, path,
        )  # fmt: skip

    # decisions

    def _steps(self, design) -> Iterator[tuple[str, Callable[[], None]]]:
        """(what, function that decides it), in their order."""
        for key, now in self._convolutions(design):
            other = COMPOSED if now == IMPLICIT else IMPLICIT
            yield str(key), lambda key=key, now=now, other=other: self._decide(key, now, [other])
        if design.loop is None:
            yield "tiles", self._decide_tiles
        else:
            yield str(design.loop), lambda: self._decide_loop(design.loop, design.fuse_loop)

    def _decide_loop(self, key: LoopKey, fuse_loop: bool) -> None:
        """One launch or stages, each with its best tiles."""
        now, other = (FUSED, STAGED) if fuse_loop else (STAGED, FUSED)
        decision = self._decide(key, now, [other])
        best = self.current.get(key)
        seconds = {trial.choice: trial.seconds for trial in decision.trials}
        loser = other if best == now else now
        # nothing that belongs to it is tuned
        pruned = seconds[loser] is None or seconds[loser] > PRUNE_RATIO * seconds[best]
        if not pruned:
            self.current = self.current.with_entries({key: loser})
            self._decide_tiles()
            self.current = self.current.with_entries({key: best})
        self._decide_tiles()
        if not pruned:
            self._decide(key, best, [loser])

    def _decide_tiles(self) -> None:
        """The tiles of each launch of linear layers in the design as it is now."""
        from .search_space import candidates

        design = self._design(self.current)
        tiles = {launch.key: launch.tiles for launch in _launches(design)}
        for key, now in tiles.items():
            others = candidates(key, now, design.target.interpreted)
            if others:
                self._decide(key, now, others)

    def _decide(self, key: Key, now: Value, others: Sequence[Value]) -> Decision:
        """Time ``now`` against ``others``; the fastest is the current choice from here on.

        Raises:
            BackendError: not one of them runs.
        """
        values = [now, *others]
        trials = self._measured(
            [(_words(value), self.current.with_entries({key: value})) for value in values]
        )
        usable = [place for place, trial in enumerate(trials) if trial.seconds is not None]
        if not usable:
            raise BackendError(f"{key}: nothing runs: {'; '.join(f'{t.choice}: {t.reason}' for t in trials)}")
        best = min(usable, key=lambda place: trials[place].seconds)
        self.current = self.current.with_entries({key: values[best]})
        self.decisions.append(Decision(str(key), _words(now), trials[best].choice, tuple(trials)))
        return self.decisions[-1]

    def _in_force(self) -> Choices:
        """Of the choices made, those that the design follows, and that its verification therefore covers."""
        design = self._design(self.current)
        keys: list[Key] = [launch.key for launch in _launches(design)]
        keys += [key for key, _ in self._convolutions(design)]
        keys += [] if design.loop is None else [design.loop]
        made = {key: self.current.get(key) for key in keys if self.current.get(key) != self.start.get(key)}
        return Choices(made)

    # designs

    def _design(self, choices: Choices):
        from ..backends.triton.designs import design_of

        with numerics(self.device, self.plan.precision), config_cache.using(choices):
            return design_of(self.plan)

    def _configuration(self, choices: Choices) -> tuple:
        """What runs with ``choices``, whatever the reason."""
        design = self._design(choices)
        tiles = {launch.key: _words(launch.tiles) for launch in _launches(design)}
        return design.fuse_loop, tiles, self._convolutions(design)

    def _convolutions(self, design) -> list[tuple[ConvolutionKey, str]]:
        """Convolutions that our kernels can run, each with what runs it in ``design``."""
        from ..backends.kernel_forms import PointwiseForm
        from ..backends.triton.conv_form import ConvForm, conv_form

        in_use = {}
        for layer in self.plan.network.layers[1:]:
            form, below = design.forms[layer.index], design.boundaries[layer.index - 1]
            now = COMPOSED
            if design.gram and layer.index == 2:
                continue  # cuDNN multiplies with the Gram matrix, whatever is chosen
            if isinstance(form, ConvForm):
                now = IMPLICIT
            elif isinstance(form, PointwiseForm):
                form = conv_form(form, layer, below)
            if isinstance(form, ConvForm):
                in_use[ConvolutionKey(design.target.convolutions, astuple(form.geometry))] = now
        return list(in_use.items())

    # runs

    def _run(self, choices: Choices, wanted: Wanted | None = None) -> Outcome:
        plan = self.plan if wanted is None else replace(self.plan, wanted=wanted)
        with config_cache.using(choices):
            return self.backend.run(self.problem, plan)

    def _calibrate(self) -> None:
        """The untuned configuration: what rounding costs, and whether a CUDA graph can hold it."""
        self.correctness.calibrate(self.problem, self._run(NONE, Wanted(states=True)))
        if cuda_graphs.ineligible_reason(self.backend, self.problem, self.plan):
            return
        self._run(NONE)
        try:
            self._recorded(NONE)
        except RuntimeError:  # then the training runs without graphs, too
            return
        self.recordable = True

    def _recorded(self, choices: Choices) -> Callable[[], object]:
        with torch.no_grad():
            result, replay = cuda_graphs.record_cuda(lambda: self._run(choices))
        return kept_alive(replay, result)

    def _prepared(self, choices: Choices) -> Callable[[], object]:
        """A relaxation as training runs it, compiled, checked and recorded. Raises whatever goes wrong."""
        self.correctness.check(self.problem, self._run(choices, Wanted(states=True)))
        self._run(choices)
        return self._recorded(choices) if self.recordable else lambda: self._run(choices)

    def _measured(self, contenders: Sequence[tuple[str, Choices]]) -> list[Trial]:
        """Median times; contenders take turns, in a new order each round."""
        ready: dict[int, Callable[[], object]] = {}
        reasons: dict[int, str] = {}
        for place, (_, choices) in enumerate(contenders):
            try:
                ready[place] = self._prepared(choices)
            except Exception as failure:  # of triton, its compilers, the driver: such a candidate is out
                reasons[place] = _reason(failure)
        seconds, failed = in_turns(ready, self.clock, ROUNDS)
        reasons |= {place: _reason(failure) for place, failure in failed.items()}
        return [
            Trial(words, seconds.get(place), reasons.get(place, ""))
            for place, (words, _) in enumerate(contenders)
        ]

    def _verified(self, winner: Choices, precision: str) -> checking.Report:
        """The winner's report from pcfast check; graphs that others recorded, and its own, are dropped.

        Raises:
            BackendError: it is out of its bounds.
        """
        problem = self.problem
        cuda_graphs.CACHE.clear()
        try:
            with config_cache.using(winner):
                report = checking.check(
                    problem.model, _draws(problem.x, problem.y), loss=self.loss, step_size=problem.step_size,
                    num_steps=self.plan.num_steps, backends=["triton"], precisions=[_CHECKED_AS[precision]],
                )  # fmt: skip
        finally:
            cuda_graphs.CACHE.clear()
        if not report.ok:
            row = max(report.failures, key=lambda row: row.ratio)
            raise BackendError(
                f"tuning: the fastest configuration is out of its bounds ({row.words}); nothing was written, and the "
                "triton backend runs as before"
            )
        return report


def _launches(design) -> list:
    """Launches of linear layers whose tiles may be chosen."""
    return [*design.predicts, *([] if design.feedback is None else [design.feedback])]


def _words(value: Value) -> str:
    if isinstance(value, LinearTiles):
        return f"{value}, {value.warps} warps, {value.stages} stages"
    return value


def _reason(failure: Exception) -> str:
    return str(failure) if isinstance(failure, IncorrectResult) else reason_of(failure)


def _draws(x: Tensor, y) -> list[tuple[Tensor, object]]:
    """The batch, and more of its shape and scale: features and targets, each shuffled over the samples.

    More than one, since a unit within rounding of its kink moves an error of one draw far (docs/method.md).
    """
    generator = torch.Generator().manual_seed(0)
    flat = x.reshape(len(x), -1)
    draws = [(x, y)]
    for _ in range(_DRAWS - 1):
        order = torch.rand(flat.shape, generator=generator).argsort(0).to(x.device)
        rows = torch.randperm(len(x), generator=generator).to(x.device)
        by_rows = isinstance(y, Tensor) and y.dim() > 0 and len(y) == len(x)
        draws.append((flat.gather(0, order).reshape(x.shape), y[rows] if by_rows else y))
    return draws
