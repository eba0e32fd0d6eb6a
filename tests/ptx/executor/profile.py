"""What a launch executes: instructions by class, wavefronts of shared memory, sectors of global memory."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .parser import Instruction

__all__ = ["Profile", "instruction_class"]

_SPECIAL = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "div", "rem"}
_ARITHMETIC = {"fma", "add", "sub", "mul", "neg", "abs", "min", "max", "copysign"}
_FLOAT = {"f32", "f64"}
_CLASSES = {
    "bar": "barrier", "barrier": "barrier", "bra": "branch", "ret": "branch", "exit": "branch", "mov": "move",
    "cvta": "move", "setp": "compare, select", "selp": "compare, select", "cvt": "convert", "fence": "fence",
}  # fmt: skip


def instruction_class(i: Instruction) -> str:
    """PTX's class, not machine code's: most moves and much address arithmetic vanish in ptxas."""
    root = i.root
    if root == "wgmma":
        return "wgmma" if i.op[1] == "mma_async" else "wgmma's waits and fences"
    if root in ("mma", "ldmatrix", "stmatrix", "shfl", "redux"):
        return root
    if root in ("ld", "st", "atom", "red"):
        space = next(part for part in i.op if part in ("shared", "global", "param"))
        return f"{root}.{space}"
    if root == "cp":
        return "cp.async" if i.op[2] in ("ca", "cg") else "cp.async's waits"
    if root in _CLASSES:
        return _CLASSES[root]
    if root in _SPECIAL:
        return "special"
    if root in _ARITHMETIC and i.op[-1] in _FLOAT:
        return "fma" if root == "fma" else "float"
    return "integer"


class Profile:
    """Counts of a launch, in instructions of warps.

    Attributes:
        instructions: by class. visits: warps that ran each basic block.
        wavefronts: passes of shared memory that loads, stores and cp.async took; ideal: without bank conflicts.
        conflicts: wavefronts too many, by line of the PTX.
        sectors: of 32 bytes that accesses of global memory touch; bytes: of them that are asked for.
    """

    def __init__(self) -> None:
        self.instructions: Counter = Counter()
        self.visits: Counter = Counter()
        self.wavefronts: Counter = Counter()
        self.ideal: Counter = Counter()
        self.conflicts: Counter = Counter()
        self.sectors: Counter = Counter()
        self.bytes: Counter = Counter()

    def __add__(self, other: Profile) -> Profile:
        """The counts of both; lines and basic blocks are those of one kernel."""
        result = Profile()
        for name, counts in vars(self).items():
            setattr(result, name, counts + getattr(other, name))
        return result

    def finish(self, blocks) -> None:
        for block in blocks:
            for name, count in block.counts.items():
                self.instructions[name] += count * self.visits[block.number]

    def shared_access(self, what: str, threads, addresses, width: int, line: int) -> None:
        """A warp's access of up to 4 bytes a lane is one pass, of 8 bytes two, of 16 bytes four."""
        lanes = {16: 8, 8: 16}.get(width, 32)
        words = addresses[:, None] // 4 + np.arange(max(width // 4, 1))
        passes = np.repeat(threads // lanes, words.shape[1])
        distinct = np.unique(
            np.stack([passes, words.reshape(-1)]), axis=1
        )  # a word is read once for all lanes
        banks, words_of_bank = np.unique(distinct[0] * 32 + distinct[1] % 32, return_counts=True)
        _, starts = np.unique(banks // 32, return_index=True)
        worst = np.maximum.reduceat(words_of_bank, starts)
        self.wavefronts[what] += int(worst.sum())
        self.ideal[what] += len(worst)
        if worst.sum() > len(worst):
            self.conflicts[line] += int(worst.sum()) - len(worst)

    def global_access(self, what: str, threads, addresses, width: int) -> None:
        first, last = addresses // 32, (addresses + (width - 1)) // 32
        warps = (threads // 32).astype(np.int64) << 48
        touched = np.concatenate([warps + first, warps + last])
        self.sectors[what] += len(np.unique(touched))
        self.bytes[what] += len(threads) * width
