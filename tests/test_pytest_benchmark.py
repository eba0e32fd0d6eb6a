"""``pytest bench``: a run of it, what it keeps beside the times, and that nothing wrong is timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pcfast.bench.microbenchmarks.case import Case, Way
from pcfast.bench.microbenchmarks.rounding import Judgement

ROOT = Path(__file__).resolve().parent.parent

# Backpropagation whose updates are a thousandth too large, for the process that imports it.
PLANTED = """
from dataclasses import replace
from pcfast.bench.contenders import CONTENDERS

right = CONTENDERS["backpropagation"]

def prepare(*arguments):
    step = right.prepare(*arguments)
    return replace(step, updates=lambda: [1.001 * update for update in step.updates()])

CONTENDERS["backpropagation"] = replace(right, prepare=prepare)
"""


def test_a_run_keeps_floors_and_refuses_what_is_wrong(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "planted.py").write_text(PLANTED)
    record = tmp_path / "record.json"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PCFAST_"))
    }
    environment |= {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "200",
    }
    environment.pop("TRITON_INTERPRET", None)
    chosen = "tiny_exact and (eager or backpropagation or triton) or pointwise_gram"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-p", "planted", "--benchmark-only", "--benchmark-max-time=0.01",
         f"--benchmark-json={record}", "-k", chosen, "-rsf"],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment,
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert re.search(
        r"FAILED .*tiny_exact-ieee-backpropagation\] - Failed: gate closed: update .* off in float64", said
    )
    assert "need a GPU" in said and "kernels are timed on a GPU alone" in said and "warning" not in said
    (timed,) = json.loads(record.read_text())["benchmarks"]
    assert timed["params"] == {"workload": "tiny_exact", "precision": "ieee", "contender": "eager"}
    assert timed["group"].startswith("tiny_exact in ieee: 4-3-3-3-2 relu")
    extra, seconds = timed["extra_info"], timed["stats"]["median"]
    assert extra["multiply_adds"] == 192 and 0 < extra["error"] <= extra["bound"]
    assert extra["seconds"] == seconds and extra["of_floor"] == pytest.approx(
        extra["floor_seconds"] / seconds
    )


def test_the_suite_leaves_the_plugin_out(request):
    """It warns beside xdist, and warnings are errors here."""
    assert not request.config.pluginmanager.hasplugin("benchmark")


# ---- a kernel's benchmark, with one of torch's operations in a kernel's place


@pytest.fixture
def benchmarks(monkeypatch):
    """The file, with one case: a sum that may be judged wrong."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sys.modules.pop("bench.test_benchmarks", None)
    from bench import test_benchmarks

    x, calls = torch.ones(8), []

    def ways(device):
        def launch():
            calls.append(x.sum())

        judgements = {"right": Judgement(1e-7, 0.5), "wrong": Judgement(1e-3, 40.0)}
        return [Way(name, "", launch, lambda j=j: j, times=2) for name, j in judgements.items()]

    case = Case("sum", "8 numbers", "fp32", 16, 64, ("right", "wrong"), ways)
    monkeypatch.setattr(test_benchmarks, "CASES", {"sum": (case, "")})
    rates = {"multiply_adds_per_s": 1e9, "copy_bytes_per_s": 1e9}
    monkeypatch.setattr(test_benchmarks, "kernel_ceilings", lambda precision: rates)
    test_benchmarks.ways_of.cache_clear()
    return test_benchmarks, calls


class Timer:
    """Stands in for the plugin's fixture."""

    def __init__(self) -> None:
        self.extra_info, self.group = {}, ""
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=4e-5))

    def __call__(self, work) -> None:
        work()


def test_a_kernels_floor_is_that_of_a_launch(benchmarks):
    module, calls = benchmarks
    timer = Timer()
    module.test_kernel(timer, None, "sum", "right")
    launches = module.microbenchmarks.LAUNCHES
    assert len(calls) == 2 * launches  # once to warm up
    # 64 bytes at 1 GB/s bind; a call does the work twice a launch
    assert (
        timer.extra_info["floor_seconds"] == pytest.approx(6.4e-8) and timer.extra_info["binding"] == "bytes"
    )
    assert timer.extra_info["seconds"] == pytest.approx(4e-5 / (2 * launches))
    assert timer.extra_info["of_floor"] == pytest.approx(6.4e-8 * 2 * launches / 4e-5)
    assert timer.group == "sum in fp32, 8 numbers"


def test_a_wrong_kernel_is_not_timed(benchmarks):
    module, calls = benchmarks
    timer = Timer()
    with pytest.raises(pytest.fail.Exception, match="gate closed: 40 times what rounding explains"):
        module.test_kernel(timer, None, "sum", "wrong")
    assert not calls and not timer.extra_info


def test_every_case_has_a_name_of_its_own_and_a_reason_without_a_gpu():
    pytest.importorskip("triton")
    from pcfast.bench.microbenchmarks import run

    cases = run.chosen_cases(("ieee", "tf32", "bf16"), ("cuda", "triton"), False, False)
    assert len({(case.kernel, case.size, case.precision) for case in cases}) == len(cases)
    assert all(len(set(case.labels)) == len(case.labels) > 0 for case in cases)
