"""Strict relaxation as what it is, an optimiser of torch.optim on an energy; shares no code with pcfast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from literal import Literal, evaluate, output_error
from torch import Tensor, nn
from torch.optim import Optimizer


def energy(model: nn.Sequential, beliefs: Sequence[Tensor], y, loss) -> Tensor:
    """F = sum over l < L of 0.5 |f_l(v_{l-1}) - v_l|^2, and loss(f_L(v_{L-1}), y). beliefs: v_0..v_{L-1}."""
    hidden = [
        0.5 * (layer(below) - v).square().sum()
        for layer, below, v in zip(model[:-1], beliefs[:-1], beliefs[1:], strict=True)
    ]
    return sum(hidden, start=loss(model[-1](beliefs[-1]), y))


def relax_by_optimizer(
    model: nn.Sequential,
    x: Tensor,
    y,
    *,
    loss,
    step_sizes: Sequence[float],
    make: Callable[[list[Tensor]], Optimizer],
) -> Literal:
    """Beliefs as leaves that ``make``'s optimiser moves down autograd's gradient of :func:`energy`."""
    with torch.no_grad():
        vhat = [x]
        for layer in model:
            vhat.append(evaluate(layer, vhat[-1]))
    leaves = [v.clone().requires_grad_() for v in vhat[1:-1]]
    optimizer = make(leaves)
    for eta in step_sizes:
        with torch.no_grad():
            v = [x, *(leaf.clone() for leaf in leaves)]
            mu = [evaluate(layer, below) for layer, below in zip(model, v, strict=True)]
        errors = [None, *(m - w for m, w in zip(mu[:-1], v[1:], strict=True)), output_error(loss, mu[-1], y)]
        for group in optimizer.param_groups:
            group["lr"] = eta
        gradients = torch.autograd.grad(energy(model, [x, *leaves], y, loss), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
    beliefs = [x, *(leaf.detach() for leaf in leaves)]
    result = Literal([*beliefs, vhat[-1]], errors)
    for name, parameter in model.named_parameters():
        l = int(name.split(".")[0])
        mu = evaluate(model[l], beliefs[l])
        (result.gradients[name],) = torch.autograd.grad(mu, parameter, errors[l + 1])
    return result
