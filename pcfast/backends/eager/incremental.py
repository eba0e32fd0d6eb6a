"""Incremental predictive coding in deviation form (docs/methods.md; Salvatori et al., iPC).

Beliefs and parameters move in every iteration, so predictions move for two reasons. All are kept as deviations from
the forward pass with the parameters of then, theta(0):

    d_l = v_l - vhat_l      eps_l = [f_l(vhat_{l-1} + d_{l-1}; theta) - f_l(vhat_{l-1}; theta(0))] - d_l

The difference in brackets is formed without subtracting nearly equal numbers: for an affine map it is
W d + (W - W(0)) vhat + (b - b(0)), then as in strict relaxation (deviation form, docs/method.md fact 8).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...deviation import Chain
from ...problem import status
from ...problem.belief_optimizers import PLAIN, BeliefOptimizer
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem
from ..divergence import Checks, check_iteration
from ..forward import Chains, ForwardPass, forward_pass
from .links import Link


def incremental(problem: Problem, plan: Plan, chains: Chains) -> Outcome:
    """Iterate; the outcome's gradients and status are those of the last iteration."""
    forward = forward_pass(problem, plan, chains)
    checks, out = Checks(problem, forward), forward.outcome(plan)
    if not checks.deferred or plan.num_steps == 0:
        checks.finish(out, [])
    if plan.num_steps == 0:
        forward.update_statistics(problem, out)
    moving = Moving(chains, forward.vhat, forward.output_gradient, plan.belief_optimizer)
    for t in range(1, plan.num_steps + 1):
        if t > 1:
            moving.evaluate(forward.gradient_at)
        out.gradients, out.owners = {}, []
        forward.add_updates(out, moving.errors)
        if t < plan.num_steps:
            moving.descend(problem.step_size_at(t), t)
        result = [(l, e) for l, e in enumerate(moving.errors) if e is not None]
        result += out.updates_by_layer()
        if checks.deferred:
            _defer(problem, forward, checks, out, t, result)
        elif problem.check:
            check_iteration(t, result, problem.step_size)
        if t == 1:
            forward.update_statistics(problem, out)
        problem.move(out.gradients)
    return out


def _defer(
    problem: Problem,
    forward: ForwardPass,
    checks: Checks,
    out: Outcome,
    iteration: int,
    result: list[tuple[int, Tensor]],
) -> None:
    """Zero this iteration's updates where it, or the forward pass, is not finite; leave word of it."""
    if out.status is not None:  # of the iteration before
        status.defer(out.status, problem.step_size)
    builder = status.StatusBuilder()
    builder.begin(problem.x, forward.vhat[1:], forward.loss_values)
    checks.defer(out, builder, result, iteration)


class Moving:
    """Beliefs over layers whose parameters move too.

    Attributes:
        errors: eps_l of the last :meth:`evaluate`, l = 1..L by index; None where zero.
    """

    def __init__(
        self,
        chains: list[Chain],
        vhat: list[Tensor],
        output_error: Tensor,
        optimizer: BeliefOptimizer = PLAIN,
    ) -> None:
        """``chains``: of layers 1..L by index, at the forward pass ``vhat``; ``output_error``: eps_L there."""
        self._chains, self._vhat, self._depth, self._optimizer = chains, vhat, len(vhat) - 1, optimizer
        # index l couples v_l to layer l+1
        self._links = [
            None,
            *(Link(c, v, None, optimizer) for c, v in zip(chains[2:], vhat[1:], strict=False)),
        ]
        self.errors: list[Tensor | None] = [None] * self._depth + [output_error]
        for chain in chains[1:]:
            chain.snapshot_params()

    def evaluate(self, gradient_at: Callable[[Tensor], Tensor]) -> None:
        """The errors at the beliefs and parameters of now; every chain is then at that point."""
        moved: list[Tensor | None] = [None]  # mu_l - vhat_l; None where zero
        for chain, below in zip(self._chains[1:], self._links, strict=True):
            chain.refresh()
            moved.append(below.predict() if below is not None and below.moved else chain.param_shift())
        for l in range(1, self._depth):
            self.errors[l] = self._links[l].error(moved[l], owned=self._chains[l].owned)
        output = self._vhat[-1]
        self.errors[-1] = gradient_at(output if moved[-1] is None else output + moved[-1])

    def descend(self, eta: float, iteration: int) -> None:
        """Every belief moves down its gradient, all from the last :meth:`evaluate`; ``iteration`` = 1, 2, ..."""
        for l in range(1, self._depth):
            error, above = self.errors[l], self.errors[l + 1]
            if error is None and above is None and self._optimizer.rests:
                continue  # no error has come this far yet
            self._links[l].descend(error, above, eta, iteration)
