"""The algorithms literally as published, with torch autograd layer by layer (docs/method.md, docs/methods.md).

Rosenbaum, "On the relationship between predictive coding and backpropagation", PLOS ONE 17(3) e0266102 (2022),
algorithms 1 to 3 and the program Torch2PC; the other methods name their papers. Any module, any loss, any dtype; slow
on purpose: this file says what is right, and every other backend is judged by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ModelError, RelaxationDiverged
from ..problem import status, validation
from ..problem.early_exit import EarlyExit, repeated
from ..problem.nudging import target_of
from ..problem.types import Outcome, energy_row, filled_start, gradient_row
from ..support import differentiation
from ..support.replay import Replay, recorded_buffers
from .base import Backend
from .divergence import check_iteration


class Layer:
    """f_l as a function of the beliefs below it, with one draw of random numbers for the whole step."""

    def __init__(self, module, device):
        self.module, self.device = module, device
        self.replay: Replay | None = None
        differentiation.registered(module)  # refuses what autograd cannot keep

    def redraw(self, v: Tensor) -> Tensor:
        """The forward pass where its value was given already: it draws as ever, statistics stay."""
        with recorded_buffers(self.module)():
            return self(v)

    def __call__(self, *v: Tensor) -> Tensor:
        if self.replay is None:  # the forward pass: draws, and moves running statistics
            self.replay = Replay(self.module, self.device)
            with torch.enable_grad():
                leaves = leaves_of(v)
                mu = self.replay.first(lambda: self._evaluate(*leaves))
                differentiation.trained(mu)  # refuses what cannot be differentiated
            return mu.detach()
        return self.replay.again(lambda: self._evaluate(*v))

    def undo(self) -> None:
        """Buffers as they were before the forward pass."""
        if self.replay is not None:
            self.replay.undo()

    def keep(self) -> None:
        """The step has changed parameters: buffers stay as the forward pass left them."""
        self.replay.keep()

    def call(self, *v: Tensor) -> Tensor:
        """The module's own call."""
        return self.module(*v)

    def _evaluate(self, *v: Tensor) -> Tensor:
        mu = self.call(*map(torch.clone, v))  # clones, so that in-place modules leave the beliefs alone
        if not isinstance(mu, Tensor) or not (mu.is_floating_point() or mu.is_complex()):
            given = f"a tensor of {mu.dtype}" if isinstance(mu, Tensor) else f"a {type(mu).__name__}"
            raise ModelError(
                "model",
                f"a layer that returns {given}",
                "layers that map one tensor to one tensor of a floating dtype",
            )
        return mu

    def vjp(self, v: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """``(f(v), J(v)^T error)``."""
        with torch.enable_grad():
            v = v.detach().requires_grad_(True)
            mu = self(v)
            if not mu.requires_grad:
                return mu.detach(), torch.zeros_like(v)
            (gradient,) = differentiation.gradients(mu, [v], error)
        return mu.detach(), torch.zeros_like(v) if gradient is None else gradient

    def parameter_gradients(self, error: Tensor, *v: Tensor):
        """(parameter, (df/dtheta)^T error) at beliefs v, for parameters in use."""
        with torch.enable_grad():
            leaves = leaves_of(v)  # so that a checkpoint inside tracks its parameters, too
            mu = self(*leaves)
            parameters = differentiation.trained(mu, differentiation.registered(self.module), leaves)
            result = differentiation.gradients(mu, parameters, error) if parameters else ()
        return [(p, g) for p, g in zip(parameters, result, strict=True) if g is not None]


def leaves_of(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs as points to differentiate at; integers as they are."""
    return [v.detach().requires_grad_(v.is_floating_point() or v.is_complex()) for v in inputs]


class Reference(Backend):
    name = "reference"
    literal = True

    def supports(self, plan):
        return True, ""

    @torch.no_grad()
    def updates(self, model, network, precision, x, beliefs, errors):
        outcome, v = Outcome(None, None), x
        for l, module in enumerate(model, start=1):
            layer, below = Layer(module, x.device), v if beliefs is None else beliefs[l - 1]
            v = layer.redraw(below)
            outcome.add_gradients(layer.parameter_gradients(errors[l], below), l)
        return outcome.gradients

    @torch.no_grad()
    def run(self, problem, plan):
        if problem.check:
            validation.check_finite("x", problem.x)
        layers = [None, *(Layer(module, problem.x.device) for module in problem.model)]
        try:
            return self._run(problem, plan, layers)
        except BaseException:
            for layer in layers[1:]:
                layer.undo()
            raise

    def _run(self, problem, plan, layers):
        depth = plan.depth
        if problem.activations is None:
            vhat = [problem.x]
            for layer in layers[1:]:
                vhat.append(layer(vhat[-1]).detach())
        else:
            vhat = list(problem.activations)
            for layer, v in zip(layers[1:], vhat, strict=False):
                layer.redraw(v)

        loss, loss_updates = None, []
        if problem.loss is not None:
            problem.loss.check_target(tuple(vhat[-1].shape), problem.y)
            if problem.loss.known:
                problem.loss.prepare(vhat[-1], problem.y, raise_now=True)  # labels in range?
            loss = problem.loss.value(vhat[-1], problem.y)
            output_gradient, loss_updates = problem.loss.gradients_by_autograd(
                vhat[-1], problem.y, parameters=plan.wanted.gradients
            )
            problem.check_loss_updates(loss_updates)
        else:
            output_gradient = problem.output_gradient
        if problem.check:
            _check(0, vhat[1:], problem)
            if not status.all_finite([output_gradient] if loss is None else [loss, output_gradient]):
                raise status.bad_loss()

        energies: list[Tensor] = []
        iterations = None
        gradients: list[Tensor] = []  # norms of the beliefs' gradients
        relaxed = []  # (beliefs, errors, points that the updates are taken at, what they count)
        if plan.method == "exact":
            relaxed.append((*_exact(layers, vhat, output_gradient), vhat, 1.0))
        elif plan.method == "fixed_prediction":
            beliefs, errors = _fixed_prediction(
                layers, vhat, output_gradient, problem, plan, energies, gradients, loss
            )
            if not (vhat[0].is_floating_point() or vhat[0].is_complex()):
                errors[0] = None
            relaxed.append((beliefs, errors, vhat, 1.0))
        elif plan.method == "error_based":
            beliefs, errors = _error_based(layers, vhat, problem, plan, energies)
            relaxed.append((beliefs, errors, beliefs, 1.0))
        elif plan.method == "incremental":
            outcome = _incremental(layers, vhat, problem, plan)
            outcome.loss, outcome.output = loss, vhat[-1]
            return outcome
        elif plan.method == "zero_divergence":
            relaxed.append((*_zero_divergence(layers, vhat, problem), 1.0))
        else:
            start = vhat if problem.start is None else filled_start(problem.start, vhat)
            for y, share in _targets(problem, plan, vhat[-1]):
                beliefs, errors, iterations = _strict(layers, start, y, problem, plan, energies, gradients)
                relaxed.append((beliefs, errors, beliefs, share))

        outcome = Outcome(loss, vhat[-1], activations=vhat, output_gradient=output_gradient)
        outcome.beliefs, outcome.errors, *_ = relaxed[0]
        outcome.iterations = iterations
        outcome.record(plan.wanted, depth, energies, gradients)
        if plan.wanted.gradients:
            for _, errors, points, share in relaxed:
                for l in range(1, depth + 1):
                    result = layers[l].parameter_gradients(errors[l], points[l - 1])
                    outcome.add_gradients([(p, g if share == 1 else g * share) for p, g in result], l)
            outcome.add_gradients(loss_updates, depth)
        if problem.check:
            results = [entry for v, errors, *_ in relaxed for entry in (*enumerate(v), *enumerate(errors))]
            if not plan.wanted.input_error:
                results = [(l, value) for l, value in results if l]
            results += outcome.updates_by_layer()
            bad = [l for l, value in results if value is not None and not status.all_finite([value])]
            if bad:
                raise RelaxationDiverged(None, max(min(bad), 1), problem.step_size)
        return outcome


def _targets(problem, plan, vhat):
    """(target, what its relaxation's updates count): y, or what nudging makes of it."""
    if plan.nudging is None:
        return [(problem.y, 1.0)]
    return [(target_of(push, vhat, problem.y), share) for push, share in plan.nudging.pushes]


def _exact(layers, vhat, output_gradient):
    """eps_l = dLoss/dvhat_l, v_l = vhat_l - eps_l: backpropagation (algorithm 1)."""
    depth = len(layers) - 1
    errors: list = [None] * depth + [output_gradient]
    for l in range(depth - 1, 0, -1):
        _, errors[l] = layers[l + 1].vjp(vhat[l], errors[l + 1])
    return [vhat[0]] + [vhat[l] - errors[l] for l in range(1, depth + 1)], errors


def _fixed_prediction(layers, vhat, output_gradient, problem, plan, energies, gradients, loss):
    """Predictions and Jacobians stay at the forward pass (algorithm 3)."""
    depth = len(layers) - 1
    v = [value.clone() for value in vhat]
    move = _mover(problem, plan, v)
    errors = [vhat[l] - v[l] for l in range(depth)] + [output_gradient]
    lowest = 0 if vhat[0].is_floating_point() or vhat[0].is_complex() else 1  # integers do not move
    for t in range(plan.num_steps):
        errors = [vhat[l] - v[l] for l in range(depth)] + [output_gradient]
        if plan.wanted.energies:
            energies.append(energy_row(errors, loss))
        result = []
        for l in range(lowest, depth):
            _, feedback = layers[l + 1].vjp(vhat[l], errors[l + 1])
            result.append(move(l, feedback - errors[l], t + 1))
        if plan.wanted.belief_gradients:
            gradients.append(gradient_row(result[1 - lowest :], vhat[-1]))
        if problem.check:
            _check(t + 1, v[1:], problem)
            if plan.wanted.input_error:
                _check(t + 1, v[:1], problem)  # v_0, reported as layer 1
    return v, errors


def _evaluate(layers, v, y, problem):
    """Predictions mu_l = f_l(v_{l-1}), and errors eps_l = mu_l - v_l, eps_L = dLoss/dmu_L; l = 1..L."""
    depth = len(layers) - 1
    mu = [None] + [layers[l](v[l - 1]).detach() for l in range(1, depth + 1)]
    top = problem.loss.gradient_by_autograd(mu[depth], y)
    return mu, [None] + [mu[l] - v[l] for l in range(1, depth)] + [top]


def _strict(layers, start, y, problem, plan, energies, gradients):
    """All layers at once, from the state before the iteration (algorithm 2): beliefs, errors, iterations that ran."""
    depth = len(layers) - 1
    v = [value.clone() for value in start]
    move = _mover(problem, plan, v)
    early = None
    if plan.tolerance is not None:
        early = EarlyExit(plan.tolerance, depth, problem.x.device)
    if plan.num_steps == 0:
        return v, _evaluate(layers, v, y, problem)[1], early and early.iterations
    for t in range(plan.num_steps):
        mu, errors = _evaluate(layers, v, y, problem)
        if plan.wanted.energies or early is not None:
            energies.append(energy_row(errors, problem.loss.value(mu[depth], y)))
        result = []
        for l in range(1, depth):  # errors were taken before any belief moves
            _, feedback = layers[l + 1].vjp(v[l], errors[l + 1])
            result.append(move(l, feedback - errors[l], t + 1))
        if plan.wanted.belief_gradients:
            gradients.append(gradient_row(result, v[depth]))
        if problem.check:
            _check(t + 1, [*v[1:depth], errors[depth]], problem)
        if early is not None:
            early.see(t + 1, energies[-1])
            if not early.going:
                energies[:], gradients[:] = (repeated(rows, plan.num_steps) for rows in (energies, gradients))
                break
    return v, errors, early and early.iterations


def _zero_divergence(layers, vhat, problem):
    """Strict with step size 1, layer l read in iteration t = L - l: Song et al. (2020), Z-IL.

    Returns beliefs and errors of every layer, and the beliefs below it, as they are when it is read.
    """
    depth = len(layers) - 1
    v = [value.clone() for value in vhat]
    beliefs, points, read = [v[0]] + [None] * depth, [None] * depth, [None] * (depth + 1)
    for t in range(depth):
        l = depth - t
        _, errors = _evaluate(layers, v, problem.y, problem)
        beliefs[l], points[l - 1], read[l] = v[l], v[l - 1], errors[l]
        for k in range(1, depth):
            _, feedback = layers[k + 1].vjp(v[k], errors[k + 1])
            v[k] = v[k] + problem.step_size * (errors[k] - feedback)
    return beliefs, read, points


def _incremental(layers, vhat, problem, plan):
    """Beliefs and parameters move together, from the same beliefs and errors: Salvatori et al. (2024), iPC.

    Returns the last iteration's updates.
    """
    depth = len(layers) - 1
    v, outcome = [value.clone() for value in vhat], Outcome(None, None)
    move = _mover(problem, plan, v)
    for t in range(plan.num_steps):
        _, errors = _evaluate(layers, v, problem.y, problem)
        outcome = Outcome(None, None)
        for l in range(1, depth + 1):
            outcome.add_gradients(layers[l].parameter_gradients(errors[l], v[l - 1]), l)
        for l in range(1, depth):
            _, feedback = layers[l + 1].vjp(v[l], errors[l + 1])
            move(l, feedback - errors[l], t + 1)
        if problem.check:
            result = [*enumerate(errors[1:], start=1), *outcome.updates_by_layer()]
            check_iteration(t + 1, result, problem.step_size)
        for layer in layers[1:]:
            layer.keep()
        problem.move(outcome.gradients)
    return outcome


def _error_based(layers, vhat, problem, plan, energies):
    """The errors are the free variables: Goemaere et al., ePC. Gradient descent on

        E(eps_1..eps_{L-1}) = sum |eps_l|^2 / 2 + Loss(mu_L),   mu_l = f_l(v_{l-1}),  v_l = mu_l - eps_l

    from eps = 0. lambda_l = dLoss/dv_l through the net above, which -eps_l moves, so dE/deps_l = eps_l - lambda_l.
    """
    depth = len(layers) - 1
    errors: list = [None, *(torch.zeros_like(value) for value in vhat[1:depth]), None]

    def states():
        v = [vhat[0]]
        for l in range(1, depth):
            v.append(layers[l](v[-1]).detach() - errors[l])
        mu = layers[depth](v[-1]).detach()
        return v, mu, problem.loss.gradient_by_autograd(mu, problem.y)

    for t in range(plan.num_steps):
        v, mu, signal = states()
        if plan.wanted.energies:
            energies.append(energy_row([*errors[:depth], signal], problem.loss.value(mu, problem.y)))
        for l in range(depth - 1, 0, -1):
            _, signal = layers[l + 1].vjp(v[l], signal)  # lambda_l
            errors[l] = errors[l] + problem.step_size_at(t + 1) * (signal - errors[l])
        if problem.check:
            _check(t + 1, [*errors[1:depth], mu], problem)
    v, mu, errors[depth] = states()
    return [*v, vhat[depth].clone()], errors


def _mover(problem, plan, v):
    """``move(l, gradient, t)`` moves beliefs v[l] down their gradient of the energy, as the optimiser does.

    It returns that gradient, weight decay's part included.
    """
    optimizer = plan.belief_optimizer
    descents = [optimizer.descent() for _ in v]

    def move(l, gradient, t):
        if optimizer.weight_decay:
            gradient = gradient + optimizer.weight_decay * v[l]
        v[l] = v[l] + descents[l].move(gradient, problem.step_size_at(t), t)
        return gradient

    return move


def _check(iteration, tensors, problem):
    bad = status.first_non_finite(tensors)
    if bad is not None:
        raise RelaxationDiverged(iteration, bad + 1, problem.step_size)
