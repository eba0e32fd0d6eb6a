"""Where a layer's values lie in memory: one row a sample, maps channels-last."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ...kernels.limits import ROW_MULTIPLE
from ...model import spec as specs
from ..kernel_forms import maps


def padded(size: int) -> int:
    """``size`` rounded up to what rows are padded to; the padding stays zero, so that it may be multiplied."""
    return -(-size // ROW_MULTIPLE) * ROW_MULTIPLE


@dataclass(frozen=True)
class Boundary:
    """Between two layers.

    Attributes:
        shape: of one sample, as torch has it.
        map: (channels, height, width) where a sample lies in memory as (height, width, channels), flattened or not;
            None where it lies as in ``shape``.
    """

    shape: tuple[int, ...]
    map: tuple[int, int, int] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stride(self) -> int:
        """Elements between samples. Maps are not padded, so that torch's convolutions can read them."""
        return padded(self.size) if self.map is None else self.size

    @property
    def permuted(self) -> bool:
        """True where a sample's order in memory is not torch's."""
        return self.map is not None and self.map[0] > 1 and self.map[1] * self.map[2] > 1

    def logical(self, matrix: Tensor) -> Tensor:
        """(batch, size) in memory order -> (batch, *shape) as torch has it; a view where that is possible."""
        if self.map is None:
            return matrix.reshape(-1, *self.shape)
        channels, height, width = self.map
        value = matrix.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return value if len(self.shape) == 3 else value.reshape(-1, *self.shape)

    def in_memory(self, value: Tensor) -> Tensor:
        """(batch, *shape) as torch has it -> (batch, size) in memory order; a view where that is possible."""
        if self.map is None:
            return value.reshape(-1, self.size)
        channels, height, width = self.map
        return value.reshape(-1, channels, height, width).permute(0, 2, 3, 1).reshape(-1, self.size)

    def weight_in_memory(self, weight: Tensor) -> Tensor:
        """W (out, size) with its columns in memory order."""
        return self.in_memory(weight) if self.permuted else weight

    def image(self, matrix: Tensor) -> Tensor:
        """(batch, size) in memory order -> (batch, height, width, channels); features have one pixel."""
        channels, height, width = self.map or (self.size, 1, 1)
        return as_image(matrix, height, width, channels)


def as_image(matrix: Tensor, height: int, width: int, channels: int) -> Tensor:
    """(batch, height * width * channels), rows at any stride -> (batch, height, width, channels), a view."""
    return matrix.as_strided(
        (matrix.shape[0], height, width, channels),
        (matrix.stride(0), width * channels, channels, 1),
        matrix.storage_offset(),
    )


def boundaries(network: specs.Network, shapes: tuple) -> tuple[Boundary, ...]:
    """Of v_0..v_L. ``shapes``: as :meth:`pcfast.model.spec.Network.shapes` gives them, none hidden."""
    ends = [shapes[0][0], *(inner[-1] for inner in shapes)]
    return tuple(Boundary(end[1:], map) for end, map in zip(ends, maps(network, shapes), strict=True))
