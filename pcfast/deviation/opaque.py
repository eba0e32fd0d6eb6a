"""Modules that pcfast does not know."""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..support import differentiation
from ..support.log import warn_once
from ..support.replay import Replay
from . import differences
from .step import Step

#: module -> way, device type and dtype -> why it failed, or "" where it runs
_trials: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str]] = weakref.WeakKeyDictionary()


class OpaqueStep(Step):
    """A module that pcfast does not know, by torch autograd; deviations as differences.py says.

    Its random numbers and buffers are those of the forward pass in every evaluation. Its parameters are those that
    its output's graph begins with, whether it registers them or not.
    """

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._replay: Replay | None = None
        differentiation.registered(module)  # refuses what autograd cannot keep
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        self._dtype = precision.state if precision.autocast else next(floating, precision.state)
        self._way: str | None = None
        self._widening = differences.Widening(module)

    def _call(self, a: Tensor, *, wide: bool = False) -> Tensor:
        dtype = None if wide else self.precision.autocast
        with contextlib.ExitStack() as stack:
            if dtype:
                stack.enter_context(torch.autocast(a.device.type, dtype=dtype))
            if wide:
                self._widening.start()
                stack.enter_context(differences.uncompiled(self.module))
                stack.enter_context(self._widening)
            out = self.module(a)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            given = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ModelError(
                "model",
                f"{self.spec.name}, which returns {given}",
                "modules that map one tensor to one tensor of a real floating dtype",
            )
        return out

    def _evaluate(self, a: Tensor, *, wide: bool = False) -> Tensor:
        """f(a), the current point, detached; in float64 where ``wide``, else in the state dtype."""
        with torch.enable_grad():
            self._leaf = a.detach()
            if a.is_floating_point():  # integers, tokens say, are the clamped input, which needs no gradient
                self._leaf = self._leaf.to(torch.float64 if wide else self._dtype).requires_grad_(True)
            # a clone, so that modules that work in place never touch the beliefs
            self._out = self._call(self._leaf.clone(), wide=wide)
        out = self._out.detach()
        return out.double() if wide else self.precision.to_state(out)

    def forward(self, a):
        self._replay = Replay(self.module, a.device)
        self._base = a
        self._base_out = self._replay.first(lambda: self._evaluate(a))
        self._trains = bool(self._trained())
        return self._base_out

    def update_statistics(self, failed):
        if failed is not None:
            self._replay.undo(failed)
        self._replay.keep()

    def undo(self):
        if self._replay is not None:
            self._replay.undo()

    def deviate(self, d):
        if self._way is None:
            self._prepare()
        if self._way == "float64":
            moved = self._base.double() + d if self._base.is_floating_point() else self._base
            out = self._replay.again(lambda: self._evaluate(moved, wide=True))
            return self.precision.to_state(out - self._wide_out)
        out = self._replay.again(lambda: self._evaluate(self._base + d))
        plain = out - self._base_out
        if self._way == "plain" or not self._base.is_floating_point():
            return plain
        return differences.by_rows(self._tangent(d), plain, out, torch.finfo(self._rounding).eps)

    def _tangent(self, d: Tensor) -> Tensor:
        """f(a + d) - f(a) from tangents."""
        a, d = self._base.to(self._dtype), d.to(self._dtype)
        result = differences.tangent(lambda point: self._replay.again(lambda: self._call(point)), a, d)
        return self.precision.to_state(result)

    @property
    def _rounding(self) -> torch.dtype:
        """The dtype whose rounding the module's outputs have."""
        return self.precision.autocast or self._dtype

    def _prepare(self) -> None:
        """Choose how deviations are computed: the first way in which this module runs."""
        device = self._base.device
        tried, failed = _trials.setdefault(self.module, {}), []
        for way in differences.ways(device, self._dtype):
            key = way, device.type, self._rounding
            if not tried.get(key):
                try:
                    self._try(way, first=key not in tried)
                    tried[key] = ""
                except (
                    Exception
                ) as failure:  # of any kind: the module's own code runs in a dtype it may not know
                    tried[key] = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            if not tried[key]:
                self._way = way
                break
            failed.append(f"{way}: {tried[key]}")
        if failed and self._way == "plain":
            warn_once(
                f"{self.spec.name}: its deviations are plain differences of outputs, of few digits in "
                f"{self._rounding} ({'; '.join(failed)}). float64 parameters keep them."
            )

    def _try(self, way: str, *, first: bool) -> None:
        """Raise where ``way`` does not run here, backwards too where ``first``; the current point stays the base."""
        point = self._leaf, self._out
        try:
            if way == "float64":
                base = self._base.double() if self._base.is_floating_point() else self._base
                self._wide_out = self._replay.again(lambda: self._evaluate(base, wide=True))
                differences.check_same(self._wide_out, self._base_out, self._rounding)
                if first:
                    self.gradients(torch.zeros_like(self._wide_out))
                    if self._leaf.requires_grad:
                        self.pullback(torch.zeros_like(self._wide_out))
            elif way == "tangents" and self._base.is_floating_point():
                self._tangent(torch.zeros_like(self._base))
        finally:
            self._leaf, self._out = point

    def snapshot_params(self):
        if self._trains:
            self._prepare()

    def refresh(self):
        self._widening.forget()

    def param_shift(self):
        return self.deviate(torch.zeros_like(self._base)) if self._trains else None

    def _trained(self) -> list[Tensor]:
        return differentiation.trained(self._out, differentiation.registered(self.module), [self._leaf])

    def _grad(self, wanted: list[Tensor], e: Tensor) -> tuple[Tensor | None, ...]:
        if not self._out.requires_grad:
            return (None,) * len(wanted)
        return differentiation.gradients(self._out, wanted, e.to(self._out.dtype), keep=True)

    def pullback(self, e):
        (gradient,) = self._grad([self._leaf], e)
        return torch.zeros_like(self._base) if gradient is None else self.precision.to_state(gradient)

    def gradients(self, e):
        parameters = self._trained()
        if not parameters:
            return []
        # with the input's: asking for a normalisation's bias alone crashes some releases of torch
        inputs = [self._leaf] if self._leaf.requires_grad else []
        result = self._grad([*inputs, *parameters], e)[len(inputs) :]
        return [(p, g) for p, g in zip(parameters, result, strict=True) if g is not None]

    @property
    def has_gradients(self):
        return self._trains

    def zero_gradients(self):
        return self.gradients(torch.zeros_like(self._base_out))  # unused parameters stay without
