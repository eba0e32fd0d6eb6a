"""Nudging and early exit on graphs: chains' numbers, and loops of torch autograd on the energy."""

from __future__ import annotations

import pytest
import torch
from graph_networks import Case, cases, energy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_early_exit import last_iteration
from test_graph_methods import assert_same
from torch import nn

import pcfast
from pcfast import Nudging
from pcfast.support import host

FIXED = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
BOTH = pytest.mark.parametrize("backend", ["reference", "eager"])
SUM = nn.MSELoss(reduction="sum")


def chain() -> nn.Sequential:
    torch.manual_seed(1)
    widths, activations = (6, 9, 8, 7), (nn.Tanh(), nn.ReLU(), nn.Sigmoid())
    hidden = [
        nn.Sequential(nn.Linear(a, b), act)
        for a, b, act in zip(widths, widths[1:], activations, strict=False)
    ]
    return nn.Sequential(*hidden, nn.Linear(7, 3)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (6, 3))


def updates(model, x, y, **given) -> list[torch.Tensor]:
    model.zero_grad()
    pcfast.pc_loss(model, x, y, loss=SUM, **given).backward()
    return [p.grad for p in model.parameters()]


@BOTH
@pytest.mark.parametrize(
    "nudging", [None, Nudging("positive", 0.3), Nudging("negative"), Nudging("centred", 0.01)]
)
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_a_chain_on_the_graphs_loop_has_the_chains_numbers(backend, nudging, tolerance):
    model, (x, y) = chain(), batch()
    given = {"nudging": nudging, "tolerance": tolerance, "num_steps": 60, "backend": backend}
    truth = updates(model, x, y, **given)
    result = updates(
        model, x, y, **given, precision=1.0
    )  # with a precision every chain is relaxed as a graph
    for a, b in zip(result, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if nudging is None or nudging.kind != "centred":
        one, other = (
            pcfast.relax(model, x, y, loss=SUM, energies=True, **given, **beyond)
            for beyond in ({"precision": 1.0}, {})
        )
        assert (one.iterations is None) == (tolerance is None)
        if tolerance is not None:
            assert int(one.iterations) == int(other.iterations) < 60
        columns = list(one.energies.values())[1:]
        torch.testing.assert_close(torch.stack(columns, 1), other.energies, rtol=1e-9, atol=1e-14)


def nudged_by_hand(case: Case, push: float, steps: int, eta: float) -> dict[str, torch.Tensor]:
    """Updates of a relaxation towards vhat - push (vhat - y), the beliefs' gradients from the energy by autograd."""
    graph, precision = case.graph, case.settings["precision"]
    with torch.no_grad():
        start = graph.values(
            {**{n: torch.zeros(len(case.x["x"]), 2).double() for n in graph.roots}, **case.x}
        )
    targets = {n: start[n] - push * (start[n] - y) for n, y in case.y.items()}
    losses = [(n, SUM, y) for n, y in targets.items()]
    fixed = {n: v for n, v in case.x.items()}
    v = {n: value for n, value in start.items() if n not in fixed and n not in targets}

    def errors(values):
        """Of every node that predicts pi (mu - v), or the loss's gradient, and mu, in autograd's graph."""
        result = {}
        for name in (n for n in graph.names if n not in graph.roots):
            mu = graph.values({n: w for n, w in values.items() if n != name})[name]
            distance = 2 * (mu - targets[name]) if name in targets else mu - values[name]
            result[name] = (precision.get(name, 1.0) * distance).detach(), mu
        return result

    for _ in range(steps):
        v = {n: value.detach().requires_grad_(True) for n, value in v.items()}
        last = errors({**fixed, **v})
        total = energy(graph, {**fixed, **v}, losses, precision)
        gradients = torch.autograd.grad(total, list(v.values()), allow_unused=True) if v else ()
        v = {n: w - eta * (0 if g is None else g) for (n, w), g in zip(v.items(), gradients, strict=True)}
    now = errors({**fixed, **{n: value.detach() for n, value in v.items()}})
    total = sum((e * now[n][1]).sum() for n, (e, _) in last.items())
    parameters = dict(graph.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(parameters.items(), found, strict=True)
    }


@FIXED
@given(st.data())
def test_graphs_are_nudged_as_a_loop_of_autograd_says(data):
    case = data.draw(cases(clamps=False))
    assume(case.y)
    kind, beta = (
        data.draw(st.sampled_from(("positive", "negative", "centred"))),
        data.draw(st.sampled_from((0.05, 1.0))),
    )
    signs = {"positive": (1,), "negative": (-1,), "centred": (1, -1)}[kind]
    steps = data.draw(st.integers(1, 6))
    parts = [nudged_by_hand(case, sign * beta, steps, 0.1) for sign in signs]
    truth = {
        n: sum(sign * part[n] for sign, part in zip(signs, parts, strict=True)) / (len(signs) * beta)
        for n in parts[0]
    }
    for backend in ("eager", "reference"):
        given = {"loss": SUM, "nudging": Nudging(kind, beta), "num_steps": steps, "step_size": 0.1}
        result = case.updates(**given, backend=backend)
        plain = case.updates(loss=SUM, num_steps=steps, backend=backend)
        assert result.pop("loss") == plain["loss"]  # the forward pass's, to y
        assert_same(result, truth, 1e-8)


@FIXED
@given(st.data())
@pytest.mark.parametrize("leaves", [True, False])
def test_an_early_exit_is_the_loop_with_that_many_iterations(leaves, data):
    """``leaves`` is False on CUDA, where the host cannot know without waiting."""
    case = data.draw(cases())
    tolerance, steps = data.draw(st.sampled_from((0.3, 1e-2, 1e-3))), 40
    whole = pcfast.relax(
        case.graph, case.x, case.y, energies=True, num_steps=steps, backend="reference", **case.settings
    )
    rows = torch.stack(list(whole.energies.values()), 1)
    found = (rows > 0).any(0)
    arrivals = (rows > 0).to(torch.int64).argmax(0)[found] + 1
    arrival = int(arrivals.max()) if len(arrivals) else 1
    expected = last_iteration(rows.tolist(), arrival, tolerance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "readable", lambda device: leaves)
        for backend in ("eager", "reference"):
            given = {"num_steps": steps, "tolerance": tolerance, "backend": backend}
            result = pcfast.relax(case.graph, case.x, case.y, **given, **case.settings)
            assert int(result.iterations) == expected, backend
            assert_same(
                {**case.states(**given, energies=False), **case.updates(**given)},
                {
                    **case.states(num_steps=expected, backend="reference", energies=False),
                    **case.updates(num_steps=expected, backend="reference"),
                },
            )


def skip() -> pcfast.Graph:
    return pcfast.Graph(
        {
            "x": pcfast.Root(),
            "h": (nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "x"),
            "y": (pcfast.Sum(nn.Linear(5, 3), nn.Linear(6, 3)), "h", "x"),
        }
    ).double()


def test_what_is_refused():
    x, y = batch()
    nudging = Nudging("positive", 0.5)
    for arguments, words in (
        ({"x": x, "y": y, "nudging": nudging}, "not mse"),
        ({"x": x, "clamp": {"y": y}, "nudging": nudging}, "without a target"),
        (
            {"x": x, "y": y, "loss": "mse", "nudging": nudging, "clamp": {"h": torch.zeros(5, 5).double()}},
            "'h' clamped",
        ),
        ({"x": x, "y": y, "loss": "mse", "nudging": nudging, "noise": 0.1}, "noise=0.1"),
        ({"x": x, "y": y, "loss": "mse", "nudging": nudging, "method": "exact"}, "linear"),
        ({"x": x, "y": y, "loss": "mse", "nudging": nudging, "method": "error_based"}, "It is strict's"),
        ({"x": x, "y": y, "loss": "mse", "tolerance": 0.1, "noise": 0.1}, "never comes to rest"),
        ({"x": x, "y": y, "loss": "mse", "tolerance": 0.1, "method": "error_based"}, "Only strict"),
    ):
        if "loss" not in arguments and "y" in arguments:
            arguments["y"] = torch.randint(0, 3, (5,))
        with pytest.raises(pcfast.ArgumentError, match=words):
            pcfast.pc_loss(skip(), **arguments)


@BOTH
def test_divergence_of_the_second_relaxation_is_located(backend):
    x, y = batch()
    with pytest.raises(pcfast.RelaxationDiverged, match=r"'h'|'y'"):
        pcfast.pc_loss(
            skip(),
            x,
            y,
            loss="mse",
            nudging=Nudging("centred", 0.5),
            step_size=1e3,
            num_steps=300,
            backend=backend,
        )
