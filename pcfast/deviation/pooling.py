"""Max and average pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .step import LinearMapStep, Step

_aten = torch.ops.aten


class MaxPool2dStep(Step):
    """max over windows; the arg-max at the current point routes errors (first wins ties, NaN wins).

    Where windows tile the input, max_k((a_k - a_k*) + d_k) is free of cancellation. Overlapping or padded
    windows choose their arg-max from a + d and then difference exactly: (a_k' - a_k*) + d_k'.
    """

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._geometry = (spec.kernel, spec.stride, spec.padding)

    def _pool(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return _aten.max_pool2d_with_indices(a, *self._geometry, (1, 1), self.spec.ceil_mode)

    def forward(self, a):
        out, self._winners = self._pool(a)
        self._input, self._pooled, self._below_winner = a, out, None
        return out

    def _relative_to_winner(self) -> Tensor:
        """a_k - a_k* for every element; elements outside all windows keep 0."""
        (rows, columns), (height, width) = self.spec.kernel, self._input.shape[2:]
        winner = self._pooled.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :height, :width]
        relative = torch.zeros_like(self._input)
        covered = (slice(None), slice(None), slice(winner.shape[2]), slice(winner.shape[3]))
        relative[covered] = self._input[covered] - winner
        return relative

    def deviate(self, d):
        if self.spec.tiles:
            if self._below_winner is None:
                self._below_winner = self._relative_to_winner()
            out, self._winners = self._pool(self._below_winner + d)
            return out
        self._winners = self._pool(self._input + d)[1]
        chosen = self._winners.flatten(2)
        base = self._input.flatten(2).gather(2, chosen).view_as(self._pooled)
        return (base - self._pooled) + d.flatten(2).gather(2, chosen).view_as(self._pooled)

    def release(self):
        self._winners = None  # eight bytes each

    def pullback(self, e):
        if self._winners is None:
            self._winners = self._pool(self._input)[1]
        return _aten.max_pool2d_with_indices_backward(
            e, self._input, *self._geometry, (1, 1), self.spec.ceil_mode, self._winners
        )


class AvgPool2dStep(LinearMapStep):
    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._geometry = (
            spec.kernel,
            spec.stride,
            spec.padding,
            spec.ceil_mode,
            spec.count_include_pad,
            spec.divisor_override,
        )

    def _apply(self, a):
        return F.avg_pool2d(a, *self._geometry)

    def pullback(self, e):
        shape_only = e.new_zeros(()).expand(self._shape)
        return _aten.avg_pool2d_backward(e, shape_only, *self._geometry)


class AdaptiveAvgPool2dStep(LinearMapStep):
    def _apply(self, a):
        return F.adaptive_avg_pool2d(a, self.spec.size)

    def pullback(self, e):
        shape_only = e.new_zeros(()).expand(self._shape)
        return _aten._adaptive_avg_pool2d_backward(e, shape_only)
