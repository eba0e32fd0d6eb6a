"""Early exit of strict relaxation against hand-written loops of exactly that many iterations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import amplifies_rounding, assert_states_agree
from drawing import examples
from energy import relax_by_optimizer
from hypothesis import assume, given
from hypothesis import strategies as st
from literal import relax_literally
from networks_for_tests import LOSSES, architectures, loss_and_target
from plans import planned
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pcfast
from pcfast.backends import BACKENDS as KNOWN
from pcfast.backends.cuda import backend as cuda
from pcfast.backends.triton import backend as triton
from pcfast.problem.settings import Settings
from pcfast.relaxation import cuda_graphs
from pcfast.relaxation.solve import prepare
from pcfast.support import host

STEPS = 60


@pytest.fixture(params=["reference", "eager", "eager without leaving the loop"])
def backend(request, monkeypatch):
    """The last is what runs on CUDA, where the host cannot know without waiting."""
    if request.param.endswith("loop"):
        monkeypatch.setattr(host, "readable", lambda device: False)
    return request.param.split()[0]


def mlp() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 9), nn.ReLU()),
        nn.Sequential(nn.Linear(9, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, 3),
    ).double()


def cnn() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten()),
        nn.Linear(4, 3),
    ).double()


def batch(*sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = 2 * torch.randn(5, *sample, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (5,), generator=generator)


def total(output, y):
    """A sum loss: its errors are large enough for masks and arg-maxima to change on the way."""
    return F.cross_entropy(output, y, reduction="sum")


def last_iteration(energies: list[list[float]], depth: int, tolerance: float) -> int:
    """By the rule, from the energies of a loop that runs to its end."""
    sums = [sum(row) for row in energies]
    for t in range(max(2, depth), len(sums) + 1):
        if abs(sums[t - 1] - sums[t - 2]) <= tolerance * abs(sums[t - 2]):
            return t
    return len(sums)


def updates(model, x, y, **settings) -> dict[str, torch.Tensor]:
    model.zero_grad()
    pcfast.pc_loss(model, x, y, **settings).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_it_is_the_literal_loop_with_that_many_iterations(make, tolerance, backend):
    model, (x, y) = make(), batch(*((6,) if make is mlp else (1, 5, 5)))
    settings = {"step_size": 0.1, "loss": total}
    literally = {"loss": total, "method": "strict", "step_size": 0.1}
    whole = relax_literally(model, x, y, num_steps=STEPS, **literally)
    expected = last_iteration(whole.energies, len(model), tolerance)
    result = pcfast.relax(
        model, x, y, num_steps=STEPS, tolerance=tolerance, backend=backend, energies=True, **settings
    )
    assert result.run.plan.backend == backend and not result.run.plan.gram
    assert result.iterations.shape == () and result.iterations.dtype == torch.int64
    assert int(result.iterations) == expected
    if tolerance == 0.3:  # at rest at once by that measure
        assert expected == len(model)
    if tolerance == 1e-3:
        assert len(model) < expected < STEPS
    truth = relax_literally(model, x, y, num_steps=expected, **literally)
    for l in range(1, len(model) + 1):
        torch.testing.assert_close(result.errors[l], truth.errors[l], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.beliefs[l], truth.beliefs[l], rtol=1e-9, atol=1e-12)
    rows = truth.energies + truth.energies[-1:] * (STEPS - expected)
    torch.testing.assert_close(
        result.energies, torch.tensor(rows, dtype=torch.float64), rtol=1e-10, atol=1e-14
    )
    gradients = updates(model, x, y, num_steps=STEPS, tolerance=tolerance, backend=backend, **settings)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth.gradients[name], rtol=1e-9, atol=1e-12)


@examples(60)
@given(
    architecture=architectures(),
    loss_name=st.sampled_from(LOSSES),
    tolerance=st.sampled_from((1e-2, 1e-3, 1e-4)),
    step_size=st.sampled_from((0.05, 0.1, 0.3)),
    leaves=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_eager_equals_reference(architecture, loss_name, tolerance, step_size, leaves, seed):
    model, shape = architecture
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(5, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, 5, model[-1].out_features)
    arguments = dict(loss=loss, step_size=step_size, num_steps=30, tolerance=tolerance)
    try:
        truth = pcfast.relax(model, x, y, backend="reference", **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)
    assume(not amplifies_rounding(model, x, y, truth, int(truth.iterations), **arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "readable", lambda device: leaves)
        result = pcfast.relax(model, x, y, backend="eager", **arguments)
    assert int(result.iterations) == int(truth.iterations)
    assert_states_agree(result, truth, int(truth.iterations))


def test_masks_are_those_of_the_last_beliefs(backend):
    """Where the last iteration changes some; with those it began from the updates are others."""
    model, (x, y) = mlp(), batch(6)

    def loss(output, target):
        return 10 * total(output, target)

    settings = {"loss": loss, "step_size": 0.1}
    result = pcfast.relax(model, x, y, num_steps=STEPS, tolerance=6e-3, backend=backend, **settings)
    k = int(result.iterations)
    before, after = (
        relax_literally(model, x, y, method="strict", num_steps=n, **settings) for n in (k - 1, k)
    )
    masks = [model[2][0](v[2]) > 0 for v in (before.beliefs, after.beliefs)]
    assert 4 < k < STEPS and not torch.equal(*masks)
    gradients = updates(model, x, y, num_steps=STEPS, tolerance=6e-3, backend=backend, **settings)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, after.gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [None, pcfast.GradientDescent(0.6), pcfast.GradientDescent(0.3, 0.01), pcfast.Adam()],
    ids=str,
)
def test_the_same_bits_as_that_many_iterations(optimizer, backend):
    """In the same form: with energies neither runs in Gram form."""
    model, (x, y) = mlp(), batch(6)
    settings = {"loss": total, "step_size": 0.05, "belief_optimizer": optimizer, "backend": backend}
    result = pcfast.relax(model, x, y, num_steps=STEPS, tolerance=4e-3, energies=True, **settings)
    k = int(result.iterations)
    assert 4 < k < STEPS
    plain = pcfast.relax(model, x, y, num_steps=k, energies=True, **settings)
    for l in range(1, 5):
        assert torch.equal(result.beliefs[l], plain.beliefs[l]) and torch.equal(
            result.errors[l], plain.errors[l]
        )
    assert torch.equal(result.energies[:k], plain.energies)
    assert torch.equal(result.energies[k:], plain.energies[-1:].expand(STEPS - k, -1))


def test_momentum_against_torch_optim(backend):
    model, (x, y) = mlp(), batch(6)
    optimizer = pcfast.GradientDescent(0.6)
    settings = {"loss": total, "step_size": 0.05, "belief_optimizer": optimizer, "backend": backend}
    result = pcfast.relax(model, x, y, num_steps=STEPS, tolerance=4e-3, **settings)
    k = int(result.iterations)
    truth = relax_by_optimizer(
        model, x, y, loss=total, step_sizes=[0.05] * k,
        make=lambda leaves: torch.optim.SGD(leaves, lr=0.05, momentum=0.6),
    )  # fmt: skip
    assert 4 < k < STEPS
    for l in range(1, 4):
        torch.testing.assert_close(result.beliefs[l], truth.beliefs[l], rtol=1e-9, atol=1e-12)
    gradients = updates(model, x, y, num_steps=STEPS, tolerance=4e-3, **settings)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth.gradients[name], rtol=1e-9, atol=1e-12)


def test_centred_nudging_ends_each_of_its_relaxations(backend):
    model, (x, y) = mlp(), batch(6)
    y = F.one_hot(y, 3).double()
    settings = {
        "loss": nn.MSELoss(reduction="sum"), "step_size": 0.1, "num_steps": STEPS, "tolerance": 1e-4,
        "backend": backend,
    }  # fmt: skip
    ends = {
        int(pcfast.relax(model, x, y, nudging=pcfast.Nudging(kind, 0.8), **settings).iterations)
        for kind in ("positive", "negative")
    }
    assert len(ends) == 2 and max(ends) < STEPS
    parts = [
        updates(model, x, y, nudging=pcfast.Nudging(kind, 0.8), **settings)
        for kind in ("positive", "negative", "centred")
    ]
    for name, centred in parts[2].items():
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(centred, mean, rtol=1e-12, atol=1e-14)


def test_edges(backend):
    model, (x, y) = mlp(), batch(6)
    settings = {"backend": backend, "tolerance": 0.0}
    assert (
        int(pcfast.relax(model, x, y, step_size=0.0, **settings).iterations) == 4
    )  # L, at rest from the start
    assert int(pcfast.relax(model, x, y, num_steps=3, **settings).iterations) == 3
    nothing = pcfast.relax(model, x, y, num_steps=0, energies=True, **settings)
    assert int(nothing.iterations) == 0 and nothing.energies.shape == (0, 4)
    single = nn.Sequential(nn.Linear(6, 3)).double()
    assert int(pcfast.relax(single, x, y, **settings).iterations) == 2
    assert pcfast.relax(model, x, y, backend=backend).iterations is None
    vinit = [None, torch.zeros(5, 9, dtype=torch.float64), None, None, None]
    result = pcfast.relax(model, x, y, vinit=vinit, num_steps=STEPS, tolerance=1e-2, backend=backend)
    k = int(result.iterations)
    plain = pcfast.relax(model, x, y, vinit=vinit, num_steps=k, backend=backend)
    assert 4 < k < STEPS and all(map(torch.equal, result.beliefs, plain.beliefs))


def test_a_relaxation_that_diverges_is_not_at_rest(backend):
    model, (x, y) = mlp(), batch(6)
    with pytest.raises(pcfast.RelaxationDiverged) as caught:
        pcfast.relax(model, x, y, step_size=50.0, num_steps=400, tolerance=1e-3, backend=backend)
    with pytest.raises(pcfast.RelaxationDiverged) as plain:
        pcfast.relax(model, x, y, step_size=50.0, num_steps=400, energies=True, backend=backend)
    assert str(caught.value) == str(plain.value)


def test_the_module_and_the_compiled_function_know_it(backend):
    model, (x, y) = mlp(), batch(6)
    settings = {
        "loss": "cross_entropy", "step_size": 0.1, "num_steps": STEPS, "tolerance": 1e-4, "backend": backend,
    }  # fmt: skip
    expected = updates(model, x, y, **settings)
    other = updates(model, x, y, **{**settings, "tolerance": None})
    assert any(not torch.allclose(expected[name], other[name], rtol=1e-6) for name in expected)
    pc = pcfast.PredictiveCoding(model, **settings)
    assert "tolerance=0.0001" in repr(pc)
    model.zero_grad()
    pc(x, y).backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_compiled_functions_run_it_outside_the_graph():
    model, (x, y) = mlp(), batch(6)
    settings = {"step_size": 0.1, "num_steps": STEPS, "tolerance": 1e-4}
    expected = updates(model, x, y, **settings)
    model.zero_grad()
    torch.compile(lambda a, b: pcfast.pc_loss(model, a, b, **settings), backend="eager")(x, y).backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


class NoReading(TorchDispatchMode):
    """Refuses whatever makes a host wait for a device: values as numbers, sizes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


def test_where_the_host_cannot_read_nothing_waits(monkeypatch):
    model, (x, y) = mlp(), batch(6)
    y = F.one_hot(y, 3).double()
    settings = {"loss": "mse", "num_steps": STEPS, "tolerance": 1e-4, "check": "off", "backend": "eager"}
    with NoReading(), pytest.raises(AssertionError):
        pcfast.relax(model, x, y, **settings)
    left = pcfast.relax(model, x, y, **settings)
    monkeypatch.setattr(host, "readable", lambda device: False)
    with NoReading():
        result = pcfast.relax(model, x, y, **settings)
    assert torch.equal(result.iterations, left.iterations) and int(left.iterations) < STEPS


def test_a_recorded_graph_belongs_to_one_tolerance():
    model, (x, y) = mlp(), batch(6)
    keys = set()
    for tolerance in (None, 1e-3, 1e-4):
        ready = prepare(model, x, y, Settings(num_steps=9, tolerance=tolerance, backend="eager"))
        keys.add(cuda_graphs.graph_key(*ready))
        assert KNOWN["eager"].replays(*ready)[0]
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": -1e-3}, "-0.001"),
        ({"tolerance": float("nan")}, "nan"),
        ({"tolerance": float("inf")}, "inf"),
        ({"tolerance": True}, "True (bool)"),
        ({"tolerance": "small"}, "'small' (str)"),
        ({"tolerance": 1e-3, "method": "fixed_prediction"}, "fixed_prediction"),
        ({"tolerance": 1e-3, "method": "exact"}, "exact"),
        ({"tolerance": 1e-3, "method": "error_based"}, "error_based"),
        ({"tolerance": 1e-3, "method": "zero_divergence"}, "zero_divergence"),
    ],
)
@pytest.mark.parametrize("call", [pcfast.relax, pcfast.pc_loss, pcfast.PredictiveCoding, pcfast.explain])
def test_what_is_refused(call, settings, words):
    arguments = {pcfast.PredictiveCoding: (), pcfast.explain: ((5, 6),)}.get(call, batch(6))
    with pytest.raises(pcfast.ArgumentError) as caught:
        call(mlp(), *arguments, **settings)
    assert caught.value.argument == "tolerance" and words in str(caught.value)


def test_kernels_refuse_and_explain_says_so(monkeypatch):
    for module in (cuda, triton):
        monkeypatch.setattr(module, "_unavailable", lambda *_: "")
    request = planned(mlp(), (5, 6), tolerance=1e-3)
    for name in ("triton", "cuda"):
        assert KNOWN[name].supports(request) == (
            False,
            "its kernels run all iterations, whatever the tolerance: use eager",
        )
    text = str(pcfast.explain(mlp().float(), (5, 6), tolerance=1e-3))
    assert "its kernels run all iterations" in text and "Gram form of layer 1: no" in text
