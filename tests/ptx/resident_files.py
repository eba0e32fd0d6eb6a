"""What the scripts of this folder need of the resident kernel, built in a folder of theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from executor.resident_module import compile_resident
from native_build import CSRC, SUFFIX, build

from pcfast.backends.cuda import native

__all__ = ["resident_files"]


@contextlib.contextmanager
def resident_files(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Gives the path of the kernel's PTX for an architecture like "90a".

    Until the end the native module is the host's, and triton's cache lies here.
    """
    build(folder / "host", "PCFAST_HOST=ON")
    before = {name: os.environ.get(name) for name in (native.ON_HOST, "TRITON_CACHE_DIR")}
    os.environ[native.ON_HOST] = str(folder / "host" / f"_native_host{SUFFIX}")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")

    def of(architecture: str) -> Path:
        path = folder / f"{architecture}.ptx"
        if not path.exists():
            compile_resident(CSRC, architecture, path)
        return path

    try:
        yield of
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
