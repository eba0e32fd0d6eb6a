"""Error-based predictive coding on a graph in deviation form (docs/graphs.md; Goemaere et al., ePC).

The errors of the free nodes are the variables; their values follow, v_k = f_k(v of its inputs) - eps_k. They descend

    E = sum over free k of pi_k |eps_k|^2 / 2 + sum over clamped c of pi_c |mu_c - v_c|^2 / 2 + losses
    eps_k += eta_k (lambda_k - pi_k eps_k),     lambda_k = sum over children c of J_ck^T lambda_c

with lambda_c = pi_c (mu_c - v_c) where c is clamped, and the loss's gradient where a loss is taken. A root without a
prior has no error in the energy: pi = 0, and its value is its start minus eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.divergence import Checks, Observe
from ..deviation import difference
from .forward import GraphForward, forward_pass
from .problem import GraphOutcome, GraphPlan, GraphProblem, weighted


def error_based(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    """One relaxation of the errors."""
    forward = forward_pass(problem, plan, nodes)
    checks, out = Checks(problem, forward), forward.outcome(problem)
    free = _FreeErrors(problem, forward)
    free.run(checks.observe)
    free.evaluate()
    if problem.wanted.gradients:
        forward.add_updates(out, free.pulled())
    if problem.wanted.states:
        out.beliefs = [v.clone() if d is None else v + d for v, d in zip(forward.values, free.d, strict=True)]
        out.errors = forward.filled(free.all_errors())
    if problem.wanted.energies:
        out.energies = forward.stacked(free.energies)
    results = [
        (k + 1, t) for state in (free.d, free.all_errors()) for k, t in enumerate(state) if t is not None
    ]
    out.settled = free.outputs
    checks.finish(out, results, lambda: free.locate(checks.raise_where_bad))
    forward.update_statistics(out)
    return out


class _FreeErrors:
    """The errors, and the values that they leave.

    Attributes:
        d: of every node v - its value at the start, of the last :meth:`evaluate`; None where zero.
        outputs: predictions that losses are taken at, likewise, by node.
    """

    def __init__(self, problem: GraphProblem, forward: GraphForward) -> None:
        self._problem, self._forward, self._nodes = problem, forward, forward.nodes
        self._free = problem.free
        self._reset()

    def _reset(self) -> None:
        count = len(self._nodes)
        # what every free node's error differs by from that at the start, which base_errors has
        self._changes: dict[int, Tensor] = {}
        self._clamped: dict[int, Tensor] = {}  # mu - v of clamped nodes
        self._signals: dict[int, Tensor] = {}  # lambda of clamped nodes and of losses
        self.outputs: dict[int, Tensor] = {}
        self.d: list[Tensor | None] = [None] * count
        self.energies: list[Tensor] = []

    def evaluate(self) -> None:
        """The values that the errors leave; every node is then at that point."""
        forward, problem = self._forward, self._problem
        for k, node in enumerate(self._nodes):
            moved = None if node is None else node.deviate([self.d[i] for i in problem.spec.nodes[k].inputs])
            if k in problem.clamped:
                if node is not None:
                    base = forward.base_errors[k]
                    self._clamped[k] = base if moved is None else base + moved
                    self._signals[k] = weighted(self._clamped[k], problem.weights[k])
            elif k in problem.losses:
                self.outputs[k] = forward.values[k] if moved is None else forward.values[k] + moved
                gradient = forward.targets[k].gradient_at(self.outputs[k])
                self._signals[k] = weighted(gradient, problem.weights[k])
            else:
                self.d[k] = difference(moved, self._changes.get(k), owned=node is not None and node.owned)

    def all_errors(self) -> list[Tensor | None]:
        """eps of every node, None where zero; of a loss's node its gradient."""
        result = []
        for k, base in enumerate(self._forward.base_errors):
            change = self._changes.get(k)
            if k in self._problem.losses:
                result.append(self._signals[k])
            elif k in self._problem.clamped:
                result.append(self._clamped.get(k))
            else:
                result.append(base if change is None else change if base is None else base + change)
        return result

    def pulled(self) -> list[Tensor | None]:
        """The errors weighted by precision, as the weights' updates take them."""
        return [
            self._signals[k] if k in self._signals else weighted(e, self._problem.weights[k])
            for k, e in enumerate(self.all_errors())
        ]

    def run(self, observe: Observe | None) -> None:
        problem = self._problem
        for t in range(1, problem.num_steps + 1):
            self.evaluate()
            if problem.wanted.energies:
                self.energies.append(
                    self._forward.energy_row(
                        self.all_errors(), self._forward.losses_at(self.outputs), problem.weights
                    )
                )
            self._descend(t)
            if observe is not None:
                observe(
                    t,
                    {k + 1: e for k, e in self._changes.items()}
                    | {k + 1: s for k, s in self._signals.items()},
                )

    def _descend(self, iteration: int) -> None:
        problem = self._problem
        lambdas: list[Tensor | None] = [self._signals.get(k) for k in range(len(self._nodes))]
        for k in range(len(self._nodes) - 1, -1, -1):
            node, inputs = self._nodes[k], problem.spec.nodes[k].inputs
            # All nodes that read k come behind it: its signal is complete, and nothing reads it after this turn.
            signal, lambdas[k] = lambdas[k], None
            if k in self._free:
                self._move(k, signal, problem.step_size_at(k, iteration))
            if signal is not None and node is not None:
                wanted = [i not in problem.clamped for i in inputs]
                _, below = node.differentiate(signal, wanted, need_gradients=False)
                for i, e in zip(inputs, below, strict=True):
                    if e is not None:
                        lambdas[i] = e if lambdas[i] is None else lambdas[i] + e

    def _move(self, k: int, signal: Tensor | None, eta: float) -> None:
        """eps_k += eta (signal - pi_k eps_k), a signal of None being zero."""
        change, base, weight = self._changes.get(k), self._forward.base_errors[k], self._problem.weights[k]
        if self._nodes[k] is None:
            base, weight = None, 0.0
        if None not in (change, signal) and isinstance(weight, float) and weight == 1.0:
            change.lerp_(signal, eta)
        else:
            if change is not None:
                change.mul_(1 - eta * weight)
            if signal is not None:
                change = signal * eta if change is None else change.add_(signal, alpha=eta)
        if base is not None:
            pull = weighted(base, weight) * -eta
            change = pull if change is None else change.add_(pull)
        if change is not None:
            self._changes[k] = change

    def locate(self, raise_where_bad: Observe) -> None:
        """Relax once more, and raise where values first were not finite."""
        self._reset()
        for node, spec in zip(self._nodes, self._problem.spec.nodes, strict=True):
            if node is not None:
                node.deviate([torch.zeros_like(self._forward.values[i]) for i in spec.inputs])
        self.run(raise_where_bad)
