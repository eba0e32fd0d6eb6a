"""Every backend against the float64 reference, on one's own network, shapes and settings.

    report = pcfast.checking.check(model, (16, 784), step_size=0.1, num_steps=20)
    report.ok, report.worst(), report.rows

Bounds are those of docs/method.md, "How results are judged". They come from torch and the reference alone: a backend
has no part in the bound that it is held to. Beyond the rule there, each bound has what the literal float64 loop may
lose itself added (:func:`pcfast.checking.bounds.rounding`), as where few iterations leave errors of 1e-17 of a
belief; and in tf32 and bf16 the forward pass's cost is the upper quartile over the draws, since their median is a
matter of chance for a small network, where about one unit a draw lies within rounding of its kink.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..errors import ArgumentError, BackendError, ModelError, RelaxationDiverged
from ..losses import LossLike, describe_loss
from ..model.describe import describe
from ..model.placement import common_placement
from ..model.spec import Network
from ..precision import PRECISIONS, choose_precision, parameter_dtype, use_precision
from ..problem import belief_optimizers, validation
from ..problem.belief_optimizers import BeliefOptimizer
from ..problem.plan import Plan, plan
from ..problem.settings import Settings
from ..problem.types import Outcome, Wanted, layer_of_parameters
from ..relaxation.solve import solve
from . import bounds as accuracy
from .copies import (
    Batch,
    Side,
    buffers_kept,
    copied,
    dropout_modules,
    forked,
    forward,
    is_shape,
    random_batches,
)  # fmt: skip
from .report import UPDATE, Refusal, Report, Row

#: Where an error grows to this many times the gradient there, the relaxation is taken to run away.
RUNAWAY = 10.0

Quantity = tuple[int, str]  # PC layer, and "belief", "error" or UPDATE + the parameter's name
Candidate = tuple[str, str]  # backend, precision


def check(
    model: nn.Sequential,
    data: Sequence[int] | Sequence[Batch],
    *,
    loss: LossLike = "cross_entropy",
    method: str = "strict",
    step_size: float = 0.1,
    num_steps: int = 20,
    belief_optimizer: BeliefOptimizer | None = None,
    vinit: float | None = None,
    backends: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    draws: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Hold backends to the reference in float64: beliefs, errors and updates of every layer.

    The model and torch's random state stay as they are: everything runs on copies, all of them with the parameters
    rounded to float32. Dropout modules run in eval mode, since precisions draw different masks.

    Args:
        model: ``nn.Sequential`` of PC layers, of a real dtype; BatchNorm stays in its mode.
        data: shape of x, batch included, for which :func:`random_batches` draws; or batches (x, y).
        loss, method, step_size, num_steps, belief_optimizer: as for :func:`pcfast.relax`.
        vinit: what all beliefs start from; None: the forward pass.
        backends: names; None takes all but the literal loop that gives the truth.
        precisions: of :data:`pcfast.precision.PRECISIONS`; None takes all that the device has.
        device: where to run; None means where the model is.
        draws, seed: of the random data; ``seed`` also of what the network draws itself.
        progress: called as ``progress(done, total, what)`` before each relaxation.

    Raises:
        ArgumentError and its kinds; BackendError: no backend can run the network in any of the precisions;
        RelaxationDiverged: in the reference, so that there is no truth.
    """
    check = _Check(
        model, data, loss, method, step_size, num_steps, belief_optimizer, vinit, device, draws, seed
    )
    check.choose(backends, default_precisions(check.device) if precisions is None else precisions)
    with forked(check.device), torch.autocast(check.device.type, enabled=False):
        return check.run(progress or (lambda done, total, what: None))


def default_precisions(device: torch.device) -> tuple[str, ...]:
    """The precisions that ``device`` has."""
    return tuple(name for name in PRECISIONS if name != "tf32" or device.type == "cuda")


class _Failed(Exception):
    """A candidate's run that gave nothing to compare."""

    def __init__(self, layer: int | None, quantity: str, message: str) -> None:
        super().__init__(message)
        self.layer, self.quantity = layer, quantity


@dataclass
class _Numbers:
    """Frobenius norms of one kind of tensors, and below which they are nothing but rounding."""

    norms: dict[Quantity, float]
    noise: dict[Quantity, float]

    def relative_to(self, key: Quantity) -> str:
        """What errors in a quantity are relative to (:attr:`Row.relative_to`)."""
        if self.norms[key] > self.noise[key]:
            return "truth"
        return (
            "layer"
            if key[1].startswith(UPDATE) and self._layer_update(key[0], above_noise=True)
            else "nothing"
        )

    def scale(self, key: Quantity, relative_to: str) -> float:
        """The norm that errors are divided by; 1 where it would be zero."""
        if relative_to == "nothing":
            return 1.0
        return (self.norms[key] if relative_to == "truth" else self._layer_update(key[0])) or 1.0

    def _layer_update(self, layer: int, above_noise: bool = False) -> float:
        keys = (key for key in self.norms if key[0] == layer and key[1].startswith(UPDATE))
        return math.hypot(
            *(self.norms[key] for key in keys if not above_noise or self.norms[key] > self.noise[key])
        )


@dataclass
class _Truth(_Numbers):
    """The reference in float64 on one batch; the tensors are dropped once the candidates are compared.

    Attributes:
        norms, noise: of what is compared; the noise is what the literal loop itself may have lost.
        allowed: the float64 bound, absolute.
        growth: the largest |eps_l| / |g_l|.
        values: what is compared.
        activations, gradients: vhat_0..vhat_L and the updates of backpropagation in float64.
    """

    allowed: dict[Quantity, float]
    growth: float
    values: dict[Quantity, Tensor]
    activations: list[Tensor]
    gradients: dict[Quantity, Tensor]
    backpropagation: _Numbers


@dataclass
class _Lost:
    """What a precision costs programs that are not under test, on one batch.

    Attributes:
        forward: relative error of torch's forward pass, its worst layer.
        gradients: relative errors of backpropagation.
        reference: the float64 reference with that forward pass's rounding: absolute distance from the truth.
    """

    forward: float
    gradients: dict[Quantity, float]
    reference: dict[Quantity, float]


def _distances(result: dict[Quantity, Tensor], truth: dict[Quantity, Tensor]) -> dict[Quantity, float]:
    """|found - truth| of every quantity; raises _Failed where they cannot be compared."""
    for (l, what), value in result.items():
        if (l, what) not in truth and bool(value.any()):
            raise _Failed(l, what, "the reference has no such update")
    distances = {}
    for (l, what), true in truth.items():
        value = result.get((l, what))
        if value is None or value.shape != true.shape:
            given = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise _Failed(l, what, f"{given} instead of shape {tuple(true.shape)}")
        distances[l, what] = float((value.double() - true).norm())
    return distances


def _median(values: Sequence[float]) -> float:
    """The median; NaN where any value is not finite."""
    return median(values) if all(map(math.isfinite, values)) else math.nan


def _upper_quartile(values: Sequence[float]) -> float:
    """The value that at most a quarter exceeds: the largest but one of five."""
    return sorted(values)[math.ceil(0.75 * (len(values) - 1))]


class _Check:
    """One call of :func:`check`."""

    def __init__(
        self, model, data, loss, method, step_size, num_steps, belief_optimizer, vinit, device, draws, seed
    ) -> None:
        network = describe(model)
        placement = common_placement(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(
                "model", "a model without a parameter to train", "one parameter that requires grad"
            )
        where, dtype = placement
        if not dtype.is_floating_point:
            raise ModelError("model", f"parameters of dtype {dtype}", "real parameters")
        self.method, self.seed = validation.checked_method(method), seed
        self.step_size = validation.checked_step_size(step_size)
        self.num_steps = validation.checked_steps(num_steps)
        self.belief_optimizer = belief_optimizers.checked(belief_optimizer, self.method)
        validation.check_start_of_all(vinit, self.method)
        self.vinit = vinit
        self.device = where if device is None else validation.checked_device(device)
        self.notes: list[str] = []
        if dtype == torch.float64:
            self.notes.append("the model is float64: it was checked with its parameters rounded to float32")

        if is_shape(data):
            network.shapes(tuple(data))
            data = random_batches(model, data, loss=loss, draws=draws, seed=seed)
        for batch in data:
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
                raise ArgumentError(
                    "data", f"a batch that is a {type(batch).__name__}", "pairs (x, y), x a tensor"
                )
        if not len(data):
            raise ArgumentError("data", "no batches", "at least one pair (x, y)")
        self.single = Side(copied(model, self.device), data, loss, torch.float32)
        self.double = Side(copy.deepcopy(self.single.model), self.single.batches, loss, torch.float64)
        self.network: Network = describe(self.single.model)
        dropouts = len(dropout_modules(model))
        if dropouts:
            self.notes.append(
                f"{dropouts} dropout module{'s' * (dropouts > 1)} ran in eval mode: masks of different precisions "
                "cannot be compared"
            )

    def choose(self, backends: Sequence[str] | None, precisions: Sequence[str]) -> None:
        """Settle which backends run in which precisions.

        Raises:
            ArgumentError: an unknown name. BackendError: none can run.
        """
        precisions = tuple(dict.fromkeys(precisions))
        if not precisions:
            raise ArgumentError("precisions", "none", f"some of {PRECISIONS}")
        if backends is None:
            backends = [name for name, backend in BACKENDS.items() if not backend.literal]
            literal = [name for name, backend in BACKENDS.items() if backend.literal]
            self.notes.append(
                f"{', '.join(literal)} gives the truth, and is judged only where asked for by name"
            )
        for name in backends:
            if name not in BACKENDS:
                raise ArgumentError("backends", repr(name), f"some of {list(BACKENDS)}")
        self.candidates: list[Candidate] = []
        self.refused: list[Refusal] = []
        for name in dict.fromkeys(backends):
            for precision in precisions:
                with use_precision(precision, self.device):
                    ok, reason = BACKENDS[name].supports(self._plan(parameter_dtype(precision)))
                if ok and precision == "fp64" and BACKENDS[name].literal:
                    ok, reason = False, "it is the truth itself"
                if ok:
                    self.candidates.append((name, precision))
                else:
                    self.refused.append(Refusal(name, precision, reason))
        self._require_candidates()

    def _plan(self, dtype: torch.dtype) -> Plan:
        return plan(
            self.network, self.device, dtype, tuple(self.double.batches[0][0].shape),
            choose_precision(self.device.type, dtype), self.method, self.num_steps, self.vinit is None,
            loss=describe_loss(self.double.loss).kind, belief_optimizer=self.belief_optimizer,
        )  # fmt: skip

    def _require_candidates(self) -> None:
        if not self.candidates:
            reasons = (f"{r.backend} in {r.precision}: {r.reason}" for r in self.refused)
            raise BackendError(f"no backend can be checked on this network: {'; '.join(reasons)}")

    def run(self, progress) -> Report:
        """Draw by draw, so that the tensors of one draw are held at a time; numbers stay."""
        draws = len(self.double.batches)
        lower = list(dict.fromkeys(precision for _, precision in self.candidates if precision != "fp64"))
        self.truths: list[_Truth] = []
        self.lost: dict[str, list[_Lost]] = {precision: [] for precision in lower}
        result: dict[Candidate, list[dict[Quantity, float]]] = {
            candidate: [] for candidate in self.candidates
        }
        failed: dict[Candidate, _Failed] = {}
        total = draws * (1 + len(lower) + len(result))
        steps = itertools.count()

        def begin(what: str, draw: int) -> None:
            progress(next(steps), total, f"{what}, draw {draw + 1} of {draws}")

        self._try_forward()
        for draw in range(draws):
            begin("reference in float64", draw)
            truth = self._truth(draw)
            for precision in lower:
                begin(f"what {precision} costs", draw)
                self.lost[precision].append(self._lost(precision, draw, truth))
            for candidate in result:
                begin(" in ".join(candidate), draw)
                if candidate in failed or candidate not in self.candidates:
                    continue
                try:
                    result[candidate].append(_distances(self._candidate(*candidate, draw), truth.values))
                except _Failed as failure:
                    failed[candidate] = failure
                except BackendError as refusal:
                    self.candidates.remove(candidate)
                    self.refused.append(Refusal(*candidate, str(refusal)))
                    self._require_candidates()
            truth.values, truth.activations, truth.gradients = {}, [], {}
            self.truths.append(truth)
        progress(total, total, "done")

        rows: list[Row] = []
        for candidate in self.candidates:
            if candidate in failed:
                failure = failed[candidate]
                where = failure.layer, failure.quantity
                rows.append(Row(*candidate, *where, math.nan, math.nan, "nothing", str(failure)))
            else:
                rows += self._rows(*candidate, result[candidate])
        self._note_limits(rows)
        return Report(
            self.method, self.step_size, self.num_steps, str(self.device), tuple(self.double.batches[0][0].shape),
            draws, tuple(rows), tuple(self.refused), tuple(self.notes),
        )  # fmt: skip

    # runs ----------------------------------------------------------------------------------------------------

    def _try_forward(self) -> None:
        """The network once in both dtypes, for what may fail in a user's module; does it draw random numbers?"""
        for side in (self.single, self.double):
            self._seed()
            before = self._random_state()
            forward(side.model, side.batches[0][0])
        if not all(map(torch.equal, before, self._random_state())):
            self.notes.append(
                "the network draws random numbers in its forward pass: every run started from the same seed, but "
                "draws that depend on the precision show as errors"
            )

    def _seed(self) -> None:
        """The same draws for every run, on the devices whose state is put back afterwards."""
        torch.default_generator.manual_seed(self.seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.seed)

    def _random_state(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    def _solve(self, side: Side, model: nn.Sequential, draw: int, backend: str, wanted: Wanted) -> Outcome:
        """One relaxation of ``model`` on a batch of ``side``.

        Raises:
            _Failed: another backend ran than the one asked for.
        """
        self._seed()
        x, y = side.batches[draw]
        with buffers_kept(model):
            settings = Settings(
                side.loss, self.method, self.step_size, self.num_steps, self.belief_optimizer, backend=backend,
                vinit=self.vinit, check="sync",
            )  # fmt: skip
            outcome, run = solve(model, x, y, settings, wanted)
        if run.plan.backend != backend:
            raise _Failed(None, "run", f"asked for {backend}, but {run.plan.backend} ran")
        return outcome

    def _candidate(self, backend: str, precision: str, draw: int) -> dict[Quantity, Tensor]:
        """What a backend gives: states as :func:`pcfast.relax` asks for them, updates as pc_loss does."""
        side = self.double if parameter_dtype(precision) == torch.float64 else self.single
        try:
            with use_precision(precision, self.device):
                states = self._solve(side, side.model, draw, backend, Wanted(gradients=False, states=True))
                updates = self._solve(side, side.model, draw, backend, Wanted())
        except RelaxationDiverged as error:
            raise _Failed(error.layer, "run", str(error)) from error
        except (BackendError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # of torch, or of a kernel
            raise _Failed(None, "run", f"{type(error).__name__}: {error}") from error
        return self._by_quantity(side.model, states.beliefs, states.errors, updates.gradients)

    def _by_layer(self, model: nn.Sequential, of_parameters: dict[nn.Parameter, Any]) -> dict[Quantity, Any]:
        """What is known of parameters as quantities."""
        layers = layer_of_parameters(self.network, model)
        named = [(name, p) for name, p in model.named_parameters() if p in of_parameters]
        return {(layers[p], UPDATE + name): of_parameters[p] for name, p in named}

    def _by_quantity(self, model: nn.Sequential, beliefs, errors, of_parameters) -> dict[Quantity, Any]:
        """What is known of beliefs and errors (lists over l = 0..L) and of parameters, layer by layer."""
        updates = self._by_layer(model, of_parameters)
        values: dict[Quantity, Any] = {}
        for l in range(1, self.network.depth + 1):
            values |= {(l, "belief"): beliefs[l], (l, "error"): errors[l]}
            values |= {key: value for key, value in updates.items() if key[0] == l}
        return values

    def _truth(self, draw: int) -> _Truth:
        model = self.double.model
        outcome = self._solve(self.double, model, draw, "reference", Wanted(states=True))
        beliefs, errors, updates = outcome.beliefs, outcome.errors, outcome.gradients
        noise, allowed = [0.0], [0.0]  # v_0 is clamped: nothing is lost there
        for eps, v in zip(errors[1:], beliefs[1:], strict=True):
            noise.append(accuracy.rounding(v, self.num_steps))
            allowed.append(accuracy.allowed_error(eps, v, self.num_steps))
        noise_of_updates = accuracy.carried_to_updates(model, beliefs, errors, noise)
        allowed_of_updates = accuracy.allowed_update_errors(
            model, beliefs, [None, *errors[1:]], updates, self.num_steps
        )
        values = self._by_quantity(model, beliefs, errors, updates)

        activations, g, gradients = self.double.backpropagate(draw)
        lost = [64 * accuracy.ULP * float(gradient.norm()) for gradient in g]
        gradient_noise = accuracy.carried_to_updates(model, activations, g, lost)
        gradients = self._by_layer(model, gradients)
        sizes = [
            (float(eps.norm()), float(gradient.norm()))
            for eps, gradient in zip(errors[1:], g[1:], strict=True)
        ]
        all_noise = self._by_quantity(model, noise, noise, noise_of_updates)
        return _Truth(
            norms={key: float(value.norm()) for key, value in values.items()},
            noise={key: all_noise[key] for key in values},
            allowed=self._by_quantity(model, allowed, allowed, allowed_of_updates),
            growth=max((eps / gradient for eps, gradient in sizes if gradient), default=0.0),
            values=values,
            activations=activations,
            gradients=gradients,
            backpropagation=_Numbers(
                {key: float(gradient.norm()) for key, gradient in gradients.items()},
                self._by_layer(model, gradient_noise),
            ),
        )

    def _lost(self, precision: str, draw: int, truth: _Truth) -> _Lost:
        side, exact = self.single, truth.backpropagation
        with use_precision(precision, self.device):
            self._seed()
            activations, _, gradients = side.backpropagate(draw)
            self._seed()
            noisy = accuracy.with_forward_errors_of(side.model, side.batches[draw][0])
        distances = _distances(self._by_layer(side.model, gradients), truth.gradients)
        kinds = {key: exact.relative_to(key) for key in distances}
        relative = {
            key: distance / exact.scale(key, kinds[key])
            for key, distance in distances.items()
            if kinds[key] != "nothing"
        }
        try:
            outcome = self._solve(self.double, noisy, draw, "reference", Wanted(states=True))
        except RelaxationDiverged:  # there is no bound then, and the rows say so
            reference = dict.fromkeys(truth.values, math.inf)
        else:
            result = self._by_quantity(noisy, outcome.beliefs, outcome.errors, outcome.gradients)
            reference = _distances(result, truth.values)
        return _Lost(
            max(map(accuracy.relative_error, activations[1:], truth.activations[1:])), relative, reference
        )

    # judgement -----------------------------------------------------------------------------------------------

    def _rows(self, backend: str, precision: str, result: list[dict[Quantity, float]]) -> Iterator[Row]:
        for key in result[0]:
            kinds = [truth.relative_to(key) for truth in self.truths]
            kind = max(("nothing", "layer", "truth"), key=kinds.count)
            scales = [truth.scale(key, kind) for truth in self.truths]
            errors = [draw[key] / scale for draw, scale in zip(result, scales, strict=True)]
            if precision == "fp64":
                # no unit lies within float64's rounding of its kink by chance: every draw counts
                bounds = [
                    truth.allowed[key] / scale for truth, scale in zip(self.truths, scales, strict=True)
                ]
                rows = [
                    Row(backend, precision, *key, *pair, kind) for pair in zip(errors, bounds, strict=True)
                ]
                yield max(rows, key=lambda row: row.ratio)
            else:
                bound = self._bound(precision, key, scales, kind)
                why = (
                    f"backpropagation or the forward pass in {precision} is not finite"
                    if math.isnan(bound)
                    else ""
                )
                yield Row(backend, precision, *key, _median(errors), bound, kind, why)

    def _bound(self, precision: str, key: Quantity, scales: list[float], kind: str) -> float:
        """Bound on a quantity's median error in a precision other than fp64; NaN where there is none."""
        lost = self.lost[precision]
        # In IEEE arithmetic a unit rarely lies within rounding of its kink; in bf16 and tf32 one does in most draws
        # of a small network, in one program here and in the other there.
        over_draws = _median if precision == "ieee" else _upper_quartile
        forward = over_draws([draw.reference[key] / scale for draw, scale in zip(lost, scales, strict=True)])
        if kind == "nothing":  # nothing has reached this layer: any program gives zero
            backpropagation = 0.0
        elif key[1] == "belief":
            backpropagation = _median([draw.forward for draw in lost])
        else:
            everywhere = set.intersection(*(set(draw.gradients) for draw in lost))
            backpropagation = max(
                (_median([draw.gradients[k] for draw in lost]) for k in everywhere), default=0.0
            )
        if not (math.isfinite(forward) and math.isfinite(backpropagation)):
            return math.nan
        noise = median(truth.noise[key] / scale for truth, scale in zip(self.truths, scales, strict=True))
        return accuracy.same_precision_bound(backpropagation, forward) + noise

    def _note_limits(self, rows: list[Row]) -> None:
        """What the bounds cannot say."""
        growth = max(truth.growth for truth in self.truths)
        if growth > RUNAWAY:
            self.notes.append(
                f"the relaxation runs away (an error grew to {growth:.0f} times the gradient): rounding grows with "
                "it, and a row that is out says little; try a smaller step_size"
            )
        out = any(not row.ok and row.precision != "fp64" for row in rows)
        if out and self.method == "strict" and self.network.opaque:
            names = ", ".join(dict.fromkeys(op.name for op in self.network.opaque))
            self.notes.append(
                f"pcfast does not know {names}: a backend has to subtract nearly equal outputs of such modules, "
                "which costs digits in strict relaxation; float64 is right, as are modules that it knows"
            )
        vacuous = [row for row in rows if row.relative_to != "nothing" and row.bound >= 1]
        for precision in dict.fromkeys(row.precision for row in vacuous):
            layers = sorted({row.layer for row in vacuous if row.precision == precision})
            self.notes.append(
                f"bounds of 1 and more in {precision}, layer {', '.join(map(str, layers))}: backpropagation or the "
                "forward pass loses every digit there, so such rows say nothing"
            )
