"""A kernel backend in float32 against the literal loop in float64."""

from __future__ import annotations

import copy

import torch

import pcfast
from pcfast.checking.bounds import relative_error
from pcfast.checking.copies import loss_in
from pcfast.precision import use_precision

__all__ = [
    "MOVING",
    "assert_bfloat16_loses_what_eager_does",
    "assert_close_to_float64",
    "in_double",
    "updates",
]


def waning(num_steps: int) -> tuple[float, ...]:
    """Step sizes, no two alike: one that is read an iteration early or late shows."""
    return tuple(0.3 * 0.8**t for t in range(num_steps))


#: How beliefs move -> the settings that say so, given the number of iterations.
MOVING = {
    "momentum": lambda n: {"belief_optimizer": pcfast.GradientDescent(0.9)},
    "schedule": lambda n: {"step_size": waning(n)},
    "both": lambda n: {"belief_optimizer": pcfast.GradientDescent(0.5), "step_size": waning(n)},
}


def in_double(model, *tensors):
    return copy.deepcopy(model).double(), *(t.double() if t.is_floating_point() else t for t in tensors)


def updates(model, x, y, **arguments) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **arguments).backward()
    return [p.grad.clone() for p in model.parameters()]


def assert_close_to_float64(
    model, x, y, backend: str, bound=3e-6, loss="cross_entropy", vinit=None, **arguments
) -> None:
    """Errors, beliefs and updates of a backend against the literal loop in float64, and that it ran."""
    double = in_double(model, x, y)
    wide = dict(
        arguments,
        backend="reference",
        loss=loss_in(loss, x.device, torch.float64),
        vinit=vinit and [v if v is None else v.double() for v in vinit],
    )
    arguments = dict(arguments, backend=backend, loss=loss, vinit=vinit)
    truth = pcfast.relax(*double, **wide)
    result = pcfast.relax(model, x, y, **arguments)
    assert result.run.plan.backend == backend
    for l in range(1, len(truth.beliefs)):
        assert relative_error(result.errors[l], truth.errors[l]) <= bound, f"eps_{l}"
        moved, really = (r.beliefs[l].double() - r.activations[l].double() for r in (result, truth))
        # beliefs are returned as vhat + d in float32: their deviation keeps what that rounding leaves
        rounding = 2**-23 * float(truth.beliefs[l].norm())
        assert float((moved - really).norm()) <= bound * float(really.norm()) + 2 * rounding, f"v_{l}"
    for p, q in zip(updates(model, x, y, **arguments), updates(*double, **wide), strict=True):
        assert relative_error(p, q) <= bound or float(q.norm()) < 1e-12


def assert_bfloat16_loses_what_eager_does(model, x, y, backend: str, **settings) -> list:
    """Updates of a backend in bfloat16, to three times what eager loses; the plans of both, which ran."""
    truth = updates(*in_double(model, x, y), backend="reference", **settings)
    lost, plans = {}, []
    with use_precision("bf16", x.device):
        for tried in ("eager", backend):
            result = updates(model, x, y, backend=tried, **settings)
            plans.append(pcfast.last_run().plan)
            assert plans[-1].backend == tried
            lost[tried] = max(map(relative_error, result, truth))
    assert 1e-4 < lost[backend] <= 3 * lost["eager"] and lost["eager"] < 0.1
    return plans
