"""The methods written down once more, with nothing but plain torch: an oracle that shares no code.

strict and fixed prediction as published, layer by layer; error_based as gradient descent, by autograd, on its energy;
exact and zero_divergence as backpropagation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Literal:
    """What a relaxation leaves: beliefs and errors l = 0..L, updates by parameter name, energies."""

    beliefs: list
    errors: list
    gradients: dict[str, Tensor] = field(default_factory=dict)
    energies: list[list[float]] = field(default_factory=list)


def output_error(loss, mu: Tensor, y) -> Tensor:
    """dLoss/dmu."""
    leaf = mu.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf, y), leaf)
    return gradient


def evaluate(layer: nn.Module, v: Tensor) -> Tensor:
    """f(v), on copies of v and of the layer's buffers, so that no evaluation leaves a trace in the next."""
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return torch.func.functional_call(layer, buffers, (v.clone(),))


def feedback(layer: nn.Module, v: Tensor, error: Tensor) -> Tensor:
    """J(v)^T error."""
    leaf = v.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(evaluate(layer, leaf), leaf, error)
    return gradient


def perturbed_energy(f, x: Tensor, y, loss, errors) -> tuple[Tensor, list[Tensor], Tensor]:
    """sum_{l<L} |eps_l|^2 / 2 + Loss(mu_L), the states v_0..v_{L-1} of v_l = f_l(v_{l-1}) - eps_l, and mu_L."""
    v = [x]
    for l in range(1, len(f) - 1):
        v.append(evaluate(f[l], v[-1]) - errors[l])
    mu = evaluate(f[-1], v[-1])
    return sum((0.5 * (e * e).sum() for e in errors[1:-1]), loss(mu, y)), v, mu


def relax_literally(
    model: nn.Sequential, x, y, *, loss, method: str, step_size: float, num_steps: int, watch=None
) -> Literal:
    """Every method on a copy of ``model`` (deterministic layers only).

    ``watch(t, v, errors)`` is called after every iteration t = 1..n with its beliefs and errors.
    """
    model = copy.deepcopy(model)
    f = [None, *model]
    L = len(model)
    vhat = [x]
    for l in range(1, L + 1):
        vhat.append(evaluate(f[l], vhat[l - 1]).detach())
    v = [value.clone() for value in vhat]
    g = output_error(loss, vhat[L], y)
    energies = []

    def square(errors):
        return [0.5 * float((e * e).sum()) for e in errors[1:L]]

    if method == "exact":
        errors = [None] * L + [g]
        for l in range(L - 1, 0, -1):
            errors[l] = feedback(f[l + 1], vhat[l], errors[l + 1])
        v = [x] + [vhat[l] - errors[l] for l in range(1, L + 1)]
    elif method == "fixed_prediction":
        for t in range(max(num_steps, 1)):
            errors = [vhat[l] - v[l] for l in range(L)] + [g]
            if num_steps == 0:
                break
            energies.append([*square(errors), float(loss(vhat[L], y))])
            for l in range(L):
                v[l] = v[l] + step_size * (errors[l] - feedback(f[l + 1], vhat[l], errors[l + 1]))
            if watch:
                watch(t + 1, v, errors)
    elif method == "error_based":
        errors = [None, *(torch.zeros_like(value) for value in vhat[1:L]), None]
        for t in range(num_steps):
            leaves = [e.requires_grad_(True) for e in errors[1:L]]
            energy, v, mu = perturbed_energy(f, x, y, loss, errors)
            found = torch.autograd.grad(energy, leaves) if leaves else []
            leaves, mu = [e.detach() for e in leaves], mu.detach()
            energies.append([*square([None, *leaves, None]), float(loss(mu, y))])
            errors[1:L] = [e - step_size * g for e, g in zip(leaves, found, strict=True)]
            if watch:
                watch(t + 1, [value.detach() for value in v], [None, *errors[1:L], mu])
        _, states, mu = perturbed_energy(f, x, y, loss, errors)
        v = [*(value.detach() for value in states), vhat[L]]
        errors[L] = output_error(loss, mu, y)
    elif method == "zero_divergence":
        values = [x.detach().requires_grad_(True)]
        for l in range(1, L + 1):
            values.append(evaluate(f[l], values[-1]))
            if not values[-1].requires_grad:
                values[-1].requires_grad_(True)
        found = torch.autograd.grad(loss(values[L], y), values[1:], allow_unused=True)
        errors = [None] + [
            torch.zeros_like(u) if e is None else e for u, e in zip(vhat[1:], found, strict=True)
        ]
        v = [x, *(vhat[l] - errors[l] for l in range(1, L)), vhat[L]]
    else:
        for t in range(max(num_steps, 1)):
            mu = [None] + [evaluate(f[l], v[l - 1]).detach() for l in range(1, L + 1)]
            errors = [None] + [mu[l] - v[l] for l in range(1, L)] + [output_error(loss, mu[L], y)]
            if num_steps == 0:
                break
            energies.append([*square(errors), float(loss(mu[L], y))])
            moves = [None] + [errors[l] - feedback(f[l + 1], v[l], errors[l + 1]) for l in range(1, L)]
            for l in range(1, L):
                v[l] = v[l] + step_size * moves[l]
            if watch:
                watch(t + 1, v, errors)

    result = Literal(v, errors, energies=energies)
    names = {parameter: name for name, parameter in model.named_parameters()}
    points = v if method in ("strict", "error_based") else vhat
    for l in range(1, L + 1):
        parameters = [p for p in f[l].parameters() if p.requires_grad]
        mu = evaluate(f[l], points[l - 1])
        if parameters and mu.requires_grad:
            found = torch.autograd.grad(mu, parameters, errors[l], allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    name = names[parameter]
                    result.gradients[name] = result.gradients.get(name, 0) + gradient
    return result
