"""Modules as they were, and whether they still are: comparisons alone, of what :mod:`pcfast.model.snapshot` lists.

Every step asks, and a network of 33 layers has 98 modules: hence no loop but those of map, chain and comparisons of
lists.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain, repeat

from torch import Tensor, nn

_dict_of = operator.attrgetter("__dict__")
_hooks_of = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_held_by = operator.itemgetter("_parameters", "_buffers", "_modules")
_facts_of = operator.attrgetter("shape", "dtype", "device", "requires_grad")

_flat = chain.from_iterable


class ModuleState:
    """What modules hold, as of now.

    Args:
        root: the model, which is not kept alive. modules: the others, each once.
        tensors: their parameters and buffers, whose shapes, dtypes, devices and flags count.

    Raises:
        AttributeError, KeyError, RuntimeError: modules or tensors that are made otherwise than torch's.
    """

    def __init__(self, root: nn.Module, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        self._modules, self._tensors = list(modules), list(tensors)
        self._classes = list(map(type, [root, *self._modules]))
        self._names, self._held = self._held_now(self._dicts_of(root))
        self._facts = list(map(_facts_of, self._tensors))

    def _dicts_of(self, root: nn.Module) -> list[dict]:
        return [root.__dict__, *map(_dict_of, self._modules)]

    @staticmethod
    def _held_now(dicts: list[dict]) -> tuple[list[tuple[str, ...]], list[Tensor | nn.Module | None]]:
        """Names and values of all parameters, buffers and children; the names module by module, each kind apart."""
        held = list(_flat(map(_held_by, dicts)))
        return list(map(tuple, held)), list(_flat(map(dict.values, held)))

    def holds(self, root: nn.Module) -> bool:
        """Whether no module has hooks or a forward of its own, and all hold what they held, as it was."""
        dicts = self._dicts_of(root)
        if any(_flat(map(_hooks_of, dicts))) or any(map(dict.__contains__, dicts, repeat("forward"))):
            return False
        names, held = self._held_now(dicts)
        return (
            list(map(type, [root, *self._modules])) == self._classes
            and names == self._names
            and all(map(operator.is_, held, self._held))
            and list(map(_facts_of, self._tensors)) == self._facts
        )
