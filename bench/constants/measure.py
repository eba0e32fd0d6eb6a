"""Measure the constants of the GPU at hand: build constants.cu, run it, add matrix products, keep the result.

    python -m pcfast.bench.constants.measure               # writes .benchmarks/constants.json
    PCFAST_CONSTANTS=.benchmarks/constants.json python ... # pcfast.backends.gpu_constants.load() now reads it

Takes about 60 s at most: 10 to 20 s of compiling, a few of measuring.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pcfast.support.files import write_json
from pcfast.support.nvcc import find_nvcc

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "constants.cu"
DEFAULT_OUT = HERE.parent.parent / ".benchmarks" / "constants.json"
BUILD_SECONDS, RUN_SECONDS = 120, 60  # the program gives up by itself after 45 s and says where it was
EXIT_NOTHING = 1  # report.h: its JSON holds only "error"


class MeasuringError(Exception):
    """Nothing could be measured; the message is one line that says why."""


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name for a compute capability: (9, 0) -> "90a"."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if major >= 9 else "")


def build(program: Path, architectures: Sequence[str], *options: str) -> None:
    """Compile constants.cu for ``architectures`` into ``program``."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise MeasuringError(
            "no nvcc on PATH, nor by CUDACXX, CUDA_HOME or CUDA_PATH: install the CUDA toolkit, or name it by one"
        )
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    command = [nvcc, "-O3", "-std=c++17", *targets, *options, "-o", str(program), str(SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise MeasuringError(f"nvcc did not finish within {BUILD_SECONDS} s") from None
    except OSError as error:
        raise MeasuringError(f"{nvcc} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).splitlines()
        first = next((line for line in lines if "error" in line or "fatal" in line), "it says nothing")
        raise MeasuringError(f"nvcc refused {SOURCE.name} for {', '.join(architectures)}: {first.strip()}")


def run(program: Path) -> dict:
    """What the built program measured."""
    try:
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise MeasuringError(f"{program.name} did not end within {RUN_SECONDS} s and was stopped") from None
    except OSError as error:
        raise MeasuringError(f"{program} cannot be run: {error.strerror}") from None
    try:
        record = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr or done.stdout).strip().splitlines()
        last = said[-1] if said else "nothing"
        raise MeasuringError(
            f"{program.name} ended with status {done.returncode} and no JSON; it said: {last}"
        ) from None
    if done.returncode == EXIT_NOTHING or "device" not in record:
        reason = record.get("error") or record.get("not_measured")
        raise MeasuringError(f"{program.name} measured nothing: {reason}")
    return {**record, "exit_status": done.returncode}


def matmul_rates(size: int = 8192, repetitions: int = 10) -> tuple[dict, dict]:
    """Rates of square matrix products through torch, on random data: (measured, not_measured)."""
    measured: dict[str, dict] = {}
    not_measured: dict[str, str] = {}
    before = torch.get_float32_matmul_precision()
    # The allowed errors tell the precisions apart: rounding costs about 2e-3 in bf16, 3e-4 in tf32.
    for name, dtype, precision, allowed in (
        ("matmul_bf16_tflops", torch.bfloat16, "highest", 1e-2),
        ("matmul_tf32_tflops", torch.float32, "high", 2e-3),
    ):
        try:
            torch.set_float32_matmul_precision(precision)
            measured[name] = _matmul_rate(size, dtype, repetitions, allowed)
        except RuntimeError as error:  # out of memory among them
            not_measured[name] = str(error).splitlines()[0]
        finally:
            torch.set_float32_matmul_precision(before)
    return measured, not_measured


def _matmul_rate(size: int, dtype: torch.dtype, repetitions: int, allowed: float) -> dict:
    products = 4  # a timing, so that the host's launches do not show
    left = torch.randn(size, size, device="cuda").to(dtype)
    right = torch.randn(size, size, device="cuda").to(dtype)
    out = torch.full_like(left, float("nan"))
    rates = []
    for i in range(3 + repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(products):
            torch.mm(left, right, out=out)
        end.record()
        end.synchronize()
        if i >= 3:  # the first ones load kernels and raise the clock
            rates.append(products * 2 * size**3 / (begin.elapsed_time(end) * 1e-3) / 1e12)
    # One row against float64 says that the product was computed, and in that precision.
    truth = left[0].double() @ right.double()
    error = float((out[0].double() - truth).norm() / truth.norm())
    if not error < allowed:
        raise RuntimeError(f"the product is wrong by {error:.2g}, more than {allowed:g}")
    p20, median, p80 = (statistics.quantiles(rates, n=10)[i] for i in (1, 4, 7))
    return {"median": median, "p20": p20, "p80": p80, "samples": len(rates)}


def measure(keep: Callable[[dict], None] = lambda record: None) -> dict:
    """Everything, as pcfast.backends.gpu_constants reads it; ``keep`` gets what is there before torch is timed."""
    if not torch.cuda.is_available():
        raise MeasuringError("no GPU: torch.cuda.is_available() is False")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "constants"
        build(program, [architecture(torch.cuda.get_device_capability(0))])
        record = run(program)
    record.update(torch=str(torch.__version__), date=datetime.date.today().isoformat())
    keep(record)
    measured, not_measured = matmul_rates()
    record["measured"].update(measured)
    record["not_measured"].update(not_measured)
    return record


def save(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON file to write (%(default)s)")
    arguments = parser.parse_args()
    try:
        record = measure(keep=lambda result: save(result, arguments.out))
        save(record, arguments.out)
    except (MeasuringError, OSError) as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 1
    for name, value in record["measured"].items():
        print(f"{name:34} {_in_short(value)}")
    for name, reason in record["not_measured"].items():
        print(f"{name:34} not measured: {reason}")
    print(f"written to {arguments.out}")
    return 0


def _in_short(value) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g}  ({value['p20']:.4g} to {value['p80']:.4g})"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
