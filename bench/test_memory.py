"""Peak memory of a strict step on mlp_600 does not grow with the number of iterations."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch, pcfast
from pcfast import networks
torch.manual_seed(0)
model, x, y = networks.mlp_600(), torch.rand(300, 784), torch.randint(0, 10, (300,))
for _ in range(2):
    pcfast.pc_loss(model, x, y, num_steps=int(sys.argv[1])).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak(num_steps: int) -> int:
    """Peak resident memory of a fresh process, MiB."""
    return int(subprocess.check_output([sys.executable, "-c", PROGRAM, str(num_steps)], text=True))


@pytest.mark.benchmark(group="memory")
def test_peak_memory(benchmark):
    few, many = peak(20), benchmark.pedantic(peak, args=(200,), rounds=1)
    benchmark.extra_info.update(mib_n20=few, mib_n200=many)
    print(f"\npeak memory of the process: {few} MiB with 20 iterations, {many} MiB with 200")
    assert many <= few * 1.02
