"""pcfast.diagnostics against autograd's gradient of the explicit energy, and against backward()."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accuracy import ULP
from drawing import examples
from energy import energy
from hypothesis import assume, given
from hypothesis import strategies as st
from literal import evaluate, relax_literally
from networks_for_tests import LOSSES, architectures, loss_and_target
from plans import planned
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pcfast
from pcfast.diagnostics import diagnosis as diagnostics
from pcfast.diagnostics.diagnosis import diagnose
from pcfast.problem import plan as planning

BACKENDS = ["reference", "eager"]


def network(*extra: nn.Module) -> nn.Sequential:
    """Four PC layers and one without parameters, float64."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 9), nn.Tanh()),
        nn.Sequential(nn.Linear(9, 8), *extra, nn.ReLU()),
        nn.Tanh(),
        nn.Sequential(nn.Linear(8, 7), nn.SiLU()),
        nn.Linear(7, 3),
    ).double()


def batch(rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64),
        torch.randint(3, (rows,), generator=generator),
    )


def beliefs_before(model, x, y, *, loss, step_size, num_steps) -> list[list[torch.Tensor]]:
    """v_0..v_{L-1} as every iteration of strict relaxation finds them."""
    result = []
    vhat = [x]
    for layer in model:
        vhat.append(evaluate(layer, vhat[-1]).detach())
    result.append(vhat[:-1])
    relax_literally(
        model, x, y, loss=loss, method="strict", step_size=step_size, num_steps=num_steps,
        watch=lambda t, v, errors: result.append([value.clone() for value in v[:-1]]),
    )  # fmt: skip
    return result[:-1]


def energy_gradients(model, beliefs, y, loss, weight_decay: float = 0.0) -> list[torch.Tensor]:
    """Autograd's gradient of the explicit energy for v_1..v_{L-1}."""
    leaves = [v.detach().requires_grad_() for v in beliefs[1:]]
    total = energy(model, [beliefs[0], *leaves], y, loss)
    total = total + sum(0.5 * weight_decay * leaf.square().sum() for leaf in leaves)
    return list(torch.autograd.grad(total, leaves))


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """From the parts of a along and across b."""
    along = a @ b / b.norm()
    return math.degrees(math.atan2(float((a - along * b / b.norm()).norm()), float(along)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strict_against_autograd_of_the_explicit_energy(backend):
    model, (x, y) = network(), batch()
    settings = {"step_size": 0.3, "num_steps": 9}
    result = diagnose(model, x, y, backend=backend, **settings)
    assert result.run.plan.backend == backend
    points = beliefs_before(model, x, y, loss=F.cross_entropy, **settings)
    gradients = [energy_gradients(model, v, y, F.cross_entropy) for v in points]
    norms = torch.tensor([[float(g.norm()) for g in row] for row in gradients], dtype=torch.float64)
    torch.testing.assert_close(result.belief_gradients, norms, rtol=1e-9, atol=1e-15)
    sizes = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in gradients])
    torch.testing.assert_close(result.relaxed, 1 - sizes / sizes[0], rtol=0, atol=1e-9)
    totals = torch.stack([energy(model, v, y, F.cross_entropy).detach() for v in points])
    torch.testing.assert_close(result.energies.sum(1), totals, rtol=1e-12, atol=0)
    assert not result.rising.any() and 0.5 < float(result.relaxed[-1]) < 1 and float(result.relaxed[0]) == 0

    updates = relax_literally(model, x, y, loss=F.cross_entropy, method="strict", **settings).gradients
    copied = copy.deepcopy(model)
    F.cross_entropy(copied(x), y).backward()
    vectors = []
    for l, layer in enumerate(copied):
        names = [(f"{l}.{name}", p) for name, p in layer.named_parameters()]
        if not names:
            assert math.isnan(result.relative_error[l]) and math.isnan(result.angle_degrees[l])
            continue
        update = torch.cat([updates[name].flatten() for name, _ in names])
        gradient = torch.cat([p.grad.flatten() for _, p in names])
        vectors.append((update, gradient))
        error = float((update - gradient).norm() / gradient.norm())
        assert float(result.relative_error[l]) == pytest.approx(error, rel=1e-7)
        assert float(result.angle_degrees[l]) == pytest.approx(angle(update, gradient), rel=1e-6)
    update, gradient = (torch.cat(parts) for parts in zip(*vectors, strict=True))
    assert float(result.whole_angle_degrees) == pytest.approx(angle(update, gradient), rel=1e-6)
    error = float((update - gradient).norm() / gradient.norm())
    assert float(result.whole_relative_error) == pytest.approx(error, rel=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_with_weight_decay_are_those_that_move_beliefs(backend):
    """From v_t and v_{t+1}: without momentum |v_{t+1} - v_t| = eta |g(t)|; and autograd's at the start."""
    model, (x, y) = network(), batch()
    optimizer = pcfast.GradientDescent(weight_decay=0.05)
    settings = {"belief_optimizer": optimizer, "step_size": 0.2, "backend": backend}
    result = diagnose(model, x, y, num_steps=5, **settings)
    assert result.rising is None
    paths = [pcfast.relax(model, x, y, num_steps=n, **settings).beliefs for n in range(6)]
    moves = [
        [float((b - a).norm()) / 0.2 for a, b in zip(now[1:-1], then[1:-1], strict=True)]
        for now, then in pairwise(paths)
    ]
    torch.testing.assert_close(
        result.belief_gradients, torch.tensor(moves, dtype=torch.float64), rtol=1e-9, atol=0
    )
    start = energy_gradients(model, paths[0][:-1], y, F.cross_entropy, weight_decay=0.05)
    torch.testing.assert_close(
        result.belief_gradients[0], torch.stack([g.norm() for g in start]), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("optimizer", [None, pcfast.GradientDescent(0.6), pcfast.Adam()])
def test_measuring_changes_no_result_beyond_rounding(optimizer):
    model, (x, y) = network(), batch()
    settings = {"belief_optimizer": optimizer, "step_size": 0.01, "num_steps": 7}
    result, plain = diagnose(model, x, y, **settings), pcfast.relax(model, x, y, energies=True, **settings)
    torch.testing.assert_close(result.energies, plain.energies, rtol=1e-12, atol=1e-18)
    literal = diagnose(model, x, y, backend="reference", **settings)
    torch.testing.assert_close(result.belief_gradients, literal.belief_gradients, rtol=1e-8, atol=1e-15)


@examples(60)
@given(
    architecture=architectures(),
    loss_name=st.sampled_from(LOSSES),
    method=st.sampled_from(("fixed_prediction", "strict")),
    num_steps=st.integers(0, 20),
    step_size=st.sampled_from((0.05, 0.1, 0.3)),
    seed=st.integers(0, 10**6),
)
def test_eager_equals_reference(architecture, loss_name, method, num_steps, step_size, seed):
    model, shape = architecture
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(5, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, 5, model[-1].out_features)
    arguments = dict(loss=loss, method=method, step_size=step_size, num_steps=num_steps)
    try:
        relaxed = pcfast.relax(model, x, y, backend="reference", **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)
    assume(all(e is None or float(e.norm()) < 1e3 for e in relaxed.errors))
    truth, result = (diagnose(model, x, y, backend=name, **arguments) for name in BACKENDS)
    # the literal loop's errors carry the rounding of the beliefs, and J^T passes it on
    rounding = 64 * ULP * max(num_steps, 1) * max(float(v.norm()) for v in relaxed.beliefs)
    for name in ("energies", "belief_gradients"):
        torch.testing.assert_close(getattr(result, name), getattr(truth, name), rtol=1e-9, atol=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fixed_prediction_relaxes_as_its_scalars_do(backend, momentum):
    model, (x, y) = network(), batch()
    settings = {"method": "fixed_prediction", "step_size": 0.3, "num_steps": 12, "backend": backend}
    result = diagnose(model, x, y, belief_optimizer=pcfast.GradientDescent(momentum), **settings)
    exact = pcfast.relax(model, x, y, method="exact").errors
    c, velocity, rows = [1.0] + [0.0] * 5, [0.0] * 6, []
    for _ in range(12):
        # g_l(t) = (c_{d-1} - c_d) dLoss/dvhat_l, d = L - l
        rows.append([abs(c[4 - l] - c[5 - l]) * float(exact[l].norm()) for l in range(1, 5)])
        velocity = [0.0] + [momentum * velocity[d] + c[d] - c[d - 1] for d in range(1, 6)]
        c = [a - 0.3 * m for a, m in zip(c, velocity, strict=True)]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(result.belief_gradients, expected, rtol=1e-8, atol=1e-15)
    sizes = expected.square().sum(1).sqrt()
    torch.testing.assert_close(result.relaxed, 1 - sizes / sizes[0], rtol=0, atol=1e-8)
    assert result.rising is None


def test_with_step_size_1_and_l_iterations_fixed_prediction_is_backpropagation():
    model, (x, y) = network(), batch()
    result = diagnose(model, x, y, method="fixed_prediction", step_size=1.0, num_steps=5)
    assert float(result.whole_relative_error) < 1e-14 and float(result.whole_angle_degrees) < 1e-12
    assert result.relaxed[:5].tolist()[0] == 0


def test_a_step_size_above_the_limit_lets_the_energy_rise():
    """One belief, f_1 = f_2 = w v: energy (v - w x)^2 / 2 + (w v - y)^2 / 2, stable for eta (1 + w^2) < 2."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    for layer in model:
        nn.init.constant_(layer.weight, 2.0)
    x, y = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def half_square(output, target):
        return 0.5 * (output - target).square().sum()

    for step_size, above in ((0.39, False), (0.41, True)):
        for backend in BACKENDS:
            result = diagnose(
                model, x, y, loss=half_square, step_size=step_size, num_steps=8, backend=backend
            )
            assert result.rising.tolist() == [False] + [above] * 7
            factor = 1 - step_size * 5  # of the gradient in every iteration
            expected = [1 - abs(factor) ** t for t in range(8)]
            assert result.relaxed.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", [m for m in planning.METHODS if m not in ("strict", "fixed_prediction")])
def test_methods_whose_beliefs_descend_no_energy_are_refused(method):
    with pytest.raises(pcfast.ArgumentError, match=f"'{method}'; needed: 'strict' or 'fixed_prediction'"):
        diagnose(network(), *batch(), method=method)


def test_rounding_at_rest_is_no_rise():
    energies = torch.full((4, 2), 1.0)
    energies[1, 0] += 2**-22  # two units of rounding of the sum
    energies[3, 0] += 1e-4
    assert diagnostics.rising(energies).tolist() == [False, False, False, True]
    assert diagnostics.rising(energies[:0]).tolist() == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["strict", "fixed_prediction"])
def test_edges(method, backend):
    model, (x, y) = network(), batch()
    none = diagnose(model, x, y, method=method, num_steps=0, backend=backend)
    assert none.energies.shape == (0, 5) and none.belief_gradients.shape == (0, 4)
    assert none.relaxed.shape == (0,) and none.angle_degrees.shape == (5,)
    single = nn.Sequential(nn.Linear(6, 3)).double()
    alone = diagnose(single, x, y, method=method, num_steps=3, backend=backend)
    assert alone.belief_gradients.shape == (3, 0) and alone.relaxed.tolist() == [1.0] * 3
    assert float(alone.whole_relative_error) < 1e-14
    reached = diagnose(model, x, y, method=method, num_steps=1, backend=backend)  # only the last layer
    assert math.isnan(reached.angle_degrees[0]) and float(reached.relative_error[0]) == 1
    if method == "fixed_prediction":  # strict moves the beliefs below the last layer
        assert float(reached.relative_error[4]) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_stays_as_it_was(backend):
    model, (x, y) = network(nn.BatchNorm1d(8), nn.Dropout(0.4)), batch()
    model = model.double()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first = diagnose(model, x, y, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    # the same masks for the update and the gradient: the last layer's is the gradient but for the beliefs' moves
    again = diagnose(model, x, y, backend=backend)
    torch.testing.assert_close(first.energies, again.energies, rtol=0, atol=0)
    resting = diagnose(model, x, y, step_size=0.0, num_steps=3, backend=backend)
    assert float(resting.relative_error[4]) < 1e-13 and resting.relaxed.tolist() == [0.0] * 3


def test_kernels_refuse_and_auto_goes_on_with_eager(monkeypatch):
    from pcfast.backends import BACKENDS as KNOWN
    from pcfast.backends.cuda import backend as cuda
    from pcfast.backends.triton import backend as triton
    from pcfast.problem.types import Wanted

    for module in (cuda, triton):
        monkeypatch.setattr(module, "_unavailable", lambda *_: "")
    request = planned(network(), batch()[0].shape, wanted=Wanted(energies=True, belief_gradients=True))
    for name in ("triton", "cuda"):
        ok, why = KNOWN[name].supports(request)
        assert not ok and "do not record the beliefs' gradients: use eager" in why


class NoReading(TorchDispatchMode):
    """Refuses whatever makes a host wait for a device: values as numbers, sizes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(func.overloadpacket.__name__.startswith(name) for name in self.WAITING), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["strict", "fixed_prediction"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_nothing_waits_for_the_device(method, loss):
    model, (x, y) = network(), batch()
    y = F.one_hot(y, 3).double()
    with NoReading():
        result = diagnose(model, x, y, loss=loss, method=method, check="off", backend="eager")
        with pytest.raises(AssertionError):
            result.relaxed[0].item()
    assert 0 < float(result.whole_angle_degrees) < 90
