"""Activations, dropout, and what only changes the shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import ShapeError
from .step import LinearMapStep, Step


class ElementwiseStep(Step):
    """a = act(u): bracket and slope of activations.py."""

    owned = True

    def forward(self, a):
        out = self.spec.activation.forward(a)
        self._base, self._anchor, self._slope = (a, out), None, None
        return out

    def deviate(self, d):
        activation = self.spec.activation
        if self._anchor is None:
            self._anchor = activation.anchor(*self._base)
            self._base = None  # the anchor holds what is still needed
        bracket, self._slope = activation.deviate(self._anchor, d)
        return bracket

    def at(self, d):
        if self._anchor is not None:
            super().at(d)
            return
        # The loop ran elsewhere, in a kernel: nothing but the slope is needed, and no anchor.
        activation, moved = self.spec.activation, self._base[0] + d
        self._slope = activation.slope(moved, activation.forward(moved))

    def pullback(self, e):
        if self._slope is None:
            self._slope = self.spec.activation.slope(*self._base)
        return self.spec.activation.pullback(self._slope, e)


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
