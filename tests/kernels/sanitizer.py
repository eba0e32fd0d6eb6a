"""Memory checks for kernels under triton's interpreter: the bounds of every access, races between programs.

A GPU reports neither: an access past the end of a tensor lands in its neighbour, and a race shows in one run of
many. `interpreter.repair` routes every load, store and atomic through a `Launch`. Each tensor argument gets an
address range of its own there, far from the others, so that a pointer tells which argument it came from.
"""

from __future__ import annotations

import contextlib

import numpy as np

__all__ = ["Launch", "MissingOther", "OutOfBounds", "Race", "SanitizerError", "clear_extents", "extents"]


class SanitizerError(AssertionError):
    """A kernel did what is undefined on a GPU."""


class OutOfBounds(SanitizerError):
    """An address outside every tensor of the launch, outside the declared extents, or misaligned."""


class Race(SanitizerError):
    """An element touched by two programs of a launch, or written twice by one store: the order decides."""


class MissingOther(SanitizerError):
    """A load with lanes masked off and no `other`: those lanes hold anything."""


# Start address of a storage -> (storage, its touchable byte ranges, sorted and disjoint). Holding the storage keeps
# its address from becoming another tensor's while the declaration stands.
_declared: dict[int, tuple[object, np.ndarray]] = {}


class extents(contextlib.AbstractContextManager):
    """Declares which parts of an arena kernels may touch, through whatever view: (first element, count) each.

    Elements count from the tensor's first in memory. The declaration replaces an earlier one of the same storage and
    holds until `clear_extents`, or to the end of a `with` block.
    """

    def __init__(self, tensor, ranges):
        size, origin = tensor.element_size(), tensor.storage_offset()
        merged: list[list[int]] = []
        for first, count in sorted(ranges):
            begin, end = (origin + first) * size, (origin + first + count) * size
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([begin, end])
        storage = tensor.untyped_storage()
        self._key = storage.data_ptr()
        _declared[self._key] = (storage, np.array(merged, np.int64).reshape(-1, 2))

    def __exit__(self, *exception) -> None:
        _declared.pop(self._key, None)


def clear_extents() -> None:
    """Forget every declaration."""
    _declared.clear()


# Argument number k owns the addresses [k << 48, (k + 1) << 48), with its first element in the middle, so that no
# offset in use leaves the range on either side. Number 0 is left to real addresses, which are below 1 << 47.
_REGION_BITS = 48
_MIDDLE = 1 << (_REGION_BITS - 1)
_PAGE = 4096  # alignment up to this is the same as the real address's

_MANY = -1  # the owner of an element that several programs loaded, or updated atomically

# An access of one kind must not meet these of another program.
_CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}
_PAST = {"load": "loaded", "store": "stored", "atomic": "updated atomically"}


class _Storage:
    """Who touched which element of one storage during a launch."""

    def __init__(self, storage, unit: int):
        self.unit = unit
        self.ranges = _declared.get(storage.data_ptr(), (None, None))[1]
        self._count = -(-storage.nbytes() // unit)
        self._owners: dict[str, np.ndarray] = {}  # by kind of access: 0 or the number of a program, from 1

    def conflict(self, kind: str, cells: np.ndarray, program: int):
        """(kind, owners, where they clash) of earlier accesses that `program` must not meet, or None."""
        for earlier in _CONFLICTS[kind]:
            if earlier in self._owners:
                owners = self._owners[earlier][cells]
                clash = (owners != 0) & (owners != program)
                if clash.any():
                    return earlier, owners, clash
        return None

    def record(self, kind: str, cells: np.ndarray, program: int) -> None:
        if kind not in self._owners:
            self._owners[kind] = np.zeros(self._count, np.int32)
        owners = self._owners[kind]
        before = owners[cells]
        owners[cells] = np.where((before == 0) | (before == program), program, _MANY)

    def undeclared(self, begins: np.ndarray, size: int) -> np.ndarray:
        """Which accesses of `size` bytes lie in no declared range."""
        if self.ranges is None:
            return np.zeros(begins.shape, bool)
        if not len(self.ranges):
            return np.ones(begins.shape, bool)
        nearest = np.searchsorted(self.ranges[:, 0], begins, side="right") - 1
        return (nearest < 0) | (begins + size > self.ranges[nearest, 1])


class _Argument:
    """One tensor argument: its own addresses, its extent in memory, its storage's record."""

    def __init__(self, name: str, tensor, number: int, storage: _Storage):
        self.name, self.storage, self.size = name, storage, tensor.element_size()
        self.text = f"{name} (shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')})"
        self.real = tensor.data_ptr()
        self.address = (number << _REGION_BITS) + _MIDDLE + self.real % _PAGE
        self.origin = tensor.storage_offset() * self.size
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.bytes = (last + 1) * self.size if tensor.numel() else 0


class Launch:
    """The memory of one launch of a kernel."""

    def __init__(self, kernel: str, grid: tuple[int, int, int], tensors: dict[str, object]):
        self._kernel, self._grid = kernel, grid
        self._program = (0, 0, 0)
        # Arguments may share a storage; its elements are then counted in the smallest size among them.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
        units = {
            key: min(t.element_size() for t in tensors.values() if t.untyped_storage().data_ptr() == key)
            for key in storages
        }
        records = {key: _Storage(storage, units[key]) for key, storage in storages.items()}
        self._arguments = [
            _Argument(name, tensor, number, records[tensor.untyped_storage().data_ptr()])
            for number, (name, tensor) in enumerate(tensors.items(), start=1)
        ]
        self._addresses = {argument.name: argument.address for argument in self._arguments}

    def address(self, name: str) -> int:
        """The address to hand to the kernel for an argument."""
        return self._addresses[name]

    def enter(self, program: tuple[int, int, int]) -> None:
        """The accesses that follow are this program's."""
        self._program = program

    def where(self) -> str:
        return f"{self._kernel}, program {self._program}"

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int, other_given: bool) -> np.ndarray:
        """Check a load; the real addresses, zero where masked off."""
        if not other_given and not mask.all():
            off = mask.size - int(mask.sum())
            raise MissingOther(
                f"{self.where()}: load with {off} of {mask.size} lanes masked off and no `other`"
            )
        return self._access("load", pointers, mask, size)

    def store(self, pointers: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Check a store; the real addresses, zero where masked off."""
        return self._access("store", pointers, mask, values.itemsize, values)

    def atomic(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """Check an atomic operation; the real addresses, zero where masked off."""
        return self._access("atomic", pointers, mask, size)

    def _access(self, kind, pointers, mask, size, values=None) -> np.ndarray:
        real = np.zeros(pointers.shape, np.uint64)
        active = pointers[mask]
        if active.size:
            values = None if values is None else np.broadcast_to(values, pointers.shape)[mask]
            translated = np.empty_like(active)
            for argument, lanes, offsets in self._resolve(kind, active):
                self._check_bounds(kind, argument, offsets, size)
                cells = self._cells(argument, offsets, size)
                self._check_races(kind, argument, cells)
                if values is not None:
                    self._check_lanes(argument, offsets, values[lanes])
                translated[lanes] = (offsets + argument.real).astype(np.uint64)
            real[mask] = translated
        return real

    def _resolve(self, kind: str, addresses: np.ndarray):
        """(argument, lanes, byte offsets from its first element), for each argument addressed."""
        numbers = (addresses >> np.uint64(_REGION_BITS)).astype(np.int64)
        if (numbers == numbers[0]).all() and 0 < numbers[0] <= len(self._arguments):
            argument = self._arguments[numbers[0] - 1]
            yield argument, slice(None), addresses.astype(np.int64) - argument.address
            return
        result = np.zeros(addresses.shape, bool)
        for number, argument in enumerate(self._arguments, start=1):
            own = numbers == number
            # A pointer that the kernel loaded from memory, as from a table of pointers, is a real address.
            loaded = (numbers == 0) & (addresses.astype(np.int64) - argument.real < argument.bytes)
            loaded &= (addresses.astype(np.int64) >= argument.real) & ~result
            for lanes, base in ((own, argument.address), (loaded, argument.real)):
                if lanes.any():
                    yield argument, lanes, addresses[lanes].astype(np.int64) - base
            result |= own | loaded
        if not result.all():
            raise OutOfBounds(
                f"{self.where()}: {int((~result).sum())} of {result.size} addresses to {kind} are no argument's"
            )

    def _check_bounds(self, kind: str, argument: _Argument, offsets: np.ndarray, size: int) -> None:
        outside = (offsets < 0) | (offsets + size > argument.bytes)
        reasons = (
            (outside, "outside"),
            (argument.storage.undeclared(offsets + argument.origin, size), "outside the declared extents of"),
            ((offsets + argument.real) % size != 0, "misaligned in"),
        )
        for bad, reason in reasons:
            if bad.any():
                elements = offsets[bad] // argument.size
                raise OutOfBounds(
                    f"{self.where()}: {int(bad.sum())} of {bad.size} addresses to {kind} are {reason} "
                    f"{argument.text}: elements {elements.min()} to {elements.max()}"
                )

    @staticmethod
    def _cells(argument: _Argument, offsets: np.ndarray, size: int) -> np.ndarray:
        """The storage's elements that are touched."""
        unit = argument.storage.unit
        first = (offsets + argument.origin) // unit
        if size <= unit:
            return first
        return (first[:, None] + np.arange(size // unit)).ravel()

    def _check_races(self, kind: str, argument: _Argument, cells: np.ndarray) -> None:
        if self._grid == (1, 1, 1):
            return
        program = 1 + int(np.ravel_multi_index(self._program, self._grid))
        conflict = argument.storage.conflict(kind, cells, program)
        if conflict is not None:
            earlier, owners, clash = conflict
            owner, cell = owners[clash][0], cells[clash][0]
            others = "several programs"
            if owner != _MANY:
                others = f"program {tuple(int(i) for i in np.unravel_index(owner - 1, self._grid))}"
            element = (cell * argument.storage.unit - argument.origin) // argument.size
            raise Race(
                f"{self.where()}: {int(clash.sum())} of {clash.size} elements to {kind} were {_PAST[earlier]} by "
                f"{others} in the same launch: {argument.text}, element {element}"
            )
        argument.storage.record(kind, cells, program)

    def _check_lanes(self, argument: _Argument, offsets: np.ndarray, values: np.ndarray) -> None:
        """Lanes of one store may meet at an element only to write the same value."""
        order = np.argsort(offsets, kind="stable")
        bits = values.view(f"u{values.itemsize}")
        offsets, bits = offsets[order], bits[order]
        clash = (offsets[1:] == offsets[:-1]) & (bits[1:] != bits[:-1])
        if clash.any():
            raise Race(
                f"{self.where()}: one store writes {int(clash.sum())} elements of {argument.text} twice, with other "
                f"values: element {offsets[1:][clash][0] // argument.size}"
            )
