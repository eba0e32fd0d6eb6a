"""What the tests of the CUDA kernels share: the kernels compiled for the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_build import SUFFIX, build, once, shared_folder


@pytest.fixture(scope="session")
def host_module(tmp_path_factory) -> Path:
    """A built _native_host."""
    folder = shared_folder(tmp_path_factory, "host_module")
    return once(folder / f"_native_host{SUFFIX}", lambda: build(folder, "PCFAST_HOST=ON"))
