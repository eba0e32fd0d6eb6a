"""Brackets and derivatives of activations against float64, where the plain difference would be noise."""

import copy
import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plans import planned
from torch import nn

import pcfast
from pcfast.backends import BACKENDS
from pcfast.backends.cuda import backend as cuda
from pcfast.backends.triton import backend as triton
from pcfast.deviation import layer_chain
from pcfast.deviation.pointwise import ElementwiseStep
from pcfast.model import activations
from pcfast.model.describe import describe
from pcfast.model.spec import Elementwise
from pcfast.precision import Precision

ALL = [
    activations.Relu(),
    activations.LeakyRelu(0.2),
    activations.LeakyRelu(-0.1),
    activations.Hardtanh(),
    activations.Hardtanh(0.0, 6.0),
    activations.Hardtanh(-5.0, -0.25),
    activations.Tanh(),
    activations.Sigmoid(),
    activations.Silu(),
    activations.Gelu(),
    activations.GeluTanh(),
]
IDS = [type(a).__name__ + "_".join(str(value) for value in astuple(a)) for a in ALL]
LITERAL = {
    "Relu": lambda u, a: u.clamp(min=0),
    "LeakyRelu": lambda u, a: torch.where(u > 0, u, a.negative_slope * u),
    "Hardtanh": lambda u, a: u.clamp(a.min_val, a.max_val),
    "Tanh": lambda u, a: torch.tanh(u),
    "Sigmoid": lambda u, a: 1 / (1 + torch.exp(-u)),
    "Silu": lambda u, a: u / (1 + torch.exp(-u)),
    "Gelu": lambda u, a: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))),
    "GeluTanh": lambda u, a: 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u))),
}


def assert_close(result, truth):
    """In float64, of numbers of order one."""
    torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)


def literal(activation, u):
    return LITERAL[type(activation).__name__](u, activation)


def points(scale, dtype=torch.float64):
    u = torch.randn(4000, dtype=torch.float64) * 2
    s = torch.randn(4000, dtype=torch.float64) * scale
    return u.to(dtype), s.to(dtype)


def evaluate(activation, u, s):
    """(act_diff, derivative as a factor) at u + s."""
    act_diff, kept = activation.deviate(activation.saved(u, activation.forward(u)), s)
    return act_diff, activation.pullback(kept, torch.ones_like(s))


@pytest.mark.parametrize("activation", ALL, ids=IDS)
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.3, 3.0, 40.0])
def test_bracket_and_slope_in_float64(activation, scale):
    u, s = points(scale)
    act_diff, derivative = evaluate(activation, u, s)
    w = (u + s).requires_grad_()
    value = literal(activation, w)
    (by_autograd,) = torch.autograd.grad(value.sum(), w)
    plain = value.detach() - literal(activation, u)
    rounding = 2.0**-52 * 16 * (1 + u.abs() + s.abs())  # of the plain difference
    assert ((act_diff - plain).abs() <= rounding + 1e-12 * s.abs()).all()
    torch.testing.assert_close(derivative, by_autograd, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("activation", ALL, ids=IDS)
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-2])
def test_small_deviations_keep_their_digits_in_float32(activation, scale):
    u, s = points(scale, torch.float32)
    for kink in (0.0, *(astuple(activation) if isinstance(activation, activations.Hardtanh) else ())):
        # no unit there, where the two precisions rightly part
        u = torch.where((u - kink).abs() < 10 * scale, u + 100 * scale, u)
    act_diff, _ = evaluate(activation, u, s)
    truth = literal(activation, u.double() + s.double()) - literal(activation, u.double())
    plain = activation.forward(u + s) - activation.forward(u)
    error = float((act_diff - truth).norm() / truth.norm())
    assert error < 1e-6
    if scale <= 1e-5:  # the difference that it replaces fails the same bound
        assert float((plain - truth).norm() / truth.norm()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_keeps_its_digits_where_one_formula_takes_over_from_the_other(dtype):
    activation = activations.Gelu()
    reach, within = activation._reach(dtype)
    u = torch.linspace(-6, 6, 2001, dtype=dtype)
    for size in (0.5 * reach, 0.9 * reach, within, reach, 1.1 * reach):
        for s in (torch.full_like(u, size), torch.full_like(u, -size)):
            act_diff, _ = evaluate(activation, u, s)
            # u Phi(u) by its mean derivative, from Gauss's points: no difference of values
            nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(12))
            w = (u.double() + s.double() * (0.5 + 0.5 * nodes[:, None])).requires_grad_()
            (derivatives,) = torch.autograd.grad(F.gelu(w).sum(), w)
            truth = s.double() * (0.5 * weights[:, None] * derivatives).sum(0)
            assert float((act_diff - truth).norm() / truth.norm()) < 3 * torch.finfo(dtype).eps / reach


@pytest.mark.parametrize("scale", [1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_element_of_gelu_depends_on_the_others(dtype, scale):
    """On CPUs a pass is left out where no deviation is large: not a bit may tell."""
    activation = activations.Gelu()
    u, s = points(scale, dtype)
    far = torch.cat([s, torch.full((1,), 3.0, dtype=dtype)]), torch.cat([u, u[:1]])
    alone, among = evaluate(activation, u, s)[0], evaluate(activation, far[1], far[0])[0]
    assert torch.equal(alone, among[:-1])


@pytest.mark.parametrize("activation", ALL, ids=IDS)
def test_extremes_stay_finite_and_right(activation):
    u = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 80.0], dtype=torch.float32)
    s = torch.tensor([-160.0, -1e-30, 0.0, 1e-30, 160.0], dtype=torch.float32)
    u, s = (t.reshape(-1).contiguous() for t in torch.meshgrid(u, s, indexing="ij"))
    act_diff, derivative = evaluate(activation, u, s)
    truth = literal(activation, u.double() + s.double()) - literal(activation, u.double())
    assert torch.isfinite(act_diff).all() and torch.isfinite(derivative).all()
    torch.testing.assert_close(act_diff.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ALL, ids=IDS)
def test_forward_is_torchs_and_base_slope_its_derivative(activation):
    u = points(1.0)[0].requires_grad_()
    out = activation.forward(u)
    torch.testing.assert_close(out, literal(activation, u))
    (by_autograd,) = torch.autograd.grad(out.sum(), u)
    u = u.detach()
    derivative = activation.pullback(activation.derivative(u, activation.forward(u)), torch.ones_like(u))
    torch.testing.assert_close(derivative, by_autograd, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("activation", ALL, ids=IDS)
def test_a_point_that_a_kernel_has_found_needs_no_anchor(activation, monkeypatch):
    u, d = points(0.3)
    spec, state = Elementwise("0", "act", activation), Precision(torch.float64, torch.float64)
    looped, fresh = (ElementwiseStep(spec, nn.Identity(), state) for _ in range(2))
    for step in (looped, fresh):
        step.forward(u)
    looped.deviate(torch.zeros_like(d))
    looped.at(d)
    with monkeypatch.context() as patched:
        patched.setattr(type(activation), "deviate", None)
        fresh.at(d)
    e = torch.randn_like(u)
    torch.testing.assert_close(fresh.pullback(e), looped.pullback(e), rtol=1e-13, atol=1e-15)


BRANCH = (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(), nn.AvgPool2d(2), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU()),
        nn.Sequential(pcfast.Residual(nn.Sequential(*BRANCH)), nn.ReLU(), nn.Tanh(), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), pcfast.Residual(nn.ReLU(), nn.Conv2d(4, 4, 1)), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 1), pcfast.Residual(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), nn.ReLU()),
        nn.Sequential(
            pcfast.Residual(nn.Sequential(*BRANCH, nn.Identity(), nn.Dropout(0.5))), nn.BatchNorm2d(4)
        ),
    ],
    ids=[
        "pooled",
        "frozen",
        "activation first",
        "normalised first",
        "residual",
        "activation in front",
        "normalised in front",
        "dropout",
    ],
)
def test_what_takes_a_deviations_place_is_read_by_nobody_else(layer):
    """Chains, which hand memory on, against autograd on the modules; the argument stays as it is."""
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer).double(), torch.randn(6, 4, 8, 8, dtype=torch.float64)
    model = nn.Sequential(layer)
    chain = layer_chain(describe(model).layers[0], model, Precision(torch.float64, torch.float64))

    def by_autograd(x, e):
        torch.manual_seed(1)  # one mask
        x = x.requires_grad_()
        out = layer(x)
        e = torch.ones_like(out) if e is None else e
        return out.detach(), torch.autograd.grad(out, [x, *layer.parameters()], e)

    base, _ = by_autograd(x.clone(), None)
    with torch.no_grad():
        torch.manual_seed(1)
        assert_close(chain.forward(x), base)
        for _ in range(3):
            d, e = torch.randn_like(x), torch.randn_like(base)
            given = d.clone()
            moved = chain.deviate(given)
            with torch.enable_grad():
                out, (below, *gradients) = by_autograd(x + d, e)
            assert torch.equal(given, d)
            assert_close(moved, out - base)
            assert_close(chain.pullback(e), below)
            result = dict(chain.gradients(e))
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                assert_close(result[parameter], gradient)


@pytest.mark.parametrize("activation", ALL, ids=IDS)
def test_nan_spreads(activation):
    nan = torch.tensor([math.nan])
    one = torch.ones(1)
    assert evaluate(activation, one, nan)[0].isnan().all()
    assert evaluate(activation, nan, one)[0].isnan().all()


@pytest.mark.parametrize("activation", ALL, ids=IDS)
def test_monotone_says_the_truth(activation):
    u = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    steps = literal(activation, u).diff()
    assert bool((steps >= 0).all()) == activation.monotone


# ----------------------------------------------------------------------------------------------------- Hardtanh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hardtanh_on_its_bounds_is_torchs(dtype):
    """No derivative on the bounds, and none that is lost: from every place to every place, bounds among them."""
    activation = activations.Hardtanh(-1.0, 2.0)
    places = torch.tensor([-math.inf, -3.0, -1.0, -0.5, 0.0, 1.5, 2.0, 7.0, math.inf], dtype=dtype)
    u, moved = (t.reshape(-1) for t in torch.meshgrid(places[1:-1], places[1:-1], indexing="ij"))
    act_diff, kept = activation.deviate(activation.saved(u, activation.forward(u)), moved - u)
    assert torch.equal(act_diff, F.hardtanh(moved, -1, 2) - F.hardtanh(u, -1, 2))
    e = torch.full_like(u, 3.0)
    e[::5] = math.inf  # what does not pass leaves nothing, not even NaN
    at = moved.clone().requires_grad_()
    (truth,) = torch.autograd.grad(F.hardtanh(at, -1, 2), at, e)
    assert torch.equal(activation.pullback(kept, e), truth)
    open_ = (moved > -1) & (moved < 2)
    assert torch.equal(truth, torch.where(open_, e, 0))
    assert torch.equal(activation.pullback(activation.derivative(moved, None), e), truth)
    # from infinity it stays there, or comes back as far as s says
    far = places[[0, -1]]
    assert not activation.deviate(activation.saved(far, activation.forward(far)), torch.ones_like(far))[
        0
    ].any()


def hardtanh_network(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 9), nn.Sequential(nn.Linear(9, 9), activation), nn.Linear(9, 3))


def test_which_modules_are_hardtanh():
    for module, expected in (
        (nn.Hardtanh(), activations.Hardtanh(-1.0, 1.0)),
        (nn.Hardtanh(-2, 0.5), activations.Hardtanh(-2, 0.5)),
        (nn.ReLU6(), activations.Hardtanh(0.0, 6.0)),
    ):
        (op,) = describe(nn.Sequential(module)).layers[0].ops
        assert op.activation == expected and op.name == type(module).__name__


@pytest.mark.parametrize("activation", [nn.Hardtanh(-0.5, 2), nn.ReLU6()], ids=["Hardtanh", "ReLU6"])
@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
def test_kernels_refuse_hardtanh(method, activation, monkeypatch):
    for module in (triton, cuda):
        monkeypatch.setattr(module, "_unavailable", lambda *_: "")
        monkeypatch.setattr(BACKENDS[module.__name__.split(".")[2]], "automatic", lambda *_: (True, ""))
    model = hardtanh_network(activation)
    kind = type(activation).__name__
    reason = f"layer 2 (Linear - {kind}): no kernel has {kind}: use eager"
    request = planned(model, (5, 8), method=method)
    for name in ("triton", "cuda"):
        assert BACKENDS[name].supports(request) == (False, reason)
        with pytest.raises(pcfast.BackendError, match=f"no kernel has {kind}"):
            pcfast.pc_loss(model, torch.randn(5, 8), torch.randint(0, 3, (5,)), backend=name, method=method)
    plan = pcfast.explain(model, (5, 8), method=method).plan
    assert plan.backend == "eager" and dict(plan.refusals)["cuda"] == reason
