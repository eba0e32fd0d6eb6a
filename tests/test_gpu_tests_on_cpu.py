"""tests/gpu with CUDA faked (tests/gpu/fake_cuda.py): what is wrong in the tests themselves shows without a GPU.

Each run is a process of its own, since the fake holds for a process; triton's interpreter does, too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS / "native"))

import native_build  # noqa: E402


def run(names: list[str], selected: str, **environment: str) -> tuple[dict[str, int], str]:
    """Outcome -> how many tests of files of tests/gpu; what pytest said."""
    paths = [TESTS, TESTS / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PCFAST_FAKE_CUDA": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, paths))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        *(TESTS / "gpu" / f"test_{name}_cuda.py" for name in names),
        "-k",
        selected,
        "-q",
        "--tb=short",
        "-rs",
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist"], env={**os.environ, **environment},
        cwd=TESTS.parent, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    counts = re.findall(
        r"(\d+) (passed|skipped|failed|error)", done.stdout.rpartition("\n= ")[2] or done.stdout
    )
    result = {outcome: int(count) for count, outcome in counts}
    assert done.returncode == 0, done.stdout + done.stderr
    return result, done.stdout


def reasons(said: str) -> set[str]:
    return set(re.findall(r"with CUDA faked: (.*)", said))


def test_eagers():
    slow = "float64_plain or (float32_plain and fixed)"  # as others
    result, said = run(["eager"], f"not ({slow})")
    assert result == {"passed": 28, "skipped": 3}
    assert reasons(said) == {
        "a graph that the caller captures needs a device",
        "it is torch's capture that fails",
        "streams need a device",
    }


@native_build.needs_gcc
def test_the_resident_kernels(tmp_path_factory):
    module = native_build.host_module(tmp_path_factory)
    selected = (
        "mlp and not mlp_128 and (does_not_depend or one_step or deferred or inputs_that or another_stream or "
        "never_waits) or batch_of_one or what_the_kernel or what_was_fastest"
    )
    result, said = run(["kernels", "resident", "auto"], selected, PCFAST_CUDA_ON_HOST=str(module))
    assert result == {"passed": 15, "skipped": 7}
    assert reasons(said) == {
        "streams need a device",
        "the CPU has no TF32, of which the bounds are made",
        "the kernel's build for the CPU can do more",
    }


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_streamed_kernels():
    ours = "one_launch and (one_step or does_not_depend and ieee-False) or refused"
    selected = f"{ours} or two_to_the_31 or where_tiles_grow"
    result, said = run(["kernels", "triton"], selected, TRITON_INTERPRET="1")
    assert result == {"passed": 3, "skipped": 2}
    assert reasons(said) == {"it takes a GPU's memory or speed"}
