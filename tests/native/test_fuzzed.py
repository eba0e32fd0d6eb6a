"""The native entry with nonsense: launches with wrong numbers, lengths and null pointers give a status.

PCFAST_FUZZ_SECONDS=60 (make fuzz) takes a minute instead of a few seconds.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from installing import ROOT
from kernel_networks import RESIDENT, drawn
from native_build import needs_gcc

import pcfast
from pcfast.backends.cuda import native
from pcfast.backends.cuda.kernel_params import Program
from pcfast.precision import switched

pytestmark = needs_gcc
SECONDS = float(os.environ.get("PCFAST_FUZZ_SECONDS", "4"))


def programs(launch: tuple) -> Program:
    return Program.from_buffer_copy(launch[0])


@pytest.fixture(scope="module")
def launches(host_module) -> list[tuple]:
    """Arguments of launches of every network of the resident kernel, in every precision; their tensors are gone."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ON_HOST, str(host_module))
        module = native.load()
        run = module.resident
        patch.setattr(module, "resident", lambda *a: seen.append(a[:5]) or run(*a))
        for name in RESIDENT:
            model, x, y = drawn(RESIDENT, name, batch=3)
            for change in ({}, {"belief_optimizer": pcfast.GradientDescent(momentum=0.5)}):
                pcfast.pc_loss(model, x, y, backend="cuda", num_steps=2, **change).backward()
            for precision in (
                switched(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
                switched(torch.backends.cudnn.conv, "fp32_precision", "tf32"),
                torch.autocast("cpu", torch.bfloat16),
            ):
                with precision:
                    pcfast.pc_loss(model, x, y, backend="cuda", num_steps=2)
            pcfast.pc_loss(model.double(), x.double(), y, backend="cuda", num_steps=2)
    assert {program.layers[1].operand for program in map(programs, seen)} == {0, 1, 2}
    return seen


def test_nonsense_gives_a_status_and_never_a_crash(launches, host_module, tmp_path):
    (tmp_path / "launches").write_bytes(pickle.dumps(launches))
    seed = random.SystemRandom().randrange(10**9)
    command = [
        sys.executable,
        Path(__file__).with_name("fuzz_resident.py"),
        host_module,
        tmp_path / "launches",
    ]
    done = subprocess.run(
        [*command, str(SECONDS), str(seed)], capture_output=True, text=True, cwd=ROOT, timeout=SECONDS + 60
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, f"status {done.returncode} at seed {last}: {done.stderr[-1000:]}"
    counts = json.loads(last)
    # 1, cudaErrorInvalidValue: the launch itself, of a block with more shared memory than there is
    assert counts.get("-1", 0) > 20 and counts.get("0", 0) > 0 and set(counts) <= {"-1", "0", "1"}, counts


def test_lengths_are_compared(launches, host_module, monkeypatch):
    monkeypatch.setenv(native.ON_HOST, str(host_module))
    module = native.load()
    program, tensors, run, scalar_bytes, threads = launches[0]
    for i in range(3):
        for change in (lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""):
            given = [program, tensors, run]
            given[i] = change(given[i])
            assert module.resident(*given, scalar_bytes, threads, 0) == -1
