"""What the CPU kernels do with a plan, in words, for pcfast.explain."""

from __future__ import annotations

import math

import torch

from ...kernels.codes import ACTIVATIONS
from ...model.activations import Gelu, GeluTanh, Sigmoid, Silu, Tanh
from ...problem.plan import Plan
from ...support import cpu_module
from .program import Layer, Pointwise, layers_of
from .speed import ROWS, natively

_VECTOR_BYTES = {"avx2": 32, "avx512": 64}  # of the others 16
# saved_planes of csrc/cpu/activations.h, by code
_PLANES = {Tanh: 1, Gelu: 1, Sigmoid: 2, Silu: 2, GeluTanh: 2}
_SAVED = {ACTIVATIONS[kind]: planes for kind, planes in _PLANES.items()}


def describe(plan: Plan) -> list[str]:
    """The call, its threads, and what lies in a core's cache."""
    form = natively(plan)
    if not form:
        return ["no loop: one forward and one backward pass through torch"]
    if form == ROWS:
        return [
            "one native call: one forward and one backward pass over rows of samples, products by torch's BLAS, and "
            "biases, activations, derivatives and checks fused between them"
        ]
    layers, size, threads = layers_of(plan.network, plan.shapes), plan.dtype.itemsize, torch.get_num_threads()
    used = cpu_module.load().used()
    group = 2 * _VECTOR_BYTES.get(used, 16) // size
    looped = layers[1:] if plan.gram else layers
    state = sum(_state(layer, momentum=plan.belief_optimizer.momentum > 0) for layer in looped) * group * size
    weights = sum(layer.weights for layer in layers[1:]) * size
    lines = [
        "one native call: forward pass, loss, iterations, local errors and weight gradients",
        f"instruction set {used}, {threads} thread{'s' * (threads > 1)} of torch's",
        f"{math.ceil(plan.x_shape[0] / group)} lane groups of up to {group} samples, each with one thread and at "
        f"most {state:,} bytes of state",
        f"{weights:,} bytes of weights above layer 1, packed for both products",
    ]
    return lines


def _state(layer: Layer, *, momentum: bool) -> int:
    """Elements a sample that an iteration reads and writes.

    What stands before and behind the product, d, the velocity, a skip's error.
    """
    entry = _kept(layer.entry) if layer.entry.acts else 0
    return entry + _kept(layer.tail) + math.prod(layer.tail.to) * (1 + momentum + layer.skip)


def _kept(op: Pointwise) -> int:
    """What an operation reads at the start, and what is saved with it."""
    return math.prod(op.from_) * (1 + _SAVED.get(op.before[0], 0))
