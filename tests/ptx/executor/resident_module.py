"""The resident CUDA kernel as nvcc compiled it, behind the interface of pcfast's native module."""

from __future__ import annotations

import contextlib
import functools
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pcfast.backends.cuda import launch as loop
from pcfast.backends.cuda import native
from pcfast.backends.cuda.kernel_params import Program, RunParams

from .launching import Recorded, Storages, launch_packed, packed, translated
from .machine import Launch
from .profile import Profile

__all__ = ["ResidentDevice", "compile_resident", "resident_device"]


def compile_resident(csrc: Path, architecture: str, out: Path) -> None:
    """nvcc's PTX of the resident kernel for an architecture like "90a"."""
    nvcc = shutil.which("nvcc")
    command = [nvcc, "-ptx", "-lineinfo", "-std=c++17", "-O3", f"-arch=sm_{architecture}"]
    subprocess.run([*command, "-o", out, csrc / "resident" / "resident.cu"], check=True)


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> str:
    return path.read_text()


@dataclass
class ResidentDevice:
    """Launches of the resident kernel. Fields are those of :class:`~executor.triton_driver.Device`.

    Attributes:
        only: numbers of the thread blocks to run; None for all.
    """

    ptx: str
    contract: bool = False
    profiled: bool = False
    record: list[Recorded] | None = None
    only: Sequence[int] | None = None
    launches: list[Launch] = field(default_factory=list)
    tensors: tuple = ()  # of the launch to come

    @property
    def reports(self) -> list[str]:
        return list(dict.fromkeys(str(report) for machine in self.launches for report in machine.reports))

    def resident(
        self, program: bytes, tensors: bytes, run: bytes, scalar_bytes: int, threads: int, stream
    ) -> int:
        """As the native module's."""
        assert scalar_bytes == 4, "float32 is what nvcc compiles"
        what, how = Program.from_buffer_copy(program), RunParams.from_buffer_copy(run)
        storages = Storages()
        for tensor in self.tensors:
            storages.pointer(tensor, f"a tensor {tuple(tensor.shape)}")
        pointers = struct.unpack(f"<{len(tensors) // 8}Q", tensors)
        there = struct.pack(f"<{len(pointers)}Q", *(p and storages.translate(p) for p in pointers))
        translation, blocks = translated(self.ptx, self.contract), -(-how.batch // what.samples)
        self.launches.append(
            launch_packed(
                translation, storages, packed(translation.kernel, (program, there, run)), (blocks,), threads,
                what.elements * 4, profile=Profile() if self.profiled else None, only=self.only, record=self.record,
            )
        )  # fmt: skip
        return 0


@contextlib.contextmanager
def resident_device(ptx: Path, **settings) -> Iterator[ResidentDevice]:
    """``backend="cuda"`` runs on the executor until the end; the host's module must be the one that is loaded."""
    module, prepare, load = native.load(), loop.prepare, native.load
    device = ResidentDevice(_read(ptx), **settings)

    class Module:
        resident = staticmethod(device.resident)

        def __getattr__(self, name):
            return getattr(module, name)

    def prepared(*arguments, **keywords):
        result, launch = prepare(*arguments, **keywords)

        def launched():
            (device.tensors,) = launch.__defaults__  # the tensors that the launch keeps alive
            launch()

        return result, launched

    fake = Module()
    native.load, loop.prepare = (lambda: fake), prepared
    try:
        yield device
    finally:
        native.load, loop.prepare = load, prepare
