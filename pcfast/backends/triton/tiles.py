"""Tile sizes of the linear kernels: a pure function from the sizes of a launch to a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...kernels.limits import LOSS_COLUMNS
from ...kernels.tiles import Tiles
from ...model.activations import Activation, Gelu, GeluTanh, LeakyRelu, Relu

#: (M, N, K) of one product.
Product = tuple[int, int, int]


@dataclass(frozen=True)
class LinearTiles(Tiles):
    """Configuration of a launch of linear_predict, linear_feedback or mlp_relaxation. reason: why this one."""

    reason: str

    def count(self, products: Sequence[Product]) -> int:
        """Tiles of a launch."""
        return sum(-(-m // self.block_m) * -(-n // self.block_n) for m, n, _ in products)

    def shared_memory_bytes(self, precision: str, capability: tuple[int, int]) -> int:
        """Of one compiled program: the operands of the steps in flight. tests/kernels/compile_limits.json has them.

        mma.sync reads registers, so that the step that it multiplies is no longer in shared memory.
        """
        reads_shared_memory = capability[0] in (9, 10) and self.block_m >= 64  # wgmma, tcgen05
        steps = self.stages if reads_shared_memory else self.stages - 1
        return steps * (self.block_m + self.block_n) * self.block_k * (2 if precision == "bf16" else 4)


# By what Tensor Cores read. 64 rows are the least that fill a Hopper warp group's wgmma, and with fewer samples
# more rows would only be padding. BLOCK_K is 128 bytes of operands wide, one line of shared memory's swizzle;
# it does not depend on the batch, so neither does the order of sums.
_BLOCK_K = {"bf16": 64, "tf32": 32, "tf32x3": 32}
_STAGES = {"bf16": 4, "tf32": 4, "tf32x3": 3}

#: What the interpreter computes with: sizes that small networks cross, and few programs.
_INTERPRETED_SMALL = LinearTiles(16, 16, 16, 4, 1, "small tiles, so that small networks cross their edges")
_INTERPRETED_LARGE = LinearTiles(64, 64, 64, 4, 1, "the interpreter pays by the tile")
_INTERPRETED_EDGE = 96  # widest layer for which small tiles are interpreted


def linear_tiles(
    products: Sequence[Product],
    precision: str,
    sm_count: int,
    interpreted: bool = False,
    activation: Activation | None = None,
    loss: bool = False,
) -> LinearTiles:
    """The tiles for a launch over ``products``.

    Args:
        precision: "bf16", "tf32" or "tf32x3".
        sm_count: SMs of the GPU.
        interpreted: triton interprets the kernels on the CPU.
        loss: the output's loss follows, which wants its rows whole in LOSS_COLUMNS columns.
        activation: that follows, or None.
    """
    if interpreted:
        widest = max(max(n, k) for _, n, k in products)
        return _INTERPRETED_SMALL if widest <= _INTERPRETED_EDGE else _INTERPRETED_LARGE
    block_k, stages = _BLOCK_K[precision], _STAGES[precision]
    large = LinearTiles(
        128,
        128,
        block_k,
        8,
        stages,
        "large tiles: each operand element is read from L2 once for 128 results",
    )
    if loss:
        return LinearTiles(64, LOSS_COLUMNS, block_k, 8, stages, "the loss wants whole rows in a tile")
    # three products for one, or an activation with exponentials, need the registers of a large accumulator
    cheap = activation is None or isinstance(activation, Relu | LeakyRelu)
    if precision != "tf32x3" and cheap and large.count(products) >= 2 * sm_count:
        return large
    wide = LinearTiles(64, 128, block_k, 8, stages, "64 x 128: larger ones would leave SMs idle, or spill")
    if precision != "tf32x3" and wide.count(products) >= sm_count:
        return wide
    if precision != "bf16" and isinstance(activation, Gelu | GeluTanh):
        return LinearTiles(64, 32, block_k, 8, stages, "float32 operands and GELU take the registers of more")
    return LinearTiles(64, 64, block_k, 8, stages, "the smallest tiles: there are fewer than SMs")


def fused_loop_tiles(precision: str, interpreted: bool = False) -> LinearTiles:
    """The tiles of mlp_relaxation, in which one program works on its samples alone."""
    if interpreted:
        return _INTERPRETED_SMALL
    return LinearTiles(
        16, 64, _BLOCK_K[precision], 4, _STAGES[precision],
        "16 rows are the least of a matrix instruction: as many programs as the batch gives",
    )  # fmt: skip
