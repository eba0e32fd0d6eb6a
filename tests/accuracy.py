"""Assertions that a result lies within what pcfast.checking.bounds allows."""

from __future__ import annotations

import copy

import numpy as np
import torch

import pcfast
from pcfast.checking.bounds import ULP, allowed_error, allowed_update_errors

__all__ = [
    "ULP",
    "allowed_error",
    "amplification",
    "amplifies_rounding",
    "assert_gradients_agree",
    "assert_states_agree",
]


def amplification(optimizer, step_size) -> float:
    """How much more rounding a belief optimiser may leave in beliefs than plain gradient descent.

    Momentum sums gradients, so an iteration's error counts up to 1 / (1 - momentum) times. Adam's step m / (r + eps),
    r = sqrt(s), changes by |dm| / (r + eps) + |m| |dr| / (r + eps)^2: with |m| about r, by at most 2 / eps of a
    gradient's error.
    """
    if isinstance(optimizer, pcfast.Adam):
        return 1 + 2 * np.max(step_size) / optimizer.eps
    return 1 / (1 - optimizer.momentum)


def amplifies_rounding(model, x, y, truth, iterations: int, **arguments) -> bool:
    """Whether noise in every module's output moves ``truth``, of reference, by an eighth of what bounds allow.

    No two orders of the same sums agree on such a network: its relaxation runs away, or BatchNorm divides by a
    variance of nearly zero. The bounds allow 64 roundings an iteration, the noise being a rounding of 1e-9 here.
    """
    size, noisy = 1e-9, copy.deepcopy(model)
    for layer in noisy:
        for module in layer.modules():  # residual sums, too
            module.register_forward_hook(lambda module, inputs, out: out * (1 + size * torch.randn_like(out)))
    try:
        near = pcfast.relax(noisy, x, y, backend="reference", **arguments)
    except pcfast.RelaxationDiverged:
        return True

    def apart(result, of) -> bool:
        return any(
            e is not None
            and not float((e - e_true).norm()) <= 8 * size * max(iterations, 1) * float(v.norm())
            for e, e_true, v in zip(result, of, truth.beliefs, strict=True)
        )

    return apart(near.beliefs, truth.beliefs) or apart(near.errors, truth.errors)


def assert_states_agree(result, truth, num_steps: int) -> None:
    """Beliefs and errors of one relaxation against float64 truth (objects with .beliefs and .errors)."""
    for l, (v, v_true) in enumerate(zip(result.beliefs, truth.beliefs, strict=True)):
        eps, eps_true = result.errors[l], truth.errors[l]
        if eps_true is None:
            assert eps is None, f"eps_{l}"
            assert torch.equal(v, v_true), f"v_{l}"
            continue
        bound = allowed_error(eps_true, v_true, num_steps)
        assert float((v - v_true).norm()) <= bound, f"v_{l}"
        assert float((eps - eps_true).norm()) <= bound, f"eps_{l}"


def assert_gradients_agree(result: dict, truth: dict, model, states, num_steps: int) -> None:
    """Parameter updates against float64 truth (parameter -> update); ``states``: the truth's relaxation."""
    bounds = allowed_update_errors(model, states.beliefs, states.errors, truth, num_steps)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in result} == {names[p] for p in truth}
    for parameter, bound in bounds.items():
        assert float((result[parameter] - truth[parameter]).norm()) <= bound, names[parameter]
