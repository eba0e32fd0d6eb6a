"""Strict relaxation on a graph in deviation form, and fixed prediction's loop (docs/graphs.md).

All nodes move at once, by the errors at the beliefs before the iteration:

    d_k += eta_k (pi_k eps_k - sum over children c of J_ck^T pi_c eps_c)

An error that is None is zero, and nothing is computed of it: the active front spreads from the clamped nodes along
the shortest paths by itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.divergence import Checks, Observe
from ..deviation.node import Pulls
from ..problem.early_exit import EarlyExit, repeated
from ..support import host
from .beliefs import Belief
from .forward import GraphForward, forward_pass
from .problem import GraphOutcome, GraphPlan, GraphProblem, weighted


def strict(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    """One relaxation, or the two of centred nudging; "fixed_prediction": predictions and Jacobians stay."""
    forward = forward_pass(problem, plan, nodes)
    checks, out = Checks(problem, forward), forward.outcome(problem)
    loop = Loop(problem, forward)
    results: list[tuple[int, Tensor]] = []
    for share in loop.pushes():
        errors = loop.run(checks.observe)
        if not loop.fixed:
            loop.linearize_at_final()
        if problem.wanted.gradients:
            pulled = [weighted(e, w) for e, w in zip(errors, loop.weights, strict=True)]
            forward.add_updates(out, pulled, share)
        results += [(k + 1, b.d) for k, b in loop.links.items() if b.d is not None]
        results += [(k + 1, e) for k, e in enumerate(errors) if e is not None]
    if problem.wanted.states:
        out.beliefs, out.errors = loop.beliefs(), forward.filled(errors)
    if problem.wanted.energies:
        out.energies = forward.stacked(loop.energies)
    out.settled, out.iterations = loop.outputs, loop.iterations
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
        iterations: 0-dim, with a tolerance how many moved beliefs; else None.
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
        self.iterations: Tensor | None = None
        self._away: dict[int, Tensor] = {}  # of nudged losses mu - target, at the start
        self._distances: dict[int, Tensor] = {}  # and at the last errors

    def pushes(self) -> Iterator[float]:
        """Get ready for one relaxation after the other, from the start; yields what each one's updates count."""
        problem, forward = self._problem, self._forward
        if problem.nudging is None:
            yield 1.0
            return
        for push, share in problem.nudging.pushes:
            if self._away:
                self.rewind()
            self._away = {
                k: (forward.values[k] - target.prepared.target) * push
                for k, target in forward.targets.items()
            }
            yield share

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
            self.outputs[k] = forward.values[k] if moved is None else forward.values[k] + moved
            if k in self._away:  # without the cancellation of mu - target
                self._distances[k] = self._away[k] if moved is None else self._away[k] + moved
                gradient = self._distances[k] * forward.targets[k].prepared.scale
            elif moved is None:
                return forward.sources[k]
            else:
                gradient = forward.targets[k].gradient_at(self.outputs[k])
            return weighted(gradient, self._problem.weights[k])
        base = forward.base_errors[k]
        return base if moved is None else base + moved  # clamped; a clamped root has neither

    def _energy_row(self, errors: list[Tensor | None]) -> Tensor:
        losses = {
            k: self._distances[k].square().sum() * (target.prepared.scale / 2)
            if k in self._away
            else target.value_at(self.outputs[k])
            for k, target in self._forward.targets.items()
        }
        return self._forward.energy_row(errors, losses, self._problem.weights)

    def run(self, observe: Observe | None) -> list[Tensor | None]:
        """Run the iterations; returns the last iteration's errors, None where they are zero.

        After an early exit nothing changes any more: the host leaves the loop, or, where it would have to wait to
        know, continues, and what it computes is dropped.
        """
        problem = self._problem
        early, leaves = None, host.readable(problem.x.device)
        if problem.tolerance is not None:
            early = EarlyExit(problem.tolerance, problem.last_arrival, problem.x.device)
        errors = self.errors()
        for t in range(1, problem.num_steps + 1):
            if early is not None and leaves and not early.going:
                break
            # before ``earliest`` all iterations run, and from then on every error that comes has come
            masked = early is not None and not leaves and t > early.earliest
            before, outputs = errors, dict(self.outputs)
            if t > 1:
                errors = self.errors()
            if problem.wanted.energies or early is not None:
                self.energies.append(self._energy_row(errors))
            if masked:
                going = early.going
                errors = [_kept(going, e, b) for e, b in zip(errors, before, strict=True)]
                self.energies[-1] = torch.where(going, *self.energies[:-3:-1])
                self.outputs = {k: _kept(going, v, outputs[k]) for k, v in self.outputs.items()}
                kept = {k: None if b.d is None else b.d.clone() for k, b in self.links.items()}
            if early is not None:
                early.see(t, self.energies[-1])
            self.descend(errors, t)
            if masked:
                for k, belief in self.links.items():
                    belief.d = _kept(going, belief.d, kept[k])
            if observe is not None:
                states = {k + 1: b.d for k, b in self.links.items() if b.d is not None}
                observe(t, states | {k + 1: errors[k] for k in self._forward.targets})
        if early is not None:
            self.iterations = early.iterations
            self.energies[:] = repeated(self.energies, problem.num_steps)
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
        self.rewind()
        self.energies.clear()
        for _ in self.pushes():
            self.run(raise_where_bad)

    def rewind(self) -> None:
        """Back to the start, every node's current point too."""
        self._away = {}
        zeros = {k: torch.zeros_like(b.vhat) for k, b in self.links.items()}
        for belief in self.links.values():
            belief.rewind()
        if not self.fixed:
            for node, spec in zip(self._forward.nodes, self._problem.spec.nodes, strict=True):
                if node is not None:
                    node.deviate([zeros.get(i) for i in spec.inputs])

    def beliefs(self) -> list[Tensor]:
        values = self._forward.values
        return [self.links[k].beliefs() if k in self.links else v.clone() for k, v in enumerate(values)]


def _kept(going: Tensor, now: Tensor | None, before: Tensor | None) -> Tensor | None:
    """``now`` as long as the relaxation goes on, else ``before``; None, a zero that stays one, is in both."""
    return now if now is None or now is before else torch.where(going, now, before)
