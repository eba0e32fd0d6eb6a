"""What x and the model may be made of: tokens, complex numbers, and kinds of tensors that are refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcfast

BACKENDS = ["eager", "reference"]
TOKENS, Y = torch.randint(0, 10, (8, 4), generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Pixels(nn.Module):
    def forward(self, a):
        return a.double() / 255


FIRST = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 6), nn.Flatten()), TOKENS),
    "reshaped": (lambda: nn.Sequential(nn.Flatten(), nn.Embedding(10, 2), nn.Flatten()), TOKENS),
    "bag": (lambda: nn.EmbeddingBag(10, 6), TOKENS),
    "one token": (lambda: nn.Embedding(10, 6), TOKENS[:, 0]),
    "sparse": (lambda: nn.Sequential(nn.Embedding(10, 6, sparse=True), nn.Flatten()), TOKENS),
    "pixels": (lambda: nn.Sequential(Pixels(), nn.Linear(4, 6)), TOKENS.to(torch.uint8)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ["auto", "deferred"])
@pytest.mark.parametrize("first", FIRST)
def test_layer_1_takes_integers(first, check, backend):
    make, x = FIRST[first]
    torch.manual_seed(0)
    first = make().double()
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(first(x).shape[1], 3).double())
    want = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
    pcfast.pc_loss(model, x, Y, method="exact", check=check, backend=backend).backward()
    for p, gradient in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), gradient.to_dense())
    for method in ("fixed_prediction", "strict", "error_based", "zero_divergence"):
        result = pcfast.relax(model, x, Y, method=method, check=check, backend=backend)
        assert torch.equal(result.beliefs[0], x)
        assert result.errors[0] is None
        assert all(e.isfinite().all() for e in result.errors[1:])


class Moves(nn.Module):
    def forward(self, a):
        return a.flatten(0, 1)


class Rounds(nn.Module):
    def forward(self, a):
        return a.long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        (nn.Linear(4, 3), pcfast.ArgumentError, "nn.Embedding"),
        (
            nn.Sequential(nn.Embedding(10, 3), nn.Flatten(0, 1)),
            pcfast.ShapeError,
            "rows|batch dimension",
        ),
        (nn.Sequential(nn.Embedding(10, 3), Moves()), pcfast.ShapeError, "rows"),
        (Rounds(), pcfast.ModelError, "int64"),
    ],
)
def test_integers_that_are_refused(model, kind, words, backend):
    y = torch.zeros(32, dtype=torch.long) if "rows" in words else Y
    with pytest.raises(kind, match=words):
        pcfast.pc_loss(nn.Sequential(model, nn.Linear(3, 3)), TOKENS, y, backend=backend)


class Spectrum(nn.Module):
    """Real in, real out, by a complex parameter or a complex buffer."""

    def __init__(self, trained):
        super().__init__()
        turns = torch.polar(torch.ones(4), torch.arange(4.0))
        if trained:
            self.turns = nn.Parameter(turns)
        else:
            self.register_buffer("turns", turns)

    def forward(self, a):
        return torch.fft.irfft(torch.fft.rfft(a) * self.turns, n=6)


@pytest.mark.parametrize("trained", [True, False])
def test_complex_parts_of_a_real_network(trained):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), Spectrum(trained), nn.Linear(6, 3)), torch.randn(8, 5)
    want = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
    pcfast.pc_loss(model, x, Y, method="exact").backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(want))
    assert pcfast.last_run().plan.backend == ("reference" if trained else "eager")
    model[0].double()
    with pytest.raises(pcfast.ModelError, match="imaginary") as caught:
        pcfast.pc_loss(model, x, Y)
    assert "Call model.to(" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_energies_are_real():
    """0.5 |eps|^2, which never rises here, and which the early exit reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(torch.complex128)
    x, y = torch.randn(6, 4, dtype=torch.complex128), torch.randn(6, 3, dtype=torch.complex128)
    settings = dict(loss=lambda out, t: (out - t).abs().square().sum(), step_size=0.02, num_steps=80)
    result = pcfast.relax(model, x, y, energies=True, **settings)
    torch.testing.assert_close(result.energies[-1, 0], 0.5 * result.errors[1].abs().square().sum())
    assert bool((result.energies.sum(1).diff() <= 0).all())
    assert 2 <= int(pcfast.relax(model, x, y, tolerance=1e-2, **settings).iterations) < 80
    for loss in ("mse", "cross_entropy", lambda out, t: out.sum()):
        with pytest.raises(pcfast.ArgumentError, match="complex"):
            pcfast.relax(model, x, y if loss == "mse" else torch.zeros(6, dtype=torch.long), loss=loss)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Complex modules")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, x: (m, torch.nested.nested_tensor([x[:3], x[3:]])), "nested"),
        (lambda m, x: (m, x.to_sparse()), "layout"),
        (lambda m, x: (m.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn)), "float8"),
        (lambda m, x: (m.to(torch.float8_e4m3fn), x), "float8"),
        (lambda m, x: (m.to("meta"), x.to("meta")), "meta"),
        (lambda m, x: (m, x.to(torch.complex64)), "view_as_real"),
        (lambda m, x: (m.to(torch.complex64), x), r"x\.to\(torch\.complex64\)"),
    ],
)
def test_kinds_of_tensors_that_are_refused(change, words):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 7), nn.Tanh()), nn.Linear(7, 3))
    model, x = change(model, torch.randn(8, 6))
    with pytest.raises(pcfast.PcfastError, match=words):
        pcfast.pc_loss(model, x, Y.to(x.device))
