"""The configurations that tuning tries: few, and each compiled without spills on sm_80, sm_90 and sm_100.

tests/kernels/kernel_cases.py compiles them. BLOCK_K is never tuned: it is the order of sums, on which a row's bits
depend.
"""

from __future__ import annotations

from dataclasses import replace

from ..backends.triton.configs import LaunchKey, tuned
from ..backends.triton.tiles import LinearTiles

# (BLOCK_M, BLOCK_N) of tiles of 8 warps. With 4 warps linear_predict spills.
_SHAPES = ((64, 64), (64, 128), (128, 64), (128, 128))
_TOO_LARGE = {"tf32x3": ((128, 128),)}  # spills on sm_80
_STAGES = (2, 3, 4)
# (BLOCK_M, warps) of mlp_relaxation. 32 rows with 4 warps spill.
_FUSED_LOOP = ((16, 4), (16, 8), (32, 8))
# Interpreted, so that tests see another launch: warps and stages mean nothing there.
_INTERPRETED_SHAPES = ((16, 32), (32, 16))
_INTERPRETED_FUSED_LOOP = ((32, 4),)


def candidates(key: LaunchKey, current: LinearTiles, interpreted: bool) -> tuple[LinearTiles, ...]:
    """The tiles to try for a launch beside ``current``, which it has now."""
    if key.kernel == "mlp_relaxation":
        shapes = _INTERPRETED_FUSED_LOOP if interpreted else _FUSED_LOOP
        variants = [replace(current, block_m=block_m, warps=warps) for block_m, warps in shapes]
    elif key.loss:  # whole rows of the output in one subtile of the epilogue: nothing but its rule's shape
        variants = [current]
    else:
        shapes = _INTERPRETED_SHAPES if interpreted else _SHAPES
        large = _TOO_LARGE.get(key.precision, ())
        variants = [
            replace(current, block_m=block_m, block_n=block_n, warps=4 if interpreted else 8)
            for block_m, block_n in shapes
            if (block_m, block_n) not in large
        ]
    stages = (1,) if interpreted else _STAGES
    every = [tuned(replace(tiles, stages=count)) for tiles in variants for count in stages]
    return tuple(tiles for tiles in every if tiles != tuned(current))
