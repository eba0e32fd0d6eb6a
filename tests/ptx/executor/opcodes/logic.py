"""Bits, shifts, comparisons, selections and moves."""

from __future__ import annotations

from ..numbers import KINDS, size_of
from ..parser import Immediate, Instruction, Pair, Register, Symbol, Vector
from ..translate import Emitter, emitter

_SYMBOLS = {"and": "&", "or": "|", "xor": "^"}
_BITS = "b16 b32 b64"


@emitter("and", "or", "xor", types=f"{_BITS} pred")
def _bitwise(e: Emitter, i: Instruction) -> None:
    kind = KINDS[i.op[-1]]
    a, b = (e.use(operand, kind) for operand in i.operands[1:])
    e.set(i.operands[0], f"{a} {_SYMBOLS[i.root]} {b}", kind, e.scalar(*i.operands[1:]))


@emitter("not", types=f"{_BITS} pred")
def _not(e: Emitter, i: Instruction) -> None:
    kind = KINDS[i.op[-1]]
    e.set(i.operands[0], f"~{e.use(i.operands[1], kind)}", kind, e.scalar(i.operands[1]))


@emitter("shl", "shr", types=f"{_BITS} s16 u16 s32 u32 s64 u64")
def _shift(e: Emitter, i: Instruction) -> None:
    kind = KINDS[i.op[-1]]
    a, by, bits = e.use(i.operands[1], kind), e.use(i.operands[2], "u4"), 8 * size_of(kind)
    if isinstance(i.operands[2], Immediate) and i.operands[2].value < bits:
        expression = f"{a} {'<<' if i.root == 'shl' else '>>'} {e.constant(i.operands[2], kind)}"
    elif i.root == "shr" and kind[0] == "i":  # fills with the sign, also where all bits go
        expression = f"{a} >> np.minimum({by}, u4({bits - 1})).astype({kind})"
    else:
        symbol = "<<" if i.root == "shl" else ">>"
        expression = (
            f"np.where({by} < {bits}, {a} {symbol} ({by} & u4({bits - 1})).astype({kind}), {kind}(0))"
        )
    e.set(i.operands[0], expression, kind, e.scalar(*i.operands[1:]))


@emitter("bfe", types="s32 u32 s64 u64")
def _extract(e: Emitter, i: Instruction) -> None:
    kind = KINDS[i.op[-1]]
    width, unsigned = 8 * size_of(kind), f"u{size_of(kind)}"
    if not all(isinstance(operand, Immediate) for operand in i.operands[2:]):
        raise e.unknown("the executor wants position and length of a bit field as immediates")
    position, length = (operand.value for operand in i.operands[2:])
    if not 0 < length <= width - position:
        raise e.unknown("the executor does not know a bit field of no bits, or past the end")
    a = e.use(i.operands[1], unsigned)
    if kind == unsigned:
        expression = f"({a} >> {unsigned}({position})) & {unsigned}({(1 << length) - 1})"
    else:  # of the field's sign
        expression = (
            f"({a} << {unsigned}({width - position - length})).view({kind}) >> {kind}({width - length})"
        )
    e.set(i.operands[0], expression, kind, e.scalar(i.operands[1]))


@emitter("prmt", types="b32")
def _permute(e: Emitter, i: Instruction) -> None:
    arguments = ", ".join(e.use(operand, "u4") for operand in i.operands[1:])
    e.set(i.operands[0], f"permute_bytes({arguments})", "u4", e.scalar(*i.operands[1:]))


_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = tuple(name + "u" for name in _COMPARISONS)


@emitter(
    "setp",
    types=f"{_BITS} s16 u16 s32 u32 s64 u64 f32 f64",
    modifiers=" ".join([*_COMPARISONS, *_UNSIGNED, *_UNORDERED, *_SYMBOLS, "num", "nan", "ftz"]),
)
def _compare(e: Emitter, i: Instruction) -> None:
    kind, how = KINDS[i.op[-1]], i.op[1]
    how = _UNSIGNED.get(how, how)
    a, b = (e.use(operand, kind) for operand in i.operands[1:3])
    if "ftz" in i.op:
        a, b = f"flush({a})", f"flush({b})"
    unordered = f"(np.isnan({a}) | np.isnan({b}))"
    if how in ("num", "nan"):
        expression = unordered if how == "nan" else f"~{unordered}"
    elif how in _COMPARISONS:
        expression = f"({a} {_COMPARISONS[how]} {b})"
        if how == "ne" and kind[0] == "f":  # numpy's holds for NaN, PTX's does not
            expression = f"({expression} & ~{unordered})"
    else:
        expression = f"(({a} {_COMPARISONS[how[:-1]]} {b}) | {unordered})"
    combined = [part for part in i.op[2:] if part in _SYMBOLS]
    result, scalar = i.operands[0], e.scalar(*i.operands[1:])
    if combined and isinstance(result, Pair):
        raise e.unknown("the executor does not know a comparison that is combined and negated")
    if combined:
        expression = f"{expression} {_SYMBOLS[combined[0]]} {e.use(i.operands[3], 'b1')}"
    if isinstance(result, Pair):
        e.set(result.second, f"~{expression}", "b1", scalar)
        result = result.first
    e.set(result, expression, "b1", scalar)


@emitter("selp", types=f"{_BITS} s16 u16 s32 u32 s64 u64 f32 f64")
def _select(e: Emitter, i: Instruction) -> None:
    kind = KINDS[i.op[-1]]
    a, b, p = e.use(i.operands[1], kind), e.use(i.operands[2], kind), e.use(i.operands[3], "b1")
    e.set(i.operands[0], f"np.where({p}, {a}, {b})", kind, e.scalar(*i.operands[1:]))


@emitter("mov", types=f"{_BITS} pred u16 s16 u32 s32 u64 s64 f32 f64")
def _move(e: Emitter, i: Instruction) -> None:
    kind, (to, of) = KINDS[i.op[-1]], i.operands
    whole = f"u{size_of(kind)}"
    if isinstance(of, Vector):  # packed, the first lowest
        part = size_of(kind) // len(of.items)
        names = [e.use(item, f"u{part}") for item in of.items]
        terms = [f"({name}.astype({whole}) << {whole}({8 * part * j}))" for j, name in enumerate(names)]
        e.set(to, " | ".join(terms), whole, e.scalar(*of.items))
    elif isinstance(to, Vector):
        part, name, scalar = size_of(kind) // len(to.items), e.use(of, whole), e.scalar(of)
        for j, item in enumerate(to.items):
            e.set(item, f"({name} >> {whole}({8 * part * j})).astype(u{part})", f"u{part}", scalar)
    elif (
        isinstance(of, Register)
        and i.guard is None
        and e.register(of.name).kind == KINDS[e.kernel.type_of(to.name)]
    ):
        e.alias(to, of)
    else:
        e.set(to, e.use(of, kind), kind, isinstance(of, Symbol) or e.scalar(of))


def _is_copy(e: Emitter, i: Instruction) -> bool:
    """Whether a move is of a whole register into another one that is held alike."""
    to, of = i.operands
    if not isinstance(of, Register) or i.guard is not None:
        return False
    return e.register(of.name).kind == KINDS[e.kernel.type_of(to.name)]
