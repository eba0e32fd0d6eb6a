"""Replay of what a forward pass drew and found: one dropout mask a step, statistics that move once a step.

The first evaluation of a module runs under a dispatch mode, which sees this thread's operations alone. What they draw
is kept, and given again in later evaluations instead of a new draw: torch's random state, which other threads share,
is neither read nor rewound. A buffer's values are kept where an operation is about to write them: a buffer that
stays as it is costs nothing.

Rewound in later evaluations, for their duration, are Python's and NumPy's global random state (where the first
evaluation moved them), and torch's where it must be: for an operation whose random numbers depend on values
(attention with dropout in one kernel, ``torch.normal`` of tensors), and for draws inside a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..errors import ModelError

#: Held where buffers are written or lent, and where a random state is rewound, so that threads count every step.
LOCK = threading.RLock()


def replaying(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Remember torch's random state now; the returned context manager rewinds it and then restores the rest.

    Covers the CPU generator and, for a CUDA ``device``, that device's.
    """
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replay():
        with LOCK, torch.random.fork_rng([device] if cuda_state is not None else []):
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, device)
            yield

    return replay


def recorded_buffers(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Remember the module's buffers as they are; the returned context manager lends it copies of those.

    The buffers themselves are never written, not even to put them back: autograd graphs may hold them.
    """
    places = _places(module)
    values = {id(buffer): buffer.clone() for _, _, buffer in places}

    def lend():
        return swap_buffers([(owner, name, values[id(buffer)]) for owner, name, buffer in places])

    return lend


def _places(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


@contextlib.contextmanager
def swap_buffers(entries: Sequence[tuple[nn.Module, str, Tensor]]):
    """Each place holds a copy of its value, one copy however often it is registered; what it held comes back."""
    with LOCK:
        held = [(owner, name, owner._buffers[name]) for owner, name, _ in entries]
        copies = {id(value): value.clone() for _, _, value in entries}
        try:
            for owner, name, value in entries:
                owner._buffers[name] = copies[id(value)]
            yield
        finally:
            for owner, name, buffer in held:
                owner._buffers[name] = buffer


# what operations do --------------------------------------------------------------------------------------------

#: Draws whose numbers do not depend on the values of other tensors, or are no function of them to differentiate.
_FROZEN = {
    "bernoulli", "bernoulli_", "cauchy", "cauchy_", "exponential", "exponential_", "geometric", "geometric_",
    "inductor_seed", "inductor_seeds", "log_normal", "log_normal_", "multinomial", "normal_", "poisson", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform", "uniform_",
}  # fmt: skip
_DROPOUTS = {"native_dropout", "_fused_dropout"}  # give (input times mask, mask)


@dataclass(frozen=True)
class _Traits:
    """What an operation does: ``kind`` is "frozen", "dropout", "seeded" or "" (it draws nothing)."""

    kind: str
    written: tuple[tuple[int, str], ...]  # of its arguments: (position, name)


@functools.lru_cache(maxsize=4096)
def _traits(func) -> _Traits:
    schema = func._schema
    name = schema.name.split("::")[-1]
    kind = ""
    if torch.Tag.nondeterministic_seeded in func.tags:
        kind = "frozen" if name in _FROZEN else "dropout" if name in _DROPOUTS else "seeded"
    # normalisations move running statistics without saying so in their schema
    silent = "batch_norm" in name
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (silent and "running" in argument.name)
    )
    return _Traits(kind, written)


def _written(traits: _Traits, args, kwargs) -> Iterator[Tensor]:
    for position, name in traits.written:
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor):
                yield tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _saving_hooks() -> object:
    """The innermost pair of saved-tensor hooks: inside a checkpoint another than outside."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@dataclass
class _Draw:
    """One operation that may draw: what it gave, or what to rewind where that has to be drawn again."""

    func: object
    value: object = None
    rewind: Callable[[], AbstractContextManager[None]] | None = None


class _Recorder(TorchDispatchMode):
    """Keeps draws, and buffers' values from before they are written."""

    def __init__(self, device: torch.device, buffers: Sequence[Tensor]) -> None:
        super().__init__()
        self.draws: list[_Draw] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # id of a buffer -> itself, its values
        self.in_checkpoint = False
        self._device, self._outer = device, _saving_hooks()
        self._buffers: dict[int, list[Tensor]] = {}
        for buffer in buffers:
            self._buffers.setdefault(_storage(buffer), []).append(buffer)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        traits = _traits(func)
        if self._buffers and traits.written:
            for tensor in _written(traits, args, kwargs):
                for buffer in self._buffers.get(_storage(tensor), ()):
                    if id(buffer) not in self.before:
                        self.before[id(buffer)] = buffer, buffer.clone()
        if not traits.kind:
            return func(*args, **kwargs)
        return self._draw(func, traits, args, kwargs)

    def _draw(self, func, traits: _Traits, args, kwargs):
        draw = _Draw(func)
        if traits.kind == "dropout" and False in args[2:3]:  # outside training: nothing is drawn
            return func(*args, **kwargs)
        if traits.kind == "seeded":
            rewind, before = replaying(self._device), _random_states(self._device)
            result = func(*args, **kwargs)
            if all(torch.equal(*pair) for pair in zip(before, _random_states(self._device), strict=True)):
                return result  # attention without dropout, say
            draw.rewind = rewind
        else:
            result = func(*args, **kwargs)
            targets = list(_written(traits, args, kwargs))
            draw.value = tree_map_only(Tensor, torch.clone, targets or result)
        self.in_checkpoint |= _saving_hooks() != self._outer
        self.draws.append(draw)
        return result


class _Replayer(TorchDispatchMode):
    """Gives the draws of a :class:`_Recorder` again, in their order."""

    def __init__(self, draws: Sequence[_Draw]) -> None:
        super().__init__()
        self._draws = list(reversed(draws))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        traits = _traits(func)
        if not traits.kind:
            return func(*args, **kwargs)
        if traits.kind == "seeded" and (not self._draws or self._draws[-1].func is not func):
            return func(*args, **kwargs)  # it drew nothing
        if traits.kind == "dropout" and False in args[2:3]:
            return func(*args, **kwargs)
        draw = self._draws.pop() if self._draws else None
        if draw is None or draw.func is not func:
            raise ModelError(
                "model",
                f"a module that draws other random numbers ({func}) when it is evaluated again",
                "the same draws in every evaluation of a step",
            )
        if draw.rewind is not None:
            with draw.rewind():
                return func(*args, **kwargs)
        if traits.kind == "dropout":
            mask = draw.value[1]
            # native_dropout is given the share of zeros, _fused_dropout that of the rest
            kept = 1 - args[1] if "native" in func._schema.name else args[1]
            return args[0] * mask.to(args[0].dtype) * (1 / kept if kept else 0.0), mask.clone()
        targets = list(_written(traits, args, kwargs))
        if not targets:
            return tree_map_only(Tensor, torch.clone, draw.value)
        for target, value in zip(targets, draw.value, strict=True):
            target.copy_(value)
        return targets[0]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _numpy_state() -> tuple:
    """NumPy's global random state, in a form that compares."""
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), *rest


def _set_numpy_state(state: tuple) -> None:
    name, keys, *rest = state
    np.random.set_state((name, np.frombuffer(keys, np.uint32), *rest))


class _Watch:
    """Calls ``act`` before this thread's first draw from Python's global generator.

    Attributes:
        seen: there was one.
    """

    def __init__(self, act: Callable[[], None]) -> None:
        self._act, self.seen = act, False

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._look)

    def __exit__(self, *_) -> None:
        sys.setprofile(self._before)

    def _look(self, frame, event: str, function) -> None:
        if self.seen or event not in ("call", "c_call"):
            return
        # methods in C, and those in Python (gauss), which may give what an earlier call has kept
        owner = getattr(function, "__self__", None) if event == "c_call" else frame.f_locals.get("self")
        if owner is random._inst:
            self.seen = True
            self._act()


# one module in one step ----------------------------------------------------------------------------------------


class Replay:
    """A module's evaluations in one step: later ones see what the first drew and what it found in buffers."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._draws: list[_Draw] = []
        self._written: list[tuple[Tensor, Tensor]] = []  # buffers written in place, and their values before
        self._replaced: list[tuple[nn.Module, str, Tensor]] = []  # places given another tensor, and the first
        self.swap_buffers: list[tuple[nn.Module, str, Tensor]] = []  # what later evaluations find
        self._numpy: tuple | None = None  # NumPy's random state at the start, where it moved
        self._python: tuple | None = None  # and Python's
        self._draws_from_python = False  # seen in an evaluation
        self._rewind: Callable[[], AbstractContextManager[None]] | None = None

    def first(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """The forward pass."""
        places = _places(self._module)
        with LOCK if places else contextlib.nullcontext():
            python, numpy = random.getstate(), _numpy_state()
            rewind = None if _capturing(self._device) else replaying(self._device)
            recorder = _Recorder(self._device, [buffer for _, _, buffer in places])
            with recorder:
                result = evaluate()
            self._python = python if python != random.getstate() else None
            self._numpy = numpy if numpy != _numpy_state() else None
            self._draws = [] if recorder.in_checkpoint else recorder.draws
            self._rewind = rewind if recorder.in_checkpoint else None
            self._note(places, recorder.before)
        return result

    def _note(self, places, before: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._written = list(before.values())
        self._replaced = [place for place in places if place[0]._buffers.get(place[1]) is not place[2]]
        moved = {id(buffer) for _, _, buffer in self._replaced} | set(before)
        self.swap_buffers = [
            (owner, name, before[id(buffer)][1] if id(buffer) in before else buffer)
            for owner, name, buffer in places
            if id(buffer) in moved
        ]

    def again(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """An evaluation that draws what the first drew, finds what it found, and leaves the buffers alone."""
        if not (self._draws or self.swap_buffers or self._python or self._numpy or self._rewind):
            return evaluate()
        with contextlib.ExitStack() as stack:
            if self.swap_buffers:
                stack.enter_context(swap_buffers(self.swap_buffers))
            if self._numpy is not None:
                stack.enter_context(LOCK)
                stack.callback(_set_numpy_state, _numpy_state())
                _set_numpy_state(self._numpy)
            if self._python is not None:
                stack.enter_context(self._python_rewound())
            if self._rewind is not None:
                stack.enter_context(self._rewind())
            if self._draws:
                stack.enter_context(_Replayer(self._draws))
            return evaluate()

    @contextlib.contextmanager
    def _python_rewound(self):
        """Python's random state is rewound: the first time only once this thread draws from it."""
        with contextlib.ExitStack() as stack:

            def rewind() -> None:
                stack.enter_context(LOCK)
                stack.callback(random.setstate, random.getstate())
                random.setstate(self._python)

            if self._draws_from_python:
                rewind()
                yield
                return
            watch = _Watch(rewind)
            with watch:
                yield
            self._draws_from_python = watch.seen
            if not watch.seen:  # it was another thread that drew in the first evaluation
                self._python = None

    def keep(self) -> None:
        """What :meth:`first` moved stays: nothing to undo any more."""
        self._written, self._replaced = [], []

    def undo(self, failed: Tensor | None = None) -> None:
        """Give the buffers the values of before :meth:`first`; with ``failed``, 0-dim bool, where it says so."""
        with LOCK, torch.no_grad():
            for buffer, value in self._written:
                buffer.copy_(value if failed is None else torch.where(failed, value, buffer))
            for owner, name, buffer in self._replaced:
                now = owner._buffers.get(name)
                if failed is None or now is None or now.shape != buffer.shape:
                    owner._buffers[name] = buffer
                else:
                    owner._buffers[name] = torch.where(failed, buffer, now)
