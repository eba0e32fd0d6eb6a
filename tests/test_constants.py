"""Measured constants: the CUDA program compiles and keeps its work, and what it writes is read as it should be."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from pcfast.backends import chips, gpu_constants
from pcfast.backends.gpu_constants import NAMES, defaults, load
from pcfast.bench.constants import measure
from pcfast.errors import ArgumentError
from pcfast.support import log

NVCC_VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH")
FOLDER = Path(__file__).resolve().parent.parent / "bench" / "constants"
ARCHITECTURES = ("80", "90a", "100a")


# ---- the program

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the program, for three architectures, and its PTX; built once, also where xdist runs several."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "constants-build"
    with FileLock(f"{folder}.lock"):
        program = folder / "constants"
        if not program.exists():
            folder.mkdir(exist_ok=True)
            measure.build(
                program, ARCHITECTURES, "-Werror=all-warnings", "-keep", f"-keep-dir={folder}", "--threads=2"
            )
    return folder


def kernels_of(ptx: str) -> dict[str, str]:
    """Kernel (mangled name) -> its PTX."""
    parts = re.split(r"\.entry\s+(\w+)", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def inside_loops(body: str) -> str:
    """The lines of a kernel that lie between a label and a branch back to it."""
    lines = body.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$\w+):", line))}
    inside: set[int] = set()
    for i, line in enumerate(lines):
        if "bra" in line and (target := re.search(r"(\$\w+);", line)):
            inside.update(range(labels[target[1]], i + 1))
    return "\n".join(lines[i] for i in sorted(inside))


# Kernel -> instructions that must stand in its loop. Loads are volatile: ptxas takes plain ones out of the loop.
IN_LOOPS = {
    "read_shared": ("ld.volatile.shared.v4.u32",) * 4,
    "stay_busy": ("fma.rn.f32", "%globaltimer", "%clock64"),
    "hold_stream": ("%clock64",),
}


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_timed_loops_hold_what_is_measured(built, architecture):
    kernels = kernels_of((built / f"constants.compute_{architecture}.ptx").read_text())
    for name, instructions in IN_LOOPS.items():
        (body,) = (body for mangled, body in kernels.items() if name in mangled)
        loop = inside_loops(body)
        for instruction in set(instructions):
            assert loop.count(instruction) >= instructions.count(instruction), (name, instruction)


@needs_nvcc
def test_machine_code_keeps_the_loads_in_their_loops(built):
    """ptxas may move what PTX has in a loop; a disassembler of CUDA 13 or newer is needed to see it."""
    tools = [shutil.which(name) for name in ("cuobjdump", "nvdisasm")]
    if None in tools:
        pytest.skip(
            "cuobjdump and nvdisasm are not on PATH (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)"
        )
    cubin = built / "constants.compute_90a.cubin"
    code = subprocess.run([tools[0], "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels = dict(zip(*[iter(re.split(r"Function : (\w+)", code)[1:])] * 2, strict=True))
    for name, instruction, count in (("read_shared", r"LDS\.128", 4),):
        (body,) = (body for mangled, body in kernels.items() if name in mangled)
        lines = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4})\*/(.*)", body)]
        jumps = [
            (int(m[1], 16), at) for at, line in lines if (m := re.search(r"BRA\S* .*?0x([0-9a-f]+)", line))
        ]
        inside = [line for at, line in lines if any(target <= at < end for target, end in jumps)]
        assert sum(bool(re.search(instruction, line)) for line in inside) >= count, name


@needs_nvcc
def test_without_a_gpu_the_program_says_so(built):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([built / "constants"], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == measure.EXIT_NOTHING
    assert "cudaGetDeviceCount" in json.loads(done.stdout)["error"]
    assert done.stderr == ""


@needs_nvcc
def test_without_a_gpu_running_it_is_one_clear_line(built, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(measure.MeasuringError, match="constants measured nothing: cudaGetDeviceCount"):
        measure.run(built / "constants")


HANGING = r"""
#include "report.h"
int main() {
    Report report;
    report.describe("device", quoted("NVIDIA \"X\" \\ 1\n"));
    report.measured("sm_count", Value::exact(132));
    report.measured("sm_clock_mhz", Value::median_of({3, 1, 2, 5, 4}, 0, 10));
    try {
        report.measured("l2_bytes", Value::median_of({11}, 0, 10));
    } catch (const Failure& failure) {
        report.not_measured("l2_bytes", failure.what());
    }
    Watchdog watchdog(report);
    watchdog.expect("copy_bandwidth_gbs", 100);
    watchdog.expect("matmul_bf16_tflops", 1);
    std::this_thread::sleep_for(std::chrono::seconds(30));
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
def test_a_measurement_that_hangs_is_stopped_and_named(tmp_path):
    (tmp_path / "hanging.cpp").write_text(HANGING)
    program = tmp_path / "hanging"
    command = ["g++", "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{FOLDER}", "-o", program]
    subprocess.run([*command, tmp_path / "hanging.cpp"], check=True, timeout=60)
    record = measure.run(program)
    assert record["exit_status"] == 3
    assert record["device"] == 'NVIDIA "X" \\ 1 '
    assert record["stopped_at"] == "matmul_bf16_tflops"
    assert record["measured"]["sm_count"] == 132
    assert record["measured"]["sm_clock_mhz"] == {"median": 3, "p20": 2, "p80": 4, "samples": 5}
    assert "outside what is plausible" in record["not_measured"]["l2_bytes"]
    assert "waited 1 s" in record["not_measured"]["matmul_bf16_tflops"]
    measure.save({**record, "date": "2026-11-24"}, tmp_path / "constants.json")
    assert load(tmp_path / "constants.json").sm_clock_mhz == 3


# ---- building and running it


def test_names_of_architectures():
    assert [measure.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        "80",
        "89",
        "90a",
        "100a",
        "120a",
    ]


def test_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in NVCC_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(measure.MeasuringError, match="no nvcc on PATH"):
        measure.build(tmp_path / "program", ["90a"])


@pytest.mark.parametrize("variable", NVCC_VARIABLES)
def test_nvcc_is_found_where_the_kernels_build_finds_it(variable, monkeypatch, tmp_path):
    folder = tmp_path / "cuda" / "bin"
    folder.mkdir(parents=True)
    nvcc = script(folder, "nvcc", "echo 'x.cu: fatal error: of this one' >&2; exit 2")
    for name in NVCC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(nvcc if variable == "CUDACXX" else tmp_path / "cuda"))
    with pytest.raises(measure.MeasuringError, match="of this one"):
        measure.build(tmp_path / "program", ["90a"])
    said = (
        "import setuptools; setuptools.setup = lambda **_: None; exec(open('setup.py').read()); print(NVCC)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"__file__ = 'setup.py'; {said}"],
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(nvcc), done.stderr


def test_what_the_program_measured_is_kept_before_torch_is_timed(monkeypatch, tmp_path):
    out = tmp_path / "constants.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measure, "build", lambda program, architectures: None)
    monkeypatch.setattr(measure, "run", lambda program: {"measured": {"sm_count": 132}, "not_measured": {}})
    monkeypatch.setattr(measure, "matmul_rates", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["measure", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        measure.main()
    assert json.loads(out.read_text())["measured"] == {"sm_count": 132}


def script(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_compile_error_is_one_line(monkeypatch, tmp_path):
    script(tmp_path, "nvcc", "echo 'x.cu(3): error: no such thing' >&2; echo '1 error detected' >&2; exit 2")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        measure.MeasuringError, match=r"^nvcc refused .* for 90a: x\.cu\(3\): error: no such thing$"
    ):
        measure.build(tmp_path / "program", ["90a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sleep 10", "did not end within 1 s"),
        ("echo gone >&2; exit 9", "status 9 and no JSON; it said: gone"),
        ("""echo '{"error": "no device"}'; exit 1""", "measured nothing: no device"),
        ("""echo '{"measured": {}, "not_measured": {"opening": "30 s"}}'; exit 3""", "30 s"),
    ],
)
def test_a_program_that_fails_is_one_line(text, message, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RUN_SECONDS", 1)
    with pytest.raises(measure.MeasuringError, match=message) as raised:
        measure.run(script(tmp_path, "constants", text))
    assert "\n" not in str(raised.value)


def test_without_a_gpu_nothing_is_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["measure.py", "--out", str(tmp_path / "constants.json")])
    assert measure.main() == 1
    assert capsys.readouterr().err == "measure.py: no GPU: torch.cuda.is_available() is False\n"
    assert list(tmp_path.iterdir()) == []


def test_a_result_replaces_the_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results" / "constants.json"
    measure.save(SAMPLE, path)
    with pytest.raises(TypeError):
        measure.save({"device": object()}, path)
    assert json.loads(path.read_text()) == SAMPLE
    assert [file.name for file in path.parent.iterdir()] == ["constants.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_nvcc
def test_everything_is_measured_on_a_gpu(tmp_path):
    record = measure.measure()
    assert record["exit_status"] == 0, record["not_measured"]
    measure.save(record, tmp_path / "constants.json")
    measured = load(tmp_path / "constants.json", chip=chips.chip_of(torch.device("cuda", 0)))
    assert [name for name in NAMES if not measured.is_measured(name)] == []


# ---- reading the result

SAMPLE = {
    "device": "NVIDIA H200",
    "compute_capability": "9.0",
    "cuda_driver": "13.0",
    "cuda_runtime": "13.0",
    "measured": {
        "sm_count": 132,
        "l2_bytes": 62914560,
        "sm_clock_mhz": {"median": 1755.5, "p20": 1750, "p80": 1760, "samples": 20},
        "of_a_later_release_us": {"median": 1},
    },
    "not_measured": {
        "copy_bandwidth_gbs": "less than 3 GiB of device memory are free",
    },
    "exit_status": 2,
    "torch": "2.11.0+cu130",
    "date": "2026-11-24",
}
LABEL = "measured NVIDIA H200 2026-11-24"


def written(tmp_path, record) -> Path:
    path = tmp_path / "constants.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return path


def test_measured_values_stand_before_defaults(tmp_path):
    result = load(written(tmp_path, SAMPLE))
    assert result.device == "NVIDIA H200"
    assert (result.sm_count, result.l2_bytes, result.sm_clock_mhz) == (132, 62914560, 1755.5)
    assert result.source["sm_clock_mhz"] == LABEL and result.is_measured("sm_clock_mhz")
    by_default = defaults(chips.DEFAULT)["matmul_bf16_tflops"]
    assert (result.matmul_bf16_tflops, result.source["matmul_bf16_tflops"]) == by_default
    assert result.copy_bandwidth_gbs == 4300
    assert result.source["copy_bandwidth_gbs"].endswith(
        "not measured: less than 3 GiB of device memory are free"
    )
    assert not result.is_measured("copy_bandwidth_gbs")


def test_without_a_file_all_are_defaults(monkeypatch, caplog):
    monkeypatch.delenv(gpu_constants.PATH_VARIABLE, raising=False)
    with caplog.at_level(logging.INFO, "pcfast"):
        result = load()
    assert {name: (getattr(result, name), result.source[name]) for name in NAMES} == defaults(chips.DEFAULT)
    assert caplog.messages == []
    assert hash(result) == hash(load())


def test_the_environment_names_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu_constants.PATH_VARIABLE, str(written(tmp_path, SAMPLE)))
    assert load().sm_clock_mhz == 1755.5


@pytest.mark.parametrize("chip", chips.TABLE, ids=lambda chip: chip.alias)
def test_every_default_names_where_it_is_from(chip):
    assert list(defaults(chip)) == list(NAMES)
    for name, (value, source) in defaults(chip).items():
        assert source.startswith(("published: ", "estimate: ")), name
        assert value > 0


def test_an_unknown_device_gets_the_defaults_and_says_so(monkeypatch, caplog):
    monkeypatch.delenv(gpu_constants.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(log, "_said", set())
    with caplog.at_level(logging.INFO, "pcfast"):
        result = load(chip=chips.like("NVIDIA A100-PCIE-40GB", (8, 0)))
    assert result.device == "NVIDIA A100-PCIE-40GB" and result.sm_count == 108
    assert all("of an NVIDIA A100, not of NVIDIA A100-PCIE" in source for source in result.source.values())
    assert caplog.messages == [
        "constants: what was not measured on NVIDIA A100-PCIE-40GB is taken from an NVIDIA A100"
    ]


def test_a_file_of_another_device_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "_said", set())
    with caplog.at_level(logging.INFO, "pcfast"):
        result = load(written(tmp_path, SAMPLE), chip=chips.like("NVIDIA H100 80GB HBM3"))
    assert not any(result.is_measured(name) for name in NAMES)
    assert "was measured on NVIDIA H200, not on NVIDIA H100 80GB HBM3" in caplog.text


def changed(**entries) -> dict:
    record = copy.deepcopy(SAMPLE)
    record["measured"].update(entries)
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it is no JSON object"),
        ({"error": "no device"}, "it says 'no device'"),
        ({**SAMPLE, "device": 3}, "it has no device"),
        ({**SAMPLE, "date": ""}, "it has no date"),
        ({**SAMPLE, "measured": []}, "it has no measured"),
        (
            {**SAMPLE, "not_measured": {"sm_clock_mhz": 3}},
            "the reason for not measuring sm_clock_mhz is 3",
        ),
        (changed(sm_clock_mhz="fast"), "sm_clock_mhz is 'fast'"),
        (changed(sm_clock_mhz={"p20": 1}), "sm_clock_mhz is"),
        (changed(sm_clock_mhz=0), "sm_clock_mhz is 0"),
        (changed(sm_clock_mhz=True), "sm_clock_mhz is True"),
        (changed(sm_clock_mhz=float("nan")), "sm_clock_mhz is nan"),
        (changed(sm_count=-1), "sm_count is -1"),
    ],
)
def test_files_that_are_refused(record, message, tmp_path):
    path = written(tmp_path, record)
    with pytest.raises(ArgumentError, match=re.escape(message)) as raised:
        load(path)
    assert str(path) in str(raised.value) and "constants.measure" in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="No such file"):
        load(tmp_path / "none.json")


def test_the_program_and_the_dataclass_name_the_same_constants():
    source = (FOLDER / "constants.cu").read_text()
    by_program = {
        *re.findall(r'\{"(\w+)", \w+\}', source),
        *re.findall(r'report\.measured\("(\w+)"', source),
    }
    by_torch = set(re.findall(r'"(matmul_\w+)"', (FOLDER / "measure.py").read_text()))
    assert by_program | by_torch == set(NAMES)
