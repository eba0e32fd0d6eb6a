"""A model as it was when it was last described, and a look at whether it still is, much cheaper than describing it.

Compared is what a description, a check or a graph's key reads of a model: modules and their order, classes, hooks,
forwards of their own, settings, and parameters and buffers with shapes, dtypes, flags and addresses.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..support.hashing import hashed_once
from .describe import GLOBAL_HOOKS, SETTINGS, describe, kind_of
from .module_state import ModuleState
from .placement import common_placement, tensors_of
from .spec import Network

_device_of = operator.attrgetter("device")
_methods_of = operator.attrgetter("forward", "__iter__", "__call__")


def _layout_of(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


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
        self._layout: tuple[object, TensorLayout] | None = None  # and what it was made for
        self._devices = list(map(_device_of, self._tensors))
        try:
            self._remember(model)
        except (AttributeError, KeyError, RuntimeError):  # modules or tensors of a make of their own
            self.reusable = False
        else:
            self.reusable = not self._state.hooked

    def _remember(self, model: nn.Sequential) -> None:
        modules = list(model.modules())
        dicts = [module.__dict__ for module in modules]
        self._kind, self._dict = type(model), dicts[0]
        self._methods = [
            (kind, _methods_of(kind))
            for kind in set(map(type, modules))
            if issubclass(kind, nn.Sequential) and kind is not nn.Sequential
        ]
        containers, parametrised, self._settings = [], [], []
        for kind, module in zip(map(kind_of, modules), dicts, strict=True):
            if kind is None:
                containers.append(module)
            if kind is None or module["_parameters"]:
                parametrised.append(module)
            if kind is not None and SETTINGS[kind]:
                read = operator.itemgetter(*SETTINGS[kind])
                self._settings.append((read, module, copy.deepcopy(read(module))))
        self._state = ModuleState(dicts, containers, parametrised, modules[1:], self._tensors)

    def holds(self, model: nn.Sequential) -> bool:
        """Whether ``model``, whose snapshot this is, still is as it was, the values of its tensors aside."""
        try:
            if not (
                self.reusable
                and not any(GLOBAL_HOOKS)
                and type(model) is self._kind
                and model.__dict__ is self._dict
                and self._state.holds()
                and all(read(module) == values for read, module, values in self._settings)
                and all(_methods_of(kind) == methods for kind, methods in self._methods)
            ):
                return False
            # elsewhere on the same devices is no change
            return not self._state.moved() or list(map(_device_of, self._tensors)) == self._devices
        except (AttributeError, KeyError, RuntimeError):  # what was there is not, or cannot be compared
            return False

    @property
    def layout(self) -> TensorLayout:
        """That of the parameters and buffers."""
        found = self._state.moves, list(map(Tensor.stride, self._tensors))
        if self._layout is None or self._layout[0] != found:
            parts = map(_layout_of, self._tensors)
            self._layout = found, TensorLayout((len(self.parameters), *parts))
        return self._layout[1]


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
