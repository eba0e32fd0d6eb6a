"""exact by torch's own backward pass, where updates are all that is asked for.

Its engine is C++: small networks would spend more time in Python's steps than in their products.
"""

from __future__ import annotations

import functools

import torch

from ...model import spec as specs
from ...problem import status
from ...problem.plan import Plan
from ...problem.types import NOTHING_BUT_UPDATES, Outcome, Problem
from ...support import differentiation


@functools.lru_cache(maxsize=256)
def _is_backpropagation(plan: Plan) -> bool:
    """Whether a plan is one forward pass through modules that torch evaluates as pcfast does, and its gradient."""
    precision = plan.precision
    return (
        plan.method in ("exact", "zero_divergence")
        and plan.wanted == NOTHING_BUT_UPDATES
        and plan.device.type == "cpu"
        and plan.dtype == precision.state == precision.operand
        and precision.autocast is None
        # modules that run once a step, leave nothing behind, and draw nothing
        and not any(
            isinstance(op, specs.Opaque | specs.BatchNorm | specs.Dropout) for op in plan.network.leaves
        )
    )


def updates_by_autograd(problem: Problem, plan: Plan) -> Outcome | None:
    """The outcome; None where this is not all, or where something is amiss: :mod:`.one_backward` says what."""
    loss = problem.loss
    given = problem.activations is not None or problem.output_gradient is not None
    if given or not problem.raise_now or not _is_backpropagation(plan):
        return None
    if not loss.known or loss.normalizer is not None:
        return None
    v, values = problem.x, []
    if not isinstance(next(iter(plan.network.leaves), None), specs.Linear | specs.Conv2d):
        v = v.clone()  # an activation that works in place may come first
    with torch.enable_grad():
        for layer in problem.model._modules.values():
            v = layer(v)
            values.append(v)
        loss.check_target(tuple(v.shape), problem.y)
        try:
            value = loss.value(v, problem.y)
        except IndexError:  # a label out of range
            return None
    trained = [p for p in problem.known.parameters if p.requires_grad]
    # not by the layers' values: torch would keep those gradients, and what counts in them is in these
    gradients = differentiation.gradients(value, trained)
    with torch.no_grad():
        if any(g is None for g in gradients) or (
            problem.check and not status.all_finite([*values, value, *gradients])
        ):
            return None
    out = Outcome(value.detach(), values[-1].detach())
    out.gradients = dict(zip(trained, gradients, strict=True))
    return out
