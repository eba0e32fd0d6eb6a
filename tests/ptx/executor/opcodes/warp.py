"""shfl and redux."""

from __future__ import annotations

from ..numbers import KINDS
from ..parser import Instruction, Pair
from ..translate import Emitter, emitter


@emitter("shfl", types="b32", modifiers="sync bfly idx down up")
def _shuffle(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise e.unknown("the executor does not know a guarded shuffle")
    value = e.array(i.operands[1], "u4")
    by, clamp, members = (e.use(operand, "u4") for operand in i.operands[2:])
    moved, inside = e.fresh(), e.fresh()
    e.put(f"{moved}, {inside} = M.shuffle({i.op[2]!r}, {value}, {by}, {clamp}, {members}, {e.line})")
    result = i.operands[0]
    if isinstance(result, Pair):
        e.set(result.second, inside, "b1")
        result = result.first
    e.set(result, moved, "u4")


@emitter("redux", types="s32 u32", modifiers="sync min max add")
def _reduce(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise e.unknown("the executor does not know a guarded reduction")
    kind = KINDS[i.op[-1]]
    how = {"max": "np.max", "min": "np.min", "add": "np.sum"}[i.op[2]]
    value, members = e.array(i.operands[1], kind), e.use(i.operands[2], "u4")
    e.set(i.operands[0], f"M.reduce_warp({how}, {value}, {members}, {e.line})", kind)
