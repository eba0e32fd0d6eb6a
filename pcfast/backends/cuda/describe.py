"""Describes a placement in words, for pcfast.explain."""

from __future__ import annotations

from itertools import groupby

from ...model import spec as specs
from ...precision import Operands
from ..chips import Rates
from ..gpu_constants import Constants
from .roofline import Floor, floors
from .shared_memory import Placement

_OPERANDS = {"ieee": "float32", "tf32": "TF32", "bf16": "bfloat16"}


def describe(network: specs.Network, placed: Placement, constants: Constants) -> list[str]:
    """Describes the kernel, its launch, and per layer the floor and the bytes of its arrays in shared memory."""
    lines = [
        "shared-memory-resident kernel: weights and state in one block's shared memory, forward pass and iterations "
        "in one launch",
        f"{placed.samples} sample{'s' * (placed.samples > 1)} per block, {placed.blocks} blocks of {placed.threads} "
        f"threads, {placed.blocks_per_sm} per SM, {placed.waves} wave{'s' * (placed.waves > 1)}",
        f"{placed.bytes:,} bytes of shared memory per block",
        f"products read {_read(placed.operands)}",
    ]
    least = floors(placed, constants)
    by_home = sorted(placed.arrays, key=lambda array: array.home)
    for home, arrays in groupby(by_home, key=lambda array: array.home):
        sizes = ", ".join(f"{array.name} {array.elements * placed.scalar_bytes:,}" for array in arrays)
        line = f"{network.layers[home - 1].label if home else 'all layers'}: {sizes} bytes"
        lines.append(f"{line}; floor {_clocks(least[home])}" if home > 1 else line)
    rate = constants.shared_memory_bytes_per_clk_sm
    units = _rates(placed.operands, constants.chip.multiply_adds_per_clock)
    lines += [
        f"floor of all layers {_clocks(least[0])}, {least[0].clocks / constants.sm_clock_mhz:.3g} us at "
        f"{constants.sm_clock_mhz:g} MHz",
        f"floors at {units} multiply-adds and {rate:g} bytes of shared memory a clock "
        f"({constants.source['shared_memory_bytes_per_clk_sm']})",
    ]
    lines.append("weight gradients by torch, from errors that the kernel has pulled back to the products")
    return lines


def _clocks(floor: Floor) -> str:
    work = f"{floor.multiply_adds:,} multiply-adds, {floor.bytes:,} bytes of shared memory"
    return f"{floor.clocks:,.0f} clocks an iteration ({work}: {floor.binding})"


def _rates(operands: Operands, rates: Rates) -> str:
    used = dict.fromkeys((operands.linear, operands.convolution))
    return " and ".join(f"{getattr(rates, word):,} {_OPERANDS[word]}" for word in used)


def _read(operands: Operands) -> str:
    if operands.linear == operands.convolution:
        return _OPERANDS[operands.linear]
    return f"{_OPERANDS[operands.linear]} in linear layers, {_OPERANDS[operands.convolution]} in convolutions"
