"""zero_divergence (Z-IL) gives backpropagation's updates, whatever the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from networks_for_tests import LOSSES, architectures, loss_and_target
from torch import nn

import pcfast
from pcfast.checking.bounds import ULP, allowed_update_errors, relative_error

BACKENDS = ["reference", "eager"]


def updates(model, x, y, **arguments):
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, method="zero_divergence", **arguments).backward()
    return {p: p.grad.clone() for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    architecture=architectures(),
    loss_name=st.sampled_from(LOSSES),
    batch=st.sampled_from((1, 2, 5, 17)),
    seed=st.integers(0, 10**6),
)
@examples(40)
def test_it_is_backpropagation(backend, architecture, loss_name, batch, seed):
    model, shape = architecture
    torch.manual_seed(seed)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, batch, model[-1].out_features)
    result = updates(model, x, y, loss=loss, backend=backend)
    truth = dict(
        zip(model.parameters(), torch.autograd.grad(loss(model(x), y), list(model.parameters())), strict=True)
    )
    states = pcfast.relax(model, x, y, loss=loss, method="exact", backend="reference")
    bounds = allowed_update_errors(model, states.beliefs, states.errors, truth, len(model))
    for p, update in result.items():
        # eager forms no difference of beliefs: as near as two orders of summation
        tight = 1e-13 * max(float(truth[p].norm()), 1e-3)
        assert float((update - truth[p]).norm()) <= (tight if backend == "eager" else bounds[p])


class Branch(nn.Module):
    """A module that pcfast does not know."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, v):
        return v + torch.sin(self.inner(v))


NETS = {
    "batchnorm": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.BatchNorm1d(8), nn.Linear(8, 4)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4)), nn.Dropout(0.2), nn.Linear(8, 4)
    ),
    "opaque": lambda: nn.Sequential(nn.Linear(6, 8), Branch(8), nn.LayerNorm(8), nn.Linear(8, 4)),
    "one layer": lambda: nn.Sequential(nn.Linear(6, 4)),
    "deep": lambda: nn.Sequential(
        nn.Linear(6, 8), *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(9)), nn.Linear(8, 4)
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_any_module(name, backend):
    torch.manual_seed(0)
    model = NETS[name]().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 4, (7,))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)  # of the masks
    result = updates(model, x, y, backend=backend)
    moved = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    torch.manual_seed(5)
    parameters = list(model.parameters())
    truth = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    scale = max(float(t.norm()) for t in truth)
    for p, t in zip(parameters, truth, strict=True):
        # belief differences carry 2^-53 of a belief (norm < 30) through at most ten layers
        assert float((result[p] - t).norm()) <= 1e-10 * scale + 64 * ULP * 30
    for key, value in model.state_dict().items():
        torch.testing.assert_close(moved[key], value, rtol=4 * ULP, atol=ULP)  # statistics moved once, too


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_relax_gives_and_what_the_method_fixes(backend):
    """Errors g_l, beliefs vhat_l - g_l, as they are at t = L - l; step size and iterations are the method's own."""
    model, x, y = NETS["deep"]().double(), torch.randn(7, 6).double(), torch.randint(0, 4, (7,))
    result = pcfast.relax(model, x, y, method="zero_divergence", backend=backend, step_size=0.3, num_steps=2)
    truth = pcfast.relax(model, x, y, method="exact")
    assert (result.run.plan.method, result.run.plan.num_steps) == ("zero_divergence", len(model))
    assert pcfast.explain(model, x.shape, method="zero_divergence").plan.num_steps == len(model)
    for l in range(1, len(model) + 1):
        v = truth.beliefs[l] if l < len(model) else truth.activations[l]
        assert float((result.errors[l] - truth.errors[l]).norm()) <= 64 * ULP * float(v.norm())
        assert relative_error(result.beliefs[l], v) <= 64 * ULP
    assert torch.equal(result.beliefs[0], x)


def test_a_later_reading_is_not_backpropagation():
    """Strict with step size 1, all layers read after the L-th iteration: what the schedule is there for."""
    model, x, y = NETS["deep"]().double(), torch.randn(7, 6).double(), torch.randint(0, 4, (7,))
    model = model[-4:]
    x = torch.randn(7, 8, dtype=torch.float64)
    loss = nn.CrossEntropyLoss(reduction="sum")
    result = updates(model, x, y, loss=loss)
    model.zero_grad()
    pcfast.pc_loss(model, x, y, loss=loss, step_size=1.0, num_steps=len(model)).backward()
    last = model[-1].weight
    assert relative_error(last.grad, result[last]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_energies_and_given_beliefs_are_refused(backend):
    model, x, y = NETS["deep"]().double(), torch.randn(7, 6).double(), torch.randint(0, 4, (7,))
    settings = dict(method="zero_divergence", backend=backend)
    with pytest.raises(pcfast.ArgumentError, match=r"^energies: .*another iteration.*step_size=1"):
        pcfast.relax(model, x, y, energies=True, **settings)
    with pytest.raises(pcfast.ArgumentError, match=r"^vinit: got beliefs with method 'zero_divergence'"):
        pcfast.relax(model, x, y, vinit=[None] * (len(model) + 1), **settings)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernel_backends_run_it_as_exact(name, monkeypatch):
    """As on a machine where the kernels could run."""
    from pcfast.backends.cuda import backend as cuda
    from pcfast.backends.triton import backend as triton

    monkeypatch.setattr(cuda, "_unavailable", lambda device: "")
    monkeypatch.setattr(triton, "_unavailable", lambda kind, index: "")
    model, x, y = NETS["deep"](), torch.randn(7, 6), torch.randint(0, 4, (7,))
    result = pcfast.relax(model, x, y, method="zero_divergence", backend=name)
    truth = pcfast.relax(model, x, y, method="exact", backend=name)
    assert result.run.plan.backend == name
    assert all(torch.equal(e, t) for e, t in zip(result.errors[1:], truth.errors[1:], strict=True))
