"""Package mapping of pcfast, and its kernels; everything else about the package stands in pyproject.toml.

The CPU kernels are compiled where there is a C++ compiler: by the environment variable CXX, or on PATH. The CUDA
kernels are where nvcc is found: by CUDACXX or CUDA_HOME, or on PATH. PCFAST_NATIVE=0 leaves both out;
PCFAST_CUDA_ARCHITECTURES names the chips to compile for (CMakeLists.txt); CMAKE_ARGS has more options of cmake. In a
checkout, `python setup.py build_ext --inplace` compiles what has changed.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FOLDERS = ("kernels", "bench")
TOOLS = "pip install 'cmake>=3.24' ninja pybind11"


def find_tool(name: str) -> str:
    """Beside this Python, else on PATH, which begins with pip's build environment."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise CompileError(f"{name} is missing, which compiles the kernels: {TOOLS}")
    return found


def find_compiler() -> str | None:
    """A C++ compiler: by the environment variable CXX, else on PATH; None where there is none."""
    if named := os.environ.get("CXX"):
        return named
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def remove_after_another_compiler(compiler: str, folder: Path) -> None:
    """cmake keeps what it found out about a compiler, and what was compiled with it."""
    command = [*shlex.split(compiler), "--version"]
    version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    compiler, kept = f"{compiler}\n{version}", folder / "compiler.txt"
    if not kept.exists() or kept.read_text() != compiler:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kept.write_text(compiler)


@dataclass(frozen=True)
class Kernels:
    """One native module.

    Attributes:
        name: in words. module: its name in pcfast.
        compiler: that it needs; None where there is none.
        missing: what to say then.
        options: of cmake, beside those of all.
    """

    name: str
    module: str
    compiler: str | None
    missing: str
    options: dict[str, str]

    @property
    def without(self) -> str:
        """Why it is left out; "" where it is compiled."""
        if os.environ.get("PCFAST_NATIVE") == "0":
            return "PCFAST_NATIVE=0"
        return self.missing if self.compiler is None else ""


NVCC = runpy.run_path(str(ROOT / "pcfast" / "support" / "nvcc.py"))["find_nvcc"]()
KERNELS = (
    Kernels(
        "CPU kernels",
        "_cpu",
        find_compiler(),
        "no C++ compiler on PATH, nor by CXX; install one (g++, or clang++) to have them",
        {"PCFAST_CPU": "ON", "PCFAST_CUDA": "OFF"},
    ),
    Kernels(
        "CUDA kernels",
        "_native",
        NVCC,
        "no nvcc on PATH, nor by CUDACXX or CUDA_HOME; install the CUDA toolkit to have them",
        {
            "PCFAST_CPU": "OFF",
            "PCFAST_CUDA": "ON",
            "CMAKE_CUDA_COMPILER": NVCC or "",
            "PCFAST_CUDA_ARCHITECTURES": os.environ.get("PCFAST_CUDA_ARCHITECTURES", ""),
        },
    ),
)
COMPILED = [kernels for kernels in KERNELS if not kernels.without]


class BuildPython(build_py):
    """Says so where kernels are left out: every installation builds the Python part once."""

    def run(self) -> None:
        for kernels in KERNELS:
            if kernels.without:
                print(f"pcfast is installed without its {kernels.name}: {kernels.without}", file=sys.stderr)
        super().run()


class BuildNative(build_ext):
    """Compiles with cmake and ninja."""

    def run(self) -> None:
        if self.inplace and not self.editable_mode:
            for kernels in KERNELS:
                if kernels.without:
                    print(f"the {kernels.name} are not compiled: {kernels.without}", file=sys.stderr)
        super().run()

    def build_extension(self, extension: Extension) -> None:
        (kernels,) = (kernels for kernels in KERNELS if extension.name == f"pcfast.{kernels.module}")
        try:
            import pybind11
        except ImportError:
            raise CompileError(f"pybind11 is missing, which compiles the {kernels.name}: {TOOLS}") from None
        # Kept between builds, so that only what has changed is compiled again.
        folder = ROOT / "build" / f"{kernels.module.strip('_')}-{sys.implementation.cache_tag}"
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        definitions = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            **kernels.options,
        }
        options = [f"-D{name}={value}" for name, value in definitions.items()]
        options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        try:
            remove_after_another_compiler(kernels.compiler, folder)
            subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", folder, *options], check=True)
            subprocess.run([cmake, "--build", folder], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = f"{error.cmd[0]} failed" if isinstance(error, subprocess.CalledProcessError) else error
            raise CompileError(
                f"the {kernels.name} were not compiled: {why}. PCFAST_NATIVE=0 installs pcfast without them."
            ) from None
        built = folder / Path(self.get_ext_filename(extension.name)).name
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


def linux_wheel() -> dict[str, type]:
    """bdist_wheel whose wheels are for this system alone: files are locked by fcntl, with the kernels or without.

    Empty where nothing builds wheels.
    """
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # before setuptools 70.1
        try:
            from wheel.bdist_wheel import bdist_wheel
        except ImportError:
            return {}

    class BuildWheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            pure, self.root_is_pure = self.root_is_pure, False  # a pure one would be for any system
            python, abi, system = super().get_tag()
            self.root_is_pure = pure
            return (python, abi, system) if COMPILED else ("py3", "none", system)

    return {"bdist_wheel": BuildWheel}


setup(
    license="MIT",
    # The top-level folders kernels/ and bench/ are installed as pcfast.kernels and pcfast.bench, never as packages
    # `kernels` and `bench`, which are other projects' names.
    package_dir={"pcfast": "pcfast", **{f"pcfast.{folder}": folder for folder in FOLDERS}},
    packages=[
        *find_packages(include=["pcfast", "pcfast.*"]),
        *(f"pcfast.{folder}" for folder in FOLDERS),
        *(f"pcfast.{folder}.{name}" for folder in FOLDERS for name in find_packages(folder)),
    ],
    package_data={
        "pcfast.recipes": ["*.csv"],
        "pcfast.bench": ["*.sh"],
        "pcfast.bench.constants": ["*.cu", "*.cuh", "*.h"],
    },
    # Their sources are CMakeLists.txt's business.
    ext_modules=[Extension(f"pcfast.{kernels.module}", sources=[]) for kernels in COMPILED],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, **linux_wheel()},
)
