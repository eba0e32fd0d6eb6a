"""How a kernel cuts its matrix product into tiles. Without triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """One configuration of a kernel that multiplies.

    Attributes:
        block_m, block_n: rows and columns of the accumulator.
        block_k: terms of the sums that are multiplied in one step.
        warps: of one program.
        stages: steps whose operands are in flight at once.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """The kernel's constexpr arguments that say so."""
        return dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k)

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n} x {self.block_k}"
