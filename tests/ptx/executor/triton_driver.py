"""A triton driver without a GPU: triton compiles for a chip, and launches run the PTX on CPU tensors.

with virtual_device(90) as device:
    kernel[grid](...)            # of CPU tensors
device.reports                   # what the checks found
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from .launching import Recorded, Storages, launch_packed, packed, translated
from .machine import Launch, Report
from .profile import Profile

__all__ = ["Device", "Ran", "virtual_device"]

#: Bytes of shared memory that a block may have, by capability.
_SHARED_MEMORY = {80: 166912, 90: 232448}
_FORMATS = {
    "i1": "b", "i8": "b", "u1": "B", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q",
    "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """One launch."""

    name: str
    ptx: str
    reports: list[Report]
    profile: Profile | None
    executed: int


@dataclass
class Device:
    """A chip of compute capability ``capability`` / 10, and what it ran.

    Attributes:
        contract: products and sums that name no rounding are fused wherever ptxas may.
        profiled: count instructions and traffic. only: numbers of the programs to run; None for all.
        record: takes launches as they were before they ran; None: they are not kept.
        extents: of storages, see :class:`~executor.launching.Storages`.
    """

    capability: int
    contract: bool = False
    profiled: bool = False
    only: Sequence[int] | None = None
    record: list[Recorded] | None = None
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    launches: list[Ran] = field(default_factory=list)

    @property
    def reports(self) -> list[str]:
        return list(dict.fromkeys(f"{ran.name}: {report}" for ran in self.launches for report in ran.reports))

    def launch(self, source, metadata, ptx: str, grid: tuple[int, ...], arguments: tuple) -> Launch:
        translation, storages, values = translated(ptx, self.contract), Storages(self.extents), []
        for name, kind, value in _runtime_arguments(source, arguments):
            if kind[0] == "*":
                values.append(struct.pack("<Q", storages.pointer(value, name)))
            else:
                values.append(struct.pack("<" + _FORMATS[kind], value))
        # triton adds pointers to scratch memory, which no kernel of pcfast uses
        values += [bytes(8)] * (len(translation.kernel.parameters) - len(values))
        profile, threads = Profile() if self.profiled else None, 32 * metadata.num_warps
        parameters = packed(translation.kernel, values)
        machine = launch_packed(
            translation, storages, parameters, grid, threads, metadata.shared, profile=profile, record=self.record,
            only=self.only,
        )  # fmt: skip
        self.launches.append(Ran(metadata.name, ptx, machine.reports, profile, machine.executed))
        return machine


def _runtime_arguments(source, arguments: tuple) -> Iterator[tuple[str, str, object]]:
    """(name, type, value) of the arguments that a compiled kernel is given."""
    for (name, kind), value in zip(source.signature.items(), arguments, strict=True):
        yield from _leaves(name, kind, value)


def _leaves(name: str, kind, value) -> Iterator[tuple[str, str, object]]:
    if isinstance(kind, tuple):
        for j, (inner, item) in enumerate(zip(kind, value, strict=True)):
            yield from _leaves(f"{name}[{j}]", inner, item)
    elif kind != "constexpr":
        yield name, kind, value


_devices: dict[int, Device] = {}  # by capability: triton keeps launchers longer than their driver


class _Utils:
    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.ptx = ""  # of the kernel that is being loaded

    def get_device_properties(self, device):
        return {"max_shared_mem": _SHARED_MEMORY[self._capability], "multiprocessor_count": 4}

    def load_binary(self, name, binary, shared, device):
        return None, self.ptx, 0, 0, 1024  # the launcher gets the text as its function


class _Driver(triton.backends.driver.DriverBase):
    def __init__(self, capability: int) -> None:
        self.capability, self.utils = capability, _Utils(capability)

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return self.capability  # a kernel has copies of its own for each device

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed on the executor")

    def get_device_interface(self):
        raise NotImplementedError("there is no device")

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments):
            _devices[self.capability].launch(source, metadata, function, (x, y, z), arguments)

        return run


_compiling = False  # whether a virtual device is there
_hooked = False


def _leave_machine_code_out() -> None:
    """Have triton's compiler stop at PTX while there is a virtual device: ptxas would take half of the time."""
    global _hooked
    if _hooked:
        return
    _hooked, earlier = True, triton.knobs.runtime.add_stages_inspection_hook

    def hook(*arguments):
        result = None if earlier is None else earlier(*arguments)
        if not arguments:  # triton 3.7 asks what to add to the keys of its two caches
            return tuple(key + "-ptx-alone" * _compiling for key in result or ("", ""))
        if _compiling:
            arguments[1]["cubin"] = lambda source, metadata: b""
        return None

    triton.knobs.runtime.add_stages_inspection_hook = hook


@contextlib.contextmanager
def virtual_device(capability: int, **settings) -> Iterator[Device]:
    """Triton compiles and launches for this device until the end. settings: fields of :class:`Device`.

    Compiled kernels lie in triton's cache without machine code: give it a folder of its own.
    """
    global _compiling
    _leave_machine_code_out()
    driver, knobs = _Driver(capability), triton.knobs.runtime

    def loading(module, function, name, files, hash_):
        driver.utils.ptx = next(
            Path(path).read_text() for path in files.values() if str(path).endswith(".ptx")
        )

    active, load_hook = triton.runtime.driver._active, knobs.kernel_load_start_hook
    triton.runtime.driver.set_active(driver)
    knobs.kernel_load_start_hook, _compiling = loading, True
    _devices[capability] = Device(capability, **settings)
    try:
        yield _devices[capability]
    finally:
        triton.runtime.driver._active = active
        knobs.kernel_load_start_hook, _compiling = load_hook, False
