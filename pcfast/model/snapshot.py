"""A model as it was when it was last described, and a look at whether it still is, much cheaper than describing it.

Compared is what a description, a check or a graph's key reads of a model: modules and their order, classes, hooks,
forwards of their own, settings, and parameters and buffers with shapes, dtypes, flags and addresses. Every step asks,
and a network of 33 layers has 98 modules: hence no loop but those of map, chain and comparisons of lists.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from ..support.hashing import hashed_once
from .describe import GLOBAL_HOOKS, SETTINGS, describe, kind_of
from .placement import common_placement, tensors_of
from .spec import Network

_hooks_of = operator.itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_children_of = operator.itemgetter("_modules")
_parameters_of = operator.itemgetter("_parameters")
_buffers_of = operator.itemgetter("_buffers")
_facts_of = operator.attrgetter("shape", "dtype", "requires_grad")
_device_of = operator.attrgetter("device")
_methods_of = operator.attrgetter("forward", "__iter__", "__call__")

_flat = chain.from_iterable


@hashed_once
@dataclass(frozen=True)
class TensorLayout:
    """Where a model's tensors lie, and how: equal for models that one recorded graph serves."""

    parts: tuple[Hashable, ...]


class Snapshot:
    """What is known of a model for as long as :meth:`holds`. It does not keep the model itself alive.

    Attributes:
        network: its description.
        placement: as :func:`pcfast.model.placement.common_placement`.
        parameters, buffers: each once, in the order of ``model.parameters()`` and ``buffers()``.
        calls: for relaxation/solve.py: what it found out about calls with this model.

    Raises:
        ModelError: a model that pcfast cannot relax.
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.network: Network = describe(model)
        self.placement = common_placement(model)
        self.parameters, self.buffers = tensors_of(model)
        self.calls: dict[Hashable, object] = {}
        self._tensors = [*self.parameters, *self.buffers]
        self._layout: TensorLayout | None = None
        try:
            self._remember(model)
        except (AttributeError, KeyError, RuntimeError):  # modules or tensors of a make of their own
            self.reusable = False
        else:
            self.reusable = not any(_flat(map(_hooks_of, self._dicts)))

    def _remember(self, model: nn.Sequential) -> None:
        modules = list(model.modules())
        kinds = list(map(kind_of, modules))
        self._kind, self._modules = type(model), modules[1:]
        self._classes = list(map(type, self._modules))
        self._methods = [
            (kind, _methods_of(kind))
            for kind in {self._kind, *self._classes}
            if issubclass(kind, nn.Sequential) and kind is not nn.Sequential
        ]
        self._dicts = [module.__dict__ for module in modules]
        self._sizes = list(map(len, self._dicts))
        self._containers: list[dict] = []  # modules that hold others, or may
        self._parametrised, self._buffered, self._bufferless, self._settings = [], [], [], []
        for kind, module in zip(kinds, self._dicts, strict=True):
            if kind is None:
                self._containers.append(module)
            if kind is None or _parameters_of(module):
                self._parametrised.append(module)
            (self._buffered if _buffers_of(module) else self._bufferless).append(module)
            if kind is not None and SETTINGS[kind]:
                read = operator.itemgetter(*SETTINGS[kind])
                self._settings.append((read, module, copy.deepcopy(read(module))))
        self._names, self._children = self._children_now()
        self._held = self._held_now()
        self._facts = list(map(_facts_of, self._tensors))
        self._devices = list(map(_device_of, self._tensors))
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _children_now(self) -> tuple[list[str], list[nn.Module | None]]:
        children = list(map(_children_of, self._containers))
        return list(_flat(children)), list(_flat(map(dict.values, children)))

    def _held_now(self) -> list[Tensor | None]:
        held = list(_flat(map(dict.values, map(_parameters_of, self._parametrised))))
        for buffers in map(_buffers_of, self._buffered):
            held += buffers.values()
        return held

    def holds(self, model: nn.Sequential) -> bool:
        """Whether ``model``, whose snapshot this is, still is as it was, the values of its tensors aside."""
        try:
            return (
                self.reusable
                and not any(GLOBAL_HOOKS)
                and type(model) is self._kind
                and model.__dict__ is self._dicts[0]
                and list(map(len, self._dicts)) == self._sizes  # a forward of its own would be one more
                and not any(_flat(map(_hooks_of, self._dicts)))
                and list(map(type, self._modules)) == self._classes
                and self._children_hold()
                and self._tensors_hold()
                and all(read(module) == values for read, module, values in self._settings)
                and all(_methods_of(kind) == methods for kind, methods in self._methods)
            )
        except (AttributeError, KeyError, RuntimeError):  # what was there is not, or cannot be compared
            return False

    def _children_hold(self) -> bool:
        names, children = self._children_now()
        return names == self._names and all(map(operator.is_, children, self._children))

    def _tensors_hold(self) -> bool:
        held = self._held_now()
        if len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            return False
        if any(map(_buffers_of, self._bufferless)):
            return False
        if list(map(_facts_of, self._tensors)) != self._facts:
            return False
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if addresses != self._addresses:  # other memory: the same only on the same devices
            if list(map(_device_of, self._tensors)) != self._devices:
                return False
            self._addresses, self._layout = addresses, None
        return True

    @property
    def layout(self) -> TensorLayout:
        """That of the parameters and buffers."""
        strides = list(map(Tensor.stride, self._tensors))
        if self._layout is None or strides != self._strides:
            self._strides = strides
            parts = zip(self._addresses, self._facts, self._devices, strides, strict=True)
            self._layout = TensorLayout((len(self.parameters), *parts))
        return self._layout


# By the model's identity: a weak dictionary would hash and compare modules, which may say themselves how.
_snapshots: dict[int, tuple[weakref.ref, Snapshot]] = {}


def snapshot(model: nn.Sequential) -> Snapshot:
    """The snapshot of a model as it is now: the last one where that holds.

    Raises:
        ModelError: as :class:`Snapshot`.
    """
    key = id(model)
    entry = _snapshots.get(key)
    if entry is not None and entry[0]() is model and entry[1].holds(model):
        return entry[1]
    result = Snapshot(model)
    if result.reusable:
        _snapshots[key] = weakref.ref(model, lambda _: _snapshots.pop(key, None)), result
    else:
        _snapshots.pop(key, None)
    return result
