"""A model as it was when it was last described, and a look at whether it still is, much cheaper than describing it.

Compared is what a description, a check or a graph's key reads of a model: modules and their order, classes, hooks,
forwards of their own, settings, and parameters and buffers with shapes, dtypes, flags and addresses.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor, nn

from ..support.hashing import hashed_once
from .describe import BUFFERED, GLOBAL_HOOKS, PARAMETRISED, SETTINGS, describe, kind_of
from .module_state import ModuleState, tensors_as_they_are
from .placement import common_placement, tensors_of
from .spec import Network

_methods_of = operator.attrgetter("forward", "__iter__", "__call__")
_PLAIN = frozenset((bool, int, float, str, type(None)))


def _layout_of(tensor: Tensor) -> tuple[Hashable, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


@hashed_once
@dataclass(frozen=True)
class TensorLayout:
    """Where a model's tensors lie, and how: equal for models that one recorded graph serves."""

    parts: tuple[Hashable, ...]


class Snapshot:
    """What is known of a model for as long as :meth:`holds`.

    Attributes:
        network: its description.
        placement: as :func:`pcfast.model.placement.common_placement`.
        parameters, buffers: each once, in the order of ``model.parameters()`` and ``buffers()``.
        calls: for relaxation/solve.py: what it found out about calls with this model.
        parts: for backends: what they found out about its parameters, by whatever they need it for.
        reusable: whether :meth:`holds` can tell: not of modules with hooks, or of a make of their own.

    Raises:
        ModelError: a model that pcfast cannot relax.
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.network: Network = describe(model)
        self.placement = common_placement(model)
        self.parameters, self.buffers = tensors_of(model)
        self.calls: dict[Hashable, object] = {}
        self.parts: dict[Hashable, object] = {}
        self._model = weakref.ref(model)  # copies of the model's attributes carry this, too
        self._tensors = [*self.parameters, *self.buffers]
        self._layout: tuple[object, TensorLayout] | None = None  # and the tensors as they were then
        try:
            self._remember(model)
            # what functional_call puts in their place is another in every call
            plain = all(isinstance(parameter, nn.Parameter) for parameter in self.parameters)
            self.reusable = plain and self._state.holds(model)
        except (AttributeError, KeyError, RuntimeError):
            self.reusable = False

    def _remember(self, model: nn.Sequential) -> None:
        modules = list(model.modules())
        self._state = ModuleState(model, modules[1:], self._tensors)
        self._methods = [
            (kind, _methods_of(kind))
            for kind in set(map(type, modules))
            if issubclass(kind, nn.Sequential) and kind is not nn.Sequential
        ]
        self._settings = []
        for module in modules:
            kind = kind_of(module)
            if kind is None:
                continue
            _check_as_registered(kind, module)
            if SETTINGS[kind]:
                read = operator.itemgetter(*SETTINGS[kind])
                self._settings.append((read, module, _typed(read(module.__dict__))))

    def holds(self, model: nn.Sequential) -> bool:
        """Whether ``model`` is the one whose snapshot this is, and as it was, the values of its tensors aside."""
        try:
            return (
                self.reusable
                and self._model() is model
                and not any(GLOBAL_HOOKS)
                and self._state.holds(model)
                and all(_typed(read(module.__dict__)) == values for read, module, values in self._settings)
                and all(_methods_of(kind) == methods for kind, methods in self._methods)
            )
        except (AttributeError, KeyError, RuntimeError):  # what was there is not, or cannot be compared
            return False

    @property
    def layout(self) -> TensorLayout:
        """That of the parameters and buffers, now."""
        if self._layout is None or not self._layout[0].places_hold(self._tensors):
            layout = TensorLayout((len(self.parameters), *map(_layout_of, self._tensors)))
            self._layout = tensors_as_they_are(self._tensors), layout
        return self._layout[1]

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model is another one."""

    def __reduce__(self):
        return type(None), ()  # a pickled model needs no pcfast


def _check_as_registered(kind: type[nn.Module], module: nn.Module) -> None:
    """Raise KeyError where what torch registers in a module of a known kind is a plain attribute of this one."""
    held = module.__dict__
    for name in ("weight", "bias") if kind in PARAMETRISED else ():
        held["_parameters"][name]
    for name in ("running_mean", "running_var") if kind in BUFFERED else ():
        held["_buffers"][name]


def _typed(value) -> tuple:
    """A setting so that only the same one equals it: 1 is not 1.0, nor a list that has changed inside.

    Raises:
        AttributeError: a setting that is no plain value.
    """
    if type(value) in _PLAIN:
        return type(value), value
    if type(value) in (tuple, list):
        return type(value), *map(_typed, value)
    raise AttributeError(f"a setting of {type(value)}")


#: In the model's own attributes: kept elsewhere, it would keep alive a model that its children refer to.
_ATTRIBUTE = "_pcfast_snapshot"


def snapshot(model: nn.Sequential) -> Snapshot:
    """The snapshot of a model as it is now: the last one where that holds.

    Raises:
        ModelError: as :class:`Snapshot`.
    """
    known = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    if known is not None and known.holds(model):
        return known
    result = Snapshot(model)
    if result.reusable:
        model.__dict__[_ATTRIBUTE] = result
    else:
        model.__dict__.pop(_ATTRIBUTE, None)
    return result
