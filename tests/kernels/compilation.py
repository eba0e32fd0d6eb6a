"""Triton kernels compiled for real chips, without one: registers, spills, shared memory, instructions, hazards.

python tests/kernels/compilation.py            # compile kernel_cases.CASES, compare them with compile_limits.json
python tests/kernels/compilation.py --record   # and write compile_limits.json
python tests/kernels/compilation.py --full     # compile kernel_cases.FULL; no recorded limits, only the chips' own
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["Case", "Result", "check", "compile_kernels", "matrix_instruction", "read_limits", "record"]

TESTS = Path(__file__).parent
LIMITS = TESTS / "compile_limits.json"
RECORD = "python tests/kernels/compilation.py --record"

PROCESSES = 2
CASES_A_START = 4  # that take as long to compile as a process takes to start
TIMEOUT = 300.0  # seconds a case; the slowest known, 64x128x128 fp32 without tensor cores, takes 40

# Shared memory that one block can have.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS = 255
# Another release of ptxas allots a few registers more or fewer; the hardware allots them by eights.
REGISTER_SLACK = 8

# Newest first: of several in a kernel the first is the one that counts.
MATRIX_INSTRUCTIONS = ("tcgen05", "wgmma", "mma.sync")


@dataclasses.dataclass(frozen=True)
class Case:
    """One compile of one kernel.

    Args:
        name: with ``capability`` the key in the limits file.
        kernel: "package.module:function".
        signature: type by argument, "*fp32", "*bf16", "*i64", "i32", "i64" or "fp32", of all but the constants.
        constexprs: value by argument; integers that are 1 at every launch belong here too.
        divisible: arguments that are multiples of 16 (pointers in bytes), which triton finds out at a launch.
        capability: of the chip, 80 for sm_80 and so on; 90 and above mean sm_90a and so on.
        max_registers: that ptxas may give a thread; None: what it finds best.
        instruction: matrix instruction that the kernel must contain, see `matrix_instruction`.
    """

    name: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    capability: int
    divisible: Sequence[str] = ()
    warps: int = 4
    stages: int = 2
    max_registers: int | None = None
    instruction: str | None = None

    @property
    def key(self) -> str:
        """The same for cases that are the same to the compiler."""
        fields = dataclasses.asdict(self)
        return json.dumps(
            {name: fields[name] for name in fields.keys() - {"name", "instruction"}}, sort_keys=True
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a case. With an ``error``, the compiler's message, the figures mean nothing."""

    case: Case
    seconds: float
    error: str = ""
    registers: int = 0
    spills: int = 0  # bytes stored and loaded
    shared: int = 0  # bytes
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)  # how many of each are in the PTX
    hazards: Sequence[str] = ()  # in the PTX, and for sm_90a in the machine code

    @property
    def matrix(self) -> str | None:
        """The matrix instruction that the kernel runs on."""
        return next((name for name in MATRIX_INSTRUCTIONS if self.instructions.get(name)), None)


def matrix_instruction(capability: int, rows: int, warps: int) -> str:
    """What a dot of bf16 or tf32 with so many rows in its tile compiles to on a chip."""
    if rows >= 64 and warps >= 4:
        return {90: "wgmma", 100: "tcgen05"}.get(capability, "mma.sync")
    return "mma.sync"


# ---------------------------------------------------------------------------------------------------------- compiling

_results: dict[str, dict] = {}  # by Case.key, for the life of the process
_idle: list[tuple[dict[str, str], subprocess.Popen]] = []  # (environment, process) that wait for cases


def compile_kernels(cases: Sequence[Case], report: Callable[[Result], None] | None = None) -> list[Result]:
    """Compile, two at a time; what was compiled before in this process is not compiled again.

    ``report`` gets every new result when it is there, from another thread.
    """
    pending: queue.SimpleQueue[Case] = queue.SimpleQueue()
    unknown = {case.key: case for case in cases if case.key not in _results}
    for case in unknown.values():
        pending.put(case)
    count = min(PROCESSES, -(-len(unknown) // CASES_A_START))
    with ThreadPoolExecutor(max(1, count)) as threads:
        for worker in [threads.submit(_work, pending, report) for _ in range(count)]:
            worker.result()
    return [Result(case, **_results[case.key]) for case in cases]


def _work(pending: queue.SimpleQueue[Case], report: Callable[[Result], None] | None) -> None:
    """Compile what is pending in a process of its own, a new one after a crash."""
    environment, process = _start()
    try:
        while True:
            case = pending.get_nowait()
            if process.poll() is not None:
                process.communicate()
                environment, process = _start()
            _results[case.key] = _ask(process, case)
            if report is not None:
                report(Result(case, **_results[case.key]))
    except queue.Empty:
        return
    finally:
        _idle.append((environment, process))


def _start() -> tuple[dict[str, str], subprocess.Popen]:
    """(environment, process): one that waits, else a new one."""
    unseen = ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in unseen}
    # the kernels of this checkout, whatever is installed
    path = os.pathsep.join([str(TESTS.parents[1]), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": _cache().name}
    for place, (known, process) in enumerate(_idle):
        if known == environment and process.poll() is None:
            return _idle.pop(place)
    process = subprocess.Popen(
        [sys.executable, TESTS / "compile_worker.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return environment, process


@functools.cache
def _cache() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@atexit.register
def _end() -> None:
    for _, process in _idle:
        process.communicate()  # closes its pipes, upon which it ends


def _ask(process: subprocess.Popen, case: Case) -> dict:
    overdue = threading.Timer(TIMEOUT, process.kill)
    overdue.start()
    try:
        process.stdin.write(case.key + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        overdue.cancel()
    if line:
        return json.loads(line)
    return {
        "error": f"the compiler ended with code {process.wait()}, or took {TIMEOUT:.0f} s",
        "seconds": 0.0,
    }


# ----------------------------------------------------------------------------------------------------------- checking


def check(result: Result, limits: dict | None) -> list[str]:
    """What is wrong with a result, one line each.

    Args:
        limits: the case's recorded "registers", "shared", "spills" and "instruction"; None for the chip's alone.
    """
    case = result.case
    at = f"{case.name}, sm_{case.capability}"
    if result.error:
        return [f"{at}: {result.error}"]
    most_shared = SHARED_MEMORY[case.capability]
    most_registers, most_spills = REGISTERS, 0
    problems = [f"{at}: {hazard}" for hazard in result.hazards]
    if limits is not None:
        most_shared = min(most_shared, limits["shared"])
        most_registers = min(most_registers, limits["registers"] + REGISTER_SLACK)
        most_spills = limits["spills"]
        if result.matrix != limits["instruction"]:
            problems.append(f"{at}: runs on {result.matrix}, recorded is {limits['instruction']}")
    if result.spills > most_spills:
        problems.append(f"{at}: {result.spills} bytes spilled, at most {most_spills}")
    if result.registers > most_registers:
        problems.append(f"{at}: {result.registers} registers, at most {most_registers}")
    if result.shared > most_shared:
        problems.append(f"{at}: {result.shared} bytes of shared memory, at most {most_shared}")
    if case.instruction is not None and not result.instructions[case.instruction]:
        problems.append(f"{at}: no {case.instruction}, but {result.matrix or 'no matrix instruction'}")
    return problems


def read_limits(path: Path = LIMITS) -> dict[str, dict[str, dict]]:
    """Name -> capability -> limits."""
    return json.loads(path.read_text()) if path.exists() else {}


def check_recorded(results: Sequence[Result], recorded: dict[str, dict[str, dict]]) -> list[str]:
    """What is wrong with the results, and what of them is not in the limits file."""
    problems = []
    for result in results:
        name, capability = result.case.name, str(result.case.capability)
        limits = recorded.get(name, {}).get(capability)
        problems += check(result, limits)
        if limits is None:
            problems.append(f"{name}, sm_{capability}: no recorded limits; {RECORD}")
    return problems


def check_in_use(cases: Sequence[Case], recorded: dict[str, dict[str, dict]]) -> list[str]:
    """What the limits file has that is no case."""
    known = {(case.name, str(case.capability)) for case in cases}
    limits = {(name, capability) for name, chips in recorded.items() for capability in chips}
    return [
        f"{name}, sm_{capability}: recorded, but no case; {RECORD}"
        for name, capability in sorted(limits - known)
    ]


def record(results: Sequence[Result], path: Path = LIMITS) -> None:
    """Write the limits file, of results within the chips' limits only."""
    problems = [problem for result in results for problem in check(result, None)]
    if problems:
        raise ValueError("not recorded:\n" + "\n".join(problems))
    limits: dict[str, dict[str, dict]] = {}
    for result in results:
        chips, capability = limits.setdefault(result.case.name, {}), str(result.case.capability)
        if capability in chips:
            raise ValueError(f"not recorded: two cases are named {result.case.name}, sm_{capability}")
        chips[capability] = {
            "registers": result.registers,
            "shared": result.shared,
            "spills": result.spills,
            "instruction": result.matrix,
        }
    path.write_text(json.dumps(limits, indent=2, sort_keys=True) + "\n")


def _print(result: Result) -> None:
    case = result.case
    figures = f"{result.registers} registers, {result.shared} bytes shared, {result.matrix or 'no matrices'}"
    if result.spills:
        figures += f", {result.spills} bytes spilled"
    if result.error:
        figures = "error"
    print(f"{result.seconds:5.1f} s  {case.name}, sm_{case.capability}: {figures}", flush=True)


def main() -> None:
    import kernel_cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {LIMITS.relative_to(TESTS.parent)}")
    parser.add_argument(
        "--full", action="store_true", help="the full matrix of cases, against the chips' limits"
    )
    arguments = parser.parse_args()
    if arguments.record and arguments.full:
        parser.error("limits are recorded of the tested cases, not of the full matrix")
    cases = kernel_cases.FULL if arguments.full else kernel_cases.CASES
    results = compile_kernels(cases, report=_print)
    if arguments.record:
        try:
            record(results)
        except ValueError as error:
            sys.exit(str(error))
        return
    if arguments.full:
        problems = [problem for result in results for problem in check(result, None)]
    else:
        problems = check_recorded(results, read_limits()) + check_in_use(cases, read_limits())
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    import compilation  # the module that kernel_cases imports, not a second copy of it

    compilation.main()
