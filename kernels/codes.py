"""Codes by which kernels are told activations, pools and losses. Without triton."""

from __future__ import annotations

from pcfast.model.activations import Activation, Gelu, GeluTanh, LeakyRelu, Relu, Sigmoid, Silu, Tanh

NO_POOL, MAX_POOL, AVG_POOL = range(3)
LOSSES = {"cross_entropy": 0, "mse": 1}
ACTIVATIONS = {type(None): 0, Relu: 1, LeakyRelu: 2, Tanh: 3, Sigmoid: 4, Silu: 5, Gelu: 6, GeluTanh: 7}


def activation_code(activation: Activation | None) -> tuple[int, float]:
    """Code and negative slope of an activation; None is the identity.

    Raises:
        KeyError: the activation has no device code.
    """
    return ACTIVATIONS[type(activation)], float(getattr(activation, "negative_slope", 0.0))
