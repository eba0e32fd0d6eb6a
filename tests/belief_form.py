"""Strict relaxation in belief form with reduced-precision products: what deviation form replaces.

State in float32, matrix operands in ``operand``, everything else as a careful implementation would have it: the
plain no-autograd loop with v instead of v - vhat. It exists to show that it fails (docs/method.md fact 8).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import vjp


def strict_updates(model: nn.Sequential, x, y, loss, step_size: float, num_steps: int, operand: torch.dtype):
    """Parameter -> update, from beliefs relaxed in belief form; CPU."""

    def evaluate(layer, v):
        with torch.autocast("cpu", dtype=operand, enabled=operand != torch.float32):
            return layer(v).to(v.dtype)

    depth = len(model)
    beliefs = [x]
    with torch.no_grad():
        for layer in model:
            beliefs.append(evaluate(layer, beliefs[-1]))
    errors: list = [None] * (depth + 1)
    for _ in range(num_steps):
        feedback: list = [None] * (depth + 1)
        for l in range(1, depth + 1):
            mu, pull = vjp(lambda v, layer=model[l - 1]: evaluate(layer, v), beliefs[l - 1])
            if l == depth:
                mu = mu.detach().requires_grad_(True)
                (errors[l],) = torch.autograd.grad(loss(mu, y), mu)
            else:
                errors[l] = mu.detach() - beliefs[l]
            (feedback[l - 1],) = pull(errors[l])
        for l in range(1, depth):
            beliefs[l] = beliefs[l] + step_size * (errors[l] - feedback[l].detach())
    updates = {}
    for l, layer in enumerate(model, start=1):
        parameters = list(layer.parameters())
        result = torch.autograd.grad(evaluate(layer, beliefs[l - 1]), parameters, errors[l])
        updates.update(zip(parameters, result, strict=True))
    return updates
