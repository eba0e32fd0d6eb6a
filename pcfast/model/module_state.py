"""Modules as they were, and whether they still are: comparisons alone, of what :mod:`pcfast.model.snapshot` lists.

Every step asks, and a network of 33 layers has 98 modules: hence no loop but those of map, chain and comparisons of
lists.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain

from torch import Tensor, nn

_hooks_of = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_children_of = operator.itemgetter("_modules")
_parameters_of = operator.itemgetter("_parameters")
_buffers_of = operator.itemgetter("_buffers")
_facts_of = operator.attrgetter("shape", "dtype", "requires_grad")

_flat = chain.from_iterable


class ModuleState:
    """What modules hold, as of now.

    Attributes:
        hooked: a module has hooks.
        moves: how often :meth:`moved` has found tensors elsewhere.

    Args:
        dicts: the attributes of all modules.
        containers, parametrised: those among them that may hold other modules, and parameters.
        modules: whose classes count.
        tensors: parameters and buffers whose shapes, dtypes and flags count.

    Raises:
        AttributeError, KeyError, RuntimeError: modules or tensors that are made otherwise than torch's.
    """

    def __init__(
        self,
        dicts: Sequence[dict],
        containers: Sequence[dict],
        parametrised: Sequence[dict],
        modules: Sequence[nn.Module],
        tensors: Sequence[Tensor],
    ) -> None:
        self._dicts, self._modules, self._tensors = list(dicts), list(modules), list(tensors)
        self._containers, self._parametrised = list(containers), list(parametrised)
        self._buffered = [module for module in dicts if _buffers_of(module)]
        self._bufferless = [module for module in dicts if not _buffers_of(module)]
        self._sizes = list(map(len, self._dicts))
        self._classes = list(map(type, self._modules))
        self._names, self._children = self._children_now()
        self._held = self._held_now()
        self._facts = list(map(_facts_of, self._tensors))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self.moves = 0
        self.hooked = any(_flat(map(_hooks_of, self._dicts)))

    def _children_now(self) -> tuple[list[str], list[nn.Module | None]]:
        children = list(map(_children_of, self._containers))
        return list(_flat(children)), list(_flat(map(dict.values, children)))

    def _held_now(self) -> list[Tensor | None]:
        held = list(_flat(map(dict.values, map(_parameters_of, self._parametrised))))
        for buffers in map(_buffers_of, self._buffered):
            held += buffers.values()
        return held

    def holds(self) -> bool:
        """Whether no module has hooks, and all hold what they held, of the same shapes, dtypes and flags."""
        if list(map(len, self._dicts)) != self._sizes or any(_flat(map(_hooks_of, self._dicts))):
            return False
        if list(map(type, self._modules)) != self._classes:
            return False
        names, children = self._children_now()
        if names != self._names or not all(map(operator.is_, children, self._children)):
            return False
        held = self._held_now()
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            return False
        return (
            not any(map(_buffers_of, self._bufferless)) and list(map(_facts_of, self._tensors)) == self._facts
        )

    def moved(self) -> bool:
        """Whether a tensor lies elsewhere than at the last call, or when this was made."""
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if addresses == self._addresses:
            return False
        self._addresses = addresses
        self.moves += 1
        return True
