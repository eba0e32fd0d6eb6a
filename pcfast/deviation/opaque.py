"""Modules that pcfast does not know."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..errors import ModelError
from ..replay import recorded_buffers, replaying
from .step import Step


class OpaqueStep(Step):
    """A module that pcfast does not know, by torch autograd; deviations by plain subtraction.

    Its random numbers and buffers are those of the forward pass in every evaluation.
    """

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        self._dtype = precision.state if precision.autocast else next(floating, precision.state)

    def _evaluate(self, a: Tensor) -> Tensor:
        dtype = self.precision.autocast
        ambient = torch.autocast(a.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with torch.enable_grad(), ambient:
            self._leaf = a.detach().to(self._dtype).requires_grad_(True)
            # a clone, so that modules that work in place never touch the beliefs
            self._out = self.module(self._leaf.clone())
        if not isinstance(self._out, Tensor):
            raise ModelError(
                "model",
                f"{self.spec.name}, which returns a {type(self._out).__name__}",
                "modules that map one tensor to one tensor",
            )
        return self.precision.to_state(self._out.detach())

    def forward(self, a):
        self._random, self._buffers = replaying(a.device), recorded_buffers(self.module)
        self._base = a
        self._base_out = self._evaluate(a)
        return self._base_out

    def deviate(self, d):
        with self._random(), self._buffers():
            return self._evaluate(self._base + d) - self._base_out

    def drift(self):
        return self.deviate(torch.zeros_like(self._base)) if self._parameters else None

    def _grad(self, wanted: list[Tensor], e: Tensor) -> tuple[Tensor | None, ...]:
        if not self._out.requires_grad:
            return (None,) * len(wanted)
        return torch.autograd.grad(
            self._out, wanted, e.to(self._out.dtype), retain_graph=True, allow_unused=True
        )

    def pullback(self, e):
        (gradient,) = self._grad([self._leaf], e)
        return torch.zeros_like(self._base) if gradient is None else self.precision.to_state(gradient)

    def gradients(self, e):
        if not self._parameters:
            return []
        # with the input's: asking for a normalisation's bias alone crashes some releases of torch
        _, *found = self._grad([self._leaf, *self._parameters], e)
        return [(p, g) for p, g in zip(self._parameters, found, strict=True) if g is not None]

    @property
    def has_gradients(self):
        return bool(self._parameters)

    def zero_gradients(self):
        return self.gradients(torch.zeros_like(self._base_out))  # unused parameters stay without
