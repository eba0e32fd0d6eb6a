"""Installing pcfast from a copy of its sources into an environment of its own, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (
    "pcfast", "kernels", "bench", "csrc", "CMakeLists.txt", "MANIFEST.in", "setup.py", "pyproject.toml", "LICENSE",
    "README.md",
)  # fmt: skip
# No network, no build environment of its own, nothing but pcfast itself.
PIP_OPTIONS = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")


@dataclass(frozen=True)
class Installation:
    """A virtual environment with pcfast in it, and the copy of the sources that it was installed from."""

    python: Path
    source: Path

    def run(self, code: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
        """``python -c code`` with ``folder`` as the working directory, which -c puts on the module path."""
        return run_python(self.python, code, folder, *options)

    def output(self, code: str, folder: Path, *options: str) -> list[str]:
        done = self.run(code, folder, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


def run_python(python: str | Path, code: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [python, *options, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def copy_sources(folder: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_pip(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, python: str | Path = sys.executable
) -> subprocess.CompletedProcess:
    """``environment`` is added to this process's."""
    return subprocess.run(
        [python, "-m", "pip", arguments[0], *PIP_OPTIONS, *arguments[1:]],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build_wheel(source: Path, target: Path, environment: Mapping[str, str] | None = None) -> Path:
    built = run_pip("wheel", "--quiet", "--wheel-dir", target, source, environment=environment)
    assert built.returncode == 0, built.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


def install(
    folder: Path, source: Path, *what: str, environment: Mapping[str, str] | None = None
) -> Installation:
    """A virtual environment in ``folder`` with pcfast in it; torch, pip and setuptools are this one's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, capture_output=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A plain path line adds the folder, but not the .pth files in it: a pcfast that is installed editable
    # here stays out of reach.
    parents = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "parents.pth").write_text("\n".join(parents) + "\n")
    done = run_pip("install", "--quiet", "--ignore-installed", *what, environment=environment, python=python)
    assert done.returncode == 0, done.stderr
    return Installation(python, source)
