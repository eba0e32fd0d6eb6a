"""The numbers of docs/examples.md: its functions against other programs' recorded runs and plain autograd loops."""

from __future__ import annotations

import functools

import pytest
import torch
from pages import names_of
from recorded_programs import load, of_kind, set_parameters, worst
from torch import Tensor, nn

import pcfast

example = functools.cache(functools.partial(names_of, "examples.md"))
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def assert_meets(name: str, model: nn.Module, parameters: list[Tensor], step, tolerance: float) -> None:
    """First update, and weights after 20 steps of the program's weight optimiser; ``step`` assigns .grad."""
    meta, arrays = load(name).parts
    settings = meta["weight_optimizer"]
    optimizer = OPTIMIZERS[settings["name"]](model.parameters(), lr=settings["lr"])
    for count in range(20):
        step(meta, arrays)
        if count == 0:
            assert worst([p.grad for p in parameters], of_kind("grad", arrays)) < tolerance
        optimizer.step()
    assert worst([p.detach() for p in parameters], of_kind("after20", arrays)) < tolerance


def test_the_generative_model_is_pctrainers():
    page = example("Generative PC with a prior on the root")
    name = "pctrainer_generative__bias_prior_relu"
    _, arrays = load(name).parts
    model = page["generator"](5, 10, 9, 12).double()
    weight, *parameters = model.parameters()
    set_parameters(parameters, of_kind("param", arrays))
    start = of_kind("start", arrays)

    def step(meta, arrays):
        settings = {"step_size": meta["step_size"], "iterations": meta["iterations"]}
        page["generative_step"](model, arrays["y"], start, **settings)
        assert not weight.grad.any()

    assert_meets(name, model, parameters, step, 1e-12)


def test_mupc_is_jpcs():
    page = example("muPC: residual MLPs of any depth")
    _, arrays = load("jpc_mupc__resnet5_relu").parts
    model = page["mupc_mlp"](7, 11, 4, depth=5).double()
    set_parameters(model.parameters(), of_kind("param", arrays))

    def step(meta, arrays):
        settings = {"step_size": meta["step_size"], "iterations": meta["iterations"]}
        page["jpc_step"](model, arrays["x"], arrays["y"], **settings)

    assert_meets("jpc_mupc__resnet5_relu", model, list(model.parameters()), step, 1e-11)


@pytest.mark.parametrize("name", ["fabricpc__precision_2_hidden", "fabricpc__precision_per_layer"])
def test_precisions_are_fabricpcs(name):
    page = example("A precision for each layer")
    meta, arrays = load(name).parts
    model = load(name).model()
    parameters = list(model.parameters())
    settings = {"step_size": meta["step_size"], "iterations": meta["iterations"]}

    def step(meta, arrays, precision=None):
        page["precise_step"](
            model, arrays["x"], arrays["y"], precision=precision or meta["precision"], **settings
        )

    assert_meets(name, model, parameters, step, 1e-12)
    set_parameters(parameters, of_kind("param", arrays))
    step(meta, arrays, 1.0)
    assert worst([p.grad for p in parameters], of_kind("grad", arrays)) > 0.5


def plain_loop(model, x, y, *, step_size, iterations, scale=1.0, decay=0.0, rows=None):
    """(beliefs, updates) down the energy over ``rows``, x's by default: its mean, as JPC writes it; 1: its sum."""
    rows = rows or len(x)
    z = []
    with torch.no_grad():
        for layer in model[:-1]:
            z.append(layer(z[-1] if z else x))

    def energy():
        below = [x, *z]
        hidden = sum((v - f(b)).square().sum() for f, b, v in zip(model[:-1], below[:-1], z, strict=True))
        output = scale * (y - model[-1](below[-1])).square().sum()
        return 0.5 * (hidden + output + decay * sum(v.square().sum() for v in z)) / rows

    for _ in range(iterations):
        z = [v.detach().requires_grad_() for v in z]
        slopes = torch.autograd.grad(energy(), z)
        z = [v.detach() - step_size * slope for v, slope in zip(z, slopes, strict=True)]
    return z, list(torch.autograd.grad(energy(), list(model.parameters())))


@pytest.mark.parametrize(("parts", "depth"), [({}, 30), ({"scale": 5.0, "decay": 0.1}, 5)])
def test_a_plain_loop_down_jpcs_energy(parts, depth):
    """After eight iterations a layer errors have reached the first one: every array by its own norm."""
    page = example("muPC: residual MLPs of any depth")
    model = page["mupc_mlp"](7, 11, 4, depth=depth).double()
    x, y = (torch.randn(6, width, dtype=torch.float64) for width in (7, 4))
    settings = {"step_size": 1.5, "iterations": 8 * depth}
    truth = plain_loop(model, x, y, **settings, **parts)[1]
    written = example("Output energy scaling and activity decay")["settings"] if parts else {}
    page["jpc_step"](model, x, y, **settings, **written)
    result = [p.grad.clone() for p in model.parameters()]
    assert max(relative_errors(result, truth)) < 1e-12
    if parts:
        page["jpc_step"](model, x, y, **settings)
        assert worst([p.grad for p in model.parameters()], truth) > 0.1  # they matter


def relative_errors(result: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((f.double() - t).norm() / t.norm()) for f, t in zip(result, truth, strict=True)]


def test_twenty_layers():
    page = example("Inference in a trained network of 20 layers")
    model, losses, x, y, settings = (page[name] for name in ("model", "losses", "x", "y", "SETTINGS"))
    assert losses[-1] < losses[0] / 20
    totals = page["long"].energies.sum(1)
    assert (totals.diff() < 0).all()
    norms = [float(e.norm()) for e in page["short"].errors[1:]]
    assert 0 < norms[0] < 1e-10 * norms[-1]
    assert not pcfast.relax(model, x, y, num_steps=19, **settings).errors[1].any()

    exact = nn.Sequential(*model).double()
    literal = pcfast.relax(exact.float(), x, y, num_steps=20, backend="reference", **settings).errors
    exact, x, y = exact.double(), x.double(), y.double()
    truth = {n: pcfast.relax(exact, x, y, num_steps=n, **settings) for n in (20, 400)}
    assert max(relative_errors(page["short"].errors[1:], truth[20].errors[1:])) < 1e-2
    assert max(relative_errors(page["long"].errors[1:], truth[400].errors[1:])) < 1e-4
    assert min(relative_errors(literal[1:4], truth[20].errors[1:4])) > 0.9

    beliefs, _ = plain_loop(exact, x, y, step_size=settings["step_size"], iterations=400, rows=1)
    result = truth[400].beliefs
    for v, belief in zip(result[1:-1], beliefs, strict=True):
        assert float((v - belief).norm()) < 1e-11 * float(belief.norm())
