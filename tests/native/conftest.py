"""What the tests of the CUDA kernels share: the kernels compiled for the CPU."""

from __future__ import annotations

from pathlib import Path

import native_build
import pytest


@pytest.fixture(scope="session")
def host_module(tmp_path_factory) -> Path:
    return native_build.host_module(tmp_path_factory)
