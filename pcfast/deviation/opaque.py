"""Modules that pcfast does not know."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .. import differentiation
from ..errors import ModelError
from ..replay import Replay
from .step import Step


class OpaqueStep(Step):
    """A module that pcfast does not know, by torch autograd; deviations by plain subtraction.

    Its random numbers and buffers are those of the forward pass in every evaluation. Its parameters are those that
    its output's graph begins with, whether it registers them or not.
    """

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._replay: Replay | None = None
        differentiation.registered(module)  # refuses what autograd cannot keep
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        self._dtype = precision.state if precision.autocast else next(floating, precision.state)

    def _evaluate(self, a: Tensor) -> Tensor:
        dtype = self.precision.autocast
        ambient = torch.autocast(a.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with torch.enable_grad(), ambient:
            self._leaf = a.detach()
            if a.is_floating_point():  # integers, tokens say, are the clamped input, which needs no gradient
                self._leaf = self._leaf.to(self._dtype).requires_grad_(True)
            # a clone, so that modules that work in place never touch the beliefs
            out = self._out = self.module(self._leaf.clone())
        if not isinstance(out, Tensor) or not out.is_floating_point():
            given = f"a tensor of {out.dtype}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ModelError(
                "model",
                f"{self.spec.name}, which returns {given}",
                "modules that map one tensor to one tensor of a real floating dtype",
            )
        return self.precision.to_state(out.detach())

    def forward(self, a):
        self._replay = Replay(self.module, a.device)
        self._base = a
        self._base_out = self._replay.first(lambda: self._evaluate(a))
        self._trains = bool(self._trained())
        return self._base_out

    def settle(self, failed):
        if failed is not None:
            self._replay.undo(failed)
        self._replay.keep()

    def undo(self):
        if self._replay is not None:
            self._replay.undo()

    def deviate(self, d):
        return self._replay.again(lambda: self._evaluate(self._base + d)) - self._base_out

    def drift(self):
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
        found = self._grad([*inputs, *parameters], e)[len(inputs) :]
        return [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]

    @property
    def has_gradients(self):
        return self._trains

    def zero_gradients(self):
        return self.gradients(torch.zeros_like(self._base_out))  # unused parameters stay without
