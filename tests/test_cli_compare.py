"""``pcfast compare``: its files, what it prints, and how it fails."""

from __future__ import annotations

import csv
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pcfast.cli import main
from pcfast.comparison import compare as comparison
from pcfast.comparison import plots as comparison_plots

QUICK = ["--epochs", "1", "--num-steps", "3", "--batch-size", "300", "--iterations", "1,2,4,8,30"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take longer than what they show; one test draws them all."""
    for name in ("training_figure", "iterations_figure", "errors_figure", "overview"):
        monkeypatch.setattr(comparison_plots, name, lambda *args, **kwargs: None)


def run(*arguments: str) -> int:
    return main(["compare", *QUICK, *arguments])


def table(path: str | Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_default_parts_on_digits(capsys):
    assert run() == 0
    out = Path("runs/compare-digits")
    written = {path.name for path in out.iterdir()}
    assert written == {
        "config.json", "compare.png", "training.csv", "updates.csv", "training.png", "iterations.csv",
        "iterations.png",
    }  # fmt: skip
    for name in ("training.png", "iterations.png", "compare.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    training = table(out / "training.csv")
    assert list(training[0]) == [
        "method", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "note",
    ]  # fmt: skip
    assert [(row["method"], int(row["step"])) for row in training] == [
        (method, step) for method in ("backpropagation", "strict", "fixed_prediction") for step in range(6)
    ]
    assert training[5]["train_loss"] == "" and float(training[5]["test_loss"]) > 0  # the last has no batch
    starts = [row for row in training if row["step"] == "0"]  # same weights, same batch
    assert len({row["test_loss"] for row in starts}) == 1
    losses = [float(row["train_loss"]) for row in starts]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)

    updates = table(out / "updates.csv")
    assert len(updates) == 2 * 5 * 3
    last_layer = [row for row in updates if row["layer"] == "3" and row["method"] == "fixed_prediction"]
    assert all(
        float(row["relative_error"]) < 1e-5 and float(row["angle_degrees"]) < 1e-3 for row in last_layer
    )

    iterations = table(out / "iterations.csv")
    assert [row["layer"] for row in iterations[:4]] == ["1", "2", "3", "all"]
    assert (
        iterations[0]["angle_degrees"] == "" and iterations[0]["relative_error"] == "1.0"
    )  # n = 1: no update yet
    fixed = [row for row in iterations if row["method"] == "fixed_prediction"]
    exact = [row for row in fixed if row["step_size"] == "1.0" and row["num_steps"] == "3"]
    assert [row["layer"] for row in exact] == ["1", "2", "3", "all"]
    assert all(float(row["relative_error"]) < 1e-5 and float(row["angle_degrees"]) < 1e-3 for row in exact)
    for step_size in ("0.1", "0.2", "0.5"):
        rows = [row for row in fixed if row["step_size"] == step_size and row["layer"] == "all"]
        assert [int(row["num_steps"]) for row in rows] == [1, 2, 3, 4, 8, 30]
        errors = [float(row["relative_error"]) for row in rows]
        assert all(later < earlier for earlier, later in pairwise(errors))

    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["lr"] == 0.0005 and config["settings"]["epochs"] == 1
    assert config["settings"]["parts"] == ["training", "iterations"] and len(config["network"]) == 3
    assert config["device"] and config["machine"]["torch"]
    printed, errors = capsys.readouterr()
    assert errors == ""
    for words in ("backpropagation", "fixed_prediction", "n = L = 3", "runs/compare-digits/compare.png"):
        assert words in printed


@pytest.mark.usefixtures("no_figures")
def test_float64_json_same_seed_same_tables_and_earlier_results_are_kept(capsys):
    options = [
        "--precision",
        "fp64",
        "--json",
        "--out",
        "x",
        "--method",
        "fixed-prediction",
        "--method",
        "exact",
    ]
    assert run(*options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ended"] == {} and result["earlier_results"] is None
    whole = [row for row in result["iterations"] if row["step_size"] == 1 and row["num_steps"] == 3]
    assert len(whole) == 8 and all(row["angle_degrees"] < 1e-6 for row in whole)
    assert all(row["relative_error"] < 1e-13 for row in whole)
    assert result["training"]["final"]["exact"]["test_loss"] == pytest.approx(
        result["training"]["final"]["backpropagation"]["test_loss"], rel=1e-9
    )
    first = [row for row in result["iterations"] if row["layer"] == 1 and row["num_steps"] == 1]
    assert {row["angle_degrees"] for row in first if row["method"] == "fixed_prediction"} == {None}

    names = ("training.csv", "updates.csv", "iterations.csv")
    texts = [Path("x", name).read_text() for name in names]
    assert run(*options, "--part", "training", "--part", "iterations") == 0
    assert [Path("x", name).read_text() for name in names] == texts
    assert [Path("x/earlier-1", name).read_text() for name in names] == texts
    capsys.readouterr()
    assert run(*options, "--part", "iterations", "--seed", "1") == 0
    assert json.loads(capsys.readouterr().out)["earlier_results"] == "x/earlier-2"
    assert not Path("x/training.csv").exists() and Path("x/iterations.csv").read_text() != texts[2]


def test_errors_of_a_network_shaped_as_vgg19(capsys):
    options = [
        "--part",
        "errors",
        "--vgg-width",
        "1",
        "--errors-num-steps",
        "30",
        "--errors-step-size",
        "0.2",
    ]
    assert run(*options, "--precision", "fp64", "--out", "x") == 0
    rows = table("x/errors.csv")
    assert [(row["method"], int(row["layer"])) for row in rows] == [
        (method, l) for method in ("strict", "fixed_prediction") for l in range(1, 20)
    ]
    for row in rows[19:]:
        tail = sum(math.comb(29, k) * 0.2**k * 0.8 ** (29 - k) for k in range(19 - int(row["layer"]), 30))
        assert float(row["relative_error"]) == pytest.approx(1 - tail, abs=1e-12)
        assert float(row["error_norm"]) == pytest.approx(tail * float(row["exact_norm"]), rel=1e-9)
    assert {path.name for path in Path("x").iterdir()} == {
        "config.json",
        "compare.png",
        "errors.csv",
        "errors.png",
    }
    assert "VGG-19 of width 1" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_what_diverges_is_reported_and_the_rest_written(capsys):
    options = ["--step-size", "30", "--num-steps", "100", "--step-sizes", "0.5,30", "--iterations", "100"]
    assert run(*options, "--out", "x") == 1
    printed, errors = capsys.readouterr()
    lines = errors.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: training by ") for line in lines)
    assert "strict ended at step 0" in lines[0] and "diverged" in lines[0]
    assert "diverged" in printed
    training = table("x/training.csv")
    assert [row["method"] for row in training] == ["backpropagation"] * 6 + ["strict", "fixed_prediction"]
    assert training[6]["note"] and training[6]["train_loss"] == "" and table("x/updates.csv") == []
    rows = [row for row in table("x/iterations.csv") if row["num_steps"] == "100"]
    for row in rows:
        diverged = row["step_size"] == "30.0"
        assert (row["relative_error"] == "") == diverged == ("diverged" in row["note"])


def test_a_folder_that_cannot_be_used_is_found_before_any_work(monkeypatch, capsys):
    Path("file").write_text("")
    # by the module's name: in the package the command of this name hides it
    monkeypatch.setattr(
        sys.modules["pcfast.cli.compare"], "data_of", lambda *args, **kwargs: pytest.fail("data was read")
    )
    assert run("--out", "file/x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out: got file/x")
    assert [path.name for path in Path().iterdir()] == ["file"]
    Path("run").mkdir()
    Path("run/checkpoint.pt").write_text("")
    assert run("--out", "run") == 2
    assert "training run" in capsys.readouterr().err and len(list(Path("run").iterdir())) == 1


@pytest.mark.usefixtures("no_figures")
def test_what_does_not_fit_is_found_before_earlier_results_are_touched(capsys):
    assert run("--part", "iterations", "--out", "x") == 0
    before = sorted(path.name for path in Path("x").iterdir())
    Path("net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(63, 9), nn.Linear(9, 10))\n"
    )
    capsys.readouterr()
    for options, words in (
        (["--model", "net.py:make"], "63"),
        (["--step-size", "nan"], "--step-size"),
        (["--errors-step-size", "-1"], "--errors-step-size"),
        (["--errors-num-steps", "-1"], "--errors-num-steps"),
        (["--step-sizes", "0.1,x"], "--step-sizes"),
        (["--step-sizes", "0.1,inf"], "--step-sizes"),
        (["--iterations", "0"], "--iterations"),
        (["--iterations", "1.5"], "--iterations"),
        (["--part", "errors", "--image-size", "33"], "--image-size"),
        (["--method", "sgd"], "--method"),
        (["--precision", "tf32", "--device", "cpu"], "--precision"),
        (["--momentum", "0.5"], "--momentum"),
    ):
        assert run(*options, "--out", "x") == 2, options
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert sorted(path.name for path in Path("x").iterdir()) == before


@pytest.mark.usefixtures("no_figures")
def test_ctrl_c_leaves_finished_parts(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare_iterations", interrupted)
    assert run("--out", "x") == 130
    assert "part iterations" in capsys.readouterr().err
    assert {path.name for path in Path("x").iterdir()} == {"config.json", "training.csv", "updates.csv"}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "mse", "--net", "cnn", "--method", "strict"],
        ["--loss", "mse", "--part", "errors", "--vgg-width", "1", "--errors-num-steps", "2"],
        ["--precision", "bf16", "--optimizer", "sgd", "--momentum", "0.5", "--test-every", "2"],
        ["--backend", "reference", "--step-sizes", "1", "--method", "fixed_prediction"],
    ],
)
def test_other_settings_run(options):
    assert run(*options, "--out", "x") == 0
