"""Methods under equal iterations: what is timed is what is trained; rows hold what was found; docs/methods.md."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import pcfast
from pcfast.bench import measure, methods, report, runner, sources, tables
from pcfast.bench.methods import ENTRIES, Entry
from pcfast.cli import main
from pcfast.cli.defaults import DEFAULTS
from pcfast.datasets import loading
from pcfast.problem.plan import TRAINING_METHODS
from pcfast.training import trainer as training

CPU = torch.device("cpu")
TOO_FAR = Entry("strict, too far", step_size={"digits": 1e30})


@pytest.fixture
def small(monkeypatch):
    """digits with a small network, two epochs of few batches, and short samples of time."""
    toy = replace(DEFAULTS["digits"], widths=(7,), batch_size=200, epochs=2)
    monkeypatch.setitem(DEFAULTS, "digits", toy)
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 1e-4)
    monkeypatch.setattr(methods, "ROUNDS", 4)


@pytest.fixture
def entries(monkeypatch):
    """Sets the entries."""
    return lambda *chosen: monkeypatch.setattr(methods, "ENTRIES", chosen)


def test_no_method_is_forgotten():
    assert {entry.method for entry in ENTRIES} == set(TRAINING_METHODS)
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    assert tables.backpropagation([{"settings": {"method": entry.method}} for entry in ENTRIES])


@pytest.mark.parametrize("data", methods.DATA)
def test_all_relax_for_equally_many_iterations(data):
    for entry in ENTRIES:
        relaxation = entry.relaxation(data)
        assert (relaxation["num_steps"], relaxation["loss"]) == (20, "mse")
        sizes = relaxation["step_size"]
        assert not isinstance(sizes, list) or len(sizes) == 20
        settings = methods.settings_of(entry, data)
        unread = entry.method in ("exact", "zero_divergence")
        assert (settings["step_size"] is None) == (settings["num_steps"] is None) == unread


def test_settings_tell_entries_apart():
    """Whatever changes a result changes what a record's age is judged by."""
    told = [json.dumps(methods.settings_of(entry, "mnist") | {"name": ""}) for entry in ENTRIES]
    assert len(set(told)) == len(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_what_is_timed_is_what_is_trained(entry, small, monkeypatch):
    """The same call, and an optimiser of the same kind; but the timed weights stay."""
    calls: list[dict] = []
    optimizers: list[torch.optim.Optimizer] = []

    def watched(function):
        def call(*arguments, **settings):
            calls.append({"function": function.__name__, **settings})
            return function(*arguments, **settings)

        return call

    def stepped(self, *arguments):
        optimizers.append(self)
        return step(self, *arguments)

    step = torch.optim.AdamW.step
    data = methods._load("digits", None, 0)
    model = methods._model("digits", 0)
    before = copy.deepcopy(model.state_dict())
    timed = methods._step(entry, "digits", model, data.x_train[:200], data.y_train[:200])
    monkeypatch.setattr(pcfast, "pc_loss", watched(pcfast.pc_loss))
    monkeypatch.setattr(pcfast, "incremental_step", watched(pcfast.incremental_step))
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    for _ in range(3):
        timed.run()
    assert len(optimizers) == (60 if entry.method == "incremental" else 3)
    assert all(update.norm() > 0 for update in timed.updates())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)
    here, standing = calls[0], optimizers[-1].param_groups[0]
    methods._trained(entry, "digits", data, CPU, 0, None)
    there, moving = calls[-1], optimizers[-1].param_groups[0]
    same = ("function", "method", "loss", "num_steps", "belief_optimizer", "nudging")
    assert [here.get(name) for name in same] == [there.get(name) for name in same]
    sizes = here["step_size"], there["step_size"]
    assert list(sizes[0]) == list(sizes[1]) if entry.waning else sizes[0] == sizes[1]
    assert standing["lr"] < 1e-9 and moving["lr"] == entry.lr.get("digits", DEFAULTS["digits"].lr)
    assert standing["weight_decay"] == moving["weight_decay"] == DEFAULTS["digits"].weight_decay


def test_a_run_from_end_to_end(small, tmp_path, capsys):
    path = tmp_path / "new" / "run.json"
    assert main(["--seeds", "2", "--device", "cpu", "--json", str(path)], methods.methods) == 0
    record = json.loads(path.read_text())
    assert set(record) == set(runner.new_record(CPU, False))
    assert not record["quick"] and record["rows"] == record["kernels"] == []
    assert record["machine"]["threads"] == torch.get_num_threads()
    rows = record["methods"]
    assert [row["settings"] for row in rows] == [methods.settings_of(entry, "digits") for entry in ENTRIES]
    for row in rows:
        assert 0 < row["p20"] <= row["seconds"] <= row["p80"]
        assert row["samples"] == 4 and row["clock"] == "wall"
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert all(0 < run["test_accuracy"] < 1 for run in row["runs"])
    exact, zero_divergence = rows[0], rows[1]
    assert exact["runs"] == zero_divergence["runs"]
    assert exact["runs"][0]["test_accuracy"] != exact["runs"][1]["test_accuracy"]
    shown = capsys.readouterr().out
    assert "digits: 64-7-10, loss mse, n = 20, adamw" in shown and "epochs: 2, seeds: 2" in shown
    assert all(entry.name in shown for entry in ENTRIES)


def test_an_accuracy_is_that_of_pcfast_train(small, entries, tmp_path):
    entries(Entry("strict"))
    (row,) = methods.run(["digits"], CPU, seeds=2)["methods"]
    options = ("--loss", "mse", "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "run"))
    assert main(["train", *options]) == 0
    history = torch.load(tmp_path / "run" / training.CHECKPOINT, weights_only=True)["history"]
    assert row["runs"][1] == {"seed": 1, "test_accuracy": history["test_accuracy"][-1]}


def test_what_diverges_is_recorded_and_shown(small, entries, capsys, tmp_path):
    entries(ENTRIES[0], TOO_FAR)
    path = tmp_path / "run.json"
    assert main(["--seeds", "2", "--device", "cpu", "--json", str(path)], methods.methods) == 0
    gradient, far = json.loads(path.read_text())["methods"]
    assert gradient["seconds"] > 0 and far["seconds"] is None
    for seed, run in enumerate(far["runs"]):
        assert set(run) == {"seed", "diverged"} and run["seed"] == seed
        assert 1 <= run["diverged"]["iteration"] <= 20 and run["diverged"]["layer"] in (1, 2)
    place = "iteration {iteration}, layer {layer}".format(**far["runs"][1]["diverged"])
    assert f"strict, too far diverged with seed 1 in {place}." in capsys.readouterr().out


def test_fewer_epochs_are_a_quick_run(small, entries):
    entries(ENTRIES[0])
    for epochs, quick in ((None, False), (1, True), (2, False), (3, False)):
        record = methods.run(["digits"], CPU, seeds=1, epochs=epochs)
        assert record["quick"] is quick
        assert record["methods"][0]["settings"]["epochs"] == (epochs or 2)
        assert record["methods"][0]["samples"] == (measure.QUICK_ROUNDS if quick else 4)


# ---------------------------------------------------------------------------------------- bad input


def fails(capsys, *arguments: str) -> str:
    assert main(arguments, methods.methods) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    return output.err


@pytest.fixture
def nothing_is_timed(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("timed before the data were there")

    monkeypatch.setattr(methods, "take_turns", refuse)


def test_mnist_without_its_files_is_named(nothing_is_timed, capsys, tmp_path, monkeypatch):
    line = fails(capsys, "--data", "digits", "--data", "mnist", "--data-dir", str(tmp_path))
    assert "--data-dir" in line and "train-images-idx3-ubyte" in line

    def unreachable(source):
        raise pcfast.ArgumentError("data", "no network", "one")

    monkeypatch.setattr(loading.openml, "fetch", unreachable)
    line = fails(capsys, "--data", "mnist")
    assert "no network" in line and "--data-dir FOLDER" in line and "train-images-idx3-ubyte" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data-dir", "."), ("--data-dir", "digits")),
        (
            ("--data", "mnist", "--data", "fashion-mnist", "--data-dir", "."),
            ("--data-dir", "mnist and fashion-mnist"),
        ),
        (("--data", "cifar10"), ("--data", "cifar10", "mnist")),
        (("--seeds", "0"), ("--seeds",)),
        (("--epochs", "0"), ("--epochs",)),
        (("--device", "gpu"), ("--device", "gpu")),
        (("--json", "/dev/null/run.json"), ("--json", "/dev/null/run.json")),
    ],
)
def test_bad_options_are_named_in_one_line(arguments, words, nothing_is_timed, capsys):
    line = fails(capsys, *arguments)
    assert all(word in line for word in words), line


# ------------------------------------------------------------------------------------ tables and records


def fake_row(entry: Entry, seconds: float | None, *accuracies: float | None, data: str = "digits") -> dict:
    """None for an accuracy: diverged."""
    runs = [
        {"seed": seed, "diverged": {"iteration": 3, "layer": 2}}
        if accuracy is None
        else {"seed": seed, "test_accuracy": accuracy}
        for seed, accuracy in enumerate(accuracies)
    ]
    return {
        "settings": methods.settings_of(entry, data), "seconds": seconds, "p20": seconds, "p80": seconds,
        "samples": None if seconds is None else 21, "clock": "wall", "runs": runs,
    }  # fmt: skip


def fake_record(*rows: dict, **changes) -> dict:
    return {
        "format": runner.FORMAT, "recorded": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "quick": False,
        "sources": sources.digest(), "device": "cpu", "ceilings": {}, "rows": [], "kernels": [],
        "machine": {"processor": "A CPU", "threads": 2, "python": "3.11", "torch": "2.13"},
        "methods": list(rows) or [fake_row(entry, 2e-3, 0.95) for entry in ENTRIES], **changes,
    }  # fmt: skip


def test_the_table():
    exact = Entry("exact", "exact")
    waning = Entry("waning", waning=1.0, step_size={"digits": 0.25})
    slow = Entry("slow", "incremental", lr={"mnist": 1e-4})
    result = report.methods_text(
        [
            fake_record(
                fake_row(exact, 2e-3, 0.5, 0.75, 0.625),
                fake_row(waning, 7e-3, 0.25, None, 0.75),
                fake_row(TOO_FAR, None, None),
                fake_row(exact, 1.0, 0.5, data="mnist"),
                fake_row(slow, 0.5, 0.5, data="mnist"),
            )
        ]
    ).split("\n\n")
    assert result[0] == (
        "**digits: 64-128-128-10, loss mse, n = 20, adamw with learning rate 0.0005, weight decay 0.3, "
        "batches of 32, epochs: 40, seeds: 3**"
    )
    assert result[1].split("\n") == [
        "| method | step size | learning rate | test accuracy | training step | of backpropagation's time |",
        "|---|---|---|---|---|---|",
        "| exact |  |  | 62.50 % (50.00 - 75.00) | 2 ms (2 ms - 2 ms) | 1.00x |",
        "| waning | 0.25 to 0.013 |  | 50.00 % (25.00 - 75.00), 1 of 3 diverged | 7 ms (7 ms - 7 ms) | 3.50x |",
        "| strict, too far | 1e+30 |  | diverged |  |  |",
    ]
    assert result[2:4] == [
        "waning diverged with seed 1 in iteration 3, layer 2.",
        "strict, too far diverged with seed 0 in iteration 3, layer 2.",
    ]
    assert result[4].startswith(
        "**mnist: the paper's network, loss mse, n = 20, adam with learning rate 0.002, batches"
    )
    assert (
        result[5].split("\n")[-1]
        == "| slow | 0.1 | 0.0001 | 50.00 % (50.00 - 50.00) | 500 ms (500 ms - 500 ms) | 0.50x |"
    )
    assert result[6].startswith("A CPU, 2 threads, Python 3.11, torch 2.13, 2026-01-02, commit abc1234.")
    assert len(result) == 7


@pytest.mark.parametrize(
    ("iteration", "words"), [(0, "the forward pass, layer 2"), (None, "updates of layer 2")]
)
def test_a_divergence_outside_the_iterations_has_its_place(iteration, words):
    row = fake_row(ENTRIES[0], None, None)
    row["runs"][0]["diverged"]["iteration"] = iteration
    (note,) = tables.method_notes([row])
    assert words in note


def test_a_table_is_older_than_the_code_where_an_entry_changed(entries):
    record = json.loads(json.dumps(fake_record()))
    assert "Older than the code" not in report.methods_text([record])
    assert "Older than the code" in report.methods_text([{**record, "sources": "0" * 16}])
    record["methods"][3]["settings"]["step_size"] = 0.07
    assert "Older than the code" in report.methods_text([record])
    record = fake_record()
    entries(*ENTRIES, TOO_FAR)
    assert "Older than the code" in report.methods_text([record])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quick": True}, "no full run"),
        ({"format": 1}, "no full run"),
        ({"commit": "abc+"}, "not committed"),
        ({"commit": None}, "not committed"),
    ],
)
def test_only_full_runs_of_committed_sources_are_recorded(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(fake_record(**change)))
    with pytest.raises(Exception, match=message):
        report.record(path)
    assert not (tmp_path / "results").exists()


def test_a_record_of_methods_stands_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = tmp_path / "run.json"
    record = fake_record()
    path.write_text(json.dumps(record))
    assert report.record(path) == tmp_path / "results" / "cpu" / "2026-01-02-abc1234-methods.json"
    assert report.newest() == report.newest("kernels") == [] and report.newest("methods") == [record]
    with pytest.raises(Exception, match="never replaced"):
        report.record(path)


def test_the_page_of_methods_holds_the_newest_record():
    page = report.METHODS.read_text()
    assert report.with_methods(page, report.newest("methods")) == page


def test_the_page_of_methods_takes_a_record_and_says_where_there_is_none():
    page = report.METHODS.read_text()
    empty, full = report.with_methods(page, []), report.with_methods(page, [fake_record()])
    assert report.NOT_RECORDED in empty
    assert report.NOT_RECORDED not in full and "| strict |" in full and full.startswith("# More methods")
    assert report.with_methods(full, []) == empty
