"""Training with a learning rate's schedule, with augmented inputs and without incomplete batches."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from pcfast import ArgumentError, ArgumentTypeError, Nudging, networks
from pcfast.recipes.learning_rates import warmup_cosine
from pcfast.training import trainer as training
from pcfast.training.checkpoints import callable_name

ROWS = 23


def toy_data():
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(ROWS, size, generator=generator) for size in (6, 3))
    return x, y, x[:5], y[:5]


def toy(out=None, epochs=2, *, seed=0, **changes):
    torch.manual_seed(seed)
    model = networks.mlp([6, 8, 3])
    settings = dict(loss="mse", batch_size=5, num_steps=3, optimizer=sgd, progress=False, out=out)
    history = training.train(model, toy_data(), epochs=epochs, **{**settings, **changes})
    return history, model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.5)


class Recorded:
    """A scheduler whose optimiser's learning rates are kept, step by step."""

    def __init__(self):
        self.steps, self.rates = None, []

    def __call__(self, optimizer, steps):
        self.steps = steps
        optimizer.register_step_pre_hook(lambda *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        return warmup_cosine(optimizer, steps, warmup=0.3 * steps)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 10), ({"drop_last": True}, 8), ({"method": "incremental", "optimizer": None}, 30)],
)
def test_the_schedule_steps_with_the_optimizer(changes, steps):
    recorded = Recorded()
    toy(scheduler=recorded, **changes)
    assert recorded.steps == steps == len(recorded.rates)
    assert len(set(recorded.rates)) > steps - 2
    base = 0.1 if changes.get("optimizer", sgd) else training.LEARNING_RATE
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    schedule = warmup_cosine(optimizer, steps, warmup=0.3 * steps)
    for rate in recorded.rates:
        assert rate == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_an_optimizer_of_the_callers_has_no_hook_left():
    torch.manual_seed(0)
    model = networks.mlp([6, 8, 3])
    optimizer = sgd(model.parameters())
    recorded = Recorded()
    settings = dict(loss="mse", batch_size=5, num_steps=3, progress=False, epochs=1)
    training.train(model, toy_data(), optimizer=optimizer, scheduler=recorded, **settings)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("warmup", [0, 2, 2.5, 9])
def test_warmup_cosine(warmup):
    """Against optax's definition: linear to the peak over the warm-up, then half a cosine."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = warmup_cosine(optimizer, 10, warmup=warmup, peak=1.5, end=0.25)
    for step in range(13):
        if step < warmup:
            expected = 0.5 + 0.25 * step / warmup
        else:
            angle = math.pi * min(step - warmup, 10 - warmup) / (10 - warmup)
            expected = 0.125 + 0.625 * (1 + math.cos(angle)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "changes",
    [{"warmup": -1}, {"warmup": 10}, {"warmup": math.nan}, {"peak": math.inf}, {"end": -1}, {"end": "0"}],
)
def test_schedules_that_do_not_fit(changes):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    with pytest.raises(ArgumentError, match=next(iter(changes))):
        warmup_cosine(optimizer, 10, **{"warmup": 1, **changes})


def test_functions_are_told_apart_by_their_names():
    """Without memory addresses: runs in two processes are compared."""

    class Plain:
        def __call__(self, x):
            return x

    names = [
        callable_name(function)
        for function in (
            Plain(),
            partial(warmup_cosine, warmup=5),
            partial(warmup_cosine, warmup=6),
            Noise(),
            len,
        )
    ]
    assert names[1:] == ["warmup_cosine(warmup=5)", "warmup_cosine(warmup=6)", "Noise", "len"]
    assert names[0].endswith("Plain")


def test_another_schedule_is_not_resumed(tmp_path):
    toy(tmp_path, epochs=1, scheduler=partial(warmup_cosine, warmup=2))
    with pytest.raises(ArgumentError, match=r"scheduler.name"):
        toy(tmp_path, epochs=1, scheduler=partial(warmup_cosine, warmup=3), resume=True)
    toy(tmp_path, epochs=1, scheduler=partial(warmup_cosine, warmup=2), resume=True)


def test_nudging_by_epoch():
    """A function of the epoch; None is plain predictive coding, which no nudging is."""
    asked = []

    def by_epoch(epoch):
        asked.append(epoch)
        return (None, Nudging("negative", 0.5))[epoch]

    def weights(nudging, epochs=2):
        _, model = toy(epochs=epochs, nudging=nudging, num_steps=9, step_size=0.3)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    result = weights(by_epoch)
    assert asked == [0, 1]
    assert torch.equal(weights(by_epoch, epochs=1), weights(None, epochs=1))
    assert not torch.equal(result, weights(None)) and not torch.equal(
        result, weights(Nudging("negative", 0.5))
    )
    assert torch.equal(result, weights(lambda epoch: Nudging("negative", 0.5) if epoch else None))
    with pytest.raises(ArgumentError, match="nudging_growth"):
        toy(nudging=by_epoch, nudging_growth=0.1)


class Noise:
    """An augmentation that draws from torch's global state."""

    def __init__(self):
        self.seen = []

    def __repr__(self):
        return "Noise"

    def __call__(self, x):
        self.seen.append(x)
        return x + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    """After an epoch, and within one (Ctrl-C after three batches)."""
    settings = dict(scheduler=Recorded(), augment=Noise(), drop_last=True)
    _, whole = toy(tmp_path / "whole", epochs=2, **settings)

    class Interrupted(Noise):
        def __call__(self, x):
            import signal

            if len(self.seen) == 1 + (4 if stop == 1 else 3):  # the first is the rehearsal
                signal.raise_signal(signal.SIGINT)
            return super().__call__(x)

    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path / "part", epochs=2, **{**settings, "augment": Interrupted(), "scheduler": Recorded()})
    _, resumed = toy(tmp_path / "part", epochs=2, seed=1, resume=True, **settings)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    # it is not the run without a schedule, nor the one without noise
    for without in ("scheduler", "augment"):
        _, other = toy(epochs=2, **{**settings, without: None})
        assert not torch.equal(next(other.parameters()), next(whole.parameters()))


def test_more_epochs_would_be_another_schedule(tmp_path):
    toy(tmp_path, epochs=1, scheduler=Recorded())
    with pytest.raises(ArgumentError, match=r"scheduler.steps is 5 there, 10 here"):
        toy(tmp_path, epochs=2, scheduler=Recorded(), resume=True)
    toy(tmp_path / "plain", epochs=1)
    toy(tmp_path / "plain", epochs=2, resume=True)


@pytest.mark.parametrize("change", [{"augment": Noise()}, {"drop_last": True}, {"scheduler": Recorded()}])
def test_runs_with_other_settings_are_not_resumed(tmp_path, change):
    toy(tmp_path, epochs=1)
    with pytest.raises(ArgumentError, match=f"{next(iter(change))}.* is absent there|is None there"):
        toy(tmp_path, epochs=1, resume=True, **change)


def test_incomplete_batches_are_left_out():
    noise = Noise()
    history, _ = toy(epochs=2, drop_last=True, augment=noise)
    assert [len(x) for x in noise.seen] == [5] * 9  # the rehearsal, and four batches an epoch
    first, second = (torch.cat(noise.seen[k : k + 4]) for k in (1, 5))
    x = toy_data()[0]
    for epoch in (first, second):  # every epoch another choice of 20 rows, none twice
        places = (epoch[:, None] == x).all(2)
        assert (places.sum(1) == 1).all() and places.sum(0).max() == 1
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    assert len(history) == 2 and all(math.isfinite(value) for value in history.train_loss)


def test_evaluation_is_not_augmented():
    noise = Noise()
    toy(epochs=1, augment=noise)
    assert not any(len(x) == 5 and torch.equal(x, toy_data()[2]) for x in noise.seen[1:])


REFUSED = {
    "batch_size": {"batch_size": ROWS + 1, "drop_last": True},
    "augment": {"augment": lambda x: x[:, :3]},
    "augment, a class": {"augment": Noise},
    "augment, no function": {"augment": "flip"},
    "scheduler": {"scheduler": lambda optimizer, steps: None},
    "scheduler, a class": {"scheduler": torch.optim.lr_scheduler.StepLR},
    "scheduler, of one argument": {"scheduler": lambda optimizer: None},
    "scheduler, that needs a loss": {
        "scheduler": lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    },
    "scheduler, of another optimizer": {
        "scheduler": lambda optimizer, steps: warmup_cosine(
            sgd([torch.zeros(1, requires_grad=True)]), steps, warmup=0
        )
    },
    "drop_last": {"drop_last": "no"},
    "nudging": {"nudging": lambda epoch: (None, 0.5)[epoch]},
    "nudging, a class": {"nudging": Nudging},
}


@pytest.mark.parametrize("argument", REFUSED)
def test_arguments_that_are_refused(argument, tmp_path):
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        toy(tmp_path / "run", **REFUSED[argument])
    assert caught.value.argument == argument.split(",")[0]
    assert not (tmp_path / "run").exists()
