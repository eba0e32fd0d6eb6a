"""Training with belief optimisers and nudging: digits, resumption, and the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pcfast
from pcfast import datasets, networks
from pcfast.cli import main
from pcfast.training import trainer as training
from pcfast.training.checkpoints import checksum

WANING = [0.1 / (1 + 0.2 * t) for t in range(20)]
METHODS = {
    "momentum": {"belief_optimizer": pcfast.GradientDescent(0.9)},
    "schedule": {"step_size": WANING},
    "decay": {"belief_optimizer": pcfast.GradientDescent(0.5, 1e-4)},
    "adam": {"belief_optimizer": pcfast.Adam(), "step_size": 1e-3},
    "fixed prediction with momentum": {
        "method": "fixed_prediction", "belief_optimizer": pcfast.GradientDescent(0.9)
    },
    "incremental with momentum": {
        "method": "incremental", "belief_optimizer": pcfast.GradientDescent(0.35)
    },
    "positive": {"nudging": pcfast.Nudging("positive", 0.3)},
    "negative": {"nudging": pcfast.Nudging("negative", 0.3)},
    "centred, growing": {"nudging": pcfast.Nudging("centred", 0.1), "nudging_growth": 0.1},
}  # fmt: skip


def one_hot_digits() -> datasets.Data:
    data = datasets.digits()
    one_hot = {part: F.one_hot(getattr(data, part), 10).float() for part in ("y_train", "y_test")}
    return data._replace(**one_hot)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.002, weight_decay=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_digits_are_learned(name):
    model = networks.digits_mlp()
    settings = {"step_size": 0.05, "loss": "mse", **METHODS[name]}
    history = training.train(
        model, one_hot_digits(), epochs=8, batch_size=32, optimizer=adamw, progress=False, **settings
    )
    assert history.test_accuracy[-1] >= 0.95


def toy(out, epochs, *, resume=False, **changes):
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(60, size, generator=generator) for size in (6, 3))
    torch.manual_seed(99 if resume else 0)
    model = networks.mlp([6, 8, 8, 3])
    settings = dict(
        loss="mse", belief_optimizer=pcfast.GradientDescent(0.5), step_size=[0.1, 0.05, 0.2], num_steps=3,
        nudging=pcfast.Nudging("centred", 0.2), nudging_growth=0.3,
    )  # fmt: skip
    training.train(
        model, (x[:40], y[:40].softmax(1), x[40:], y[40:].softmax(1)), epochs=epochs, batch_size=20, out=out,
        resume=resume, progress=False, **{**settings, **changes},
    )  # fmt: skip
    return model.state_dict()


def test_a_resumed_run_goes_on_with_the_beta_of_its_epoch(tmp_path, monkeypatch):
    betas, relax = [], training.loss_with

    def watched(settings, *batch, **options):
        betas.append(settings.nudging.beta)
        return relax(settings, *batch, **options)

    monkeypatch.setattr(training, "loss_with", watched)
    whole = toy(tmp_path / "whole", 4)
    assert betas == pytest.approx(
        [0.2, *[0.2] * 2, *[0.5] * 2, *[0.8] * 2, *[1.0] * 2]
    )  # the first of a rehearsal
    toy(tmp_path / "parts", 2)
    parts = toy(tmp_path / "parts", 4, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"belief_optimizer": pcfast.GradientDescent(0.6)}, "belief_optimizer"),
        ({"belief_optimizer": None}, "belief_optimizer"),
        ({"step_size": [0.1, 0.05, 0.3]}, "step_size.2"),
        ({"nudging": pcfast.Nudging("centred", 0.3)}, "nudging"),
        ({"nudging_growth": 0.1}, "nudging_growth"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(change, named, tmp_path):
    toy(tmp_path / "run", 1)
    with pytest.raises(pcfast.ArgumentError, match=rf"{named} is .* there, .* here"):
        toy(tmp_path / "run", 2, resume=True, **change)


def test_a_schedule_is_one_however_it_is_given(tmp_path):
    toy(tmp_path / "run", 1)
    toy(tmp_path / "run", 2, resume=True, step_size=np.array([0.1, 0.05, 0.2]))


def test_a_run_of_before_these_settings_goes_on(tmp_path):
    plain = dict(belief_optimizer=None, step_size=0.1, nudging=None, nudging_growth=0.0)
    toy(tmp_path / "run", 1, **plain)
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("belief_optimizer", "nudging", "nudging_growth"):
        assert checkpoint["config"]["settings"].pop(name) is None
    del checkpoint["checksum"]
    torch.save({**checkpoint, "checksum": checksum(checkpoint)}, path)
    toy(tmp_path / "run", 2, resume=True, **plain)


@pytest.mark.parametrize("growth", [-0.1, float("nan"), "0.1"])
def test_bad_growth_is_refused(growth, tmp_path):
    with pytest.raises(pcfast.ArgumentError) as caught:
        toy(None, 1, nudging_growth=growth)
    assert caught.value.argument == "nudging_growth"
    with pytest.raises(pcfast.ArgumentError, match="without nudging"):
        toy(None, 1, nudging=None)


# The command line -----------------------------------------------------------------------------------------------

QUICK = ("--widths", "16", "--num-steps", "3", "--batch-size", "200", "--epochs", "2")


def run(*arguments) -> int:
    return main(["train", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (
            ("--belief-momentum", 0.5, "--belief-weight-decay", 0.1),
            {"belief_optimizer": "GradientDescent(momentum=0.5, weight_decay=0.1)"},
        ),
        (
            ("--belief-optimizer", "adam", "--step-size", 0.001),
            {"belief_optimizer": "Adam(betas=(0.9, 0.999), eps=1e-08)"},
        ),
        (
            ("--loss", "mse", "--nudging", "centred", "--nudging-beta", 0.2, "--nudging-growth", 0.1),
            {"nudging": "Nudging(kind='centred', beta=0.2)", "nudging_growth": 0.1},
        ),
        (
            ("--method", "incremental", "--belief-momentum", 0.35),
            {"method": "incremental", "belief_optimizer": "GradientDescent(momentum=0.35, weight_decay=0.0)"},
        ),
        (("--belief-momentum", 0), {}),
    ],
    ids=["momentum", "adam", "nudging", "incremental", "default"],
)
def test_options_reach_the_run_and_its_resumption(options, settings, tmp_path):
    expected = {**dict.fromkeys(("belief_optimizer", "nudging", "nudging_growth")), **settings}
    for more in (options, ("--resume", "--epochs", 3)):
        assert run(*QUICK, "--out", tmp_path / "run", *more) == 0
        result = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
        assert {name: result[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--belief-momentum", 1), ("--belief-momentum",)),
        (("--belief-weight-decay", -1), ("--belief-weight-decay",)),
        (("--belief-optimizer", "adam", "--belief-momentum", 0.5), ("--belief-momentum", "gd")),
        (("--belief-optimizer", "adam", "--method", "exact"), ("--belief-optimizer", "exact")),
        (("--nudging", "up"), ("--nudging", "centred")),
        (("--nudging", "centred"), ("--nudging", "mse")),
        (("--nudging", "centred", "--loss", "mse", "--method", "fixed-prediction"), ("--nudging", "linear")),
        (("--nudging", "centred", "--loss", "mse", "--method", "incremental"), ("--nudging", "incremental")),
        (("--nudging-beta", 0.5), ("--nudging-beta", "without --nudging")),
        (("--nudging-growth", 0.5), ("--nudging-growth", "without --nudging")),
        (("--nudging", "centred", "--nudging-beta", 0), ("--nudging-beta",)),
    ],
)
def test_bad_options_are_named_in_one_line(options, words, tmp_path, capsys):
    assert run(*QUICK, "--out", tmp_path / "run", *options) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err
