"""A node of a graph in deviation form: branches that are chains, what merges them, and the chain that follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..model.graph_spec import NodeSpec
from ..model.merging import Concatenate, Merge, Sum, shapes_apart
from ..precision import Precision
from .chain import Chain, Composite, chain_of
from .step import Gradients

#: What a node's error is for each input: the input's branch, and the error at that branch's output.
Pulls = list[tuple[Chain, Tensor]]


def node_at_work(spec: NodeSpec, model: nn.Module, precision: Precision) -> Node | PriorNode | None:
    """The node that ``spec`` describes; None for a root without a prior."""
    if spec.kind == "root":
        return None
    if spec.kind == "prior":
        return PriorNode(model._modules[spec.name], precision)
    return Node(spec, model, precision)


class Node(Composite):
    """f_k of one or several inputs, with the verbs of a chain.

    Attributes:
        branches: one an input.
        owned: nobody else holds what the last :meth:`deviate` gave.
    """

    def __init__(self, spec: NodeSpec, model: nn.Module, precision: Precision) -> None:
        self._spec = spec
        self.branches = [chain_of(ops, model, precision) for ops in spec.branches]
        self._tail = chain_of(spec.tail, model, precision)
        super().__init__((*self.branches, self._tail))
        self._merge: Merge | None = None
        if spec.kind == "merge":
            self._merge = Sum() if spec.merge == "Sum" else Concatenate(dim=spec.dim)
        self.owned = False

    def forward(self, inputs: Sequence[Tensor], rows: int) -> Tensor:
        """The prediction at the base point."""
        parts = [branch.forward(v) for branch, v in zip(self.branches, inputs, strict=True)]
        if self._merge is None:
            return parts[0]
        self._shapes = [part.shape for part in parts]
        try:
            self._merge.merged_shape([tuple(shape) for shape in self._shapes])
        except ValueError as needed:  # behind a module that hides its shape
            shapes = [tuple(shape) for shape in self._shapes]
            raise shapes_apart(shapes, str(needed), self._spec.label) from None
        return self._tail.forward(self._merge.merge(parts))

    def deviate(self, moves: Sequence[Tensor | None], *, shifts: bool = False) -> Tensor | None:
        """What the prediction differs by from its base; None where it does not.

        Args:
            moves: of every input what its value differs by; None for zero.
            shifts: parameters move, too (:meth:`refresh`).
        """
        parts: list[Tensor | None] = []
        for branch, d in zip(self.branches, moves, strict=True):
            parts.append(branch.deviate(d) if d is not None else branch.param_shift() if shifts else None)
        merged = self._merged(parts)
        if not self._tail.steps:
            return merged
        if merged is None:
            merged = self._tail.param_shift() if shifts else None
            self.owned = False
            return merged
        merged_owned, self.owned = self.owned, self._tail.owned
        return self._tail.deviate(merged, owned=merged_owned)

    def _merged(self, parts: list[Tensor | None]) -> Tensor | None:
        given = [i for i, part in enumerate(parts) if part is not None]
        if not given:
            return None
        if isinstance(self._merge, Concatenate):
            self.owned = True
            like = parts[given[0]]
            filled = [
                like.new_zeros(shape) if part is None else part
                for part, shape in zip(parts, self._shapes, strict=True)
            ]
            return self._merge.merge(filled)
        total, self.owned = parts[given[0]], self.branches[given[0]].owned
        for i in given[1:]:
            total = total.add_(parts[i]) if self.owned else total + parts[i]
            self.owned = True
        return total

    def at(self, moves: Sequence[Tensor | None]) -> None:
        """Make the inputs' values the current point."""
        if self._tail.steps:
            merged = self._merged(
                [
                    None if d is None else branch.deviate(d)
                    for branch, d in zip(self.branches, moves, strict=True)
                ]
            )
            if merged is not None:
                self._tail.at(merged)
            return
        for branch, d in zip(self.branches, moves, strict=True):
            if d is not None:
                branch.at(d)

    def pulls(self, e: Tensor, wanted: Sequence[bool]) -> list[tuple[Chain, Tensor] | None]:
        """For every input its branch and the error at that branch's output; None where it is not wanted.

        The branch's pullback of it is J^T e for that input.
        """
        if not any(wanted):
            return [None] * len(wanted)
        parts = self._split(self._tail.pullback(e))
        return [
            (branch, part) if want else None
            for branch, part, want in zip(self.branches, parts, wanted, strict=True)
        ]

    def _split(self, e: Tensor) -> list[Tensor]:
        """The error at every branch's output from that of what they are merged to."""
        if isinstance(self._merge, Concatenate):
            dim = self._merge.dim
            return list(e.split([shape[dim] for shape in self._shapes], dim))
        return [e] * len(self.branches)

    def differentiate(
        self, e: Tensor, wanted: Sequence[bool], *, need_gradients: bool = True, factor: float = 1.0
    ) -> tuple[Gradients, list[Tensor | None]]:
        """``(gradients for factor * e, J^T e for every input that is wanted)``."""
        below = any(wanted) or (need_gradients and any(branch.has_gradients for branch in self.branches))
        result: Gradients = []
        if self._tail.steps:
            result, e = self._tail.differentiate(
                e, need_input=below, need_gradients=need_gradients, factor=factor
            )
        pulled: list[Tensor | None] = [None] * len(wanted)
        if below:
            for i, (branch, part) in enumerate(zip(self.branches, self._split(e), strict=True)):
                found, pulled[i] = branch.differentiate(
                    part, need_input=wanted[i], need_gradients=need_gradients, factor=factor
                )
                result = result + found
        return result, pulled

    def gradients(self, e: Tensor) -> Gradients:
        return self.differentiate(e, [False] * len(self.branches))[0]


class PriorNode:
    """The mean of a Gaussian prior, with the verbs of :class:`Node`: it has no inputs."""

    branches: tuple[Chain, ...] = ()
    owned = False

    def __init__(self, module, precision: Precision) -> None:
        self._module, self._precision = module, precision
        self._shift: Tensor | None = None

    def forward(self, inputs: Sequence[Tensor], rows: int) -> Tensor:
        self._rows = rows
        return self._precision.to_state(self._module.mean.detach()).expand(rows, *self._module.shape).clone()

    def deviate(self, moves: Sequence[Tensor | None], *, shifts: bool = False) -> Tensor | None:
        return self._shift if shifts else None

    def at(self, moves: Sequence[Tensor | None]) -> None:
        """Nothing to evaluate."""

    def pulls(self, e: Tensor, wanted: Sequence[bool]) -> list:
        return []

    def differentiate(
        self, e: Tensor, wanted: Sequence[bool], *, need_gradients: bool = True, factor: float = 1.0
    ) -> tuple[Gradients, list[Tensor | None]]:
        return (self.gradients(e * factor) if need_gradients else []), []

    def gradients(self, e: Tensor) -> Gradients:
        return [(self._module.mean, e.sum(0))] if self.has_gradients else []

    def zero_gradients(self) -> Gradients:
        return [(self._module.mean, torch.zeros_like(self._module.mean))] if self.has_gradients else []

    @property
    def has_gradients(self) -> bool:
        return self._module.mean.requires_grad

    def snapshot_params(self) -> None:
        self._held = self._module.mean.detach().clone()

    def refresh(self) -> None:
        if self.has_gradients:
            moved = self._precision.to_state(self._module.mean.detach() - self._held)
            self._shift = moved.expand(self._rows, *self._module.shape).clone()

    def update_statistics(self, failed: Tensor | None) -> None:
        """A prior has none."""

    def undo(self) -> None:
        """Nothing has moved."""
