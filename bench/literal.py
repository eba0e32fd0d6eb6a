"""The literal per-layer-vjp loop: predictive coding as one writes it from the paper with torch autograd.

The yardstick that speed-ups are measured against: no reuse of the clamped input, two evaluations of every
layer per iteration, as the published program does. Independent of the package.
"""

from __future__ import annotations

import torch
from torch.autograd.functional import vjp


def literal_step(model, loss_function, x, y, method: str, step_size: float, num_steps: int):
    """One training step; assigns ``.grad`` and returns the loss. ``method``: "strict" or "fixed_prediction"."""
    depth = len(model)
    with torch.no_grad():
        vhat = [x]
        for layer in model:
            vhat.append(layer(vhat[-1]))
    output = vhat[-1].detach().requires_grad_(True)
    loss = loss_function(output, y)
    (top,) = torch.autograd.grad(loss, output)

    beliefs = [value.clone() for value in vhat]
    errors = [None] * depth + [top]
    for _ in range(num_steps):
        if method == "strict":
            prediction = model[-1](beliefs[-2]).detach().requires_grad_(True)
            (errors[depth],) = torch.autograd.grad(loss_function(prediction, y), prediction)
            for l in reversed(range(1, depth)):
                errors[l] = model[l - 1](beliefs[l - 1]).detach() - beliefs[l]
                _, feedback = vjp(model[l], beliefs[l], errors[l + 1])
                beliefs[l] = beliefs[l] + step_size * (errors[l] - feedback)
        else:
            for l in reversed(range(depth)):
                errors[l] = vhat[l] - beliefs[l]
                _, feedback = vjp(model[l], vhat[l], errors[l + 1])
                beliefs[l] = beliefs[l] + step_size * (errors[l] - feedback)

    points = beliefs if method == "strict" else vhat
    for l, layer in enumerate(model):
        parameters = tuple(layer.parameters())
        gradients = torch.autograd.grad(layer(points[l]), parameters, errors[l + 1])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return loss.detach()
