"""Deviations of modules that pcfast does not know keep their digits in float32 and bfloat16."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pcfast
from pcfast.deviation import differences, opaque

TOKENS, WIDTH, CLASSES = 12, 16, 7


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, a):
        return self.attend(a, a, a, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, a):
        return self.cell(a)[0]


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 8), nn.GELU(), nn.Linear(8, TOKENS))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, a):
        a = a + self.tokens(self.norms[0](a).mT).mT
        return a + self.channels(self.norms[1](a))


class Narrowing(nn.Module):
    """Asks for dtypes and casts, as code for mixed precision does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, a):
        out = torch.zeros(a.shape, dtype=self.scale.dtype)
        out += F.silu(a.type_as(self.scale)) * self.scale
        return out


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, a):
        return checkpoint(self.f, a, use_reentrant=False)


MODULES = {
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True),
    "attention": Attention,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "mixer": Mixer,
    "narrowing": Narrowing,
    "checkpointed": Checkpointed,
    "batch norm": lambda: nn.Sequential(
        nn.Unflatten(1, (TOKENS, 1, 1)), nn.BatchNorm3d(TOKENS), nn.Flatten(1, 3)
    ),
}


def loss(output, y):
    return F.cross_entropy(output.flatten(0, 1), y)


def problem(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, WIDTH), MODULES[name](), MODULES[name](), nn.Linear(WIDTH, CLASSES))
    return model, torch.randn(32, TOKENS, 5), torch.randint(0, CLASSES, (32 * TOKENS,))


def worst(name, **settings):
    """The largest relative error of an eps_l and an update against float64."""
    model, x, y = problem(name)
    settings = {"loss": loss, "step_size": 0.02, "num_steps": 8, **settings}
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", enabled=False):
        truth = pcfast.relax(exact, x.double(), y, **settings)
        pcfast.pc_loss(exact, x.double(), y, **settings).backward()
    result = pcfast.relax(model, x, y, **settings)
    pcfast.pc_loss(model, x, y, **settings).backward()
    pairs = list(zip(result.errors[1:], truth.errors[1:], strict=True))
    largest = max(p.grad.norm() for p in exact.parameters())
    pairs += [
        (p.grad, q.grad)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True)
        if q.grad.norm() > 1e-3 * largest  # others cancel to rounding
    ]
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.fixture(params=["float64", "tangents"])
def way(request, monkeypatch):
    """Every module runs in this way, or fails."""
    narrow = torch.float32, torch.bfloat16
    monkeypatch.setattr(
        differences, "ways", lambda device, dtype: (request.param if dtype in narrow else "plain",)
    )
    return request.param


@pytest.mark.parametrize("name", MODULES)
def test_float32_keeps_its_digits(name, way):
    # what a checkpoint computes again is not widened
    assert worst(name) < 2e-5 or (name, way) == ("checkpointed", "float64")


@pytest.mark.parametrize("method", ["strict", "error_based"])
@pytest.mark.parametrize("name", ["attention", "mixer"])
def test_bfloat16_is_useful(name, method, way):
    with torch.autocast("cpu", torch.bfloat16):
        assert worst(name, method=method) < 0.05


@pytest.mark.parametrize("name", ["attention", "checkpointed"])
def test_the_switch_and_what_is_chosen(name):
    assert worst(name) < 2e-5
    try:
        pcfast.use_precise_deviations(False)
        assert worst(name) > 1e-3
    finally:
        pcfast.use_precise_deviations(True)


class OnlyFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        if a.dtype != torch.float32:
            raise TypeError("a kernel for float32")
        return 2 * a

    @staticmethod
    def backward(ctx, e):
        return 2 * e


class Kernel(nn.Module):
    def forward(self, a):
        return OnlyFloat32.apply(a)


def test_a_module_without_digits_is_named_once(caplog):
    model = nn.Sequential(nn.Linear(5, 6), Kernel(), nn.Linear(6, 3))
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    with caplog.at_level(logging.WARNING, logger="pcfast"):
        for _ in range(2):
            pcfast.pc_loss(model, x, y).backward()
    (record,) = caplog.records
    assert "Kernel" in record.message and "a kernel for float32" in record.message
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert {way for (way, *_), why in opaque._trials[model[1]].items() if not why} == {"plain"}


def test_moving_parameters_are_cast_anew():
    """incremental_step moves as in float64: with the parameters of the moment, in every iteration."""
    model, x, y = problem("mixer")
    exact = copy.deepcopy(model).double()
    start = [p.detach().clone() for p in exact.parameters()]
    for m, inputs in ((model, x), (exact, x.double())):
        pcfast.incremental_step(m, inputs, y, torch.optim.SGD(m.parameters(), lr=1.0), loss=loss, num_steps=5)
    for p, q, before in zip(model.parameters(), exact.parameters(), start, strict=True):
        p, q = p.detach(), q.detach()
        assert float((p.double() - q).norm()) < 1e-3 * float((q - before).norm())
