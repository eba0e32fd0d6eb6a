"""add sub mul mad fma div rem, negation, extremes, and the approximate functions."""

from __future__ import annotations

from ..numbers import KINDS
from ..parser import Instruction
from ..translate import Emitter, emitter

_INTEGERS = "s16 u16 s32 u32 s64 u64"


def _kind(i: Instruction) -> str:
    return KINDS[i.op[-1]]


def _rounded(i: Instruction, expression: str) -> str:
    """After the modifiers that act on a result."""
    if "sat" in i.op:
        expression = f"saturate({expression})"
    return f"flush({expression})" if "ftz" in i.op else expression


def _operands(e: Emitter, i: Instruction, kind: str) -> list[str]:
    names = [e.use(operand, kind) for operand in i.operands[1:]]
    return [f"flush({name})" for name in names] if "ftz" in i.op else names


@emitter("add", types=f"{_INTEGERS} s16x2 f32 f64", modifiers="rn ftz sat")
@emitter("sub", types=f"{_INTEGERS} f32 f64", modifiers="rn ftz")
def _sum(e: Emitter, i: Instruction) -> None:
    kind, symbol = _kind(i), {"add": "+", "sub": "-"}[i.root]
    scalar = e.scalar(*i.operands[1:])
    if i.op[-1] == "s16x2":
        a, b = _operands(e, i, "u4")
        e.set(i.operands[0], f"add_halves({a}, {b})", "u4", scalar)
        return
    if kind[0] == "i":
        kind = "u" + kind[1]  # the same bits, and numpy does not mind an overflow
    a, b = _operands(e, i, kind)
    expression = f"{a} {symbol} {b}"
    if e.owner.contract and i.op[1:] == ("f32",):
        expression = _contracted(e, symbol, a, b) or expression
    e.set(i.operands[0], _rounded(i, expression), kind, scalar)


def _contracted(e: Emitter, symbol: str, a: str, b: str) -> str | None:
    """The sum of a product as a fused multiply-add: ptxas may fuse instructions that name no rounding."""
    if a in e.products:
        x, y = e.products[a]
        return f"fma({x}, {y}, {b if symbol == '+' else f'-{b}'})"
    if b in e.products:
        x, y = e.products[b]
        return f"fma({x if symbol == '+' else f'-{x}'}, {y}, {a})"
    return None


@emitter("mul", types=f"{_INTEGERS} f32 f64", modifiers="rn ftz lo hi wide")
def _multiply(e: Emitter, i: Instruction) -> None:
    kind, scalar = _kind(i), e.scalar(*i.operands[1:])
    if kind[0] == "f":
        a, b = _operands(e, i, kind)
        e.set(i.operands[0], _rounded(i, f"{a} * {b}"), kind, scalar)
        if i.op[1:] == ("f32",) and i.guard is None:
            e.products[e.use(i.operands[0], kind)] = (a, b)
    else:
        e.set(i.operands[0], *_product(e, i, kind), scalar)


def _product(e: Emitter, i: Instruction, kind: str) -> tuple[str, str]:
    """Of integers: the low half, the high half or all of it, and its kind."""
    if "lo" in i.op:
        kind = "u" + kind[1]
        a, b = (e.use(operand, kind) for operand in i.operands[1:3])
        return f"{a} * {b}", kind
    if "hi" in i.op and kind == "u8":
        a, b = (e.use(operand, kind) for operand in i.operands[1:3])
        return f"high_product({a}, {b})", kind
    if kind[1] == "8" or not {"hi", "wide"} & set(i.op):
        raise e.unknown("the executor does not know this product of integers")
    wide = f"{kind[0]}{2 * int(kind[1])}"
    a, b = (e.use(operand, kind) for operand in i.operands[1:3])
    product = f"{a}.astype({wide}) * {b}.astype({wide})"
    if "wide" in i.op:
        return product, wide
    return f"(({product}) >> {wide}({8 * int(kind[1])})).astype({kind})", kind


@emitter("mad", types=_INTEGERS, modifiers="lo hi wide")
def _multiply_and_add(e: Emitter, i: Instruction) -> None:
    product, kind = _product(e, i, _kind(i))
    modulo = "u" + kind[1]
    added = e.use(i.operands[3], modulo)
    expression = f"({product}).view({modulo}) + {added}" if kind != modulo else f"{product} + {added}"
    e.set(i.operands[0], expression, modulo, e.scalar(*i.operands[1:]))


@emitter("fma", types="f32 f64", modifiers="rn rm ftz sat")
def _fused(e: Emitter, i: Instruction) -> None:
    kind = _kind(i)
    if kind == "f8" and "rm" in i.op:
        raise e.unknown("the executor does not know a fused product of float64 rounded down")
    function = "fma_wide" if kind == "f8" else "fma_down" if "rm" in i.op else "fma"
    arguments = ", ".join(_operands(e, i, kind))
    e.set(i.operands[0], _rounded(i, f"{function}({arguments})"), kind, e.scalar(*i.operands[1:]))


@emitter("div", types=f"{_INTEGERS} f32 f64", modifiers="rn full approx ftz")
def _divide(e: Emitter, i: Instruction) -> None:
    kind = _kind(i)
    a, b = _operands(e, i, kind)
    expression = _rounded(i, f"{a} / {b}") if kind[0] == "f" else f"quotient({a}, {b})"
    e.set(i.operands[0], expression, kind, e.scalar(*i.operands[1:]))


@emitter("rem", types=_INTEGERS)
def _remainder(e: Emitter, i: Instruction) -> None:
    a, b = _operands(e, i, _kind(i))
    e.set(i.operands[0], f"remainder({a}, {b})", _kind(i), e.scalar(*i.operands[1:]))


@emitter("min", "max", types=f"{_INTEGERS} f32 f64", modifiers="NaN ftz")
def _extreme(e: Emitter, i: Instruction) -> None:
    kind = _kind(i)
    a, b = _operands(e, i, kind)
    if kind[0] == "f" and "NaN" not in i.op:
        name = {"min": "np.fmin", "max": "np.fmax"}[i.root]
    else:
        name = {"min": "np.minimum", "max": "np.maximum"}[i.root]
    e.set(i.operands[0], f"{name}({a}, {b})", kind, e.scalar(*i.operands[1:]))


@emitter("copysign", types="f32 f64")
def _copysign(e: Emitter, i: Instruction) -> None:
    sign, size = _operands(e, i, _kind(i))
    e.set(i.operands[0], f"np.copysign({size}, {sign})", _kind(i), e.scalar(*i.operands[1:]))


def _function(root: str, text: str, types: str, modifiers: str = "") -> None:
    @emitter(root, types=types, modifiers=modifiers)
    def emit(e: Emitter, i: Instruction) -> None:
        (a,) = _operands(e, i, _kind(i))
        expression = text.format(a, kind=_kind(i))
        e.set(i.operands[0], _rounded(i, expression), _kind(i), e.scalar(i.operands[1]))


_function("abs", "np.abs({0})", "s32 s64 f32 f64", "ftz")
_function("neg", "-{0}", "s16 s32 s64 f32 f64", "ftz")
_function("ex2", "np.exp2({0})", "f32", "approx ftz")
_function("lg2", "np.log2({0})", "f32", "approx ftz")
_function("rcp", "{kind}(1) / {0}", "f32 f64", "rn approx ftz")
_function("sqrt", "np.sqrt({0})", "f32 f64", "rn approx ftz")
_function("rsqrt", "{kind}(1) / np.sqrt({0})", "f32", "approx ftz")
_function("tanh", "np.tanh({0})", "f32", "approx")
