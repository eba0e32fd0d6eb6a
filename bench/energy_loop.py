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
    beliefs = _beliefs(model, x)
    mover = torch.optim.SGD(beliefs, lr=step_size)
    for _ in range(num_steps):
        mu, energy = _energy(model, x, y, beliefs)
        *slopes, top = torch.autograd.grad(energy, [*beliefs, mu[-1]])
        errors = [(m - value).detach() for m, value in zip(mu[:-1], beliefs, strict=True)] + [top]
        for value, slope in zip(beliefs, slopes, strict=True):
            value.grad = slope
        mover.step()
    points = [x, *(value.detach() for value in beliefs)]
    mu = [layer(value) for layer, value in zip(model, points, strict=True)]  # at the last beliefs
    torch.autograd.backward(mu, [error.to(m.dtype) for m, error in zip(mu, errors, strict=True)])


def incremental_energy_step(
    model: nn.Sequential, x: Tensor, y: Tensor, step_size: float, num_steps: int, lr: float
) -> None:
    """One step of incremental PC: beliefs and parameters descend the energy together, ``num_steps`` times.

    Leaves the last iteration's updates in ``.grad``, as PCTrainer (Bogacz-Group) does with update_p_at="all".
    """
    beliefs = _beliefs(model, x)
    movers = torch.optim.SGD(beliefs, lr=step_size), torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(num_steps):
        for mover in movers:
            mover.zero_grad()
        _energy(model, x, y, beliefs)[1].backward()
        for mover in movers:
            mover.step()


@torch.no_grad()
def _beliefs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """v_1..v_{L-1} at the forward pass."""
    v = [x]
    for layer in model[:-1]:
        v.append(layer(v[-1]))
    return [value.clone().requires_grad_() for value in v[1:]]


def _energy(model: nn.Sequential, x: Tensor, y: Tensor, beliefs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(mu_1..mu_L, energy)."""
    mu = [layer(value) for layer, value in zip(model, [x, *beliefs], strict=True)]
    inner = [0.5 * (m - value).square().sum() for m, value in zip(mu[:-1], beliefs, strict=True)]
    return mu, F.cross_entropy(mu[-1], y) + sum(inner)
