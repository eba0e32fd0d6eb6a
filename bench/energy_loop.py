"""The loop that most authors write: one energy, differentiated by autograd, and an optimiser that moves the beliefs.

In belief form, with every layer evaluated in every iteration, the clamped one too. It takes any module and shares no
code with the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def energy_step(model: nn.Sequential, x: Tensor, y: Tensor, step_size: float, num_steps: int) -> None:
    """One strict training step with mean cross-entropy; leaves the updates in ``.grad``, which must be None."""
    with torch.no_grad():
        v = [x]
        for layer in model[:-1]:
            v.append(layer(v[-1]))
    beliefs = [value.clone().requires_grad_() for value in v[1:]]
    mover = torch.optim.SGD(beliefs, lr=step_size)
    for _ in range(num_steps):
        mu = [layer(value) for layer, value in zip(model, [x, *beliefs], strict=True)]
        inner = [0.5 * (m - value).square().sum() for m, value in zip(mu[:-1], beliefs, strict=True)]
        energy = F.cross_entropy(mu[-1], y) + sum(inner)
        *slopes, top = torch.autograd.grad(energy, [*beliefs, mu[-1]])
        errors = [(m - value).detach() for m, value in zip(mu[:-1], beliefs, strict=True)] + [top]
        for value, slope in zip(beliefs, slopes, strict=True):
            value.grad = slope
        mover.step()
    points = [x, *(value.detach() for value in beliefs)]
    mu = [layer(value) for layer, value in zip(model, points, strict=True)]  # at the last beliefs
    torch.autograd.backward(mu, [error.to(m.dtype) for m, error in zip(mu, errors, strict=True)])
