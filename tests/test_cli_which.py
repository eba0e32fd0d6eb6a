"""pcfast which: the record of another program's training step, and what is wrong with other files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from recorded_programs import FOLDER, load

from pcfast.cli import main

MODEL = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 10), nn.ReLU(), nn.Linear(10, 5))

def nested():
    return nn.Sequential(
        nn.Sequential(nn.Linear(7, 11)), nn.Sequential(nn.ReLU(), nn.Linear(11, 10)),
        nn.Sequential(nn.ReLU(), nn.Linear(10, 5)),
    )
"""
NAME = "pctrainer__mlp_relu_mse"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(record, *options, model="nested", steps=12) -> int:
    settings = ("--model", f"net.py:{model}", "--step-size", "0.05", "--num-steps", str(steps))
    return main(["which", str(record), *settings, *options])


def test_the_program_is_found(folder, capsys):
    assert load(NAME).meta["iterations"] == 12 and load(NAME).meta["step_size"] == 0.05
    assert call(FOLDER / f"{NAME}.npz", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {match["preset"] for match in result["meets"]} == {"pctrainer"}
    assert result["others"][0]["difference"] > 1e-2
    assert call(FOLDER / f"{NAME}.npz") == 0
    assert "agrees: pctrainer" in capsys.readouterr().out


def test_a_flat_network_is_told_where_beliefs_sit(folder, capsys):
    recorded = dict(np.load(FOLDER / f"{NAME}.npz"))
    flat = {"0.0": "0", "1.1": "2", "2.1": "4"}
    renamed = {"x": recorded["x"], "y": recorded["y"]}
    for kind in ("param", "grad"):
        for old, new in flat.items():
            for end in ("weight", "bias"):
                renamed[f"{kind}.{new}.{end}"] = recorded[f"{kind}.{old}.{end}"]
    np.savez(folder / "flat.npz", **renamed)
    assert call("flat.npz", "--json", "--loss", "mse", model="make") == 0
    (match,) = json.loads(capsys.readouterr().out)["meets"]
    assert (match["preset"], match["layers"]) == ("pctrainer", "beliefs='before_activation'")


def test_none_agrees(folder, capsys):
    assert call(FOLDER / f"{NAME}.npz", steps=30) == 1
    said = capsys.readouterr().out
    assert "none agrees" in said and "off by" in said


def broken(folder, **changes):
    arrays = {**dict(np.load(FOLDER / f"{NAME}.npz")), **changes}
    np.savez(folder / "broken.npz", **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": None}, "without x"),
        ({f"grad.{name}": None for name in load(NAME).under("grad.")}, "without any grad.NAME"),
        ({"param.0.0.weight": None}, "0.0.weight"),
        ({"param.0.0.weight": np.zeros((3, 3))}, "0.0.weight is (3, 3) there"),
        ({"grad.9.weight": np.zeros(3)}, "9.weight"),
        ({"grad.0.0.weight": np.zeros((3, 3))}, "the parameter's shape"),
        ({"y": np.zeros((6, 4))}, "y: got shape (6, 4)"),
        ({"x": np.full((6, 7), np.nan)}, "x: got NaN"),
        ({"vinit.2": np.zeros((6, 10))}, "vinit.1, vinit.2, ..."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_records_that_cannot_be_used(folder, changes, words, capsys):
    broken(folder, **changes)
    assert call("broken.npz") == 2
    assert words in capsys.readouterr().err


def test_files_that_are_no_records(folder, capsys):
    (folder / "text.npz").write_text("text")
    np.savez(folder / "objects.npz", x=np.array([{}], dtype=object))
    torch.save({"x": torch.zeros(2)}, folder / "torch.npz")
    for name, words in (
        ("text.npz", "cannot be read"), ("none.npz", "cannot be read"), ("objects.npz", "cannot be read"),
        ("torch.npz", "as torch.save writes"),
    ):  # fmt: skip
        assert call(name) == 2
        assert words in capsys.readouterr().err, name


def test_other_signs_and_incremental_programs(folder, capsys):
    arrays = dict(np.load(FOLDER / f"{NAME}.npz"))
    broken(folder, **{name: -value for name, value in arrays.items() if name.startswith("grad.")})
    assert call("broken.npz") == 1
    assert "agrees but for a factor: pctrainer times -1" in capsys.readouterr().out
    recorded = load("pctrainer_ipc__mlp_tanh_mse")
    (folder / "ipc.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Sequential(nn.Linear(6, 10)), "
        "nn.Sequential(nn.Tanh(), nn.Linear(10, 9)), nn.Sequential(nn.Tanh(), nn.Linear(9, 4)))\n"
    )
    file = str(FOLDER / f"{recorded.name}.npz")
    settings = ["which", file, "--model", "ipc.py:make", "--step-size", str(recorded.meta["step_size"])]
    for steps, options, status, words in (
        ("2", [], 0, "agrees in loss and reduction: pctrainer_ipc"),
        ("6", ["--optimizer", "sgd", "--lr", "0.002"], 0, "agrees: pctrainer_ipc"),
        ("2", ["--optimizer", "sgd", "--lr", "0.002"], 1, "none agrees"),
    ):
        assert main([*settings, "--num-steps", steps, *options]) == status
        assert words in capsys.readouterr().out
    assert main([*settings, "--num-steps", "6", "--lr", "0.1"]) == 2
    assert main([*settings, "--num-steps", "6", "--optimizer", "sgd"]) == 2
