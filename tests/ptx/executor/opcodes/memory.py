"""Loads, stores, atomics, cp.async, fences and barriers."""

from __future__ import annotations

from ..numbers import KINDS, size_of
from ..parser import Immediate, Instruction, Operand, Symbol, Vector
from ..translate import Emitter, emitter

_TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 b64 u64 s64 f32 f64"
_MEMORIES = {"shared": ("M.shared", "u4"), "global": ("M.memory", "u8"), "param": ("M.constants", "u8")}


def _items(operand: Operand) -> tuple:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _memory(e: Emitter, i: Instruction) -> tuple[str, str]:
    """Which memory an access is to, and the kind of its addresses."""
    for part in i.op[1:]:
        if part in _MEMORIES:
            return _MEMORIES[part]
    raise e.unknown("the executor has no generic addresses")


@emitter("ld", types=_TYPES, modifiers="shared global param v2 v4")
def _load(e: Emitter, i: Instruction) -> None:
    kind, items, address = KINDS[i.op[-1]], _items(i.operands[0]), i.operands[1]
    size, (memory, addresses) = size_of(kind), _memory(e, i)
    if memory == "M.constants" and isinstance(address.base, Symbol):
        for j, item in enumerate(items):
            value = f"M.parameter({address.base.name!r}, {address.offset + j * size}, {kind})"
            e.set(item, value, kind, True)
        return
    where, guard, loaded = e.address(address, addresses), e.guard(), e.fresh()
    e.put(f"{loaded} = {memory}.load(M, {where}, {size}, {len(items)}, {guard}, I, {e.line})")
    for j, item in enumerate(items):
        e.set(item, f"{loaded}[{j}]" + (f".view({kind})" if kind[0] != "u" else ""), kind)


@emitter("st", types=_TYPES, modifiers="shared global v2 v4")
def _store(e: Emitter, i: Instruction) -> None:
    kind, items = KINDS[i.op[-1]], _items(i.operands[1])
    memory, addresses = _memory(e, i)
    where = e.address(i.operands[0], addresses)
    values = ", ".join(e.array(item, f"u{size_of(kind)}") for item in items)
    e.put(f"{memory}.store(M, {where}, {size_of(kind)}, ({values},), {e.guard()}, I, {e.line})")


@emitter("atom", "red", types="s32 u32", modifiers="shared global gpu cta relaxed min max add")
def _atomic(e: Emitter, i: Instruction) -> None:
    kind, (memory, addresses) = KINDS[i.op[-1]], _memory(e, i)
    how = next(part for part in i.op if part in ("min", "max", "add"))
    operands = i.operands if i.root == "red" else i.operands[1:]
    where, value, old = e.address(operands[0], addresses), e.array(operands[1], kind), e.fresh()
    e.put(f"{old} = {memory}.atomic(M, {how!r}, {where}, {value}, {e.guard()}, I, {e.line})")
    if i.root == "atom":
        e.set(i.operands[0], old, kind)


@emitter("cp", modifiers="async ca cg shared global commit_group wait_group wait_all")
def _copy(e: Emitter, i: Instruction) -> None:
    what = i.op[2]
    if i.guard is not None and what not in ("ca", "cg"):
        raise e.unknown("the executor does not know a guarded group of copies")
    if what == "commit_group":
        e.put("M.copies.commit(I)")
    elif what == "wait_group":
        e.put(f"M.copies.wait(M, {i.operands[0].value}, I)")
    elif what == "wait_all":
        e.put("M.copies.commit(I); M.copies.wait(M, 0, I)")
    else:
        to, of = e.address(i.operands[0], "u4"), e.address(i.operands[1], "u8")
        given = e.array(i.operands[3], "u4") if len(i.operands) > 3 else "None"
        e.put(f"M.copies.start(M, {to}, {of}, {i.operands[2].value}, {given}, {e.guard()}, I, {e.line})")


@emitter("fence", modifiers="proxy async shared::cta")
def _fence(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise e.unknown("the executor does not know a guarded fence")
    e.put("M.shared.fence_proxy(I)")


@emitter("bar", "barrier", modifiers="sync aligned warp")
def _barrier(e: Emitter, i: Instruction) -> None:
    if "warp" in i.op and i.guard is None:
        e.put(f"M.warp_barrier({e.use(i.operands[0], 'u4')}, I, {e.line})")
        return
    if i.guard is not None or i.operands != [Immediate(0)]:
        raise e.unknown("the executor knows the barrier of all of a block's threads alone")
