"""``torchrun -m pcfast train``: restarts after a failure, SIGTERM, and two machines' launchers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ENVIRONMENT, command, on_processes

from pcfast.cli import main

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 120
EPOCHS = 3
MODEL = """
import os, pathlib, time, torch
from torch import nn

class Waits(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        {line}
        return x

def make():
    return nn.Sequential(nn.Sequential(nn.Linear(64, 8), Waits(), nn.Tanh(), nn.Dropout(0.2)), nn.Linear(8, 10))
"""
OPTIONS = ("--batch-size", 200, "--num-steps", 3, "--epochs", EPOCHS, "--backend", "eager")


def options(folder: Path, line: str = "") -> list[str]:
    """Of ``pcfast train``, for a network that runs ``line`` in its forward pass."""
    file = folder / "mynet.py"
    file.write_text(MODEL.format(line=line))
    return ["train", "--model", f"{file}:make", "--out", f"{folder / 'run'}", *map(str, OPTIONS)]


@contextlib.contextmanager
def torchrun(*arguments: object) -> Iterator[subprocess.Popen]:
    """A launcher in a session of its own, all of which is killed at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    launcher = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    workers: set[int] = set()
    try:
        yield launcher
    finally:
        workers |= _children(launcher.pid)
        for number in (launcher.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        launcher.communicate()


def _children(number: int) -> set[int]:
    """torchrun's workers are in sessions of their own."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(number)], capture_output=True, text=True)
    return {int(child) for child in listed.stdout.split()}


def weights(folder: Path) -> list[torch.Tensor]:
    return list(torch.load(folder / "run" / "checkpoint.pt", weights_only=True)["model"].values())


def test_a_restart_goes_on_from_the_jobs_own_checkpoint(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    killed = parts / "killed"
    dies = (
        f"if os.environ.get('RANK') == '1' and self.calls > 12 and not (f := pathlib.Path('{killed}')).exists():"
        " f.touch(), os.kill(os.getpid(), 9)"
    )
    assert main(options(parts, dies)) == 0  # an earlier run of the same settings, which is not gone on with
    assert on_processes(command, 2, *options(whole))[0][0] == 0
    flags = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
    logs = ("--log", "csv")  # behind --: torchrun knows several options that begin so
    with torchrun(*flags, "-m", "pcfast", "--", *options(parts, dies), *logs) as launcher:
        said, _ = launcher.communicate(timeout=LIMIT_S)
        assert launcher.returncode == 0, said
    assert killed.exists() and "another process of the run is gone" in said
    assert [said.count(f"epoch {n}/{EPOCHS}") for n in (1, 2, 3)] == [1, 1, 1], said
    assert (parts / "run" / "earlier-1" / "checkpoint.pt").is_file()
    assert len((parts / "run" / "scalars.csv").read_text().splitlines()) == 1 + EPOCHS
    assert all(map(torch.equal, weights(parts), weights(whole)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_sigterm_saves_on_two_launchers(tmp_path):
    """Which meet as on two machines; the run is then finished in one process."""
    flags = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint")
    slow = options(tmp_path, "time.sleep(0.02)")
    slow[slow.index("--epochs") + 1] = "1000"
    with contextlib.ExitStack() as stack:
        where = f"localhost:{free_port()}"
        both = [stack.enter_context(torchrun(*flags, where, "-m", "pcfast", *slow)) for _ in range(2)]
        deadline = time.monotonic() + LIMIT_S
        while not (tmp_path / "run" / "log.csv").exists():
            assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in both)
            time.sleep(0.1)
        for launcher in both:
            launcher.send_signal(signal.SIGTERM)
        said = "".join(launcher.communicate(timeout=LIMIT_S)[0] for launcher in both)
    assert said.count("training stopped after") == 1 and "--resume" in said, said
    done = len((tmp_path / "run" / "log.csv").read_text().splitlines()) - 1
    finish = ["train", "--out", f"{tmp_path / 'run'}", "--resume", "--epochs", str(done + 1)]
    assert main(finish) == 0
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) - 1 == done + 1
