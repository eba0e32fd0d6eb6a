"""One strict relaxation in one launch; the lowest product and the weight gradients are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...deviation import Chain
from ...problem.belief_optimizers import schedule_on_device
from ...problem.plan import Plan
from ...problem.types import Outcome, Problem, check_start
from ..divergence import Checks
from ..forward import Chains, ForwardPass
from ..kernel_backend import first_product, raise_first_bad
from . import launch
from .launch import Inputs, ResidentOutputs
from .placements import placement_of
from .shared_memory import Placement


class Relaxation:
    """One relaxation; make it, and call :meth:`outcome`, inside its numerics.

    Attributes:
        first: vhat_1, which torch computes.
        outputs: what the kernel wrote.
        results: (layer, tensor) of the last beliefs and of the output's error.
    """

    first: Tensor
    outputs: ResidentOutputs

    def __init__(self, problem: Problem, plan: Plan, chains: Chains) -> None:
        self.problem, self.plan, self.chains = problem, plan, chains
        self.heads = [None if chain is None else first_product(chain) for chain in chains]
        self.results: list[tuple[int, Tensor]] = []
        self.shapes = [plan.shapes[0][0], *(inner[-1] for inner in plan.shapes)]  # of v_0..v_L
        self.step_size: float | Tensor = problem.step_size

    def outcome(self) -> Outcome:
        """Run it."""
        problem, plan = self.problem, self.plan
        problem.loss.check_target(self.shapes[-1], problem.y)
        if problem.raise_now and problem.loss.kind == "cross_entropy":  # labels
            problem.loss.prepare(torch.empty(self.shapes[-1]), problem.y, raise_now=True)
        x = plan.precision.to_state(problem.x)
        self.first = self.chains[1].forward(x)
        wanted = plan.wanted
        placement, inputs = self.arguments()
        outputs = self.outputs = launch.relax(
            placement, inputs, plan.num_steps, gradients=wanted.gradients,
            output_gradient=wanted.states or wanted.activations or problem.check,
        )  # fmt: skip
        forward = ForwardPass(
            self.chains, [x, self.first, *outputs.vhat[2:]], outputs.loss_rows.sum(), outputs.output_gradient,
            invalid_labels=outputs.first_bad[-1] == 0,
        )  # fmt: skip
        return self._finish(forward, Checks(problem, forward))

    def _starts(self) -> list[Tensor | None] | None:
        """Beliefs to start from; None from the forward pass."""
        problem, to_state = self.problem, self.plan.precision.to_state
        if problem.start is None:
            return None
        check_start(problem.start, self.shapes)
        like = dict(dtype=self.plan.precision.state, device=problem.x.device)
        return [
            torch.full(shape, v, **like) if isinstance(v, float) else None if v is None else to_state(v)
            for v, shape in zip(problem.start, self.shapes, strict=True)
        ]

    def arguments(self) -> tuple[Placement, Inputs]:
        """Placement and inputs of :func:`pcfast.backends.cuda.launch.relax`."""
        problem, plan, first = self.problem, self.plan, self.first
        steps = [None if head is None else self.chains[l].steps[head] for l, head in enumerate(self.heads)]
        weights = [None if step is None else step.weight for step in steps]
        biases = [None if step is None else step.bias for step in steps]
        below = first
        if plan.gram:
            below = steps[2].forward(first)
            weights[2], biases[2] = steps[2].gram(), None
        if isinstance(self.step_size, tuple):
            self.step_size = schedule_on_device(self.step_size, first.dtype, first.device)
        self.starts = self._starts()
        inner_shapes = (self._inner_shape(l) for l in range(2, plan.depth + 1))
        return placement_of(plan), Inputs(
            [None, None, *weights[2:]], [None, None, *biases[2:]], below, self.starts, problem.loss, problem.y,
            self.step_size, plan.belief_optimizer.momentum, [None, *self.shapes[1:]], [None, None, *inner_shapes],
        )  # fmt: skip

    def _inner_shape(self, l: int) -> tuple[int, ...]:
        inner, head = self.plan.shapes[l - 1], self.heads[l]
        return inner[0] if head is None else inner[head + 1]

    def _finish(self, forward: ForwardPass, checks: Checks) -> Outcome:
        """Updates, and what else is wanted, from what the kernel outputs."""
        problem, plan, outputs, depth = self.problem, self.plan, self.outputs, self.plan.depth
        steps, vhat, out = plan.num_steps, forward.vhat, forward.outcome(plan)
        out.resources = self.step_size  # what the cache may let go
        beliefs, errors = [vhat[0], *outputs.beliefs[1:depth], vhat[depth]], [None] * (depth + 1)
        # error l is there from iteration L - l + 1 on (active front, docs/method.md fact 3)
        lowest = max(depth - max(steps, 1) + 1, 1) if plan.fresh else 1
        for l in range(lowest, depth + 1):
            errors[l] = outputs.errors[l]
        if plan.gram:
            head = self.chains[2].steps[self.heads[2]]
            beliefs[1] = vhat[1] - head.pullback(outputs.gram_sum)
            errors[1] = head.pullback(outputs.gram_sum_before)
        elif lowest == 1 and not steps:
            errors[1] = vhat[1] - beliefs[1]  # written in the feedback stage, of which there was none
        self.results = [(l, v) for l, v in enumerate(beliefs) if 0 < l < depth]
        self.results.append((depth, errors[depth]))
        if plan.wanted.gradients:
            for l in range(1, depth + 1):
                out.add_gradients(self._gradients(l, beliefs[l - 1], errors[l]), l)
        if plan.wanted.states:
            top = None if self.starts is None else self.starts[depth]
            out.beliefs = [beliefs[0].clone(), *beliefs[1:-1], (beliefs[-1] if top is None else top).clone()]
            out.errors = forward.filled(errors)
        first_bad = outputs.first_bad[:-1]
        checks.observe_first(first_bad, steps)
        checks.finish(out, self.results, lambda: raise_first_bad(first_bad, steps, problem.step_size))
        forward.update_statistics(problem, out)
        return out

    def _gradients(self, l: int, below: Tensor, error: Tensor | None):
        """Updates of layer l's parameters: its input's beliefs and the local error that the kernel left."""
        chain, head = self.chains[l], self.heads[l]
        if error is None:
            return chain.zero_gradients()
        if l == 1:  # at its forward pass, where it stayed
            return chain.gradients(error)
        if head is None:
            return []
        step = chain.steps[head]
        step.at_input(Chain(chain.steps[:head]).forward(below))
        return step.gradients(self.outputs.local_errors[l])
