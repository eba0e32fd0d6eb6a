"""The least time that an iteration can take, layer by layer: products on Tensor Cores, or state traffic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...model import spec as specs
from ...problem.plan import gram_macs
from ..gpu_constants import Constants
from ..kernel_forms import PointwiseForm
from .conv_form import ConvForm
from .launch_plan import CompileTarget, Design


@dataclass(frozen=True)
class Floor:
    """Of one layer, for one iteration in which it is fully live.

    Attributes:
        macs: multiply-adds of its two products (in Gram form of one, with the Gram matrix).
        bytes: state and operands that its stages have to read and write, each once; what one launch leaves for the
            next is not among them.
        seconds: the larger of both at the GPU's rates; traffic that L2 can hold does not count.
        binding: "Tensor Cores" or "memory".
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
    target = design.target
    rates = {kind: matrix_rate(precision, constants)[0] for kind, precision in _precisions(target).items()}
    traffic = {l: _traffic(network, design, l) for l in range(2, design.depth + 1)}
    outside_l2 = (
        sum(traffic.values()) / 2 > constants.l2_bytes
    )  # each array is touched about twice an iteration
    by_layer = {}
    for l, moved in traffic.items():
        products = _products(network, shapes, design, l)
        by_products = sum(macs / rates[kind] for kind, macs in products.items())
        by_memory = moved / (constants.copy_bandwidth_gbs * 1e9) if outside_l2 else 0.0
        binding = "Tensor Cores" if by_products >= by_memory else "memory"
        by_layer[l] = Floor(sum(products.values()), moved, max(by_products, by_memory), binding)
    return by_layer


def _precisions(target: CompileTarget) -> dict[type, str]:
    """Precision of products by the operation that they belong to: torch has a switch for each."""
    return {specs.Linear: target.precision, specs.Conv2d: target.convolutions}


def rate_names(network: specs.Network, target: CompileTarget, constants: Constants) -> set[str]:
    """Fields of the constants that the floors of a network rest on."""
    kinds = {type(op) for layer in network.layers[1:] for op in layer.ops}
    return {
        matrix_rate(precision, constants)[1]
        for kind, precision in _precisions(target).items()
        if kind in kinds
    }


def _products(network: specs.Network, shapes: tuple, design: Design, l: int) -> dict[type, int]:
    """Multiply-adds of layer l in an iteration, by the kind of operation."""
    macs = {specs.Linear: 0, specs.Conv2d: 0}
    for i, (op, shape) in enumerate(zip(network.layers[l - 1].ops, shapes[l - 1][:-1], strict=True)):
        if type(op) in macs:
            in_gram_form = design.gram and l == 2 and i == 0
            macs[type(op)] += gram_macs(network, shapes) if in_gram_form else 2 * op.macs(shape)
    return macs


def _weights(network: specs.Network, design: Design, l: int) -> int:
    """Elements of the matrices that layer l multiplies by in one stage."""
    count = 0
    for i, op in enumerate(network.layers[l - 1].ops):
        in_gram_form = design.gram and l == 2 and i == 0
        if isinstance(op, specs.Linear):
            count += op.out_features * (op.out_features if in_gram_form else op.in_features)
        elif isinstance(op, specs.Conv2d):
            taps = math.prod(2 * k - 1 for k in op.kernel) if in_gram_form else math.prod(op.kernel)
            count += (
                taps * op.out_channels * (op.out_channels if in_gram_form else op.in_channels // op.groups)
            )
    return count


def inner_size(design: Design, l: int) -> int:
    """Elements of a sample's uhat: of what the layer's tail reads, before it is pooled."""
    form = design.forms[l]
    if isinstance(form, PointwiseForm):
        return math.prod(form.inner)
    if isinstance(form, ConvForm):
        return math.prod(form.geometry.out) * form.geometry.out_channels
    return design.boundaries[l].size


def _traffic(network: specs.Network, design: Design, l: int) -> int:
    """Bytes of layer l's predict and of the feedback through it, every array once a stage."""
    state, operand = 4, design.target.operand_bytes
    batch = next(m.rows for name, m in design.layout.matrices if name.startswith("error"))
    above, below = batch * design.boundaries[l].size, batch * design.boundaries[l - 1].size
    inner, weights = batch * inner_size(design, l), operand * _weights(network, design, l)
    if not weights:
        operand = state  # what is elementwise alone works on the state
    # read: uhat and d, at the top vhat and the target instead of d; written: the error and delta
    epilogue = state * inner + above * (state * (3 if l == design.depth else 2) + operand)
    if design.gram and l == 2:
        # s stands for the product; s and its sum move, with momentum their velocities too
        moved = 4 * state * inner * (2 if design.momentum else 1)
        return epilogue + state * inner + operand * above + moved + weights
    copied = operand if design.target.copies(design.forms[l]) else 0
    predict = operand * below + epilogue + weights
    # the error below is read, layer 1's written; velocities are read and written
    arrays = 5 if design.momentum else 3
    feedback = operand * above + below * (arrays * state + copied) + weights
    return predict + feedback
