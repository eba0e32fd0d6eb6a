"""Runs the threads of a launch: divergence, barriers, reports.

A group of threads runs the lowest-numbered basic block at which any thread waits. Groups that meet at a block run
it together, so that warps and thread blocks share numpy's calls. An instruction of a warp or a warpgroup waits for
all of its threads. One order of execution is run; what another order could give is reported from the shadows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .async_copy import AsyncCopies
from .matrix import load_matrices, mma, store_matrices
from .memory import DeviceMemory, GlobalMemory, ParameterMemory, SharedMemory
from .numbers import DTYPES
from .profile import Profile
from .translate import Block, Translation
from .warpgroup import WarpGroups

__all__ = ["Deadlock", "Launch", "Report"]

_ALL_LANES = np.uint32(0xFFFFFFFF)
_UNWRITTEN = 0xCD  # what registers hold at first
_OPERATIONS = {"mma": mma, "load_matrices": load_matrices, "store_matrices": store_matrices}


class Deadlock(Exception):
    """Threads wait for others that never come."""


@dataclass(frozen=True)
class Report:
    """Something that is wrong, once for each line of the PTX.

    Attributes:
        source: the instruction and where it comes from. thread: (block, thread) of the first, or None.
    """

    what: str
    line: int
    source: str
    thread: tuple[int, int] | None

    def __str__(self) -> str:
        at = f" by thread {self.thread[1]} of block {self.thread[0]}" if self.thread else ""
        return f"line {self.line} ({self.source}): {self.what}{at}"


class Launch:
    """One launch of a translated kernel.

    Args:
        device: built memory. parameters: bytes of the kernel's parameters, at their offsets.
        grid, size: blocks in x, y and z; threads of a block. shared: bytes of a block.
        checks: keep shadows and report what they show.
        only: numbers of the blocks to run (x first); None for all.

    Attributes:
        reports: in the order in which they came up. visited: which basic blocks ran.
        executed: instructions times threads.
    """

    def __init__(
        self, translation: Translation, device: DeviceMemory, parameters: bytes, grid: Sequence[int], size: int,
        shared: int, *, checks: bool = True, profile: Profile | None = None, only: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.translation, self.kernel, self.size, self.profile = (
            translation,
            translation.kernel,
            size,
            profile,
        )
        grid = (*grid, 1, 1)[:3]
        self.block_numbers = np.arange(int(np.prod(grid))) if only is None else np.asarray(only)
        self.count = len(self.block_numbers)
        self.threads = np.arange(self.count * size, dtype=np.int64)
        self.epoch = np.zeros(self.count, np.int32)  # barriers passed, by block
        self.warp_epoch = np.zeros(len(self.threads) // 32, np.int32)  # barriers of warps passed, by warp
        self.parameter_bytes, self._parameter_start = parameters, device.set_parameters(parameters)
        self._offsets = {p.name: p.offset for p in self.kernel.parameters}
        self.memory = GlobalMemory(device, translation.global_granule, size, checks)
        self.constants = ParameterMemory(device)
        self.shared = SharedMemory(shared, self.count, translation.shared_granule, size, checks)
        self.copies, self.warpgroups = AsyncCopies(len(self.threads)), WarpGroups(len(self.threads))
        self.special = self._special_registers(grid)
        self._reports: dict[tuple[str, int], Report] = {}
        self.visited = np.zeros(len(translation.blocks), bool)
        self.executed = 0
        translation.namespace.update(_OPERATIONS)

    def _special_registers(self, grid) -> dict:
        u4 = np.uint32
        block, inner = (
            np.repeat(self.block_numbers, self.size),
            np.tile(np.arange(self.size, dtype=u4), self.count),
        )
        none, one = np.zeros(len(self.threads), u4), u4(1)
        return {
            "%tid.x": inner, "%tid.y": none, "%tid.z": none, "%ntid.x": u4(self.size), "%ntid.y": one, "%ntid.z": one,
            "%ctaid.x": (block % grid[0]).astype(u4),
            "%ctaid.y": (block // grid[0] % grid[1]).astype(u4),
            "%ctaid.z": (block // grid[0] // grid[1]).astype(u4),
            "%nctaid.x": u4(grid[0]), "%nctaid.y": u4(grid[1]), "%nctaid.z": u4(grid[2]),
        }  # fmt: skip

    @property
    def reports(self) -> list[Report]:
        return list(self._reports.values())

    # called by translated blocks

    def parameter(self, name: str, offset: int, kind):
        start = self._offsets[name] + offset
        return np.frombuffer(self.parameter_bytes[start : start + np.dtype(kind).itemsize], kind)[0]

    def parameter_address(self, name: str):
        return np.uint64(self._parameter_start + self._offsets[name])

    def report(self, what: str, line: int, threads) -> None:
        key = (what.split(":")[0], line)  # what follows a colon differs from time to time
        if key in self._reports:
            return
        instruction = next((i for i in self.kernel.instructions if i.line == line), None)
        source = f"{instruction}; .loc {instruction.source}" if instruction else "the end"
        thread = None
        if threads is not None and len(threads):
            first = int(threads[0])
            thread = int(self.block_numbers[first // self.size]), first % self.size
        self._reports[key] = Report(what, line, source, thread)

    def _check_members(self, members, line: int) -> None:
        if not np.all(np.asarray(members) == _ALL_LANES):
            self.report("an instruction of a warp whose mask is not full", line, None)

    def warp_barrier(self, members, I, line: int) -> None:
        """bar.warp.sync."""
        self._check_members(members, line)
        self.warp_epoch[slice(None) if I is None else np.unique(I // 32)] += 1

    def shuffle(self, mode: str, value, by, clamp, members, line: int):
        """shfl: what the source lane holds, and whether there is one."""
        self._check_members(members, line)
        lanes = value.reshape(-1, 32)
        lane = np.broadcast_to(np.arange(32, dtype=np.int64), lanes.shape)
        by, clamp = (np.broadcast_to(x, value.shape).reshape(-1, 32).astype(np.int64) for x in (by, clamp))
        segment = clamp >> 8 & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        if mode == "idx":
            source = (lane & segment) | (by & 31 & ~segment)
        else:
            source = {"bfly": lane ^ by, "down": lane + by, "up": lane - by}[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        return np.take_along_axis(lanes, source, 1).reshape(-1), inside.reshape(-1)

    def reduce_warp(self, how, value, members, line: int):
        """redux."""
        self._check_members(members, line)
        return np.repeat(how(value.reshape(-1, 32), axis=1).astype(value.dtype), 32)

    # scheduling

    def run(self) -> Launch:
        """Run to the end.

        Raises:
            Deadlock: some threads wait for ever.
        """
        blocks = self.translation.blocks
        total = len(self.threads)
        registers = [
            np.full(total, _UNWRITTEN, np.uint8).astype(DTYPES[kind]) for kind in self.translation.kinds
        ]
        self._waiting: dict[int, list] = {
            0: [None]
        }  # by block the groups that are to run it; None: all threads
        self._heap = [0]
        self._at_barrier: dict[int, list[np.ndarray]] = {}
        self._parked: dict[int, np.ndarray] = {}  # by block the threads of warps that are not complete
        self._arrived = np.zeros(self.count, np.int64)
        self._alive = np.full(self.count, self.size, np.int64)
        with np.errstate(all="ignore"):
            while self._heap:
                number = heapq.heappop(self._heap)
                block, I = blocks[number], self._joined(self._waiting.pop(number))
                if block.together > 1:
                    I = self._whole_groups(block, I)
                    if I is not None and not len(I):
                        continue
                n = total if I is None else len(I)
                condition = block.run(registers, I, n, self)
                self.visited[number] = True
                self.executed += (block.last - block.first) * n
                if self.profile is not None:
                    self.profile.visits[number] += n // 32 if I is None else len(np.unique(I >> 5))
                self._go_on(block, I, condition)
        self._finish()
        return self

    def _finish(self) -> None:
        stuck = [*self._parked, *self._at_barrier]
        if stuck:
            blocks, instructions = self.translation.blocks, self.kernel.instructions
            lines = sorted({instructions[blocks[number].first].line for number in stuck})
            raise Deadlock(f"threads wait for others at line {', '.join(map(str, lines))} of the PTX")
        if self.shared.shadow is not None:
            if self.copies.pending:
                self.report("a cp.async that no thread waits for", 0, None)
            if self.warpgroups.unfinished():
                self.report("a wgmma that no thread waits for", 0, None)
        if self.profile is not None:
            self.profile.finish(self.translation.blocks)

    def _push(self, number: int, I) -> None:
        if I is not None and not len(I):
            return
        if number not in self._waiting:
            heapq.heappush(self._heap, number)
        self._waiting.setdefault(number, []).append(I)

    def _joined(self, groups: list):
        if len(groups) == 1:
            return groups[0]
        joined = np.sort(np.concatenate(groups))
        return None if len(joined) == len(self.threads) else joined

    def _whole_groups(self, block: Block, I):
        """The threads whose warps or warpgroups are complete at a block; the others wait there."""
        parked = self._parked.pop(block.number, None)
        if parked is not None:
            I = np.sort(np.concatenate([I, parked]))
        if I is None:
            return None
        group = I // block.together
        whole = np.bincount(group)[group] == block.together
        if not whole.all():
            self._parked[block.number] = I[~whole]
            I = I[whole]
        return None if len(I) == len(self.threads) else I

    def _go_on(self, block: Block, I, condition) -> None:
        threads = self.threads if I is None else I
        if block.end == "next":
            self._push(block.number + 1, I)
        elif block.end == "branch":
            taken = np.ones(len(threads), bool) if condition is None else condition
            if taken.all():
                self._push(block.target, I)
            elif not taken.any():
                self._push(block.number + 1, I)
            else:
                self._push(block.target, threads[taken])
                self._push(block.number + 1, threads[~taken])
        elif block.end == "return":
            if condition is not None:
                self._push(block.number + 1, threads[~condition])
                threads = threads[condition]
            self._alive -= np.bincount(threads // self.size, minlength=self.count)
            self._release()
        else:
            self._at_barrier.setdefault(block.number, []).append(threads)
            self._arrived += np.bincount(threads // self.size, minlength=self.count)
            self._release()

    def _release(self) -> None:
        """Let the blocks go on of which all threads that are left have come to a barrier."""
        complete = (self._arrived == self._alive) & (self._arrived > 0)
        if not complete.any():
            return
        barriers_of = np.zeros(self.count, np.int64)
        for number in list(self._at_barrier):
            threads = np.sort(np.concatenate(self._at_barrier.pop(number)))
            block = threads // self.size
            free = complete[block]
            if not free.all():
                self._at_barrier[number] = [threads[~free]]
            here = np.unique(block[free])
            barriers_of[here] += 1
            line = self.kernel.instructions[self.translation.blocks[number].last - 1].line
            if (barriers_of[here] > 1).any():
                self.report("threads of a block wait at different barriers", line, threads[free])
            if (self._alive[here] < self.size).any():
                self.report("a barrier that some threads of the block have left behind", line, threads[free])
            self._push(
                number + 1, None if free.all() and len(threads) == len(self.threads) else threads[free]
            )
        self._arrived[complete] = 0
        self.epoch[complete] += 1
