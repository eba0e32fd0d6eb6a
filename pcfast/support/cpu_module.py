"""The one place that loads native code for CPUs: pcfast._cpu, compiled from csrc/cpu/ where there is a C++ compiler.

Its threads are OpenMP's. The module names no runtime: two of them in one process would have twice as many threads as
cores, whose waiting costs several times the step. So the runtime that torch has loaded is made visible first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
from pathlib import Path
from types import ModuleType

import torch

from ..errors import BackendError

#: kAbiVersion of csrc/cpu/module.cpp.
ABI_VERSION = 6

_MODULE = "pcfast._cpu"
_REINSTALL = "install pcfast again, from the same sources (in a checkout: make native)"
# GCC's, Intel's and LLVM's; wheels carry them under names with a hash
_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b.*\.so")


def load() -> ModuleType:
    """Loads the module.

    Raises:
        BackendError: it is missing or unusable; the message says why, and what to do.
    """
    module, reason = _find()
    if module is None:
        raise BackendError(reason)
    return module


def load_error() -> str:
    """Returns why `load` would raise; "" where it would not."""
    return _find()[1]


@functools.cache
def openmp_runtime() -> str:
    """Returns the path of the OpenMP runtime that this process has loaded, torch's own first; "" where none is."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    paths = dict.fromkeys(path for line in mapped if _RUNTIME.match(Path(path := line[73:]).name))
    beside_torch = str(Path(torch.__file__).parent)
    return next((path for path in paths if path.startswith(beside_torch)), next(iter(paths), ""))


@functools.cache
def gemm(dtype: torch.dtype) -> int:
    """Returns the address of sgemm or dgemm (Fortran's interface) of torch's BLAS; 0 where it is not exported."""
    name = {torch.float32: "sgemm_", torch.float64: "dgemm_"}[dtype]
    for path in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value or 0
    return 0


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """Returns the module, or None and why not."""
    try:
        if runtime := openmp_runtime():
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            return None, f"the CPU kernels cannot be loaded: {error}; {_REINSTALL}"
        return None, (
            "the CPU kernels are not compiled: pcfast was installed without a C++ compiler, or with PCFAST_NATIVE=0. "
            f"Install one (g++, or clang++), and {_REINSTALL}"
        )
    except (ImportError, OSError) as error:  # dlopen's reason
        return None, f"the CPU kernels cannot be loaded: {error}; {_REINSTALL}"
    version = module.abi_version() if hasattr(module, "abi_version") else "none"
    if version != ABI_VERSION:
        return None, (
            f"the module of the CPU kernels was built from other sources: its interface has version {version}, this "
            f"pcfast needs {ABI_VERSION}; {_REINSTALL}"
        )
    return module, ""
