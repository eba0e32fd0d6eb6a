"""Where every matrix of a relaxation lies in two arenas: a pure description, and the memory for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.limits import ROW_MULTIPLE

# Matrices start at multiples of so many elements: of more than any vector access needs.
_MATRIX_MULTIPLE = 4 * ROW_MULTIPLE


@dataclass(frozen=True)
class Matrix:
    """Row-major (rows, columns) with ``stride`` elements between rows, from element ``first`` of its arena on."""

    operand: bool  # in the operand arena
    first: int
    rows: int
    columns: int
    stride: int

    @property
    def elements(self) -> int:
        return self.rows * self.stride


class LayoutBuilder:
    """Places matrices one after another, state in one arena and operands of their own dtype in another."""

    def __init__(self) -> None:
        self._sizes = {False: 0, True: 0}
        self.matrices: dict[str, Matrix] = {}

    def add(
        self, name: str, rows: int, columns: int, stride: int | None = None, *, operand: bool = False
    ) -> Matrix:
        matrix = Matrix(operand, self._sizes[operand], rows, columns, stride or columns)
        self._sizes[operand] += -(-matrix.elements // _MATRIX_MULTIPLE) * _MATRIX_MULTIPLE
        self.matrices[name] = matrix
        return matrix

    def layout(self) -> Layout:
        return Layout(tuple(self.matrices.items()), max(self._sizes[False], 1), self._sizes[True])


@dataclass(frozen=True)
class Layout:
    """Named matrices; sizes of the arenas in elements. Without operands there is one arena."""

    matrices: tuple[tuple[str, Matrix], ...]
    state_elements: int
    operand_elements: int


class Arena:
    """The memory: zeros, except for what is copied in. Zeros are the state at the forward pass, and the padding."""

    def __init__(
        self, layout: Layout, device: torch.device, state: torch.dtype, operand: torch.dtype
    ) -> None:
        self.layout = layout
        self.state = torch.zeros(layout.state_elements, dtype=state, device=device)
        self.operand = self.state
        if layout.operand_elements:
            self.operand = torch.zeros(layout.operand_elements, dtype=operand, device=device)
        self._matrices = dict(layout.matrices)

    def __contains__(self, name: str) -> bool:
        return name in self._matrices

    def matrix(self, name: str) -> Tensor:
        """View (rows, columns) of a matrix."""
        m = self._matrices[name]
        return (self.operand if m.operand else self.state).as_strided(
            (m.rows, m.columns), (m.stride, 1), m.first
        )
