"""Sizes and codes that the planner shares with the kernel: a mirror of csrc/resident/geometry.h and its enums.

A compiled module says what it was built with, and :func:`differences` compares before a kernel is launched: Python
needs no compiler to plan, and a mirror that is out of date launches nothing.
"""

from __future__ import annotations

from ...kernels.codes import ACTIVATIONS, AVG_POOL, LOSSES, MAX_POOL, NO_POOL

# the hardware's: csrc/tile/shapes.h
WARP_SIZE = 32
MMA_M, MMA_N = 16, 8
TF32_MMA_K, BF16_MMA_K = 8, 16

# csrc/resident/geometry.h says what each is
MAX_LAYERS = 16
MAX_THREADS = 512
MAX_ELEMENTS = 1 << 16
VEC_SIZE = 4
MAX_GROUP = 4
FEEDBACK_ROWS_PER_LANE = 4
POSITIONS_PER_LANE = 4
CONV_ROWS = (8, 5, 4, 1)
MAX_LINEAR_TILES_M = 4
MAX_CONV_TILES_N = 4
CONV_TILES_M, WIDE_CONV_TILES_M = 4, 2

# csrc/resident/program.h
NO_PRODUCT, COPY, CONV, LINEAR = range(4)
IEEE, TF32, BF16 = range(3)
CROSS_ENTROPY, MSE = LOSSES["cross_entropy"], LOSSES["mse"]
# csrc/resident/activations.cuh, in the order of the Triton kernels' codes
IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, SILU, GELU, GELU_TANH = ACTIVATIONS.values()

_CODES = {"NO_POOL": NO_POOL, "MAX_POOL": MAX_POOL, "AVG_POOL": AVG_POOL}
_MIRRORED = _CODES | {
    name: value for name, value in globals().items() if name.isupper() and not isinstance(value, dict)
}

#: Depth of one mma.sync by the words of pcfast.precision.Operands.
MMA_K = {"tf32": TF32_MMA_K, "bf16": BF16_MMA_K}


def conv_tiles_m(tiles_n: int) -> int:
    """Returns how many tiles of positions a unit of a convolution has beside its tiles of channels."""
    return CONV_TILES_M if tiles_n < MAX_CONV_TILES_N else WIDE_CONV_TILES_M


def differences(constants: str) -> list[str]:
    """Compares with what a compiled module says, "kConvRows 8 5 4 1" and so on; one line for each that differs."""
    compiled = {name: tuple(map(int, values)) for name, *values in map(str.split, constants.splitlines())}
    mirrored = {_in_csrc(name): _as_tuple(value) for name, value in _MIRRORED.items()}
    return [
        f"{name}: {compiled.get(name)} in the module, {mirrored.get(name)} here"
        for name in sorted(compiled.keys() | mirrored.keys())
        if compiled.get(name) != mirrored.get(name)
    ]


def _in_csrc(name: str) -> str:
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
