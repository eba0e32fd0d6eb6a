"""wgmma, the asynchronous product of a warpgroup (sm_90a).

Between its issue and a wait that covers it, its sums and its left operand in registers may not be touched, nor may
what it reads in shared memory be written. Registers written since the last wgmma.fence may not be its operands. The
numbers are computed at its issue: reports come from these rules. PTX ISA, "Asynchronous Warpgroup Level Matrix
Multiply-Accumulate Instructions".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .matrix import GROUP, PAIR, a_fragment, tf32_of
from .numbers import from_bf16

__all__ = ["WarpGroups"]

f4, f8, i8 = np.float32, np.float64, np.int64
_THREADS = 128
# Of a descriptor's swizzle mode: bytes of a row, and the bits of an address that bits 7..9 change.
_SWIZZLES = {1: (128, 0x70), 2: (64, 0x30), 3: (32, 0x10)}


@dataclass
class _Products:
    """One wgmma of some warpgroups. number: of the group it is committed in. words: (groups, n) it reads."""

    groups: np.ndarray
    number: np.ndarray
    words: list[np.ndarray]
    registers: tuple[str, ...]

    def where(self, chosen: np.ndarray) -> _Products:
        words = [w[chosen] for w in self.words]
        return _Products(self.groups[chosen], self.number[chosen], words, self.registers)


class WarpGroups:
    def __init__(self, threads: int) -> None:
        self._count = -(-threads // _THREADS)
        self._committed = np.zeros(self._count, np.int32)
        self._under_way: list[_Products] = []
        self._in_use: dict[str, np.ndarray] = {}  # by register the products under way, by group
        self._unfenced: dict[str, np.ndarray] = {}  # by register the groups that wrote it since their fence

    def _groups(self, I) -> np.ndarray:
        return np.arange(self._count) if I is None else np.unique(I // _THREADS)

    def fence(self, I) -> None:
        who = self._groups(I)
        for marks in self._unfenced.values():
            marks[who] = False

    def commit(self, I) -> None:
        self._committed[self._groups(I)] += 1

    def wait(self, M, most: int, I) -> None:
        """Until at most so many committed groups of the warpgroups are under way."""
        who, kept = self._groups(I), []
        for products in self._under_way:
            mine = np.isin(products.groups, who)
            done = mine & (products.number < self._committed[products.groups] - most)
            if done.any():
                self._complete(M, products.where(done))
            if not done.all():
                kept.append(products.where(~done))
        self._under_way = kept

    def _complete(self, M, products: _Products) -> None:
        for words in products.words:
            np.subtract.at(M.shared.read_by_wgmma, words.reshape(-1), 1)
        for name in products.registers:
            self._in_use[name][products.groups] -= 1

    def unfinished(self) -> bool:
        return bool(self._under_way)

    def touch(self, M, name: str, I, line: int, written: bool = False) -> None:
        """Something other than a wgmma reads or writes a register that one sums in or reads."""
        who = self._groups(I)
        if name in self._in_use and self._in_use[name][who].any():
            M.report(f"{name} is used before the wait for its wgmma", line, None)
        if written:
            self._unfenced.setdefault(name, np.zeros(self._count, bool))[who] = True

    def multiply(
        self, M, shape, kind, sums, left, right, keep, transposed, names, I, line
    ) -> list[np.ndarray]:
        """a b, plus the sums where ``keep``.

        Args:
            left: registers, or descriptors of shared memory as ``right``. names: of registers that it uses.
            transposed: flags of the operands in shared memory; none where they cannot be.
        """
        columns, depth = int(shape[shape.index("n") + 1 : shape.index("k")]), int(shape.split("k")[1])
        threads, who = sums[0].shape[0], self._groups(I)
        groups = threads // _THREADS
        for name in names:
            if name in self._unfenced and self._unfenced[name][who].any():
                M.report(f"wgmma on {name}, written since the last wgmma.fence", line, None)
        in_registers = isinstance(left, tuple)
        flags = [*([0] if in_registers else []), *transposed, 0, 0]
        words = []
        if in_registers:
            a = a_fragment(left, kind, depth).reshape(groups, 64, depth)
        else:
            a, used = self._operand(M, left, 64, depth, kind, flags[0], I, line)
            words.append(used)
        b, used = self._operand(M, right, columns, depth, kind, flags[1], I, line)  # (groups, columns, depth)
        words.append(used)
        product = np.matmul(a.astype(f8), b.astype(f8).transpose(0, 2, 1))  # (groups, 64, columns)
        result, kept = [], np.broadcast_to(keep, (threads,))
        for j, total in enumerate(sums):
            rows = 16 * np.arange(4)[:, None] + GROUP + 8 * (j // 2 % 2)  # (warps, lanes)
            at = np.broadcast_to(8 * (j // 4) + 2 * PAIR + j % 2, rows.shape)
            result.append((product[:, rows, at].reshape(-1) + np.where(kept, total, f4(0))).astype(f4))
        if M.shared.shadow is not None:
            for used in words:
                np.add.at(M.shared.read_by_wgmma, used.reshape(-1), 1)
            for name in names:
                self._in_use.setdefault(name, np.zeros(self._count, np.int16))[who] += 1
            self._under_way.append(_Products(who, self._committed[who].copy(), words, tuple(names)))
        return result

    def _operand(self, M, descriptor, outer: int, depth: int, kind: str, transposed: int, I, line: int):
        """An operand in shared memory as (groups, outer, depth), and the words of the shadow that it lies in."""
        size, shared = (2 if kind == "bf16" else 4), M.shared
        threads = M.threads if I is None else I
        given = descriptor.reshape(-1, _THREADS)
        if (given != given[:, :1]).any():
            M.report("the threads of a warpgroup give different descriptors", line, None)
        given = given[:, 0]
        mode = int(given[0] >> np.uint64(62))
        if ((given >> np.uint64(62)) != mode).any() or ((given >> np.uint64(49)) & np.uint64(7)).any():
            raise NotImplementedError("warpgroups of different swizzles, or a descriptor with a base offset")
        if transposed and size != 2:
            M.report("wgmma on a transposed operand of 32 bits", line, None)
        address = _addresses(given, outer, depth, size, mode, transposed)
        flat = address.reshape(len(given), -1)
        who = np.repeat(threads.reshape(-1, _THREADS)[:, 0], flat.shape[1])
        byte = shared.place(M, flat.reshape(-1), size, who, line, "wgmma")
        words = byte // shared.granule
        if shared.shadow is not None:
            shared.check_load(M, words[:, None], who, line)
            shared.check_fenced(M, words, who, line)
        bits = shared.view(f"u{size}")[byte // size]
        values = from_bf16(bits) if kind == "bf16" else tf32_of(bits)
        return values.reshape(len(given), outer, depth), words.reshape(len(given), -1)


def _addresses(descriptor, outer: int, depth: int, size: int, mode: int, transposed: int) -> np.ndarray:
    """(groups, outer, depth) bytes in shared memory. PTX ISA, "Shared Memory Matrix Layout"."""

    def field(shift: int) -> np.ndarray:
        return ((descriptor >> np.uint64(shift) & np.uint64(0x3FFF)).astype(i8) << 4)[:, None, None]

    start, leading, stride = field(0), field(16), field(32)
    o, k = np.arange(outer)[:, None], np.arange(depth)[None, :]
    if not transposed:
        byte = k * size
        if mode:
            offset = (o // 8) * stride + (o % 8) * _SWIZZLES[mode][0] + byte
        else:
            offset = (o // 8) * stride + (byte // 16) * leading + (o % 8) * 16 + byte % 16
    elif mode:
        row = _SWIZZLES[mode][0]
        of_row = row // size
        offset = (o % of_row) * size + (o // of_row) * leading + (k % 8) * row + (k // 8) * stride
    else:
        offset = (o // 8) * stride + (o % 8) * size + (k % 8) * 16 + (k // 8) * leading
    address = start + offset
    return address ^ ((address >> 3) & _SWIZZLES[mode][1]) if mode else address
