"""Activations with their derivative and their difference, free of cancellation.

For a pre-activation ``u = uhat + s`` each activation gives

    bracket = act(uhat + s) - act(uhat)      slope = act'(uhat + s)

from ``uhat`` and ``s`` without subtracting two nearly equal numbers: in a relaxation ``s`` is often 1e-5 of
``uhat`` and the plain difference would be rounding noise (docs/method.md fact 8). All functions are elementwise, keep
shape and dtype, and work for any floating dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
# Gauss-Legendre nodes and weights on [0, 1], 5 points: exact for polynomials of degree 9.
_GAUSS_LEGENDRE = tuple(
    (0.5 + 0.5 * node, 0.5 * weight)
    for node, weight in (
        (-0.9061798459386640, 0.2369268850561891),
        (-0.5384693101056831, 0.4786286704993665),
        (0.0, 0.5688888888888889),
        (0.5384693101056831, 0.4786286704993665),
        (0.9061798459386640, 0.2369268850561891),
    )
)
# Below this |s| the quadrature is exact to 1e-15, above it the plain difference loses at most two digits.
_QUADRATURE_REACH = 0.25


@dataclass(frozen=True)
class Activation:
    """An elementwise activation. Subclasses give the mathematics; instances are plain values."""

    #: True where ``act`` is non-decreasing, so that max-pooling before or after it gives the same numbers.
    monotone = False
    #: True where the kernels have device code for it.
    in_kernels = True

    def forward(self, u: Tensor) -> Tensor:
        """``act(u)``."""
        raise NotImplementedError

    def slope(self, u: Tensor, a: Tensor) -> Tensor:
        """What :meth:`pullback` needs of the point ``u``, ``a = act(u)``: here ``act'(u)``."""
        raise NotImplementedError

    def pullback(self, slope: Tensor, e: Tensor) -> Tensor:
        """``act'(u) * e`` from :meth:`slope` or :meth:`deviate` at u."""
        return e * slope

    def anchor(self, u: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`deviate` needs of the forward pass ``u``, ``a = act(u)``; computed once a relaxation."""
        return (u, a)

    def deviate(self, anchor: tuple[Tensor, ...], s: Tensor) -> tuple[Tensor, Tensor]:
        """``(bracket, slope)`` at ``uhat + s``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Relu(Activation):
    monotone = True

    def forward(self, u):
        return F.relu(u)

    # The slope is kept as a number that is positive exactly where the gate is open.

    def slope(self, u, a):
        return a

    def pullback(self, slope, e):
        return torch.ops.aten.threshold_backward(e, slope, 0)

    def anchor(self, u, a):
        return (u.clamp(max=0), a.neg())

    def deviate(self, anchor, s):
        # max(s, -uhat) where uhat > 0 and max(uhat + s, 0) elsewhere, in one form for both.
        negative_part, floor = anchor
        bracket = torch.maximum(s + negative_part, floor)
        return bracket, bracket - floor


@dataclass(frozen=True)
class LeakyRelu(Activation):
    negative_slope: float = 0.01

    @property
    def monotone(self):  # type: ignore[override]
        return self.negative_slope >= 0

    def forward(self, u):
        return F.leaky_relu(u, self.negative_slope)

    def _slope(self, gate: Tensor, like: Tensor) -> Tensor:
        return gate.to(like.dtype).mul_(1 - self.negative_slope).add_(self.negative_slope)

    def slope(self, u, a):
        return self._slope(u > 0, u)

    def anchor(self, u, a):
        return Relu().anchor(u, F.relu(u))

    def deviate(self, anchor, s):
        bracket, room = Relu().deviate(anchor, s)
        bracket = bracket.mul_(1 - self.negative_slope).add_(s, alpha=self.negative_slope)
        return bracket, self._slope(room > 0, s)


@dataclass(frozen=True)
class Hardtanh(Activation):
    """``u`` clipped to [min_val, max_val], min_val < max_val; ReLU6 is that from 0 to 6."""

    min_val: float = -1.0
    max_val: float = 1.0

    monotone = True
    in_kernels = False

    def forward(self, u):
        return F.hardtanh(u, self.min_val, self.max_val)

    # The slope is kept as the point itself: 1 strictly between the bounds, 0 on them and outside.

    def slope(self, u, a):
        return u

    def pullback(self, slope, e):
        return torch.ops.aten.hardtanh_backward(e, slope, self.min_val, self.max_val)

    def anchor(self, u, a):
        return (u, u - a, self.min_val - a, self.max_val - a)

    def deviate(self, anchor, s):
        # act(uhat) moves by s and by what uhat has in excess of it, from bound to bound: for uhat inside, by s.
        u, excess, floor, ceiling = anchor
        return torch.clamp(s + excess, floor, ceiling), u + s


@dataclass(frozen=True)
class Tanh(Activation):
    monotone = True

    def forward(self, u):
        return torch.tanh(u)

    def slope(self, u, a):
        return 1 - a * a

    def deviate(self, anchor, s):
        # tanh(p) - tanh(q) = tanh(p - q) (1 - tanh(p) tanh(q))
        u, a = anchor
        moved = torch.tanh(u + s)
        return torch.tanh(s).mul_(1 - a * moved), 1 - moved * moved


@dataclass(frozen=True)
class Sigmoid(Activation):
    monotone = True

    def forward(self, u):
        return torch.sigmoid(u)

    def slope(self, u, a):
        return a * (1 - a)

    def anchor(self, u, a):
        return (u, a, torch.sigmoid(-u))

    def deviate(self, anchor, s):
        bracket, p, q = _sigmoid_difference(anchor, s)
        return bracket, p * q


def _sigmoid_difference(anchor: tuple[Tensor, Tensor, Tensor], s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sigmoid(u + s) - sigmoid(u)``, ``sigmoid(u + s)``, ``sigmoid(-u - s)`` from ``(u, sigmoid(u), sigmoid(-u))``.

    With p = sigmoid(u), q = 1 - p and p', q' at u + s: the difference is tanh(s/2) (p q' + q p'), a sum of
    positive terms.
    """
    u, p, q = anchor
    w = u + s
    moved_p, moved_q = torch.sigmoid(w), torch.sigmoid(-w)
    return torch.tanh(s * 0.5).mul_(p * moved_q + q * moved_p), moved_p, moved_q


@dataclass(frozen=True)
class Silu(Activation):
    def forward(self, u):
        return F.silu(u)

    def slope(self, u, a):
        p = torch.sigmoid(u)
        return p * (1 + u * (1 - p))

    def anchor(self, u, a):
        return (u, torch.sigmoid(u), torch.sigmoid(-u))

    def deviate(self, anchor, s):
        # (u + s) p' - u p = s p' + u (p' - p)
        u = anchor[0]
        difference, p, q = _sigmoid_difference(anchor, s)
        return s * p + u * difference, p * (1 + (u + s) * q)


@dataclass(frozen=True)
class Gelu(Activation):
    """``u Phi(u)`` with the normal distribution function Phi (Hendrycks and Gimpel, arXiv 1606.08415)."""

    def forward(self, u):
        return F.gelu(u)

    def slope(self, u, a):
        return _normal_cdf(u) + u * _normal_pdf(u)

    def deviate(self, anchor, s):
        # (u + s) Phi(u + s) - u Phi(u) = s Phi(u + s) + u (Phi(u + s) - Phi(u))
        u = anchor[0]
        w = u + s
        cdf = _normal_cdf(w)
        near = sum(weight * _normal_pdf(u + node * s) for node, weight in _GAUSS_LEGENDRE) * s
        difference = torch.where(s.abs() < _QUADRATURE_REACH, near, cdf - _normal_cdf(u))
        return s * cdf + u * difference, cdf + w * _normal_pdf(w)


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-u * _SQRT_HALF)


def _normal_pdf(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u * u) * _INV_SQRT_2PI


@dataclass(frozen=True)
class GeluTanh(Activation):
    """``u (1 + tanh(k (u + c u^3))) / 2``, k = sqrt(2/pi), c = 0.044715: GELU's tanh form (same paper)."""

    _K = math.sqrt(2 / math.pi)
    _C = 0.044715

    def forward(self, u):
        return F.gelu(u, approximate="tanh")

    def _inner(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._K * (u + self._C * u * u * u), self._K * (1 + 3 * self._C * u * u)

    def slope(self, u, a):
        w, dw = self._inner(u)
        p, q = torch.sigmoid(2 * w), torch.sigmoid(-2 * w)
        return p + 2 * u * p * q * dw

    def anchor(self, u, a):
        w, _ = self._inner(u)
        return (u, w, torch.sigmoid(2 * w), torch.sigmoid(-2 * w))

    def deviate(self, anchor, s):
        # (1 + tanh(w)) / 2 = sigmoid(2 w); the inner cubic's difference is a polynomial in s.
        u, w, p, q = anchor
        dw = self._K * s * (1 + self._C * (3 * u * u + 3 * u * s + s * s))
        difference, moved_p, moved_q = _sigmoid_difference((2 * w, p, q), 2 * dw)
        moved = u + s
        _, inner_slope = self._inner(moved)
        return s * moved_p + u * difference, moved_p + 2 * moved * moved_p * moved_q * inner_slope
