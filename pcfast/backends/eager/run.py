"""The methods in deviation form with plain PyTorch operations, no autograd in the loop.

exact and fixed_prediction cost one forward and one backward pass for any number of iterations (docs/method.md,
fact 1). zero_divergence is backpropagation (proof: docs/methods.md) and runs as exact.
strict keeps d_l = v_l - vhat_l and per iteration does what the clamped input (fact 2), the active front
(fact 3) and the Gram form (fact 7) leave of two stages: predict, then feedback (fact 5).
error_based and incremental: files of these names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...deviation import layer_chain
from ...errors import RelaxationDiverged
from ...precision import numerics
from ...problem import early_exit, status
from ...problem.early_exit import EarlyExit
from ...problem.types import Outcome, Problem, energy_row, filled_start, gradient_row
from ...support import host
from ...support.replay import recorded_buffers
from ..base import Backend, without_closed_form
from .error_based import FreeErrors
from .fixed_prediction import fixed_prediction_factors, scalar_chain
from .incremental import Moving, check_iteration
from .links import GramLink, Link


class Eager(Backend):
    name = "eager"

    def supports(self, request):
        if not request.dtype.is_floating_point:
            return False, f"eager relaxes real floating dtypes, not {request.dtype}"
        reason = without_closed_form(request)
        return not reason, reason

    def replays(self, problem, plan):
        if problem.network.opaque:
            op = problem.network.opaque[0]
            return False, f"{op.name} runs through autograd ({op.why})"
        if problem.loss is not None and not problem.loss.known:
            return False, "a loss that pcfast does not know may change between calls"
        return True, ""

    def run(self, problem, plan):
        with numerics(problem.x.device, plan.precision):
            return Run(problem, plan).outcome()

    def updates(self, model, network, precision, x, beliefs, errors):
        outcome = Outcome(None, None)
        with numerics(x.device, precision), recorded_buffers(model)():
            v = x
            for l, spec in enumerate(network.layers, start=1):
                chain = layer_chain(spec, model, precision)
                given = v if beliefs is None else beliefs[l - 1]
                v = chain.forward(precision.to_state(given) if given.is_floating_point() else given)
                outcome.add_gradients(chain.gradients(precision.to_state(errors[l])), l)
        return outcome.gradients


class Run:
    """One relaxation. Subclasses run the loop of strict relaxation elsewhere (:meth:`_relax`)."""

    def __init__(self, problem: Problem, plan) -> None:
        self.problem, self.plan, self.precision = problem, plan, plan.precision
        self.depth = problem.network.depth
        # index l holds layer l; index 0 is the input
        layers = problem.network.layers
        self.chains = [None, *(layer_chain(spec, problem.model, plan.precision) for spec in layers)]
        self.builder = status.StatusBuilder() if problem.check and not problem.raise_now else None
        self.energies: list[Tensor] = []
        self.belief_gradients: list[Tensor] = []
        self.flaw: Tensor | None = None
        self.loss_updates: list = []  # of parameters that the loss itself uses

    def outcome(self) -> Outcome:
        """Run. Where this raises, statistics and other buffers are as they were."""
        try:
            return self._outcome()
        except BaseException:
            for chain in self.chains[1:]:
                chain.undo()
            raise

    def _outcome(self) -> Outcome:
        problem = self.problem
        if problem.method == "fixed_prediction":
            self.factors = self._factors()  # divergence is known before any tensor work
        elif problem.method in ("exact", "zero_divergence"):
            self.factors = ((1.0,) * (self.depth + 1),) * 2
        self.vhat = self._forward()
        self._prepare_loss()
        self.loss_values = [self.output_gradient] if self.loss is None else [self.loss, self.output_gradient]
        if self.builder is not None:
            self.builder.begin(problem.x, self.vhat[1:], self.loss_values)
        out = self.result = Outcome(self.loss, self.vhat[-1])
        out.add_gradients(self.loss_updates, self.depth)
        if problem.wanted.states or problem.wanted.activations:
            out.activations, out.output_gradient = self.vhat, self.output_gradient
        if problem.method == "strict":
            self._strict()
        elif problem.method == "error_based":
            self._error_based()
        elif problem.method == "incremental":
            self._incremental()
            return out
        else:
            self._one_backward()
        if problem.wanted.energies:
            empty = self.vhat[-1].new_zeros((0, self.depth))
            out.energies = torch.stack(self.energies) if self.energies else empty
        if problem.wanted.belief_gradients:
            empty = self.vhat[-1].new_zeros((0, self.depth - 1))
            out.belief_gradients = torch.stack(self.belief_gradients) if self.belief_gradients else empty
        if problem.check:
            self._check()
        self._settle()
        return out

    def _settle(self) -> None:
        """Statistics move, by what the forward pass found; not where the step failed, nor for given activations."""
        if self.problem.activations is None:
            failed = None if self.result.status is None else status.failed(self.result.status)
            for chain in self.chains[1:]:
                chain.settle(failed)

    def _forward(self) -> list[Tensor]:
        given = self.problem.activations
        if given is not None:
            given = [self.precision.to_state(a) if a.is_floating_point() else a for a in given]
            with recorded_buffers(self.problem.model)():  # their forward pass has moved the statistics
                for l in range(1, self.depth + 1):
                    self.chains[l].forward(given[l - 1])
            return given
        x = self.problem.x  # integers stay what they are: layer 1 embeds them
        vhat = [self.precision.to_state(x) if x.is_floating_point() else x]
        for chain in self.chains[1:]:
            vhat.append(chain.forward(vhat[-1]))
        return vhat

    def _prepare_loss(self) -> None:
        problem, output = self.problem, self.vhat[-1]
        if problem.loss is None:
            self.loss, self.output_gradient = None, self.precision.to_state(problem.output_gradient)
            return
        loss, y = problem.loss, problem.y
        self.target = None
        loss.check_target(tuple(output.shape), y)
        if loss.known:
            target = self.target = loss.prepare(output, y, raise_now=problem.raise_now)
            self.flaw = target.flaw
            self.loss_at: Callable[[Tensor], Tensor] = lambda mu: loss.value_prepared(target, mu)
            self.gradient_at: Callable[[Tensor], Tensor] = lambda mu: loss.gradient(target, mu)
        else:
            self.loss_at = lambda mu: loss.value(mu, y)
            self.gradient_at = lambda mu: loss.gradient_by_autograd(mu, y)
        self.loss = self.loss_at(output)
        if loss.known or not problem.wanted.gradients:
            self.output_gradient = self.gradient_at(output)
        else:
            self.output_gradient, self.loss_updates = loss.gradients_by_autograd(output, y)
            problem.check_loss_updates(self.loss_updates)

    # exact and fixed prediction ------------------------------------------------------------------------------

    def _factors(self) -> tuple:
        problem = self.problem
        limit = torch.finfo(self.precision.state).max if problem.check else None
        lowest = 0 if problem.wanted.input_error else 1
        return fixed_prediction_factors(
            self.depth, problem.num_steps, problem.step_size, limit, lowest, problem.belief_optimizer
        )

    def _chain(self):
        """The scalars c_d(t) for t = 0..n."""
        problem = self.problem
        rows = scalar_chain(self.depth, problem.step_size, problem.belief_optimizer)
        return itertools.islice(rows, problem.num_steps + 1)

    def _one_backward(self) -> None:
        problem, depth, out = self.problem, self.depth, self.result
        wanted = problem.wanted
        factors, last = self.factors  # of the errors and of the beliefs, by distance from the top

        gradients: list[Tensor | None] = [None] * depth + [self.output_gradient]  # g_l
        lowest = self._lowest_gradient()
        for l in range(depth, 0, -1):
            found, g = self.chains[l].differentiate(
                gradients[l],
                need_input=l > lowest,
                need_gradients=wanted.gradients,
                factor=factors[depth - l],
            )
            out.add_gradients(found, l)
            gradients[l - 1] = g
            if g is None:
                break
        self.activation_gradients = gradients
        self.checked = [(max(l, 1), g) for l, g in enumerate(gradients) if g is not None]
        if wanted.states:
            out.errors = [None if g is None else g * factors[depth - l] for l, g in enumerate(gradients)]
            out.beliefs = [
                v.clone() if g is None else v - g * last[depth - l]
                for l, (v, g) in enumerate(zip(self.vhat, gradients, strict=True))
            ]
            if problem.method != "exact":
                out.beliefs[depth] = self.vhat[depth].clone()  # the output is not relaxed
            self.checked += [(max(l, 1), v) for l, v in enumerate(out.beliefs)]
            self.checked += [(max(l, 1), e) for l, e in enumerate(out.errors) if e is not None]
        if wanted.energies and problem.method == "fixed_prediction":
            for row in itertools.islice(self._chain(), problem.num_steps):
                errors = [None if g is None else g * row[depth - l] for l, g in enumerate(gradients)]
                self.energies.append(energy_row(errors, self.loss))
                if wanted.belief_gradients:  # J_{l+1}^T eps_{l+1} - eps_l = (c_{L-l-1} - c_{L-l}) g_l
                    pulls = [
                        None if g is None else g * (row[depth - l - 1] - row[depth - l])
                        for l, g in enumerate(gradients[1:-1], start=1)
                    ]
                    self.belief_gradients.append(gradient_row(pulls, self.vhat[-1]))

    def _lowest_gradient(self) -> int:
        """The lowest l whose g_l the caller's wishes need."""
        wanted = self.problem.wanted
        if wanted.input_error:
            return 0
        if wanted.states or wanted.energies:
            return 1
        trained = (l for l in range(1, self.depth) if wanted.gradients and self.chains[l].has_gradients)
        return next(trained, self.depth)

    # strict --------------------------------------------------------------------------------------------------

    def _strict(self) -> None:
        problem, depth, out = self.problem, self.depth, self.result
        starts = self.vhat if problem.start is None else filled_start(problem.start, self.vhat)
        self.links: list[Link] = [None]  # index l couples v_l to layer l+1
        for l in range(1, depth):
            kind = GramLink if l == 1 and self.plan.gram else Link
            start = None if self.plan.fresh else self.precision.to_state(starts[l])
            self.links.append(kind(self.chains[l + 1], self.vhat[l], start, problem.belief_optimizer))
        self.checked = []
        for share in self._pushes():
            errors = self._relax(self.builder.observe if self.builder else None)
            for link in self.links[1:]:
                link.settle()
            if self.plan.gram:
                errors[1] = self.links[1].last_error()
            self.checked += [(l, link.d) for l, link in enumerate(self.links) if l and link.d is not None]
            self.checked.append((depth, errors[depth]))
            if problem.wanted.gradients:
                self._add_updates(errors, share)
        if problem.wanted.states:
            top = self.precision.to_state(starts[depth])
            out.beliefs = [self.vhat[0].clone(), *(link.beliefs() for link in self.links[1:]), top.clone()]
            out.errors = self._filled(errors)

    def _filled(self, errors: list[Tensor | None]) -> list[Tensor | None]:
        """The errors of layers 1..L, zeros for None; eps_0 is None."""
        found = zip(errors[1:], self.vhat[1:], strict=True)
        return [None, *(torch.zeros_like(v) if e is None else e for e, v in found)]

    def _pushes(self) -> Iterator[float]:
        """Get ready for one relaxation after the other, from the start; yields what each one's updates count."""
        self.away: Tensor | None = None  # mu_L minus the nudged target, at the forward pass
        if self.problem.nudging is None:
            yield 1.0
            return
        distance = self.vhat[-1] - self.target.dense
        for push, share in self.problem.nudging.pushes:
            if self.away is not None:
                self._rewind()
            self.away = distance * push
            yield share

    def _rewind(self) -> None:
        for link in self.links[1:]:
            if link.moved:
                link.rewind()

    def _add_updates(self, errors: list[Tensor | None], share: float = 1.0) -> None:
        """``share`` of (df_l/dtheta_l)^T eps_l at the chains' current points; an error that is None is zero."""
        for l in range(1, self.depth + 1):
            chain = self.chains[l]
            found = chain.zero_gradients() if errors[l] is None else chain.gradients(errors[l])
            self.result.add_gradients([(p, g if share == 1 else g * share) for p, g in found], l)

    def _top_error(self, deviation: Tensor | None) -> Tensor:
        """dLoss/dmu_L at mu_L = vhat_L + deviation; a nudged loss without the cancellation of mu_L - target."""
        if self.away is None:
            return self.gradient_at(self._top(deviation))
        return (self.away if deviation is None else self.away + deviation) * self.target.scale

    def _top_loss(self, deviation: Tensor | None) -> Tensor:
        if self.away is None:
            return self.loss_at(self._top(deviation))
        away = self.away if deviation is None else self.away + deviation
        return away.square().sum() * (self.target.scale / 2)

    def _top(self, deviation: Tensor | None) -> Tensor:
        return self.vhat[self.depth] if deviation is None else self.vhat[self.depth] + deviation

    def _relax(self, observe) -> list[Tensor | None]:
        """Run the iterations; returns the last iteration's errors, None where they are zero.

        After an early exit nothing changes any more: the host leaves the loop, or, where it would have to wait to
        know, goes on, and what it computes is dropped.
        """
        problem, depth = self.problem, self.depth
        links, fresh = self.links, self.plan.fresh
        errors: list[Tensor | None] = [None] * (depth + 1)
        early = None
        if problem.tolerance is not None:
            early = EarlyExit(problem.tolerance, depth, problem.x.device)
        leaves = host.readable(problem.x.device)
        # with num_steps = 0 the errors are evaluated once and no belief moves
        for t in range(1, max(problem.num_steps, 1) + 1):
            if early is not None and leaves and not early.going:
                break
            # before ``earliest`` all iterations run, and from then on every layer has an error
            masked = early is not None and not leaves and t > early.earliest
            front = depth - t + 1 if fresh else 1  # lowest layer with an error
            deviations: list[Tensor | None] = [None] * (depth + 1)  # of the predictions
            for l in range(max(front, 1), depth + 1):
                if l > 1 and links[l - 1].moved:
                    deviations[l] = links[l - 1].predict()
            before = list(errors)
            for l in range(max(front, 1), depth):
                errors[l] = links[l].error(deviations[l], owned=l > 1 and links[l - 1].owned)
            errors[depth] = self._top_error(deviations[depth])
            if problem.num_steps == 0:
                break
            if problem.wanted.energies or early is not None:
                self.energies.append(energy_row(errors, self._top_loss(deviations[depth])))
            if masked:
                going = early.going
                errors[1:] = [torch.where(going, e, b) for e, b in zip(errors[1:], before[1:], strict=True)]
                self.energies[-1] = torch.where(going, self.energies[-1], self.energies[-2])
                kept = [None, *(link.d.clone() for link in links[1:])]
            if early is not None:
                early.see(t, self.energies[-1])
            eta = problem.step_size_at(t)
            measured, gradients = problem.wanted.belief_gradients, [None] * depth
            for l in range(max(front - 1, 1), depth):
                gradients[l] = links[l].descend(errors[l], errors[l + 1], eta, t, apart=measured)
            if measured:
                self.belief_gradients.append(gradient_row(gradients[1:], self.vhat[-1]))
            if masked:
                for link, d in zip(links[1:], kept[1:], strict=True):
                    link.adopt(torch.where(going, link.d, d))
                if measured:
                    self.belief_gradients[-1] = torch.where(going, *self.belief_gradients[:-3:-1])
            if observe is not None:
                states = {l: links[l].state for l in range(1, depth) if links[l].moved}
                observe(t, {**states, depth: errors[depth]})
        if early is not None:
            self.result.iterations = early.iterations
            for rows in (self.energies, self.belief_gradients):
                rows[:] = early_exit.repeated(rows, problem.num_steps)
        return errors

    # error_based ---------------------------------------------------------------------------------------------

    def _error_based(self) -> None:
        out = self.result
        free = self._relax_errors(self.builder.observe if self.builder else None)
        self.checked = [
            (l, value)
            for found in (free.d, free.errors)
            for l, value in enumerate(found)
            if value is not None
        ]
        if self.problem.wanted.gradients:
            self._add_updates(free.errors)
        if self.problem.wanted.states:
            out.beliefs = [v.clone() if d is None else v + d for v, d in zip(self.vhat, free.d, strict=True)]
            out.errors = self._filled(free.errors)

    def _relax_errors(self, observe) -> FreeErrors:
        """Run the iterations; chains must be at the forward pass."""
        problem = self.problem
        free = FreeErrors(self.chains, self.vhat)
        for t in range(1, problem.num_steps + 1):
            output = free.output()
            if problem.wanted.energies:
                self.energies.append(energy_row(free.errors, self.loss_at(output)))
            free.descend(self.gradient_at(output), problem.step_size_at(t))
            if observe is not None:
                observe(t, {**dict(enumerate(free.errors[1:-1], start=1)), self.depth: output})
        free.errors[self.depth] = self.gradient_at(free.output())
        return free

    # incremental ---------------------------------------------------------------------------------------------

    def _incremental(self) -> None:
        """Iterate; the result's gradients and status are those of the last iteration."""
        problem, out = self.problem, self.result
        self.checked: list[tuple[int, Tensor]] = []
        if problem.check and (self.builder is None or problem.num_steps == 0):
            self._check()
        if problem.num_steps == 0:
            self._settle()
        moving = Moving(self.chains, self.vhat, self.output_gradient, problem.belief_optimizer)
        for t in range(1, problem.num_steps + 1):
            if t > 1:
                moving.evaluate(self.gradient_at)
            out.gradients, out.owners = {}, []
            self._add_updates(moving.errors)
            if t < problem.num_steps:
                moving.descend(problem.step_size_at(t), t)
            found = [(l, e) for l, e in enumerate(moving.errors) if e is not None]
            found += out.updates_by_layer()
            if self.builder is not None:
                self._defer(t, found)
            elif problem.check:
                check_iteration(t, found, problem.step_size)
            if t == 1:
                self._settle()
            problem.move(out.gradients)

    def _defer(self, iteration: int, found: list[tuple[int, Tensor]]) -> None:
        """Zero this iteration's updates where it, or the forward pass, is not finite; leave word of it."""
        out, builder = self.result, status.StatusBuilder()
        if out.status is not None:  # of the iteration before
            status.defer(out.status, self.problem.step_size)
        builder.begin(self.problem.x, self.vhat[1:], self.loss_values)
        out.status = builder.build(self.flaw, found, iteration)
        zeroed = status.zeroed_if_bad(out.status, list(out.gradients.values()))
        out.gradients = dict(zip(out.gradients, zeroed, strict=True))

    # checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        problem, out = self.problem, self.result
        if self.builder is None:
            relaxed = (value for _, value in self.checked)
            if status.all_finite([*self.vhat[1:], *self.loss_values, *relaxed, *out.gradients.values()]):
                return
        results = [*self.checked, *out.updates_by_layer()]
        if self.builder is not None:
            out.status = self.builder.build(self.flaw, results)
            zeroed = status.zeroed_if_bad(out.status, list(out.gradients.values()))
            out.gradients = dict(zip(out.gradients, zeroed, strict=True))
            return
        bad = status.first_non_finite(self.vhat[1:])
        if bad is not None:
            raise RelaxationDiverged(0, bad + 1, problem.step_size)
        if not status.all_finite(self.loss_values):
            raise status.bad_loss()
        if problem.method == "strict":
            self._locate()
        elif problem.method == "fixed_prediction":
            self._locate_by_factors()
        elif problem.method == "error_based":
            self._locate_errors()
        layers = [layer for layer, value in results if not status.all_finite([value])]
        raise RelaxationDiverged(None, min(layers), problem.step_size)

    def _locate_by_factors(self) -> None:
        """Raise where a belief vhat_l - c g_l of fixed prediction was first not finite."""
        for t, row in enumerate(self._chain()):
            for l, g in enumerate(self.activation_gradients[:-1]):
                if g is not None and not status.all_finite([self.vhat[l] - g * row[self.depth - l]]):
                    raise RelaxationDiverged(t or None, max(l, 1), self.problem.step_size)

    def _locate(self) -> None:
        """Relax once more, looking at every iteration, and raise where values first were not finite."""

        for link in self.links[1:]:
            link.rewind()
        self.energies.clear()
        self.belief_gradients.clear()
        for _ in self._pushes():
            self._relax(self._raise_where_bad)

    def _locate_errors(self) -> None:
        """As :meth:`_locate`, for error_based."""
        for chain, v in zip(self.chains[2:], self.vhat[1:], strict=False):
            chain.deviate(torch.zeros_like(v))
        self.energies.clear()
        self._relax_errors(self._raise_where_bad)

    def _raise_where_bad(self, iteration: int, states: dict[int, Tensor]) -> None:
        bad = status.first_non_finite(list(states.values()))
        if bad is not None:
            raise RelaxationDiverged(iteration, list(states)[bad], self.problem.step_size)
