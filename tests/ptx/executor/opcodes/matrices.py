"""mma.sync, ldmatrix, stmatrix and wgmma."""

from __future__ import annotations

from ..parser import Immediate, Instruction, Vector
from ..translate import Emitter, emitter


def _tuple(names: list[str]) -> str:
    return "(" + ", ".join(names) + ",)"


@emitter("mma", types="m16n8k8 m16n8k16", modifiers="sync aligned row col f32 bf16 tf32")
def _multiply(e: Emitter, i: Instruction) -> None:
    if i.guard is not None or i.op[4:7] != ("row", "col", "f32"):
        raise e.unknown("the executor does not know this product of a warp")
    sums, a, b, before = i.operands
    left, right = (_tuple([e.array(o, "u4") for o in v.items]) for v in (a, b))
    added = _tuple([e.array(o, "f4") for o in before.items])
    result = e.fresh()
    e.put(f"{result} = mma({i.op[3]!r}, {i.op[7]!r}, {left}, {right}, {added})")
    for j, item in enumerate(sums.items):
        e.set(item, f"{result}[{j}]", "f4")


_MATRICES = "sync aligned m8n8 x1 x2 x4 trans shared"


@emitter("ldmatrix", types="b16", modifiers=_MATRICES)
def _load(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise e.unknown("the executor does not know a guarded load of matrices")
    count, where, result = len(i.operands[0].items), e.address(i.operands[1], "u4"), e.fresh()
    e.put(f"{result} = load_matrices(M, {where}, {count}, {'trans' in i.op}, I, {e.line})")
    for j, item in enumerate(i.operands[0].items):
        e.set(item, f"{result}[{j}]", "u4")


@emitter("stmatrix", types="b16", modifiers=_MATRICES)
def _store(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise e.unknown("the executor does not know a guarded store of matrices")
    values = _tuple([e.array(o, "u4") for o in i.operands[1].items])
    where = e.address(i.operands[0], "u4")
    e.put(f"store_matrices(M, {where}, {values}, {'trans' in i.op}, I, {e.line})")


#: Sizes of the products of a warpgroup that triton chooses for pcfast.
_SHAPES = [f"m64n{n}k{k}" for n in (8, 16, 32, 64, 128, 256) for k in (8, 16)]


@emitter(
    "wgmma",
    modifiers=" ".join(
        [
            "fence",
            "commit_group",
            "wait_group",
            "mma_async",
            "sync",
            "aligned",
            "f32",
            "bf16",
            "tf32",
            *_SHAPES,
        ]
    ),
)
def _warpgroup(e: Emitter, i: Instruction) -> None:
    what = i.op[1]
    if i.guard is not None:
        raise e.unknown("the executor does not know a guarded product of a warpgroup")
    if what == "fence":
        e.put("M.warpgroups.fence(I)")
    elif what == "commit_group":
        e.put("M.warpgroups.commit(I)")
    elif what == "wait_group":
        e.put(f"M.warpgroups.wait(M, {i.operands[0].value}, I)")
    else:
        _warpgroup_product(e, i)


def _warpgroup_product(e: Emitter, i: Instruction) -> None:
    sums, a, b, keep = i.operands[:4]
    # signs of a and b, then for each operand in shared memory whether it is transposed
    flags = [operand.value for operand in i.operands[4:]]
    if flags[:2] != [1, 1]:
        raise e.unknown("the executor does not know negated operands of wgmma")
    in_registers = isinstance(a, Vector)
    left = _tuple([e.unchecked(o, "u4") for o in a.items]) if in_registers else e.array(a, "u8")
    names = [o.name for o in (*sums.items, *(a.items if in_registers else ()))]
    added, right = _tuple([e.unchecked(o, "f4") for o in sums.items]), e.array(b, "u8")
    kept = e.constant(keep, "b1") if isinstance(keep, Immediate) else e.use(keep, "b1")
    result = e.fresh()
    e.put(
        f"{result} = M.warpgroups.multiply(M, {i.op[4]!r}, {i.op[6]!r}, {added}, {left}, {right}, {kept}, "
        f"{flags[2:]}, {names}, I, {e.line})"
    )
    for j, item in enumerate(sums.items):
        e.set(item, f"{result}[{j}]", "f4", checked=False)
