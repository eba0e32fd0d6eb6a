"""How a product's work is shared out among a block's warps: tiles, groups of samples or positions, and split-K.

A unit is one warp's work. The split of a sum depends on the layer alone, neither on the batch nor on the samples per
block, so that a sample's result has the same bits in any batch.
"""

from __future__ import annotations

from . import geometry as g
from . import kernel_params as p

#: Warps per block: the kernel's registers allow no more.
WARPS = g.MAX_THREADS // g.WARP_SIZE
# A part of a split sum has at least so many vectors per lane, or steps of mma.sync: a shorter one costs more in the
# scratch than it saves.
_MIN_VECTORS = 4
_MIN_STEPS = 4


def padded(size: int, multiple: int = g.VEC_SIZE) -> int:
    return -(-size // multiple) * multiple


def step(operand: str) -> int:
    """Returns the depth of one step along a linear product's sum, by what it reads."""
    return g.MMA_K.get(operand, g.VEC_SIZE)


def share_linear(product: p.Product, operand: str, feedback: bool, samples: int, group: int) -> None:
    """Shares out a linear product.

    Args:
        samples: samples per thread block.
        group: samples per lane of a product in IEEE arithmetic.
    """
    if operand != "ieee":
        _share_linear_tiles(product, operand, samples)
        return
    if feedback:
        rows, sharing = g.WARP_SIZE * g.FEEDBACK_ROWS_PER_LANE, 1
    else:
        product.lanes_log2 = min(_log2(-(-product.out // g.VEC_SIZE)), _log2(g.WARP_SIZE))
        rows, sharing = product.lanes * g.VEC_SIZE, g.WARP_SIZE // product.lanes
    tiles, vectors = -(-product.out // rows), -(-product.channels // g.VEC_SIZE)
    # about one unit per warp, whatever the batch
    splits = min(max(WARPS // tiles, 1), max(vectors // (sharing * _MIN_VECTORS), 1))
    split = -(-vectors // splits)
    _share(product, samples // group, tiles, -(-vectors // split), split * g.VEC_SIZE)


def _share_linear_tiles(product: p.Product, operand: str, samples: int) -> None:
    """Shares out a linear product on Tensor Cores. Tiles of a unit share what they read of the samples."""
    depth, tiles = g.MMA_K[operand], -(-product.out // g.MMA_M)
    product.channels = padded(product.channels, depth)
    steps = product.channels // depth
    max_splits = max(steps // _MIN_STEPS, 1)
    product.tiles = max(min(-(-tiles * max_splits // WARPS), tiles, g.MAX_LINEAR_TILES_M), 1)
    units = -(-tiles // product.tiles)
    split = -(-steps // min(max(WARPS // units, 1), max_splits))
    _share(product, -(-samples // g.MMA_N), units, -(-steps // split), split * depth)


def share_conv(product: p.Product, operand: str, samples: int) -> None:
    """Shares out a convolution, and splits its sum where one sample has too few units for the warps.

    On Tensor Cores the sum runs over terms (channel, tap), whose number it sets.
    """
    area = product.height * product.width
    if operand == "ieee":
        rows = next(rows for rows in g.CONV_ROWS if rows <= product.out)
        if product.out % rows and product.out in (6, 7):
            rows = 8
        product.rows_per_thread = rows
        tiles, positions = -(-product.out // rows), g.WARP_SIZE * g.POSITIONS_PER_LANE
        terms, depth, min_steps = product.channels, 1, 1
    else:
        columns = -(-product.out // g.MMA_N)
        product.tiles = min(1 << _log2(columns), g.MAX_CONV_TILES_N)
        tiles, positions = -(-columns // product.tiles), g.conv_tiles_m(product.tiles) * g.MMA_M
        depth, min_steps = g.MMA_K[operand], _MIN_STEPS
        product.term_count = terms = padded(product.channels * product.taps_y * product.taps_x, depth)
    steps = terms // depth
    splits = min(max(steps // min_steps, 1), max(WARPS // 2 // (-(-area // positions) * tiles), 1))
    split = -(-steps // splits)
    _share(product, -(-samples * area // positions), tiles, -(-steps // split), split * depth)


def share_copy(product: p.Product, samples: int) -> None:
    """Shares out the copy of a layer without weights: a sample per unit."""
    _share(product, samples, 1, 1, 0)


def _share(product: p.Product, groups: int, tiles: int, splits: int, split: int) -> None:
    """Sets the units: groups of samples or positions, tiles of rows, and `splits` parts of the sum, `split` long."""
    product.by_tiles, product.by_splits, product.split = p.divisor(tiles), p.divisor(splits), split
    product.units = groups * tiles * splits


def _log2(size: int) -> int:
    """Returns the logarithm, rounded up."""
    return max(size - 1, 0).bit_length()
