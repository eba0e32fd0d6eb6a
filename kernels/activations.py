"""Activations of a register tile: value, difference and derivative, fp32 in and out, free of cancellation.

For a pre-activation u = uhat + s

    act_diff = act(uhat + s) - act(uhat)      derivative = act'(uhat + s)

never by subtracting two nearly equal numbers: deviation form (docs/method.md, fact 8). pcfast/model/activations.py
has the same identities for whole tensors; here they are chosen for fp32, and for few special functions an element.

Everything lives in registers; these functions touch no memory and mask nothing. NaN in uhat or s comes out as NaN
(identity does not look at uhat). exp, tanh and erfc are libdevice's, good to 2 ulp: triton's own ``tl.exp`` is the
hardware's fast one, whose error grows with its argument.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from pcfast.model import activations

from .codes import ACTIVATIONS

# The constexpr argument ACT.
IDENTITY = tl.constexpr(ACTIVATIONS[type(None)])
RELU = tl.constexpr(ACTIVATIONS[activations.Relu])
LEAKY_RELU = tl.constexpr(ACTIVATIONS[activations.LeakyRelu])
TANH = tl.constexpr(ACTIVATIONS[activations.Tanh])
SIGMOID = tl.constexpr(ACTIVATIONS[activations.Sigmoid])
SILU = tl.constexpr(ACTIVATIONS[activations.Silu])
GELU = tl.constexpr(ACTIVATIONS[activations.Gelu])
GELU_TANH = tl.constexpr(ACTIVATIONS[activations.GeluTanh])

# In products the tensor stands first: constexpr * tensor is a constexpr in the interpreter.
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# Gauss-Legendre with 3 points, on [-1/2, 1/2]: weights 4/9, 5/18, 5/18 at 0, +-sqrt(3/5)/2.
_QUADRATURE_NODE = tl.constexpr(0.3872983346207417)
_QUADRATURE_MIDDLE = tl.constexpr(4 / 9)
_QUADRATURE_SIDE = tl.constexpr(5 / 18)
# Relative error of 3 points on the normal density: 5e-7 s^6 He_6(u), below 3e-7 for |u| <= 5 at this |s|. Above it
# the plain difference of the normal distribution function loses at most three bits.
_QUADRATURE_REACH = tl.constexpr(0.2)
# u (1 + tanh(k (u + c u^3))) / 2, k = sqrt(2 / pi)
_GELU_K = tl.constexpr(0.7978845608028654)
_GELU_C = tl.constexpr(0.044715)

_ALL_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def exact_difference(x, y):
    """x - y of two numbers that nearly cancel, one of which may be a product.

    The compiler fuses a product with a plain subtraction into one instruction, which takes the product before it was
    rounded: of x - x the rounding error is left. It never fuses a subtraction that names its rounding. Subnormal
    numbers count as zero.
    """
    return libdevice.sub_rn(x, y)


@triton.jit
def _relu_diff(uhat, s):
    # max(s, -uhat) where uhat > 0 and max(uhat + s, 0) elsewhere, in one form for both
    negative_part = tl.minimum(uhat, 0.0, propagate_nan=_ALL_NAN)
    floor = -tl.maximum(uhat, 0.0, propagate_nan=_ALL_NAN)
    return tl.maximum(s + negative_part, floor, propagate_nan=_ALL_NAN)


@triton.jit
def _gate(w, closed):
    # no comparison holds for NaN, which would pass as a closed gate
    return tl.where(w > 0, 1.0, tl.where(w <= 0, closed, w))


@triton.jit
def _sigmoids(x):
    """``sigmoid(x), sigmoid(-x)``, both with full relative accuracy, from one exp."""
    e = libdevice.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    positive = x > 0
    return tl.where(positive, large, small), tl.where(positive, small, large)


@triton.jit
def _sigmoid_difference(x, dx):
    """``sigmoid(x + dx) - sigmoid(x), sigmoid(x + dx), sigmoid(-x - dx)``.

    With p = sigmoid(x), q = 1 - p and p', q' at x + dx: p' - p = tanh(dx / 2) (p q' + q p'), a sum of positive terms.
    """
    p, q = _sigmoids(x)
    moved_p, moved_q = _sigmoids(x + dx)
    return libdevice.tanh(0.5 * dx) * (p * moved_q + q * moved_p), moved_p, moved_q


@triton.jit
def _normal_pdf(u):
    return libdevice.exp(-0.5 * u * u) * _INV_SQRT_2PI


@triton.jit
def _normal_difference(u, s):
    """``Phi(u + s) - Phi(u), Phi(u + s)`` of the normal distribution function Phi."""
    w = u + s
    # Far from zero Phi is differenced in the tail where it is small: Phi(-w) above, Phi(w) below.
    upper = u + w > 0
    tail = tl.where(upper, _SQRT_HALF, -_SQRT_HALF)
    tail_w = 0.5 * libdevice.erfc(tail * w)
    tail_u = 0.5 * libdevice.erfc(tail * u)
    far = tl.where(upper, tail_u - tail_w, tail_w - tail_u)
    middle = u + 0.5 * s
    step = s * _QUADRATURE_NODE
    sides = _normal_pdf(middle - step) + _normal_pdf(middle + step)
    near = s * (_normal_pdf(middle) * _QUADRATURE_MIDDLE + sides * _QUADRATURE_SIDE)
    difference = tl.where(tl.abs(s) < _QUADRATURE_REACH, near, far)
    return difference, tl.where(upper, 1.0 - tail_w, tail_w)


@triton.jit
def _gelu_inner(u):
    """k (u + c u^3)"""
    return u * _GELU_K * (1.0 + u * u * _GELU_C)


@triton.jit
def act(u, ACT: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """act(u)"""
    tl.static_assert(ACT >= IDENTITY and ACT <= GELU_TANH, "ACT is none of the codes of kernels/codes.py")
    if ACT == IDENTITY:
        value = u
    elif ACT == RELU:
        value = tl.maximum(u, 0.0, propagate_nan=_ALL_NAN)
    elif ACT == LEAKY_RELU:
        value = tl.where(u > 0, u, u * NEGATIVE_SLOPE)
    elif ACT == TANH:
        value = libdevice.tanh(u)
    elif ACT == SIGMOID:
        value, _ = _sigmoids(u)
    elif ACT == SILU:
        p, _ = _sigmoids(u)
        value = u * p
    elif ACT == GELU:
        value = u * (0.5 * libdevice.erfc(-u * _SQRT_HALF))
    else:
        p, _ = _sigmoids(2.0 * _gelu_inner(u))
        value = u * p
    return value


@triton.jit
def act_diff_and_derivative(uhat, s, ACT: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """``act(uhat + s) - act(uhat), act'(uhat + s)``"""
    tl.static_assert(ACT >= IDENTITY and ACT <= GELU_TANH, "ACT is none of the codes of kernels/codes.py")
    w = uhat + s
    if ACT == IDENTITY:
        act_diff = s
        derivative = tl.full(s.shape, 1.0, tl.float32)
    elif ACT == RELU:
        act_diff = _relu_diff(uhat, s)
        derivative = _gate(w, 0.0)
    elif ACT == LEAKY_RELU:
        act_diff = _relu_diff(uhat, s) * (1.0 - NEGATIVE_SLOPE) + s * NEGATIVE_SLOPE
        derivative = _gate(w, NEGATIVE_SLOPE)
    elif ACT == TANH:
        # tanh(u) = 2 sigmoid(2 u) - 1, and tanh' = 4 p q keeps its digits where 1 - tanh^2 has none left
        difference, p, q = _sigmoid_difference(2.0 * uhat, 2.0 * s)
        act_diff = 2.0 * difference
        derivative = 4.0 * p * q
    elif ACT == SIGMOID:
        act_diff, p, q = _sigmoid_difference(uhat, s)
        derivative = p * q
    elif ACT == SILU:
        # (u + s) p' - u p = s p' + u (p' - p)
        difference, p, q = _sigmoid_difference(uhat, s)
        act_diff = s * p + uhat * difference
        derivative = p * (1.0 + w * q)
    elif ACT == GELU:
        # (u + s) Phi(u + s) - u Phi(u) = s Phi(u + s) + u (Phi(u + s) - Phi(u))
        difference, cdf = _normal_difference(uhat, s)
        act_diff = s * cdf + uhat * difference
        derivative = cdf + w * _normal_pdf(w)
    else:
        # (1 + tanh(x)) / 2 = sigmoid(2 x); the difference of the inner cubic is a polynomial in s
        inner_step = s * _GELU_K * (1.0 + (3.0 * uhat * w + s * s) * _GELU_C)
        difference, p, q = _sigmoid_difference(2.0 * _gelu_inner(uhat), 2.0 * inner_step)
        act_diff = s * p + uhat * difference
        inner_derivative = (1.0 + 3.0 * w * w * _GELU_C) * _GELU_K
        derivative = p + 2.0 * w * p * q * inner_derivative
    return act_diff, derivative
