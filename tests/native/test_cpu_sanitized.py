"""The CPU kernels under ThreadSanitizer and AddressSanitizer, on C++'s threads; planted bugs are found."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from native_build import CSRC, once, shared_folder

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

#: What the environment variable PLANTED switches on. name -> (file, what stands there, what takes its place)
BUGS = {
    "a term too many": (
        "product.h",
        "  for (int k = 0; k < terms; ++k) {\n    tile.add(",
        "  for (int k = 0; k < terms + planted(1); ++k) {\n    tile.add(",
    ),
    "one memory for all threads": (
        "kernels.cpp",
        "Arena arena{thread_memory_ + thread * thread_bytes_};",
        "Arena arena{thread_memory_ + thread * thread_bytes_ * !planted(2)};",
    ),
}
CHOICE = '#include <cstdlib>\ninline int planted(char bug) {\n  static const char* chosen = std::getenv("PLANTED");\n'
CHOICE += "  return chosen != nullptr && *chosen == '0' + bug;\n}\n"
SANITIZERS = {"thread": "thread", "address": "address,alignment"}


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Callable[[str], Path]:
    """A function that compiles host/cpu.cpp and the kernels, for the baseline, with bugs to choose from."""
    base = shared_folder(tmp_path_factory, "cpu_sanitized")

    def compiled(sanitizer: str) -> Path:
        folder = base / sanitizer
        folder.mkdir(exist_ok=True)

        def make() -> None:
            shutil.copytree(CSRC / "cpu", folder / "cpu", dirs_exist_ok=True)
            shutil.copy(CSRC / "codes.h", folder)
            for file, old, new in BUGS.values():
                text = (folder / "cpu" / file).read_text()
                assert text.count(old) == 1, (file, old)
                (folder / "cpu" / file).write_text(text.replace(old, new))
            vector = folder / "cpu" / "vector.h"
            vector.write_text(vector.read_text().replace("#pragma once\n", f"#pragma once\n{CHOICE}"))
            sources = [folder / "cpu" / name for name in ("kernels.cpp", "parallel.cpp", "workspace.cpp")]
            command = [
                "g++", "-std=c++17", "-O1", "-pthread", "-Wno-psabi", "-fno-sanitize-recover=all",
                f"-fsanitize={SANITIZERS[sanitizer]}", "-DPCFAST_ISA=checked", "-DPCFAST_CPU_STD_THREADS",
                f"-I{folder}", Path(__file__).parent / "host" / "cpu.cpp", *sources, "-o", folder / "run",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        return once(folder / "run", make)

    return compiled


def run(path: Path, bug: str = "") -> tuple[int, str]:
    environment = os.environ | {"PLANTED": bug, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([path], capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_are_clean_and_threads_change_no_bit(sanitizer, program):
    assert run(program(sanitizer)) == (0, "")


@pytest.mark.parametrize(
    ("sanitizer", "bug", "words"), [("address", "1", "use-after-poison"), ("thread", "2", "data race")]
)
def test_a_planted_bug_is_reported(sanitizer, bug, words, program):
    status, said = run(program(sanitizer), bug)
    assert status != 0 and words in said and "pcfast::cpu::checked" in said
