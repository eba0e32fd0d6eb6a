"""Batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..support.replay import LOCK
from .step import Gradients, Step

_aten = torch.ops.aten


class BatchNormStep(Step):
    """y = gamma (a - m) / sigma + beta.

    Where gamma and beta move (:meth:`Step.refresh`), with n = (a - m) / sigma

        y' - y = gamma' (n' - n) + (gamma' - gamma) n + (beta' - beta)

    whose last two terms, the drift, do not depend on the deviation.

    In training mode m and sigma are those of the current beliefs and are differentiated through; the running
    statistics move by those of the forward pass when the step is over. In eval mode it is a fixed scale per channel.
    """

    owned = True
    _drift: Tensor | None = None
    _deviation: Tensor | None = None  # of the current point from the base, where m and sigma are constants
    _point: Tensor | None = None  # x - m there, where they are the batch's

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
            mean = a.mean(self._axes, keepdim=True)
        else:
            mean = self.precision.to_state(module.running_mean).view(self._view)
            self._variance = self.precision.to_state(module.running_var).view(self._view)
        self._centred = a - mean
        if spec.batch_statistics:  # torch.var_mean takes 20 times as long on CPUs
            self._variance = self._centred.square().mean(self._axes, keepdim=True)
            self._batch = mean.flatten(), self._variance.flatten()
        self._inverse = torch.rsqrt(self._variance + spec.eps)
        self._deviation = self._point = None
        self._current_inverse = self._inverse
        return (self._centred * (self._gamma * self._inverse)).add_(self._beta)

    def snapshot_params(self):
        if self.spec.affine and self.has_gradients:
            self._held, self._base = (self._gamma.clone(), self._beta.clone()), self._centred * self._inverse

    def refresh(self):
        if self.spec.affine and self.has_gradients:
            gamma, beta = self.module.weight.detach(), self.module.bias.detach()
            self._gamma = self.precision.to_state(gamma).view(self._view)
            self._beta = self.precision.to_state(beta).view(self._view)
            held_gamma, held_beta = self._held
            self._drift = (self._gamma - held_gamma) * self._base + (self._beta - held_beta)

    def param_shift(self):
        return None if self._drift is None else self._drift.clone()  # owned, as what deviate gives

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

    def deviate(self, d):
        return self._with_drift(self._deviate(d, None))

    def consume(self, d):
        return self._with_drift(self._deviate(d, d))

    def _with_drift(self, moved: Tensor) -> Tensor:
        return moved if self._drift is None else moved.add_(self._drift)

    def _deviate(self, d: Tensor, out: Tensor | None) -> Tensor:
        """With the parameters of now, their change at the base point, the drift, being apart.

        ``out``: where to put it, ``d`` itself or new memory.
        """
        if not self.spec.batch_statistics:
            self._deviation = d
            return d * (self._gamma * self._inverse)
        # In place: new tensors of this size cost CPUs more, in page faults, than the arithmetic.
        shift = self._point = torch.sub(d, d.mean(self._axes, keepdim=True), out=self._point)
        # var(a + d) - var(a), and from it 1/sigma' - 1/sigma without cancellation
        out = torch.add(shift, self._centred, alpha=2, out=out).mul_(shift)
        spread = out.mean(self._axes, keepdim=True)
        inverse = self._current_inverse = torch.rsqrt(self._variance + spread + self.spec.eps)
        sharpening = -spread * inverse * self._inverse * (inverse * self._inverse) / (inverse + self._inverse)
        out = torch.mul(self._centred, self._gamma * sharpening, out=out)
        out.addcmul_(shift, self._gamma * inverse)
        shift.add_(self._centred)
        return out

    def _centred_now(self) -> Tensor:
        """x - m at the current point."""
        if self._point is not None:
            return self._point
        return self._centred if self._deviation is None else self._centred + self._deviation

    def _backward(
        self, e: Tensor, *, need_input: bool, need_gradients: bool = False
    ) -> tuple[Gradients, Tensor | None]:
        """``(gradients, J^T e)``: torch's own backward pass at the current point, whose mean is 0."""
        owners = (self.module.weight, self.module.bias) if self.spec.affine else (None, None)
        trained = [need_gradients and p is not None and p.requires_grad for p in owners]
        inverse = self._current_inverse.flatten()
        zeros = torch.zeros_like(inverse)
        below, *gradients = _aten.native_batch_norm_backward(
            e, self._centred_now() if self.spec.batch_statistics or trained[0] else self._centred,
            self._gamma.flatten() if self.spec.affine else None, zeros, self._variance.flatten(), zeros, inverse,
            self.spec.batch_statistics, self.spec.eps, [need_input, *trained],
        )  # fmt: skip
        return [(p, g) for p, g, wanted in zip(owners, gradients, trained, strict=True) if wanted], below

    def pullback(self, e):
        return self._backward(e, need_input=True)[1]

    def gradients(self, e):
        return self._backward(e, need_input=False, need_gradients=True)[0]

    def differentiate(self, e, *, need_input, need_gradients, factor):
        gradients, below = self._backward(e, need_input=need_input, need_gradients=need_gradients)
        return [(p, g if factor == 1.0 else g * factor) for p, g in gradients], below
