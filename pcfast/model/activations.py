"""Activations with their derivative and their difference, free of cancellation.

For a pre-activation ``u = uhat + s`` each activation gives

    act_diff = act(uhat + s) - act(uhat)      derivative = act'(uhat + s)

from ``uhat`` and ``s`` without subtracting two nearly equal numbers: in a relaxation ``s`` is often 1e-5 of
``uhat`` and the plain difference would be rounding noise (deviation form, docs/method.md fact 8). All functions are
elementwise, keep shape and dtype, and work for any floating dtype.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import host

_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Activation:
    """An elementwise activation. Subclasses give the mathematics; instances are plain values."""

    #: True where ``act`` is non-decreasing, so that max-pooling before or after it gives the same numbers.
    monotone = False
    #: True where the kernels have device code for it (kernels/codes.py, csrc/resident/activations.cuh).
    in_kernels = False
    #: True where :meth:`deviate` takes memory for its two results, of which ``s`` may be the first; None for new.
    takes_memory = False

    def forward(self, u: Tensor) -> Tensor:
        """``act(u)``."""
        raise NotImplementedError

    def derivative(self, u: Tensor, a: Tensor) -> Tensor:
        """What :meth:`pullback` needs of the point ``u``, ``a = act(u)``: here ``act'(u)``."""
        raise NotImplementedError

    def pullback(self, derivative: Tensor, e: Tensor) -> Tensor:
        """``act'(u) * e`` from :meth:`derivative` or :meth:`deviate` at u."""
        return e * derivative

    def saved(self, u: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`deviate` needs of the forward pass ``u``, ``a = act(u)``; computed once a relaxation."""
        return (u, a)

    def deviate(self, saved: tuple[Tensor, ...], s: Tensor) -> tuple[Tensor, Tensor]:
        """``(act_diff, derivative)`` at ``uhat + s``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Relu(Activation):
    in_kernels = True
    monotone = True
    takes_memory = True

    def forward(self, u):
        return F.relu(u)

    # The derivative is kept as a number that is positive exactly where the gate is open.

    def derivative(self, u, a):
        return a

    def pullback(self, derivative, e):
        return torch.ops.aten.threshold_backward(e, derivative, 0)

    def saved(self, u, a):
        return (u.clamp(max=0), a.neg())

    def deviate(self, saved, s, memory=(None, None)):
        # max(s, -uhat) where uhat > 0 and max(uhat + s, 0) elsewhere, in one form for both.
        negative_part, floor = saved
        act_diff = torch.add(s, negative_part, out=memory[0])
        torch.maximum(act_diff, floor, out=act_diff)
        return act_diff, torch.sub(act_diff, floor, out=memory[1])


@dataclass(frozen=True)
class LeakyRelu(Activation):
    in_kernels = True
    negative_slope: float = 0.01

    @property
    def monotone(self):  # type: ignore[override]
        return self.negative_slope >= 0

    def forward(self, u):
        return F.leaky_relu(u, self.negative_slope)

    def _derivative(self, gate: Tensor, like: Tensor) -> Tensor:
        return gate.to(like.dtype).mul_(1 - self.negative_slope).add_(self.negative_slope)

    def derivative(self, u, a):
        return self._derivative(u > 0, u)

    def saved(self, u, a):
        return Relu().saved(u, F.relu(u))

    def deviate(self, saved, s):
        act_diff, room = Relu().deviate(saved, s)
        act_diff = act_diff.mul_(1 - self.negative_slope).add_(s, alpha=self.negative_slope)
        return act_diff, self._derivative(room > 0, s)


@dataclass(frozen=True)
class Hardtanh(Activation):
    """``u`` clipped to [min_val, max_val], min_val < max_val; ReLU6 is that from 0 to 6."""

    min_val: float = -1.0
    max_val: float = 1.0

    monotone = True

    def forward(self, u):
        return F.hardtanh(u, self.min_val, self.max_val)

    # The derivative is kept as the point itself: 1 strictly between the bounds, 0 on them and outside.

    def derivative(self, u, a):
        return u

    def pullback(self, derivative, e):
        return torch.ops.aten.hardtanh_backward(e, derivative, self.min_val, self.max_val)

    def saved(self, u, a):
        return (u, u - a, self.min_val - a, self.max_val - a)

    def deviate(self, saved, s):
        # act(uhat) moves by s and by what uhat has in excess of it, from bound to bound: for uhat inside, by s.
        u, excess, floor, ceiling = saved
        return torch.clamp(s + excess, floor, ceiling), u + s


@dataclass(frozen=True)
class Tanh(Activation):
    in_kernels = True
    monotone = True

    def forward(self, u):
        return torch.tanh(u)

    # The derivative is kept as the value, of which 1 - tanh(u)^2 is made on the way back.

    def derivative(self, u, a):
        return a

    def pullback(self, derivative, e):
        return torch.ops.aten.tanh_backward(e, derivative)

    def deviate(self, saved, s):
        # tanh(p) - tanh(q) = tanh(p - q) (1 - tanh(p) tanh(q))
        u, a = saved
        moved, act_diff = (u + s).tanh_(), torch.tanh(s)
        return act_diff.addcmul_(act_diff * a, moved, value=-1), moved


@dataclass(frozen=True)
class Sigmoid(Activation):
    in_kernels = True
    monotone = True

    def forward(self, u):
        return torch.sigmoid(u)

    def derivative(self, u, a):
        return a * (1 - a)

    def saved(self, u, a):
        return (u, a, torch.sigmoid(-u))

    def deviate(self, saved, s):
        u, p, q = saved
        act_diff, moved_p, moved_q = _sigmoid_difference(p, q, u + s, s)
        return act_diff, moved_p.mul_(moved_q)


def _sigmoid_difference(p: Tensor, q: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``sigmoid(w) - p``, ``sigmoid(w)``, ``sigmoid(-w)`` at w = u + s, where p = sigmoid(u), q = sigmoid(-u).

    With p', q' at w: the difference is tanh(s/2) (p q' + q p'), a sum of positive terms.
    """
    moved_p, moved_q = torch.sigmoid(w), torch.neg(w).sigmoid_()
    return (p * moved_q).addcmul_(q, moved_p).mul_((s * 0.5).tanh_()), moved_p, moved_q


@dataclass(frozen=True)
class Silu(Activation):
    in_kernels = True

    def forward(self, u):
        return F.silu(u)

    # The derivative is kept as the point itself: torch forms it and its product with an error in one pass.

    def derivative(self, u, a):
        return u

    def pullback(self, derivative, e):
        return torch.ops.aten.silu_backward(e, derivative)

    def saved(self, u, a):
        return (u, torch.sigmoid(u), torch.sigmoid(-u))

    def deviate(self, saved, s):
        # (u + s) p' - u p = s p' + u (p' - p)
        u, p, q = saved
        w = u + s
        difference, moved_p, _ = _sigmoid_difference(p, q, w, s)
        return moved_p.mul_(s).addcmul_(u, difference), w


@dataclass(frozen=True)
class Gelu(Activation):
    """``u Phi(u)`` with the normal distribution function Phi (Hendrycks and Gimpel, arXiv 1606.08415).

    Phi has no addition theorem. So where ``s`` is within reach the difference is Taylor's polynomial at uhat, whose
    coefficients :meth:`saved` gives, and elsewhere the plain difference, which keeps its digits there.
    """

    in_kernels = True
    #: Degree of the polynomial: each more costs one pass an iteration, and one tensor.
    _DEGREE = 7
    #: Its remainder is at most this times s^8: 48 bounds the eighth derivative of u Phi(u).
    _REMAINDER = 48 / math.factorial(8)

    def forward(self, u):
        return F.gelu(u)

    # The derivative is kept as the point itself: torch forms it and its product with an error in one pass.

    def derivative(self, u, a):
        return u

    def pullback(self, derivative, e):
        return torch.ops.aten.gelu_backward(e, derivative)

    def saved(self, u, a):
        # With the normal density phi and h_k = -phi^(k) / k!: (k + 1) h_(k+1) = -u h_k - h_(k-1), and the k-th
        # derivative of u Phi(u) is phi^(k-2) - phi^(k).
        before, h = None, torch.exp(-0.5 * u * u).mul_(-_INV_SQRT_2PI)
        earlier = [h]
        coefficients = [torch.special.ndtr(u).addcmul_(u, h, value=-1)]
        for k in range(1, self._DEGREE + 1):
            before, h = h, (u * h if before is None else torch.addcmul(before, u, h)).mul_(-1 / k)
            earlier.append(h)
            if k > 1:
                coefficients.append(torch.sub(h, earlier[k - 2], alpha=1 / (k * (k - 1))))
        return (u, a, *coefficients)

    @classmethod
    @functools.cache
    def _reach(cls, dtype: torch.dtype) -> tuple[float, float]:
        """Where the remainder meets the rounding of the plain difference, and the greatest number below that."""
        reach = (torch.finfo(dtype).eps / cls._REMAINDER) ** (1 / (cls._DEGREE + 1))
        reach = torch.tensor(reach, dtype=dtype)
        return float(reach), float(reach.nextafter(torch.zeros_like(reach)))

    def deviate(self, saved, s):
        u, a, *coefficients = saved
        w, (reach, within) = u + s, self._reach(s.dtype)
        near = torch.addcmul(coefficients[-2], coefficients[-1], s)
        for coefficient in reversed(coefficients[:-2]):
            near = torch.addcmul(coefficient, near, s, out=near)
        if host.readable(s.device) and s.numel():  # the same numbers, without the plain difference
            low, high = torch.aminmax(s)
            if -reach < float(low) and float(high) < reach:
                return near.mul_(s), w
        # Each of the two is exactly zero where the other counts; torch.where takes several times as long on CPUs.
        far = torch.ops.aten.hardshrink_backward(F.gelu(w).sub_(a), s, within)
        return far.addcmul_(torch.ops.aten.hardtanh_backward(near, s, -reach, reach), s), w


@dataclass(frozen=True)
class GeluTanh(Activation):
    """``u (1 + tanh(k (u + c u^3))) / 2``, k = sqrt(2/pi), c = 0.044715: GELU's tanh form (same paper)."""

    in_kernels = True
    _K = math.sqrt(2 / math.pi)
    _C = 0.044715

    def forward(self, u):
        return F.gelu(u, approximate="tanh")

    # (1 + tanh(v)) / 2 = sigmoid(2 v): below, inner is 2 v = 2 k (u + c u^3).

    def _inner(self, u: Tensor) -> Tensor:
        return (u * u).mul_(self._C).add_(1).mul_(u).mul_(2 * self._K)

    def _inner_derivative(self, u: Tensor) -> Tensor:
        return (u * u).mul_(6 * self._K * self._C).add_(2 * self._K)

    def _derivative(self, u: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """p + u p q inner'(u)."""
        return torch.addcmul(p, p, self._inner_derivative(u).mul_(u).mul_(q))

    def derivative(self, u, a):
        inner = self._inner(u)
        return self._derivative(u, torch.sigmoid(inner), torch.sigmoid(-inner))

    def saved(self, u, a):
        inner = self._inner(u)
        return (u, inner, torch.sigmoid(inner), torch.sigmoid(-inner), self._inner_derivative(u), 3 * u)

    def deviate(self, saved, s):
        # The inner cubic's difference is s (inner'(u) + 2 k c s (3 u + s)).
        u, inner, p, q, inner_slope, thrice = saved
        step = torch.addcmul(inner_slope, thrice + s, s, value=2 * self._K * self._C).mul_(s)
        difference, moved_p, moved_q = _sigmoid_difference(p, q, inner + step, step)
        derivative = self._derivative(u + s, moved_p, moved_q)
        return moved_p.mul_(s).addcmul_(u, difference), derivative
