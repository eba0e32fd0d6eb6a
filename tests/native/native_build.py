"""Building csrc/ with CMake or g++, once for all of a test run's workers."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from installing import ROOT

CSRC = ROOT / "csrc"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def builds_here() -> bool:
    """Whether the kernels can be compiled for this CPU."""
    return shutil.which("g++") is not None and platform.machine() == "x86_64"


needs_gcc = pytest.mark.skipif(
    not builds_here(), reason="no g++, or not x86-64, whose assembly switches the fibers"
)


def tool(name: str) -> str:
    """Of this environment, in which pcfast's test extra has it, else on PATH."""
    result = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert result is not None, f"{name} is missing: pip install -e '.[test]'"
    return result


def configure(folder: Path, *definitions: str) -> subprocess.CompletedProcess:
    import pybind11

    command = [
        tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    command += [f"-D{definition}" for definition in definitions]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def build(folder: Path, *definitions: str) -> None:
    """Configure and compile."""
    done = configure(folder, *definitions)
    assert done.returncode == 0, done.stderr
    built = subprocess.run([tool("ninja"), "-C", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of this run have in common."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def once(target: Path, make: Callable[[], None]) -> Path:
    """``target``, which ``make`` makes for the worker that comes first; the others wait."""
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            make()
    return target


def host_module(factory: pytest.TempPathFactory) -> Path:
    """A built _native_host: the kernels compiled for the CPU."""
    folder = shared_folder(factory, "host_module")
    return once(folder / f"_native_host{SUFFIX}", lambda: build(folder, "PCFAST_HOST=ON"))
