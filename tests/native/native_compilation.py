"""CUDA kernels compiled for real chips, without one: registers, spills, stack, shared memory.

python tests/native/native_compilation.py            # compile every .cu of csrc/, compare with compile_limits.json
python tests/native/native_compilation.py --record   # and write compile_limits.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = [
    "Case",
    "Kernel",
    "Result",
    "cases",
    "check",
    "check_recorded",
    "compile_sources",
    "read_limits",
    "record",
]

TESTS = Path(__file__).parent
CSRC = TESTS.parents[1] / "csrc"
LIMITS = TESTS / "compile_limits.json"
RECORD = "python tests/native/native_compilation.py --record"

CHIPS = ("80", "90a", "100a", "120a")
#: Those of every test run; ``make compile-all`` compiles for all.
QUICK_CHIPS = ("80", "90a")
PROCESSES = 2
TIMEOUT = 600.0  # seconds a case
# Another release of ptxas allots a few registers more or fewer.
REGISTER_SLACK = 8
# As in CMakeLists.txt.
OPTIONS = ("-std=c++17", "-O3", "-lineinfo", '-DPCFAST_ARCHITECTURES=""', "-Werror=all-warnings")


@dataclasses.dataclass(frozen=True)
class Case:
    """One source compiled for one chip, "80" for sm_80 and so on."""

    source: Path
    chip: str

    @property
    def name(self) -> str:
        return (
            self.source.relative_to(CSRC).as_posix() if self.source.is_relative_to(CSRC) else self.source.name
        )


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of a kernel, or of a function that it did not inline. All but registers are in bytes.

    Attributes:
        name: the source's and the kernel's, without parameters.
        chip: as in `Case`.
        spills: stored and loaded.
        shared: static; what a launch asks for is not in it.
    """

    name: str
    chip: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a case. With an ``error``, the compiler's message, there are no kernels."""

    case: Case
    seconds: float
    error: str = ""
    kernels: tuple[Kernel, ...] = ()


def release() -> str:
    """Of nvcc, "13.0"."""
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def cases(wanted: Sequence[str] = CHIPS) -> list[Case]:
    """Every source for every wanted chip that nvcc knows."""
    known = subprocess.run(
        ["nvcc", "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    chips = [chip for chip in wanted if f"sm_{chip.rstrip('a')}" in known]
    return [Case(source, chip) for source in sorted(CSRC.rglob("*.cu")) for chip in chips]


# ---------------------------------------------------------------------------------------------------------- compiling

_results: dict[Case, Result] = {}  # for the life of the process


def compile_sources(wanted: Sequence[Case], report: Callable[[Result], None] | None = None) -> list[Result]:
    """Compile, two at a time; what was compiled before in this process is not compiled again.

    ``report`` gets every new result when it is there, from another thread.
    """

    def work(case: Case) -> None:
        _results[case] = _compile(case)
        if report is not None:
            report(_results[case])

    with ThreadPoolExecutor(PROCESSES) as threads:
        list(threads.map(work, [case for case in dict.fromkeys(wanted) if case not in _results]))
    return [_results[case] for case in wanted]


def _compile(case: Case) -> Result:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{case.chip},code=sm_{case.chip}"
        command = ["nvcc", *OPTIONS, target, "-cubin", "-Xptxas", "-v", "-o", f"{folder}/cubin", case.source]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return Result(case, TIMEOUT, f"the compiler took more than {TIMEOUT:.0f} s")
    seconds = time.perf_counter() - begin
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        return Result(case, seconds, said or f"the compiler ended with code {done.returncode}")
    return Result(case, seconds, kernels=tuple(read_kernels(said, case)))


def read_kernels(said: str, case: Case) -> list[Kernel]:
    """What ``ptxas -v`` said, one by one."""
    result: list[dict] = []
    for line in said.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            result.append({"name": match[1]})
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            result[-1].update(stack=int(match[1]), spills=int(match[2]) + int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            result[-1].update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    names = _readable([figures.pop("name") for figures in result])
    return [
        Kernel(f"{case.name}: {name}", case.chip, **figures)
        for name, figures in sorted(zip(names, result, strict=True), key=lambda each: each[0])
    ]


def _readable(mangled: Sequence[str]) -> list[str]:
    """Names as in the source, without return type and parameters; as they are where there is no c++filt."""
    if not mangled or shutil.which("c++filt") is None:
        return list(mangled)
    text = "\n".join(mangled)
    lines = subprocess.run(
        ["c++filt"], input=text, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return [_without_parameters(line) for line in lines]


def _without_parameters(name: str) -> str:
    depth = 0
    for i in range(len(name) - 1, -1, -1) if name.endswith(")") else ():
        depth += (name[i] == ")") - (name[i] == "(")
        if depth == 0:
            return name[:i].removeprefix("void ")
    return name


# ----------------------------------------------------------------------------------------------------------- checking


def check(kernel: Kernel, limits: dict | None, slack: int = 0) -> list[str]:
    """What is wrong with a kernel, one line each.

    Args:
        limits: its recorded "registers", "stack" and "shared"; None to look for spills alone.
        slack: registers that it may have more.
    """
    at = f"{kernel.name}, sm_{kernel.chip}"
    problems = [f"{at}: {kernel.spills} bytes spilled, at most 0"] if kernel.spills else []
    if limits is None:
        return problems
    if kernel.registers > limits["registers"] + slack:
        problems.append(f"{at}: {kernel.registers} registers, at most {limits['registers'] + slack}")
    if kernel.stack > limits["stack"]:
        problems.append(f"{at}: {kernel.stack} bytes of stack, at most {limits['stack']}")
    if kernel.shared > limits["shared"]:
        problems.append(f"{at}: {kernel.shared} bytes of shared memory, at most {limits['shared']}")
    return problems


def read_limits(path: Path = LIMITS) -> dict:
    """ "nvcc": the release; "kernels": name -> chip -> limits."""
    return json.loads(path.read_text()) if path.exists() else {"nvcc": "", "kernels": {}}


def check_recorded(results: Iterable[Result], recorded: dict, nvcc: str) -> list[str]:
    """What is wrong with the results, and where the limits file does not fit the kernels.

    Args:
        nvcc: the release that the results are of.
    """
    results = list(results)
    slack = 0 if nvcc == recorded["nvcc"] else REGISTER_SLACK
    problems = [_failed(result) for result in results if result.error]
    kernels = recorded["kernels"]
    unused = {(name, chip) for name, chips in kernels.items() for chip in chips}
    for kernel in (kernel for result in results for kernel in result.kernels):
        unused.discard((kernel.name, kernel.chip))
        limits = kernels.get(kernel.name, {}).get(kernel.chip)
        problems += check(kernel, limits, slack)
        if limits is None:
            problems.append(f"{kernel.name}, sm_{kernel.chip}: no recorded limits; {RECORD}")
    # of what was not compiled nothing can be said
    failed = {(result.case.name, result.case.chip) for result in results if result.error}
    chips = {result.case.chip for result in results} or set(CHIPS)
    problems += [
        f"{name}, sm_{chip}: recorded, but no such kernel; {RECORD}"
        for name, chip in sorted(unused)
        if chip in chips and (name.partition(": ")[0], chip) not in failed
    ]
    return problems


def record(results: Iterable[Result], nvcc: str, path: Path = LIMITS) -> None:
    """Write the limits file, of results without errors and spills only."""
    results = list(results)
    found = [kernel for result in results for kernel in result.kernels]
    problems = [_failed(result) for result in results if result.error]
    problems += [problem for kernel in found for problem in check(kernel, None)]
    kernels: dict[str, dict[str, dict]] = {}
    for kernel in found:
        chips = kernels.setdefault(kernel.name, {})
        if kernel.chip in chips:
            problems.append(f"{kernel.name}, sm_{kernel.chip}: two kernels have this name")
        chips[kernel.chip] = {name: getattr(kernel, name) for name in ("registers", "shared", "stack")}
    if problems:
        raise ValueError("not recorded:\n" + "\n".join(problems))
    path.write_text(json.dumps({"nvcc": nvcc, "kernels": kernels}, indent=2, sort_keys=True) + "\n")


def _failed(result: Result) -> str:
    return f"{result.case.name}, sm_{result.case.chip}: {result.error}"


def _print(result: Result) -> None:
    at = f"{result.seconds:5.1f} s  {result.case.name}, sm_{result.case.chip}"
    lines = [f"{at}: {'error' if result.error else f'{len(result.kernels)} kernels'}"]
    for kernel in result.kernels:
        figures = f"{kernel.registers} registers, {kernel.stack} bytes stack, {kernel.shared} bytes shared"
        if kernel.spills:
            figures += f", {kernel.spills} bytes spilled"
        lines.append(f"         {kernel.name.partition(': ')[2]}: {figures}")
    print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {LIMITS.relative_to(TESTS.parent)}")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on PATH: install the CUDA toolkit, or add its bin folder to PATH")
    results = compile_sources(cases(), report=_print)
    if arguments.record:
        try:
            record(results, release())
        except ValueError as error:
            sys.exit(str(error))
        return
    problems = check_recorded(results, read_limits(), release())
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
