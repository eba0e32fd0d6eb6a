"""The three methods written down once more, with nothing but plain torch: an oracle that shares no code."""

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


def relax_literally(
    model: nn.Sequential, x, y, *, loss, method: str, step_size: float, num_steps: int, watch=None
) -> Literal:
    """Rosenbaum (2022), algorithms 1 to 3, on a copy of ``model`` (deterministic layers only).

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
    points = v if method == "strict" else vhat
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
