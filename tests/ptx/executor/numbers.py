"""Types of PTX as numpy's, and arithmetic of PTX that numpy lacks. Translated blocks know these names."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

__all__ = ["DTYPES", "KINDS", "NAMESPACE", "size_of"]

#: PTX's type -> how a register of it, or an operand read as it, is held: kind and bytes. "b1" is a predicate.
KINDS = {
    "pred": "b1", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
    "bf16x2": "u4", "tf32": "u4", "s16x2": "u4",
}  # fmt: skip
DTYPES = {
    "b1": np.bool_, "u1": np.uint8, "i1": np.int8, "u2": np.uint16, "i2": np.int16, "u4": np.uint32, "i4": np.int32,
    "f4": np.float32, "u8": np.uint64, "i8": np.int64, "f8": np.float64,
}  # fmt: skip
f4, f8, u2, u4, u8, i8 = np.float32, np.float64, np.uint16, np.uint32, np.uint64, np.int64

_SMALLEST_NORMAL = f4(2.0**-126)


def size_of(kind: str) -> int:
    return 1 if kind == "b1" else int(kind[1])


def flush(x):
    """ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(f4(0), x), x)


# Of a float64 the bits below a float32's mantissa, and their value half way between two float32.
_BELOW_F4, _HALF_F4 = u8((1 << 29) - 1), u8(1 << 28)


def _sum(product, c):
    """product + c in float64, and what its rounding lost: exactly, by Knuth's two-sum."""
    total = product + c
    back = total - product
    return total, (product - (total - back)) + (c - back)


def fma(a, b, c):
    """a b + c in one rounding."""
    product = np.multiply(a, b, dtype=f8)  # exact: 48 bits
    total = np.atleast_1d(product + c)
    # The sum is rounded to float64 before it is rounded to float32. That shows only half way between two float32,
    # and among subnormal numbers.
    doubtful = (total.view(u8) & _BELOW_F4) == _HALF_F4
    doubtful |= np.abs(total) < _SMALLEST_NORMAL
    if doubtful.any():
        _, lost = _sum(product, c)
        even = (total.view(u8) & u8(1)) == 0
        towards = np.where(lost > 0, np.inf, -np.inf)
        # Rounded to odd, a number that is not exact is never taken for a tie (Boldo and Melquiond, 2008).
        total = np.where(doubtful & (lost != 0) & even, np.nextafter(total, towards), total)
    return total.astype(f4).reshape(np.broadcast_shapes(np.shape(product), np.shape(c)))[()]


def fma_down(a, b, c):
    """a b + c rounded towards minus infinity."""
    total, lost = _sum(np.multiply(a, b, dtype=f8), c)
    near = total.astype(f4)
    above = (near > total) | ((near == total) & (lost < 0))
    return np.where(above, np.nextafter(near, f4(-np.inf)), near)


def fma_wide(a, b, c):
    """a b + c of float64 in one rounding, by Python's integers: nvcc emits few of them."""
    a, b, c = np.broadcast_arrays(a, b, c)
    exact = [
        _fma_of_doubles(float(x), float(y), float(z)) for x, y, z in zip(a.flat, b.flat, c.flat, strict=True)
    ]
    return np.array(exact, f8).reshape(a.shape)[()]


def _fma_of_doubles(a: float, b: float, c: float) -> float:
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return float(exact) if exact else a * b + c  # the sign of a zero is the plain sum's


def saturate(x):
    """To [0, 1]; NaN becomes 0."""
    return np.where(x > 0, np.minimum(x, f4(1)), f4(0)).astype(f4)


def to_bf16(x):
    """Bits of x rounded to the nearest bfloat16, ties to even."""
    x = np.asarray(x, f4)
    bits = x.view(u4)
    rounded = ((bits + (u4(0x7FFF) + ((bits >> u4(16)) & u4(1)))) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def from_bf16(x):
    return (np.asarray(x, u2).astype(u4) << u4(16)).view(f4)


def to_tf32(x):
    """Bits of x rounded to the nearest TF32, ties away from zero."""
    x = np.asarray(x, f4)
    bits = x.view(u4)
    rounded = (bits + u4(0x1000)) & u4(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, np.where(np.isnan(x), u4(0x7FFFFFFF), bits))


def to_integer(x, lowest, highest, kind):
    """x, a whole float64, clamped to what the integer holds; NaN becomes 0."""
    # The ends of 64 bits are no float64: what lies beyond them is chosen afterwards.
    inside = np.where((x > lowest) & (x < highest), x, 0).astype(kind)
    return np.where(x >= highest, kind(highest), np.where(x <= lowest, kind(lowest), inside))


def permute_bytes(a, b, selector):
    """prmt in its plain mode: each nibble of the selector picks a byte of b:a, or its sign eight times."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = u4(0)
    for i in range(4):
        nibble = (selector >> u4(4 * i)) & u4(0xF)
        byte = ((both >> ((nibble & u4(7)).astype(u8) * u8(8))) & u8(0xFF)).astype(u4)
        sign = np.where(byte & u4(0x80), u4(0xFF), u4(0))
        out = out | (np.where(nibble & u4(8), sign, byte) << u4(8 * i))
    return out.astype(u4)


def quotient(a, b):
    """a / b towards zero; by zero all ones, as the hardware has it."""
    safe = np.where(b != 0, b, b.dtype.type(1))
    down = a // safe
    up = (a % safe != 0) & ((a < 0) != (safe < 0))  # numpy's is towards minus infinity
    return np.where(b != 0, down + up.astype(a.dtype), ~a.dtype.type(0))


def remainder(a, b):
    """Of the sign of a; by zero a."""
    return np.where(b != 0, a - quotient(a, b) * b, a)


def high_product(a, b):
    """The upper 64 bits of a product of two uint64."""
    low_a, high_a, low_b, high_b = a & _LOW, a >> u8(32), b & _LOW, b >> u8(32)
    middle = high_a * low_b + (low_a * low_b >> u8(32))
    other = low_a * high_b + (middle & _LOW)
    return high_a * high_b + (middle >> u8(32)) + (other >> u8(32))


_LOW = u8(0xFFFFFFFF)


def add_halves(a, b):
    """Of two 16-bit numbers in one register, each by itself."""
    low = (a + b) & u4(0xFFFF)
    return ((((a >> u4(16)) + (b >> u4(16))) & u4(0xFFFF)) << u4(16)) | low


NAMESPACE = {name: value for name, value in globals().items() if not name.startswith("_")} | {
    "np": np,
    **DTYPES,
}
