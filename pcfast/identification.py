"""Which program's settings a recorded training step agrees with: every preset is tried on it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import presets, validation
from .autograd import pc_loss
from .belief_optimizers import BeliefOptimizer
from .errors import ArgumentError, ArgumentTypeError, PcfastError, ShapeError
from .grouping import FORMS, flattened, group_layers
from .incremental import incremental_step
from .nudging import Nudging
from .presets import PRESETS, Preset

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
        loss: "mse" or "cross_entropy"; for "torch2pc" with "mean " or "sum " before it.
        layers: where beliefs sit: "as given", or a form of :func:`pcfast.group_layers` or "each module" where the
            model was nested otherwise.
        difference: the worst relative difference of a parameter's update; inf where the relaxation diverges.
        meets: it is no more than rounding.
        factor: what the preset's updates have to be multiplied by to come nearest to the recorded ones; negative
            where those have the other sign.
        settings: keyword arguments of :func:`pcfast.pc_loss` or :func:`pcfast.incremental_step`.
    """

    preset: str
    loss: str
    layers: str
    difference: float
    meets: bool
    factor: float
    settings: Preset

    def __str__(self) -> str:
        text = f"{self.preset}, {self.loss}, layers {self.layers}: {self.difference:.1e} off"
        return (
            text if self.meets or not math.isfinite(self.factor) else f"{text}, best times {self.factor:.4g}"
        )


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The worst |found - expected| / |expected| of arrays; one under 1e-3 of the largest counts as that large."""
    sizes = {name: float(value.double().norm()) for name, value in expected.items()}
    least = _SMALL * max(sizes.values(), default=0.0) or 1.0
    return max(
        (float((found[n].double() - expected[n].double()).norm()) / max(sizes[n], least) for n in expected),
        default=0.0,
    )


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
    vinit: list[Tensor | None] | float | None = None,
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
        belief_optimizer, nudging, vinit: the program's, as for :func:`pcfast.pc_loss`.

    Returns:
        One match for each preset, loss and place of the beliefs: those that meet the record first, then by distance.

    Raises:
        ArgumentError and its kinds.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    recorded = _by_name(updates, named)
    dtype = next(iter(recorded.values())).dtype
    tolerance = TOLERANCES.get(dtype, _COARSE)
    double = copy.deepcopy(model).double().cpu()
    names = {id(p): name for name, p in double.named_parameters()}
    x, y = (t.detach().cpu().double() if t.is_floating_point() else t.detach().cpu() for t in (x, y))
    matches = []
    for layers, form in _forms(double):
        for name, kind, preset in _candidates(y, step_size, num_steps, loss, belief_optimizer, nudging):
            settings = dict(preset)
            if vinit is not None and preset.method == "strict":
                settings["vinit"] = vinit
            found = _updates(form, x, y, settings, names)
            if found is None:
                continue
            shown = {key: found.get(key, torch.zeros(())) for key in recorded}
            off = difference(shown, recorded) if all(v.isfinite().all() for v in shown.values()) else math.inf
            matches.append(Match(name, kind, layers, off, off <= tolerance, _factor(shown, recorded), preset))
    return sorted(matches, key=lambda match: (not match.meets, 0.0 if match.meets else match.difference))


def _by_name(updates, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if not isinstance(updates, Mapping):
        updates = list(updates)
        if len(updates) != len(named):
            raise ArgumentError(
                "updates", f"{len(updates)} tensors", f"{len(named)}, one for each parameter of the model"
            )
        updates = dict(zip(named, updates, strict=True))
    recorded = {name: update for name, update in updates.items() if update is not None}
    if not recorded:
        raise ArgumentError("updates", "none", "at least one parameter's")
    for name, update in recorded.items():
        if name not in named:
            raise ArgumentError(
                "updates", f"one of {name!r}", f"names of the model's parameters: {', '.join(named)}"
            )
        if not isinstance(update, Tensor):
            raise ArgumentTypeError(f"updates[{name!r}]", f"a {type(update).__name__}", "a tensor")
        if update.shape != named[name].shape:
            shapes = tuple(update.shape), tuple(named[name].shape)
            raise ShapeError(f"updates[{name!r}]", f"shape {shapes[0]}", f"the parameter's shape {shapes[1]}")
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


def _candidates(
    y, step_size, num_steps, loss, belief_optimizer, nudging
) -> Iterator[tuple[str, str, Preset]]:
    """(name with its variant, loss, preset)."""
    given = {"belief_optimizer": belief_optimizer, "nudging": nudging}
    given = {name: value for name, value in given.items() if value is not None}
    kinds = ("mse", "cross_entropy") if y.is_floating_point() else ("cross_entropy",)
    if loss is not None:
        if loss not in presets.LOSSES:
            raise ArgumentError("loss", repr(loss), f"one of {sorted(presets.LOSSES)}, or None")
        kinds = (loss,)
    validation.checked_step_sizes(step_size, validation.checked_steps(num_steps))
    for name, program in PRESETS.items():
        if not set(given) <= set(inspect.signature(program).parameters):
            continue
        for variant in _VARIANTS.get(name, [{}]):
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


def _updates(model, x, y, settings: dict, names: dict[int, str]) -> dict[str, Tensor] | None:
    """What a training step with ``settings`` hands to the weight optimiser, by name; None where it does not run."""
    model.zero_grad(set_to_none=True)
    try:
        if settings["method"] == "incremental":
            return _first_updates(model, x, y, settings, names)
        pc_loss(model, x, y, backend="eager", check="off", **settings).backward()
    except PcfastError:
        return None
    return {names[id(p)]: p.grad for p in model.parameters() if p.grad is not None}


def _first_updates(model, x, y, settings: dict, names: dict[int, str]) -> dict[str, Tensor]:
    """Of the first iteration, after which nothing moves: the learning rate is zero."""
    first: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def keep(*_):
        if not first:
            first.update({names[id(p)]: p.grad.clone() for p in model.parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    incremental_step(model, x, y, optimizer, backend="eager", check="off", **settings)
    return first


def _factor(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """a that minimises the sum of |a found - expected|^2."""
    products = [((found[n] * expected[n]).sum(), (found[n] * found[n]).sum()) for n in expected]
    above, below = (float(sum(column)) for column in zip(*products, strict=True))
    return above / below if below else math.nan
