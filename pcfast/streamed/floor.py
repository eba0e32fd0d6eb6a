"""The least time that an iteration can take, layer by layer: products at the matrix units' rate, or state traffic."""

from __future__ import annotations

from dataclasses import dataclass

from .. import network as specs
from ..constants import Constants
from ..forms import LinearForm
from ..planning import gram_macs, layer_macs
from .design import Design


@dataclass(frozen=True)
class Floor:
    """Of one layer, for one iteration in which it is fully live.

    Attributes:
        macs: multiply-adds of its two products (of one, in Gram form).
        bytes: state and operands that its kernels read and write.
        seconds: the larger of both at the GPU's rates; traffic that L2 can hold does not count.
        binding: "matrix units" or "memory".
    """

    macs: int
    bytes: int
    seconds: float
    binding: str


def matrix_rate(precision: str, constants: Constants) -> tuple[float, str]:
    """Multiply-adds a second, and the field of the constants that says so."""
    name = "matmul_bf16_tflops" if precision == "bf16" else "matmul_tf32_tflops"
    flops = getattr(constants, name) * 1e12 / (3 if precision == "tf32x3" else 1)
    return flops / 2, name


def floors(network: specs.Network, shapes: tuple, design: Design, constants: Constants) -> dict[int, Floor]:
    """Layer -> its floor, for layers 2..L."""
    rate, _ = matrix_rate(design.target.precision, constants)
    macs = layer_macs(network, shapes)
    found = {}
    traffic = {l: _traffic(design, l) for l in range(2, design.depth + 1)}
    outside_l2 = (
        sum(traffic.values()) / 2 > constants.l2_bytes
    )  # each array is touched about twice an iteration
    for l, moved in traffic.items():
        products = 2 * macs[l - 1]
        if design.gram and l == 2:
            products = gram_macs(network, shapes)
        by_units = products / rate
        by_memory = moved / (constants.copy_bandwidth_gbs * 1e9) if outside_l2 else 0.0
        binding = "matrix units" if by_units >= by_memory else "memory"
        found[l] = Floor(products, moved, max(by_units, by_memory), binding)
    return found


def _traffic(design: Design, l: int) -> int:
    """Bytes of layer l's predict and of the feedback through it, every array once a stage."""
    batch = next(m.rows for name, m in design.layout.matrices if name.startswith("error"))
    operand = 2 if design.target.separate_operands else 4
    copy = operand if design.target.separate_operands else 0
    above, below = batch * design.boundaries[l].size, batch * design.boundaries[l - 1].size
    form = design.forms[l]
    weights = form.in_features * form.out_features * operand if isinstance(form, LinearForm) else 0
    # predict reads d below, uhat, d and writes the error and delta; feedback reads delta, the error, d and writes d
    predict = below * operand + above * (4 + 4 + 4 + operand)
    feedback = above * operand + below * (4 + 4 + 4 + copy)
    return predict + feedback + 2 * weights
