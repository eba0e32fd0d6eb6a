"""cp.async. What a copy brings arrives at the wait of the thread that asked for it, and not before."""

from __future__ import annotations

import numpy as np

__all__ = ["AsyncCopies"]


class AsyncCopies:
    def __init__(self, threads: int) -> None:
        self._committed = np.zeros(threads, np.int32)  # groups, by thread
        # (threads, their group, first byte in shared memory, data (n, size))
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def start(self, M, to, of, size, given, guard, I, line) -> None:
        """Copies of ``size`` bytes, of which only the first ``given`` are read; the others become zeros."""
        shared = M.shared
        threads, where = shared.taking_part(M, I, guard)
        if not len(threads):
            return
        if where is not None:
            to, of = to[where], of[where]
            given = None if given is None else given[where]
        byte = shared.place(M, to, size, threads, line, "cp.async")
        data = np.zeros((len(threads), size), np.uint8)
        reading = np.arange(len(threads)) if given is None else np.flatnonzero(given)
        if len(reading):
            unit = min(size, 8)
            result = M.memory.load(M, of[reading], unit, size // unit, None, threads[reading], line)
            data[reading] = np.stack(result, 1).view(np.uint8)
            if given is not None:
                data[np.arange(size)[None, :] >= given[:, None]] = 0
        if shared.shadow is not None:
            words = shared.words(byte, size)
            shared.check_free(M, words, threads, line, "cp.async")
            races = shared.shadow.races_of_store(words, shared.when(M, threads))
            for raced, other in zip(races, ("store", "load"), strict=True):
                if raced.any():
                    M.report(f"cp.async races with an earlier {other}", line, threads[raced.any(1)])
            shared.arriving[words] = True
        if M.profile is not None:
            shared.count_access(M.profile, "cp.async", threads, to, size, line)
        self.pending.append((threads, self._committed[threads].copy(), byte, data))

    def commit(self, I) -> None:
        self._committed[slice(None) if I is None else I] += 1

    def wait(self, M, most: int, I) -> None:
        """Until at most so many groups of the threads have not arrived."""
        arriving_below = np.full(self._committed.shape, -1, np.int32)
        who = slice(None) if I is None else I
        arriving_below[who] = self._committed[who] - most
        kept = []
        for threads, group, byte, data in self.pending:
            done = group < arriving_below[threads]
            if done.any():
                self._arrive(M, threads[done], byte[done], data[done])
            if not done.all():
                kept.append((threads[~done], group[~done], byte[~done], data[~done]))
        self.pending = kept

    @staticmethod
    def _arrive(M, threads, byte, data) -> None:
        shared, size = M.shared, data.shape[1]
        unit = min(size, 8)
        numbers = np.ascontiguousarray(data).view(f"u{unit}")
        shared.view(f"u{unit}")[(byte // unit)[:, None] + np.arange(size // unit)] = numbers
        if shared.shadow is not None:
            words = shared.words(byte, size)
            shared.arriving[words] = False
            shared.shadow.note_store(words, shared.when(M, threads))
            shared.note_written(words, by_copy=True)
