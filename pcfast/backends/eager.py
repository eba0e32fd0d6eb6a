"""The methods in deviation form with plain PyTorch operations, no autograd in the loop.

exact and fixed_prediction cost one forward and one backward pass for any number of iterations (docs/method.md,
fact 1).
strict keeps d_l = v_l - vhat_l and per iteration does what the clamped input (fact 2), the active front
(fact 3) and the Gram form (fact 7) leave of two stages: predict, then feedback (fact 5).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import status
from ..deviation import Chain, settle
from ..errors import RelaxationDiverged
from ..precision import Precision
from ..problem import Outcome, Problem, check_start, energy_row, layer_of_parameters
from ..replay import recorded_buffers
from .base import Backend


class Eager(Backend):
    name = "eager"

    def supports(self, network, device, dtype):
        if not dtype.is_floating_point:
            return False, f"eager relaxes real floating dtypes, not {dtype}"
        return True, ""

    def replays(self, problem, plan):
        if problem.network.opaque:
            op = problem.network.opaque[0]
            return False, f"{op.name} runs through autograd ({op.why})"
        if problem.loss is not None and not problem.loss.known:
            return False, "a loss that pcfast does not know may change between calls"
        return True, ""

    def run(self, problem, plan):
        with _numerics(problem.x.device, plan.precision):
            return _Run(problem, plan).outcome()

    def updates(self, model, network, precision, x, beliefs, errors):
        outcome = Outcome(None, None)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), recorded_buffers(model)():
            v = precision.to_state(x)
            for l, spec in enumerate(network.layers, start=1):
                chain = Chain(spec, model, precision)
                v = chain.forward(v if beliefs is None else precision.to_state(beliefs[l - 1]))
                outcome.add_gradients(chain.gradients(precision.to_state(errors[l])))
        return outcome.gradients


@contextlib.contextmanager
def _numerics(device: torch.device, precision: Precision):
    """No autograd, dtypes as planned; on CUDA deterministic convolutions, and TF32 under float16 autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_switched(torch.backends.cudnn, "deterministic", True))
            if precision.autocast == torch.float16:
                stack.enter_context(_switched(torch.backends.cuda.matmul, "fp32_precision", "tf32"))
        yield


_switch_lock = threading.Lock()
_switch_users: dict[str, tuple[int, object]] = {}  # name -> (how many rely on it now, value before the first)


@contextlib.contextmanager
def _switched(owner, name: str, value):
    """Set one of torch's process-wide switches; the last thread to leave puts it back."""
    with _switch_lock:
        users, before = _switch_users.get(name, (0, getattr(owner, name)))
        _switch_users[name] = (users + 1, before)
        setattr(owner, name, value)
    try:
        yield
    finally:
        with _switch_lock:
            users, before = _switch_users[name]
            _switch_users[name] = (users - 1, before)
            if users == 1:
                del _switch_users[name]
                setattr(owner, name, before)


def scalar_chain(depth: int, step_size: float) -> Iterator[tuple[float, ...]]:
    """The scalar recursion that fixed prediction is (docs/method.md fact 1), in float64.

    Yields (c_0(t), ..., c_L(t)) for t = 0, 1, 2, ...: c_0 = 1, c_d(0) = 0,
    c_d(t+1) = (1 - eta) c_d(t) + eta c_{d-1}(t). c_d belongs to layer L-d.
    """
    row = (1.0,) + (0.0,) * depth
    while True:
        yield row
        row = (1.0, *((1 - step_size) * row[d] + step_size * row[d - 1] for d in range(1, depth + 1)))


@functools.lru_cache(maxsize=256)
def fixed_prediction_factors(
    depth: int, num_steps: int, step_size: float, limit: float | None = None, lowest: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The factors of g_{L-d}, d = 0..L, after ``num_steps`` iterations of fixed prediction.

    Returns:
        ``(errors, beliefs)``: c_d(n-1) of the last iteration's errors (c_d(0) for n = 0), and c_d(n) of the
        beliefs vhat_{L-d} - c g_{L-d}.

    Raises:
        RelaxationDiverged: a factor of a layer l >= ``lowest`` exceeds ``limit``.
    """
    errors = beliefs = None
    for t, row in enumerate(itertools.islice(scalar_chain(depth, step_size), num_steps + 1)):
        for layer in range(lowest, depth + 1):
            if limit is not None and not abs(row[depth - layer]) <= limit:
                raise RelaxationDiverged(t, max(layer, 1), step_size)
        errors, beliefs = (row if beliefs is None else beliefs), row
    return errors, beliefs


class _Run:
    """One relaxation."""

    def __init__(self, problem: Problem, plan) -> None:
        self.problem, self.plan, self.precision = problem, plan, plan.precision
        self.depth = problem.network.depth
        # index l holds layer l; index 0 is the input
        self.chains = [None, *(Chain(s, problem.model, plan.precision) for s in problem.network.layers)]
        self.builder = status.StatusBuilder() if problem.check and not problem.raise_now else None
        self.energies: list[Tensor] = []
        self.flaw: Tensor | None = None

    def outcome(self) -> Outcome:
        problem = self.problem
        if problem.method == "fixed_prediction":
            self.factors = self._factors()  # divergence is known before any tensor work
        elif problem.method == "exact":
            self.factors = ((1.0,) * (self.depth + 1),) * 2
        self.vhat = self._forward()
        if self.builder is not None:
            self.builder.begin(problem.x, self.vhat[1:])
        self._prepare_loss()
        out = self.result = Outcome(self.loss, self.vhat[-1])
        if problem.wanted.states or problem.wanted.activations:
            out.activations, out.output_gradient = self.vhat, self.output_gradient
        if problem.method == "strict":
            self._strict()
        else:
            self._one_backward()
        if problem.wanted.energies:
            empty = self.vhat[-1].new_zeros((0, self.depth))
            out.energies = torch.stack(self.energies) if self.energies else empty
        if problem.check:
            self._check()
        return out

    def _forward(self) -> list[Tensor]:
        given = self.problem.activations
        if given is not None:
            given = [self.precision.to_state(a) for a in given]
            with recorded_buffers(self.problem.model)():  # their forward pass has moved the statistics
                for l in range(1, self.depth + 1):
                    self.chains[l].forward(given[l - 1])
            return given
        vhat = [self.precision.to_state(self.problem.x)]
        for chain in self.chains[1:]:
            vhat.append(chain.forward(vhat[-1]))
        return vhat

    def _prepare_loss(self) -> None:
        problem, output = self.problem, self.vhat[-1]
        if problem.loss is None:
            self.loss, self.output_gradient = None, self.precision.to_state(problem.output_gradient)
            return
        loss, y = problem.loss, problem.y
        loss.check_target(tuple(output.shape), output.dtype, y)
        if loss.known:
            target = loss.prepare(output, y, raise_now=problem.raise_now)
            self.flaw = target.flaw
            self.loss_at: Callable[[Tensor], Tensor] = lambda mu: loss.value_prepared(target, mu)
            self.gradient_at: Callable[[Tensor], Tensor] = lambda mu: loss.gradient(target, mu)
        else:
            self.loss_at = lambda mu: loss.value(mu, y)
            self.gradient_at = lambda mu: loss.gradient_by_autograd(mu, y)
        self.loss, self.output_gradient = self.loss_at(output), self.gradient_at(output)

    # exact and fixed prediction ------------------------------------------------------------------------------

    def _factors(self) -> tuple:
        problem = self.problem
        limit = torch.finfo(self.precision.state).max if problem.check else None
        lowest = 0 if problem.wanted.input_error else 1
        return fixed_prediction_factors(self.depth, problem.num_steps, problem.step_size, limit, lowest)

    def _one_backward(self) -> None:
        problem, depth, out = self.problem, self.depth, self.result
        wanted = problem.wanted
        factors, last = self.factors  # of the errors and of the beliefs, by distance from the top

        lowest = 0 if wanted.input_error else 1
        gradients: list[Tensor | None] = [None] * depth + [self.output_gradient]  # g_l
        needed = wanted.states or wanted.energies
        for l in range(depth, 0, -1):
            # below the lowest layer with a parameter to train, and without states to give, nothing is needed
            below = needed or any(c.has_gradients for c in self.chains[1:l])
            found, g = self.chains[l].differentiate(
                gradients[l],
                need_input=l > lowest and (below or (l == 1 and wanted.input_error)),
                need_gradients=wanted.gradients,
                factor=factors[depth - l],
            )
            out.add_gradients(found)
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
            if problem.method == "fixed_prediction":
                out.beliefs[depth] = self.vhat[depth].clone()  # the output is not relaxed
            self.checked += [(max(l, 1), v) for l, v in enumerate(out.beliefs)]
            self.checked += [(max(l, 1), e) for l, e in enumerate(out.errors) if e is not None]
        if wanted.energies and problem.method == "fixed_prediction":
            for row in itertools.islice(scalar_chain(depth, problem.step_size), problem.num_steps):
                errors = [None if g is None else g * row[depth - l] for l, g in enumerate(gradients)]
                self.energies.append(energy_row(errors, self.loss))

    # strict --------------------------------------------------------------------------------------------------

    def _strict(self) -> None:
        problem, depth, out = self.problem, self.depth, self.result
        starts = None if problem.start is None else check_start(problem.start, self.vhat)
        self.links: list[_Link] = [None]  # index l couples v_l to layer l+1
        for l in range(1, depth):
            kind = _GramLink if l == 1 and self.plan.gram else _Link
            start = None if problem.start is None else self.precision.to_state(starts[l])
            self.links.append(kind(self.chains[l + 1], self.vhat[l], start))
        errors = self._relax(self.builder.observe if self.builder else None)
        for link in self.links[1:]:
            link.settle()
        if self.plan.gram:
            errors[1] = self.links[1].last_error()
        self.checked = [(l, link.d) for l, link in enumerate(self.links) if l and link.d is not None]
        self.checked.append((depth, errors[depth]))
        if problem.wanted.gradients:
            for l in range(1, depth + 1):
                chain = self.chains[l]
                out.add_gradients(chain.zero_gradients() if errors[l] is None else chain.gradients(errors[l]))
        if problem.wanted.states:
            top = self.vhat[depth] if problem.start is None else self.precision.to_state(starts[depth])
            out.beliefs = [self.vhat[0].clone(), *(link.beliefs() for link in self.links[1:]), top.clone()]
            found = zip(errors[1:], self.vhat[1:], strict=True)
            out.errors = [None, *(torch.zeros_like(v) if e is None else e for e, v in found)]

    def _relax(self, observe) -> list[Tensor | None]:
        """Run the iterations; returns the last iteration's errors, None where they are zero."""
        problem, depth, eta = self.problem, self.depth, self.problem.step_size
        links, fresh = self.links, self.plan.fresh
        errors: list[Tensor | None] = [None] * (depth + 1)
        # with num_steps = 0 the errors are evaluated once and no belief moves
        for t in range(1, max(problem.num_steps, 1) + 1):
            front = depth - t + 1 if fresh else 1  # lowest layer with an error
            deviations: list[Tensor | None] = [None] * (depth + 1)  # of the predictions
            for l in range(max(front, 1), depth + 1):
                if l > 1 and links[l - 1].moved:
                    deviations[l] = links[l - 1].predict()
            for l in range(max(front, 1), depth):
                errors[l] = links[l].error(deviations[l])
            top = self.vhat[depth] if deviations[depth] is None else self.vhat[depth] + deviations[depth]
            errors[depth] = self.gradient_at(top)
            if problem.num_steps == 0:
                break
            if problem.wanted.energies:
                self.energies.append(energy_row(errors, self.loss_at(top)))
            for l in range(max(front - 1, 1), depth):
                links[l].descend(errors[l], errors[l + 1], eta)
            if observe is not None:
                states = {l: links[l].state for l in range(1, depth) if links[l].moved}
                observe(t, {**states, depth: errors[depth]})
        return errors

    # checks --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        problem, out = self.problem, self.result
        if self.builder is None:
            loss = [] if self.loss is None else [self.loss]
            relaxed = (value for _, value in self.checked)
            if status.all_finite([*self.vhat[1:], *relaxed, *out.gradients.values(), *loss]):
                return
        owners = layer_of_parameters(problem.network, problem.model)
        results = [*self.checked, *((owners[p], g) for p, g in out.gradients.items())]
        if self.loss is not None:
            results.append((self.depth, self.loss))
        if self.builder is not None:
            out.status = self.builder.build(self.flaw, results)
            status.zero_if_bad(out.status, list(out.gradients.values()))
            return
        bad = status.first_non_finite(self.vhat[1:])
        if bad is not None:
            raise RelaxationDiverged(0, bad + 1, problem.step_size)
        if problem.method == "strict":
            self._locate()
        elif problem.method == "fixed_prediction":
            self._locate_by_factors()
        layers = [layer for layer, value in results if not status.all_finite([value])]
        raise RelaxationDiverged(None, min(layers), problem.step_size)

    def _locate_by_factors(self) -> None:
        """Raise where a belief vhat_l - c g_l of fixed prediction was first not finite."""
        chain = scalar_chain(self.depth, self.problem.step_size)
        rows = itertools.islice(chain, self.problem.num_steps + 1)
        for t, row in enumerate(rows):
            for l, g in enumerate(self.activation_gradients[:-1]):
                if g is not None and not status.all_finite([self.vhat[l] - g * row[self.depth - l]]):
                    raise RelaxationDiverged(t or None, max(l, 1), self.problem.step_size)

    def _locate(self) -> None:
        """Relax once more, looking at every iteration, and raise where values first were not finite."""

        def observe(iteration: int, states: dict[int, Tensor]) -> None:
            bad = status.first_non_finite(list(states.values()))
            if bad is not None:
                raise RelaxationDiverged(iteration, list(states)[bad], self.problem.step_size)

        for link in self.links[1:]:
            link.rewind()
        self.energies.clear()
        self._relax(observe)


class _Link:
    """Beliefs v_l, kept as d = v_l - vhat_l, and layer l+1 above them."""

    def __init__(self, chain: Chain, vhat: Tensor, start: Tensor | None) -> None:
        self.chain, self.vhat, self._start = chain, vhat, start
        self.d: Tensor | None = None if start is None else start - vhat

    @property
    def moved(self) -> bool:
        """True once d may differ from zero."""
        return self.d is not None

    @property
    def state(self) -> Tensor:
        """What is non-finite when the relaxation diverged here."""
        return self.d

    def rewind(self) -> None:
        """Back to the start, the chain's current point too."""
        self.d = None if self._start is None else self._start - self.vhat
        self.chain.deviate(torch.zeros_like(self.vhat))

    def predict(self) -> Tensor:
        """mu_{l+1}(v_l) - vhat_{l+1}."""
        return self.chain.deviate(self.d)

    def error(self, deviation: Tensor | None) -> Tensor | None:
        """eps_l = (mu_l - vhat_l) - d_l; ``deviation`` is None where mu_l has not moved."""
        if self.d is None:
            return deviation
        return self.d.neg() if deviation is None else deviation - self.d

    def descend(self, error: Tensor | None, error_above: Tensor, eta: float) -> None:
        """d_l += eta (eps_l - J_{l+1}^T eps_{l+1})."""
        if self.d is None:
            self.d = torch.zeros_like(self.vhat)
        if error is not None:
            self.d.add_(error, alpha=eta)
        self.chain.descend(self.d, error_above, eta)

    def settle(self) -> None:
        """Evaluate layer l+1's masks and arg-maxima at the last beliefs, for the weight gradient."""
        if self.moved:
            self.chain.at(self.d)

    def beliefs(self) -> Tensor:
        return self.vhat.clone() if self.d is None else self.vhat + self.d


class _GramLink(_Link):
    """Layer 1's beliefs out of the loop (docs/method.md fact 7): with mu_1 constant and u_2's deviation s = d_1 W^T

        s <- (1 - eta) s - eta delta_2 G        S <- (1 - eta) S + eta delta_2        d_1 = -S W

    where delta_2 is eps_2 pulled back to u_2, and the last eps_1 = S W before the last update.
    """

    def __init__(self, chain, vhat, start):
        super().__init__(chain, vhat, start)
        self._head, self._tail = chain.steps[0], chain.steps[1:]
        self._gram = self._head.gram()
        self._s: Tensor | None = None
        self._sum: Tensor | None = None
        self._sum_before: Tensor | None = None

    @property
    def moved(self):
        return self._s is not None

    @property
    def state(self):
        return self._s

    def rewind(self):
        super().rewind()
        self._s = self._sum = self._sum_before = None

    def predict(self):
        d = self._s
        for step in self._tail:
            d = step.deviate(d)
        return d

    def error(self, deviation):
        return None

    def descend(self, error, error_above, eta):
        delta = error_above
        for step in reversed(self._tail):
            delta = step.pullback(delta)
        if self._s is None:
            self._s = self._head.gram_product(self._gram, delta).mul_(-eta)
            self._sum = delta * eta
            return
        self._head.gram_descend(self._gram, self._s, delta, eta)
        # the sum before this update gives eps_1 should this iteration be the last
        self._sum_before = self._sum
        self._sum = torch.add(self._sum * (1 - eta), delta, alpha=eta)

    def last_error(self) -> Tensor | None:
        return None if self._sum_before is None else self._head.pullback(self._sum_before)

    def settle(self):
        if not self.moved:
            return
        self.d = self._head.pullback(self._sum).neg_()
        self._head.at(self.d)
        settle(self._tail, self._s)
