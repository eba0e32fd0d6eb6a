"""Fixed points and fluctuations on linear Gaussian graphs, against their closed forms."""

from __future__ import annotations

import pytest
import torch
from recorded_programs import load
from torch import Tensor, nn

import pcfast
from pcfast import Graph, PerLayer, Prior, Root, Sum
from pcfast.losses import half_squared_error

SIZES = {"x": 2, "z": 2, "h1": 3, "h2": 3, "h3": 3, "y": 4}


def linear_graph() -> Graph:
    torch.manual_seed(0)
    prior = Prior(2, mean=torch.tensor([0.5, -1.0]), trainable=True)
    return Graph(
        {
            "x": Root(2), "z": prior, "h1": (nn.Linear(2, 3), "x"),
            "h2": (Sum(nn.Linear(3, 3), nn.Linear(2, 3)), "h1", "z"),
            "h3": (Sum(nn.Linear(3, 3), None), "h2", "h1"),
            "y": (Sum(nn.Linear(3, 4), nn.Linear(2, 4), None), "h3", "z", "q"), "q": (nn.Linear(2, 4), "x"),
        }
    ).double()  # fmt: skip


def affine(graph: Graph, free: list[str], given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(M, c) of one row: residuals mu - v of all nodes that predict = M (free values) + c, from the weights alone."""
    sizes = {**SIZES, "q": 4}
    places, begin = {}, 0
    for name in free:
        places[name], begin = slice(begin, begin + sizes[name]), begin + sizes[name]
    eye = torch.eye(4).double()
    branches = {
        "z": [], "h1": [("x", graph.h1)], "h2": [("h1", graph.h2._modules["0"]), ("z", graph.h2._modules["1"])],
        "h3": [("h2", graph.h3._modules["0"]), ("h1", None)], "q": [("x", graph.q)],
        "y": [("h3", graph.y._modules["0"]), ("z", graph.y._modules["1"]), ("q", None)],
    }  # fmt: skip
    rows, constants = [], []
    for name, inputs in branches.items():
        row, constant = torch.zeros(sizes[name], begin).double(), torch.zeros(sizes[name]).double()
        skip = eye[: sizes[name], : sizes[name]]
        terms = [(source, skip, None) if m is None else (source, m.weight, m.bias) for source, m in inputs]
        terms.append((name, -skip, graph.z.mean if name == "z" else None))
        for source, weight, bias in terms:
            constant = constant + (0 if bias is None else bias.detach())
            if source in places:
                row[:, places[source]] += weight.detach()
            else:
                constant = constant + weight.detach() @ given[source]
        rows.append(row)
        constants.append(constant)
    return torch.cat(rows), torch.cat(constants)


def solution(graph, free, given: dict[str, Tensor], precision: dict) -> tuple[Tensor, Tensor]:
    """The minimiser of the energy for every row, and the energy's second derivative."""
    predicting = ("z", "h1", "h2", "h3", "q", "y")
    weights = torch.cat([precision.get(n, 1.0) * torch.ones(SIZES.get(n, 4)).double() for n in predicting])
    result = []
    for row in range(len(next(iter(given.values())))):
        m, c = affine(graph, free, {n: v[row] for n, v in given.items()})
        hessian = m.t() @ (weights[:, None] * m)
        result.append(torch.linalg.solve(hessian, -m.t() @ (weights * c)))
    return torch.stack(result), hessian


def flat(values: dict[str, Tensor], free: list[str]) -> Tensor:
    return torch.cat([values[n] for n in free], 1)


CLAMPS = {
    "infer the input from the output": ("y",),
    "both ends, a latent root": ("x", "y"),
    "predict by relaxation": ("x",),
    "the middle": ("h2", "y"),
    "all roots and the output": ("x", "z", "y"),
}


@pytest.mark.parametrize("which", CLAMPS)
@pytest.mark.parametrize("method", ["strict", "error_based"])
def test_beliefs_settle_where_the_energy_is_least(which, method):
    graph, rows = linear_graph(), 3
    given = {n: torch.randn(rows, SIZES[n]).double() for n in CLAMPS[which]}
    free = [n for n in graph.names if n not in given]
    precision = {"h1": 2.0, "h2": torch.tensor([0.5, 1.0, 3.0]).double(), "z": 0.7, "y": 1.5}
    truth, hessian = solution(graph, free, given, precision)
    step_size = 1.0 / float(torch.linalg.eigvalsh(hessian)[-1])
    given_steps = {
        "step_size": step_size,
        "num_steps": 3000,
        "belief_optimizer": pcfast.GradientDescent(0.98),
    }
    if method == "error_based":  # it has no momentum, and another curvature
        given_steps = {"step_size": step_size / 4, "num_steps": 15000}
    result = pcfast.relax(graph, clamp=given, precision=precision, method=method, **given_steps)
    bound = 1e-9 if method == "strict" else 1e-6
    assert (flat(result.beliefs, free) - truth).abs().max() <= bound * truth.abs().max()
    assert all(torch.equal(result.beliefs[n], v) for n, v in given.items())


def test_clamping_the_output_is_the_half_squared_error():
    graph = linear_graph()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 4).double()
    results = []
    ways = [{"x": x, "y": y, "loss": half_squared_error}, {"clamp": {"x": x, "y": y}}]
    for arguments in (*ways, {"clamp": {"input": x, "output": y}}):
        graph.zero_grad()
        loss = pcfast.pc_loss(graph, **arguments, precision={"y": 2.0, "h2": 0.5}, num_steps=9)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in graph.parameters())])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)
    predicted = graph(x, z=graph.z.mean.expand(3, 2))
    torch.testing.assert_close(results[0][0], 2.0 * half_squared_error(predicted, y).detach())


def test_an_amortised_start_is_where_a_root_begins():
    graph = linear_graph()
    z, y = torch.randn(3, 2).double(), torch.randn(3, 4).double()
    x = torch.randn(3, 2).double()
    start = pcfast.relax(graph, clamp={"x": x, "y": y}, vinit={"z": z}, num_steps=0)
    assert torch.equal(start.beliefs["z"], z) and torch.equal(start.errors["z"], graph.z.mean.detach() - z)
    truth = graph.values({"x": x, "z": z})
    torch.testing.assert_close(start.beliefs["h3"], truth["h3"].detach())
    prior = 0.5 * (graph.z.mean - z).square().sum() + half_squared_error(truth["y"], y)
    torch.testing.assert_close(start.loss, prior.detach())


def test_values_a_layer_are_for_sequentials_too():
    """On a linear chain one strict step with a step size and a precision a layer, by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    v = [torch.randn(5, 4).double() for _ in range(2)]
    result = pcfast.relax(
        model, x, y, loss=half_squared_error, vinit=[None, *v, None], num_steps=1, precision=[2.0, 0.5, 3.0],
        step_size=PerLayer(0.1, 0.3),
    )  # fmt: skip
    e1, e2, e3 = 2 * (model[0](x) - v[0]), 0.5 * (model[1](v[0]) - v[1]), 3 * (model[2](v[1]) - y)
    torch.testing.assert_close(result.beliefs["0"], (v[0] + 0.1 * (e1 - e2 @ model[1].weight)).detach())
    torch.testing.assert_close(result.beliefs["1"], (v[1] + 0.3 * (e2 - e3 @ model[2].weight)).detach())
    assert repr(PerLayer(0.1, 0.3)) == "PerLayer(0.1, 0.3)"
    for wrong in (PerLayer(0.1), PerLayer(0.1, 0.1, 0.1, 0.1), {"0": 0.1}, {"7": 0.1}):
        with pytest.raises(pcfast.ArgumentError, match="step_size"):
            pcfast.relax(model, x, y, loss="mse", step_size=wrong)
    with pytest.raises(pcfast.ArgumentError, match="2 values"):
        pcfast.relax(model, x, y, loss="mse", precision=[1.0, 2.0])


def test_langevin_noise_samples_the_energys_distribution():
    """A linear Gaussian chain, both ends clamped: v has mean v* and covariance T (A - eta A^2 / 2)^-1.

    That is the stationary one of v <- v - eta A (v - v*) + sqrt(2 eta T) n: it solves
    S = (1 - eta A) S (1 - eta A) + 2 eta T. Bounds are five standard deviations of the sample's moments, and the
    seed is fixed.
    """
    torch.manual_seed(0)
    nodes = {
        "x": Root(),
        "h1": (nn.Linear(2, 3), "x"),
        "h2": (nn.Linear(3, 2), "h1"),
        "y": (nn.Linear(2, 2), "h2"),
    }
    graph = Graph(nodes).double()
    rows, temperature, eta = 20000, 0.3, 0.2
    x, y = torch.randn(1, 2).double().expand(rows, 2), torch.randn(1, 2).double().expand(rows, 2)
    precision = {"h2": 2.0}
    w2, w3 = graph.h2.weight.detach(), graph.y.weight.detach()
    a = torch.zeros(5, 5).double()
    a[:3, :3], a[3:, 3:] = torch.eye(3) + 2 * w2.t() @ w2, 2 * torch.eye(2) + w3.t() @ w3
    a[3:, :3], a[:3, 3:] = -2 * w2, -2 * w2.t()
    b2, b3 = graph.h2.bias.detach(), graph.y.bias.detach()
    b = torch.cat([graph.h1(x[:1])[0].detach() - 2 * w2.t() @ b2, 2 * b2 + w3.t() @ (y[0] - b3)])
    mean = torch.linalg.solve(a, b)
    covariance = temperature * torch.linalg.inv(a - eta / 2 * a @ a)

    def sample(backend="eager", rows=rows, steps=150, seed=1):
        generator = torch.Generator().manual_seed(seed)
        result = pcfast.relax(
            graph, clamp={"x": x[:rows], "y": y[:rows]}, precision=precision, step_size=eta, num_steps=steps,
            noise=temperature, generator=generator, backend=backend,
        )  # fmt: skip
        return flat(result.beliefs, ["h1", "h2"])

    v = sample()
    assert ((v.mean(0) - mean).abs() <= 5 * (covariance.diagonal() / rows).sqrt()).all()
    spread = (covariance.square() + covariance.diagonal()[:, None] * covariance.diagonal()).div(rows).sqrt()
    assert ((torch.cov(v.t()) - covariance).abs() <= 5 * spread).all()
    few = sample(rows=7, steps=20)
    assert torch.equal(few, sample(rows=7, steps=20)) and not torch.equal(
        few, sample(rows=7, steps=20, seed=2)
    )
    torch.testing.assert_close(sample("reference", rows=7, steps=20), few, rtol=1e-10, atol=1e-12)
    quiet = pcfast.relax(
        graph, clamp={"x": x[:7], "y": y[:7]}, precision=precision, step_size=eta, num_steps=500
    )
    torch.testing.assert_close(flat(quiet.beliefs, ["h1", "h2"]), mean.expand(7, 5), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("as_loss", [False, True])
def test_a_generative_network_is_pctrainers(backend, as_loss):
    """Its recorded training: a trainable prior at the root, the data below, beliefs from a start of their own."""
    recorded = load("pctrainer_generative__bias_prior_relu")
    settings = {name: value for name, value in recorded.settings().items() if name != "vinit"}
    chain = recorded.model()
    nodes: dict = {"v1": Prior(5, mean=recorded.arrays["param.0.0.bias"], trainable=True)}
    nodes |= {f"v{k + 1}": (chain[k], f"v{k}") for k in range(1, len(chain))}
    graph = Graph(nodes).double()
    start = {f"v{l}": recorded.arrays[f"start.{l}"] for l in range(1, len(chain))}
    given = {"y": recorded.arrays["y"]} if as_loss else {"clamp": {"output": recorded.arrays["y"]}}
    pcfast.pc_loss(graph, **given, **settings, vinit=start, backend=backend).backward()
    result = {"0.0.bias": graph.v1.mean.grad}
    result |= {name: p.grad for name, p in chain.named_parameters() if not name.startswith("0.")}
    assert recorded.difference(result, "grad.") < 1e-10
