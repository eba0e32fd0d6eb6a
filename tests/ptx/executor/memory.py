"""Global and shared memory with shadows: who wrote and read each word, and in which epoch between barriers.

A word is the smallest access of the kernel. Two threads touch it in order where a barrier of their block lies in
between; threads of different blocks never do, since no kernel of pcfast synchronises its grid. Any other two
accesses of which one is a store are a race, whatever the order in which the executor happened to run them. Atomics
are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["DeviceMemory", "GlobalMemory", "ParameterMemory", "SharedMemory"]

_GUARD = 1 << 12  # bytes between buffers that no access may touch
_PARAMETERS = 1 << 14  # bytes for a launch's parameters, which kernels may address
_BASE = 0x7F00_0000_0000
_FILL = 0xCD  # what memory holds that nothing was written to


class DeviceMemory:
    """Buffers at addresses aligned as CUDA's allocator aligns them, with gaps between them.

    :meth:`build` lays out what was added before it; launches then share the memory.
    """

    def __init__(self) -> None:
        self._end = _GUARD + _PARAMETERS + _GUARD
        self._buffers: list[tuple[int, np.ndarray, str, Sequence[tuple[int, int]]]] = []
        self.data: np.ndarray | None = None
        self.valid: np.ndarray | None = None

    def add(self, array: np.ndarray, name: str, extents: Sequence[tuple[int, int]] | None = None) -> int:
        """Address of a copy of an array's bytes.

        Args:
            extents: (first byte, bytes) of the parts that may be accessed; None for all.
        """
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = -(-self._end // 512) * 512
        self._buffers.append((start, raw, name, [(0, raw.size)] if extents is None else extents))
        self._end = start + raw.size + _GUARD
        return _BASE + start

    def build(self) -> None:
        size = -(-self._end // 4096) * 4096
        self.data, self.valid = np.full(size, _FILL, np.uint8), np.zeros(size, np.bool_)
        for start, raw, _, extents in self._buffers:
            self.data[start : start + raw.size] = raw
            for first, count in extents:
                self.valid[start + first : start + first + count] = True

    def copy(self) -> DeviceMemory:
        """The built memory as it is now."""
        result = DeviceMemory()
        result._buffers, result.data, result.valid = self._buffers, self.data.copy(), self.valid.copy()
        return result

    def set_parameters(self, parameters: bytes) -> int:
        """Address of a launch's parameters."""
        raw = np.frombuffer(parameters, np.uint8)
        self.data[_GUARD : _GUARD + raw.size] = raw
        self.valid[_GUARD : _GUARD + raw.size] = True
        return _BASE + _GUARD

    def read(self, address: int, size: int) -> np.ndarray:
        return self.data[address - _BASE : address - _BASE + size].copy()

    def name_of(self, address: int) -> str:
        for start, raw, name, _ in self._buffers:
            offset = address - _BASE - start
            if -_GUARD // 2 <= offset < raw.size + _GUARD // 2:
                return f"byte {offset} of {name}, {raw.size} bytes"
        return hex(address)


_NOBODY, _SEVERAL = -1, -2
_WARP = 32


@dataclass(frozen=True)
class When:
    """Who accesses and when, (n, 1) each: thread, epochs of its block and of its warp, and its block."""

    thread: np.ndarray
    epoch: np.ndarray
    warp_epoch: np.ndarray
    block: np.ndarray


class Shadow:
    """Of each word the last writer and the last reader with their epochs."""

    def __init__(self, words: int, threads_per_block: int) -> None:
        self.size = threads_per_block
        self.writer = np.full(words, _NOBODY, np.int32)
        self._written_in = np.zeros(words, np.int32)
        self._written_in_warp = np.zeros(words, np.int32)
        self._reader = np.full(words, _NOBODY, np.int32)  # _SEVERAL: threads of one block
        self._reader_warp = np.full(words, _NOBODY, np.int32)  # _SEVERAL: warps
        self._reader_block = np.full(words, _NOBODY, np.int32)  # _SEVERAL: blocks
        self._read_in = np.zeros(words, np.int32)
        self._read_in_warp = np.zeros(words, np.int32)

    def _races_with_store(self, words, now: When) -> np.ndarray:
        writer = self.writer[words]
        # within an epoch of the block a barrier of the warp orders its own threads
        ordered = (writer // _WARP == now.thread // _WARP) & (self._written_in_warp[words] != now.warp_epoch)
        unordered = (self._written_in[words] == now.epoch) & ~ordered
        return (writer >= 0) & (writer != now.thread) & ((writer // self.size != now.block) | unordered)

    def _read_before_in_warp(self, words, now: When) -> np.ndarray:
        """Whether only the warp itself read a word, before its last barrier."""
        own = self._reader_warp[words] == now.thread // _WARP
        return own & (self._read_in_warp[words] != now.warp_epoch)

    def read(self, words, now: When) -> np.ndarray:
        """Note loads; which of them race with an earlier store."""
        races = self._races_with_store(words, now)
        held = self._reader_block[words]
        again = (
            (held == now.block) & (self._read_in[words] == now.epoch) & ~self._read_before_in_warp(words, now)
        )
        warp = now.thread // _WARP
        notes = (
            (self._reader, np.where(again & (self._reader[words] != now.thread), _SEVERAL, now.thread)),
            (self._reader_warp, np.where(again & (self._reader_warp[words] != warp), _SEVERAL, warp)),
            (self._reader_block, np.where((held == _NOBODY) | (held == now.block), now.block, _SEVERAL)),
        )
        self._read_in[words], self._read_in_warp[words] = now.epoch, now.warp_epoch
        for note, wanted in notes:
            note[words] = wanted
            # of several threads that read a word at once the last one's note stands: it says there were others
            others = note[words] != wanted
            if others.any():
                note[words[others]] = _SEVERAL
        return races

    def races_of_store(self, words, now: When) -> tuple[np.ndarray, np.ndarray]:
        """Which stores race with an earlier store, and which with an earlier load."""
        held = self._reader_block[words]
        others = (self._reader[words] != now.thread) & ~self._read_before_in_warp(words, now)
        after_load = (held == now.block) & (self._read_in[words] == now.epoch) & others
        after_load |= (held == _SEVERAL) | ((held >= 0) & (held != now.block))
        return self._races_with_store(words, now), after_load

    def note_store(self, words, now: When) -> None:
        self.writer[words] = now.thread
        self._written_in[words], self._written_in_warp[words] = now.epoch, now.warp_epoch

    def write(self, words, now: When) -> tuple[np.ndarray, np.ndarray]:
        """Note stores; as :meth:`races_of_store`."""
        after_store, after_load = self.races_of_store(words, now)
        self.note_store(words, now)
        # Blocks that run together store in one instruction here; on a GPU one of them comes first.
        return after_store | (self.writer[words] // self.size != now.block), after_load


_ATOMICS = {"min": np.minimum, "max": np.maximum, "add": np.add}


class Memory:
    """What global and shared memory have in common: accesses of threads, each at its own address."""

    name: str
    granule: int
    data: np.ndarray
    shadow: Shadow | None  # None: nothing is checked but the places

    def __init__(self) -> None:
        self._views: dict[np.dtype, np.ndarray] = {}

    def view(self, dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        if dtype not in self._views:
            self._views[dtype] = self.data.view(dtype)
        return self._views[dtype]

    def words(self, byte: np.ndarray, width: int) -> np.ndarray:
        """(n, k) words of the shadow that accesses of ``width`` bytes touch."""
        return (byte // self.granule)[:, None] + np.arange(max(width // self.granule, 1))

    @staticmethod
    def taking_part(M, I, guard) -> tuple[np.ndarray, np.ndarray | None]:
        """Numbers of the threads that take part, and their places among those of the call (None: all)."""
        threads = M.threads if I is None else I
        if guard is None:
            return threads, None
        where = np.flatnonzero(guard)
        return threads[where], where

    @staticmethod
    def when(M, threads) -> When:
        block, thread = (threads // M.size)[:, None], threads[:, None].astype(np.int32)
        return When(thread, M.epoch[block], M.warp_epoch[thread // _WARP], block)

    def place(self, M, address, width, threads, line, what) -> np.ndarray:
        """Offsets in ``data``. Accesses out of bounds or misaligned are reported, and led to a valid place."""
        raise NotImplementedError

    def check_load(self, M, words, threads, line) -> None:
        races = self.shadow.read(words, self.when(M, threads))
        if races.any():
            M.report(f"{self.name} load races with a store", line, threads[races.any(1)])

    def check_store(self, M, words, threads, line) -> None:
        races = self.shadow.write(words, self.when(M, threads))
        for raced, other in zip(races, ("store", "load"), strict=True):
            if raced.any():
                M.report(f"{self.name} store races with an earlier {other}", line, threads[raced.any(1)])

    def load(self, M, address, size, count, guard, I, line) -> list[np.ndarray]:
        """``count`` numbers of ``size`` bytes side by side, zeros where the guard is false."""
        threads, where = self.taking_part(M, I, guard)
        chosen = address if where is None else address[where]
        byte = self.place(M, chosen, size * count, threads, line, "load")
        if self.shadow is not None and len(threads):
            self.check_load(M, self.words(byte, size * count), threads, line)
        found = self.view(f"u{size}")[(byte // size)[:, None] + np.arange(count)]
        if M.profile is not None and len(threads):
            self.count_access(M.profile, "load", threads, chosen, size * count, line)
        if where is None:
            return [np.ascontiguousarray(found[:, j]) for j in range(count)]
        result = np.zeros((count, address.shape[0]), found.dtype)
        result[:, where] = found.T
        return list(result)

    def store(self, M, address, size, values, guard, I, line) -> None:
        threads, where = self.taking_part(M, I, guard)
        if not len(threads):
            return
        chosen, count = address if where is None else address[where], len(values)
        byte = self.place(M, chosen, size * count, threads, line, "store")
        data = np.stack([v if where is None else v[where] for v in values], axis=1)
        index, view = (byte // size)[:, None] + np.arange(count), self.view(f"u{size}")
        if self.shadow is not None:
            self.check_store(M, self.words(byte, size * count), threads, line)
        view[index] = data
        if self.shadow is not None:
            # Triton lets several threads store the same value to one place; only different values are a race.
            differs = (view[index] != data).any(1)
            if differs.any():
                M.report("two threads store different values in one instruction", line, threads[differs])
        if M.profile is not None:
            self.count_access(M.profile, "store", threads, chosen, size * count, line)

    def atomic(self, M, how, address, value, guard, I, line) -> np.ndarray:
        """The old values."""
        threads, where = self.taking_part(M, I, guard)
        result = np.zeros_like(value)
        if not len(threads):
            return result
        chosen, operand = (address, value) if where is None else (address[where], value[where])
        byte = self.place(M, chosen, value.dtype.itemsize, threads, line, "atomic")
        view, index = self.view(value.dtype), byte // value.dtype.itemsize
        old = view[index].copy()
        _ATOMICS[how].at(view, index, operand)
        if where is None:
            return old
        result[where] = old
        return result

    def count_access(self, profile, what, threads, address, width, line) -> None:
        raise NotImplementedError


class GlobalMemory(Memory):
    name = "global"

    def __init__(self, device: DeviceMemory, granule: int, threads_per_block: int, checks: bool) -> None:
        super().__init__()
        self.device, self.granule, self.data = device, granule, device.data
        self.shadow = Shadow(self.data.size // granule, threads_per_block) if checks else None

    def place(self, M, address, width, threads, line, what):
        byte = address.astype(np.int64) - _BASE
        outside = (byte < 0) | (byte > self.data.size - width)
        inside = np.where(outside, 0, byte)
        outside |= ~(self.device.valid[inside] & self.device.valid[inside + width - 1])
        if outside.any():
            at = int(address[np.flatnonzero(outside)[0]])
            M.report(f"global {what} out of bounds: {self.device.name_of(at)}", line, threads[outside])
            byte = np.where(outside, 0, byte)
        misaligned = byte % width != 0
        if misaligned.any():
            M.report(f"global {what} of {width} bytes misaligned", line, threads[misaligned])
            byte = byte - byte % width
        return byte

    def count_access(self, profile, what, threads, address, width, line):
        profile.global_access(what, threads, address.astype(np.int64), width)


class ParameterMemory(GlobalMemory):
    """Parameters by address: nobody writes them, and their loads are no traffic."""

    def __init__(self, device: DeviceMemory) -> None:
        super().__init__(device, 4, 1, checks=False)

    def count_access(self, profile, what, threads, address, width, line):
        pass


class SharedMemory(Memory):
    """The shared memory of all blocks of a launch, one behind the other.

    Attributes:
        arriving: words that cp.async will write. read_by_wgmma: products under way that read a word.
        written_at: when a word was written, in stores counted; by_copy: whether cp.async wrote it.
    """

    name = "shared"

    def __init__(self, size: int, blocks: int, granule: int, threads_per_block: int, checks: bool) -> None:
        super().__init__()
        self.limit, self.granule = size, granule
        self._stride = -(-size // 128) * 128 + 128
        self.data = np.full(self._stride * blocks, _FILL, np.uint8)
        words = self.data.size // granule
        self.shadow = Shadow(words, threads_per_block) if checks else None
        if checks:
            self.arriving = np.zeros(words, np.bool_)
            self.read_by_wgmma = np.zeros(words, np.int16)
            self.written_at = np.zeros(words, np.int64)
            self.by_copy = np.zeros(words, np.bool_)
            self._fenced_at = np.full(threads_per_block * blocks, -1, np.int64)
            self._stores = 0

    def place(self, M, address, width, threads, line, what):
        byte = address.astype(np.int64)
        outside = byte > self.limit - width
        if outside.any():
            M.report(
                f"shared {what} out of bounds: {int(byte.max())} + {width} > {self.limit}",
                line,
                threads[outside],
            )
            byte = np.where(outside, 0, byte)
        misaligned = byte % width != 0
        if misaligned.any():
            M.report(f"shared {what} of {width} bytes misaligned", line, threads[misaligned])
            byte = byte - byte % width
        return byte + (threads // M.size) * np.int64(self._stride)

    def check_load(self, M, words, threads, line):
        arriving = self.arriving[words]
        if arriving.any():
            M.report("shared load of what cp.async has not brought yet", line, threads[arriving.any(1)])
        unwritten = (self.shadow.writer[words] == _NOBODY) & ~arriving
        if unwritten.any():
            M.report("shared load of what nobody wrote", line, threads[unwritten.any(1)])
        super().check_load(M, words, threads, line)

    def check_store(self, M, words, threads, line):
        self.check_free(M, words, threads, line, "shared store")
        super().check_store(M, words, threads, line)
        self.note_written(words, by_copy=False)

    def check_free(self, M, words, threads, line, what: str) -> None:
        """Report writes to what an asynchronous copy writes or an asynchronous product reads."""
        arriving, read = self.arriving[words], self.read_by_wgmma[words] != 0
        if arriving.any():
            M.report(f"{what} to where cp.async writes", line, threads[arriving.any(1)])
        if read.any():
            M.report(f"{what} to what a wgmma still reads", line, threads[read.any(1)])

    def note_written(self, words, by_copy: bool) -> None:
        self._stores += 1
        self.written_at[words] = self._stores
        self.by_copy[words] = by_copy

    def fence_proxy(self, I) -> None:
        """fence.proxy.async: what its threads wrote before may be read by asynchronous products."""
        if self.shadow is not None:
            self._fenced_at[slice(None) if I is None else I] = self._stores

    def check_fenced(self, M, words, threads, line) -> None:
        """Report reads of a wgmma of what no proxy fence of the writing thread stands behind."""
        writer = self.shadow.writer[words]
        late = (writer >= 0) & (self.written_at[words] > self._fenced_at[np.maximum(writer, 0)])
        for by_copy, what in ((False, "st.shared stored"), (True, "cp.async brought")):
            these = late & (self.by_copy[words] == by_copy)
            if these.any():
                M.report(f"wgmma reads what {what} without fence.proxy.async behind it", line, threads[these])

    def count_access(self, profile, what, threads, address, width, line):
        profile.shared_access(what, threads, address.astype(np.int64), width, line)
