"""Strict relaxation in deviation form: d_l = v_l - vhat_l (docs/method.md; Rosenbaum (2022), algorithm 2).

An iteration does what the clamped input (fact 2), the active front (fact 3) and the Gram form (fact 7) leave of two
stages: predict, then feedback (fact 5).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...problem import early_exit
from ...problem.early_exit import EarlyExit
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, energy_row, filled_start, gradient_row
from ...support import host
from ..divergence import Checks, Observe
from ..forward import Chains, ForwardPass, forward_pass
from .links import GramLink, Link


def strict(problem: Problem, plan: Plan, chains: Chains) -> Outcome:
    """One strict relaxation, or the two of centred nudging."""
    forward = forward_pass(problem, plan, chains)
    return relax(problem, plan, forward, Checks(problem, forward))


def relax(problem: Problem, plan: Plan, forward: ForwardPass, checks: Checks) -> Outcome:
    """As :func:`strict`, from a forward pass on."""
    depth, out, loop = plan.depth, forward.outcome(plan), _Loop(problem, plan, forward)
    results: list[tuple[int, Tensor]] = []
    for share in loop.pushes():
        errors = loop.run(checks.observe)
        for link in loop.links[1:]:
            link.linearize_at_final()
        if plan.gram:
            errors[1] = loop.links[1].last_error()
        results += [(l, link.d) for l, link in enumerate(loop.links) if l and link.d is not None]
        results.append((depth, errors[depth]))
        if plan.wanted.gradients:
            forward.add_updates(out, errors, share)
    if plan.wanted.states:
        top = plan.precision.to_state(loop.starts[depth])
        out.beliefs = [forward.vhat[0].clone(), *(link.beliefs() for link in loop.links[1:]), top.clone()]
        out.errors = forward.filled(errors)
    out.iterations = loop.iterations
    out.record(plan.wanted, plan.depth, loop.energies, loop.belief_gradients)
    checks.finish(out, results, lambda: loop.locate(checks.raise_where_bad))
    forward.update_statistics(problem, out)
    return out


class _Loop:
    """The iterations.

    Attributes:
        links: index l couples v_l to layer l+1.
        starts: v_0..v_L that the beliefs start from.
        energies, belief_gradients: a row an iteration, where they are wanted.
        iterations: 0-dim, with a tolerance how many moved beliefs; else None.
    """

    def __init__(self, problem: Problem, plan: Plan, forward: ForwardPass) -> None:
        self._problem, self._plan, self._forward = problem, plan, forward
        vhat = forward.vhat
        self.starts = vhat if problem.start is None else filled_start(problem.start, vhat)
        self.links: list[Link] = [None]
        for l in range(1, plan.depth):
            kind = GramLink if l == 1 and plan.gram else Link
            start = None if plan.fresh else plan.precision.to_state(self.starts[l])
            self.links.append(kind(forward.chains[l + 1], vhat[l], start, plan.belief_optimizer))
        self.energies: list[Tensor] = []
        self.belief_gradients: list[Tensor] = []
        self.iterations: Tensor | None = None

    def pushes(self) -> Iterator[float]:
        """Get ready for one relaxation after the other, from the start; yields what each one's updates count."""
        self._away: Tensor | None = None  # mu_L minus the nudged target, at the forward pass
        nudging = self._plan.nudging
        if nudging is None:
            yield 1.0
            return
        distance = self._forward.vhat[-1] - self._forward.target.target
        for push, share in nudging.pushes:
            if self._away is not None:
                for link in self.links[1:]:
                    if link.moved:
                        link.rewind()
            self._away = distance * push
            yield share

    def locate(self, raise_where_bad: Observe) -> None:
        """Relax once more, looking at every iteration."""
        for link in self.links[1:]:
            link.rewind()
        self.energies.clear()
        self.belief_gradients.clear()
        for _ in self.pushes():
            self.run(raise_where_bad)

    def _output_error(self, deviation: Tensor | None) -> Tensor:
        """dLoss/dmu_L at mu_L = vhat_L + deviation; a nudged loss without the cancellation of mu_L - target."""
        if self._away is None:
            return self._forward.gradient_at(self._output(deviation))
        return (self._away if deviation is None else self._away + deviation) * self._forward.target.scale

    def _loss(self, deviation: Tensor | None) -> Tensor:
        if self._away is None:
            return self._forward.loss_at(self._output(deviation))
        away = self._away if deviation is None else self._away + deviation
        return away.square().sum() * (self._forward.target.scale / 2)

    def _output(self, deviation: Tensor | None) -> Tensor:
        output = self._forward.vhat[-1]
        return output if deviation is None else output + deviation

    def run(self, observe: Observe | None) -> list[Tensor | None]:
        """Run the iterations; returns the last iteration's errors, None where they are zero.

        After an early exit nothing changes any more: the host leaves the loop, or, where it would have to wait to
        know, continues, and what it computes is dropped.
        """
        problem, plan, depth, links = self._problem, self._plan, self._plan.depth, self.links
        num_steps, wanted = plan.num_steps, plan.wanted
        errors: list[Tensor | None] = [None] * (depth + 1)
        early = None
        if plan.tolerance is not None:
            early = EarlyExit(plan.tolerance, depth, problem.x.device)
        leaves = host.readable(problem.x.device)
        # with num_steps = 0 the errors are evaluated once and no belief moves
        for t in range(1, max(num_steps, 1) + 1):
            if early is not None and leaves and not early.going:
                break
            # before ``earliest`` all iterations run, and from then on every layer has an error
            masked = early is not None and not leaves and t > early.earliest
            front = depth - t + 1 if plan.fresh else 1  # lowest layer with an error
            deviations: list[Tensor | None] = [None] * (depth + 1)  # of the predictions
            for l in range(max(front, 1), depth + 1):
                if l > 1 and links[l - 1].moved:
                    deviations[l] = links[l - 1].predict()
            before = list(errors)
            for l in range(max(front, 1), depth):
                errors[l] = links[l].error(deviations[l], owned=l > 1 and links[l - 1].owned)
            errors[depth] = self._output_error(deviations[depth])
            if num_steps == 0:
                break
            if wanted.energies or early is not None:
                self.energies.append(energy_row(errors, self._loss(deviations[depth])))
            if masked:
                going = early.going
                errors[1:] = [torch.where(going, e, b) for e, b in zip(errors[1:], before[1:], strict=True)]
                self.energies[-1] = torch.where(going, self.energies[-1], self.energies[-2])
                kept = [None, *(link.d.clone() for link in links[1:])]
            if early is not None:
                early.see(t, self.energies[-1])
            eta = problem.step_size_at(t)
            measured, gradients = wanted.belief_gradients, [None] * depth
            for l in range(max(front - 1, 1), depth):
                gradients[l] = links[l].descend(errors[l], errors[l + 1], eta, t, apart=measured)
            if measured:
                self.belief_gradients.append(gradient_row(gradients[1:], self._forward.vhat[-1]))
            if masked:
                for link, d in zip(links[1:], kept[1:], strict=True):
                    link.d = torch.where(going, link.d, d)
                if measured:
                    self.belief_gradients[-1] = torch.where(going, *self.belief_gradients[:-3:-1])
            if observe is not None:
                states = {l: links[l].state for l in range(1, depth) if links[l].moved}
                observe(t, {**states, depth: errors[depth]})
        if early is not None:
            self.iterations = early.iterations
            for rows in (self.energies, self.belief_gradients):
                rows[:] = early_exit.repeated(rows, num_steps)
        return errors
