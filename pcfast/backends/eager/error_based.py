"""Error-based predictive coding in deviation form (docs/methods.md; Goemaere et al., ePC).

The errors eps_1..eps_{L-1} are the free variables. The perturbed network v_l = f_l(v_{l-1}) - eps_l is kept as
d_l = v_l - vhat_l = (mu_l - vhat_l) - eps_l, so that nothing nearly equal is subtracted (deviation form,
docs/method.md fact 8); mu_1 never moves (clamped input, fact 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...deviation import Chain, difference
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, energy_row
from ..divergence import Checks, Observe
from ..forward import Chains, ForwardPass, forward_pass


def error_based(problem: Problem, plan: Plan, chains: Chains) -> Outcome:
    """One relaxation of the errors."""
    forward = forward_pass(problem, plan, chains)
    checks, out = Checks(problem, forward), forward.outcome(plan)
    energies: list[Tensor] = []
    free = _relax(problem, plan, forward, energies, checks.observe)
    results = [(l, v) for result in (free.d, free.errors) for l, v in enumerate(result) if v is not None]
    if plan.wanted.gradients:
        forward.add_updates(out, free.errors)
    if plan.wanted.states:
        pairs = zip(forward.vhat, free.d, strict=True)
        out.beliefs = [v.clone() if d is None else v + d for v, d in pairs]
        out.errors = forward.filled(free.errors)
    out.record(plan.wanted, plan.depth, energies, [])
    checks.finish(out, results, lambda: _locate(problem, plan, forward, checks))
    forward.update_statistics(problem, out)
    return out


def _relax(
    problem: Problem, plan: Plan, forward: ForwardPass, energies: list[Tensor], observe: Observe | None
) -> FreeErrors:
    """Run the iterations; chains must be at the forward pass. ``energies`` gets a row an iteration."""
    free = FreeErrors(forward.chains, forward.vhat)
    for t in range(1, plan.num_steps + 1):
        output = free.output()
        if plan.wanted.energies:
            energies.append(energy_row(free.errors, forward.loss_at(output)))
        free.descend(forward.gradient_at(output), problem.step_size_at(t))
        if observe is not None:
            observe(t, {**dict(enumerate(free.errors[1:-1], start=1)), plan.depth: output})
    free.errors[plan.depth] = forward.gradient_at(free.output())
    return free


def _locate(problem: Problem, plan: Plan, forward: ForwardPass, checks: Checks) -> None:
    """Relax once more, and raise where values first were not finite."""
    for chain, v in zip(forward.chains[2:], forward.vhat[1:], strict=False):
        chain.deviate(torch.zeros_like(v))
    _relax(problem, plan, forward, [], checks.raise_where_bad)


class FreeErrors:
    """The errors, and the states that they leave.

    Attributes:
        errors: eps_l, l = 0..L; None where zero or not set. eps_L is no free variable: the caller sets it.
        d: v_l - vhat_l of the last :meth:`output`; None where zero, and for the output.
    """

    def __init__(self, chains: list[Chain], vhat: list[Tensor]) -> None:
        """``chains``: of layers 1..L by index, at the forward pass ``vhat``."""
        self._chains, self._vhat, self._depth = chains, vhat, len(vhat) - 1
        self.errors: list[Tensor | None] = [None] * (self._depth + 1)
        self.d: list[Tensor | None] = [None] * (self._depth + 1)

    def output(self) -> Tensor:
        """mu_L of the perturbed network; every chain is then at its state."""
        moved: Tensor | None = None  # mu_l - vhat_l
        for l in range(1, self._depth):
            error = self.errors[l]
            if error is None:  # so are all others: the forward pass
                break
            self.d[l] = difference(moved, error, owned=self._chains[l].owned)
            moved = self._chains[l + 1].deviate(self.d[l])
        return self._vhat[-1] if moved is None else self._vhat[-1] + moved

    def descend(self, signal: Tensor, eta: float) -> None:
        """eps_l += eta (lambda_l - eps_l) for l = L-1..1, lambda_l = J_{l+1}(v_l)^T lambda_{l+1}.

        ``signal``: lambda_L = dLoss/dmu_L at the last :meth:`output`.
        """
        for l in range(self._depth - 1, 0, -1):
            signal = self._chains[l + 1].pullback(signal)
            error = self.errors[l]
            if error is None:
                self.errors[l] = signal * eta
            else:
                error.mul_(1 - eta).add_(signal, alpha=eta)
