"""Relaxation on graphs: eager against the literal loop, chains as graphs, and the energy's own gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from graph_networks import cases, energy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import pcfast
from pcfast.losses import half_squared_error

FIXED = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
OPTIMIZERS = (None, pcfast.GradientDescent(0.5), pcfast.GradientDescent(0.3, 0.1), pcfast.Adam(eps=1e-3))
METHODS = ("exact", "fixed_prediction", "strict", "error_based", "zero_divergence")


def assert_same(result: dict, truth: dict, bound: float = 1e-10) -> None:
    assert result.keys() == truth.keys()
    scale = max((float(t.abs().max()) for t in truth.values() if t is not None and t.numel()), default=1.0)
    for name, value in result.items():
        other = truth[name]
        assert (value is None) == (other is None), name
        if value is not None and value.numel():
            assert value.shape == other.shape and (value - other).abs().max() <= bound * max(scale, 1e-3), (
                name
            )


@FIXED
@given(st.data())
@pytest.mark.parametrize("method", METHODS)
def test_eager_is_the_literal_loop(method, data):
    case = data.draw(cases(precisions=method != "zero_divergence"))
    given = {"method": method, "num_steps": data.draw(st.integers(0, 7))}
    if method in ("strict", "fixed_prediction"):
        given["belief_optimizer"] = data.draw(st.sampled_from(OPTIMIZERS))
    assert_same(case.updates(**given, backend="eager"), case.updates(**given, backend="reference"))
    assert pcfast.last_run().plan.backend == "reference"
    given["energies"] = method in ("strict", "error_based", "fixed_prediction") and data.draw(st.booleans())
    assert_same(case.states(**given, backend="eager"), case.states(**given, backend="reference"))


@FIXED
@given(st.data())
def test_a_strict_iteration_descends_the_energy(data):
    """One iteration from random beliefs moves every node by eta times the energy's gradient by torch autograd."""
    case = data.draw(cases())
    start = pcfast.relax(case.graph, case.x, case.y, num_steps=0, **case.settings)
    free = [n for n in case.graph.names if n not in case.x and n not in (case.y or {})]
    if not free:
        return
    v = {n: torch.randn_like(start.beliefs[n]).requires_grad_(True) for n in free}
    losses = [(n, half_squared_error, y) for n, y in (case.y or {}).items()]
    precision = case.settings["precision"]
    total = energy(case.graph, {**case.x, **v}, losses, precision)
    gradients = torch.autograd.grad(total, [*v.values(), *case.graph.parameters()], allow_unused=True)
    vinit = {n: value.detach() for n, value in v.items()}
    moved = pcfast.relax(case.graph, case.x, case.y, num_steps=1, vinit=vinit, **case.settings)
    for n, gradient in zip(free, gradients, strict=False):
        step = case.settings["step_size"][n] * (0.0 if gradient is None else gradient)
        torch.testing.assert_close(moved.beliefs[n], vinit[n] - step, rtol=1e-10, atol=1e-12)
    result = case.updates(num_steps=0, vinit=vinit)
    for (name, p), gradient in zip(case.graph.named_parameters(), gradients[len(free) :], strict=True):
        truth = torch.zeros_like(p) if gradient is None else gradient
        torch.testing.assert_close(result[name], truth, rtol=1e-9, atol=1e-11)


@FIXED
@given(st.data())
def test_exact_and_zero_divergence_are_backpropagation(data):
    case = data.draw(cases(clamps=False, precisions=False, free_roots=False))
    predicted = case.graph.values(case.x)
    loss = sum(half_squared_error(predicted[n], y) for n, y in case.y.items())
    gradients = torch.autograd.grad(loss, list(case.graph.parameters()), allow_unused=True)
    named = zip(case.graph.named_parameters(), gradients, strict=True)
    truth = {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}
    for method in ("exact", "zero_divergence"):
        result = case.updates(method=method)
        assert_same({n: result[n] for n in truth}, truth)
        torch.testing.assert_close(result["loss"], loss.detach())


CHAIN = {
    "strict": {}, "fixed_prediction": {}, "exact": {}, "error_based": {}, "zero_divergence": {},
    "momentum": {"belief_optimizer": pcfast.GradientDescent(0.6)},
    "nesterov": {"belief_optimizer": pcfast.GradientDescent(0.6, nesterov=True), "method": "fixed_prediction"},
    "weight decay": {"belief_optimizer": pcfast.GradientDescent(0.1, 0.01)},
    "Adam": {"belief_optimizer": pcfast.Adam(eps=1e-4), "step_size": 0.01},
    "schedule": {"step_size": [0.2, 0.1, 0.05, 0.02, 0.01]},
    "mean": {"reduction": "mean", "loss": half_squared_error},
    "weights' mean": {"reduction": "sum_beliefs_mean_weights", "loss": half_squared_error, "update_scale": 3.0},
}  # fmt: skip


def chain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten()),
        pcfast.Residual(nn.Tanh(), nn.Linear(16, 16), nn.Dropout(0.3)),
        nn.Linear(16, 4),
    ).double()


@pytest.mark.parametrize("which", CHAIN)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_chain_is_the_graph_that_it_is(which, backend):
    """The Sequential by its own machinery against the same modules by the graphs' (precision=1 asks for that)."""
    given = {"method": which if which in METHODS else "strict", "num_steps": 5, "loss": "mse", **CHAIN[which]}
    x, y = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 4).double()
    results = []
    for precision in (None, 1.0):
        model = chain()
        torch.manual_seed(3)
        loss = pcfast.pc_loss(model, x, y, backend=backend, precision=precision, **given)
        loss.backward()
        values = {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
        torch.manual_seed(3)
        states = pcfast.relax(model, x, y, backend=backend, precision=precision, **given)
        beliefs, errors = (v.values() if precision else v for v in (states.beliefs, states.errors))
        values["loss"] = loss.detach()
        values |= {f"belief {l}": v for l, v in enumerate(beliefs) if l}
        values |= {f"error {l}": e for l, e in enumerate(errors) if l}
        results.append(values)
    assert_same(*results)


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_that_is_a_chain_runs_as_its_sequential(method):
    """The same numbers to the bit, on whatever backend the Sequential runs on, and with the Sequential's weights."""
    torch.manual_seed(0)
    modules = [
        nn.Sequential(nn.Linear(6, 5), nn.ReLU()),
        nn.Sequential(nn.Linear(5, 5), nn.Tanh()),
        nn.Linear(5, 3),
    ]
    sequential = nn.Sequential(*modules)
    graph = pcfast.Graph(
        {"x": pcfast.Root(), "a": (modules[0], "x"), "b": (modules[1], "a"), "y": (modules[2], "b")}
    )
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    results = []
    for model in (sequential, graph):
        model.zero_grad()
        loss = pcfast.pc_loss(model, x, y, method=method)
        loss.backward()
        run = pcfast.last_run()
        results.append((loss, run.plan.backend, *(p.grad.clone() for p in model.parameters())))
    for a, b in zip(*results, strict=True):
        assert a == b if isinstance(a, str) else torch.equal(a, b)
    states = pcfast.relax(graph, x, y, method=method)
    assert list(states.beliefs) == ["x", "a", "b", "y"] and states.errors["x"] is None
    truth = pcfast.relax(sequential, x, y, method=method).beliefs
    for a, b in zip(states.beliefs.values(), [x, *truth[1:]], strict=True):
        assert torch.equal(a, b)


def test_float32_loses_no_digits():
    """In deviation form skips over beliefs keep their digits, where the literal loop in float32 loses most."""
    torch.manual_seed(0)
    nodes: dict = {"x": pcfast.Root(), "h0": (nn.Sequential(nn.Linear(20, 32), nn.Tanh()), "x")}
    for k in range(1, 6):
        inputs = (f"h{k - 1}", f"h{max(k - 2, 0)}")
        nodes[f"h{k}"] = (pcfast.Sum(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), None), *inputs)
    graph = pcfast.Graph({**nodes, "y": (nn.Linear(32, 10), "h5")})
    x, y = torch.randn(300, 20), torch.randint(0, 10, (300,))

    def updates(dtype, backend):
        model = graph.to(dtype)
        model.zero_grad()
        pcfast.pc_loss(model, x.to(dtype), y, backend=backend).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    single, literal = updates(torch.float32, "eager"), updates(torch.float32, "reference")
    truth = updates(torch.float64, "reference")
    error, literal_error = ((value - truth).norm() / truth.norm() for value in (single, literal))
    assert error < 3e-6 and literal_error > 10 * error


@FIXED
@given(st.data())
@pytest.mark.parametrize("optimizer", [None, pcfast.GradientDescent(0.4)])
def test_incremental_is_the_literal_loop(optimizer, data):
    """Beliefs and parameters after three calls, with an optimiser of the weights that remembers."""
    case = data.draw(cases())
    parameters = list(case.graph.parameters())
    if not parameters:
        return
    results = []
    for backend in ("reference", "eager"):
        graph = copy.deepcopy(case.graph)
        weights = torch.optim.SGD(graph.parameters(), lr=0.02, momentum=0.5)
        for _ in range(3):
            asked = {"num_steps": 4, "backend": backend, "belief_optimizer": optimizer, **case.settings}
            loss = pcfast.incremental_step(graph, case.x, case.y, weights, **asked)
        results.append({"loss": loss, **graph.state_dict()})
    assert_same(*results)


def test_incremental_on_a_chain_is_the_chains():
    results = []
    for precision in (None, 1.0):
        model = chain()
        weights = torch.optim.Adam(model.parameters(), lr=1e-3)
        torch.manual_seed(3)
        x, y = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 4).double()
        for _ in range(3):
            pcfast.incremental_step(model, x, y, weights, loss="mse", num_steps=4, precision=precision)
        results.append(model.state_dict())
    assert_same(*results)
