"""Where nvcc is. setup.py runs this file by its path, before pcfast can be imported: it imports nothing of it."""

from __future__ import annotations

import os
import shutil


def find_nvcc() -> str | None:
    """By the environment variables CUDACXX, CUDA_HOME or CUDA_PATH, else on PATH; None where there is none."""
    if named := os.environ.get("CUDACXX"):
        return named  # who runs it says what is wrong with it
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (folder := os.environ.get(variable)) and (result := shutil.which("nvcc", path=f"{folder}/bin")):
            return result
    return shutil.which("nvcc")
