"""Every instruction that the executor knows against Python's integers, fractions and numpy."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from executor import UnknownInstruction, opcodes, parse, translate  # noqa: F401 - opcodes registers the emitters
from executor.translate import EMITTERS
from programs import THREADS, execute, kernel

# types ------------------------------------------------------------------------------------------------------

_DTYPES = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("s", "i"), ("u", "u"), ("b", "u"))
    for bits in (8, 16, 32, 64)
} | {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"),
     "tf32": np.dtype("u4"), "s16x2": np.dtype("u4"), "pred": np.dtype("u4")}  # fmt: skip
_PREFIXES = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}
_EDGES = {
    "f": [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3e-39, -3e-39, 1e-45, 3e38, 65504.0, 1e10, -1e10, 4e9, 1e30,
          np.inf, -np.inf, np.nan],
    "i": [0, 1, -1, 2, -2, 7, -8, 31, 32, 33, 100, -100],
}  # fmt: skip


def values(kind: str, seed: int) -> np.ndarray:
    """THREADS numbers of a type, its edges among them, in an order of their own for each seed."""
    dtype, draw = _DTYPES[kind], np.random.default_rng(seed)
    if kind == "pred":
        return draw.integers(0, 2, THREADS).astype(dtype)
    if dtype.kind == "f":
        drawn = draw.standard_normal(THREADS) * 10.0 ** draw.integers(-3, 4, THREADS)
        drawn[: len(_EDGES["f"])] = _EDGES["f"]
        with np.errstate(over="ignore"):
            return draw.permutation(drawn.astype(dtype))
    size = 8 * dtype.itemsize
    drawn = draw.integers(0, 2**size, THREADS, np.uint64)
    edges = [e % 2**size for e in (*_EDGES["i"], 2 ** (size - 1), 2 ** (size - 1) - 1)]
    drawn[: len(edges)] = edges
    return draw.permutation(drawn).astype(f"u{dtype.itemsize}").view(dtype)


def wrapped(x: int, kind: str) -> int:
    bits = 8 * _DTYPES[kind].itemsize
    x %= 2**bits
    return x - 2**bits if kind[0] == "s" and x >= 2 ** (bits - 1) else x


# one instruction --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """``text d, a, b...`` on registers of some types. oracle: of one thread's numbers."""

    text: str
    result: str
    operands: tuple[str, ...]
    oracle: Callable
    immediates: str = ""

    def source(self) -> str:
        lines, names = [], []
        for n, kind in enumerate(self.operands, start=2):
            size = _DTYPES[kind].itemsize
            lines.append(f"    mad.wide.u32 %d{10 + n}, %r1, {size}, %d{n};")
            if kind == "pred":
                lines.append(f"    ld.global.b32 %r{n}, [%d{10 + n}]; setp.ne.b32 %p{n}, %r{n}, 0;")
                names.append(f"%p{n}")
            else:
                name = {"f32": "%f", "f64": "%g"}.get(kind, _PREFIXES[size]) + str(n)
                lines.append(f"    ld.global.b{8 * size} {name}, [%d{10 + n}];")
                names.append(name)
        size = _DTYPES[self.result].itemsize
        to = (
            "%p1"
            if self.result == "pred"
            else {"f32": "%f1", "f64": "%g1"}.get(self.result, _PREFIXES[size] + "9")
        )
        lines.append(f"    {self.text} {', '.join([to, *names])}{self.immediates};")
        if self.result == "pred":
            lines.append("    selp.b32 %r9, 1, 0, %p1;")
            to = "%r9"
        lines.append(f"    mad.wide.u32 %d11, %r1, {size}, %d1; st.global.b{8 * size} [%d11], {to};")
        return kernel("\n".join(lines), 1 + len(self.operands))


def same(result: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    if result.dtype.kind != "f":
        return result == wanted
    bits = f"u{result.dtype.itemsize}"
    return (result.view(bits) == wanted.view(bits)) | (np.isnan(result) & np.isnan(wanted))


def check(op: Op) -> None:
    inputs = [values(kind, seed) for seed, kind in enumerate(op.operands)]
    # the edges of two numbers meet in every pair, a few threads at a time
    for shift in range(0, THREADS, 37):
        moved = [np.roll(array, n * shift) for n, array in enumerate(inputs)]
        out = np.zeros(THREADS, _DTYPES[op.result])
        result = execute(op.source(), [out, *moved])[0]
        with np.errstate(all="ignore"):
            wanted = [op.oracle(*(array[t] for array in moved)) for t in range(THREADS)]
        wanted = np.array(wanted, result.dtype)
        wrong = np.flatnonzero(~same(result, wanted))
        assert not len(wrong), (
            op.text,
            [array[wrong[0]] for array in moved],
            result[wrong[0]],
            wanted[wrong[0]],
        )


# oracles ----------------------------------------------------------------------------------------------------


def of_integers(kind: str, function: Callable, result: str = "") -> Callable:
    return lambda *x: wrapped(function(*map(int, x)), result or kind)


def towards_zero(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def rest(a: int, b: int) -> int:
    return a if b == 0 else a - towards_zero(a, b) * b


def flushed(x):
    return np.copysign(np.float32(0), x) if abs(x) < 2.0**-126 else x


def with_ftz(function: Callable) -> Callable:
    return lambda *x: flushed(np.float32(function(*map(flushed, x))))


def rounded(exact: Fraction, like, down: bool = False):
    """The nearest number, ties to even, or the next below, of a rational."""
    near = like(float(exact)) if exact else like(0)
    candidates = [near, np.nextafter(near, like(-np.inf)), np.nextafter(near, like(np.inf))]
    finite = [c for c in candidates if np.isfinite(c)]
    if down:
        return max([like(-np.inf), *(c for c in finite if Fraction(float(c)) <= exact)])
    if not np.isfinite(near):
        return near
    bits = f"u{near.dtype.itemsize}"
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(bits)) & 1))


def fused(like, down: bool = False) -> Callable:
    def oracle(a, b, c):
        if not np.isfinite([a, b, c]).all():
            return like(a) * like(b) + like(c)
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        return rounded(exact, like, down) if exact else like(a * b + c)

    return oracle


def saturated(x):
    return np.float32(0) if not x > 0 else min(np.float32(x), np.float32(1))


def bf16(x) -> int:
    if np.isnan(x):
        return 0x7FFF
    bits = int(np.float32(x).view("u4"))
    low, high = bits & 0xFFFF, bits >> 16
    return high + (low > 0x8000 or (low == 0x8000 and high & 1))


def tf32(x) -> int:
    bits = int(np.float32(x).view("u4"))
    if not np.isfinite(x):
        return 0x7FFFFFFF if np.isnan(x) else bits
    return (bits & 0x1FFF >= 0x1000) * 0x2000 + (bits & ~0x1FFF)


def to_integer(kind: str, how: Callable) -> Callable:
    bits = 8 * _DTYPES[kind].itemsize
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind[0] == "s" else (0, 2**bits - 1)

    def oracle(x):
        if np.isnan(x):
            return 0
        return (low if x < 0 else high) if np.isinf(x) else min(max(how(float(x)), low), high)

    return oracle


def select_byte(both: bytes, nibble: int) -> int:
    byte = both[nibble & 7]
    return (0xFF if byte & 0x80 else 0) if nibble & 8 else byte


def permuted(a, b, selector) -> int:
    both = int(a).to_bytes(4, "little") + int(b).to_bytes(4, "little")
    return int.from_bytes(bytes(select_byte(both, int(selector) >> 4 * i & 15) for i in range(4)), "little")


# all of them ------------------------------------------------------------------------------------------------

_SIGNED, _UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _integer_ops():
    for kind in (*_SIGNED, *_UNSIGNED):
        bits = int(kind[1:])
        two, three = (kind, kind), (kind, kind, kind)
        for name, function in (
            ("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul.lo", lambda a, b: a * b),
            ("div", towards_zero), ("rem", rest), ("min", min), ("max", max),
        ):  # fmt: skip
            yield Op(f"{name}.{kind}", kind, two, of_integers(kind, function))
        if kind != "s64":
            yield Op(f"mul.hi.{kind}", kind, two, of_integers(kind, lambda a, b, n=bits: a * b >> n))
        yield Op(f"mad.lo.{kind}", kind, three, of_integers(kind, lambda a, b, c: a * b + c))
        if kind in _WIDE:
            wide = _WIDE[kind]
            yield Op(f"mul.wide.{kind}", wide, two, of_integers(wide, lambda a, b: a * b))
            yield Op(
                f"mad.wide.{kind}", wide, (kind, kind, wide), of_integers(wide, lambda a, b, c: a * b + c)
            )
            yield Op(
                f"mad.hi.{kind}", kind, three, of_integers(kind, lambda a, b, c, n=bits: (a * b >> n) + c)
            )
    for kind in _SIGNED:
        yield Op(f"neg.{kind}", kind, (kind,), of_integers(kind, lambda a: -a))
    for kind in ("s32", "s64"):
        yield Op(f"abs.{kind}", kind, (kind,), of_integers(kind, abs))
    yield Op(
        "add.s16x2", "s16x2", ("s16x2", "s16x2"),
        lambda a, b: ((int(a) >> 16) + (int(b) >> 16) & 0xFFFF) << 16 | (int(a) + int(b) & 0xFFFF),
    )  # fmt: skip


def _bit_ops():
    for bits in (16, 32, 64):
        kind = f"b{bits}"
        for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
            yield Op(f"{name}.{kind}", kind, (kind, kind), of_integers(kind, function))
        yield Op(f"not.{kind}", kind, (kind,), of_integers(kind, lambda a: ~a))
        for t in (kind, f"u{bits}", f"s{bits}"):
            right = of_integers(t, lambda a, n: a >> min(n, 70))
            yield Op(f"shr.{t}", t, (t, "u32"), right)
            yield Op(f"shr.{t}", t, (t,), lambda a, f=right: f(a, 3), immediates=", 3")
            yield Op(f"shl.{t}", t, (t, "u32"), of_integers(t, lambda a, n, b=bits: a << n if n < b else 0))
            yield Op(f"shl.{t}", t, (t,), of_integers(t, lambda a: a << 5), immediates=", 5")
    for kind in ("s32", "u32", "s64", "u64"):
        for position, length in ((0, 1), (3, 7), (8, 24)):

            def field(a, p=position, n=length, kind=kind):
                result = int(a) >> p & (1 << n) - 1
                return result - (1 << n) if kind[0] == "s" and result >> (n - 1) else result

            yield Op(f"bfe.{kind}", kind, (kind,), field, immediates=f", {position}, {length}")
    yield Op("prmt.b32", "b32", ("b32", "b32", "b32"), permuted)
    for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        yield Op(f"{name}.pred", "pred", ("pred", "pred"), lambda a, b, f=function: f(int(a), int(b)))
    yield Op("not.pred", "pred", ("pred",), lambda a: 1 - a)


_ORDERED = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}


def _compare_ops():
    for name, method in _ORDERED.items():
        for kind in ("b16", "b32", "b64", *_SIGNED, *_UNSIGNED):
            if kind[0] != "b" or name in ("eq", "ne"):
                yield Op(
                    f"setp.{name}.{kind}",
                    "pred",
                    (kind, kind),
                    lambda a, b, m=method: getattr(int(a), m)(int(b)),
                )
        for kind in ("f32", "f64"):

            def ordered(a, b, m=method):
                return not (math.isnan(a) or math.isnan(b)) and getattr(float(a), m)(float(b))

            yield Op(f"setp.{name}.{kind}", "pred", (kind, kind), ordered)
            yield Op(
                f"setp.{name}u.{kind}", "pred", (kind, kind),
                lambda a, b, f=ordered: math.isnan(a) or math.isnan(b) or f(a, b),
            )  # fmt: skip
    for name, method in (("lo", "__lt__"), ("ls", "__le__"), ("hi", "__gt__"), ("hs", "__ge__")):
        yield Op(
            f"setp.{name}.u32", "pred", ("u32", "u32"), lambda a, b, m=method: getattr(int(a), m)(int(b))
        )
    nan = lambda a, b: math.isnan(a) or math.isnan(b)  # noqa: E731
    yield Op("setp.nan.f32", "pred", ("f32", "f32"), nan)
    yield Op("setp.num.f32", "pred", ("f32", "f32"), lambda a, b: not nan(a, b))
    yield Op("setp.eq.ftz.f32", "pred", ("f32", "f32"), lambda a, b: flushed(a) == flushed(b))
    for name, function in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
        yield Op(
            f"setp.lt.{name}.s32",
            "pred",
            ("s32", "s32", "pred"),
            lambda a, b, p, f=function: f(int(a < b), int(p)),
        )
    for kind in ("b16", "b32", "b64", *_SIGNED, *_UNSIGNED, "f32", "f64"):
        yield Op(f"selp.{kind}", kind, (kind, kind, "pred"), lambda a, b, p: a if p else b)
        yield Op(f"mov.{kind}", kind, (kind,), lambda a: a)
    yield Op("mov.pred", "pred", ("pred",), lambda a: a)


def _float_ops():
    for kind, like in (("f32", np.float32), ("f64", np.float64)):
        two = (kind, kind)
        arithmetic = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
        for name, function in arithmetic.items():
            yield Op(f"{name}.rn.{kind}", kind, two, function)
            if name != "div":
                yield Op(f"{name}.{kind}", kind, two, function)
        yield Op(f"fma.rn.{kind}", kind, (kind,) * 3, fused(like))
        yield Op(f"neg.{kind}", kind, (kind,), np.negative)
        yield Op(f"abs.{kind}", kind, (kind,), np.abs)
        yield Op(f"copysign.{kind}", kind, two, lambda a, b: np.copysign(b, a))
        yield Op(f"rcp.rn.{kind}", kind, (kind,), lambda a, like=like: like(1) / a)
        yield Op(f"sqrt.rn.{kind}", kind, (kind,), np.sqrt)
        yield Op(f"min.{kind}", kind, two, np.fmin)
        yield Op(f"max.{kind}", kind, two, np.fmax)
    for name in ("div", "add", "sub", "mul", "min", "max"):
        function = {**arithmetic, "min": np.fmin, "max": np.fmax}[name]
        full = ".full" if name == "div" else ""
        yield Op(f"{name}{full}.ftz.f32", "f32", ("f32", "f32"), with_ftz(function))
    yield Op("div.full.f32", "f32", ("f32", "f32"), np.divide)
    yield Op("div.approx.f32", "f32", ("f32", "f32"), np.divide)
    yield Op("add.sat.f32", "f32", ("f32", "f32"), lambda a, b: saturated(a + b))
    yield Op("min.NaN.f32", "f32", ("f32", "f32"), np.minimum)
    yield Op("max.NaN.f32", "f32", ("f32", "f32"), np.maximum)
    yield Op("fma.rm.f32", "f32", ("f32",) * 3, fused(np.float32, down=True))
    yield Op("fma.rn.ftz.f32", "f32", ("f32",) * 3, with_ftz(fused(np.float32)))
    yield Op("fma.rn.sat.f32", "f32", ("f32",) * 3, lambda *x: saturated(fused(np.float32)(*x)))
    for name, function in (("ex2", np.exp2), ("lg2", np.log2), ("rcp", lambda a: np.float32(1) / a),
                           ("sqrt", np.sqrt), ("rsqrt", lambda a: np.float32(1) / np.sqrt(a))):  # fmt: skip
        yield Op(f"{name}.approx.f32", "f32", ("f32",), lambda a, f=function: np.float32(f(a)))
        yield Op(f"{name}.approx.ftz.f32", "f32", ("f32",), with_ftz(function))
    yield Op("tanh.approx.f32", "f32", ("f32",), np.tanh)
    yield Op("neg.ftz.f32", "f32", ("f32",), with_ftz(np.negative))
    yield Op("abs.ftz.f32", "f32", ("f32",), with_ftz(np.abs))


_HOW = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


def _conversions():
    integers = [f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)]
    for to, of in itertools.permutations(integers, 2):
        if "8" not in (to[1:], of[1:]):
            yield Op(f"cvt.{to}.{of}", to, (of,), of_integers(to, lambda a: a))
    for kind in integers[2:4] + integers[6:]:
        if kind[1:] != "16":
            for how, function in _HOW.items():
                yield Op(f"cvt.{how}.{kind}.f32", kind, ("f32",), to_integer(kind, function))
            yield Op(f"cvt.rzi.{kind}.f64", kind, ("f64",), to_integer(kind, math.trunc))
            yield Op(f"cvt.rn.f32.{kind}", "f32", (kind,), lambda a: rounded(Fraction(int(a)), np.float32))
            yield Op(f"cvt.rn.f64.{kind}", "f64", (kind,), lambda a: float(int(a)))
    whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    for how, function in whole.items():
        yield Op(f"cvt.{how}.f32.f32", "f32", ("f32",), function)
    yield Op("cvt.sat.f32.f32", "f32", ("f32",), saturated)
    yield Op("cvt.ftz.sat.f32.f32", "f32", ("f32",), lambda a: flushed(saturated(flushed(a))))
    yield Op("cvt.rn.f32.f64", "f32", ("f64",), np.float32)
    yield Op("cvt.f64.f32", "f64", ("f32",), np.float64)
    yield Op("cvt.rn.bf16.f32", "bf16", ("f32",), bf16)
    yield Op("cvt.rn.bf16x2.f32", "bf16x2", ("f32", "f32"), lambda a, b: bf16(a) << 16 | bf16(b))
    yield Op("cvt.f32.bf16", "f32", ("bf16",), lambda a: (np.uint32(a) << 16).view("f4"))
    yield Op("cvt.rna.tf32.f32", "tf32", ("f32",), tf32)
    yield Op("cvta.to.global.u64", "u64", ("u64",), lambda a: a)


OPS = [*_integer_ops(), *_bit_ops(), *_compare_ops(), *_float_ops(), *_conversions()]


@pytest.mark.parametrize("root", sorted({op.text.split(".")[0] for op in OPS}))
def test_arithmetic(root):
    for op in OPS:
        if op.text.split(".")[0] == root:
            check(op)


@pytest.mark.parametrize("narrow", ["s8", "u8"])
def test_conversions_of_bytes(narrow):
    """Bytes lie in registers of 16 bits, of which the upper half does not count."""
    x, dtype = values("u16", 5), _DTYPES[narrow]
    body = f"""
    mad.wide.u32 %d12, %r1, 2, %d2; ld.global.b16 %h2, [%d12]; cvt.s16.{narrow} %h3, %h2; cvt.s32.{narrow} %r3, %h2;
    cvt.{narrow}.s32 %h4, %r3; cvt.s16.{narrow} %h4, %h4;
    mad.wide.u32 %d11, %r1, 2, %d1; st.global.b16 [%d11], %h3; mad.wide.u32 %d13, %r1, 4, %d3;
    st.global.b32 [%d13], %r3; mad.wide.u32 %d14, %r1, 2, %d4; st.global.b16 [%d14], %h4;"""
    out = np.zeros(THREADS, "i2"), x, np.zeros(THREADS, "i4"), np.zeros(THREADS, "i2")
    short, _, long, back = execute(kernel(body, 4), out)
    wanted = x.astype("u1").view(dtype).astype("i4")
    assert (short == wanted).all() and (long == wanted).all() and (back == wanted).all()


def test_a_fused_sum_is_rounded_once_also_half_way_and_among_subnormal_numbers():
    a = np.array([1 + 2.0**-12, 1 + 2.0**-12, 2.0**-75, 2.0**-75, 2.0**-100], "f4")
    b = np.array([1 + 2.0**-12, 1 + 2.0**-12, 2.0**-74, 2.0**-75, 1 + 2.0**-23], "f4")
    c = np.array([2.0**30, -(2.0**30), 2.0**-126, 2.0**-126, 2.0**-149], "f4")
    arrays = [np.zeros(THREADS, "f4"), *(np.resize(x, THREADS) for x in (a, b, c))]
    op = Op("fma.rn.f32", "f32", ("f32",) * 3, fused(np.float32))
    wanted = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), np.float32)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert (execute(op.source(), arrays)[0][: len(a)] == np.array(wanted)).all()


def test_moves_of_halves():
    x = values("b32", 1)
    body = """
    mad.wide.u32 %d12, %r1, 4, %d2; ld.global.b32 %r2, [%d12]; mov.b32 {%h1, %h2}, %r2; mov.b32 %r3, {%h2, %h1};
    mov.b64 %d3, {%r2, %r3}; mov.b64 {%r4, %r5}, %d3; mad.wide.u32 %d11, %r1, 8, %d1;
    st.global.v2.b32 [%d11], {%r4, %r5};"""
    out, _ = execute(kernel(body, 2), [np.zeros((THREADS, 2), "u4"), x])
    assert (out[:, 0] == x).all() and (out[:, 1] == (x >> 16 | x << 16)).all()


# memory, warps and matrices ---------------------------------------------------------------------------------

#: Opcode of a load or store -> numbers an access.
_ACCESSES = {f"{vector}{kind}": count for vector, count in (("", 1), ("v2.", 2), ("v4.", 4))
             for kind in (*(f"{k}{bits}" for bits in (8, 16, 32, 64) for k in "bus"), "f32", "f64")
             if count * _DTYPES[kind].itemsize <= 16}  # fmt: skip
_WIDTHS = sorted({(name.split(".")[-1], count) for name, count in _ACCESSES.items()})


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("kind", "count"), _WIDTHS)
def test_loads_and_stores(kind, count, space):
    size = _DTYPES[kind].itemsize
    prefix = {"f32": "%f", "f64": "%g"}.get(kind, _PREFIXES[size])
    registers = [f"{prefix}{n}" for n in range(2, 2 + count)]
    vector, items = (f"v{count}.", "{" + ", ".join(registers) + "}") if count > 1 else ("", registers[0])
    width = size * count
    body = f"mad.wide.u32 %d12, %r1, {width}, %d2; ld.global.{vector}{kind} {items}, [%d12];"
    if space == "shared":
        body += f"""mov.u32 %r20, tile; mad.lo.s32 %r20, %r1, {width}, %r20; st.shared.{vector}{kind} [%r20], {items};
    bar.sync 0; sub.s32 %r21, 127, %r1; mad.lo.s32 %r21, %r21, {width}, 0; ld.shared.{vector}{kind} {items}, [tile]
    ;""".replace("[tile]\n    ;", "[%r21];")
    body += f"mad.wide.u32 %d11, %r1, {width}, %d1; st.global.{vector}{kind} [%d11], {items};"
    x = np.random.default_rng(0).integers(0, 2 ** (8 * size), (THREADS, count), np.uint64).astype(f"u{size}")
    out, _ = execute(kernel(body, 2, shared=width * THREADS), [np.zeros_like(x), x])
    assert (out == (x[::-1] if space == "shared" else x)).all()


def test_guards_leave_memory_and_registers_alone():
    body = """
    setp.lt.s32 %p1, %r1, 40; mov.b32 %r2, 7; @%p1 mov.b32 %r2, 9; @!%p1 bra END; mad.wide.u32 %d11, %r1, 4, %d1;
    setp.gt.s32 %p2, %r1, 3; @%p2 st.global.b32 [%d11], %r2; END:"""
    (out,) = execute(kernel(body, 1), [np.zeros(THREADS, "i4")])
    t = np.arange(THREADS)
    assert (out == np.where((t > 3) & (t < 40), 9, 0)).all()


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
@pytest.mark.parametrize("how", ["min", "max", "add"])
@pytest.mark.parametrize("root", ["atom", "red"])
def test_atomics(root, how, kind, space):
    x = values(kind, 3)
    scope = (
        {"global": "global.gpu.relaxed", "shared": "shared.cta.relaxed"}[space] if root == "atom" else space
    )
    at = "[%d1]" if space == "global" else "[tile]"
    begin = (
        ""
        if space == "global"
        else "setp.eq.s32 %p1, %r1, 0; mov.b32 %r5, 3; @%p1 st.shared.b32 [tile], %r5; bar.sync 0;"
    )
    result = "%r3, " if root == "atom" else ""
    end = "bar.sync 0; ld.shared.b32 %r4, [tile]; @%p1 st.global.b32 [%d1], %r4;"
    if space == "global":
        begin = end = ""
    load = "mad.wide.u32 %d12, %r1, 4, %d2; ld.global.b32 %r2, [%d12];"
    body = f"{load} {begin} {root}.{scope}.{how}.{kind} {result}{at}, %r2; {end}"
    out, _ = execute(kernel(body, 2), [np.full(1, 3, x.dtype), x])
    numbers = [3, *map(int, x)]
    assert int(out[0]) == wrapped({"min": min, "max": max, "add": sum}[how](numbers), kind)


@pytest.mark.parametrize("mode", ["bfly", "idx", "down", "up"])
@pytest.mark.parametrize("by", [1, 16, 5])
def test_shuffles(mode, by):
    x, clamp = values("b32", 4), 0 if mode == "up" else 31
    body = f"""
    mad.wide.u32 %d12, %r1, 4, %d2; ld.global.b32 %r2, [%d12]; shfl.sync.{mode}.b32 %r3|%p1, %r2, {by}, {clamp}, -1;
    selp.b32 %r4, 1, 0, %p1; mad.wide.u32 %d11, %r1, 8, %d1; st.global.v2.b32 [%d11], {{%r3, %r4}};"""
    out, _ = execute(kernel(body, 2), [np.zeros((THREADS, 2), "u4"), x])
    for t in range(THREADS):
        lane = t % 32
        source = {"bfly": lane ^ by, "idx": by, "down": lane + by, "up": lane - by}[mode]
        inside = 0 <= source < 32
        assert out[t].tolist() == [x[t - lane + source if inside else t], inside]


@pytest.mark.parametrize(("how", "kind"), [("max", "s32"), ("min", "s32"), ("add", "s32"), ("max", "u32")])
def test_reductions_of_a_warp(how, kind):
    x = values(kind, 6)
    body = f"""
    mad.wide.u32 %d12, %r1, 4, %d2; ld.global.b32 %r2, [%d12]; redux.sync.{how}.{kind} %r3, %r2, -1;
    mad.wide.u32 %d11, %r1, 4, %d1; st.global.b32 [%d11], %r3;"""
    out, _ = execute(kernel(body, 2), [np.zeros_like(x), x])
    for t in range(THREADS):
        warp = [int(v) for v in x[t - t % 32 : t - t % 32 + 32]]
        assert int(out[t]) == wrapped({"min": min, "max": max, "add": sum}[how](warp), kind)


def in_tf32(x: np.ndarray) -> np.ndarray:
    return (x.view("u4") & 0xFFFFE000).view("f4")


def in_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype("u4") << 16).view("f4")


def drawn_operand(kind: str, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits as memory holds them, and what a Tensor Core makes of them."""
    x = np.random.default_rng(seed).standard_normal(shape).astype("f4")
    if kind == "tf32":
        return x, in_tf32(x)
    bits = (x.view("u4") >> 16).astype("u2")
    return bits, in_bf16(bits)


@pytest.mark.parametrize(("kind", "depth"), [("tf32", 8), ("bf16", 16)])
def test_products_of_a_warp(kind, depth):
    """mma.sync on fragments that each lane gathers as the PTX ISA's figures have them."""
    (a, a_seen), (b, b_seen) = drawn_operand(kind, (16, depth), 1), drawn_operand(kind, (8, depth), 2)
    c = np.random.default_rng(3).standard_normal((16, 8)).astype("f4")
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    half = depth // 2
    pairs = [a[g], a[g + 8], b[g]]
    if kind == "tf32":
        fragments = [m[lane, t + h] for h in (0, half) for m in pairs[:2]] + [
            pairs[2][lane, t + h] for h in (0, half)
        ]
    else:

        def two(m, h):
            return m[lane, 2 * t + h].astype("u4") | m[lane, 2 * t + 1 + h].astype("u4") << 16

        fragments = [two(m, h) for h in (0, half) for m in pairs[:2]] + [two(pairs[2], h) for h in (0, half)]
    given = np.stack([f.view("u4") for f in fragments], 1)  # (32, 6)
    added = np.stack([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]], 1)
    loads = "".join(f"ld.global.b32 %r{n}, [%d12+{4 * (n - 2)}];" for n in range(2, 8))
    loads += "".join(f"ld.global.f32 %f{n}, [%d13+{4 * (n - 1)}];" for n in range(1, 5))
    body = f"""
    mad.wide.u32 %d12, %r1, 24, %d2; mad.wide.u32 %d13, %r1, 16, %d3; {loads}
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%f5, %f6, %f7, %f8}}, {{%r2, %r3, %r4, %r5}},
        {{%r6, %r7}}, {{%f1, %f2, %f3, %f4}};
    mad.wide.u32 %d11, %r1, 16, %d1; st.global.v4.f32 [%d11], {{%f5, %f6, %f7, %f8}};"""
    out, *_ = execute(kernel(body, 3), [np.zeros((32, 4), "f4"), given, added], threads=32)
    wanted = a_seen.astype("f8") @ b_seen.T.astype("f8") + c
    result = np.empty((16, 8))
    for n in range(4):
        result[g + 8 * (n // 2), 2 * t + n % 2] = out[:, n]
    np.testing.assert_allclose(result, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_through_shared_memory(count, transposed):
    """stmatrix of numbered halves, read back plainly; ldmatrix of them, which is the reverse."""
    trans, names = ".trans" if transposed else "", ", ".join(f"%r{n}" for n in range(10, 10 + count))
    x = np.random.default_rng(1).integers(0, 2**32, (32, count), np.uint64).astype("u4")
    loads = "".join(f"ld.global.b32 %r{10 + n}, [%d12+{4 * n}];" for n in range(count))
    stores = "".join(f"st.global.b32 [%d11+{4 * n}], %r{10 + n};" for n in range(count))
    body = f"""
    mad.wide.u32 %d12, %r1, {4 * count}, %d2; {loads} and.b32 %r2, %r1, {8 * count - 1}; shl.b32 %r2, %r2, 4;
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r2], {{{names}}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r2];
    mad.wide.u32 %d11, %r1, {4 * count}, %d1; {stores} bar.sync 0;
    setp.lt.s32 %p1, %r1, {8 * count}; @!%p1 bra END; ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r2];
    mad.wide.u32 %d13, %r1, 16, %d3; st.global.v4.b32 [%d13], {{%r20, %r21, %r22, %r23}}; END:"""
    arrays = [np.zeros_like(x), x, np.zeros((8 * count, 8), "u2")]
    back, _, rows = execute(kernel(body, 3), arrays, threads=32)
    assert (back == x).all()
    halves = x.view("u2").reshape(
        32, count, 2
    )  # lane, matrix, half: row lane / 4, columns 2 (lane % 4) + half
    for matrix in range(count):
        wanted = halves[:, matrix].reshape(8, 8)
        assert (rows[8 * matrix : 8 * matrix + 8] == (wanted.T if transposed else wanted)).all()


def _descriptor(rows: int, row_bytes: int) -> int:
    """Of K-major rows without a swizzle: cores of 8 rows by 16 bytes, one behind the other along K."""
    return (128 >> 4) << 16 | (row_bytes // 16 * 128 >> 4) << 32


def _in_cores(x: np.ndarray) -> np.ndarray:
    """(rows, K) as such cores lie in memory."""
    raw = np.ascontiguousarray(x).view("u1").reshape(x.shape[0] // 8, 8, -1, 16)
    return raw.transpose(0, 2, 1, 3).reshape(-1)


@pytest.mark.parametrize("left", ["registers", "shared"])
@pytest.mark.parametrize("columns", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize(("kind", "depth"), [("tf32", 8), ("bf16", 16)])
def test_products_of_a_warpgroup(kind, depth, columns, left):
    (a, a_seen), (b, b_seen) = drawn_operand(kind, (64, depth), 1), drawn_operand(kind, (columns, depth), 2)
    shared = np.concatenate([_in_cores(b), _in_cores(a)])
    chunks, descriptor = len(shared) // 16, _descriptor(columns, 32)
    t = np.arange(THREADS)
    warp, g, pair = t // 32, t % 32 // 4, t % 4
    rows = [16 * warp + g, 16 * warp + g + 8]
    if kind == "tf32":
        given = [a[r, pair + h] for h in (0, 4) for r in rows]
    else:
        given = [
            a[r, 2 * pair + h].astype("u4") | a[r, 2 * pair + 1 + h].astype("u4") << 16
            for h in (0, 8)
            for r in rows
        ]
    fragments = np.stack([f.view("u4") for f in given], 1)
    sums = [f"%f{n}" for n in range(1, 1 + columns // 2)]
    operand = "{%r10, %r11, %r12, %r13}" if left == "registers" else "%d21"
    flags = "1, 1" + (", 0" if left == "registers" else ", 0, 0") * (kind == "bf16")
    zeros = " ".join(f"mov.f32 {name}, 0f3F800000;" for name in sums)
    stores = " ".join(f"st.global.f32 [%d11+{4 * n}], {name};" for n, name in enumerate(sums))
    body = f"""
    mov.b32 %r2, %r1;
    LOOP: setp.ge.s32 %p1, %r2, {chunks}; @%p1 bra DONE; mad.wide.u32 %d12, %r2, 16, %d2; shl.b32 %r3, %r2, 4;
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d12]; st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
    add.s32 %r2, %r2, {THREADS}; bra LOOP;
    DONE: mad.wide.u32 %d13, %r1, 16, %d3; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d13]; {zeros}
    fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %d20, {descriptor}; add.s64 %d21, %d20, {columns * 2};
    wgmma.fence.sync.aligned; setp.ne.b32 %p2, %r1, -1;
    wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} {{{", ".join(sums)}}}, {operand}, %d20, %p2,
        {flags};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %d11, %r1, {2 * columns}, %d1; {stores}"""
    arrays = [np.zeros((THREADS, columns // 2), "f4"), shared, fragments]
    out, *_ = execute(kernel(body, 3, shared=len(shared)), arrays)
    result = np.empty((64, columns))
    for n in range(columns // 2):
        result[rows[n // 2 % 2], 8 * (n // 4) + 2 * pair + n % 2] = out[:, n]
    np.testing.assert_allclose(result, a_seen.astype("f8") @ b_seen.T.astype("f8") + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("how", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_asynchronous_copies(how, size, wait):
    """Of every third thread's copy only a part is read, of every fifth's nothing."""
    x = np.random.default_rng(1).integers(0, 256, (THREADS, size), np.uint8)
    given = np.where(np.arange(THREADS) % 5 == 0, 0, np.where(np.arange(THREADS) % 3 == 0, size // 2, size))
    unit = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    items = {4: "%r4", 8: "{%r4, %r5}", 16: "{%r4, %r5, %r6, %r7}"}[size]
    body = f"""
    mad.wide.u32 %d12, %r1, {size}, %d2; mad.wide.u32 %d13, %r1, 4, %d3; ld.global.b32 %r2, [%d13];
    mov.u32 %r3, tile; mad.lo.s32 %r3, %r1, {size}, %r3;
    cp.async.{how}.shared.global [%r3], [%d12], {size}, %r2; cp.async.commit_group; {wait} bar.sync 0;
    ld.shared.{unit} {items}, [%r3]; mad.wide.u32 %d11, %r1, {size}, %d1; st.global.{unit} [%d11], {items};"""
    arrays = [np.zeros_like(x), x, given.astype("u4")]
    out, *_ = execute(kernel(body, 3, shared=size * THREADS), arrays)
    assert (out == np.where(np.arange(size) < given[:, None], x, 0)).all()


# what is not known ------------------------------------------------------------------------------------------

_ELSEWHERE = {
    "ld": ("shared", "global", "param", "v2", "v4"),
    "st": ("shared", "global", "v2", "v4"),
    "bar": ("sync",),
    "barrier": ("sync", "aligned"),
    "fence": ("proxy", "async", "shared::cta"),
}  # modifiers that stand in the texts of the tests above


def test_every_instruction_that_it_knows_is_tested():
    """Names, types and modifiers of all emitters stand in the tests of this file."""
    text = Path(__file__).read_text()
    for root, known in EMITTERS.items():
        tested = {part for op in OPS for part in op.text.split(".")[1:] if op.text.split(".")[0] == root}
        tested |= {"s8", "u8"} if root == "cvt" else set()  # test_conversions_of_bytes
        if tested:
            assert known.types | known.modifiers == tested, (root, (known.types | known.modifiers) ^ tested)
        else:
            assert re.search(rf"\b{root}\b", text) or root in _ELSEWHERE, root


@pytest.mark.parametrize(
    ("instruction", "named"),
    [
        ("popc.b32 %r2, %r1;", "popc.b32"),
        ("add.cc.s32 %r2, %r1, %r1;", ".cc"),
        ("add.rz.f32 %f1, %f2, %f3;", ".rz"),
        ("bar.sync 1, 64;", "barrier"),
        ("ld.local.b32 %r2, [%d1];", ".local"),
        ("mbarrier.init.shared.b64 [tile], 1;", "mbarrier.init"),
        ("cp.async.bulk.commit_group;", ".bulk"),
        ("mov.b32 %r2, %clock;", "%clock"),
        ("mov.b32 %r2, nowhere;", "nowhere"),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%r1}, {%r2}, {%f1};",
            ".f16",
        ),
    ],
)
def test_an_unknown_instruction_fails_with_its_name(instruction, named):
    (parsed,) = parse(kernel(instruction, 1)).values()
    with pytest.raises(UnknownInstruction, match=re.escape(named)):
        translate(parsed)
