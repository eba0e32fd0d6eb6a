"""CPU tensors in device memory, and a translated kernel launched on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .machine import Launch
from .memory import DeviceMemory
from .parser import Kernel, parse
from .translate import Translation, translate

__all__ = ["Recorded", "Storages", "launch_packed", "packed", "translated"]


@functools.lru_cache(maxsize=256)
def translated(ptx: str, contract: bool = False) -> Translation:
    """The only kernel of a module."""
    (kernel,) = parse(ptx).values()
    return translate(kernel, contract)


class Storages:
    """Copies of whole storages, so that views of one share it.

    Args:
        extents: by a storage's address (first byte, bytes) of the parts of it that kernels may access.
    """

    def __init__(self, extents: dict[int, list[tuple[int, int]]] | None = None) -> None:
        self.device = DeviceMemory()
        self._extents = extents or {}
        self._copies: dict[int, tuple[int, torch.Tensor]] = {}  # by address here: address there, the bytes

    def pointer(self, tensor: torch.Tensor | None, name: str) -> int:
        """Address in device memory of a tensor's first element."""
        if tensor is None or tensor.untyped_storage().nbytes() == 0:
            return 0
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._copies:
            whole = torch.tensor([], dtype=torch.uint8).set_(storage)
            self._copies[key] = self.device.add(whole.numpy(), name, self._extents.get(key)), whole
        return self._copies[key][0] + tensor.data_ptr() - key

    def translate(self, address: int) -> int:
        """Address in device memory of one inside a storage that is known."""
        for key, (there, whole) in self._copies.items():
            if key <= address < key + whole.numel():
                return there + address - key
        raise ValueError(f"{address:#x} lies in no tensor of the launch")

    def write_back(self) -> None:
        for address, whole in self._copies.values():
            whole.copy_(torch.from_numpy(self.device.read(address, whole.numel())))


def packed(kernel: Kernel, values: Sequence[bytes]) -> bytes:
    """A launch's parameters from the bytes of each."""
    last = kernel.parameters[-1]
    result = bytearray(last.offset + last.size)
    for parameter, value in zip(kernel.parameters, values, strict=True):
        result[parameter.offset : parameter.offset + parameter.size] = value.ljust(parameter.size, b"\0")
    return bytes(result)


@dataclass(frozen=True)
class Recorded:
    """A launch as it was before it ran, to be run again, changed."""

    translation: Translation
    device: DeviceMemory
    parameters: bytes
    grid: tuple[int, ...]
    size: int
    shared: int

    def run(self, translation: Translation | None = None, **options) -> Launch:
        """Run it, or another translation in its place, on a copy of the memory."""
        arguments = self.device.copy(), self.parameters, self.grid, self.size, self.shared
        return Launch(translation or self.translation, *arguments, **options).run()


def launch_packed(
    translation: Translation, storages: Storages, parameters: bytes, grid, size, shared, *,
    record: list[Recorded] | None = None, **options,
) -> Launch:  # fmt: skip
    """Run a launch, and copy back what it wrote.

    Args:
        record: takes the launch as it was before. options: keywords of :class:`Launch`.
    """
    storages.device.build()
    if record is not None:
        record.append(Recorded(translation, storages.device.copy(), parameters, tuple(grid), size, shared))
    machine = Launch(translation, storages.device, parameters, grid, size, shared, **options).run()
    storages.write_back()
    return machine
