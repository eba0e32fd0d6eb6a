"""Predictive coding against backpropagation: every number against a computation that shares no code with it."""

from __future__ import annotations

import copy
import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from literal import relax_literally
from torch import nn

from pcfast import networks
from pcfast.comparison import compare as comparison
from pcfast.comparison import plots as comparison_plots
from pcfast.comparison.compare import (
    angle_degrees,
    compare_errors,
    compare_iterations,
    compare_training,
    relative_error,
)
from pcfast.datasets import Data
from pcfast.errors import ArgumentError, ModelError
from pcfast.support import figures

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)


def toy_model(*extra: nn.Module) -> nn.Sequential:
    """Four PC layers, float64."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 9), nn.Tanh()),
        nn.Sequential(nn.Linear(9, 8), *extra, nn.ReLU()),
        nn.Sequential(nn.Linear(8, 7), nn.Tanh()),
        nn.Linear(7, 3),
    ).double()


def toy_data(dtype=torch.float64) -> Data:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(70, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    x = x.to(dtype)
    return Data(x[:50], y[:50], x[50:], y[50:])


def toy_batch() -> tuple[torch.Tensor, torch.Tensor]:
    data = toy_data()
    return data.x_train[:20], data.y_train[:20]


def gradients(model: nn.Sequential, x, y, loss=F.cross_entropy) -> list[torch.Tensor]:
    """dLoss/dtheta layer by layer, as one vector each, by ``backward`` on a copy."""
    model = copy.deepcopy(model)
    loss(model(x), y).backward()
    return [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in model]


def literal_updates(model: nn.Sequential, x, y, **settings) -> list[torch.Tensor]:
    result = relax_literally(model, x, y, loss=F.cross_entropy, **settings).gradients
    return [
        torch.cat([result[f"{l}.{name}"].flatten() for name, _ in layer.named_parameters()])
        for l, layer in enumerate(model)
    ]


def measured_apart(update, gradient) -> tuple[float, float]:
    """(relative error, angle in degrees), the angle from the parts of the update along and across the gradient."""
    update, gradient = update.numpy(), gradient.numpy()
    size = np.linalg.norm(gradient)
    along = update @ gradient / size
    across = np.linalg.norm(update - along * gradient / size)
    return np.linalg.norm(update - gradient) / size, math.degrees(math.atan2(across, along))


def binomial_tail(trials: int, probability: float, least: int) -> float:
    """P(Binomial(trials, probability) >= least): docs/method.md fact 1."""
    return sum(
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        for k in range(least, trials + 1)
    )


def test_angles_keep_their_digits_and_do_not_exist_without_a_direction():
    a = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    for angle in (1e-12, 1e-6, 0.5, math.pi - 1e-6):
        b = 7 * torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)
        assert angle_degrees(a, b) == pytest.approx(math.degrees(angle), rel=1e-9)
    assert angle_degrees(a, 2 * a) == 0 and angle_degrees(a, -a) == 180
    zero = torch.zeros(3)
    for pair in ((a, zero), (zero, a), (zero, zero), (a, torch.tensor([math.inf, 0, 0]))):
        assert math.isnan(angle_degrees(*pair))
    assert (
        relative_error(1.5 * a, a) == 0.5 and relative_error(zero, a) == 1 and relative_error(zero, zero) == 0
    )
    assert math.isnan(relative_error(a, zero))


def test_fixed_prediction_meets_its_closed_form():
    model, (x, y) = toy_model(), toy_batch()
    rows = compare_iterations(model, x, y, methods=["fixed_prediction"], iterations=[1, 2, 3, 6, 10, 25, 60])
    g = [torch.linalg.vector_norm(gradient).item() for gradient in gradients(model, x, y)]
    whole = math.hypot(*g)
    assert len(rows) == 4 * 8 * 5  # step sizes; iterations and L = 4; layers and "all"
    for row in rows:
        errors = [1 - binomial_tail(row.num_steps - 1, row.step_size, 4 - l) for l in (1, 2, 3, 4)]
        if row.layer == "all":
            parts = [error * size for error, size in zip(errors, g, strict=True)]
            assert row.relative_error == pytest.approx(math.hypot(*parts) / whole, abs=1e-12)
            continue
        error = errors[row.layer - 1]
        assert row.relative_error == pytest.approx(error, abs=1e-12)
        reached = row.num_steps - 1 >= 4 - row.layer  # before that the update is zero
        assert row.angle_degrees < 1e-6 if reached else math.isnan(row.angle_degrees)
    exact = [row for row in rows if row.step_size == 1 and row.num_steps >= 4]
    assert (
        all(row.relative_error < 1e-14 and row.angle_degrees < 1e-6 for row in exact) and len(exact) == 5 * 5
    )
    for step_size in (0.1, 0.2, 0.5):
        falling = [r.relative_error for r in rows if r.step_size == step_size and r.layer == "all"]
        assert all(later < earlier for earlier, later in pairwise(falling))


def test_strict_and_exact_meet_independent_computations():
    model, (x, y) = toy_model(), toy_batch()
    before = copy.deepcopy(model.state_dict())
    rows = compare_iterations(
        model, x, y, methods=["strict", "exact"], step_sizes=[0.1, 0.5], iterations=[9, 5, 9]
    )
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert [row.num_steps for row in rows if row.layer == "all"] == [4, 5, 9] * 4
    g = gradients(model, x, y)
    for row in rows:
        if row.method == "exact":
            assert row.relative_error < 1e-12 and row.angle_degrees < 1e-10
            continue
        settings = {"step_size": row.step_size, "num_steps": row.num_steps}
        update = literal_updates(model, x, y, method="strict", **settings)
        pair = (
            (torch.cat(update), torch.cat(g))
            if row.layer == "all"
            else (update[row.layer - 1], g[row.layer - 1])
        )
        assert (row.relative_error, row.angle_degrees) == pytest.approx(measured_apart(*pair), abs=1e-9)


def test_a_relaxation_that_diverges_is_a_row_with_its_reason(tmp_path):
    model = networks.mlp([6, 9, 8, 3], nn.Identity)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    x, y = torch.randn(5, 6), torch.randn(5, 3)
    settings = {"loss": "mse", "methods": ["strict"]}
    rows = compare_iterations(model, x, y, step_sizes=[0.01, 1], iterations=[100], **settings)
    diverged = [row for row in rows if row.note]
    assert {(row.step_size, row.num_steps) for row in diverged} == {(1, 100)} and len(diverged) == 4
    for row in diverged:
        assert math.isnan(row.relative_error) and math.isnan(row.angle_degrees)
        assert "diverged in iteration" in row.note
    errors = compare_errors(model, x, y, num_steps=100, step_size=1, **settings)
    assert all(math.isnan(row.error_norm) and row.exact_norm > 0 and row.note for row in errors)
    comparison_plots.overview(tmp_path / "all.png", iterations=rows, errors=errors)
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", [toy_model, lambda: networks.vgg19(10, width=1, image_size=32).double()])
def test_errors_meet_autograd_the_closed_form_and_the_literal_loop(make):
    model = make()
    x, y = toy_batch() if len(model) == 4 else (torch.randn(2, 3, 32, 32).double(), torch.tensor([3, 8]))
    settings = {"num_steps": 40, "step_size": 0.1}
    rows = compare_errors(model, x, y, methods=["fixed_prediction", "strict"], **settings)
    depth = len(model)
    values = [x]
    for layer in model:
        values.append(layer(values[-1]))
        values[-1].retain_grad()
    F.cross_entropy(values[-1], y).backward()
    literal = relax_literally(model, x, y, loss=F.cross_entropy, method="strict", **settings).errors
    assert [(row.method, row.layer) for row in rows] == [
        (method, l) for method in ("fixed_prediction", "strict") for l in range(1, depth + 1)
    ]
    for row in rows:
        g = values[row.layer].grad.numpy()
        size = np.linalg.norm(g)
        assert row.exact_norm == pytest.approx(size, rel=1e-10)
        if row.method == "strict":
            eps = literal[row.layer].numpy()
            expected = np.linalg.norm(eps), np.linalg.norm(eps - g) / size
        else:
            c = binomial_tail(39, 0.1, depth - row.layer)
            expected = c * size, 1 - c
        # absolute: rounding of the literal loop, 64 * 2^-52 * n * |v| (docs/method.md), against |g_l|
        slack = 64 * 2**-52 * 40 * torch.linalg.vector_norm(values[row.layer]).item()
        assert row.error_norm == pytest.approx(expected[0], rel=1e-9, abs=slack)
        assert row.relative_error == pytest.approx(expected[1], rel=1e-9, abs=slack / size + 1e-12)


def batches(data: Data, epochs: int, size: int, seed: int):
    """The order of batches that training documents: a permutation by (seed, epoch)."""
    for epoch in range(epochs):
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(len(data.x_train)))
        for rows in order.split(size):
            yield data.x_train[rows], data.y_train[rows]


def test_backpropagation_is_a_plain_torch_loop():
    model, data = toy_model(), toy_data()
    result = compare_training(
        model, data, methods=["exact"], epochs=2, batch_size=20, optimizer=SGD, seed=3, test_every=4
    )
    trained = copy.deepcopy(model)
    optimizer = SGD(trained.parameters())
    losses, accuracies, tests = [], [], {}

    def test(step):
        output = trained(data.x_test)
        correct = (output.argmax(1) == data.y_test).double().mean().item()
        tests[step] = F.cross_entropy(output, data.y_test).item(), correct

    for step, (x, y) in enumerate(batches(data, 2, 20, seed=3)):
        if step % 4 == 0:
            test(step)
        output = trained(x)
        loss = F.cross_entropy(output, y)
        losses.append(loss.item())
        accuracies.append((output.argmax(1) == y).double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test(6)

    curve = result.curve("backpropagation")
    assert [row.step for row in curve] == list(range(7)) and result.steps_per_epoch == 3
    assert [row.train_loss for row in curve[:-1]] == losses
    assert [row.train_accuracy for row in curve[:-1]] == accuracies
    assert math.isnan(curve[-1].train_loss) and math.isnan(curve[-1].train_accuracy)
    assert {r.step: (r.test_loss, r.test_accuracy) for r in curve if not math.isnan(r.test_loss)} == {
        step: pytest.approx(values, rel=1e-12) for step, values in tests.items()
    }
    assert [row.train_loss for row in result.curve("exact")[:-1]] == pytest.approx(losses, rel=1e-10)
    assert result.final("backpropagation")["train_loss"] == pytest.approx(sum(losses[3:]) / 3)
    assert all(row.relative_error < 1e-12 for row in result.updates) and len(result.updates) == 6 * 4


@pytest.mark.parametrize("method", ["strict", "fixed_prediction"])
def test_updates_are_measured_along_the_network_that_they_train(method):
    model, data = toy_model(), toy_data()
    settings = {"step_size": 0.3, "num_steps": 7}
    result = compare_training(
        model, data, methods=[method], epochs=2, batch_size=20, optimizer=SGD, **settings
    )
    trained = copy.deepcopy(model)
    optimizer = SGD(trained.parameters())
    rows, losses = iter(result.updates), []
    for step, (x, y) in enumerate(batches(data, 2, 20, seed=0)):
        losses.append(F.cross_entropy(trained(x), y).item())
        found = relax_literally(trained, x, y, loss=F.cross_entropy, method=method, **settings).gradients
        update, gradient = literal_updates(trained, x, y, method=method, **settings), gradients(trained, x, y)
        for layer in (1, 2, 3, 4):
            row = next(rows)
            assert (row.method, row.step, row.layer) == (method, step, layer)
            pair = update[layer - 1], gradient[layer - 1]
            expected = relative_error(*pair) if method == "strict" else 1 - binomial_tail(6, 0.3, 4 - layer)
            assert row.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-12)
            if method == "strict":
                assert row.angle_degrees == pytest.approx(measured_apart(*pair)[1], rel=1e-5)
            else:
                assert row.angle_degrees < 1e-6
        for name, parameter in trained.named_parameters():
            parameter.grad = found[name]
        optimizer.step()
    assert next(rows, None) is None
    assert [row.train_loss for row in result.curve(method)[:-1]] == pytest.approx(losses, rel=1e-8)


def test_dropout_and_batch_norm_meet_the_same_masks_and_statistics():
    model, data = toy_model(nn.BatchNorm1d(8), nn.Dropout(0.3)), toy_data()
    result = compare_training(model, data, methods=["exact"], epochs=2, batch_size=25, optimizer=SGD)
    assert all(row.relative_error < 1e-10 for row in result.updates)
    exact, plain = result.curve("exact"), result.curve("backpropagation")
    assert [row.train_loss for row in exact[:-1]] == pytest.approx([row.train_loss for row in plain[:-1]])
    assert exact[-1].test_loss == pytest.approx(plain[-1].test_loss)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rows = compare_iterations(model.train(), *toy_batch(), methods=["exact"])
    assert all(row.relative_error < 1e-10 for row in rows)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_does_not_keep_old_weights():
    model, data = toy_model().float(), toy_data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = compare_training(model, data, methods=["exact"], epochs=2, batch_size=20, optimizer=SGD)
    optimizer = SGD(model.parameters())
    losses = []
    for x, y in batches(data, 2, 20, seed=0):
        with torch.autocast("cpu", torch.bfloat16):  # a fresh one each step, as torch's documentation has it
            loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [row.train_loss for row in result.curve("backpropagation")[:-1]] == losses
    assert all(row.relative_error < 0.1 for row in result.updates)  # bfloat16 has 8 bits


def test_a_curve_that_diverges_ends_with_its_reason(tmp_path):
    model, data = toy_model(), toy_data()
    settings = {"epochs": 1, "batch_size": 20, "step_size": 30.0, "num_steps": 400}
    seen = []
    result = compare_training(model, data, progress=lambda *args: seen.append(args), **settings)
    assert set(result.ended) == {"strict", "fixed_prediction"} and result.updates == ()
    for method in ("strict", "fixed_prediction"):
        (row,) = result.curve(method)
        assert row.step == 0 and "diverged" in row.note and math.isnan(row.train_loss)
        assert all(map(math.isnan, result.final(method).values()))
    assert len(result.curve("backpropagation")) == 4 and seen == [(1, 9), (2, 9), (3, 9)]
    comparison_plots.training_figure(result, tmp_path / "t.png")

    wild = functools.partial(torch.optim.SGD, lr=1e308)  # two steps overflow
    result = compare_training(model, data, methods=["exact"], epochs=2, batch_size=20, optimizer=wild)
    assert set(result.ended) == {"backpropagation", "exact"}
    assert "not finite" in result.ended["backpropagation"]


def test_layers_and_parameters_without_gradients_have_no_rows():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3)).double()
    model[2].requires_grad_(False)
    rows = compare_iterations(model, *toy_batch(), methods=["strict"], step_sizes=[0.2], iterations=[3])
    assert [row.layer for row in rows] == [1, 4, "all"] * 2 and {row.num_steps for row in rows} == {3, 4}
    with pytest.raises(ModelError, match="gradient"):
        compare_iterations(model.requires_grad_(False), *toy_batch())


def test_bad_arguments_are_named():
    model, data, batch = toy_model(), toy_data(), toy_batch()
    for call, message in (
        (lambda: compare_training(model, data, methods=[]), "methods"),
        (lambda: compare_training(model, data, methods="strict"), "methods"),
        (lambda: compare_training(model, data, epochs=0), "epochs"),
        (lambda: compare_training(model, data, test_every=0), "test_every"),
        (lambda: compare_training(model, data, step_size=-1), "step_size"),
        (lambda: compare_training(model, data, optimizer=SGD(model.parameters())), "optimizer"),
        (lambda: compare_training(model, data[:3]), "data"),
        (lambda: compare_iterations(model, *batch, methods=["sgd"]), "method"),
        (lambda: compare_iterations(model, *batch, iterations=[0]), "iterations"),
        (lambda: compare_iterations(model, *batch, step_sizes=[math.nan]), "step_size"),
        (lambda: compare_errors(model, *batch, num_steps=1.5), "num_steps"),
        (lambda: comparison_plots.overview("never.png"), "training, iterations, errors"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


def test_many_layers_are_thinned_in_figures_and_named(tmp_path):
    shown = figures.shown(range(1, 34))
    assert shown[0] == 1 and shown[-1] == 33 and len(shown) == 8 == len(set(shown))
    model = networks.mlp([6, *[5] * 11, 3], nn.Tanh).double()
    result = compare_training(model, toy_data(), methods=["fixed_prediction"], epochs=1, batch_size=25)
    comparison_plots.training_figure(result, tmp_path / "deep.png", title="twelve layers")


def test_vgg19_is_initialised_as_torchvision_does():
    torch.manual_seed(0)
    model = networks.vgg19(7, width=4, image_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    last = model[15][0].weight  # 32 channels, 9 positions
    assert last.shape == (32, 32, 3, 3) and last.std().item() == pytest.approx(
        math.sqrt(2 / (32 * 9)), rel=0.05
    )
    first = model[0][0].weight  # fan_out, not fan_in: 4 channels out, 3 in
    draws = torch.cat([networks.vgg19(7, width=4, image_size=32)[0][0].weight.flatten() for _ in range(20)])
    assert first.shape == (4, 3, 3, 3) and draws.std().item() == pytest.approx(
        math.sqrt(2 / (4 * 9)), rel=0.1
    )
    assert model[16][0].in_features == 32 * 4 and model[17][0].weight.shape == (256, 256)
    assert model[17][0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    for arguments, message in (
        ({"width": 0}, "width"),
        ({"image_size": 48}, "image_size"),
        ({"image_size": 0}, "size"),
    ):
        with pytest.raises(ArgumentError, match=message):
            networks.vgg19(**arguments)


def test_the_same_seed_gives_the_same_numbers():
    model, data = toy_model(nn.Dropout(0.2)), toy_data()
    first, second = (
        compare_training(model, data, epochs=1, batch_size=20, num_steps=3, seed=seed) for seed in (5, 5)
    )
    assert repr(first) == repr(second)
    other = compare_training(model, data, epochs=1, batch_size=20, num_steps=3, seed=6)
    assert repr(first) != repr(other)
    assert comparison.METHODS == ("strict", "fixed_prediction")


def test_a_last_batch_of_one_row_is_found_before_any_step():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3)).double()
    seen = []
    rows = len(toy_data().x_train)
    with pytest.raises(ArgumentError, match=r"^batch_size: got .*with 1 left"):
        compare_training(model, toy_data(), batch_size=rows - 1, progress=lambda *args: seen.append(args))
    assert not seen


def test_regression_has_no_accuracy_and_no_grad_is_no_matter():
    data = toy_data()
    values = data._replace(y_train=data.x_train[:, :3] * 2, y_test=data.x_test[:, :3] * 2)
    with torch.no_grad():
        result = compare_training(toy_model(), values, methods=["exact"], batch_size=20, loss="mse")
    assert all(math.isnan(row.train_accuracy) and math.isnan(row.test_accuracy) for row in result.steps)
    assert result.curve("exact")[-1].test_loss < result.curve("exact")[0].test_loss
