"""What the tests of compiled kernels share: a cache of triton's for PTX alone, and the resident kernel's PTX."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("native", "kernels")]

# triton interprets kernels in this process, or compiles them
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if _INTERPRETED else []


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """What triton compiles here has no machine code: no other test may find it."""
    from native_build import shared_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(shared_folder(tmp_path_factory, "ptx_cache")))
        yield


@pytest.fixture(scope="session")
def host_module(tmp_path_factory) -> Path:
    """The native module on the CPU, whose interface the executor's takes."""
    import native_build

    return native_build.host_module(tmp_path_factory)


@pytest.fixture(scope="session")
def resident_ptx(tmp_path_factory):
    """Of an architecture like "90a" the resident kernel's PTX."""
    from executor.resident_module import compile_resident
    from native_build import CSRC, once, shared_folder

    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    folder = shared_folder(tmp_path_factory, "resident_ptx")

    def of(architecture: str) -> Path:
        path = folder / f"{architecture}.ptx"
        return once(path, lambda: compile_resident(CSRC, architecture, path))

    return of
