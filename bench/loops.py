"""The loop that a careful author writes without autograd: beliefs, predictions, errors, hand-written Jacobians.

The rival to beat: no autograd, the clamped layer evaluated once. In belief form, as everybody's is. It knows the
layers of the workloads (Linear, Conv2d, ReLU, Tanh, exact GELU, MaxPool2d, Flatten) and mean cross-entropy, and
shares no code with the package. Rosenbaum (2022), algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kept = list  # of one layer's operations: what each needs again on the way back
Body = Callable[..., tuple[list[Tensor], list[Tensor]]]


def unknown(model: nn.Sequential) -> str:
    """The first module that the loop does not know; "" where it knows all."""
    known = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Tanh, nn.GELU, nn.MaxPool2d, nn.Flatten)
    return next(
        (
            type(m).__name__
            for layer in model
            for m in _modules(layer)
            if not isinstance(m, known) or getattr(m, "approximate", "none") != "none"
        ),
        "",
    )


def plain_step(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    method: str,
    step_size: float,
    num_steps: int,
    body: Body | None = None,
) -> list[Tensor]:
    """Updates of all parameters, in the order of ``model.parameters()``.

    Args:
        body: one strict iteration, :func:`iterate` or a compiled one.
    """
    body = iterate if body is None else body
    depth = len(model)
    vhat, kept = [x], []
    for layer in model:
        value, saved = _forward(layer, vhat[-1])
        vhat.append(value)
        kept.append(saved)
    if method == "strict":
        v = list(vhat)
        errors = [vhat[1] - v[1], *(torch.zeros_like(value) for value in vhat[2:])]
        for _ in range(num_steps):
            v, errors = body(model, v, vhat[1], y, step_size)
        updates = []
        for l, layer in enumerate(model):
            _, saved = _forward(layer, v[l])  # masks of the last beliefs
            updates += _updates(layer, saved, errors[l])
        return updates
    top = _top(vhat[-1], y)
    v, errors = list(vhat), [torch.zeros_like(value) for value in vhat[:-1]] + [top]
    for _ in range(num_steps):
        errors = [vhat[l] - v[l] for l in range(depth)] + [top]
        feedback = [_backward(model[l], kept[l], errors[l + 1]) for l in range(depth)]
        v = [v[l] + step_size * (errors[l] - feedback[l]) for l in range(depth)] + [v[depth]]
    return [u for l, layer in enumerate(model) for u in _updates(layer, kept[l], errors[l + 1])]


def iterate(
    model: nn.Sequential, v: list[Tensor], mu_1: Tensor, y: Tensor, step_size: float
) -> tuple[list[Tensor], list[Tensor]]:
    """One strict iteration: (beliefs v_0..v_L, errors eps_1..eps_L)."""
    depth = len(model)
    mu, kept = [mu_1], [None]
    for l in range(1, depth):
        value, saved = _forward(model[l], v[l])
        mu.append(value)
        kept.append(saved)
    errors = [mu[l - 1] - v[l] for l in range(1, depth)] + [_top(mu[-1], y)]
    moved = [
        v[l] + step_size * (errors[l - 1] - _backward(model[l], kept[l], errors[l])) for l in range(1, depth)
    ]
    return [v[0], *moved, v[depth]], errors


def plain_incremental_step(
    model: nn.Sequential, x: Tensor, y: Tensor, step_size: float, num_steps: int, lr: float
) -> list[Tensor]:
    """As :func:`plain_step`: the last iteration's updates of incremental PC; the parameters move in place.

    Salvatori et al. (2024), algorithm 1, with gradient descent on both.
    """
    parameters, v = list(model.parameters()), [x]
    for layer in model[:-1]:
        v.append(_forward(layer, v[-1])[0])
    updates = [torch.zeros_like(p) for p in parameters]
    for _ in range(num_steps):
        mu, kept = zip(*(_forward(layer, value) for layer, value in zip(model, v, strict=True)), strict=True)
        errors = [*(m - value for m, value in zip(mu[:-1], v[1:], strict=True)), _top(mu[-1], y)]
        updates = [
            u for layer, saved, e in zip(model, kept, errors, strict=True) for u in _updates(layer, saved, e)
        ]
        v = [x] + [
            v[l] + step_size * (errors[l - 1] - _backward(model[l], kept[l], errors[l]))
            for l in range(1, len(v))
        ]
        torch._foreach_add_(parameters, updates, alpha=-lr)
    return updates


def _modules(layer: nn.Module) -> list[nn.Module]:
    return list(layer) if isinstance(layer, nn.Sequential) else [layer]


def _top(mu: Tensor, y: Tensor) -> Tensor:
    """d(mean cross-entropy)/dmu_L."""
    return (
        torch.softmax(mu.float() if mu.dtype == torch.bfloat16 else mu, 1) - F.one_hot(y, mu.shape[1])
    ) / len(y)


def _forward(layer: nn.Module, v: Tensor) -> tuple[Tensor, Kept]:
    kept: Kept = []
    for m in _modules(layer):
        if isinstance(m, nn.Linear):
            kept.append(v)
            v = F.linear(v, m.weight, m.bias)
        elif isinstance(m, nn.Conv2d):
            kept.append(v)
            v = F.conv2d(v, m.weight, m.bias, m.stride, m.padding)
        elif isinstance(m, nn.MaxPool2d):
            shape = v.shape
            v, where = F.max_pool2d(v, m.kernel_size, m.stride, return_indices=True)
            kept.append((shape, where))
        elif isinstance(m, nn.Flatten):
            kept.append(v.shape)
            v = v.flatten(1)
        elif isinstance(m, nn.GELU):
            kept.append(v)
            v = F.gelu(v)
        else:
            v = torch.relu(v) if isinstance(m, nn.ReLU) else torch.tanh(v)
            kept.append(v)
    return v, kept


def _through(m: nn.Module, saved, error: Tensor) -> Tensor:
    """The error below one module."""
    if isinstance(m, nn.Linear):
        return error @ m.weight.to(error.dtype)
    if isinstance(m, nn.Conv2d):
        return torch.nn.grad.conv2d_input(saved.shape, m.weight.to(error.dtype), error, m.stride, m.padding)
    if isinstance(m, nn.MaxPool2d):
        shape, where = saved
        below = error.new_zeros(shape).flatten(2)
        return below.scatter_(2, where.flatten(2), error.flatten(2)).view(shape)
    if isinstance(m, nn.Flatten):
        return error.view(saved)
    if isinstance(m, nn.GELU):
        return torch.ops.aten.gelu_backward(error, saved)
    return error * (saved > 0) if isinstance(m, nn.ReLU) else error * (1 - saved * saved)


def _backward(layer: nn.Module, kept: Kept, error: Tensor) -> Tensor:
    """J^T error."""
    for m, saved in zip(reversed(_modules(layer)), reversed(kept), strict=True):
        error = _through(m, saved, error)
    return error


def _updates(layer: nn.Module, kept: Kept, error: Tensor) -> list[Tensor]:
    """(weight, bias) updates of a layer's one affine map."""
    for m, saved in zip(reversed(_modules(layer)), reversed(kept), strict=True):
        if isinstance(m, nn.Linear):
            return [error.T @ saved.to(error.dtype), error.sum(0)]
        if isinstance(m, nn.Conv2d):
            weight = torch.nn.grad.conv2d_weight(
                saved.to(error.dtype), m.weight.shape, error, m.stride, m.padding
            )
            return [weight, error.sum((0, 2, 3))]
        error = _through(m, saved, error)
    return []
