"""Assertions that a result lies within what pcfast.accuracy allows."""

from __future__ import annotations

import torch

from pcfast.accuracy import ULP, allowed_error, allowed_update_errors

__all__ = ["ULP", "allowed_error", "assert_gradients_agree", "assert_states_agree"]


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
    """Parameter updates against float64 truth (parameter -> update); ``states``: the truth's relaxation."""
    bounds = allowed_update_errors(model, states.beliefs, states.errors, truth, num_steps)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in found} == {names[p] for p in truth}
    for parameter, bound in bounds.items():
        assert float((found[parameter] - truth[parameter]).norm()) <= bound, names[parameter]
