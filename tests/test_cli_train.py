"""``pcfast train``: what it leaves, resuming, precisions, data from files, and the default run on digits."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pcfast import datasets, networks, training
from pcfast.cli import main
from pcfast.files import results_folder
from pcfast.training import FILES, evaluate

QUICK = ("--widths", "16", "--num-steps", "3", "--batch-size", "200")


def run(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_default_run_learns_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert run() == 0
    assert time.monotonic() - start < 60
    lines = capsys.readouterr().out.splitlines()
    out = Path("runs/digits")
    for name in FILES:
        assert str(out / name) in lines and (out / name).is_file()
    accuracy = float(lines[-1].removeprefix("test accuracy ").removesuffix("%"))
    assert accuracy >= 95
    model = networks.digits_mlp()
    model.load_state_dict(checkpoint_of(out)["model"])
    data = datasets.digits()
    assert evaluate(model, data.x_test, data.y_test)[1] == pytest.approx(accuracy / 100, abs=1e-4)


def test_json_is_the_only_output(tmp_path, capsys):
    assert run("--out", tmp_path / "run", "--epochs", 2, *QUICK, "--json") == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert output.err == ""
    assert len(found["history"]["test_accuracy"]) == 2
    assert found["files"] == [str(tmp_path / "run" / name) for name in FILES]


def test_a_resumed_run_takes_its_options_from_its_folder(tmp_path, capsys):
    options = (
        "--method",
        "fixed_prediction",
        "--optimizer",
        "sgd",
        "--momentum",
        0.5,
        "--lr",
        0.3,
        "--loss",
        "mse",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("--out", whole, "--epochs", 3, *QUICK, *options, "--seed", 4) == 0
    assert run("--out", parts, "--epochs", 1, *QUICK, *options, "--seed", 4) == 0
    assert run("--out", parts, "--resume", "--epochs", 3) == 0
    a, b = checkpoint_of(whole)["model"], checkpoint_of(parts)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert config_of(parts)["kept"]["momentum"] == 0.5
    capsys.readouterr()
    assert run("--out", parts, "--resume") == 0  # to the 3 epochs of its last call
    assert "3 epochs already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--widths", "17"), ["--resume", "--widths 16, not 17"]),
        (("--net", "cnn"), ["--resume", "--net", "not cnn"]),
        (("--lr", "0.1"), ["--resume", "lr", "0.1"]),
        (("--precision", "bf16"), ["--resume", "precision", "bf16"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, words, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    before = {name: (out / name).read_bytes() for name in FILES}
    capsys.readouterr()
    assert run("--out", out, "--resume", "--epochs", 2, *change) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert {name: (out / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("damage", ["missing", "no run", "config", "checkpoint"])
def test_what_cannot_be_resumed_is_named(damage, tmp_path, capsys):
    out = tmp_path / "run"
    if damage != "missing":
        out.mkdir()
    if damage in ("config", "checkpoint"):
        assert run("--out", out, "--epochs", 1, *QUICK) == 0
        name = "config.json" if damage == "config" else "checkpoint.pt"
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert run("--out", out, "--resume") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--out" in error and str(out) in error


def test_an_unusable_out_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("--out", out, *QUICK) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "--out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_start_leaves_an_earlier_run_where_it_is(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    for wrong in (("--num-steps", -1), ("--step-size", "inf"), ("--precision", "tf32", "--device", "cpu")):
        assert run("--out", out, "--epochs", 1, *QUICK, *wrong) == 2
    assert not (out / "earlier-1").exists()
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    assert (out / "earlier-1" / "checkpoint.pt").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions(precision, tmp_path, monkeypatch):
    seen = set()
    import pcfast

    real = pcfast.pc_loss

    def spy(model, x, y, **settings):
        result = real(model, x, y, **settings)
        if torch.is_grad_enabled():
            plan = pcfast.last_run().plan
            seen.add((x.dtype, plan.precision.state, plan.precision.operand))
        return result

    monkeypatch.setattr(pcfast, "pc_loss", spy)
    assert run("--out", tmp_path / "run", "--epochs", 1, *QUICK, "--precision", precision) == 0
    expected = {
        "bf16": (torch.float32, torch.float32, torch.bfloat16),
        "fp64": (torch.float64, torch.float64, torch.float64),
    }
    assert seen == {expected[precision]}
    assert not torch.is_autocast_enabled("cpu")
    assert config_of(tmp_path / "run")["settings"]["precision"] == precision


@pytest.mark.parametrize("net", ["cnn", "cifar-cnn"])
def test_the_papers_networks_fit_any_data(net, tmp_path):
    out = tmp_path / "run"
    assert run("--out", out, "--net", net, "--epochs", 1, "--num-steps", 1, "--batch-size", 1437) == 0
    assert len(config_of(out)["settings"]["network"]) == {"cnn": 5, "cifar-cnn": 6}[net]


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("WIDTH = 24\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nimport neighbour\n"
        "def make():\n"
        "    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, neighbour.WIDTH), nn.Tanh()), "
        "nn.Linear(24, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("--model", "mine.py:make", "--epochs", 1, "--batch-size", 100, "--out", "run") == 0
    settings = config_of(Path("run"))["settings"]
    assert "Flatten" in settings["network"][0] and settings["data"]["x_train"].startswith(
        "float32 (1437, 1, 8, 8)"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run's folder knows where the model is
    assert run("--resume", "--out", tmp_path / "run", "--epochs", 2) == 0


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_mnist_from_files(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", generator.integers(0, 10, count, dtype=np.uint8))
    out = tmp_path / "run"
    assert (
        run("--data", "mnist", "--data-dir", tmp_path, "--epochs", 1, "--batch-size", 30, "--out", out) == 0
    )
    settings = config_of(out)["settings"]
    assert len(settings["network"]) == 5 and settings["num_steps"] == 20  # the paper's network and settings
    assert settings["optimizer"]["name"] == "Adam" and settings["optimizer"]["groups"][0]["lr"] == 0.002


def test_ctrl_c_keeps_the_run(tmp_path, capsys, monkeypatch):
    step = torch.optim.AdamW.step
    steps = []

    def interrupted(self, *arguments):
        steps.append(0)
        if len(steps) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 3, *QUICK) == 130
    error = capsys.readouterr().err.lstrip("\n")  # an empty line ends that of the terminal's ^C
    assert len(error.splitlines()) == 1 and "resuming" in error
    assert checkpoint_of(out)["epoch"] == 1
    assert run("--out", out, "--resume", "--epochs", 3) == 0


def test_divergence_is_status_1(tmp_path, capsys):
    assert run("--out", tmp_path / "run", *QUICK, "--step-size", 1e30, "--num-steps", 20, "--epochs", 1) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "diverged" in error and "step" in error


def test_json_stays_alone_where_the_model_prints(tmp_path):
    """At import, in the function, in forward, and past Python."""
    (tmp_path / "mine.py").write_text(
        "import os\nfrom torch import nn\nprint('import')\n"
        "class Loud(nn.Module):\n    def forward(self, x):\n        print('forward'); return x\n"
        "def make():\n    os.write(1, b'raw\\n')\n"
        "    return nn.Sequential(nn.Sequential(nn.Linear(64, 8), Loud()), nn.Linear(8, 10))\n"
    )
    call = [
        sys.executable,
        "-m",
        "pcfast",
        "train",
        "--model",
        "mine.py:make",
        "--epochs",
        "1",
        "--batch-size",
        "900",
    ]
    done = subprocess.run([*call, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["history"]["seconds"]) == 1
    assert all(word in done.stderr for word in ("import", "forward", "raw"))


def test_a_run_that_fails_first_leaves_an_earlier_run_alone(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("--out", out, "--epochs", 1, *QUICK, "--step-size", 1e30, "--num-steps", 20) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("--out", tmp_path / "new" / "run", *QUICK, "--step-size", 1e30, "--num-steps", 20) == 1
    assert not (tmp_path / "new").exists()
    error = capsys.readouterr().err
    assert "--step-size" in error and "--method fixed-prediction" in error


def test_two_runs_do_not_write_to_one_folder(tmp_path, capsys):
    with results_folder(tmp_path / "run"):
        assert run("--out", tmp_path / "run", "--epochs", 1, *QUICK) == 2
    assert "no other run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # nothing was written: it is gone again
    assert run("--out", tmp_path / "run", "--epochs", 1, *QUICK) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)


def test_a_fault_of_our_own_is_one_line_too(tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise KeyError("something")

    monkeypatch.setattr(training, "train", broken)
    assert run("--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "KeyError" in error and "PCFAST_TRACEBACK" in error
    monkeypatch.setenv("PCFAST_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("--out", tmp_path / "run")
