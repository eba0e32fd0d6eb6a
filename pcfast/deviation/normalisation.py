"""Batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..support.replay import LOCK
from .step import Gradients, Step


class BatchNormStep(Step):
    """y = gamma (a - m) / sigma + beta.

    Where gamma and beta move (:meth:`Step.refresh`), with n = (a - m) / sigma

        y' - y = gamma' (n' - n) + (gamma' - gamma) n + (beta' - beta)

    whose last two terms, the drift, do not depend on the deviation.

    In training mode m and sigma are those of the current beliefs and are differentiated through; the running
    statistics move by those of the forward pass when the step is over. In eval mode it is a fixed scale per channel.
    """

    _drift: Tensor | None = None

    def forward(self, a):
        module, spec = self.module, self.spec
        self._axes = (0, *range(2, a.dim()))
        self._view = (1, -1, *[1] * (a.dim() - 2))
        self._count = a.numel() // spec.features
        gamma = self.precision.to_state(module.weight.detach()) if spec.affine else None
        beta = self.precision.to_state(module.bias.detach()) if spec.affine else None
        self._gamma = 1.0 if gamma is None else gamma.view(self._view)
        self._beta = 0.0 if beta is None else beta.view(self._view)
        if spec.batch_statistics:
            self._check_count()
            variance, mean = torch.var_mean(a, self._axes, correction=0, keepdim=True)
            self._batch = mean.flatten(), variance.flatten()
        else:
            mean = self.precision.to_state(module.running_mean).view(self._view)
            variance = self.precision.to_state(module.running_var).view(self._view)
        self._centred = a - mean
        self._variance = variance
        self._inverse = torch.rsqrt(variance + spec.eps)
        self._point(self._centred, self._inverse)
        return self._normalised * self._gamma + self._beta

    def snapshot_params(self):
        if self.spec.affine and self.has_gradients:
            self._held, self._base = (self._gamma.clone(), self._beta.clone()), self._normalised

    def refresh(self):
        if self.spec.affine and self.has_gradients:
            gamma, beta = self.module.weight.detach(), self.module.bias.detach()
            self._gamma = self.precision.to_state(gamma).view(self._view)
            self._beta = self.precision.to_state(beta).view(self._view)
            held_gamma, held_beta = self._held
            self._drift = (self._gamma - held_gamma) * self._base + (self._beta - held_beta)

    def param_shift(self):
        return self._drift

    def _check_count(self) -> None:
        if self._count <= 1:
            raise ShapeError(
                "x",
                "a batch with one value per channel",
                "more than one value per channel for BatchNorm in training mode",
                "Use a larger batch or model.eval().",
            )

    @torch.no_grad()
    def update_statistics(self, failed):
        module, batches = self.module, self.module.num_batches_tracked
        if not self.spec.moves_statistics:
            return
        mean, variance = self._batch
        with LOCK:
            if batches is not None:
                batches.add_(1 if failed is None else ~failed)
            momentum = self.spec.momentum
            if momentum is None and batches is None:
                return  # torch moves nothing then
            if momentum is None:  # cumulative average
                momentum = 1.0 / batches.to(mean.dtype)
            unbiased = variance * (self._count / (self._count - 1))
            for running, current in ((module.running_mean, mean), (module.running_var, unbiased)):
                change = (current - running) * momentum
                running.add_(change if failed is None else change.masked_fill_(failed, 0))

    def _point(self, centred: Tensor, inverse: Tensor) -> None:
        """The current point; x - m normalised is what gradients read."""
        self._normalised, self._current_inverse = centred * inverse, inverse

    def deviate(self, d):
        moved = self._deviate(d)
        return moved if self._drift is None else moved + self._drift

    def _deviate(self, d):
        """With the parameters of now: their change at the base point, the drift, is apart."""
        if not self.spec.batch_statistics:
            self._point(self._centred + d, self._inverse)
            return d * (self._gamma * self._inverse)
        shift = d - d.mean(self._axes, keepdim=True)
        # var(a + d) - var(a), and from it 1/sigma' - 1/sigma without cancellation
        spread = (shift * (2 * self._centred + shift)).mean(self._axes, keepdim=True)
        inverse = torch.rsqrt(self._variance + spread + self.spec.eps)
        sharpening = -spread * inverse * self._inverse * (inverse * self._inverse) / (inverse + self._inverse)
        self._point(self._centred + shift, inverse)
        return self._gamma * (shift * inverse + self._centred * sharpening)

    def pullback(self, e):
        scaled = e * (self._gamma * self._current_inverse)
        if not self.spec.batch_statistics:
            return scaled
        along = (scaled * self._normalised).mean(self._axes, keepdim=True)
        return scaled - scaled.mean(self._axes, keepdim=True) - self._normalised * along

    def gradients(self, e):
        result: Gradients = []
        if self.spec.affine and self.module.weight.requires_grad:
            result.append((self.module.weight, (e * self._normalised).sum(self._axes)))
        if self.spec.affine and self.module.bias.requires_grad:
            result.append((self.module.bias, e.sum(self._axes)))
        return result
