"""Strict relaxation on a graph in deviation form, and fixed prediction's loop (docs/graphs.md).

All nodes move at once, by the errors at the beliefs before the iteration:

    d_k += eta_k (pi_k eps_k - sum over children c of J_ck^T pi_c eps_c)

An error that is None is zero, and nothing is computed of it: the active front spreads from the clamped nodes along
the shortest paths by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.divergence import Checks, Observe
from ..deviation.node import Pulls
from .beliefs import Belief
from .forward import GraphForward, forward_pass
from .problem import GraphOutcome, GraphPlan, GraphProblem, weighted


def strict(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    """One relaxation; "fixed_prediction" with predictions and Jacobians held at the start."""
    forward = forward_pass(problem, plan, nodes)
    checks, out = Checks(problem, forward), forward.outcome(problem)
    loop = Loop(problem, forward)
    errors = loop.run(checks.observe)
    if not loop.fixed:
        loop.linearize_at_final()
    pulled = [weighted(e, w) for e, w in zip(errors, loop.weights, strict=True)]
    if problem.wanted.gradients:
        forward.add_updates(out, pulled)
    if problem.wanted.states:
        out.beliefs, out.errors = loop.beliefs(), forward.filled(errors)
    if problem.wanted.energies:
        out.energies = forward.stacked(loop.energies)
    results = [(k + 1, b.d) for k, b in loop.links.items() if b.d is not None]
    results += [(k + 1, e) for k, e in enumerate(errors) if e is not None]
    out.settled = loop.outputs
    checks.finish(out, results, lambda: loop.locate(checks.raise_where_bad))
    forward.update_statistics(out)
    return out


class Loop:
    """The iterations.

    Attributes:
        links: of every free node its beliefs.
        weights: pi_k of every node; of a loss's node 1, for its gradient has it already.
        fixed: predictions and Jacobians stay at the start.
        outputs: predictions that losses are taken at, of the last errors, by node.
    """

    def __init__(self, problem: GraphProblem, forward: GraphForward) -> None:
        self._problem, self._forward = problem, forward
        self.fixed = problem.method == "fixed_prediction"
        self.weights = [1.0 if k in problem.losses else w for k, w in enumerate(problem.weights)]
        self.links: dict[int, Belief] = {}
        nodes = problem.spec.nodes
        for k in problem.free:
            value, error = forward.values[k], forward.base_errors[k]
            # a root's start is its value already
            start = problem.start_of(k, value) if nodes[k].inputs and k in problem.start else None
            self.links[k] = Belief(value, start, error, problem.optimizer)
        self._wanted = [[i in self.links for i in node.inputs] for node in nodes]
        self.outputs: dict[int, Tensor] = {}
        self.energies: list[Tensor] = []

    def moves(self, k: int) -> list[Tensor | None]:
        """Of every input of node ``k`` what its value differs by from the start."""
        inputs = self._problem.spec.nodes[k].inputs
        return [self.links[i].d if i in self.links else None for i in inputs]

    def errors(self, *, shifts: bool = False) -> list[Tensor | None]:
        """eps_k of every node at the beliefs of now, every node's current point; of a loss's node the gradient."""
        result: list[Tensor | None] = []
        for k, node in enumerate(self._forward.nodes):
            moved = None
            if node is not None and not self.fixed:
                moved = node.deviate(self.moves(k), shifts=shifts)
            result.append(self._error(k, node, moved))
        return result

    def _error(self, k: int, node, moved: Tensor | None) -> Tensor | None:
        forward = self._forward
        if k in self.links:
            return (
                None if node is None else self.links[k].error(moved, owned=moved is not None and node.owned)
            )
        if k in forward.targets:
            if moved is None:
                self.outputs[k] = forward.values[k]
                return forward.sources[k]
            self.outputs[k] = forward.values[k] + moved
            return weighted(forward.targets[k].gradient_at(self.outputs[k]), self._problem.weights[k])
        base = forward.base_errors[k]
        return base if moved is None else base + moved  # clamped; a clamped root has neither

    def run(self, observe: Observe | None) -> list[Tensor | None]:
        """Run the iterations; returns the last iteration's errors, None where they are zero."""
        problem = self._problem
        errors = self.errors()
        for t in range(1, problem.num_steps + 1):
            if t > 1:
                errors = self.errors()
            if problem.wanted.energies:
                self.energies.append(self._forward.energy_row(errors, self.outputs, problem.weights))
            self.descend(errors, t)
            if observe is not None:
                states = {k + 1: b.d for k, b in self.links.items() if b.d is not None}
                observe(t, states | {k + 1: errors[k] for k in self._forward.targets})
        return errors

    def descend(self, errors: list[Tensor | None], iteration: int) -> None:
        """Every belief moves down its gradient, all from ``errors`` and the current points."""
        problem = self._problem
        pulled = [weighted(e, w) for e, w in zip(errors, self.weights, strict=True)]
        incoming: dict[int, Pulls] = {k: [] for k in self.links}
        for c, error in enumerate(pulled):
            if error is None or self._forward.nodes[c] is None:
                continue
            pulls = self._forward.nodes[c].pulls(error, self._wanted[c])
            for i, pull in zip(problem.spec.nodes[c].inputs, pulls, strict=True):
                if pull is not None:
                    incoming[i].append(pull)
        for k, belief in self.links.items():
            if (
                pulled[k] is not None or incoming[k] or not problem.optimizer.rests
            ):  # else no error came this far
                eta = problem.step_size_at(k, iteration)
                belief.descend(pulled[k], incoming[k] or None, eta, iteration)
            if problem.temperature:
                belief.add_noise(problem.noise(belief.vhat, k, iteration))

    def linearize_at_final(self) -> None:
        """Make the last beliefs every node's current point, for the weights' updates."""
        for k, node in enumerate(self._forward.nodes):
            if node is not None:
                node.at(self.moves(k))

    def locate(self, raise_where_bad: Observe) -> None:
        """Relax once more from the start, looking at every iteration."""
        zeros = {k: torch.zeros_like(b.vhat) for k, b in self.links.items()}
        for belief in self.links.values():
            belief.rewind()
        if not self.fixed:
            for node, spec in zip(self._forward.nodes, self._problem.spec.nodes, strict=True):
                if node is not None:
                    node.deviate([zeros.get(i) for i in spec.inputs])
        self.energies.clear()
        self.run(raise_where_bad)

    def beliefs(self) -> list[Tensor]:
        values = self._forward.values
        return [self.links[k].beliefs() if k in self.links else v.clone() for k, v in enumerate(values)]
