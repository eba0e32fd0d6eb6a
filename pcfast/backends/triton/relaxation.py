"""One strict relaxation in Triton kernels: forward pass by torch, loop by kernels, weight gradients by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, energy_row, filled_start
from ..divergence import Checks
from ..eager import strict
from ..eager.links import GramLink
from ..forward import Chains, ForwardPass, with_loss
from ..kernel_backend import first_product, raise_first_bad
from .designs import design_of, fuses_loss
from .failures import KernelsFailed, compiling, remember
from .loop import ForwardState, Loop, arena_of


class Relaxation:
    """One relaxation; make it, and call :meth:`outcome`, inside its numerics.

    Attributes:
        arena: the loop's memory.
        pre_activations: what came out of each layer's first product, by l; None elsewhere.
        results: (layer, tensor) of the last beliefs, as deviations, and of the output's error.
    """

    def __init__(self, problem: Problem, plan: Plan, chains: Chains) -> None:
        self.problem, self.plan, self.chains = problem, plan, chains
        self.design = design_of(plan)
        self.arena = arena_of(self.design, problem.x.device, plan.precision.operand)
        self.pre_activations: list[Tensor | None] = [None]
        self.results: list[tuple[int, Tensor]] = []
        self.starts: list[Tensor] | None = None  # beliefs to start from; None from the forward pass

    def values(self) -> list[Tensor]:
        """vhat_0..vhat_L of the forward pass, whose pre-activations are kept where the loop reads them."""
        vhat = [self.plan.precision.to_state(self.problem.x)]
        for l, chain in enumerate(self.chains[1:], start=1):
            value, pre_activation = vhat[-1], None
            head = first_product(chain)
            for i, step in enumerate(chain.steps):
                value = step.forward(value)
                if i == head:
                    value = pre_activation = self._placed(l, value)
            if l > 1:  # kernels find the loop's arg-maxima, and the last beliefs have others
                chain.release()
            # the arena is the loop's own
            vhat.append(value.clone() if value is pre_activation else value)
            self.pre_activations.append(pre_activation)
        return vhat

    def _placed(self, l: int, uhat: Tensor) -> Tensor:
        """uhat where the loop reads it, so that no second copy lives."""
        name = f"uhat{l}"
        if name in self.arena:
            return self.arena.matrix(name).copy_(uhat)
        return uhat.contiguous(memory_format=torch.channels_last) if uhat.dim() == 4 else uhat

    def outcome(self) -> Outcome:
        """Run it."""
        problem, plan = self.problem, self.plan
        forward = with_loss(problem, plan, self.chains, self.values())
        checks = Checks(problem, forward)
        gram_link = (
            GramLink(self.chains[2], forward.vhat[1], None, plan.belief_optimizer) if plan.gram else None
        )
        energies: list[Tensor] = []
        try:
            loop = self._run_loop(forward, gram_link, energies)
        except KernelsFailed as failure:
            if not problem.may_fall_back:
                raise
            # from the same forward pass on, which has drawn masks and moved statistics already
            remember(plan, str(failure))
            out = strict.relax(problem, plan, forward, checks)
            out.fell_back = "eager", str(failure)
            return out
        return self._finish(forward, checks, loop, gram_link, energies)

    def _run_loop(self, forward: ForwardPass, gram_link: GramLink | None, energies: list[Tensor]) -> Loop:
        """The loop, run. ``energies`` gets a row an iteration where they are wanted."""
        problem, plan, depth = self.problem, self.plan, self.plan.depth
        starts = None
        if problem.start is not None:
            self.starts = [plan.precision.to_state(v) for v in filled_start(problem.start, forward.vhat)]
            starts = [v - vhat for v, vhat in zip(self.starts, forward.vhat, strict=True)]
        state = ForwardState(
            self.chains, forward.vhat, self.pre_activations, starts,
            forward.target if fuses_loss(plan) else None, forward.gradient_at, gram_link,
        )  # fmt: skip
        loop = Loop(self.design, self.arena, state, problem.step_size, plan.belief_optimizer.momentum)

        def record(t: int) -> None:
            # between the stages, where layer 1's error has not been written yet
            errors: list[Tensor | None] = [None] * (depth + 1)
            for l in range(max(loop.front(t), 1), depth + 1):
                errors[l] = loop.deviation(1).neg() if l == 1 else loop.error(l)
            energies.append(energy_row(errors, forward.loss_at(loop.output)))

        labels = plan.network.layers
        with compiling(lambda: ", ".join(labels[l - 1].label for l in sorted(loop.at_work))):
            loop.run(plan.num_steps, record if plan.wanted.energies else None)
        return loop

    def _finish(
        self,
        forward: ForwardPass,
        checks: Checks,
        loop: Loop,
        gram_link: GramLink | None,
        energies: list[Tensor],
    ) -> Outcome:
        """Updates, and what else is wanted, from the state that the loop left."""
        problem, plan, depth, vhat = self.problem, self.plan, self.plan.depth, forward.vhat
        steps, out = plan.num_steps, forward.outcome(plan)
        d: list[Tensor | None] = [None] * depth  # v_l - vhat_l; None where it has not moved
        errors: list[Tensor | None] = [None] * (depth + 1)
        for l in range(1, depth):
            if l == 1 and gram_link is not None:
                if not self.design.gram_by_torch:
                    gram_link.set_state(*loop.gram_state())
                gram_link.linearize_at_final()
                d[1], errors[1] = gram_link.d, gram_link.last_error()
            elif not plan.fresh or l >= depth - steps:
                d[l] = loop.deviation(l)
                self.chains[l + 1].at(d[l])  # masks and arg-maxima of the last beliefs
        for l in range(max(loop.front(max(steps, 1)), 1), depth + 1):
            if l == 1 and gram_link is not None:
                continue
            error = loop.error(l) if steps or l > 1 else loop.deviation(1).neg()
            # a caller's errors do not keep the arena alive
            errors[l] = error.clone() if plan.wanted.states else error
        self.results = [(l, value) for l, value in enumerate(d) if value is not None]
        self.results.append((depth, errors[depth]))
        if plan.wanted.gradients:
            forward.add_updates(out, errors)
        if plan.wanted.states:
            top = vhat[depth] if self.starts is None else self.starts[depth]
            hidden = (
                v.clone() if moved is None else v + moved for v, moved in zip(vhat[1:-1], d[1:], strict=True)
            )
            out.beliefs = [vhat[0].clone(), *hidden, top.clone()]
            out.errors = forward.filled(errors)
        out.record(plan.wanted, depth, energies, [])
        out.resources = loop.resources
        first_bad = loop.first_bad[1:]
        checks.observe_first(first_bad, steps)
        checks.finish(out, self.results, lambda: raise_first_bad(first_bad, steps, problem.step_size))
        forward.update_statistics(problem, out)
        return out
