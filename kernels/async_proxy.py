"""Fences that the asynchronous Tensor Cores of Hopper and Blackwell need in PTX, and triton 3.6 leaves out of it.

wgmma and tcgen05.mma read shared memory through the async proxy, cp.async and st.shared write it through the generic
one: a fence.proxy.async belongs in between. wgmma may also read its left operand from registers, which nobody may
touch before a wgmma.wait_group that covers it. In pipelined loops triton 3.6 emits neither that fence behind cp.async
(fixed in 3.7.1: pull requests 9610, 10537) nor that wait (9514, 9530). Where a loop is unrolled, sums start at zero
behind the wgmma.fence that orders registers, not before it. So the fences are put in here, while triton compiles; our
kernels make no left operand in registers in loops with such waits; and :func:`hazards` finds whatever would still be
wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import triton

_MATRIX = re.compile(r"(wgmma\.mma_async|tcgen05\.mma)\b")
_WGMMA = re.compile(r"wgmma\.mma_async\b")
_ARRIVAL = re.compile(r"cp\.async\.wait_(group|all)\b")
_STORE = re.compile(r"(st\.(\w+\.)*shared|stmatrix)\b")
_FENCE = re.compile(r"fence\.proxy\.async\b")
_BRANCH = re.compile(r"bra(\.uni)?\s+(\S+)")
_LABEL = re.compile(r"([$\w]+):")
_ENDS_A_STRETCH = re.compile(r"wgmma\.fence\b|(bra|ret|exit)\b|[$\w]+:")
_WRITTEN = re.compile(r"(?!st\.|red\.|wgmma\.)[\w.:]+\s+(\{[^}]*\}|%\w+(\|%\w+)?)")
_REGISTER = re.compile(r"%\w+")
_LISTS = re.compile(r"\{([^}]*)\}")
_LEFT_IN_REGISTERS = re.compile(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{")
_PENDING = re.compile(r"wgmma\.wait_group\S*\s+([1-9]\d*)")


class _Code:
    """PTX by lines, one instruction each as triton prints it, and which line may follow which."""

    def __init__(self, ptx: str) -> None:
        self.lines = [line.partition("//")[0].strip().rstrip(";").rstrip() for line in ptx.splitlines()]
        # "@%p1 bra $L1" without its guard; braces of inline assembly stand alone
        self.instructions = [re.sub(r"^@!?[%\w]+\s+", "", line) for line in self.lines]
        self._labels: dict[str, list[int]] = {}
        for at, line in enumerate(self.lines):
            if label := _LABEL.match(line):
                self._labels.setdefault(label.group(1), []).append(at)

    def where(self, pattern: re.Pattern) -> list[int]:
        return [at for at, line in enumerate(self.instructions) if pattern.match(line)]

    def _after(self, at: int) -> list[int]:
        branch, guarded = _BRANCH.match(self.instructions[at]), self.lines[at].startswith("@")
        following = [at + 1] if at + 1 < len(self.lines) else []
        if branch:
            places = self._labels.get(branch.group(2), [])
            # labels of inline assembly stand once for each copy of it, before their branch
            target = [place for place in places if place < at][-1:] or places[:1]
            return target + (following if guarded else [])
        ends = self.instructions[at] in ("ret", "exit", "trap") and not guarded
        return [] if ends else following

    def unfenced(self, starts: Iterable[int]) -> bool:
        """Whether a matrix instruction can follow some of the lines with no fence, or other wait, on the way.

        That other wait needs a fence of its own, which is one for what had arrived before, too.
        """
        pending, seen = [line for at in starts for line in self._after(at)], set()
        while pending:
            at = pending.pop()
            if at in seen or _FENCE.match(self.instructions[at]) or _ARRIVAL.match(self.instructions[at]):
                continue
            if _MATRIX.match(self.instructions[at]):
                return True
            seen.add(at)
            pending += self._after(at)
        return False


def _unfenced_arrivals(code: _Code) -> list[int]:
    return [at for at in code.where(_ARRIVAL) if code.unfenced([at])]


def _unordered_products(code: _Code) -> list[int]:
    """The wgmma that use a register written since the wgmma.fence before them, in one stretch of code.

    One fence in front of the first orders those that follow it, too.
    """
    unfenced, fresh = [], set()
    for at, line in enumerate(code.instructions):
        if _ENDS_A_STRETCH.match(line):
            fresh.clear()
        elif _WGMMA.match(line):
            if fresh & set(_REGISTER.findall(" ".join(_LISTS.findall(line)))):
                unfenced.append(at)
                fresh.clear()
        elif written := _WRITTEN.match(line):
            fresh.update(_REGISTER.findall(written.group(1)))
    return unfenced


def with_fences(ptx: str) -> str:
    """``ptx`` with the fences that it lacks.

    A proxy fence behind every wait for cp.async from which a matrix instruction is reached without one: before the
    barrier that follows, so that each thread fences its own copies before others rely on them. And a wgmma.fence in
    front of every wgmma that uses registers written since the last one.
    """
    if not _MATRIX.search(ptx):
        return ptx
    code, lines = _Code(ptx), ptx.splitlines(keepends=True)
    missing = [(at + 1, "\tfence.proxy.async.shared::cta;\n") for at in _unfenced_arrivals(code)]
    missing += [(at, "\twgmma.fence.sync.aligned;\n") for at in _unordered_products(code)]
    for at, fence in sorted(missing, reverse=True):
        lines.insert(at, fence)
    return "".join(lines)


def hazards(ptx: str) -> list[str]:
    """What in a kernel's PTX may let a Tensor Core read something else than was written, one line each."""
    if not _MATRIX.search(ptx):
        return []
    code, problems = _Code(ptx), []
    if _unfenced_arrivals(code):
        problems.append("no fence.proxy.async between the wait for cp.async and a matrix instruction")
    if code.unfenced(code.where(_STORE)):
        problems.append("no fence.proxy.async between a store to shared memory and a matrix instruction")
    if _unordered_products(code):
        problems.append("no wgmma.fence between a write to a register and the wgmma that uses it")
    pending = _PENDING.search(ptx)
    if _LEFT_IN_REGISTERS.search(ptx) and pending:
        problems.append(
            f"wgmma reads registers and is waited for with wgmma.wait_group {pending.group(1)}: they may be written "
            "anew before it has read them"
        )
    return problems


# what triton calls while it prepares a compilation


def _fences_itself(version: str) -> bool:
    """Whether a release of triton puts the fences in."""
    return tuple(map(int, re.match(r"(\d+)\.(\d+)\.(\d+)", version).groups())) >= (3, 7, 1)


_NEEDED = not _fences_itself(triton.__version__)
#: What compiled kernels with fences are known by; changes with :func:`with_fences`.
_KEY = "pcfast-fences-2"
_hook = None


def install() -> None:
    """Have triton put the fences in from now on; whatever hook there was before is called first.

    It changes other kernels of the process only where they lack a fence, too.
    """
    global _hook
    knobs = triton.knobs.runtime
    earlier = knobs.add_stages_inspection_hook
    if not _NEEDED or (earlier is _hook and _hook is not None):
        return

    def hook(*arguments):
        if not arguments:  # triton 3.7.0 asks what to add to the keys of its two caches
            return tuple(key + _KEY for key in (("", "") if earlier is None else earlier()))
        if earlier is not None:
            earlier(*arguments)
        stages = arguments[1]
        if "ptx" in stages:
            make = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_fences(make(source, metadata))
        return None

    knobs.add_stages_inspection_hook = _hook = hook


install()
