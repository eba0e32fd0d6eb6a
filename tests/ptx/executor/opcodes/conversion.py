"""cvt and cvta."""

from __future__ import annotations

from ..numbers import KINDS, size_of
from ..parser import Instruction
from ..translate import Emitter, emitter

_TO_INTEGERS = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}


@emitter("cvta", types="u64", modifiers="to global")
def _address(e: Emitter, i: Instruction) -> None:
    if i.op[1:3] != ("to", "global"):
        raise e.unknown("the executor has no generic addresses")
    e.set(i.operands[0], e.use(i.operands[1], "u8"), "u8", e.scalar(i.operands[1]))


@emitter(
    "cvt",
    types="s8 u8 s16 u16 s32 u32 s64 u64 f32 f64 bf16 bf16x2 tf32",
    modifiers=f"rn rna sat ftz {' '.join(_TO_INTEGERS)}",
)
def _convert(e: Emitter, i: Instruction) -> None:
    to, of = i.op[-2:]
    result, operands = i.operands[0], i.operands[1:]
    scalar = e.scalar(*operands)
    if to == "bf16x2":  # the first operand is the upper half
        high, low = (e.use(operand, "f4") for operand in operands)
        e.set(result, f"(to_bf16({high}).astype(u4) << u4(16)) | to_bf16({low})", "u4", scalar)
    elif to == "bf16":
        e.set(result, f"to_bf16({e.use(operands[0], 'f4')})", "u2", scalar)
    elif of == "bf16":
        e.set(result, f"from_bf16({e.use(operands[0], 'u2')})", "f4", scalar)
    elif to == "tf32":
        e.set(result, f"to_tf32({e.use(operands[0], 'f4')})", "u4", scalar)
    else:
        kinds = KINDS[to], KINDS[of]
        e.set(result, _number(e, i, e.use(operands[0], kinds[1]), *kinds), kinds[0], scalar)


def _number(e: Emitter, i: Instruction, a: str, to: str, of: str) -> str:
    whole = next((_TO_INTEGERS[part] for part in i.op if part in _TO_INTEGERS), "")
    if of[0] != "f":
        if "sat" in i.op:
            raise e.unknown("the executor does not clamp integers")
        return f"{a}.astype({to})"
    if "ftz" in i.op:
        a = f"flush({a})"
    if to[0] != "f":
        if not whole:
            raise e.unknown("a conversion to an integer that names no rounding")
        bits = 8 * size_of(to)
        lowest, highest = (0, 2**bits - 1) if to[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return f"to_integer({whole}(np.asarray({a}, f8)), {lowest}, {highest}, {to})"
    expression = f"{whole}({a}).astype({to})"
    if "sat" in i.op:
        expression = f"saturate({expression})"
    return f"flush({expression})" if "ftz" in i.op and to == "f4" else expression
