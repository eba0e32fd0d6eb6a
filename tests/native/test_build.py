"""Compiling, packaging and loading the native module, and what is said where one of them fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from installing import build_wheel, copy_sources, install, run_pip, run_python
from native_build import CSRC, SUFFIX, configure, needs_gcc, tool

from pcfast.backends.cuda import native
from pcfast.cli import main
from pcfast.errors import BackendError
from pcfast.support import cpu_module

NVCC_VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH")

needs_nvcc = pytest.mark.skipif(
    os.environ.get("PCFAST_NATIVE") == "0"
    or (shutil.which("nvcc") is None and not any(map(os.environ.get, NVCC_VARIABLES))),
    reason="no nvcc, or PCFAST_NATIVE=0",
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _nothing_found_before(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv(native.ON_HOST, raising=False)
    native._find.cache_clear()
    yield
    native._find.cache_clear()


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# ---- the module of this checkout


@pytest.fixture
def module():
    assert native.load_error() == "", "compile it: make native"
    return native.load()


@needs_nvcc
@no_gpu
def test_without_a_driver_the_module_loads_and_says_so(module):
    result = native.probe()
    assert (result.driver_version, result.device_count) == (None, 0)
    assert re.fullmatch(r"\d+\.\d", result.runtime_version)
    assert "sm_80" in result.architectures or os.environ.get("PCFAST_CUDA_ARCHITECTURES")
    assert result.reason.startswith("no NVIDIA driver was found: install it")
    status, _ = module.device_count()
    assert module.error_text(status) == "CUDA driver version is insufficient for CUDA runtime version"


@needs_nvcc
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_with_a_gpu_nothing_is_missing(module):
    result = native.probe()
    assert result.device_count == torch.cuda.device_count()
    assert result.driver_version is not None and result.reason == ""


@needs_nvcc
def test_a_status_becomes_words_and_an_impossible_launch_a_status(module):
    assert module.error_text(0) == "no error"
    assert module.error_text(1) == "invalid argument"
    arguments = [bytes(size) for size in module.resident_sizes()]
    refused = module.resident(*arguments, 4, 31, 0)
    assert refused == -1 and module.error_text(refused) == "an argument that the kernel cannot use"


@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no binutils")
def test_the_module_exports_its_entry_alone_and_brings_cudart(module):
    exported = output_of("nm", "--dynamic", "--defined-only", module.__file__).splitlines()
    assert [line.split()[-1] for line in exported] == ["PyInit__native"]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "--dynamic", module.__file__))
    assert needed and not [name for name in needed if re.match("lib(cuda|nv|torch|c10|python)", name)]


def test_the_interfaces_have_one_version_each():
    (written,) = re.findall(r"#define PCFAST_ABI_VERSION (\d+)", (CSRC / "abi.h").read_text())
    assert int(written) == native.ABI_VERSION
    (written,) = re.findall(r"kAbiVersion = (\d+);", (CSRC / "cpu" / "module.cpp").read_text())
    assert int(written) == cpu_module.ABI_VERSION


# ---- a module that cannot be used


def reason() -> str:
    """Why the module is missing; `load` raises the same."""
    result = native.load_error()
    with pytest.raises(BackendError) as raised:
        native.load()
    assert str(raised.value) == result
    assert len(result.splitlines()) == 1
    return result


def instead_of_the_module(monkeypatch, folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(native, "_MODULE", name.partition(".")[0])


def test_a_missing_module(monkeypatch):
    monkeypatch.setattr(native, "_MODULE", "pcfast._native_absent")
    assert re.search("are not compiled: .*Install the CUDA toolkit.* install pcfast again", reason())


def test_a_module_of_another_version(monkeypatch, tmp_path):
    instead_of_the_module(monkeypatch, tmp_path, "of_tomorrow.py", "def abi_version(): return 1001\n")
    versions = f"its interface has version 1001, this pcfast needs {native.ABI_VERSION}"
    assert re.search(f"other sources: {versions}; install pcfast again", reason())


def test_a_module_without_a_version(monkeypatch, tmp_path):
    instead_of_the_module(monkeypatch, tmp_path, "of_yesterday.py", "")
    assert "other sources: its interface has version none" in reason()


def test_a_module_that_the_loader_refuses(monkeypatch, tmp_path):
    instead_of_the_module(monkeypatch, tmp_path, f"broken{SUFFIX}", "no shared object")
    assert re.search("cannot be loaded: .*broken.*; install pcfast again", reason())


def test_a_module_whose_needs_are_missing(monkeypatch, tmp_path):
    instead_of_the_module(monkeypatch, tmp_path, "needy.py", "import pcfast_no_such_module\n")
    assert "cannot be loaded: No module named 'pcfast_no_such_module'" in reason()


def test_a_module_for_the_cpu_that_is_not_there(monkeypatch, tmp_path):
    path = tmp_path / f"_native_host{SUFFIX}"
    monkeypatch.setenv(native.ON_HOST, str(path))
    assert native.on_host()
    assert reason().startswith(f"{native.ON_HOST}={path} cannot be loaded: there is no such file")
    native._find.cache_clear()
    path.write_text("no shared object")
    assert re.search(
        f"{path} cannot be loaded: (?!there is no such file).*; name a built _native_host", reason()
    )


def test_info_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(native, "_MODULE", "pcfast._native_absent")
    monkeypatch.setattr(cpu_module, "_MODULE", "pcfast._cpu_absent")
    cpu_module._find.cache_clear()
    try:
        assert main(["info", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        for module, key in ((native, "native"), (cpu_module, "cpu_kernels")):
            assert result[key]["compiled"] is False and result[key]["reason"] == module.load_error()
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        assert "the CUDA kernels are not compiled" in text and "the CPU kernels are not compiled" in text
    finally:
        cpu_module._find.cache_clear()


def test_info_names_the_cpu_kernels(capsys):
    if cpu_module.load_error():
        pytest.skip(cpu_module.load_error())
    assert main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["cpu_kernels"]
    assert result["used"] == result["instruction_sets"][-1] == cpu_module.load().used()
    assert result["openmp"] == cpu_module.openmp_runtime()


def test_importing_pcfast_loads_no_module(tmp_path):
    code = "import sys, pcfast, pcfast.backends.cuda.native; assert 'pcfast._native' not in sys.modules"
    done = run_python(sys.executable, code, tmp_path)
    assert done.returncode == 0, done.stderr


# ---- what a driver and GPUs say


@pytest.mark.parametrize(
    ("status", "driver", "words"),
    [
        (35, 0, "no NVIDIA driver was found: install it"),
        (35, 12020, "the NVIDIA driver is too old: it supports CUDA 12.2, the kernels need 13.0; update it"),
        (100, 13000, "the driver finds no GPU: CUDA_VISIBLE_DEVICES='7'"),
        (999, 13000, "CUDA error 999: unknown error"),
    ],
)
def test_errors_of_the_driver(status, driver, words, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert native._explain(status, "unknown error", driver, 13000).startswith(words)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80 sm_90a", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (7, 5), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_90a compute_90", (10, 3), True),
        ("sm_90a compute_90", (12, 1), True),
        ("compute_90", (8, 9), False),
        ("compute_90a", (10, 0), False),
        ("sm_120a", (12, 0), True),
    ],
)
def test_which_gpus_run_what_is_compiled_in(architectures, capability, runs):
    said = native._no_code(architectures.split(), [capability])
    assert (said == "") is runs
    if not runs:
        assert f"the compute capability here is {capability[0]}.{capability[1]}" in said
    assert native._no_code(architectures.split(), [capability, (1, 0)]) == "" or not runs


# ---- compiling


@needs_nvcc
def test_chips(tmp_path, monkeypatch):
    monkeypatch.delenv("PCFAST_CUDA_ARCHITECTURES", raising=False)
    done = configure(tmp_path)
    assert done.returncode == 0, done.stderr
    every = re.search("kernels for (.*)", done.stdout)[1].split()
    # nvcc 13 knows all of them, 12.1 the first ones
    assert every == [
        name
        for name in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a", "compute_90")
        if name in every
    ]
    assert {"sm_80", "sm_90a", "compute_90"} <= set(every)

    done = configure(tmp_path, "PCFAST_CUDA_ARCHITECTURES=90a, 80-virtual")
    assert "kernels for sm_90a compute_80\n" in done.stdout
    flags = (tmp_path / "build.ninja").read_text().replace('"', "")
    codes = {" ".join(re.findall(r"arch=\S+", line)) for line in flags.splitlines() if "-lineinfo" in line}
    assert codes == {"arch=compute_90a,code=[sm_90a] arch=compute_80,code=[compute_80]"}

    done = configure(tmp_path, "PCFAST_CUDA_ARCHITECTURES=80;999")
    assert done.returncode != 0
    assert re.search(r"PCFAST_CUDA_ARCHITECTURES: nvcc \S+ does\s+not\s+know\s+'999'", done.stderr)


# Compiled in seconds, for what is packaged alone: kernels with the whole interface, and nothing optimised.
QUICKLY = {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS_RELEASE=-O0"}
PLANTED_CPU = """
#include "program.h"
namespace pcfast::cpu::PCFAST_ISA {
void run_float(const Call&) {}
void run_double(const Call&) {}
}
"""
PLANTED = """
#include "../abi.h"
__global__ void planted(int* at) { *at = 1; }
int pcfast_resident(const void*, const void*, const void*, int, int, void*) { return PCFAST_INVALID_ARGUMENT; }
void pcfast_resident_sizes(int* program, int* tensors, int* run) { *program = *tensors = *run = 1; }
const char* pcfast_resident_constants() { return ""; }
"""


@needs_nvcc
def test_wheels_editable_and_a_failure(tmp_path, monkeypatch):
    """One test, in one folder, so that what does not change is compiled once."""
    source = copy_sources(tmp_path / "source")
    shutil.rmtree(source / "csrc" / "resident")
    (source / "csrc" / "cpu" / "kernels.cpp").write_text(PLANTED_CPU)
    planted = source / "csrc" / "another" / "planted.cu"
    planted.parent.mkdir()
    planted.write_text(PLANTED)
    scripts = sysconfig.get_path("scripts")
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    environment = {**QUICKLY, "PCFAST_CUDA_ARCHITECTURES": "80", "PATH": path}
    where = "from pcfast.backends.cuda import native; print(native.load().__file__, *native.probe().architectures)"

    wheel = build_wheel(source, tmp_path / "wheel", environment)
    assert "linux" in wheel.name and not wheel.name.endswith("-none-any.whl")
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {f"pcfast/_native{SUFFIX}", f"pcfast/_cpu{SUFFIX}"}
    assert {name for name in names if name.endswith(".so")} == modules
    assert not [name for name in names if "csrc" in name or "CMake" in name]
    assert not list(source.glob("pcfast/*.so"))
    installed = install(tmp_path / "wheel-venv", source, str(wheel))
    (line,) = installed.output(where, tmp_path)
    file, *architectures = line.split()
    assert Path(file).is_relative_to(tmp_path / "wheel-venv")
    assert architectures == ["sm_80"]

    installed = install(
        tmp_path / "editable-venv", source, "--editable", str(source), environment=environment
    )
    assert installed.output(where, tmp_path) == [f"{source / 'pcfast' / f'_native{SUFFIX}'} sm_80"]

    for name in NVCC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for folder in source.glob("build/lib*"):  # from which setuptools would take the module of the wheel above
        shutil.rmtree(folder)
    without_nvcc = [folder for folder in path.split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
    name, modules = wheel_without(
        {"CUDA kernels: no nvcc on PATH"},
        source,
        tmp_path / "cpu",
        {**QUICKLY, "PATH": os.pathsep.join(without_nvcc)},
    )
    assert modules == [f"pcfast/_cpu{SUFFIX}"] and "-py3-none-" not in name

    planted.write_text(PLANTED.replace("*at = 1", "*at = undeclared"))
    failed = run_pip("wheel", "--wheel-dir", tmp_path / "none", source, environment=environment)
    assert failed.returncode != 0 and not list((tmp_path / "none").glob("*"))
    said = failed.stdout + failed.stderr
    assert re.search(r'planted\.cu\(\d+\): error: identifier "undeclared" is undefined', said)
    assert "PCFAST_NATIVE=0 installs pcfast without them" in said


def wheel_without(
    said: set[str], source: Path, target: Path, environment: dict[str, str]
) -> tuple[str, list[str]]:
    """The name of a wheel and the native modules in it; building it said why it is without the others."""
    done = run_pip("wheel", "--verbose", "--wheel-dir", target, source, environment=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "is installed without its" in line]
    assert len(lines) == len(said) and all(any(why in line for line in lines) for why in said)
    (wheel,) = target.glob("*.whl")
    with ZipFile(wheel) as archive:
        return wheel.name, [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("compilers", {"CUDA kernels: no nvcc on PATH", "CPU kernels: no C++ compiler on PATH"}),
        ("PCFAST_NATIVE", {"CUDA kernels: PCFAST_NATIVE=0", "CPU kernels: PCFAST_NATIVE=0"}),
    ],
)
def test_a_wheel_without_kernels(without, said, tmp_path, monkeypatch):
    for name in ("PCFAST_NATIVE", "CXX", *NVCC_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    if without == "PCFAST_NATIVE":
        environment = {"PCFAST_NATIVE": "0"}
    else:
        environment = {"PATH": sysconfig.get_path("scripts")}
    name, modules = wheel_without(said, copy_sources(tmp_path / "source"), tmp_path, environment)
    assert modules == [] and "-py3-none-linux_" in name


def test_what_is_missing_to_compile_is_named(tmp_path):
    """``sys.modules[name] = None`` makes importing it fail."""
    source = copy_sources(tmp_path)
    code = (
        "import os, runpy, sys\n"
        "sys.modules['pybind11'] = None\n"
        "os.environ.update(CUDACXX='/some/nvcc', PCFAST_NATIVE='')\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run_python(sys.executable, code, source)
    assert done.returncode != 0
    assert "pybind11 is missing" in done.stderr and "pip install 'cmake>=3.24' ninja pybind11" in done.stderr


# ---- for the CPU


@needs_gcc
def test_a_module_for_the_cpu(host_module, monkeypatch):
    monkeypatch.setenv(native.ON_HOST, str(host_module))
    module = native.load()
    assert Path(module.__file__) == host_module
    assert module.error_text(9) == "invalid configuration argument"
    assert native.probe() == native.Probe(None, None, 0, (), "the kernels are compiled for the CPU")


@needs_gcc
def test_a_sanitizer_is_for_executables(tmp_path):
    done = configure(tmp_path, "PCFAST_HOST=ON", "PCFAST_HOST_SANITIZE=thread")
    assert done.returncode == 0, done.stderr
    commands = output_of(tool("ninja"), "-C", tmp_path, "-t", "commands")
    assert "-fsanitize=thread" in commands and "_native_host" not in commands
