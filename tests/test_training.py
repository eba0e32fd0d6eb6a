"""Training runs: the run folder, resuming, Ctrl-C, argument checks, and the default run on digits."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pcfast
from pcfast import datasets, networks
from pcfast.errors import ArgumentError, RelaxationDiverged
from pcfast.torch2pc import PCInfer
from pcfast.training import curves, scores
from pcfast.training import trainer as training
from pcfast.training.checkpoints import PARTS, checksum, flat
from pcfast.training.optimizers import adam
from pcfast.training.run import evaluate
from pcfast.training.trainer import History, train

BATCHES = 5  # of 20 samples an epoch of `toy_data`, the last one of 10


def toy_data() -> datasets.Data:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(120, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return datasets.Data(x[:90], y[:90], x[90:], y[90:])


def toy_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 12), nn.Tanh()),
        nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Dropout(0.2)),  # dropout: random state matters
        nn.Linear(12, 3),
    )


class HookedAdam(torch.optim.Adam):
    """Adam that calls ``after_step[number]()`` after that many updates."""

    after_step: dict  # update number, 1-based -> callable

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01)
        self.steps = 0

    def step(self):
        super().step()
        self.steps += 1
        self.after_step.get(self.steps, lambda: None)()


@pytest.fixture
def after_step(monkeypatch) -> dict:
    hooks: dict = {}
    monkeypatch.setattr(HookedAdam, "after_step", hooks, raising=False)
    return hooks


def toy_run(model=None, **arguments) -> tuple[nn.Sequential, History]:
    model = toy_model() if model is None else model
    settings = dict(epochs=4, batch_size=20, num_steps=6, seed=3, optimizer=HookedAdam, progress=False)
    return model, train(model, toy_data(), **{**settings, **arguments})


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_run(folder: Path, other: Path) -> None:
    """Bit for bit the same model, optimiser, random state and history (but for the times)."""
    a, b = checkpoint_of(folder), checkpoint_of(other)
    for key in ("model", "optimizer", "rng", "history"):
        flat_a, flat_b = flat(a[key]), flat(b[key])
        assert flat_a.keys() == flat_b.keys()
        for name, value in flat_a.items():
            if key == "history" and name.startswith("seconds"):
                continue
            same = torch.equal(value, flat_b[name]) if torch.is_tensor(value) else value == flat_b[name]
            assert same, (key, name)


@pytest.fixture
def uninterrupted(tmp_path, after_step) -> Path:
    toy_run(out=tmp_path / "uninterrupted")
    return tmp_path / "uninterrupted"


def send_interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------------------------------- resuming


def test_resume_from_an_epoch_boundary_is_bit_identical(tmp_path, uninterrupted):
    out = tmp_path / "run"
    toy_run(out=out, epochs=2)
    assert checkpoint_of(out)["epoch"] == 2
    model, history = toy_run(toy_model(seed=99), out=out, resume=True)
    assert len(history) == 4
    assert_same_run(out, uninterrupted)
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint_of(uninterrupted)["model"][name])


@pytest.mark.parametrize(
    ("step", "epoch", "position"),
    [(1, 0, 20), (BATCHES + 2, 1, 40), (2 * BATCHES, 1, 90), (4 * BATCHES, 3, 90)],
    ids=["first batch", "mid-epoch", "last batch of an epoch", "last batch of all"],
)
def test_resume_after_an_interrupt_is_bit_identical(
    tmp_path, uninterrupted, after_step, step, epoch, position
):
    out, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    after_step[step] = send_interrupt
    with pytest.raises(KeyboardInterrupt, match="resuming continues from"):
        toy_run(out=out)
    assert signal.getsignal(signal.SIGINT) is handler
    checkpoint = checkpoint_of(out)
    assert (checkpoint["epoch"], checkpoint["position"]) == (epoch, position)
    after_step.clear()
    toy_run(toy_model(seed=99), out=out, resume=True)
    assert_same_run(out, uninterrupted)


def test_a_second_interrupt_stops_at_once_and_keeps_the_checkpoint(tmp_path, uninterrupted, after_step):
    out = tmp_path / "run"

    def twice():
        send_interrupt()
        send_interrupt()

    after_step[BATCHES + 2] = twice
    with pytest.raises(KeyboardInterrupt):
        toy_run(out=out)
    assert checkpoint_of(out)["position"] == 0  # the one after epoch 1
    after_step.clear()
    toy_run(toy_model(seed=99), out=out, resume=True)
    assert_same_run(out, uninterrupted)


def test_an_interrupt_without_run_folder_stops_after_the_batch(after_step):
    after_step[2] = send_interrupt
    with pytest.raises(KeyboardInterrupt, match=r"after 0 epochs$"):
        toy_run()


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_training
from pcfast.training import trainer
loss_with = trainer.loss_with
def slow(*args, **kwargs):
    time.sleep(0.05)
    print("batch", flush=True)
    return loss_with(*args, **kwargs)
trainer.loss_with = slow
test_training.HookedAdam.after_step = {}
test_training.toy_run(out=sys.argv[2])
"""


def test_ctrl_c_in_a_process_leaves_a_checkpoint_that_resumes_bit_identically(tmp_path, uninterrupted):
    out = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(BATCHES + 3):  # well inside epoch 2
        assert child.stdout.readline() == "batch\n", child.stderr.read()
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT, errors
    checkpoint = checkpoint_of(out)
    assert checkpoint["epoch"] == 1 and 0 < checkpoint["position"] < 90
    toy_run(toy_model(seed=99), out=out, resume=True)
    assert_same_run(out, uninterrupted)


def test_a_run_outside_the_main_thread_leaves_signals_alone():
    handler, lengths = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(
        target=lambda: lengths.append(len(toy_run(epochs=1, optimizer=torch.optim.Adam)[1]))
    )
    thread.start()
    thread.join()
    assert lengths == [1] and signal.getsignal(signal.SIGINT) is handler


def test_resume_of_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    _, history = toy_run(out=uninterrupted, resume=True)
    assert len(history) == 4
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 30}, "batch_size is 20 there, 30 here"),
        ({"num_steps": 7}, "num_steps is 6 there, 7 here"),
        ({"method": "exact"}, "method is strict there, exact here"),
        ({"seed": 4}, "seed is 3 there, 4 here"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss is cross_entropy there"),
        ({"optimizer": torch.optim.SGD}, "optimizer.name is HookedAdam there, SGD here"),
        ({"model": nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))}, "network.0 is Sequential("),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, after_step, change, named):
    toy_run(out=tmp_path, epochs=1)
    with pytest.raises(ArgumentError, match=r"^resume: .*another run") as caught:
        toy_run(out=tmp_path, resume=True, **change)
    assert named in str(caught.value)


def test_other_data_is_refused(tmp_path, after_step):
    toy_run(out=tmp_path, epochs=1)
    data = toy_data()
    data.x_train[0, 0] += 1
    with pytest.raises(ArgumentError, match=r"data\.x_train"):
        train(
            toy_model(),
            data,
            epochs=2,
            batch_size=20,
            num_steps=6,
            seed=3,
            optimizer=HookedAdam,
            out=tmp_path,
            resume=True,
        )


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"], ids=["missing", "empty", "damaged"])
def test_a_missing_or_damaged_checkpoint_is_refused(tmp_path, after_step, content):
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"checkpoint\.pt"):
        toy_run(out=tmp_path, resume=True)


DAMAGES = {
    **{f"no {part}": (part, None) for part in PARTS},
    "a list for config": ("config", []),
    "no kept": ("config", {"settings": {}}),
    "a number for model": ("model", 5),
    "an empty optimizer": ("optimizer", {}),
    "a string for position": ("position", "x"),
    "a position beyond the epoch": ("position", 10**6),
    "a position inside a batch": ("position", 7),
    "a bool for epoch": ("epoch", True),
    "NaN so far": ("loss_sum", float("nan")),
    "fewer than no hits": ("correct", -1),
    "more hits than samples": ("correct", 10**6),
    "an infinite residual": ("residual", float("inf")),
    "a short random state": ("rng", {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}),
    "a history of another length": ("history", {}),
    "another format": ("format", 3),
    "format 1": ("format", 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("signed", [False, True], ids=["", "with its checksum"])
def test_a_checkpoint_that_cannot_be_is_refused(tmp_path, after_step, damage, signed):
    """The checksum finds every change; and what has the right one is looked at part by part."""
    toy_run(out=tmp_path, epochs=1)
    part, value = DAMAGES[damage]
    checkpoint = checkpoint_of(tmp_path)
    if value is None:
        del checkpoint[part]
    else:
        checkpoint[part] = value
    if signed and part != "checksum":
        checkpoint["checksum"] = checksum({k: v for k, v in checkpoint.items() if k != "checksum"})
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    before, model = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, toy_model(seed=5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"^out: got .*checkpoint\.pt") as caught:
        toy_run(model, out=tmp_path, resume=True)
    assert caught.value.remedy and "weights_only" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def as_format_1(path: Path) -> None:
    """Rewrite a checkpoint as releases before the checksum wrote it."""
    checkpoint = torch.load(path, weights_only=True)
    parts = (
        "format", "config", "model", "optimizer", "scheduler", "epoch", "position", "loss_sum", "correct",
        "seconds", "rng", "history",
    )  # fmt: skip
    columns = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
    checkpoint = {name: checkpoint[name] for name in parts}
    checkpoint["history"] = {name: checkpoint["history"][name] for name in columns}
    torch.save({**checkpoint, "format": 1}, path)


def test_a_run_of_an_unfused_optimiser_is_resumed_as_it_was(tmp_path):
    """The default optimiser is fused now; what tells runs apart is what an optimiser computes, not how."""
    unfused = partial(torch.optim.Adam, lr=training.LEARNING_RATE)
    toy_run(out=tmp_path / "whole", optimizer=unfused)
    toy_run(out=tmp_path / "run", optimizer=unfused, epochs=2)
    toy_run(toy_model(seed=99), out=tmp_path / "run", optimizer=None, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    checkpoint = checkpoint_of(tmp_path / "run")
    settings = checkpoint["config"]["settings"]["optimizer"]["groups"][0]
    assert "fused" not in settings and checkpoint["optimizer"]["param_groups"][0]["fused"] is None
    settings["fused"] = None  # as earlier releases kept it
    checkpoint["checksum"] = checksum({k: v for k, v in checkpoint.items() if k != "checksum"})
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    toy_run(out=tmp_path / "run", optimizer=None, resume=True, epochs=5)
    toy_run(out=tmp_path / "new", optimizer=None)
    assert checkpoint_of(tmp_path / "new")["optimizer"]["param_groups"][0]["fused"] is True


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_steps_are_those_of_one_operation_after_the_other(kind):
    """In float64 to rounding; complex parameters, for which torch has no fused form, bit for bit."""
    for dtype, fused in ((torch.float64, True), (torch.complex128, None)):
        torch.manual_seed(0)
        start, gradients = torch.randn(7, 5, dtype=dtype), torch.randn(20, 7, 5, dtype=dtype)
        moved = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        made = (
            adam(moved[:1], kind=kind, lr=0.01, weight_decay=0.1),
            kind(moved[1:], lr=0.01, weight_decay=0.1),
        )
        assert made[0].defaults["fused"] is fused
        for gradient in gradients:
            for parameter, optimizer in zip(moved, made, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        assert not torch.equal(moved[0], start)
        torch.testing.assert_close(moved[0], moved[1], rtol=1e-13 if fused else 0, atol=1e-15 if fused else 0)


class Scaled(nn.Module):
    """A module that pcfast does not know; its updates come in other layouts than its parameters have."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.ones(5))

    def forward(self, a):
        return a @ self.weight.t().contiguous().t() * self.scale.sum()


@pytest.mark.parametrize("layout", ["as it is", "channels last", "permuted"])
def test_fused_optimisers_get_gradients_laid_out_as_their_parameters(layout):
    """incremental_step and PCInfer set .grad themselves; a fused optimiser walks memory and sees no strides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Sequential(nn.Flatten(2), nn.Linear(4, 1), nn.Flatten()), Scaled()
    )
    x, y = torch.randn(8, 3, 2, 2), torch.randint(0, 5, (8,))
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "permuted":
        x = torch.randn(8, 2, 2, 3).permute(0, 3, 1, 2)
    other = copy.deepcopy(model)
    for one, make in ((model, adam), (other, torch.optim.Adam)):
        optimizer = make(list(one.parameters()), lr=0.01)
        for _ in range(2):
            pcfast.incremental_step(one, x, y, optimizer, num_steps=3)
            PCInfer(one, nn.CrossEntropyLoss(), x, y, "Strict", eta=0.1, n=3)
            optimizer.step()
    assert all(p.grad.stride() == p.stride() for p in model.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_part_of_another_tensor_is_moved_alone():
    whole = torch.zeros(4, 8)
    parameter = nn.Parameter(whole[:, :6])
    assert parameter.data_ptr() == whole.data_ptr()
    parameter.grad = torch.ones(4, 6)
    adam([parameter], lr=0.1).step()
    assert bool((whole[:, :6] < -0.09).all()) and not whole[:, 6:].any()


def test_a_checkpoint_without_a_checksum_resumes_bit_identically(tmp_path, uninterrupted, after_step, caplog):
    out = tmp_path / "run"
    after_step[BATCHES + 2] = send_interrupt
    with pytest.raises(KeyboardInterrupt):
        toy_run(out=out)
    as_format_1(out / "checkpoint.pt")
    after_step.clear()
    toy_run(toy_model(seed=99), out=out, resume=True)
    assert_same_run(out, uninterrupted)
    assert "format 1, which has no checksum" in caplog.text
    checkpoint = checkpoint_of(out)
    assert checkpoint["format"] == 2 and checkpoint.pop("checksum") == checksum(checkpoint)
    as_format_1(out / "checkpoint.pt")
    damaged = {**checkpoint_of(out), "correct": -1}
    torch.save(damaged, out / "checkpoint.pt")
    with pytest.raises(ArgumentError, match="a part 'correct' that cannot be"):
        toy_run(out=out, resume=True)


def test_the_checksum_is_of_every_bit(tmp_path, after_step):
    toy_run(out=tmp_path, epochs=1)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint.pop("checksum") == checksum(checkpoint)
    tensors = [v for v in flat(checkpoint).values() if torch.is_tensor(v)]
    assert len(tensors) > 10
    for tensor in tensors:
        bits = tensor.reshape(-1).view(torch.uint8)
        bits[-1] ^= 1
        assert checksum(checkpoint) != checkpoint_of(tmp_path)["checksum"]
        bits[-1] ^= 1
    nested = current = []
    for _ in range(40):  # each stands twice in the one around it: 2^40 places
        current = nested = [nested, nested]
    assert len(checksum({"a": current})) == 64
    assert checksum({"a": 1}) != checksum({"a": 1.0}) != checksum({"a": True}) != checksum({"a": [1]})


@pytest.mark.parametrize("lost", ["config.json", "log.csv", "curves.png"])
@pytest.mark.parametrize("epochs", [2, 3], ids=["finished", "going on"])
def test_what_a_kill_kept_from_the_folder_is_written_on_resuming(tmp_path, after_step, lost, epochs):
    toy_run(out=tmp_path, epochs=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if lost == "log.csv":  # as after the epoch before
        (tmp_path / lost).write_text("\n".join((tmp_path / lost).read_text().splitlines()[:-1]) + "\n")
    else:
        (tmp_path / lost).unlink()
    toy_run(out=tmp_path, epochs=epochs, resume=True)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert after.keys() == before.keys() and (epochs == 3 or after == before)


def test_parts_that_repr_with_addresses_or_not_at_all_resume(tmp_path, after_step):
    class Wordless(nn.Tanh):
        def __repr__(self):
            raise RuntimeError("no words")

    class Lambda(nn.Tanh):
        def extra_repr(self):
            return f"{object()}"

    def model() -> nn.Sequential:
        return nn.Sequential(
            nn.Sequential(nn.Linear(6, 5), Wordless()), nn.Sequential(Lambda(), nn.Linear(5, 3))
        )

    toy_run(model(), out=tmp_path, epochs=1)
    assert len(toy_run(model(), out=tmp_path, epochs=2, resume=True)[1]) == 2


# ------------------------------------------------------------------------------------------ signals and output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_as_ctrl_c_does(tmp_path, uninterrupted, after_step, number, capfd):
    out = tmp_path / "run"
    after_step[BATCHES + 2] = lambda: signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt, match="resuming continues from"):
        toy_run(out=out)
    assert signal.getsignal(number) == signal.SIG_DFL
    assert "stopping after this batch" in capfd.readouterr().err
    after_step.clear()
    toy_run(toy_model(seed=99), out=out, resume=True)
    assert_same_run(out, uninterrupted)


def test_handlers_of_the_program_stay(after_step):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(0))
    try:
        after_step[2] = lambda: signal.raise_signal(signal.SIGTERM)
        assert len(toy_run(epochs=1)[1]) == 1 and seen == [0]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("failing", ["full", "closed pipe", "closed", "none"])
def test_output_that_cannot_be_written_costs_nothing(tmp_path, after_step, failing, monkeypatch, caplog):
    if failing == "full":
        stream = open("/dev/full", "w")  # noqa: SIM115
    elif failing == "none":
        stream = None
    else:
        end, start = os.pipe()
        stream = os.fdopen(start, "w")
        os.close(end)
        if failing == "closed":
            with contextlib.suppress(OSError):
                stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    _, history = toy_run(out=tmp_path, epochs=3, progress=True)
    assert len(history) == 3 == checkpoint_of(tmp_path)["epoch"]
    said = [r for r in caplog.records if "standard output cannot be written" in r.message]
    assert len(said) == (0 if failing == "none" else 1)
    with contextlib.suppress(OSError, AttributeError):
        stream.close()


@pytest.mark.parametrize("failing", ["draw", "write", "latex"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, after_step, monkeypatch, caplog, failing):
    import matplotlib
    from matplotlib.figure import Figure

    def fails(*arguments, **options):
        raise OSError("no font") if failing == "write" else RuntimeError("no font")

    monkeypatch.setattr(training, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    if failing == "latex":  # drawn without
        monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    elif failing == "draw":
        monkeypatch.setattr(Figure, "subplots", fails)
    else:
        monkeypatch.setattr(curves, "write_atomically", fails)
    _, history = toy_run(out=tmp_path / "$x^_%", epochs=3)
    assert len(history) == 3 and matplotlib.rcParams["text.usetex"] == (failing == "latex")
    said = [record.message for record in caplog.records]
    assert len(said) == (failing != "latex") and all("curves.png could not be drawn" in text for text in said)
    assert (tmp_path / "$x^_%" / "curves.png").exists() == (failing == "latex")


@pytest.mark.parametrize(
    "name", ["price_$5_of_$x^", "[bold]x[-red]", "\u5b9f\u9a13\u4e00", b"l\xc3\xa4u\xff", "a\nb"]
)
def test_a_folders_name_is_a_name(tmp_path, after_step, name, capsys, recwarn):
    """In title and lines: no mathematics, no markup, no letters that font and output must have."""
    out = tmp_path / os.fsdecode(name)
    for _ in range(2):
        toy_run(out=out, epochs=1, progress=True)
    assert (out / "curves.png").is_file() and (out / "earlier-1" / "curves.png").is_file()
    if name == "[bold]x[-red]":
        assert f"moved to {out}/earlier-1" in capsys.readouterr().out
    assert not recwarn.list


# -------------------------------------------------------------------------------------------- run folder


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, after_step, monkeypatch, failing):
    toy_run(out=tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments, **_):
        if failing == "write":
            arguments[1].write(b"half of a checkpoint")
        raise OSError("no space left")

    monkeypatch.setattr(
        *{"write": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace")}[failing], full
    )
    with pytest.raises(OSError, match="no space left"):
        toy_run(out=tmp_path, epochs=2, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_divergence_keeps_the_checkpoint_of_the_last_finished_epoch(tmp_path, after_step):
    model = toy_model()

    def explode():
        with torch.no_grad():
            model[0][0].weight.fill_(torch.inf)

    after_step[BATCHES + 2] = explode
    with pytest.raises(RelaxationDiverged):
        toy_run(model, out=tmp_path)
    checkpoint = checkpoint_of(tmp_path)
    assert (checkpoint["epoch"], checkpoint["position"]) == (1, 0)
    assert all(torch.isfinite(value).all() for value in checkpoint["model"].values())


def test_the_files_of_a_run(tmp_path, after_step):
    _, history = toy_run(out=tmp_path / "a" / "b", epochs=3)
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "curves.png",
        "log.csv",
    ]
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["test_loss"]) for row in rows] == history.test_loss
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["method"] == "strict" and settings["num_steps"] == 6
    assert checkpoint_of(folder)["config"]["settings"] == settings


def test_curves_are_a_picture_with_something_on_it(tmp_path):
    from matplotlib.image import imread

    history = History()
    for epoch in range(1, 6):
        history.append(
            train_loss=1 / epoch,
            train_accuracy=1 - 0.5 / epoch,
            test_loss=1.2 / epoch,
            test_accuracy=1 - 0.6 / epoch,
            seconds=1.0,
        )
    curves.training_curves(history, tmp_path / "curves.png", title="five epochs")
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50
    with pytest.raises(ArgumentError, match="history"):
        curves.training_curves(History(), tmp_path / "none.png")


# ---------------------------------------------------------------------------------------- what it computes


def test_the_global_random_state_and_the_mode_are_restored(after_step):
    model = toy_model().eval()
    before = torch.get_rng_state()
    toy_run(model, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_the_run_is_a_function_of_its_seed(after_step):
    first, again, other = (toy_run(epochs=2, seed=seed)[0] for seed in (3, 3, 4))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0][0].weight, other[0][0].weight)


def test_an_optimizer_instance_is_used(after_step):
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = [p.clone() for p in model.parameters()]
    toy_run(model, epochs=1, optimizer=optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_one_hot_targets_and_losses_per_sample():
    data, model = toy_data(), toy_model()
    one_hot = data._replace(
        y_train=nn.functional.one_hot(data.y_train, 3).float(),
        y_test=nn.functional.one_hot(data.y_test, 3).float(),
    )
    history = train(model, one_hot, epochs=30, batch_size=10, loss="mse", method="exact", progress=False)
    assert history.test_accuracy[-1] > 0.7
    mean = evaluate(model, data.x_test, data.y_test, batch_size=7)
    total = evaluate(model, data.x_test, data.y_test, loss=nn.CrossEntropyLoss(reduction="sum"), batch_size=7)
    assert mean == pytest.approx(total)
    with torch.no_grad():
        whole = nn.functional.cross_entropy(model.eval()(data.x_test), data.y_test).item()
    assert mean[0] == pytest.approx(whole)


def frozen_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU()),
        nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)),
        nn.Linear(7, 3),
    ).train()
    model[0][1].eval()
    model[1][2].eval()
    return model


@pytest.mark.parametrize("way", ["strict", "incremental", "evaluate", "refused", "interrupted", "diverged"])
def test_every_part_is_in_its_mode_again(way, after_step):
    model = frozen_model()
    modes = [module.training for module in model.modules()]
    frozen, moving = (model[i][1].running_mean.clone() for i in (0, 1))
    data = toy_data()
    if way == "evaluate":
        evaluate(model, data.x_test, data.y_test)
    elif way == "refused":
        with pytest.raises(ArgumentError):
            train(model, data._replace(y_train=data.y_train + 9), epochs=1, progress=False)
    elif way == "interrupted":
        after_step[2] = send_interrupt
        with pytest.raises(KeyboardInterrupt):
            toy_run(model)
    elif way == "diverged":
        with pytest.raises(RelaxationDiverged):
            toy_run(model, step_size=1e30, num_steps=50)
    else:
        toy_run(model, method=way, epochs=2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[0][1].running_mean, frozen)
    if way in ("strict", "incremental"):
        assert not torch.equal(model[1][1].running_mean, moving)


def test_a_model_in_eval_mode_is_trained_in_train_mode(after_step):
    model, seen = frozen_model().eval(), set()
    model[1][2].register_forward_hook(lambda module, *_: seen.add(module.training))
    toy_run(model, epochs=1)
    assert True in seen and not any(module.training for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["strict", "exact", "incremental"])
def test_the_callers_grad_mode_is_no_matter(context, method, after_step):
    model, _ = toy_run(method=method, epochs=1)
    other = toy_model()
    with context():
        data = datasets.Data(*(tensor.clone() for tensor in toy_data()))
        toy_run(other, method=method, epochs=1)
        if context is torch.inference_mode:
            with pytest.raises(ArgumentError, match=r"^model: got parameters made under"):
                toy_run(nn.Sequential(nn.Linear(6, 3)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    train(toy_model(), data, epochs=1, progress=False)  # inference tensors


class Pairs(nn.Module):
    """Takes no single row while it trains."""

    def forward(self, x):
        if self.training and len(x) < 2:
            raise RuntimeError("one row")
        return x


@pytest.mark.parametrize("part", [lambda: nn.BatchNorm1d(12), Pairs])
def test_a_last_batch_that_cannot_be_trained_on_is_found_first(part, after_step, tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 12), part(), nn.Flatten()), nn.Linear(12, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"^batch_size: got 89, with 1 left.*drop_last=True"):
        toy_run(model, batch_size=89, out=tmp_path / "run")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "run").exists()
    if isinstance(model[0][1], nn.BatchNorm1d):
        toy_run(model, batch_size=89, drop_last=True, epochs=1)
        assert model[0][1].num_batches_tracked == 1  # rehearsals move nothing


def test_regression_is_judged_by_r2(tmp_path, after_step, capsys):
    torch.manual_seed(0)
    x = torch.randn(120, 6)
    y = x @ torch.randn(6, 1) + 5
    data = (x[:90], y[:90], x[90:], y[90:])
    optimizer = partial(torch.optim.SGD, lr=0.1)
    settings = dict(batch_size=16, loss="mse", method="exact", out=tmp_path / "run", optimizer=optimizer)
    model = nn.Sequential(nn.Linear(6, 1))
    first = evaluate(model, *data[2:], loss="mse")[1]
    history = train(model, data, epochs=40, **settings)
    output = model(data[2]).detach()
    expected = 1 - (output - data[3]).square().sum() / (data[3] - data[3].mean()).square().sum()
    assert first < 0 < history.test_r2[-1] == pytest.approx(expected.item(), abs=1e-5)
    assert evaluate(model, *data[2:], loss="mse")[1] == pytest.approx(history.test_r2[-1], abs=1e-6)
    assert all(map(math.isnan, history.test_accuracy + history.train_accuracy))
    assert history.train_r2[0] < history.train_r2[-1] <= 1
    said = capsys.readouterr().out
    assert "R^2" in said and "%" not in said
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["test_r2"]) == history.test_r2[-1] and "test_accuracy" not in rows[0]
    again = train(nn.Sequential(nn.Linear(6, 1)), data, epochs=41, resume=True, **settings)
    assert again.test_r2[:40] == history.test_r2
    as_format_1(tmp_path / "run" / "checkpoint.pt")  # which did not measure R^2
    older = train(nn.Sequential(nn.Linear(6, 1)), data, epochs=42, resume=True, **settings)
    assert all(map(math.isnan, older.test_r2[:41])) and math.isfinite(older.test_r2[41])


def test_values_that_are_no_classes():
    for y, loss, classes in (
        (torch.tensor([0, 2]), "cross_entropy", True),
        (torch.eye(3), "mse", True),
        (torch.full((2, 4), 0.25, dtype=torch.bfloat16), "mse", True),
        (torch.tensor([[0.5, 0.2]]), nn.CrossEntropyLoss(), True),
        (torch.tensor([[0.5, 0.2]]), "mse", False),
        (torch.tensor([[1.5, -0.5]]), "mse", False),
        (torch.ones(4, 1), "mse", False),
        (torch.ones(4), nn.MSELoss(), False),
    ):
        assert scores.are_classes(y, loss) == classes
    assert math.isnan(scores.r2(1.0, 0.0))


# --------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "^epochs: got 0"),
        ({"epochs": 2.0}, "^epochs: got 2.0"),
        ({"batch_size": True}, "^batch_size: got True"),
        ({"seed": -1}, "^seed: got -1"),
        *(
            ({name: 10**40}, f"^{name}: got a number of more")
            for name in ("epochs", "batch_size", "num_steps", "seed")
        ),
        ({"epochs": 10**9}, "^epochs: got 1000000000; needed: at most"),
        ({"num_steps": 10**9, "method": "fixed_prediction"}, "^num_steps: got 1000000000; needed: at most"),
        ({"out": "a\0b"}, "^out: got "),
        ({"out": 3}, "^out: got a int"),
        ({"kept": {1: object()}}, "^kept: got "),
        ({"resume": True}, "^out: got None with resume=True"),
        ({"optimizer": "adam"}, "^optimizer: got a str"),
        ({"optimizer": lambda parameters: None}, "^optimizer: got a callable that returned a NoneType"),
        ({"optimizer": torch.optim.LBFGS}, "^optimizer: got LBFGS"),
        ({"optimizer": torch.optim.Adam(nn.Linear(1, 1).parameters())}, "^optimizer: got parameters that"),
        ({"model": nn.Linear(6, 3)}, "^model: got a Linear"),
        ({"model": nn.Sequential(nn.ReLU())}, "^model: got no parameters"),
        ({"model": toy_model().double()}, "^data: got x_train of torch.float32"),
        ({"method": "stricter"}, "method"),
        ({"loss": 3}, "loss"),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, after_step):
    with pytest.raises(ArgumentError, match=message):
        toy_run(**change)


@pytest.mark.parametrize(
    "replacement",
    [
        {"x_train": torch.zeros(0, 6), "y_train": torch.zeros(0, dtype=torch.int64)},
        {"y_train": torch.zeros(89, dtype=torch.int64)},
        {"y_test": torch.zeros(30, dtype=torch.int32)},
        {"y_test": torch.zeros(30)},
        {"x_test": torch.zeros(30, 5)},
    ],
    ids=["empty", "lengths", "int32 labels", "float labels", "shapes"],
)
def test_bad_data_is_named(replacement):
    with pytest.raises(ArgumentError, match=r"^data: got"):
        train(toy_model(), toy_data()._replace(**replacement), epochs=1, progress=False)
    with pytest.raises(ArgumentError, match=r"^data: got a list"):
        train(toy_model(), [1, 2, 3, 4], epochs=1, progress=False)


def test_an_impossible_run_folder_is_named(tmp_path, after_step):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"^out: got"):
        toy_run(out=tmp_path / "file")


# --------------------------------------------------------------------------- data, networks, the default run


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("sklearn.datasets", datasets.digits),
        ("matplotlib", lambda: toy_run(out="never-made")),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(missing, call, after_step, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "pcfast\[train\]"'):
        call()
    assert not Path("never-made").exists()


@pytest.mark.parametrize(
    ("make", "layers", "sample", "outputs"),
    [
        (networks.digits_mlp, 3, (64,), 10),
        (networks.mlp_600, 3, (784,), 10),
        (networks.deep_mlp, 33, (784,), 10),
        (networks.wide_mlp, 4, (4096,), 4096),
        (networks.mnist_cnn, 5, (1, 28, 28), 10),
        (networks.cifar_cnn, 6, (3, 32, 32), 10),
        (networks.vgg5, 5, (3, 32, 32), 10),
        (partial(networks.vgg5, num_classes=7, last_padding=1), 5, (3, 32, 32), 7),
        (networks.vgg7, 7, (3, 32, 32), 10),
        (networks.vgg9, 9, (3, 32, 32), 10),
        (networks.vgg19, 19, (3, 224, 224), 1000),
    ],
)
def test_networks_have_the_documented_shapes(make, layers, sample, outputs):
    with torch.device("meta"):
        model = make()
        assert model(torch.empty(2, *sample)).shape == (2, outputs)
    assert len(model) == layers


def test_bad_network_sizes_are_named():
    for make, message in (
        (lambda: networks.mlp([3]), "widths"),
        (lambda: networks.mlp([3, 0, 2]), "widths"),
        (lambda: networks.deep_mlp(0), "depth"),
        (lambda: networks.vgg19(0), "num_classes"),
        (lambda: networks.vgg7(num_classes=0), "num_classes"),
        (lambda: networks.vgg5(last_padding=2), "last_padding"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make()
