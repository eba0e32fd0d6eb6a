"""Activations, dropout, and what only changes the shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import ShapeError
from .step import LinearMapStep, Step


class ElementwiseStep(Step):
    """a = act(u): act_diff and derivative of activations.py."""

    owned = True

    def forward(self, a):
        out = self.spec.activation.forward(a)
        self._base, self._saved, self._derivative = (a, out), None, None
        return out

    def deviate(self, d, out=None):
        activation = self.spec.activation
        if self._saved is None:
            self._saved = activation.saved(*self._base)
            self._base = self._derivative = None  # the saved holds what is still needed
        if activation.takes_memory:  # the last derivative was made here, too: nobody else reads it
            act_diff, self._derivative = activation.deviate(self._saved, d, (out, self._derivative))
        else:
            act_diff, self._derivative = activation.deviate(self._saved, d)
        return act_diff

    def consume(self, d):
        return self.deviate(d, d)

    def at(self, d):
        if self._saved is not None:
            super().at(d)
            return
        # The loop ran elsewhere, in a kernel: nothing but the derivative is needed, and no saved.
        activation, moved = self.spec.activation, self._base[0] + d
        self._derivative = activation.derivative(moved, activation.forward(moved))

    def pullback(self, e):
        if self._derivative is None:
            self._derivative = self.spec.activation.derivative(*self._base)
        return self.spec.activation.pullback(self._derivative, e)


class DropoutStep(LinearMapStep):
    """One mask a step, drawn in the forward pass as torch draws it, reused in every iteration."""

    def forward(self, a):
        draw = getattr(F, self.spec.kind)
        self._mask = draw(torch.ones_like(a), self.spec.p, training=True)
        return super().forward(a)

    def _apply(self, a):
        return a * self._mask

    def pullback(self, e):
        return e * self._mask


class ScaleStep(LinearMapStep):
    """Multiplication by a constant."""

    def _apply(self, a):
        return a * self.spec.factor

    def pullback(self, e):
        return e * self.spec.factor


class ReshapeStep(LinearMapStep):
    """Flatten and Unflatten."""

    def _apply(self, a):
        try:
            shape = self.spec.output_shape(tuple(a.shape))
        except ValueError as needed:  # behind a module that hides its shape from the plan
            raise ShapeError("model", f"shape {tuple(a.shape)} at {self.spec.name}", str(needed)) from None
        return a.reshape(shape)

    def pullback(self, e):
        return e.reshape(self._shape)
