"""Peak memory of a step on a CPU: a process of its own, since memory that a process freed is not given back.

    python -m pcfast.bench.memory WORKLOAD CONTENDER PRECISION    # prints bytes

Counts what the process held at most above what it held once network, data and libraries were there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def in_a_process(workload: str, contender: str, precision: str) -> int | None:
    """Bytes, measured in a fresh process; None where the system does not tell (Linux does)."""
    command = [sys.executable, "-m", "pcfast.bench.memory", workload, contender, precision]
    result = subprocess.check_output(command, text=True).split()[-1]
    return None if result == "None" else int(result)


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(workload: str, contender: str, precision: str) -> int | None:
    """In this process, of which nothing like it has run before."""
    from pcfast.precision import parameter_dtype

    from .contenders import CONTENDERS, switches
    from .workloads import WORKLOADS

    device = torch.device("cpu")
    model, x, y = WORKLOADS[workload].draw(device)
    model, x = model.to(parameter_dtype(precision)), x.to(parameter_dtype(precision))
    with switches(precision, device):
        tiny = WORKLOADS["tiny_exact"]
        CONTENDERS["backpropagation"].prepare(tiny, *tiny.draw(device), precision).run()  # libraries
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of what was imported
        except OSError:
            return None
        before = _status("VmRSS")
        step = CONTENDERS[contender].prepare(WORKLOADS[workload], model, x, y, precision)
        step.run()
        step.run()
        step.wait()
        return _status("VmHWM") - before


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
