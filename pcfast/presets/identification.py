"""Which program's settings a recorded training step agrees with: every preset is tried on it."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..autograd import pc_loss
from ..errors import ArgumentError, ArgumentTypeError, PcfastError, ShapeError
from ..incremental import incremental_step
from ..model.describe import describe
from ..model.grouping import FORMS, flattened, group_layers
from ..problem import belief_optimizers, validation
from ..problem import nudging as nudges
from ..problem.belief_optimizers import BeliefOptimizer
from ..problem.nudging import Nudging
from ..problem.settings import Precisions
from . import settings as presets
from .settings import PRESETS, Preset

#: Updates of the same program are alike up to rounding, by dtype of what was recorded.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 1e-2  # of lower precisions
_SMALL = 1e-3  # an array under this part of the largest counts as that large
#: Variants of a preset that no setting of the caller's tells apart.
_VARIANTS = {
    "torch2pc": [{"method": method} for method in ("strict", "fixed_prediction", "exact")],
    "pcx": [{"reduction": name} for name in ("sum_beliefs_mean_weights", "mean", "sum")],
    "deepity": [{"start": start} for start in ("zeros", "projection")],
}


@dataclass(frozen=True)
class Match:
    """How the updates of a preset compare with the recorded ones.

    Attributes:
        preset: its name, with the arguments that tell its variants apart: ``pcx(reduction='mean')``.
        loss: "mse" (0.5 |.|^2) or "cross_entropy", summed; for "torch2pc" torch's own, "mean mse", "sum mse", ...
        layers: where beliefs sit: "as given", or a form of :func:`pcfast.group_layers` or "each module" where the
            model was nested otherwise.
        difference: the worst relative difference of a parameter's update; inf where the relaxation diverges.
        meets: it is no more than rounding.
        factor: what the preset's updates have to be multiplied by to come nearest to the recorded ones; negative
            where those have the other sign.
        after_factor: the difference that is left then.
        settings: keyword arguments of :func:`pcfast.pc_loss` or :func:`pcfast.incremental_step` that gave it.
        only_output: of an incremental program the first gradients alone were compared. They are at the forward pass,
            where only the last layer has any: loss and reduction are compared, nothing of the relaxation.
    """

    preset: str
    loss: str
    layers: str
    difference: float
    meets: bool
    factor: float
    after_factor: float
    settings: dict
    only_output: bool = False

    @property
    def same_but_for_a_factor(self) -> bool:
        """The updates meet the record when they are multiplied by :attr:`factor`."""
        scaled = math.isfinite(self.factor) and self.factor != 0
        return scaled and not self.meets and self.after_factor <= min(self.difference, _COARSE) * 1e-3

    def __str__(self) -> str:
        text = f"{self.preset}, {self.loss}, layers {self.layers}: {self.difference:.1e} off"
        if self.meets or not math.isfinite(self.factor):
            return text
        return f"{text}, {self.after_factor:.1e} when multiplied by {self.factor:.4g}"


def difference(result: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The worst |found - expected| / |expected| of arrays; one under 1e-3 of the largest counts as that large.

    inf where a difference is not finite.
    """
    sizes = {name: float(value.double().norm()) for name, value in expected.items()}
    least = _SMALL * max(sizes.values(), default=0.0) or 1.0
    off = [float((result[n].double() - expected[n].double()).norm()) / max(sizes[n], least) for n in expected]
    return max(off, default=0.0) if all(map(math.isfinite, off)) else math.inf


def identify(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    updates: Mapping[str, Tensor] | Sequence[Tensor],
    *,
    step_size: float | Sequence[float],
    num_steps: int,
    loss: str | None = None,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
    precision: Precisions | None = None,
    vinit: list[Tensor | None] | float | None = None,
    last_updates: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
) -> list[Match]:
    """Try every preset on one recorded training step; which program computed it, and how far off the others are.

    Everything runs in float64 on the CPU; ``model`` stays as it is. Beliefs are put where the model has them, and
    where :func:`pcfast.group_layers` puts them.

    Args:
        model: with the weights of before the step.
        x, y: the batch; y as the loss takes it.
        updates: the gradients that the program handed to its weight optimiser (of an incremental program the first
            ones), by parameter name, or of all that require a gradient in the order of ``model.parameters()``. What
            is not there is not compared.
        step_size, num_steps: the program's own, of its belief optimiser and its T.
        loss: "mse" (0.5 |.|^2) or "cross_entropy"; None tries those that take y.
        belief_optimizer, nudging, precision, vinit: the program's, as for :func:`pcfast.pc_loss`; v_0..v_L of the
            network as the program has it, which need not be ``model``'s nesting.
        last_updates, optimizer: of an incremental program the gradients of the call's last iteration, and what makes
            its weight optimiser from the parameters: only they tell about its relaxation.

    Returns:
        One match for each preset, loss and place of the beliefs: those that meet the record, those that do but for a
        factor, then by distance.

    Raises:
        ArgumentError and its kinds: also where no loss takes x, y and the model's output.
    """
    describe(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    recorded = _by_name("updates", updates, named)
    last = None if last_updates is None else _by_name("last_updates", last_updates, named)
    if (last is None) != (optimizer is None):
        raise ArgumentError(
            "last_updates", "one of it and optimizer", "both, of an incremental program, or neither"
        )
    x, y = _checked("x", x), _checked("y", y)
    if isinstance(vinit, list | tuple):
        vinit = [None if v is None else _checked(f"vinit[{index}]", v) for index, v in enumerate(vinit)]
    belief_optimizers.checked(belief_optimizer, "strict")
    double = copy.deepcopy(model).double().cpu()
    names = {id(p): name for name, p in double.named_parameters()}
    kinds = _losses(double, x, y, loss)
    nudges.check(nudging, "strict", None)
    tolerance = TOLERANCES.get(next(iter(recorded.values())).dtype, _COARSE)
    matches = []
    for layers, form in _forms(double):
        if isinstance(precision, list | tuple) and len(precision) != len(form):
            continue  # precisions of another nesting
        given = {"belief_optimizer": belief_optimizer, "nudging": nudging, "precision": precision}
        for name, kind, preset in _candidates(kinds, step_size, num_steps, given, vinit):
            settings = dict(preset)
            incremental = preset.method == "incremental"
            if last is not None and not incremental:
                continue
            if vinit is not None and not incremental:
                settings["vinit"] = vinit
            expected = recorded
            if incremental and last is not None:
                expected = {**recorded, **{f"last {key}": value for key, value in last.items()}}
            result = _updates(form, x, y, settings, names, optimizer)
            if result is None:
                continue
            shown = {key: result.get(key, torch.zeros(())).double() for key in expected}
            factor = _factor(shown, expected)
            off = difference(shown, expected)
            scaled = difference({key: factor * value for key, value in shown.items()}, expected)
            only_output = incremental and last is None
            matches.append(
                Match(name, kind, layers, off, off <= tolerance, factor, scaled, settings, only_output)
            )
    return sorted(matches, key=_order)


def _order(match: Match) -> tuple:
    """Those that meet the record, those that do but for a factor, the one nearest to 1 first, then by distance."""
    if match.meets:
        return 0, match.only_output, 0.0
    if match.same_but_for_a_factor:
        return 1, match.only_output, abs(math.log(abs(match.factor)))
    return 2, False, match.difference


def _checked(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU: float64, or int64 for whole numbers."""
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(name, f"a {type(tensor).__name__}", "a tensor", "torch.from_numpy(array).")
    if not tensor.isfinite().all():
        raise ArgumentError(name, "NaN or infinity", "finite values")
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor.long()


def _losses(model: nn.Sequential, x: Tensor, y: Tensor, loss: str | None) -> tuple[str, ...]:
    """The losses that take ``y`` and the model's output; what is wrong where none does."""
    if loss is not None and (not isinstance(loss, str) or loss not in presets.LOSSES):
        raise ArgumentError("loss", repr(loss), f"one of {sorted(presets.LOSSES)}, or None")
    kinds = (loss,) if loss else ("mse", "cross_entropy") if y.is_floating_point() else ("cross_entropy",)
    taken, refused = [], None
    for kind in kinds:
        try:
            with torch.no_grad():
                pc_loss(model, x, y, loss=presets.LOSSES[kind], method="exact", backend="eager")
            taken.append(kind)
        except PcfastError as error:
            refused = refused or error
    if not taken:
        raise refused
    return tuple(taken)


def _by_name(argument: str, updates, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if not isinstance(updates, Mapping):
        updates = list(updates)
        if len(updates) != len(named):
            raise ArgumentError(
                argument, f"{len(updates)} tensors", f"{len(named)}, one for each parameter of the model"
            )
        updates = dict(zip(named, updates, strict=True))
    recorded = {name: update for name, update in updates.items() if update is not None}
    if not recorded:
        raise ArgumentError(argument, "none", "at least one parameter's")
    for name, update in recorded.items():
        if name not in named:
            raise ArgumentError(
                argument, f"one of {name!r}", f"names of the model's parameters: {', '.join(named)}"
            )
        if not isinstance(update, Tensor):
            raise ArgumentTypeError(f"{argument}[{name!r}]", f"a {type(update).__name__}", "a tensor")
        if update.shape != named[name].shape:
            shapes = tuple(update.shape), tuple(named[name].shape)
            raise ShapeError(
                f"{argument}[{name!r}]", f"shape {shapes[0]}", f"the parameter's shape {shapes[1]}"
            )
        if not update.isfinite().all():
            raise ArgumentError(f"{argument}[{name!r}]", "NaN or infinity", "finite values")
    if not any(update.any() for update in recorded.values()):
        raise ArgumentError(argument, "zeros alone", "gradients of a step that moves something")
    return {name: update.detach().cpu() for name, update in recorded.items()}


def _forms(model: nn.Sequential) -> Iterator[tuple[str, nn.Sequential]]:
    """The model as it is, and with its modules nested in the other ways; each once."""
    flat = flattened(model)
    seen = []
    for words, form in (
        ("as given", model),
        *((f"beliefs={beliefs!r}", group_layers(flat, beliefs=beliefs)) for beliefs in FORMS),
        ("each module", flat),
    ):
        nested = [[id(module) for module in flattened(nn.Sequential(layer))] for layer in form]
        if nested not in seen:
            seen.append(nested)
            yield words, form


def _candidates(kinds, step_size, num_steps, given: dict, vinit) -> Iterator[tuple[str, str, Preset]]:
    """(name with its variant, loss, preset), of presets that know everything ``given``."""
    given = {name: value for name, value in given.items() if value is not None}
    validation.checked_step_sizes(step_size, validation.checked_steps(num_steps))
    for name, program in PRESETS.items():
        if not set(given) <= set(inspect.signature(program).parameters):
            continue
        variants = _VARIANTS.get(name, [{}])
        if vinit is not None and name == "deepity":  # which start it is then makes no difference
            variants = variants[:1]
        for variant in variants:
            for kind in kinds:
                losses = {kind: kind}
                if name == "torch2pc":
                    losses = {f"mean {kind}": kind, f"sum {kind}": _sum_of(kind)}
                for words, value in losses.items():
                    try:
                        preset = program(
                            step_size=step_size, num_steps=num_steps, loss=value, **variant, **given
                        )
                    except ArgumentError:  # e.g. no iterations, which the program cannot have
                        continue
                    shown = ", ".join(f"{key}={v!r}" for key, v in variant.items())
                    yield (f"{name}({shown})" if shown else name), words, preset


def _sum_of(kind: str):
    """Torch's own sum: without the half that the energies of other programs have."""
    return nn.MSELoss(reduction="sum") if kind == "mse" else nn.CrossEntropyLoss(reduction="sum")


def _updates(model, x, y, settings: dict, names: dict[int, str], make) -> dict[str, Tensor] | None:
    """What a training step with ``settings`` hands to the weight optimiser, by name; None where the start fits not.

    Of an incremental one the first iteration's, and the last's as "last NAME" where ``make`` makes its optimiser.
    """
    model.zero_grad(set_to_none=True)
    try:
        if settings["method"] == "incremental":
            return _incremental_updates(model, x, y, settings, names, make)
        pc_loss(model, x, y, backend="eager", check="off", **settings).backward()
    except PcfastError as error:
        if str(getattr(error, "argument", "")).startswith(("vinit", "nudging")):
            return None  # beliefs of another nesting; a nudged loss that is no squared error
        raise
    return {names[id(p)]: p.grad for p in model.parameters() if p.grad is not None}


def _incremental_updates(model, x, y, settings: dict, names: dict[int, str], make) -> dict[str, Tensor]:
    kept = copy.deepcopy(model.state_dict())
    seen: list[dict[str, Tensor]] = []
    optimizer = (make or functools.partial(torch.optim.SGD, lr=0.0))(model.parameters())
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            {names[id(p)]: p.grad.clone() for p in model.parameters() if p.grad is not None}
        )
    )
    incremental_step(model, x, y, optimizer, backend="eager", check="off", **settings)
    model.load_state_dict(kept)
    first, last = (seen[0], seen[-1]) if seen else ({}, {})
    return {**first, **({} if make is None else {f"last {name}": value for name, value in last.items()})}


def _factor(result: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """a that minimises the sum of |a found - expected|^2."""
    products = [((result[n] * expected[n].double()).sum(), (result[n] * result[n]).sum()) for n in expected]
    above, below = (float(sum(column)) for column in zip(*products, strict=True))
    return above / below if below else math.nan
