"""exact by torch's own backward pass: the chains' numbers and errors, and only where it is all that is asked."""

import pytest
import torch
from torch import nn

import pcfast
from pcfast.backends.eager import backend, backpropagation
from pcfast.problem.settings import Settings
from pcfast.relaxation.solve import prepare


def mlp():
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()),
        nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(8, 7)),
        nn.Linear(7, 3),
    )


def cnn():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten()),
        nn.Linear(4 * 2 * 2, 3),
    )


def residual():
    return nn.Sequential(nn.Linear(6, 8), pcfast.Residual(nn.Linear(8, 8), nn.SiLU()), nn.Linear(8, 3))


def shared():
    same = nn.Linear(6, 6)
    return nn.Sequential(same, nn.Sequential(nn.Sigmoid(), same), nn.Linear(6, 3))


def frozen():
    model = mlp()
    model[0][0].weight.requires_grad_(False)
    return model


def in_place():
    return nn.Sequential(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)))


def step(model, x, y, **settings):
    model.zero_grad()
    loss = pcfast.pc_loss(model, x, y, method="exact", backend="eager", **settings)
    loss.backward()
    return [loss.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


@pytest.fixture
def chains_only(monkeypatch):
    def switch():
        monkeypatch.setattr(backend, "updates_by_autograd", lambda problem, plan: None)

    return switch


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "mse", nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")]
)
@pytest.mark.parametrize("make", [mlp, cnn, residual, shared, frozen, in_place])
def test_it_computes_what_the_chains_do(make, loss, chains_only, monkeypatch):
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(5, 1, 6, 6).double() if make is cnn else torch.randn(5, 6).double()
    given = x.clone()
    y = torch.randn(5, 3).double() if loss == "mse" else torch.randint(0, 3, (5,))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "layer_chains", None)  # nothing else runs
        ours = step(model, x, y, loss=loss)
    assert torch.equal(x, given)
    chains_only()
    for a, b in zip(ours, step(model, x, y, loss=loss), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-13 * b.norm()


def test_a_hook_of_a_parameter_acts_once():
    model, x, y = mlp(), torch.randn(5, 6), torch.randint(0, 3, (5,))
    plain = step(model, x, y)[1]
    model[0][0].weight.register_hook(lambda gradient: 3 * gradient)
    assert torch.equal(step(model, x, y)[1], 3 * plain)


def spoiled(name):
    model, x, y = mlp(), torch.randn(5, 6), torch.randint(0, 3, (5,))
    if name == "a label":
        y[2] = 3
    elif name == "a belief":
        model[1][1].bias.data[2] = float("inf")
    elif name == "a belief that an activation hides":
        model[0] = nn.Linear(6, 8)
        model[0].bias.data[2] = float("inf")
        model[1][0] = nn.Tanh()
    else:
        x.fill_(3e38)
        model[0][0].weight.data.zero_()
        model[1][1].weight.data.mul_(1000)
    return model, x, y


@pytest.mark.parametrize("name", ["a label", "a belief", "a belief that an activation hides", "an update"])
def test_what_is_amiss_is_said_as_by_the_chains(name, chains_only):
    messages = []
    for switch in (lambda: None, chains_only):
        switch()
        torch.manual_seed(0)
        with pytest.raises(pcfast.PcfastError) as caught:
            step(*spoiled(name))
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda m: m.append(nn.BatchNorm1d(3)), {}),
        (lambda m: m.append(nn.Dropout(0.5)), {}),
        (lambda m: m.append(nn.Softplus()), {}),
        (None, {"method": "strict"}),
        (None, {"loss": lambda output, y: output.square().sum()}),
        (None, {"normalizer": 10}),
        (None, {"check": "deferred"}),
    ],
    ids=[
        "statistics",
        "random numbers",
        "an unknown module",
        "a loop",
        "an unknown loss",
        "a normalizer",
        "deferred",
    ],
)
def test_whatever_is_more_runs_in_chains(change, settings):
    model = mlp()
    if change:
        change(model)
    settings = Settings(**{"method": "exact", "backend": "eager", **settings})
    problem, plan = prepare(model, torch.randn(5, 6), torch.randint(0, 3, (5,)), settings)
    assert backpropagation.updates_by_autograd(problem, plan) is None


def test_under_autocast_it_runs_in_chains():
    model = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        problem, plan = prepare(
            model, torch.randn(5, 6), torch.randint(0, 3, (5,)), Settings(method="exact", backend="eager")
        )
        assert backpropagation.updates_by_autograd(problem, plan) is None
