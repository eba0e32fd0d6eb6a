"""Divergence is part of the contract: reported with iteration, layer, step size and remedy, never quiet NaN."""

import math
import pickle
from fractions import Fraction
from itertools import pairwise
from math import comb

import pytest
import torch
from literal import relax_literally
from torch import nn

import pcfast
from pcfast.problem import status

BACKENDS = ["reference", "eager"]
METHODS = ["exact", "fixed_prediction", "strict", "error_based", "zero_divergence"]
LARGEST = torch.finfo(torch.float32).max
LOSS = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _nothing_pending():
    """No test leaves a report to the next one."""
    yield
    left = list(status._pending)
    status._pending.clear()
    assert not left


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def net(widths, activation=nn.Identity, seed=0):
    """float32, the last layer linear; a wide layer 1 makes layer 2 run in Gram form."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(i, o), activation()) for i, o in pairwise(widths)]
    model = nn.Sequential(*layers[:-1], layers[-1][0])
    return model, torch.randn(4, widths[0]), torch.randint(0, widths[-1], (4,))


GRAM, PLAIN = (6, 64, 5, 4, 3), (6, 5, 48, 4, 3)


def diverged(call):
    with pytest.raises(pcfast.RelaxationDiverged) as caught:
        call()
    return caught.value


class Found(Exception):
    pass


def first_overflow(model, x, y, step_size, *, gram):
    """(iteration, layer) at which float32 would overflow, by the literal relaxation in float64.

    In Gram form layer 1 is watched through layer 2's pre-activation: its beliefs are out of the loop.
    """
    model, x = model.double(), x.double()
    start = relax_literally(model, x, y, loss=LOSS, method="exact", step_size=0, num_steps=0)
    vhat = [v if l == 0 else v + e for l, (v, e) in enumerate(zip(start.beliefs, start.errors, strict=True))]

    def watch(t, v, errors):
        watched = [v[l] - vhat[l] for l in range(1, len(model))]
        if gram:
            watched[0] = watched[0] @ model[1][0].weight.detach().T
        for l, value in enumerate(watched, start=1):
            if float(value.abs().max()) > LARGEST:
                raise Found(t, l)

    with pytest.raises(Found) as result:
        relax_literally(
            model, x, y, loss=LOSS, method="strict", step_size=step_size, num_steps=300, watch=watch
        )
    model.float()
    return result.value.args


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step_size", [3.0, 5.0, 10.0])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
@pytest.mark.parametrize("check", ["sync", "deferred"])
def test_strict_without_gram_form(activation, step_size, seed, check, backend):
    model, x, y = net(PLAIN, activation, seed)
    truth = first_overflow(model, x, y, step_size, gram=False)
    arguments = {"step_size": step_size, "num_steps": 300, "backend": backend, "check": check}
    assert not pcfast.explain(model, x.shape, num_steps=300).plan.gram

    def call():
        pcfast.relax(model, x, y, **arguments)
        pcfast.synchronize()

    error = diverged(call)
    assert (error.iteration, error.layer, error.step_size) == (*truth, step_size)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step_size", [3.0, 5.0, 7.0])
@pytest.mark.parametrize("check", ["sync", "deferred"])
def test_strict_in_gram_form(step_size, seed, check):
    model, x, y = net(GRAM, nn.Identity, seed)
    truth = first_overflow(model, x, y, step_size, gram=True)
    arguments = {"step_size": step_size, "num_steps": 300, "backend": "eager", "check": check}
    assert pcfast.explain(model, x.shape, num_steps=300).plan.gram

    def call():
        pcfast.relax(model, x, y, **arguments)
        pcfast.synchronize()

    error = diverged(call)
    assert (error.iteration, error.layer) == truth


@pytest.mark.parametrize(
    ("widths", "activation", "step_size", "seed"),
    [
        (GRAM, nn.Identity, 3.0, 0),
        (GRAM, nn.Identity, 5.0, 1),
        (GRAM, nn.ReLU, 5.0, 0),
        (GRAM, nn.ReLU, 10.0, 1),
        (GRAM, nn.Tanh, 10.0, 0),
        (PLAIN, nn.Identity, 3.0, 0),
        (PLAIN, nn.ReLU, 5.0, 1),
        (PLAIN, nn.ReLU, 10.0, 2),
        (PLAIN, nn.Tanh, 10.0, 1),
    ],
)
def test_both_backends_name_the_same_iteration_and_layer(widths, activation, step_size, seed):
    model, x, y = net(widths, activation, seed)
    errors = [
        diverged(lambda b=b: pcfast.pc_loss(model, x, y, backend=b, step_size=step_size, num_steps=300))
        for b in BACKENDS
    ]
    assert errors[0].args == errors[1].args
    assert 20 < errors[0].iteration < 150


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_gram_form_differs_by_an_iteration_at_most(activation, seed):
    """It watches another tensor, so one of the two may cross the largest number an iteration earlier."""
    model, x, y = net(GRAM, activation, seed)
    first, second = (
        diverged(lambda b=b: pcfast.pc_loss(model, x, y, backend=b, step_size=3.0, num_steps=300)).iteration
        for b in BACKENDS
    )
    assert abs(first - second) <= 1


@pytest.mark.parametrize("call", ["pc_loss", "relax", "PCInfer"])
def test_the_message_names_place_and_remedy_and_grad_stays(call, backend):
    model, x, y = net(PLAIN, nn.ReLU)
    held = {}
    for p in model.parameters():
        held[p] = p.grad = torch.full_like(p, 7.0)
    if call == "PCInfer":
        error = diverged(lambda: pcfast.PCInfer(model, LOSS, x, y, "Strict", 5.0, 300, backend=backend))
    else:
        run = getattr(pcfast, call)
        error = diverged(lambda: run(model, x, y, step_size=5.0, num_steps=300, backend=backend))
    text = str(error)
    for word in (
        f"iteration {error.iteration}",
        f"layer {error.layer}",
        "step size 5",
        "smaller step_size",
        "2.5",
    ):
        assert word in text
    assert isinstance(error, ArithmeticError)
    assert isinstance(error, pcfast.PcfastError)
    for p, grad in held.items():
        assert p.grad is grad
        assert bool((grad == 7.0).all())


def test_the_last_iteration_counts(backend):
    """One iteration fewer than the first that overflows is finite and raises nothing."""
    model, x, y = net(PLAIN)
    t, _ = first_overflow(model, x, y, 5.0, gram=False)
    diverged(lambda: pcfast.relax(model, x, y, step_size=5.0, num_steps=t, backend=backend))
    result = pcfast.relax(model, x, y, step_size=5.0, num_steps=t - 1, backend=backend)
    assert all(bool(torch.isfinite(v).all()) for v in result.beliefs)


# fixed prediction -----------------------------------------------------------------------------------------


def factor(distance, steps, eta):
    """c_d(t) by its binomial sum, for any eta: sum over k >= d of C(t, k) eta^k (1 - eta)^(t - k)."""
    return sum(comb(steps, k) * eta**k * (1 - eta) ** (steps - k) for k in range(distance, steps + 1))


@pytest.mark.parametrize("call", ["pc_loss", "relax", "PCInfer"])
def test_fixed_prediction_overflow_is_known_before_any_tensor_work(call):
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x):
            Counted.calls += 1
            return super().forward(x)

    model = nn.Sequential(nn.Sequential(Counted(6, 5), nn.Tanh()), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    settings = {"method": "fixed_prediction", "step_size": 5.0, "num_steps": 2000, "backend": "eager"}
    if call == "PCInfer":
        error = diverged(lambda: pcfast.PCInfer(model, LOSS, x, y, "FixedPred", 5.0, 2000, backend="eager"))
    else:
        error = diverged(lambda: getattr(pcfast, call)(model, x, y, **settings))
    assert Counted.calls == 0
    assert int(model[1].num_batches_tracked) == 0
    farthest = 2 if call == "pc_loss" else 3  # relax and PCInfer also move v_0
    first = next(t for t in range(1, 2001) if abs(factor(farthest, t, Fraction(5))) > LARGEST)
    assert (error.iteration, error.layer) == (first, 1)
    assert 'method="fixed_prediction" with step_size <= 1' in str(error)


@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("call", ["relax", "pc_loss"])
def test_fixed_prediction_overflow_of_factor_times_error(call, scale, backend):
    """Factors are finite, their product with the error is not: same iteration and layer as the literal loop."""
    model, x, y = net(PLAIN)

    def loss(output, y):
        return scale * nn.functional.cross_entropy(output, y, reduction="sum")

    vhat = [x.double()]
    for layer in net(PLAIN)[0].double():
        vhat.append(layer(vhat[-1]).detach())
    lowest = 0 if call == "relax" else 1  # relax also moves v_0

    def watch(t, v, errors):
        for l in range(lowest, len(model)):
            if float((v[l] - vhat[l]).abs().max()) > LARGEST:
                raise Found(t, max(l, 1))

    literal = {"loss": loss, "method": "fixed_prediction", "step_size": 5.0, "num_steps": 80}
    with pytest.raises(Found) as result:
        relax_literally(net(PLAIN)[0].double(), x.double(), y, **literal, watch=watch)
    t, layer = result.value.args
    run = getattr(pcfast, call)

    def step(num_steps):
        return run(model, x, y, backend=backend, **{**literal, "num_steps": num_steps})

    # updates need the errors before the last belief update only
    error = diverged(lambda: step(t if call == "relax" else t + 1))
    assert (error.iteration, error.layer) == (t, layer)
    step(t - 1)


def test_a_single_layer_has_no_belief_that_could_diverge(backend):
    """pc_loss never needs v_0, whose factor overflows."""
    model = nn.Sequential(nn.Linear(6, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    pcfast.pc_loss(
        model, x, y, method="fixed_prediction", step_size=5.0, num_steps=200, backend=backend
    ).backward()
    result = model[0].weight.grad.clone()
    model.zero_grad()
    LOSS(model(x), y).backward()
    torch.testing.assert_close(result, model[0].weight.grad)
    error = diverged(
        lambda: pcfast.relax(
            model, x, y, method="fixed_prediction", step_size=5.0, num_steps=200, backend=backend
        )
    )
    assert error.layer == 1


# before and after the relaxation --------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["sync", "deferred"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_weights_that_are_not_finite(layer, value, method, check, backend):
    model, x, y = net(GRAM, nn.Identity)
    with torch.no_grad():
        (model[layer - 1] if layer == 4 else model[layer - 1][0]).weight[1, 1] = value

    def call():
        pcfast.pc_loss(model, x, y, method=method, backend=backend, check=check)
        pcfast.synchronize()

    error = diverged(call)
    assert (error.iteration, error.layer) == (0, layer)
    assert f"layer {layer}" in str(error)
    assert "parameters" in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_pass_that_overflows_and_is_squashed_again(method, backend):
    """vhat_1 is infinite although everything above it is finite."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.fill_(1e38)
    x = torch.full((2, 2), 1e38)
    error = diverged(lambda: pcfast.pc_loss(model, x, torch.zeros(2).long(), method=method, backend=backend))
    assert (error.iteration, error.layer) == (0, 1)


def assert_loss_is_blamed(call):
    """At once or deferred, the error names the loss."""
    with pytest.raises(pcfast.NonFiniteError) as caught:
        call()
        pcfast.synchronize()
    assert caught.value.argument == "loss"


@pytest.mark.parametrize("check", ["sync", "deferred"])
@pytest.mark.parametrize(("method", "num_steps"), [("exact", 0), ("fixed_prediction", 3), ("strict", 0)])
@pytest.mark.parametrize("call", ["relax", "pc_loss"])
def test_a_loss_whose_gradient_is_not_finite(call, method, num_steps, check, backend):
    model, x, y = net(PLAIN, nn.Tanh)

    def loss(output, y):
        return (output * 0).abs().sqrt().sum() + output.sum()  # infinity times zero

    assert_loss_is_blamed(
        lambda: getattr(pcfast, call)(
            model, x, y, loss=loss, method=method, num_steps=num_steps, backend=backend, check=check
        )
    )


@pytest.mark.parametrize("check", ["sync", "deferred"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_overflows(method, check, backend):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    y = torch.full((2, 2), 1e30)

    x, settings = torch.zeros(2, 2), {"method": method, "backend": backend, "check": check}
    assert_loss_is_blamed(lambda: pcfast.pc_loss(model, x, y, loss="mse", **settings))


@pytest.mark.parametrize("check", ["sync", "deferred"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e30, 3e38])
def test_very_large_finite_values_raise_nothing(scale, method, check, backend):
    """The sum over a batch overflows, no value does. (Nor any update: layer 2's would, and is not asked for.)"""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False).requires_grad_(False))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[1].weight.zero_()
    x = torch.full((64, 2), scale)
    y = torch.arange(64) % 2
    loss = pcfast.pc_loss(model, x, y, method=method, check=check, backend=backend)
    loss.backward()
    pcfast.synchronize()
    assert float(loss.detach()) == pytest.approx(0.6931472)
    pcfast.relax(model, x, y, method=method, check=check, backend=backend)
    pcfast.synchronize()


# check ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_check_off_raises_nothing(method, backend):
    model, x, y = net(PLAIN, nn.ReLU)
    settings = {"method": method, "step_size": 5.0, "num_steps": 600, "check": "off", "backend": backend}
    pcfast.relax(model, x, y, **settings)
    x[0, 0] = float("nan")
    loss = pcfast.pc_loss(model, x, y, **settings)
    loss.backward()
    assert not bool(torch.isfinite(model[0][0].weight.grad).all())
    pcfast.synchronize()


def bad_steps():
    """name -> (model, x, y, settings, what is reported)."""
    model, x, y = net(PLAIN, nn.ReLU)
    nan = x.clone()
    nan[1, 2] = float("nan")
    wrong = y.clone()
    wrong[0] = 17
    return {
        "diverged": (model, x, y, {"step_size": 5.0, "num_steps": 100}, pcfast.RelaxationDiverged),
        "nan": (model, nan, y, {}, pcfast.NonFiniteError),
        "labels": (model, x, wrong, {}, pcfast.ArgumentError),
    }


@pytest.mark.parametrize(
    ("name", "method"),
    [("diverged", "strict"), *((name, method) for name in ("nan", "labels") for method in METHODS)],
)
@pytest.mark.parametrize("reporter", ["pc_loss", "relax", "PCInfer", "synchronize", "no_grad"])
def test_deferred_reports_once_and_later(name, method, reporter):
    model, x, y, settings, kind = bad_steps()[name]
    _, good_x, good_y = net(PLAIN)
    loss = pcfast.pc_loss(model, x, y, method=method, check="deferred", backend="eager", **settings)
    loss.backward()
    for p in model.parameters():
        assert bool((p.grad == 0).all())

    def report():
        if reporter == "synchronize":
            pcfast.synchronize()
        elif reporter == "PCInfer":
            pcfast.PCInfer(model, LOSS, good_x, good_y, "Exact")
        elif reporter == "no_grad":
            with torch.no_grad():
                pcfast.pc_loss(model, good_x, good_y)
        else:
            getattr(pcfast, reporter)(model, good_x, good_y)

    with pytest.raises(kind) as caught:
        report()
    assert type(caught.value) is kind
    if name == "diverged":
        now = diverged(lambda: pcfast.pc_loss(model, x, y, method=method, backend="eager", **settings))
        assert caught.value.args == now.args
    else:
        assert caught.value.argument.lower() == ("x" if name == "nan" else "y")
    report()  # once and only once


def test_deferred_work_that_went_well_reports_nothing():
    model, x, y = net(PLAIN)
    pcfast.pc_loss(model, x, y, check="deferred").backward()
    deferred = [p.grad.clone() for p in model.parameters()]
    pcfast.synchronize()
    model.zero_grad()
    pcfast.pc_loss(model, x, y, check="sync").backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), deferred, strict=True))


def test_only_the_first_failure_is_reported():
    for iteration, layer in ((3, 2), (5, 1)):
        builder = status.StatusBuilder()
        builder.observe(iteration, {layer: torch.tensor([math.inf])})
        status.defer(builder.build(None, [(layer, torch.ones(1))]), 0.5)
    error = diverged(pcfast.synchronize)
    assert (error.iteration, error.layer, error.step_size) == (3, 2, 0.5)
    pcfast.synchronize()


@pytest.mark.parametrize(
    "error",
    [
        pcfast.RelaxationDiverged(3, 2, 0.5),
        pcfast.RelaxationDiverged(0, 1, 0.1, "detail"),
        pcfast.RelaxationDiverged(None, 4, 0.1),
        pcfast.ArgumentError("x", "this", "that", "Do something."),
        pcfast.ArgumentTypeError("x", "this", "that"),
        pcfast.ModelError("model", "this", "that"),
        pcfast.ShapeError("x", "this", "that"),
        pcfast.NonFiniteError("x", "this", "that"),
        pcfast.BackendError("why"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_pickle(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert isinstance(error, pcfast.PcfastError)
