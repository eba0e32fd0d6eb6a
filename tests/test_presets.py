"""Presets against the other programs' algorithms, written from their equations in their own signs and reductions.

Squared errors on linear networks have closed forms: with z all hidden beliefs (or errors) of a row, an iteration is
z <- z - eta (H z - b), so z(n) = H^-1 b + (I - eta H)^n (z(0) - H^-1 b).
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_gradients_agree
from golden import LOSSES
from torch import Tensor, nn
from torch.linalg import matrix_power, solve

import pcfast
from pcfast import ArgumentError, ArgumentTypeError, GradientDescent, Nudging
from pcfast.presets import settings as presets
from pcfast.training import trainer as training

BACKENDS = pytest.mark.parametrize("backend", ["reference", "eager"])
STEPS = pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 12])
ROWS = 6


def linear_net() -> nn.Sequential:
    sizes = (5, 9, 4, 3)
    layers = (nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(sizes))
    return nn.Sequential(*layers).double()


def curved_net() -> nn.Sequential:
    """Layer 1 is wide enough for the Gram form."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 40), nn.Tanh()),
        nn.Sequential(nn.Linear(40, 6), nn.ReLU()),
        nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        nn.Linear(6, 3),
    ).double()


def batch(loss: str = "mse") -> tuple[Tensor, Tensor]:
    """(x, y): y dense, one-hot for cross-entropy, as the programs take it."""
    x = torch.randn(ROWS, 5, dtype=torch.float64)
    y = torch.randn(ROWS, 3, dtype=torch.float64)
    return x, y if loss == "mse" else F.one_hot(y.argmax(1), 3).double()


def updates(model, x, y, preset, **settings) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **{**preset, **settings}).backward()
    assert pcfast.last_run().plan.backend == settings["backend"]
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(result: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """To 1e-10; where no error has arrived the truth is the rounding of beliefs of size 1, less than 1e-13."""
    assert result.keys() == truth.keys()
    for name, true in truth.items():
        assert float((result[name] - true).norm()) <= 1e-10 * float(true.norm()) + 1e-13, name


# Closed forms --------------------------------------------------------------------------------------------------


def hidden_beliefs(model, x: Tensor, y: Tensor, eta: float, count: int) -> tuple[Tensor, Tensor]:
    """v_1, v_2 after ``count`` steps of size eta down |v_1 - W_1 x|^2/2 + |v_2 - W_2 v_1|^2/2 + |y - W_3 v_2|^2/2."""
    w1, w2, w3 = (layer.weight.detach() for layer in model)
    h = torch.cat(
        [
            torch.cat([torch.eye(9) + w2.T @ w2, -w2.T], 1),
            torch.cat([-w2, torch.eye(4) + w3.T @ w3], 1),
        ]
    )
    b = torch.cat([w1 @ x.T, w3.T @ y.T])
    start = torch.cat([w1 @ x.T, w2 @ w1 @ x.T])
    rest = solve(h, b)
    z = rest + matrix_power(torch.eye(13, dtype=h.dtype) - eta * h, count) @ (start - rest)
    return z[:9].T, z[9:].T


def linear_updates(model, x, y, v, at) -> dict[str, Tensor]:
    """Summed over rows: each layer's error (prediction - belief at ``at``) times the belief below, of ``v``."""
    w1, w2, w3 = (layer.weight.detach() for layer in model)
    errors = (x @ w1.T - at[0], at[0] @ w2.T - at[1], at[1] @ w3.T - y)
    below = (x, *v)
    return {f"{l}.weight": e.T @ b for l, (e, b) in enumerate(zip(errors, below, strict=True))}


@BACKENDS
@STEPS
@pytest.mark.parametrize("program", ["pcx, sum", "pcx, mean", "jpc"])
def test_linear_networks_have_a_closed_form(program, num_steps, backend):
    model, (x, y) = linear_net(), batch()
    mean = program != "pcx, sum"
    rate = 0.2 * ROWS if mean else 0.2
    settings = {"step_size": rate, "num_steps": num_steps}
    if program == "jpc":
        preset = presets.jpc(**settings)
    else:
        preset = presets.pcx(reduction=program.split()[1], **settings)
    v = hidden_beliefs(model, x, y, 0.2, num_steps)
    truth = linear_updates(model, x, y, v, v)
    if mean:
        truth = {name: update / ROWS for name, update in truth.items()}
    assert_same(updates(model, x, y, preset, backend=backend), truth)


@BACKENDS
@pytest.mark.parametrize("num_steps", [1, 2, 3, 12])
def test_torch2pc_takes_the_last_iterations_errors(num_steps, backend):
    model, (x, y) = linear_net(), batch()
    preset = presets.torch2pc(loss=nn.MSELoss(reduction="sum"), step_size=0.1, num_steps=num_steps)
    # |y - mu|^2 without the half: y and W_3 count sqrt(2) times, and the read-out's update sqrt(2) again
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[2].weight *= 2**0.5
    before, after = (hidden_beliefs(scaled, x, 2**0.5 * y, 0.1, n) for n in (num_steps - 1, num_steps))
    truth = linear_updates(scaled, x, 2**0.5 * y, after, before)
    truth["2.weight"] *= 2**0.5
    assert_same(updates(model, x, y, preset, backend=backend), truth)
    if num_steps > 2:
        fresh = linear_updates(scaled, x, 2**0.5 * y, after, after)
        assert (fresh["0.weight"] - truth["0.weight"]).norm() > 1e-3 * truth["0.weight"].norm()


@BACKENDS
@pytest.mark.parametrize(("rate", "num_steps"), [(0.05, 1), (0.05, 7), (0.3, 12)])
def test_epc_on_linear_networks_has_a_closed_form(rate, num_steps, backend):
    """Its errors e_l = state - prediction; mu = W_3 W_2 W_1 x + A e with A = [W_3 W_2, W_3], H = I + A^T A."""
    model, (x, y) = linear_net(), batch()
    w1, w2, w3 = (layer.weight.detach() for layer in model)
    a = torch.cat([w3 @ w2, w3], 1)
    h = torch.eye(13, dtype=a.dtype) + a.T @ a
    rest = solve(h, a.T @ (y.T - w3 @ w2 @ w1 @ x.T))
    e = (rest - matrix_power(torch.eye(13, dtype=a.dtype) - rate * h, num_steps) @ rest).T
    v1 = x @ w1.T + e[:, :9]
    v2 = v1 @ w2.T + e[:, 9:]
    divisor = ROWS * min(1.0, rate * num_steps)
    truth = {
        "0.weight": -e[:, :9].T @ x / divisor,
        "1.weight": -e[:, 9:].T @ v1 / divisor,
        "2.weight": (v2 @ w3.T - y).T @ v2 / divisor,
    }
    preset = presets.epc(step_size=rate, num_steps=num_steps)
    assert_same(updates(model, x, y, preset, backend=backend), truth)


# Loops ---------------------------------------------------------------------------------------------------------


def output_energy(name: str, u: Tensor, h: Tensor) -> Tensor:
    """Of one row or many, summed: 0.5 (h - u)^2, or -h log softmax(u)."""
    return 0.5 * ((h - u) ** 2).sum() if name == "mse" else -(h * torch.log_softmax(u, -1)).sum()


def energy(model, x: Tensor, hidden: list[Tensor], h: Tensor, name: str) -> Tensor:
    """Of one row, x (5,): 0.5 |belief - prediction|^2 of every hidden layer and the output's, h clamped."""
    total, below = 0.0, x
    for layer, belief in zip(model[:-1], hidden, strict=True):
        total = total + 0.5 * ((belief - layer(below)) ** 2).sum()
        below = belief
    return total + output_energy(name, model[-1](below), h)


def program_updates(model, x, h, name, *, rate, num_steps, mean, momentum=0.0) -> dict[str, Tensor]:
    """Rows one by one: beliefs from the forward pass, SGD with momentum, then the energy's weight gradient."""
    divisor = len(x) if mean else 1
    totals = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for row, target in zip(x, h, strict=True):
        hidden, below = [], row
        for layer in model[:-1]:
            below = layer(below).detach()
            hidden.append(below.clone().requires_grad_())
        velocity = [torch.zeros_like(belief) for belief in hidden]
        for _ in range(num_steps):
            result = torch.autograd.grad(energy(model, row, hidden, target, name) / divisor, hidden)
            velocity = [momentum * m + g for m, g in zip(velocity, result, strict=True)]
            hidden = [(b - rate * m).detach().requires_grad_() for b, m in zip(hidden, velocity, strict=True)]
        settled = [belief.detach() for belief in hidden]
        result = torch.autograd.grad(
            energy(model, row, settled, target, name) / divisor, list(model.parameters())
        )
        for key, gradient in zip(totals, result, strict=True):
            totals[key] += gradient
    return totals


@BACKENDS
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize("program", ["pcx, sum", "pcx, mean", "jpc"])
def test_updates_are_those_of_the_programs_loop(program, loss, momentum, backend):
    model, (x, h) = curved_net(), batch(loss)
    mean = program != "pcx, sum"
    settings = {"step_size": 0.5 if mean else 0.1, "num_steps": 9, "loss": loss}
    if program == "jpc":
        preset = presets.jpc(**settings)
    else:
        preset = presets.pcx(reduction=program.split()[1], **settings)
    truth = program_updates(
        model, x, h, loss, rate=settings["step_size"], num_steps=9, mean=mean, momentum=momentum
    )
    optimizer = GradientDescent(momentum) if momentum else None
    assert_same(updates(model, x, h, preset, belief_optimizer=optimizer, backend=backend), truth)
    assert pcfast.last_run().plan.gram == (backend == "eager")
    if loss == "cross_entropy":  # labels are the one-hot rows
        result = updates(model, x, h.argmax(1), preset, belief_optimizer=optimizer, backend=backend)
        assert_same(result, truth)


@BACKENDS
@pytest.mark.parametrize(("beta", "nudging"), [(0.4, ("positive", 0.4)), (-0.4, ("negative", 0.4))])
def test_pcx_nudged(beta, nudging, backend):
    """Its examples clamp the last vode to u - beta (u - y) of the forward pass and scale the weights by 1 / beta."""
    model, (x, y) = curved_net(), batch()
    with torch.no_grad():
        u = model(x)
    truth = program_updates(model, x, u - beta * (u - y), "mse", rate=0.5, num_steps=9, mean=True)
    preset = presets.pcx(step_size=0.5, num_steps=9, reduction="mean")
    result = updates(model, x, y, preset, nudging=Nudging(*nudging), backend=backend)
    assert_same(result, {name: update / beta for name, update in truth.items()})


@BACKENDS
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("rate", "num_steps"), [(0.02, 5), (0.2, 9)])
def test_updates_are_those_of_epcs_loop(rate, num_steps, loss, backend):
    """Errors are added to predictions and descend the summed energy; weights its mean, states held."""
    model, (x, h) = curved_net(), batch(loss)
    with torch.no_grad():
        below, errors = x, []
        for layer in model[:-1]:
            below = layer(below)
            errors.append(torch.zeros_like(below))
    for _ in range(num_steps):
        errors = [e.requires_grad_() for e in errors]
        state = x
        for layer, e in zip(model[:-1], errors, strict=True):
            state = layer(state) + e
        total = sum(0.5 * (e * e).sum() for e in errors) + output_energy(loss, model[-1](state), h)
        result = torch.autograd.grad(total, errors)
        errors = [(e - rate * g).detach() for e, g in zip(errors, result, strict=True)]
    local, state = 0.0, x
    for layer, e in zip(model[:-1], errors, strict=True):
        prediction = layer(state)
        state = (prediction + e).detach()
        local = local + 0.5 * ((prediction - state) ** 2).sum()
    local = local + output_energy(loss, model[-1](state), h)
    weights = dict(model.named_parameters())
    result = torch.autograd.grad(local / (ROWS * min(1.0, rate * num_steps)), list(weights.values()))
    preset = presets.epc(step_size=rate, num_steps=num_steps, loss=loss)
    assert_same(updates(model, x, h, preset, backend=backend), dict(zip(weights, result, strict=True)))


METHODS = {"Strict": "strict", "FixedPred": "fixed_prediction", "Exact": "exact"}


@BACKENDS
@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_torch2pc_against_its_recorded_outputs(path, backend):
    meta, model, arrays = golden.load(path)
    preset = presets.torch2pc(
        loss=LOSSES[meta["loss"]](),
        method=METHODS[meta["method"]],
        step_size=meta["eta"],
        num_steps=meta["n"],
    )
    result = updates(model, arrays["x"], arrays["y"], preset, backend=backend)
    parameters = dict(model.named_parameters())
    assert_gradients_agree(
        {parameters[name]: update for name, update in result.items()},
        {p: arrays[f"grad.{name}"] for name, p in parameters.items()},
        model,
        golden.states(arrays, len(model)),
        meta["n"],
    )


# What a preset is ----------------------------------------------------------------------------------------------


def test_code_on_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "conventions.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    result: dict = {}
    exec(compile(block, "conventions.md", "exec"), result)
    assert all(parameter.grad is not None for parameter in result["model"].parameters())


def test_the_loss_is_the_programs_output_energy():
    model, (x, y) = curved_net(), batch()
    preset = presets.jpc(step_size=0.1, num_steps=3)
    with torch.no_grad():
        expected = 0.5 * (model(x) - y).square().sum() / ROWS
        torch.testing.assert_close(pcfast.pc_loss(model, x, y, **preset), expected)
    torch.testing.assert_close(pcfast.pc_loss(model, x, y, **preset).detach(), expected)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_goes_into_every_function_that_relaxes(name, tmp_path):
    model, (x, y) = curved_net(), batch()
    preset = presets.PRESETS[name](step_size=0.05, num_steps=4, loss="mse")
    if preset.method == "incremental":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss = pcfast.incremental_step(model, x, y, optimizer, **preset)
    else:
        loss = pcfast.pc_loss(model, x, y, **preset)
        loss.backward()
        expected = [p.grad for p in model.parameters()]
        module = pcfast.PredictiveCoding(copy.deepcopy(model), **preset)
        module.zero_grad()
        assert module(x, y) == loss
        module(x, y).backward()
        assert all(map(torch.equal, (p.grad for p in module.parameters()), expected))
        assert pcfast.relax(model, x, y, **preset).run.plan.method == preset.method
    assert pcfast.explain(model, x.shape, **preset).plan.method == preset.method
    history = training.train(
        model, (x, y, x, y), epochs=1, batch_size=ROWS, progress=False, out=tmp_path, **preset
    )
    per_row = 1 if preset.reduction != "sum" or name == "torch2pc" else ROWS  # losses are shown per sample
    assert history.train_loss[0] == pytest.approx(loss.item() / per_row)


@pytest.mark.parametrize("name", ["jpc", "pcx", "epc"])
def test_parts_of_a_batch_add_up_with_a_normalizer(name):
    """Micro-batches, or the shards of DistributedDataParallel summed: rows of the global batch say what is a mean."""
    model, (x, y) = curved_net(), batch()
    preset = presets.PRESETS[name](step_size=0.2, num_steps=5, loss="mse")
    pcfast.pc_loss(model, x, y, **preset).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    for normalizer, same in ((ROWS, True), (None, False)):
        model.zero_grad()
        for rows in (slice(0, 2), slice(2, ROWS)):
            pcfast.pc_loss(model, x[rows], y[rows], normalizer=normalizer, **preset).backward()
        for result, expected in zip((p.grad for p in model.parameters()), whole, strict=True):
            assert torch.allclose(result, expected, rtol=1e-11, atol=1e-13) is same


def test_a_mean_of_the_energy_is_what_optimisers_see_there():
    """Momentum, weight decay and Adam's eps of a program that descends a mean, against a loop on the mean."""
    model, (x, y) = curved_net(), batch()
    for optimizer, kind in (
        (pcfast.Adam(eps=1e-2), functools.partial(torch.optim.Adam, eps=1e-2)),
        (GradientDescent(0.6, 0.3), functools.partial(torch.optim.SGD, momentum=0.6, weight_decay=0.3)),
        (GradientDescent(0.6, 0.3, nesterov=True),
         functools.partial(torch.optim.SGD, momentum=0.6, weight_decay=0.3, nesterov=True)),
    ):  # fmt: skip
        with torch.no_grad():
            v = [model[0](x), model[1](model[0](x)), model[2](model[1](model[0](x)))]
        v = [belief.requires_grad_() for belief in v]
        moving = kind(v, lr=0.05)
        for _ in range(7):
            total = energy(model, x, v, y, "mse") / ROWS
            for belief, gradient in zip(v, torch.autograd.grad(total, v), strict=True):
                belief.grad = gradient
            moving.step()
        preset = presets.jpc(step_size=0.05, num_steps=7, belief_optimizer=optimizer)
        for backend in ("reference", "eager"):
            result = pcfast.relax(model, x, y, backend=backend, **preset)
            for ours, theirs in zip(result.beliefs[1:], v, strict=False):
                torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-13)


def test_relax_gives_the_errors_of_the_updates():
    """At the last beliefs, which the iteration of step size 0 leaves alone."""
    model, (x, y) = curved_net(), batch()
    preset = presets.pcx(step_size=[0.1, 0.2, 0.1], num_steps=3)
    assert dict(preset)["step_size"] == (0.1, 0.2, 0.1, 0.0) and preset["num_steps"] == 4
    result = pcfast.relax(model, x, y, **preset)
    shorter = pcfast.relax(model, x, y, loss=preset.loss, step_size=[0.1, 0.2, 0.1], num_steps=3)
    for l in range(1, 4):
        assert torch.equal(result.beliefs[l], shorter.beliefs[l])
        with torch.no_grad():
            mu = model[l - 1](result.beliefs[l - 1])
        torch.testing.assert_close(result.errors[l], mu - result.beliefs[l], rtol=1e-10, atol=1e-13)
    with pytest.raises(KeyError):
        preset["scale"]


GOOD = {"step_size": 0.1, "num_steps": 3}
REFUSED = {
    "method": lambda: presets.torch2pc(method="error_based"),
    "reduction": lambda: presets.pcx(**GOOD, reduction="none"),
    "loss": lambda: presets.jpc(**GOOD, loss="ce"),
    "step_size": lambda: presets.epc(step_size=0, num_steps=3),
    "num_steps": lambda: presets.pctrainer(step_size=0.1, num_steps=0),
    "start": lambda: presets.deepity(**GOOD, start="ones"),
    "belief_optimizer": lambda: presets.spc(**GOOD, belief_optimizer="sgd"),
    "update_scale": lambda: pcfast.pc_loss(
        curved_net(), *batch(), **{**presets.preco(**GOOD), "update_scale": 0}
    ),
    "vinit": lambda: pcfast.pc_loss(
        curved_net(), *batch(), **{**presets.preco(**GOOD), "vinit": float("nan")}
    ),
    "normalizer": lambda: pcfast.pc_loss(curved_net(), *batch(), **presets.spc(**GOOD), normalizer=0),
    "nesterov": lambda: GradientDescent(nesterov=True),
    "nudging": lambda: presets.pcx(**GOOD, loss="cross_entropy", nudging=Nudging("positive", 0.5)),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_arguments_that_are_refused(argument):
    with pytest.raises(ArgumentError) as caught:
        REFUSED[argument]()
    assert caught.value.argument == argument


def test_a_schedule_has_one_step_size_an_iteration():
    with pytest.raises(ArgumentError, match="step_size"):
        presets.jpc(step_size=[0.1, 0.1], num_steps=3)
    with pytest.raises(ArgumentTypeError, match="num_steps"):
        presets.pctrainer(step_size=0.1, num_steps=3.0)
