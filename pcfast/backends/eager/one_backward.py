"""exact, fixed_prediction and zero_divergence: one forward and one backward pass for any number of iterations.

Fixed prediction's errors are the activations' gradients times one scalar a layer (closed form, docs/method.md fact
1). zero_divergence is backpropagation (proof: docs/methods.md) and runs as exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import RelaxationDiverged
from ...problem import status
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, energy_row, gradient_row
from ..divergence import Checks
from ..forward import Chains, ForwardPass, forward_pass
from .fixed_prediction import fixed_prediction_factors, scalar_chain


def one_backward(problem: Problem, plan: Plan, chains: Chains) -> Outcome:
    """The relaxation of a method without a loop."""
    depth, wanted = plan.depth, plan.wanted
    # of the errors and of the beliefs, by distance from the top; divergence is known before any tensor work
    factors, last = factors_of(problem, plan)
    forward = forward_pass(problem, plan, chains)
    checks, out = Checks(problem, forward), forward.outcome(plan)
    vhat = forward.vhat

    gradients: list[Tensor | None] = [None] * depth + [forward.output_gradient]  # g_l
    lowest = _lowest_gradient(plan, chains)
    for l in range(depth, 0, -1):
        result, g = chains[l].differentiate(
            gradients[l],
            need_input=l > lowest,
            need_gradients=wanted.gradients,
            factor=factors[depth - l],
        )
        out.add_gradients(result, l)
        gradients[l - 1] = g
        checks.see(gradient for _, gradient in result)
        if g is None:
            break
        checks.see([g])
    results = [(max(l, 1), g) for l, g in enumerate(gradients) if g is not None]
    if wanted.states:
        out.errors = [None if g is None else g * factors[depth - l] for l, g in enumerate(gradients)]
        out.beliefs = [
            v.clone() if g is None else v - g * last[depth - l]
            for l, (v, g) in enumerate(zip(vhat, gradients, strict=True))
        ]
        if plan.method != "exact":
            out.beliefs[depth] = vhat[depth].clone()  # the output is not relaxed
        results += [(max(l, 1), v) for l, v in enumerate(out.beliefs)]
        results += [(max(l, 1), e) for l, e in enumerate(out.errors) if e is not None]
    if plan.method == "fixed_prediction":
        _record(problem, plan, forward, gradients, out)
        checks.finish(out, results, lambda: _locate(problem, plan, vhat, gradients))
    else:
        checks.finish(out, results)
    forward.update_statistics(problem, out)
    return out


def factors_of(problem: Problem, plan: Plan) -> tuple:
    """What each layer's error, and its belief, counts of the loss's gradient there, by distance from the top.

    Raises:
        RelaxationDiverged: one of them exceeds the largest number.
    """
    if plan.method != "fixed_prediction":
        return ((1.0,) * (plan.depth + 1),) * 2
    limit = torch.finfo(plan.precision.state).max if problem.check else None
    lowest = 0 if plan.wanted.input_error else 1
    return fixed_prediction_factors(
        plan.depth, plan.num_steps, problem.step_size, limit, lowest, plan.belief_optimizer
    )


def _scalars(problem: Problem, plan: Plan, count: int) -> Iterator[tuple[float, ...]]:
    """The scalars c_d(t) of fixed prediction for t = 0..count-1."""
    rows = scalar_chain(plan.depth, problem.step_size, plan.belief_optimizer)
    return itertools.islice(rows, count)


def _lowest_gradient(plan: Plan, chains: Chains) -> int:
    """The lowest l whose g_l the caller's wishes need."""
    wanted = plan.wanted
    if wanted.input_error:
        return 0
    if wanted.states or wanted.energies:
        return 1
    trained = (l for l in range(1, plan.depth) if wanted.gradients and chains[l].has_gradients)
    return next(trained, plan.depth)


def _record(
    problem: Problem, plan: Plan, forward: ForwardPass, gradients: list[Tensor | None], out: Outcome
) -> None:
    """Energies, and the norms of the beliefs' gradients, of fixed prediction's iterations."""
    depth, output = plan.depth, forward.vhat[-1]
    if not plan.wanted.energies:
        return
    energies, norms = [], []
    for row in _scalars(problem, plan, plan.num_steps):
        errors = [None if g is None else g * row[depth - l] for l, g in enumerate(gradients)]
        energies.append(energy_row(errors, forward.loss))
        if plan.wanted.belief_gradients:  # J_{l+1}^T eps_{l+1} - eps_l = (c_{L-l-1} - c_{L-l}) g_l
            pulls = [
                None if g is None else g * (row[depth - l - 1] - row[depth - l])
                for l, g in enumerate(gradients[1:-1], start=1)
            ]
            norms.append(gradient_row(pulls, output))
    out.record(plan.wanted, plan.depth, energies, norms)


def _locate(problem: Problem, plan: Plan, vhat: list[Tensor], gradients: list[Tensor | None]) -> None:
    """Raise where a belief vhat_l - c g_l of fixed prediction was first not finite."""
    for t, row in enumerate(_scalars(problem, plan, plan.num_steps + 1)):
        for l, g in enumerate(gradients[:-1]):
            if g is not None and not status.all_finite([vhat[l] - g * row[plan.depth - l]]):
                raise RelaxationDiverged(t or None, max(l, 1), problem.step_size)
