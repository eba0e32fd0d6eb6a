"""How far a result may lie from float64 (docs/method.md)."""

from __future__ import annotations

import torch
from torch import Tensor

ULP = 2.0**-52


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|, Frobenius norms; |found| where the truth is zero."""
    scale = float(truth.double().norm())
    return float((found.double() - truth.double()).norm()) / (scale or 1.0)


def allowed_error(error: Tensor, belief: Tensor, num_steps: int) -> float:
    """float64 bound on errors and beliefs: 1e-10 |eps| + 64 * 2^-52 * n * |v|."""
    return 1e-10 * float(error.norm()) + 64 * ULP * max(num_steps, 1) * float(belief.norm())


def assert_states_agree(found, truth, num_steps: int) -> None:
    """Beliefs and errors of one relaxation against float64 truth (objects with .beliefs and .errors)."""
    for l, (v, v_true) in enumerate(zip(found.beliefs, truth.beliefs, strict=True)):
        eps, eps_true = found.errors[l], truth.errors[l]
        if eps_true is None:
            assert eps is None, f"eps_{l}"
            assert torch.equal(v, v_true), f"v_{l}"
            continue
        bound = allowed_error(eps_true, v_true, num_steps)
        assert float((v - v_true).norm()) <= bound, f"v_{l}"
        assert float((eps - eps_true).norm()) <= bound, f"eps_{l}"


def assert_gradients_agree(found: dict, truth: dict, model, states, num_steps: int) -> None:
    """Parameter updates against float64 truth: the states' bound carried through.

    dW = delta^T v: an error of the state bound b in eps_l and v_{l-1} moves it by at most
    b(eps_l) |v_{l-1}| + |eps_l| b(v_{l-1}), times the norm of what stands between inside the layer (``gain``).
    """
    for l, layer in enumerate(model, start=1):
        eps, v, below = states.errors[l], states.beliefs[l], states.beliefs[l - 1]
        eps_below = states.errors[l - 1]
        below_bound = 0.0 if eps_below is None else allowed_error(eps_below, below, num_steps)
        carried = allowed_error(eps, v, num_steps) * float(below.norm()) + float(eps.norm()) * below_bound
        # biases see the sum over the batch (and positions): sqrt(elements) instead of |v_{l-1}|
        carried += allowed_error(eps, v, num_steps) * eps.numel() ** 0.5
        owners = [m for m in layer.modules() if next(m.parameters(recurse=False), None) is not None]
        gain = 1.0
        if len(owners) > 1:
            for parameter in layer.parameters():
                gain *= max(1.0, float(parameter.detach().norm()))
        for name, parameter in layer.named_parameters():
            g, g_true = found[parameter], truth[parameter]
            bound = 1e-10 * float(g_true.norm()) + gain * carried
            assert float((g - g_true).norm()) <= bound, f"layer {l} {name}"
