"""``pcfast check``: exit status, what it prints, and the networks it takes."""

import json

import pytest
import torch

from pcfast import networks
from pcfast.backends import BACKENDS, Eager
from pcfast.checking import checker as checking
from pcfast.checking.copies import random_batches
from pcfast.cli import main

QUICK = ["--method", "strict", "--num-steps", "6", "--draws", "1", "--batch-size", "4"]


def run(*arguments: str) -> int:
    return main(["check", *QUICK, *arguments])


class Faulty(Eager):
    """Eager with every update of the first parameter a thousandth too large."""

    name = "faulty"

    def run(self, problem, plan):
        outcome = super().run(problem, plan)
        for parameter in list(outcome.gradients)[-1:]:
            outcome.gradients[parameter] = outcome.gradients[parameter] * 1.001
        return outcome


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setitem(BACKENDS, "faulty", Faulty())


def test_tables_show_errors_beside_their_bounds(capsys):
    assert run() == 0
    output = capsys.readouterr()
    assert output.err == ""  # the progress bar is for terminals
    lines = output.out.splitlines()
    assert "random x (4, 64) on cpu, step size 0.05, 6 iterations" in lines[0]
    lines = lines[next(i for i, line in enumerate(lines) if "strict on eager" in line) :]
    header = next(line for line in lines if "quantity" in line)
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == [
        "layer", "quantity", "ieee", "bound", "bf16", "bound", "fp64", "bound",
    ]  # fmt: skip
    row = next(line for line in lines if "update 1.0.weight" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[0] == "2"
    for error, bound in zip(cells[2::2], cells[3::2], strict=True):
        assert 0 < float(error) <= float(bound) < 1
    assert "all 60 within their bounds" in lines[-1]
    assert "reference gives the truth" in output.out


def test_all_methods_by_default(capsys):
    assert (
        main(["check", "--num-steps", "2", "--draws", "1", "--batch-size", "4", "--precision", "ieee"]) == 0
    )
    text = capsys.readouterr().out
    for method in ("exact", "fixed_prediction", "strict", "error_based", "zero_divergence"):
        assert f"{method} on eager" in text
    assert "= absolute, since the truth is zero" in text  # layer 1 is not reached in two iterations
    assert "bf16" not in text


def test_a_backend_out_of_its_bound_fails_the_command(faulty, capsys):
    assert run("--precision", "ieee", "--precision", "fp64") == 1
    text = capsys.readouterr().out
    assert "strict on eager" in text and "strict on faulty" in text
    assert "1.0e-03 OUT" in text
    assert "2 of 72 out of bounds" in text


def test_the_summary_lists_only_what_is_out(faulty, capsys):
    assert run("--summary", "--precision", "ieee") == 1
    text = capsys.readouterr().out
    assert "strict on eager" not in text and "belief" not in text.split("Closest")[0]
    assert "strict on faulty" in text and "1 OUT" in text


def test_a_run_that_fails_says_why(monkeypatch, capsys):
    class Broken(Eager):
        name = "broken"

        def run(self, problem, plan):
            raise RuntimeError("no kernel image")

    monkeypatch.setitem(BACKENDS, "broken", Broken())
    assert run("--precision", "ieee") == 1
    assert "failed: RuntimeError: no kernel image" in capsys.readouterr().out


def test_backends_that_cannot_run_are_listed(monkeypatch, capsys):
    class Unable(Eager):
        name = "unable"

        def supports(self, request):
            return False, "no such layer"

    monkeypatch.setitem(BACKENDS, "unable", Unable())
    assert run("--precision", "ieee") == 0
    assert "not run: unable in ieee: no such layer" in capsys.readouterr().out


def test_the_literal_loop_is_judged_where_asked_for(capsys):
    arguments = ["--backend", "reference", "--precision", "bf16", "--batch-size", "64"]
    assert run(*arguments) == 1
    assert "strict on reference" in capsys.readouterr().out


def test_json_is_the_librarys_report(capsys):
    arguments = [
        "--precision",
        "ieee",
        "--precision",
        "fp64",
        "--step-size",
        "0.2",
        "--seed",
        "3",
        "--loss",
        "mse",
    ]
    assert run("--json", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    torch.manual_seed(3)
    model = networks.digits_mlp()
    batches = random_batches(model, (4, 64), loss="mse", draws=1, seed=3)
    report = checking.check(
        model, batches, loss="mse", step_size=0.2, num_steps=6, precisions=["ieee", "fp64"], seed=3
    )
    assert result["ok"] is True and len(result["reports"]) == 1
    (shown,) = result["reports"]
    assert shown["method"] == "strict" and shown["x_shape"] == [4, 64] and shown["step_size"] == 0.2
    assert [(row["layer"], row["quantity"], row["error"], row["bound"]) for row in shown["rows"]] == [
        (row.layer, row.quantity, row.error, row.bound) for row in report.rows
    ]


def test_json_of_a_failure(faulty, capsys):
    assert run("--json", "--precision", "ieee") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False and result["reports"][0]["ok"] is False


@pytest.mark.parametrize(
    "arguments, shape, layers",
    [
        (["--net", "cnn"], [4, 1, 28, 28], 5),
        (["--net", "mlp", "--widths", "9", "--data", "mnist"], [4, 784], 2),
        (["--net", "cnn", "--data", "digits"], [4, 1, 8, 8], 5),
    ],
    ids=["cnn", "widths", "cnn on digits"],
)
def test_shapes_come_from_the_network_or_the_data_set(arguments, shape, layers, capsys):
    assert run(*arguments, "--json", "--precision", "ieee", "--num-steps", "1") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["x_shape"] == shape
    assert max(row["layer"] for row in report["rows"]) == layers


OWN = """
from torch import nn

def flat():
    return nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3))

def images():
    return nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()), nn.Linear(27, 4))
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def test_ones_own_network(own, capsys):
    assert run("--model", f"{own}:flat", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["x_shape"] == [4, 6] and report["step_size"] == 0.1
    assert run("--model", f"{own}:images", "--input-shape", "2,5,5", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["x_shape"] == [4, 2, 5, 5]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "OWN:images"], "--input-shape: got none"),
        (["--model", "OWN:images", "--input-shape", "3,5,5"], "(batch, 2, height, width)"),
        (["--model", "OWN:images", "--data", "digits"], "(batch, 2, height, width)"),
        (["--model", "OWN:flat", "--net", "mlp"], "--net: got --net beside --model"),
        (["--input-shape", "3,5,5"], "--input-shape"),
        (["--model", "OWN:flat", "--data", "digits", "--input-shape", "6"], "--input-shape"),
        (["--input-shape", "3,x"], "--input-shape"),
        (["--precision", "tf32", "--device", "cpu"], "--precision: got tf32 on cpu"),
        (["--backend", "reference", "--precision", "fp64"], "the truth itself"),
        (["--backend", "auto"], "--backend"),
        (["--draws", "0"], "--draws"),
        (["--num-steps", "-1"], "--num-steps: got -1"),
        (["--step-size", "-1"], "--step-size: got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(arguments, words, own, capsys):
    assert run(*(argument.replace("OWN", own) for argument in arguments)) == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert output.err.startswith("error: ") and words in output.err


def test_divergence_of_the_reference_is_a_failure(capsys):
    assert run("--step-size", "1000", "--num-steps", "200") == 1
    assert "diverged in iteration" in capsys.readouterr().err
