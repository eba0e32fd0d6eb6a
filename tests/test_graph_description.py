"""pcfast.Graph: what it is as a torch module, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pcfast
from pcfast import ArgumentError, BackendError, Concatenate, ModelError, Prior, Root, ShapeError, Sum
from pcfast.diagnostics import diagnose


def graph(**changes) -> pcfast.Graph:
    torch.manual_seed(0)
    nodes = {
        "x": Root(),
        "h1": (nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "x"),
        "h2": (nn.Linear(5, 5), "h1"),
        "y": (nn.Sequential(Sum(nn.Linear(5, 3), None), nn.Sigmoid()), "h2", "p"),
        "p": (nn.Linear(6, 3), "x"),
    }
    return pcfast.Graph({**nodes, **changes})


def test_it_is_a_torch_module():
    net = graph()
    assert net.names == ("x", "h1", "h2", "p", "y") and net.outputs == ("y",) and net.inputs == ("x",)
    assert list(net.state_dict())[:4] == ["h1.0.weight", "h1.0.bias", "h2.weight", "h2.bias"]
    x = torch.randn(4, 6)
    truth = torch.sigmoid(net.y[0]._modules["0"](net.h2(net.h1(x))) + net.p(x))
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), graph()):
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(x), truth) and torch.equal(twin(x=x), truth)
    h1 = torch.randn(4, 5)
    assert torch.equal(net(x, h1=h1), torch.sigmoid(net.y[0]._modules["0"](net.h2(h1)) + net.p(x)))
    assert net.double().h1[0].weight.dtype == torch.float64


def test_print_draws_it():
    lines = repr(graph()).splitlines()
    assert lines[0] == "Graph(" and len(lines) == 7
    assert " ".join(lines[3].split()) == "h2 Linear(in_features=5, out_features=5, bias=True) <- h1"
    assert lines[5].endswith("- Sigmoid() <- h2, p  (output)") and "Sum(Linear(" in lines[5]


def test_several_outputs_and_priors():
    net = pcfast.Graph({"z": Prior(2, mean=0.5), "a": (nn.Linear(2, 3), "z"), "b": (nn.Linear(2, 4), "z")})
    a, b = net(z=torch.zeros(5, 2))
    assert net.inputs == () and a.shape == (5, 3) and b.shape == (5, 4)
    assert torch.equal(net()[0], net.a(torch.full((1, 2), 0.5)))
    named = pcfast.Graph(
        {"z": Prior(2), "a": (nn.Linear(2, 3), "z"), "b": (nn.Linear(3, 4), "a")}, outputs="a"
    )
    assert named().shape == (1, 3)


REFUSED = {
    "cycle": ({"h1": (Sum(nn.Linear(6, 5), None), "x", "h2")}, ModelError, "h1 -> h2"),
    "unknown input": ({"h1": (nn.Linear(6, 5), "q")}, ModelError, "unknown input 'q'"),
    "no module": ({"h1": "x"}, ArgumentError, "pcfast.Root, pcfast.Prior, or"),
    "no inputs": ({"h1": nn.Linear(6, 5)}, ModelError, "without inputs"),
    "taken name": ({"train": Root()}, ModelError, "train_1"),
    "dotted name": ({"h.1": Root()}, ModelError, "identifiers"),
    "too few branches": ({"y": (Sum(nn.Linear(5, 3)), "h2", "p")}, ArgumentError, "2 of them at node 'y'"),
    "sequential": ({"y": (nn.Sequential(nn.Linear(5, 3)), "h2", "p")}, ModelError, "begins with pcfast.Sum"),
    "two for a Linear": (
        {"y": (nn.Linear(5, 3), "h2", "p")},
        ModelError,
        "2 inputs for a Linear, whose forward",
    ),
    "one for two": ({"h1": (nn.Bilinear(6, 6, 5), "x")}, ModelError, "1 inputs for a Bilinear"),
    "list of inputs": ({"y": (nn.Bilinear(5, 6, 3), ["h2", "p"])}, ArgumentError, "names of nodes"),
    "prior with inputs": ({"h2": (Prior(5), "h1")}, ModelError, "a Prior alone"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_no_graph_is_refused(which):
    changes, kind, words = REFUSED[which]
    with pytest.raises(kind, match=words):
        graph(**changes)


def test_other_refusals():
    with pytest.raises(ModelError, match="mapping from names"):
        pcfast.Graph({})
    with pytest.raises(ArgumentError, match="names of nodes: a, b"):
        pcfast.Graph({"a": Root(), "b": (nn.Linear(2, 2), "a")}, outputs="q")
    with pytest.raises(ArgumentError, match="ints >= 1"):
        Root(0)
    with pytest.raises(ShapeError, match="that of one row"):
        Prior(3, mean=torch.zeros(2))
    with pytest.raises(ArgumentError, match="batch"):
        Concatenate(dim=0)
    with pytest.raises(ArgumentError, match="no value for the root 'x'"):
        graph()()
    with pytest.raises(ModelError, match=r"a Graph;.* pc_loss, relax"):
        diagnose(graph(), X, Y)
    with pytest.raises(ShapeError, match="equal shapes"):
        Sum()(torch.zeros(2, 3), torch.zeros(2, 4))


X, Y = torch.randn(4, 6), torch.randint(0, 3, (4,))
CALLS = {
    "no value": ({}, ArgumentError, "at least one"),
    "no input": ({"y": Y}, ModelError, "no value for 'x'"),
    "not reached": ({"clamp": {"h2": torch.zeros(4, 5)}}, ModelError, "neither clamped nor predicted"),
    "unknown clamp": ({"x": X, "clamp": {"q": X}}, ArgumentError, "the name 'q'"),
    "twice": ({"x": X, "clamp": {"x": X}}, ArgumentError, "second value"),
    "clamped target": ({"x": X, "y": Y, "clamp": {"y": torch.zeros(4, 3)}}, ArgumentError, "which is clamped"),
    "inner target": ({"x": X, "y": {"h2": Y}}, ArgumentError, "Clamp it"),
    "rows": ({"x": X, "clamp": {"h2": torch.zeros(3, 5)}}, ShapeError, "3 rows"),
    "shape": ({"x": X, "clamp": {"h2": torch.zeros(4, 6)}}, ShapeError, r"h2.*\(4, 5\)"),
    "input's shape": ({"x": X[:, :5], "y": Y}, ShapeError, "Linear in node h1"),
    "dtype": ({"x": X.double(), "y": Y}, ArgumentError, r"clamp\['x'\].*float64"),
    "nan": ({"x": X * torch.nan, "y": Y}, ArgumentError, "NaN or infinity in row 0"),
    "labels": ({"x": X, "y": Y + 5}, ArgumentError, "labels from 0 to 2"),
    "start": ({"x": X, "y": Y, "vinit": {"x": X}}, ArgumentError, "does not move"),
    "start's shape": ({"x": X, "y": Y, "vinit": {"h1": X}}, ShapeError, "vinit.*prediction"),
    "list start": ({"x": X, "y": Y, "vinit": [None] * 5}, ArgumentError, "a mapping"),
    "step sizes": ({"x": X, "y": Y, "step_size": {"h1": 0.1}}, ArgumentError, "none for h2, p"),
    "precision": ({"x": X, "y": Y, "precision": -1.0}, ArgumentError, ">= 0"),
    "precision's shape": ({"x": X, "y": Y, "precision": {"h1": torch.ones(4)}}, ShapeError, r"\(5,\), one a unit"),
    "sequence": ({"x": X, "y": Y, "precision": [1.0, 2.0]}, ArgumentError, "a number, or a mapping"),
    "noise": ({"x": X, "y": Y, "noise": 0.1, "method": "exact"}, ArgumentError, 'method="strict"'),
    "momentum": ({"x": X, "y": Y, "noise": 0.1, "belief_optimizer": pcfast.Adam()}, ArgumentError, "plain"),
    "kernels": ({"x": X, "y": Y, "backend": "cpu"}, BackendError, "its kernels run chains"),
}  # fmt: skip


@pytest.mark.parametrize("which", CALLS)
def test_what_does_not_fit_is_refused(which):
    given, kind, words = CALLS[which]
    with pytest.raises(kind, match=words):
        pcfast.pc_loss(graph(), **given)


def test_explain():
    text = repr(pcfast.explain(graph(), (4, 6)))
    assert (
        text.startswith("strict on a graph of 5 nodes, on backend eager")
        and "cpu refused: its kernels run" in text
    )
    assert "node y (Sum(Linear, identity) - Sigmoid) <- h2, p" in text
    text = repr(pcfast.explain(graph(y=(Mixed(), "h2", "p")), (4, 6), method="epc"))
    assert text.startswith("error_based") and "eager refused: node 'y' has 2 inputs" in text
    chain = pcfast.Graph({"x": Root(), "a": (nn.Linear(6, 5), "x"), "y": (nn.Linear(5, 3), "a")})
    assert (
        pcfast.explain(chain, (4, 6), "cpu").plan
        == pcfast.explain(nn.Sequential(chain.a, chain.y), (4, 6), "cpu").plan
    )
    with pytest.raises(BackendError):
        pcfast.explain(graph(), (4, 6), backend="cpu")


def test_shapes_that_do_not_add_name_the_node():
    net = graph(p=(nn.Linear(6, 4), "x"))
    with pytest.raises(ShapeError, match=r"\(4, 3\), \(4, 4\) at node y .*equal shapes"):
        pcfast.pc_loss(net, X, Y)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, a, b):
        return self.left(a) * torch.tanh(self.right(b))


def test_a_module_of_several_inputs_runs_on_the_reference():
    net = graph(y=(Mixed(), "h2", "p"))
    pcfast.pc_loss(net, X, Y).backward()
    plan = pcfast.last_run().plan
    assert plan.backend == "reference" and "does not begin with a plain pcfast.Sum" in plan.refusals[0][1]
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(BackendError, match="'y' has 2 inputs"):
        pcfast.pc_loss(net, X, Y, backend="eager")


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("method", ["strict", "fixed_prediction", "error_based"])
def test_divergence_names_iteration_and_node(backend, method):
    net = graph()
    with pytest.raises(pcfast.RelaxationDiverged, match=r"in iteration \d+ at node '(h1|h2|p|y)'") as caught:
        pcfast.pc_loss(net, X, Y, method=method, step_size=1e12, num_steps=20, backend=backend)
    assert 0 < caught.value.iteration <= 20 and all(p.grad is None for p in net.parameters())


def test_deferred_checks_and_none():
    net = graph()
    pcfast.pc_loss(net, X, Y, step_size=1e12, check="deferred").backward()
    assert all(bool((p.grad == 0).all()) for p in net.parameters())
    with pytest.raises(pcfast.RelaxationDiverged, match="at node"):
        pcfast.synchronize()
    net.zero_grad()
    pcfast.pc_loss(net, X, Y, step_size=1e12, check="off").backward()
    assert not all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_predictive_coding_and_no_grad():
    net = graph()
    pc = pcfast.PredictiveCoding(net, method="error_based", num_steps=3)
    assert torch.equal(pc(X), net(X))
    loss, output = pc(X, Y, return_output=True)
    loss.backward()
    assert torch.allclose(output, net(X)) and torch.allclose(loss, nn.functional.cross_entropy(net(X), Y))
    with torch.no_grad():
        assert torch.allclose(pc(X, Y), loss) and torch.allclose(
            pcfast.pc_loss(net, X, Y, vinit={"h1": X[:, :5]}), loss
        )
    pc.load_state_dict(copy.deepcopy(pc).state_dict())
    assert "model.h1.0.weight" in pc.state_dict()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_inference_mode_and_modules_that_pcfast_does_not_know(backend):
    net = graph(h2=(nn.Sequential(nn.Linear(5, 5), nn.Softplus()), "h1"))
    truth = pcfast.relax(net, X, Y, backend=backend).beliefs
    with torch.inference_mode():
        start = {"h1": truth["h1"].clone()}
        result = pcfast.relax(net, X.clone(), Y.clone(), backend=backend, vinit=start, num_steps=0).beliefs
        same = pcfast.relax(net, X.clone(), Y.clone(), backend=backend).beliefs
    assert torch.equal(result["h1"], truth["h1"])
    assert all(torch.equal(same[name], value) for name, value in truth.items())


def test_torch_compile_leaves_graphs_outside():
    net = graph()

    def updates(call):
        net.zero_grad()
        call(X, Y).backward()
        return [p.grad.clone() for p in net.parameters()]

    for call in (lambda x, y: pcfast.pc_loss(net, x, y), pcfast.PredictiveCoding(net, precision={"h1": 2.0})):
        compiled = torch.compile(call, backend="eager")
        assert all(torch.equal(a, b) for a, b in zip(updates(call), updates(compiled), strict=True))


def test_statistics_move_once_a_step_and_not_where_it_fails():
    net = graph(h2=(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5)), "h1"))
    for backend in ("eager", "reference"):
        before = int(net.h2[0].num_batches_tracked)
        pcfast.pc_loss(net, X, Y, backend=backend)
        assert net.h2[0].num_batches_tracked == before + 1
        with pytest.raises(pcfast.RelaxationDiverged):
            pcfast.pc_loss(net, X, Y, step_size=1e20, backend=backend)
        assert net.h2[0].num_batches_tracked == before + 1
