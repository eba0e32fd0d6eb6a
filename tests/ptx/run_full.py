"""Every scenario of cases.py on every chip in every precision: make ptx."""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(TESTS.parent / name) for name in ("", "native", "kernels")]

import cases  # noqa: E402
import torch  # noqa: E402
from resident_files import resident_files  # noqa: E402


def problem(number: int, folder: str) -> str:
    """What is wrong with a case; "" if nothing."""
    torch.set_num_threads(1)
    case = cases.FULL[number]
    try:
        device, error, allowed = cases.run(case, lambda architecture: Path(folder) / f"{architecture}.ptx")
    except Exception as failure:  # the other cases are run all the same
        return f"{case.id}: {type(failure).__name__}: {failure}"
    missing = set(case.scenario.kernels) - set(cases.kernels_run(device))
    if missing:
        return f"{case.id}: {', '.join(missing)} did not run"
    if device.reports:
        return f"{case.id}: {len(device.reports)} reports, the first: {device.reports[0]}"
    return "" if error <= allowed else f"{case.id}: an error of {error:.1e}, allowed {allowed:.1e}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name, resident_files(Path(name)) as resident_ptx:
        for architecture in ("80", "90a"):
            resident_ptx(architecture)
        with ProcessPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            numbers = range(len(cases.FULL))
            problems = []
            for done, result in enumerate(
                pool.map(problem, numbers, [name] * len(numbers), chunksize=4), start=1
            ):
                if result:
                    problems.append(result)
                    print(result, flush=True)
                if done % 100 == 0:
                    print(f"{done} of {len(numbers)} cases", flush=True)
    print(f"{len(cases.FULL)} cases, {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
