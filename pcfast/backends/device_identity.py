"""What a qualification and a measured choice are good for: a device, the programs that run it, the kernels' code."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .._version import __version__
from ..support.files import json_text
from .chips import device_key
from .cuda import native
from .triton import config_cache

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class DeviceIdentity:
    """A device and what runs on it.

    Attributes:
        device: name of the GPU; "cpu" where kernels are interpreted or compiled for tests. capability: "9.0" or "".
        driver: its release, else the CUDA release that it supports.
        torch, triton, pcfast: their releases; "" where triton is missing.
        sources: digest of the Triton kernels and of the Python that launches kernels.
        module: digest of the compiled CUDA kernels; "" where there are none.
    """

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    sources: str
    module: str
    pcfast: str

    def file_name(self, what: str) -> str:
        """Of the file that holds ``what`` about this device."""
        place = re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.device} {self.capability}").strip("-").lower()
        digest = hashlib.sha256(json_text(asdict(self)).encode()).hexdigest()
        return f"{what}_{place}_{digest[:16]}.json"


def identity_of(device: torch.device) -> DeviceIdentity:
    """Of ``device`` with what this process runs on it."""
    return _identity(*device_key(device), str(native.module_path() or ""))


@functools.lru_cache(maxsize=64)
def _identity(kind: str, index: int | None, module: str) -> DeviceIdentity:
    name, capability, driver = "cpu", "", ""
    if kind == "cuda":
        name = torch.cuda.get_device_name(index)
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        driver = _driver()
    digest = hashlib.sha256(Path(module).read_bytes()).hexdigest() if module else ""
    return DeviceIdentity(
        name, capability, driver, str(torch.__version__), _triton(), _sources(), digest, __version__
    )


def _driver() -> str:
    try:
        release = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())
    except OSError:
        release = None
    return release[0] if release else f"CUDA {torch._C._cuda_getDriverVersion()}"


def _triton() -> str:
    try:
        import triton  # here: pcfast imports without it
    except Exception:  # it breaks in many ways; the triton backend says how
        return ""
    return triton.__version__


@functools.lru_cache(maxsize=1)
def _sources() -> str:
    digest = hashlib.sha256(config_cache.sources_digest().encode())
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
