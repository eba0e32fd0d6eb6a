"""A child qualifies the resident kernel, compiled for the CPU, with planted faults; what "auto" makes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from kernel_networks import mlp
from native_build import needs_gcc
from torch import nn

import pcfast
from pcfast.backends import BACKENDS, choice, kernel_backend
from pcfast.backends.cuda import native
from pcfast.backends.qualification import record, run
from pcfast.backends.qualification.record import UNTESTED
from pcfast.relaxation import contest

pytestmark = needs_gcc

# the resident kernel is launched through a wrapper that does to each kind what the kind's name is for
CHILD = """
import os, sys, torch
sys.path.insert(0, {root!r})
from pcfast.backends.cuda import launch
from pcfast.checking import qualification as q
found, check, bits, relax = q.kinds_on, q.check_kind, q._check_bits, launch.relax
at_work, runs = [], []
def few(device):
    kinds, unavailable = found(device)
    return [kind for kind in kinds if kind.precision == "ieee"], unavailable
def check_kind(kind, device):
    at_work[:] = [kind.name]
    check(kind, device)
def check_bits(*arguments):
    runs.clear()
    bits(*arguments)
def faulty(*arguments, **settings):
    outputs = relax(*arguments, **settings)
    runs.append(1)
    if at_work == ["convolution"]:
        os.abort()
    if at_work == ["pooling"]:
        outputs.errors[2].mul_(1.001)
    if at_work == ["gram"] and len(runs) == 2:
        outputs.beliefs[2].view(-1)[0].mul_(1 + 2**-22)
    if at_work == ["momentum"]:
        raise RuntimeError("an illegal memory access was encountered")
    if at_work == ["start"]:
        raise torch.OutOfMemoryError("another process has it all")
    return outputs
q.kinds_on, q.check_kind, q._check_bits, launch.relax = few, check_kind, check_bits, faulty
q.main()
"""


@pytest.fixture
def automatic(host_module, monkeypatch, tmp_path):
    monkeypatch.setenv(native.ON_HOST, str(host_module))
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(kernel_backend, "AUTOMATIC_DEVICES", ("cpu",))
    monkeypatch.setattr(BACKENDS["cpu"], "automatic", lambda device: (False, "the CPU stands for a GPU"))
    choice.forget()
    yield
    choice.forget()


def test_faults_of_each_kind_are_found_and_auto_runs_the_others(automatic, monkeypatch):
    root = str(Path(pcfast.__file__).resolve().parent.parent)
    code, started = CHILD.format(root=root), []
    monkeypatch.setattr(run, "command", lambda: started.append(1) or [sys.executable, "-c", code])
    cpu = torch.device("cpu")
    pcfast.qualify("cpu", limit_s=300, kind_limit_s=200)
    found = record.load(cpu)
    reasons = {kind.name: verdict.reason for kind, verdict in found.verdicts.items()}
    assert {name for name, reason in reasons.items() if not reason} == {"linear", "pointwise"}
    assert {kind.name for kind, verdict in found.verdicts.items() if verdict.status == UNTESTED} == {"start"}
    assert "another process has it all" in reasons["start"]
    assert "SIGABRT" in reasons["convolution"] and "illegal memory access" in reasons["momentum"]
    assert "error" in reasons["pooling"] and "bound" in reasons["pooling"]
    assert reasons["gram"] == "belief 2 has other bits when the same relaxation runs again"
    assert len(started) == 3 and set(found.unavailable) == {"triton"}

    model, x, y = mlp(12, 20, 33, 10), torch.randn(5, 12), torch.randint(0, 10, (5,))
    monkeypatch.setattr(contest, "in_turns", lambda ready, clock, rounds: ({"cuda": 0.1, "eager": 0.3}, {}))
    result = pcfast.relax(model, x, y, num_steps=3)
    assert result.run.plan.backend == "cuda"
    assert dict(result.run.plan.refusals)["eager"] == "300 ms a relaxation here, cuda 100 ms"
    momentum = pcfast.relax(model, x, y, num_steps=3, belief_optimizer=pcfast.GradientDescent(momentum=0.5))
    assert momentum.run.plan.backend == "eager"
    convolution = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten()), nn.Linear(8, 3)
    )
    explained = pcfast.explain(convolution, (5, 1, 6, 6))
    assert (
        "cuda convolution in ieee is not qualified on this device: the child process was killed by SIGABRT"
        in (explained.refused["cuda"])
    )
