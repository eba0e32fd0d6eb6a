"""Modules as they were, and whether they still are: comparisons alone, of what :mod:`pcfast.model.snapshot` lists.

Every step asks, and a network of 33 layers has 98 modules. So the comparison is native (csrc/cpu/modules.cpp) where
pcfast was installed with a C++ compiler; without one it has no loop but those of map, chain and comparisons of lists.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from itertools import chain, repeat
from types import ModuleType

from torch import Tensor, nn

from ..support import cpu_module

_dict_of = operator.attrgetter("__dict__")
_hooks_of = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_held_by = operator.itemgetter("_parameters", "_buffers", "_modules")
_kind_of = operator.attrgetter("shape", "dtype", "device", "requires_grad")

_flat = chain.from_iterable


def _held_now(dicts: list[dict]) -> tuple[list[tuple[str, ...]], list[Tensor | nn.Module | None]]:
    """Names and values of all parameters, buffers and children; the names module by module, each kind apart."""
    held = list(_flat(map(_held_by, dicts)))
    return list(map(tuple, held)), list(_flat(map(dict.values, held)))


def _modules_hold(root, modules, classes, names, held) -> bool:
    """As csrc/cpu/modules.h says."""
    modules = [root, *modules]
    dicts = list(map(_dict_of, modules))
    if any(_flat(map(_hooks_of, dicts))) or any(map(dict.__contains__, dicts, repeat("forward"))):
        return False
    names_now, held_now = _held_now(dicts)
    return (
        list(map(type, modules)) == classes and names_now == names and all(map(operator.is_, held_now, held))
    )


class _Tensors:
    """As csrc/cpu/modules.h says, for tensors of any kind."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._kinds, self._places = self._kinds_of(tensors), self._places_of(tensors)

    def kinds_hold(self, tensors: list[Tensor]) -> bool:
        return self._kinds_of(tensors) == self._kinds

    def places_hold(self, tensors: list[Tensor]) -> bool:
        return self._places_of(tensors) == self._places

    @staticmethod
    def _kinds_of(tensors):
        return list(map(_kind_of, tensors))

    @staticmethod
    def _places_of(tensors):
        return [(tensor.data_ptr(), tensor.stride()) for tensor in tensors]


def tensors_as_they_are(tensors: list[Tensor]):
    """What tells later whether the tensors still are of their kinds and lie where they lie.

    Raises:
        AttributeError, RuntimeError: tensors that have no address.
    """
    native = _native()
    if native is not None and all(type(tensor) in _SHOWN for tensor in tensors):
        try:
            return native.Tensors(tensors)
        except (AttributeError, BufferError, RuntimeError, TypeError):
            pass  # torch's DLPack interface does not show them, or there is none
    return _Tensors(tensors)


#: Others may lie elsewhere than they say.
_SHOWN = (Tensor, nn.Parameter)


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
        self._names, self._held = _held_now(list(map(_dict_of, [root, *self._modules])))
        self._seen = tensors_as_they_are(self._tensors)

    def holds(self, root: nn.Module) -> bool:
        """Whether no module has hooks or a forward of its own, and all hold what they held, as it was.

        Raises:
            AttributeError, KeyError, RuntimeError: a module or tensor has become another thing.
        """
        native = _native()
        compare = _modules_hold if native is None else native.modules_hold
        return compare(root, self._modules, self._classes, self._names, self._held) and self._seen.kinds_hold(
            self._tensors
        )


@functools.cache
def _native() -> ModuleType | None:
    """The module that compares natively; None where there is none."""
    return None if cpu_module.load_error() else cpu_module.load()
