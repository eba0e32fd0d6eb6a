"""Modules of several inputs: how a node of a graph merges what its inputs give it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ShapeError


class Merge(nn.Module):
    """One branch for each input; their outputs become one tensor.

    Branches are children named "0", "1", ... Without branches every input is taken as it is.
    """

    def __init__(self, *branches: nn.Module | None) -> None:
        super().__init__()
        for index, branch in enumerate(branches):
            self.add_module(str(index), nn.Identity() if branch is None else branch)

    @property
    def branches(self) -> tuple[nn.Module, ...]:
        return tuple(self._modules.values())

    def check_inputs(self, count: int, where: str = "") -> None:
        """Raise ArgumentError where there are branches, but not one for each of ``count`` inputs."""
        if self.branches and len(self.branches) != count:
            raise ArgumentError(
                "inputs", f"{count} of them{where} for {len(self.branches)} branches of a {type(self).__name__}",
                "one branch for each input, in the same order", "None stands for a branch that changes nothing.",
            )  # fmt: skip

    def forward(self, *inputs: Tensor) -> Tensor:
        self.check_inputs(len(inputs))
        branches = self.branches or [nn.Identity()] * len(inputs)
        return self.merge([branch(v) for branch, v in zip(branches, inputs, strict=True)])

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The branches' outputs as one tensor.

        Raises:
            ShapeError: they do not fit together.
        """
        raise NotImplementedError

    def merged_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that :meth:`merge` gives; raises ValueError in words."""
        raise NotImplementedError


class Sum(Merge):
    """f_1(v_1) + f_2(v_2) + ...: a node of a graph that adds what its inputs give it.

        pcfast.Sum(nn.Linear(64, 10), nn.Linear(128, 10))      # one branch for each input
        pcfast.Sum(nn.Linear(64, 10), None)                    # the second input as it is: a skip
        pcfast.Sum()                                           # all inputs as they are

    Further operations follow in an ``nn.Sequential`` that begins with it. All branches give one shape, (B, ...).

    Raises, when called:
        ShapeError: the branches' outputs have different shapes.
        ArgumentError: there is not one branch for each input.
    """

    def merge(self, parts):
        try:
            self.merged_shape([tuple(part.shape) for part in parts])
        except ValueError as needed:
            raise shapes_apart([tuple(part.shape) for part in parts], str(needed), "a Sum") from None
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def merged_shape(self, shapes):
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("equal shapes, which are added element by element")
        return shapes[0]


class Concatenate(Merge):
    """The branches' outputs one after the other along ``dim``: torch.cat, as a node of a graph.

    Made like :class:`Sum`.

    Args:
        dim: >= 1; the first dimension is the batch.

    Raises, when called:
        ShapeError: the outputs differ in another dimension.
        ArgumentError: there is not one branch for each input.
    """

    def __init__(self, *branches: nn.Module | None, dim: int = 1) -> None:
        super().__init__(*branches)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ArgumentError("dim", repr(dim), "an int >= 1", "Dimension 0 is the batch.")
        self.dim = dim

    def merge(self, parts):
        try:
            self.merged_shape([tuple(part.shape) for part in parts])
        except ValueError as needed:
            raise shapes_apart([tuple(part.shape) for part in parts], str(needed), "a Concatenate") from None
        return torch.cat(list(parts), self.dim)

    def merged_shape(self, shapes):
        dim = self.dim
        if any(len(shape) <= dim for shape in shapes):
            raise ValueError(f"at least {dim + 1} dimensions each")
        if any(
            (*shape[:dim], *shape[dim + 1 :]) != (*shapes[0][:dim], *shapes[0][dim + 1 :]) for shape in shapes
        ):
            raise ValueError(f"shapes that are equal but for dimension {dim}")
        return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def shapes_apart(shapes: Sequence[tuple[int, ...]], needed: str, where: str) -> ShapeError:
    """The error of branches whose outputs do not fit together."""
    return ShapeError(
        "model", f"branches of shapes {', '.join(map(str, shapes))} at {where}", needed,
        "Give a branch a module that changes its shape, e.g. nn.Linear or a strided nn.Conv2d.",
    )  # fmt: skip
