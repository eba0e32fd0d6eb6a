"""``pcfast train --log``: scalars through CSV, TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from pathlib import Path

import pytest
import torch

import pcfast
from pcfast import networks
from pcfast.cli import main
from pcfast.diagnostics import diagnose, scalars
from pcfast.problem.settings import Settings
from pcfast.training import writers

QUICK = ("--widths", 16, "--num-steps", 6, "--batch-size", 200)
RELAXATION = {f"relaxation/{name}" for name in ("energy_first", "energy_last", "energy_left", "convergence")}


def run(*arguments: object) -> int:
    return main(["train", *map(str, (*QUICK, *arguments))])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scalars.csv", newline="") as file:
        return list(csv.DictReader(file))


def needs(library: str):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f'{library} is not installed (pip install "pcfast[{library}]")')


def test_a_log_changes_nothing_and_goes_on_with_its_run(tmp_path):
    for folder, log in (("plain", ()), ("logged", ("--log", "csv"))):
        assert run("--out", tmp_path / folder, "--epochs", 1, *log) == 0
        assert main(["train", "--out", str(tmp_path / folder), "--resume", "--epochs", "3", *log]) == 0
    plain, logged = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("plain", "logged"))
    assert all(torch.equal(plain[name], logged[name]) for name in plain)
    assert not (tmp_path / "plain" / "scalars.csv").exists()
    rows = rows_of(tmp_path / "logged")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and rows[0].keys() > RELAXATION
    with open(tmp_path / "logged" / "log.csv", newline="") as file:
        assert [row["test/loss"] for row in rows] == [row["test_loss"] for row in csv.DictReader(file)]
    assert run("--out", tmp_path / "logged", "--epochs", 1, "--log", "csv") == 0
    assert len(rows_of(tmp_path / "logged")) == 1 and len(rows_of(tmp_path / "logged" / "earlier-1")) == 3


def test_scalars_of_a_relaxation():
    model = networks.digits_mlp()
    x, y = torch.rand(32, 64), torch.randint(0, 10, (32,))
    state = torch.get_rng_state()
    values = scalars.of_relaxation(model, x, y, Settings(step_size=0.1, num_steps=8))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    result = diagnose(model.eval(), x, y, step_size=0.1, num_steps=8)
    energies = result.energies.sum(1)
    assert values["relaxation/energy_first"] == pytest.approx(energies[0].item())
    assert values["relaxation/energy_left"] == pytest.approx((energies[-1] / energies[0]).item())
    assert values["relaxation/convergence"] == pytest.approx(result.convergence[-1].item())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e3)
    diverged = scalars.of_relaxation(model, x, y, Settings(step_size=1e3, num_steps=30))
    assert diverged.keys() == RELAXATION and all(map(math.isnan, diverged.values()))
    for method in ("exact", "incremental", "error_based"):
        assert scalars.of_relaxation(model, x, y, Settings(method=method)) == {}


def test_a_callback_is_called_after_every_epoch():
    seen = []
    data = (torch.rand(8, 4), torch.arange(8) % 2, torch.rand(4, 4), torch.arange(4) % 2)
    model = networks.mlp((4, 3, 2))
    pcfast.training.train(
        model, data, epochs=2, progress=False, after_epoch=lambda m, h: seen.append((m is model, len(h)))
    )
    assert seen == [(True, 1), (True, 2)]


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_missing_library_is_named_before_training(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    assert run("--out", tmp_path / "run", "--log", library) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"pcfast[{library}]" in error and not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("--out", tmp_path, "--epochs", 2, "--log", "tensorboard", "--log", "csv") == 0
    assert main(["train", "--out", str(tmp_path), "--resume", "--epochs", "3", "--log", "tensorboard"]) == 0
    assert run("--out", tmp_path, "--epochs", 1, "--log", "tensorboard") == 0
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["1", "2"]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "1")).Reload()
    rows = rows_of(tmp_path / "earlier-1")
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"epoch"}
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert losses[0].value == pytest.approx(float(rows[0]["train/loss"]))


@needs("wandb")
def test_a_missing_login_is_known_before_training(tmp_path, monkeypatch, capsys):
    import wandb

    def refuses():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setenv("WANDB_MODE", "offline")  # read once a process
    monkeypatch.setattr(wandb, "login", refuses)
    assert run("--out", tmp_path / "run", "--log", "wandb") == 2
    assert "No API key" in capsys.readouterr().err and not (tmp_path / "run").exists()


@needs("wandb")
def test_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run("--out", tmp_path, "--epochs", 2, "--log", "wandb") == 0
    name = (tmp_path / "wandb-run").read_text()
    assert main(["train", "--out", str(tmp_path), "--resume", "--epochs", "3", "--log", "wandb"]) == 0
    assert (tmp_path / "wandb-run").read_text() == name
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}*/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 20  # its own process writes, and may go on after the run is finished
    while not all(b"train/loss" in file.read_bytes() for file in files):
        assert time.monotonic() < deadline, [file.read_bytes() for file in files]
        time.sleep(0.05)
