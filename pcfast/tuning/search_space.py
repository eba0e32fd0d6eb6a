"""The configurations that tuning tries: few, and each compiled without spills on sm_80, sm_90 and sm_100.

tests/kernels/kernel_cases.py compiles them. The reduction is never tuned: it is the order of sums, on which a row's
bits depend.
"""

from __future__ import annotations

from dataclasses import replace

from ..backends.triton.configs import LaunchKey, tuned
from ..backends.triton.tiles import LinearTiles

# (rows, columns) of tiles of 8 warps. With 4 warps linear_predict spills.
_SHAPES = ((64, 64), (64, 128), (128, 64), (128, 128))
_TOO_LARGE = {"tf32x3": ((128, 128),)}  # spills on sm_80
_STAGES = (2, 3, 4)
# (rows, warps) of mlp_relaxation. 32 rows with 4 warps spill.
_WHOLE = ((16, 4), (16, 8), (32, 8))
# Interpreted, so that tests see another launch: warps and stages mean nothing there.
_INTERPRETED_SHAPES = ((16, 32), (32, 16))
_INTERPRETED_WHOLE = ((32, 4),)


def candidates(key: LaunchKey, current: LinearTiles, interpreted: bool) -> tuple[LinearTiles, ...]:
    """The tiles to try for a launch beside ``current``, which it has now."""
    if key.kernel == "mlp_relaxation":
        shapes = _INTERPRETED_WHOLE if interpreted else _WHOLE
        found = [replace(current, rows=rows, warps=warps) for rows, warps in shapes]
    elif key.loss:  # whole rows of the output in one tile, finished in one part: nothing but its rule's shape
        found = [current]
    else:
        shapes = _INTERPRETED_SHAPES if interpreted else _SHAPES
        large = _TOO_LARGE.get(key.precision, ())
        found = [
            replace(current, rows=rows, columns=columns, warps=4 if interpreted else 8)
            for rows, columns in shapes
            if (rows, columns) not in large
        ]
    stages = (1,) if interpreted else _STAGES
    every = [tuned(replace(tiles, stages=count)) for tiles in found for count in stages]
    return tuple(tiles for tiles in every if tiles != tuned(current))
