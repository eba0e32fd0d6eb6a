"""The one place that loads the CUDA kernels: pcfast._native, compiled from csrc/ where there is nvcc.

Nothing is loaded before it is asked for. The answer, a module or why there is none, holds for the process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ...errors import BackendError

#: PCFAST_ABI_VERSION of csrc/abi.h.
ABI_VERSION = 3
#: Names a built _native_host, whose kernels run on the CPU, to be loaded instead: for tests.
ON_HOST = "PCFAST_CUDA_ON_HOST"

_MODULE = "pcfast._native"
_REINSTALL = "install pcfast again, from the same sources (in a checkout: pip install -e .)"

_INSUFFICIENT_DRIVER, _NO_DEVICE = 35, 100  # cudaError_t


@dataclass(frozen=True)
class Probe:
    """What the native module finds. Versions are like "13.0".

    Attributes:
        driver_version: the newest CUDA that the driver supports; None without a driver.
        runtime_version: of CUDA that the module was built with; None for the CPU's.
        device_count: of NVIDIA GPUs.
        architectures: nvcc's names of what is compiled in, "sm_90a" for one chip, "compute_90" for all later ones.
        reason: why no device can be used, and the remedy; "" where one can.
    """

    driver_version: str | None
    runtime_version: str | None
    device_count: int
    architectures: tuple[str, ...]
    reason: str


def load() -> ModuleType:
    """Loads the native module.

    Raises:
        BackendError: it is missing or unusable; the message says why, and what to do.
    """
    module, reason = _find(os.environ.get(ON_HOST, ""))
    if module is None:
        raise BackendError(reason)
    return module


def load_error() -> str:
    """Returns why `load` would raise; "" where it would not."""
    return _find(os.environ.get(ON_HOST, ""))[1]


def on_host() -> bool:
    """Returns whether a build for the CPU was asked for."""
    return bool(os.environ.get(ON_HOST))


def module_path() -> Path | None:
    """The file of the module; None where it cannot be loaded."""
    module, _ = _find(os.environ.get(ON_HOST, ""))
    return None if module is None else Path(module.__file__)


def probe() -> Probe:
    """Asks for driver, runtime and GPUs, and why none can be used. Creates no context on a GPU.

    Raises:
        BackendError: see `load`.
    """
    module = load()
    architectures = tuple(module.architectures().split())
    if on_host():
        return Probe(None, None, 0, architectures, "the kernels are compiled for the CPU")
    _, driver = module.driver_version()
    _, runtime = module.runtime_version()
    status, count = module.device_count()
    if status:
        reason = _explain(status, module.error_text(status), driver, runtime)
    else:
        answers = [module.device_capability(device) for device in range(count)]
        reason = _no_code(architectures, [(major, minor) for failed, major, minor in answers if not failed])
    return Probe(_version(driver), _version(runtime), count, architectures, reason)


@functools.lru_cache(maxsize=8)
def _find(host: str) -> tuple[ModuleType | None, str]:
    """Returns the module, or None and why not.

    Args:
        host: the path of a build for the CPU, or "".
    """
    try:
        module = _load_file(host) if host else importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            return None, f"the CUDA kernels cannot be loaded: {error}; {_REINSTALL}"
        return None, (
            "the CUDA kernels are not compiled: pcfast was installed without nvcc, or with PCFAST_NATIVE=0. Install "
            "the CUDA toolkit, with nvcc on PATH, and " + _REINSTALL
        )
    except ImportError as error:  # dlopen's reason
        if host:
            return None, f"{ON_HOST}={host} cannot be loaded: {error}; name a built _native_host module"
        return None, f"the CUDA kernels cannot be loaded: {error}; {_REINSTALL}"
    version = module.abi_version() if hasattr(module, "abi_version") else "none"
    if version != ABI_VERSION:
        name = f"{ON_HOST}={host}" if host else "the module of the CUDA kernels"
        remedy = "build it again" if host else _REINSTALL
        return None, (
            f"{name} was built from other sources: its interface has version {version}, this pcfast needs "
            f"{ABI_VERSION}; {remedy}"
        )
    return module, ""


def _load_file(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ImportError("there is no such file")
    loader = importlib.machinery.ExtensionFileLoader("pcfast._native_host", path)
    spec = importlib.util.spec_from_file_location("pcfast._native_host", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _explain(status: int, text: str, driver: int, runtime: int) -> str:
    """Returns why the count of devices failed, and what to do."""
    if status == _INSUFFICIENT_DRIVER and not driver:
        return "no NVIDIA driver was found: install it; in a container, make the host's visible (docker: --gpus all)"
    if status == _INSUFFICIENT_DRIVER:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, the kernels need "
            f"{_version(runtime)}; update it, or compile pcfast with an older CUDA toolkit"
        )
    if status == _NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "the driver finds no GPU" + ("" if visible is None else f": CUDA_VISIBLE_DEVICES={visible!r}")
    return f"CUDA error {status}: {text}"


def _no_code(architectures: Sequence[str], capabilities: Sequence[tuple[int, int]]) -> str:
    """Returns why none of the GPUs can run what is compiled in; "" where one can."""
    if any(_runs_on(name, capability) for name in architectures for capability in capabilities):
        return ""
    here = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities))) or "unknown"
    return (
        f"the kernels are compiled for {', '.join(architectures)}, the compute capability here is {here}; they need "
        "8.0 or newer. Where it is, install pcfast again with PCFAST_CUDA_ARCHITECTURES unset"
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    kind, major, minor, only = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture).groups()
    compiled = int(major), int(minor)
    if only == "a":
        return capability == compiled
    if kind == "compute" and not only:
        return capability >= compiled
    return capability[0] == compiled[0] and capability[1] >= compiled[1]
