"""``pcfast diagnose``: its files, what it prints, and how it fails."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from literal import relax_literally

from pcfast import datasets, networks
from pcfast.cli import main
from pcfast.diagnostics import plots as diagnostics_plots

QUICK = ["--num-steps", "4", "--batch-size", "20"]
FILES = {"config.json", "energies.csv", "iterations.csv", "updates.csv", "diagnose.png"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(
        diagnostics_plots, "diagnosis_figure", lambda result, path, title: Path(path).write_text(title)
    )


def run(*arguments: str) -> int:
    return main(["diagnose", *QUICK, *arguments])


def table(path: str | Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_defaults_on_digits_against_the_literal_loop(capsys):
    assert run("--precision", "fp64") == 0
    out = Path("runs/diagnose-digits")
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "diagnose.png").read_bytes().startswith(b"\x89PNG")

    torch.manual_seed(0)
    model = networks.mlp([64, 128, 128, 10]).double()
    data = datasets.digits(seed=0)
    x, y = data.x_train[:20].double(), data.y_train[:20]
    truth = relax_literally(model, x, y, loss=F.cross_entropy, method="strict", step_size=0.05, num_steps=4)
    energies = table(out / "energies.csv")
    assert [(row["iteration"], row["layer"]) for row in energies] == [
        (str(t), str(l)) for t in range(1, 5) for l in range(1, 4)
    ]
    for row, value in zip(energies, itertools.chain(*truth.energies), strict=True):
        assert float(row["energy"]) == pytest.approx(value, rel=1e-9, abs=1e-18)
        assert (row["belief_gradient"] == "") == (row["layer"] == "3")
    iterations = table(out / "iterations.csv")
    for row, values in zip(iterations, truth.energies, strict=True):
        assert float(row["energy"]) == pytest.approx(sum(values), rel=1e-12)
    assert {row["rising"] for row in iterations} == {"False"}
    relaxed = [float(row["relaxed"]) for row in iterations]
    assert relaxed[0] == 0 and all(later > earlier for earlier, later in itertools.pairwise(relaxed))

    F.cross_entropy(model(x), y).backward()
    updates = table(out / "updates.csv")
    assert [row["layer"] for row in updates] == ["1", "2", "3", "all"]
    for l, row in enumerate(updates[:-1]):
        pairs = [(truth.gradients[f"{l}.{name}"], p.grad) for name, p in model[l].named_parameters()]
        a, b = (torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True))
        assert float(row["relative_error"]) == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-7)
        cosine = float(a @ b / a.norm() / b.norm())
        assert math.cos(math.radians(float(row["angle_degrees"]))) == pytest.approx(cosine, abs=1e-12)
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["step_size"] == 0.05 and config["backend"] == "eager"
    printed, errors = capsys.readouterr()
    assert errors == "" and "rises" not in printed
    for words in ("strict, step size 0.05, n = 4, backend eager", "runs/diagnose-digits/diagnose.png"):
        assert words in printed


@pytest.mark.usefixtures("no_figures")
def test_json_and_earlier_results_are_kept(capsys):
    options = ["--method", "fixed-prediction", "--step-size", "1", "--precision", "fp64", "--out", "x"]
    assert run(*options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["diverged"] is None and result["rising"] is None and result["earlier_results"] is None
    assert result["backend"] == "eager" and {Path(file).name for file in result["files"]} == FILES
    assert len(result["energies"]) == 4 and len(result["belief_gradients"][0]) == 2
    # n = 4 > L = 3: rest, and backpropagation
    assert result["iterations"][-1]["relaxed"] == 1 and result["iterations"][-1]["rising"] is None
    assert all(row["relative_error"] < 1e-13 for row in result["updates"])
    texts = {name: Path("x", name).read_text() for name in FILES}
    assert run(*options) == 0
    assert {name: Path("x/earlier-1", name).read_text() for name in FILES} == texts
    assert "x/earlier-1" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_a_step_size_above_the_limit_is_said(capsys):
    assert run("--step-size", "0.9", "--num-steps", "30", "--out", "x") == 0
    assert "the energy rises in" in capsys.readouterr().out
    rising = [row["rising"] for row in table("x/iterations.csv")]
    assert rising[0] == "False" and rising[-1] == "True"


def test_what_diverges_is_written_and_the_status_is_1(capsys):
    assert run("--step-size", "30", "--num-steps", "100", "--out", "x") == 1
    printed, errors = capsys.readouterr()
    (line,) = errors.splitlines()
    assert "diverged in iteration" in line and "--step-size" in line and "the energy rises in" in printed
    assert {path.name for path in Path("x").iterdir()} == FILES
    last = table("x/iterations.csv")[-1]
    assert last["energy"] == last["relaxed"] == ""
    assert run("--method", "fixed-prediction", "--step-size", "30", "--num-steps", "500", "--json") == 1
    assert json.loads(capsys.readouterr().out)["diverged"]


@pytest.mark.usefixtures("no_figures")
def test_weights_of_a_training_run(capsys):
    train = ["train", "--epochs", "1", "--widths", "9", "--num-steps", "2", "--out", "run"]
    assert main(train) == 0
    options = ["--widths", "9", "--precision", "fp64", "--json"]
    assert run(*options, "--checkpoint", "run/checkpoint.pt", "--out", "trained") == 0
    capsys.readouterr()
    model = networks.mlp([64, 9, 10])
    model.load_state_dict(torch.load("run/checkpoint.pt", weights_only=True)["model"])
    data = datasets.digits(seed=0)
    loss = F.cross_entropy(model.double()(data.x_train[:20].double()), data.y_train[:20])
    first = table("trained/iterations.csv")[0]
    assert float(first["energy"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    Path("broken.pt").write_text("nothing")
    for file, options, words in (
        ("nowhere.pt", ["--widths", "9"], "no file"),
        ("broken.pt", ["--widths", "9"], "cannot be read"),
        ("run/checkpoint.pt", ["--widths", "8"], "another network"),
    ):
        assert run("--checkpoint", file, *options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --checkpoint: got") and words in line
    assert run("--out", "run") == 2 and "training run" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_what_does_not_fit_is_found_before_earlier_results_are_touched(capsys):
    assert run("--out", "x") == 0
    before = sorted(path.name for path in Path("x").iterdir())
    capsys.readouterr()
    for options, words in (
        (["--method", "exact"], "--method"),
        (["--step-size", "nan"], "--step-size"),
        (["--num-steps", "-1"], "--num-steps"),
        (["--belief-momentum", "1"], "--belief-momentum"),
        (["--belief-optimizer", "adam", "--belief-momentum", "0.5"], "--belief-momentum"),
        (["--precision", "tf32", "--device", "cpu"], "--precision"),
        (["--backend", "cuda"], "cuda"),
    ):
        assert run(*options, "--out", "x") == 2, options
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert sorted(path.name for path in Path("x").iterdir()) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--loss", "mse", "--net", "cnn"],
        ["--precision", "bf16", "--belief-momentum", "0.5"],
        ["--backend", "reference", "--method", "fixed_prediction", "--belief-optimizer", "adam"],
        ["--num-steps", "0", "--belief-weight-decay", "0.001"],
        ["--num-steps", "60"],
        ["--widths", ",".join(["4"] * 11)],
    ],
)
def test_other_settings_run_and_are_drawn(options):
    assert run(*options, "--out", "x") == 0
    assert {path.name for path in Path("x").iterdir()} == FILES
