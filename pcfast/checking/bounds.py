"""How far a result may lie from the reference in float64 (docs/method.md, "How results are judged")."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..support.replay import recorded_buffers

ULP = 2.0**-52
#: Of a float64 result's own norm.
FLOAT64_SHARE = 1e-10
#: In lower precision: times the larger of what backpropagation and a forward pass lose in it.
FACTOR = 3.0


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, Frobenius norms; |found| where the truth is zero."""
    scale = float(truth.double().norm())
    return float((result.double() - truth.double()).norm()) / (scale or 1.0)


def rounding(belief: Tensor, num_steps: int) -> float:
    """What the literal loop itself may lose in float64 in a layer's belief and error: 64 * 2^-52 * n * |v|."""
    return 64 * ULP * max(num_steps, 1) * float(belief.norm())


def allowed_error(error: Tensor, belief: Tensor, num_steps: int) -> float:
    """float64 bound on errors and beliefs: 1e-10 |eps| + 64 * 2^-52 * n * |v|."""
    return FLOAT64_SHARE * float(error.norm()) + rounding(belief, num_steps)


def same_precision_bound(backpropagation: float, forward: float) -> float:
    """Bound on a relative error in float32, TF32 or bfloat16.

    Args:
        backpropagation: what same-precision backpropagation loses on that network (its worst tensor).
        forward: what a forward pass in that precision costs the float64 reference (:func:`with_forward_errors_of`).
    """
    return FACTOR * max(backpropagation, forward)


def carried_to_updates(
    model: nn.Sequential,
    beliefs: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    bounds: Sequence[float],
) -> dict[nn.Parameter, float]:
    """Parameter -> how far its update may move where eps_l and v_l move by ``bounds[l]``; lists over l = 0..L.

    dW = delta^T v: it moves by at most b(eps_l) |v_{l-1}| + |eps_l| b(v_{l-1}), times the norm of what stands
    between inside the layer (``gain``). A parameter of several layers gets the sum. ``errors[0]`` is not read.
    """
    carried: dict[nn.Parameter, float] = {}
    for l, layer in enumerate(model, start=1):
        eps, below = errors[l], beliefs[l - 1]
        # biases see the sum over the batch (and positions): sqrt(elements) instead of |v_{l-1}|
        moved = bounds[l] * (float(below.norm()) + eps.numel() ** 0.5) + float(eps.norm()) * bounds[l - 1]
        owners = [m for m in layer.modules() if next(m.parameters(recurse=False), None) is not None]
        gain = 1.0
        if len(owners) > 1:
            for parameter in layer.parameters():
                gain *= max(1.0, float(parameter.detach().norm()))
        for parameter in layer.parameters():
            carried[parameter] = carried.get(parameter, 0.0) + gain * moved
    return carried


def allowed_update_errors(
    model: nn.Sequential,
    beliefs: Sequence[Tensor],
    errors: Sequence[Tensor | None],
    updates: dict[nn.Parameter, Tensor],
    num_steps: int,
) -> dict[nn.Parameter, float]:
    """float64 bound on the updates: 1e-10 |update|, and the states' bounds carried through."""
    bounds = [
        0.0 if eps is None else allowed_error(eps, v, num_steps)
        for eps, v in zip(errors, beliefs, strict=True)
    ]
    carried = carried_to_updates(model, beliefs, errors, bounds)
    return {p: FLOAT64_SHARE * float(update.norm()) + carried[p] for p, update in updates.items()}


def with_forward_errors_of(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """A float64 copy of ``model`` that rounds as torch's forward pass at ``x`` does in the ambient precision.

    Each module with parameters of its own, and each PC layer, adds the constant that brings its output at ``x``
    to what ``model(x)`` gave; one that runs more than once in a pass, or gives no tensor, adds none. It holds the
    relu kinks that rounding pushes units over, and is independent of the backend under test.

    Args:
        model: float32, on x's device; it stays as it is. x: (B, ...), float32.
    """
    noisy = copy.deepcopy(model)
    owners = [m for m in noisy.modules() if next(m.parameters(recurse=False), None) is not None]
    rounded: dict[nn.Module, list] = {m: [] for m in (*owners, *noisy)}

    def record(module, _, output) -> None:
        # a clone, as an in-place activation may follow
        rounded[module].append(output.detach().clone() if isinstance(output, Tensor) else None)

    hooks = [module.register_forward_hook(record) for module in rounded]
    with torch.no_grad(), recorded_buffers(noisy)():
        noisy(x.clone())
    for hook in hooks:
        hook.remove()

    noisy.double()
    offsets: dict[nn.Module, Tensor] = {}

    def add_offset(module, _, output):
        if module not in offsets:  # its first call, at x, with everything before it rounded already
            (target,) = rounded[module]
            offsets[module] = target.double() - output.detach()
        return output + offsets[module]

    for module, outputs in rounded.items():
        if len(outputs) == 1 and outputs[0] is not None:
            module.register_forward_hook(add_offset)
    with torch.autocast(x.device.type, enabled=False), torch.no_grad(), recorded_buffers(noisy)():
        noisy(x.double())
    return noisy
