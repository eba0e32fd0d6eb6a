"""``pcfast train`` on the GPUs that are here, one a process, over nccl: the run of one process on a CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from processes import command, on_processes

from pcfast.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif("PCFAST_FAKE_CUDA" in os.environ, reason="with CUDA faked: nccl needs devices"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no nccl"),
]
OPTIONS = (
    "train",
    "--widths",
    16,
    "--num-steps",
    3,
    "--epochs",
    2,
    "--batch-size",
    200,
    "--precision",
    "fp64",
)


def trained(folder) -> list[torch.Tensor]:
    return list(torch.load(folder / "checkpoint.pt", weights_only=True)["model"].values())


def test_gpus_learn_what_a_cpu_learns(tmp_path):
    size = min(torch.cuda.device_count(), 4)
    given = (*OPTIONS, "--backend", "eager", "--out")
    answers = on_processes(command, size, *given, tmp_path / "gpus", "--device", "cuda", limit=180)
    assert [status for status, *_ in answers] == [0] * size, answers
    assert main([str(argument) for argument in (*given, tmp_path / "cpu", "--device", "cpu")]) == 0
    for result, truth in zip(trained(tmp_path / "gpus"), trained(tmp_path / "cpu"), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-12)


def test_more_processes_than_gpus_are_refused(tmp_path):
    size = torch.cuda.device_count() + 1
    answers = on_processes(command, size, *OPTIONS, "--out", tmp_path / "run", "--device", "cuda", limit=180)
    assert [status for status, *_ in answers] == [2] * size
    assert "--nproc-per-node" in answers[0][2] and not any(said for *_, said in answers[1:])
