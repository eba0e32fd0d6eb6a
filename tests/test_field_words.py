"""The field's other words for a method are taken wherever a method is."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pcfast
from pcfast.cli import main
from pcfast.comparison import compare as comparison
from pcfast.diagnostics.diagnosis import diagnose
from pcfast.problem.plan import ALIASES
from pcfast.training import trainer as training

WORDS = pytest.mark.parametrize("alias", ALIASES)
BATCH = torch.rand(6, 5), torch.randint(0, 3, (6,))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3))


@WORDS
def test_a_word_is_the_method(alias):
    model, method = network(), ALIASES[alias]
    if method == "incremental":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pcfast.incremental_step(model, *BATCH, optimizer, method=alias)
        with pytest.raises(pcfast.ArgumentError, match="incremental_step"):
            pcfast.pc_loss(model, *BATCH, method=alias)
    else:
        pcfast.pc_loss(model, *BATCH, method=alias).backward()
        assert pcfast.last_run().plan.method == method
        assert pcfast.relax(model, *BATCH, method=alias).run.plan.method == method
        assert pcfast.PredictiveCoding(model, method=alias).method == method
        assert comparison._checked_methods([alias, method]) == (method,)
        with pytest.raises(pcfast.ArgumentError, match="'incremental' or 'ipc'"):
            pcfast.incremental_step(model, *BATCH, torch.optim.SGD(model.parameters()), method=alias)
    explained = pcfast.explain(model, (6, 5), method=alias)
    assert explained.plan.method == method and alias in repr(explained).splitlines()[0]


@WORDS
def test_a_run_is_the_methods(alias, tmp_path):
    """A run that began under one word goes on under the other."""
    data = (*BATCH, *BATCH)
    training.train(network(), data, epochs=1, method=alias, out=tmp_path, progress=False)
    history = training.train(
        network(), data, epochs=2, method=ALIASES[alias], out=tmp_path, resume=True, progress=False
    )
    assert len(history) == 2


def test_others(tmp_path, capsys, monkeypatch):
    assert diagnose(network(), *BATCH, method="pc").run.plan.method == "strict"
    with pytest.raises(pcfast.ArgumentError, match="pc = strict"):
        pcfast.pc_loss(network(), *BATCH, method="predictive")
    monkeypatch.chdir(tmp_path)
    for word in ("spc", "SPC", "strict"):
        assert main(["train", "--epochs", "1", "--method", word, "--out", word]) == 0
    assert main(["train", "--method", "pcc"]) == 2 and "'strict'" in capsys.readouterr().err


def test_presets_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("--epochs", "1", "--step-size", "0.05", "--num-steps", "4")
    for preset, *options in (
        ("spc", "--belief-momentum", "0.5", "--belief-nesterov"), ("pctrainer", "--loss", "mse"), ("pcx_ipc",),
        ("torch2pc", "--method", "fixed-prediction"), ("epc",),
    ):  # fmt: skip
        assert main(["train", "--preset", preset, *options, *short, "--out", preset]) == 0, preset
    assert main(["train", "--out", "spc", "--resume", "--epochs", "2"]) == 0
    for preset in ("pctrainer", "spc"):
        config = json.loads((tmp_path / preset / "config.json").read_text())["settings"]
        assert (preset == "pctrainer") == config["network"][1].startswith("Sequential( (0): ReLU()")
        assert config["loss"] == "half_squared_error"
    assert main(["train", "--preset", "epc", "--method", "epc", *short, "--out", "said"]) == 0
    assert main(["train", "--beliefs", "before_activation", "--epochs", "1", "--out", "nested"]) == 0
    for words, options in (
        ("error_based, or none", ["--preset", "epc", "--method", "strict", *short]),
        ("incremental, or none", ["--preset", "pcx_ipc", "--method", "strict", *short]),
        ("cross_entropy", ["--preset", "preco", "--loss", "cross-entropy", *short]),
        ("--belief-optimizer adam", ["--belief-eps", "1e-4"]),
        ("the program's own step size", ["--preset", "jpc"]),
        ("--belief-momentum", ["--preset", "epc", "--belief-momentum", "0.5", *short]),
        ("strict, or none", ["--preset", "spc", "--method", "epc", *short]),
        ("--belief-momentum X", ["--belief-nesterov"]),
    ):
        capsys.readouterr()
        assert main(["train", *options, "--out", "refused"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
