"""Incremental predictive coding (iPC) against one energy differentiated by autograd, and linear nets by hand.

Beliefs and parameters descend the same energy, E(v, theta) = sum_{l<L} |f_l(v_{l-1}) - v_l|^2 / 2 + Loss(mu_L), so
the oracle is one backward pass an iteration and a step of two optimisers of torch.optim, one for the beliefs and one
for the parameters; it shares no code with pcfast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import amplification
from drawing import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks_for_tests import LOSSES, architectures, belief_optimizers, loss_and_target
from torch import Tensor, nn

import pcfast
from pcfast import Adam, GradientDescent, datasets
from pcfast.checking.bounds import ULP, allowed_update_errors, relative_error
from pcfast.cli import main
from pcfast.problem import status
from pcfast.training import trainer as training

BACKENDS = ["reference", "eager"]
ETA = 0.2
SUM = nn.CrossEntropyLoss(reduction="sum")

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    # a step moves by at most lr / eps times what its gradient is off
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.3),
}
WANING = tuple(ETA / (1 + 0.2 * t) for t in range(20))
#: What moves the beliefs, and eta; with Adam beliefs move by about eta an iteration.
BELIEFS = {
    "plain": (None, ETA),
    "schedule": (None, WANING),
    "momentum": (GradientDescent(0.35), ETA),
    "decay": (GradientDescent(weight_decay=0.2), ETA),
    "momentum, decay and schedule": (GradientDescent(0.45, 0.05), WANING),
    "adam": (Adam(eps=1e-3), 0.02),
    "adam, other betas": (Adam((0.0, 0.5), eps=1e-2), WANING),
}


def steps(step_size, num_steps: int) -> float | tuple[float, ...]:
    """eta, or the first ``num_steps`` of a schedule."""
    return step_size[:num_steps] if isinstance(step_size, tuple) else step_size


def rounding_grows(optimizer, step_size) -> float:
    return amplification(optimizer or GradientDescent(), step_size)


def by_torch(optimizer) -> Callable[..., torch.optim.Optimizer]:
    """What moves tensors in torch.optim as ``optimizer`` moves beliefs."""
    if isinstance(optimizer, Adam):
        return partial(torch.optim.Adam, betas=optimizer.betas, eps=optimizer.eps)
    optimizer = optimizer or GradientDescent()
    return partial(torch.optim.SGD, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _nothing_pending():
    yield
    left = list(status._pending)
    status._pending.clear()
    assert not left


def energy(model, v, y, loss) -> Tensor:
    mu = [layer(below) for layer, below in zip(model, v, strict=True)]
    return sum((0.5 * (m - u).square().sum() for m, u in zip(mu[:-1], v[1:], strict=True)), loss(mu[-1], y))


def by_hand(
    model, x, y, optimizer, *, loss=SUM, belief_optimizer=None, step_size=ETA, num_steps, watch=None
) -> list[Tensor]:
    """The loop on ``model`` in place; returns v_0..v_{L-1}. ``watch(v)`` is called once .grad is there."""
    with torch.no_grad():
        v = [x]
        for layer in model[:-1]:
            v.append(layer(v[-1]).clone())  # flattening and identities give views
    for u in v[1:]:
        u.requires_grad_(True)
    mover = by_torch(belief_optimizer)(v[1:], lr=0.0)
    for t in range(num_steps):
        optimizer.zero_grad()
        mover.zero_grad()
        energy(model, v, y, loss).backward()
        if watch:
            watch(v)
        (group,) = mover.param_groups
        group["lr"] = step_size[t] if isinstance(step_size, tuple) else step_size
        mover.step()
        optimizer.step()
    return [x, *(u.detach() for u in v[1:])]


def tanh_net() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.SiLU(), nn.Linear(7, 6)),
        nn.Tanh(),
        nn.Linear(6, 4),
    )
    return model.double(), torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 4, (6,))


def parameters(model) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def apart(result, truth) -> float:
    return max(float((f - t).norm()) for f, t in zip(result, truth, strict=True))


# The mathematics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
@pytest.mark.parametrize("beliefs", BELIEFS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_written_by_hand(name, beliefs, num_steps, backend):
    model, x, y = tanh_net()
    (same, plain), make = (copy.deepcopy(model) for _ in range(2)), OPTIMIZERS[name]
    optimizer, step_size = BELIEFS[beliefs]
    how = dict(belief_optimizer=optimizer, step_size=steps(step_size, num_steps), num_steps=num_steps)
    forward = float(SUM(model(x), y).detach())
    loss = pcfast.incremental_step(model, x, y, make(model.parameters()), loss=SUM, backend=backend, **how)
    plan = pcfast.last_run().plan
    assert (plan.backend, plan.belief_optimizer) == (backend, optimizer or GradientDescent())
    assert (float(loss), loss.requires_grad) == (pytest.approx(forward, rel=1e-14), False)
    by_hand(same, x, y, make(same.parameters()), **how)
    # updates of norm < 100 are off by 1e-14 of that, Adam's by lr / eps = 10 times as much, summed over the steps
    bound = 10 * 100 * 1e-14 * max(num_steps, 1) * rounding_grows(optimizer, step_size)
    assert apart(parameters(model), parameters(same)) <= bound
    if num_steps:
        assert apart(parameters(model), parameters(tanh_net()[0])) > 1e-3
        result, truth = ([p.grad for p in m.parameters()] for m in (model, same))
        assert apart(result, truth) < 1e-10 * rounding_grows(optimizer, step_size)
    # momentum and a schedule are felt in the second move of the beliefs, and no parameter sees the last one
    if num_steps == 9 and beliefs != "plain":
        by_hand(plain, x, y, make(plain.parameters()), num_steps=num_steps)
        assert apart(parameters(model), parameters(plain)) > 1e4 * bound


def test_a_schedule_of_step_sizes(backend):
    result = []
    for sizes in ([0.3, 0.1, 0.2], [0.3, 0.1, 0.4], [0.3, 0.3, 0.3], 0.3):
        model, x, y = tanh_net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        pcfast.incremental_step(
            model, x, y, optimizer, loss=SUM, step_size=sizes, num_steps=3, backend=backend
        )
        result.append(parameters(model))
    assert apart(result[0], result[1]) == 0  # the last move of the beliefs reaches no parameter
    assert apart(result[2], result[3]) == 0
    assert apart(result[0], result[2]) > 1e-6


@pytest.mark.parametrize("beliefs", ["plain", "momentum", "adam"])
def test_several_batches_with_one_optimiser(beliefs, backend):
    """Its state goes on from batch to batch; that of the beliefs begins with each."""
    model, x, y = tanh_net()
    same = copy.deepcopy(model)
    optimizer, other = (OPTIMIZERS["adam"](m.parameters()) for m in (model, same))
    belief_optimizer, step_size = BELIEFS[beliefs]
    how = dict(belief_optimizer=belief_optimizer, step_size=step_size, num_steps=3)
    for shift in range(4):
        batch = x.roll(shift, 1) + shift
        pcfast.incremental_step(model, batch, y, optimizer, loss=SUM, backend=backend, **how)
        by_hand(same, batch, y, other, **how)
    assert apart(parameters(model), parameters(same)) < 1e-9


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.35, 0.0), (0.0, 0.1), (0.45, 0.1)])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_linear_net_in_numpy(num_steps, momentum, decay, backend):
    """Errors, beliefs, their velocities and weights written out; the loss is sum (mu - y)^2."""
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(i, o, bias=False).double() for i, o in ((4, 5), (5, 6), (6, 3))))
    x, y = (torch.randn(7, size, dtype=torch.float64) for size in (4, 3))
    w1, w2, w3 = (layer.weight.detach().numpy().copy() for layer in model)
    v0, target, lr = x.numpy(), y.numpy(), 0.004
    v1 = v0 @ w1.T
    v2 = v1 @ w2.T
    m1 = m2 = 0.0
    for _ in range(num_steps):
        e1, e2, e3 = v0 @ w1.T - v1, v1 @ w2.T - v2, 2 * (v2 @ w3.T - target)
        g1, g2, g3 = e1.T @ v0, e2.T @ v1, e3.T @ v2
        m1 = momentum * m1 + (e2 @ w2 - e1) + decay * v1
        m2 = momentum * m2 + (e3 @ w3 - e2) + decay * v2
        v1, v2 = v1 - ETA * m1, v2 - ETA * m2
        w1, w2, w3 = w1 - lr * g1, w2 - lr * g2, w3 - lr * g3
    pcfast.incremental_step(
        model, x, y, torch.optim.SGD(model.parameters(), lr=lr), loss=nn.MSELoss(reduction="sum"),
        step_size=ETA, num_steps=num_steps, belief_optimizer=GradientDescent(momentum, decay), backend=backend,
    )  # fmt: skip
    for layer, truth in zip(model, (w1, w2, w3), strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), truth, rtol=0, atol=1e-12)


def test_one_layer_is_gradient_descent_on_the_batch(backend):
    """No beliefs: n iterations are n steps of backpropagation."""
    model = nn.Sequential(nn.Linear(5, 4)).double()
    same, (_, x, y) = copy.deepcopy(model), tanh_net()
    pcfast.incremental_step(
        model, x, y, OPTIMIZERS["momentum"](model.parameters()), num_steps=6, backend=backend
    )
    optimizer = OPTIMIZERS["momentum"](same.parameters())
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(same(x), y).backward()
        optimizer.step()
    assert apart(parameters(model), parameters(same)) < 1e-13


def test_updates_are_finite_differences_of_the_energy(backend):
    """.grad after n iterations: dE/dtheta at the beliefs and parameters that n - 1 iterations left."""
    model, x, y = tanh_net()
    at = copy.deepcopy(model)
    v = by_hand(at, x, y, OPTIMIZERS["sgd"](at.parameters()), num_steps=2)
    pcfast.incremental_step(
        model,
        x,
        y,
        OPTIMIZERS["sgd"](model.parameters()),
        loss=SUM,
        step_size=ETA,
        num_steps=3,
        backend=backend,
    )
    h = 1e-5
    with torch.no_grad():
        for parameter, moved in zip(model.parameters(), at.parameters(), strict=True):
            entry, values = moved.view(-1), []
            for sign in (1, -1):
                entry[1] += sign * h
                values.append(float(energy(at, v, y, SUM)))
                entry[1] -= sign * h
            slope = (values[0] - values[1]) / (2 * h)
            # h^2 / 6 of a third derivative, and 2^-52 E / h of rounding
            assert float(parameter.grad.view(-1)[1]) == pytest.approx(slope, rel=1e-6, abs=1e-7)


def test_beliefs_and_parameters_move_from_the_same_point(backend):
    """Not one after the other: neither are weights' updates taken at moved beliefs, nor beliefs' at moved weights."""
    model, x, y = tanh_net()

    def one_after_the_other(beliefs_first: bool) -> list[Tensor]:
        other = copy.deepcopy(model)
        optimizer = OPTIMIZERS["sgd"](other.parameters())
        with torch.no_grad():
            v = [x]
            for layer in other[:-1]:
                v.append(layer(v[-1]))
        for _ in range(4):
            for beliefs in (beliefs_first, not beliefs_first):
                v = [x, *(u.detach().requires_grad_(True) for u in v[1:])]
                optimizer.zero_grad()
                energy(other, v, y, SUM).backward()
                if beliefs:
                    v = [x, *(u.detach() - ETA * u.grad for u in v[1:])]
                else:
                    optimizer.step()
        return parameters(other)

    wrong = [one_after_the_other(order) for order in (True, False)]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    before = parameters(model)
    pcfast.incremental_step(model, x, y, optimizer, loss=SUM, step_size=ETA, num_steps=4, backend=backend)
    moved = apart(parameters(model), before)
    # that of the right order is met to 1e-11
    assert min(apart(parameters(model), other) for other in wrong) > 1e-3 * moved


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("beliefs", ["plain", "momentum", "decay", "adam"])
def test_beliefs_that_no_error_has_reached_stay(beliefs, num_steps, backend):
    """An error takes an iteration a layer; until it comes a layer's updates are exactly zero.

    Adam would move any rounding by a whole step; weight decay moves all beliefs in the first iteration.
    """
    model, x, y = tanh_net()
    optimizer = Adam() if beliefs == "adam" else BELIEFS[beliefs][0]
    pcfast.incremental_step(
        model, x, y, OPTIMIZERS["sgd"](model.parameters()), loss=SUM, step_size=0.02, num_steps=num_steps,
        belief_optimizer=optimizer, backend=backend,
    )  # fmt: skip
    reached = [bool(layer.weight.grad.any()) for layer in (model[0][0], model[1][0], model[3])]
    if beliefs == "decay" and num_steps > 1:
        assert reached == [True] * 3
    else:
        assert reached == [num_steps >= 4, num_steps >= 3, True]


def test_the_program_of_pcx(backend):
    """Its signs and reductions: belief minus prediction, a mean over rows whose gradient beliefs take times the rows.

    optax.sgd with momentum as torch's; AdamW makes of a gradient over B and eps what it makes of both times B.
    """
    model, x, _ = tanh_net()
    y, rows, other = F.one_hot(torch.arange(6) % 4, 4).double(), len(x), copy.deepcopy(model)
    h = [x]
    for layer in other[:-1]:
        h.append(layer(h[-1].detach()).detach().requires_grad_())
    of_beliefs = torch.optim.SGD(h[1:], lr=0.8 * rows, momentum=0.35)
    of_weights = torch.optim.AdamW(other.parameters(), lr=0.01, eps=1e-4, weight_decay=0.03)
    for _ in range(8):
        for optimizer in (of_beliefs, of_weights):
            optimizer.zero_grad()
        mu = [layer(below) for layer, below in zip(other, h, strict=True)]
        of_rows = [0.5 * (value - u).square().sum(1) for value, u in zip([*h[1:], y], mu, strict=True)]
        sum(of_rows).mean().backward()
        of_beliefs.step()
        of_weights.step()
    pcfast.incremental_step(
        model, x, y, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4 * rows, weight_decay=0.03),
        loss=pcfast.losses.half_squared_error, step_size=0.8, num_steps=8,
        belief_optimizer=GradientDescent(0.35), backend=backend,
    )  # fmt: skip
    # as in the loop by hand, with lr / (eps rows)
    assert apart(parameters(model), parameters(other)) <= 0.01 / 6e-4 * 100 * 1e-14 * 8


def test_none_is_plain_gradient_descent(backend):
    result = []
    for optimizer in (None, GradientDescent()):
        model, x, y = tanh_net()
        pcfast.incremental_step(
            model, x, y, OPTIMIZERS["adam"](model.parameters()), belief_optimizer=optimizer, backend=backend
        )
        result.append(parameters(model))
    assert apart(*result) == 0


# Any network ----------------------------------------------------------------------------------------------------


@examples(60)
@given(
    architecture=architectures(),
    loss_name=st.sampled_from(LOSSES),
    optimizer=st.one_of(st.none(), belief_optimizers),
    sizes=st.one_of(
        st.tuples(st.sampled_from((0.0, 0.05, 0.1, 0.3)), st.integers(1, 8)),
        st.lists(st.sampled_from((0.0, 0.03, 0.1, 0.2)), min_size=1, max_size=8),
    ),
    lr=st.sampled_from((1e-4, 1e-3)),
    batch=st.sampled_from((1, 2, 5, 17)),
    seed=st.integers(0, 10**6),
)
def test_both_backends_meet_the_loop_by_hand(architecture, loss_name, optimizer, sizes, lr, batch, seed):
    model, shape = architecture
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, batch, model[-1].out_features)
    step_size, num_steps = sizes if isinstance(sizes, tuple) else (tuple(sizes), len(sizes))
    arguments = dict(loss=loss, belief_optimizer=optimizer, step_size=step_size, num_steps=num_steps)
    counted = num_steps * rounding_grows(optimizer, step_size)
    truth, bounds = copy.deepcopy(model), [0.0] * len(list(model.parameters()))

    def watch(v) -> None:
        """What an iteration's updates may be off by: as for any relaxation, at its beliefs and errors."""
        with torch.no_grad():
            mu = [layer(u.detach()) for layer, u in zip(truth, v, strict=True)]
        top = mu[-1].clone().requires_grad_(True)
        (g,) = torch.autograd.grad(loss(top, y), top)
        errors = [None, *(m - u.detach() for m, u in zip(mu[:-1], v[1:], strict=True)), g]
        assume(all(e is None or float(e.norm()) < 1e3 for e in errors))
        beliefs = [u.detach() for u in [*v, mu[-1]]]
        updates = {p: p.grad for p in truth.parameters()}
        allowed = allowed_update_errors(truth, beliefs, errors, updates, counted)
        for i, p in enumerate(truth.parameters()):
            bounds[i] += lr * allowed[p] + 2 * ULP * float(p.detach().norm())

    by_hand(truth, x, y, torch.optim.SGD(truth.parameters(), lr=lr), watch=watch, **arguments)
    for backend in BACKENDS:
        result = copy.deepcopy(model)
        mover = torch.optim.SGD(result.parameters(), lr=lr)
        pcfast.incremental_step(result, x, y, mover, backend=backend, **arguments)
        for p, true, bound in zip(result.parameters(), truth.parameters(), bounds, strict=True):
            assert float((p - true).detach().norm()) <= bound, backend


class Branch(nn.Module):
    """A module that pcfast does not know, with a parameter that it does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.spare = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, v):
        return v + torch.sin(self.inner(v))


def tied() -> nn.Sequential:
    shared = nn.Linear(6, 6)
    return nn.Sequential(nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh()), nn.Linear(6, 4))


NETS = {
    "batchnorm": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.BatchNorm1d(8), nn.Linear(8, 4)
    ),
    "batchnorm first": lambda: nn.Sequential(
        nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.SiLU()), nn.Linear(8, 4)
    ),
    "batchnorm eval": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.BatchNorm1d(8), nn.Linear(8, 4)
    ).eval(),
    "batchnorm without parameters": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False)), nn.Linear(8, 4)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4)), nn.Dropout(0.2), nn.Linear(8, 4)
    ),
    "opaque": lambda: nn.Sequential(Branch(6), nn.Linear(6, 8), nn.LayerNorm(8), Branch(8), nn.Linear(8, 4)),
    "residual": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), pcfast.Residual(nn.Tanh(), nn.Linear(8, 8))),
        pcfast.Residual(nn.BatchNorm1d(8), nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 8)),
        nn.Linear(8, 4),
    ),
    "residual first": lambda: nn.Sequential(
        pcfast.Residual(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 4)
    ),
    "tied": tied,
    "frozen": lambda: nn.Sequential(
        nn.Linear(6, 8).requires_grad_(False), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 4)
    ),
    "bare": lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Identity()),
    "cnn": lambda: nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.GELU()),
        nn.Sequential(nn.MaxPool2d(2, 1), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Tanh()),
        nn.Linear(18, 4),
    ),
    "three dimensions": lambda: nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 5), nn.Tanh()), nn.Flatten(), nn.Linear(10, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("beliefs", ["plain", "momentum, decay and schedule", "adam"])
@pytest.mark.parametrize("name", NETS)
def test_kinds_of_layers(name, beliefs):
    """eager equals the literal loop: parameters, buffers, and which parameters have a .grad."""
    torch.manual_seed(1)
    model = NETS[name]().double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 4, (7,))
    belief_optimizer, step_size = BELIEFS[beliefs]
    how = dict(belief_optimizer=belief_optimizer, step_size=steps(step_size, 6), num_steps=6)
    result = {}
    for backend in BACKENDS:
        result[backend] = copy.deepcopy(model)
        optimizer = OPTIMIZERS["momentum"](result[backend].parameters())
        torch.manual_seed(5)  # of the masks
        pcfast.incremental_step(result[backend], x, y, optimizer, loss=SUM, backend=backend, **how)
    reference, eager = result.values()
    for (key, a), b in zip(reference.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        # beliefs of norm < 20 lose 2^-53 of it an iteration in the literal loop
        bound = 64 * ULP * 6 * 20 * rounding_grows(belief_optimizer, step_size)
        assert float((a - b).detach().norm()) <= bound, key
    for (key, a), b in zip(reference.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=4 * ULP, atol=4 * ULP, msg=key)
    if name == "frozen":
        assert torch.equal(eager[0].weight, model[0].weight)
    else:
        assert apart(parameters(eager), parameters(model)) > 1e-3


def test_statistics_move_once_a_call(backend):
    model = NETS["batchnorm"]()
    plain = copy.deepcopy(model)
    x, y = torch.randn(7, 6), torch.randint(0, 4, (7,))
    pcfast.incremental_step(model, x, y, OPTIMIZERS["sgd"](model.parameters()), backend=backend)
    plain(x)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_part_of_the_parameters_moves(backend):
    model, x, y = tanh_net()
    before = parameters(model)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    pcfast.incremental_step(model, x, y, optimizer, loss=SUM, num_steps=5, backend=backend)
    same = tanh_net()[0]
    by_hand(same, x, y, torch.optim.SGD(same[1].parameters(), lr=0.01), step_size=0.1, num_steps=5)
    assert apart(parameters(model), parameters(same)) < 1e-13
    kept = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert kept == [True] * 2 + [False] * 4 + [True] * 2


def test_normalizer_makes_a_part_s_loss_its_share(backend):
    result = []
    for settings_of in (
        {"normalizer": 24},
        {"loss": lambda o, y: F.cross_entropy(o, y, reduction="sum") / 24},
    ):
        model, x, y = tanh_net()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        pcfast.incremental_step(model, x, y, optimizer, num_steps=4, backend=backend, **settings_of)
        result.append(parameters(model))
    assert apart(*result) < 1e-14


# Precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("belief_optimizer", "step_size"),
    [
        (None, 0.1),
        (GradientDescent(0.35), 0.1),
        (GradientDescent(0.35, 1e-4), 0.1),
        (Adam(eps=1e-4), 1e-4),
    ],
    ids=["plain", "momentum", "decay", "adam"],
)
def test_deviations_keep_the_digits_that_beliefs_lose_in_float32(belief_optimizer, step_size):
    """Errors of a mean loss are small against beliefs: belief form (the literal loop) loses them to rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in ((20, 40), (40, 30))), nn.Linear(30, 10)
    )
    x, y = torch.rand(200, 20), torch.randint(0, 10, (200,))

    def run(dtype, backend):
        made = copy.deepcopy(model).to(dtype)
        optimizer = torch.optim.Adam(made.parameters(), lr=1e-3, eps=1e-3)
        pcfast.incremental_step(
            made, x.to(dtype), y, optimizer, step_size=step_size, num_steps=20, backend=backend,
            belief_optimizer=belief_optimizer,
        )  # fmt: skip
        return [p.grad for p in made.parameters()]

    truth, deviations, beliefs = (
        run(*how)
        for how in ((torch.float64, "reference"), (torch.float32, "eager"), (torch.float32, "reference"))
    )
    for t, d, b in zip(truth[::2], deviations[::2], beliefs[::2], strict=True):
        assert relative_error(d, t) < 1e-3
        assert relative_error(b, t) > relative_error(d, t)
    assert relative_error(beliefs[0], truth[0]) > 10 * relative_error(deviations[0], truth[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_sixteen_bits_are_refused(backend):
    model, x, y = tanh_net()
    model, x = model.float(), x.float()
    before = parameters(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(pcfast.ArgumentTypeError, match=r"^model: got bfloat16 autocast.*float32 or float64"),
    ):
        pcfast.incremental_step(model, x, y, optimizer, backend=backend)
    assert apart(parameters(model), before) == 0
    for dtype in (torch.bfloat16, torch.float16):
        model, x = model.to(dtype), x.to(dtype)
        with pytest.raises(pcfast.ArgumentTypeError, match=rf"^model: got parameters of {dtype}"):
            pcfast.incremental_step(model, x, y, OPTIMIZERS["sgd"](model.parameters()), backend=backend)


# The call -------------------------------------------------------------------------------------------------------


def test_what_it_returns_and_leaves(backend):
    model, x, y = tanh_net()
    output = model(x).detach()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    with torch.no_grad():  # nothing here is recorded anyway
        loss, result = pcfast.incremental_step(
            model, x, y, OPTIMIZERS["sgd"](model.parameters()), return_output=True, backend=backend
        )
    torch.testing.assert_close(result, output, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss, F.cross_entropy(output, y), rtol=1e-14, atol=0)
    assert loss.dim() == 0 and not result.requires_grad
    assert all(float(p.grad.abs().max()) < 7 for p in model.parameters())
    assert not pcfast.last_run().replayed
    same = tanh_net()[0]
    by_hand(
        same, x, y, OPTIMIZERS["sgd"](same.parameters()), loss=F.cross_entropy, step_size=0.1, num_steps=20
    )
    assert apart(parameters(model), parameters(same)) < 1e-12


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda p: None, pcfast.ArgumentTypeError, "NoneType"),
        (lambda p: torch.optim.SGD, pcfast.ArgumentTypeError, "optimiser of torch.optim"),
        (lambda p: torch.optim.LBFGS(p), pcfast.ArgumentError, "LBFGS.*closure"),
        (lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(1))]), pcfast.ArgumentError, "does not have"),
    ],
    ids=["None", "class", "LBFGS", "foreign"],
)
def test_bad_optimisers_are_refused(make, kind, words):
    model, x, y = tanh_net()
    with pytest.raises(kind, match=f"^optimizer: got .*{words}"):
        pcfast.incremental_step(model, x, y, make(model.parameters()))


def test_it_is_no_method_of_one_relaxation():
    model, x, y = tanh_net()
    words = r"^method: got 'incremental', which moves the parameters.*pcfast\.incremental_step"
    for call in (
        lambda: pcfast.pc_loss(model, x, y, method="incremental"),
        lambda: pcfast.relax(model, x, y, method="incremental"),
        lambda: pcfast.PredictiveCoding(model, method="incremental"),
    ):
        with pytest.raises(pcfast.ArgumentError, match=words):
            call()


def test_bad_input_is_refused_before_anything_moves(backend):
    model, x, y = tanh_net()
    before = parameters(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    settings_of = dict(backend=backend, num_steps=3)
    bad = x.clone()
    bad[0, 0] = float("nan")
    for kind, changes in (
        (pcfast.NonFiniteError, {"x": bad}),
        (pcfast.ArgumentError, {"y": torch.full_like(y, 9)}),
        (pcfast.ShapeError, {"y": y[:2]}),
        (pcfast.ArgumentError, {"loss": "huber"}),
        (pcfast.ArgumentError, {"step_size": -1.0}),
        (pcfast.ArgumentError, {"num_steps": -1}),
        (pcfast.ArgumentTypeError, {"belief_optimizer": "adam"}),
        (pcfast.ArgumentTypeError, {"belief_optimizer": torch.optim.Adam}),
    ):
        with pytest.raises(kind):
            pcfast.incremental_step(
                **{"model": model, "x": x, "y": y, "optimizer": optimizer, **settings_of, **changes}
            )
    assert apart(parameters(model), before) == 0 and not optimizer.state
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("belief_optimizer", [None, GradientDescent(0.35), Adam()], ids=repr)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernel_backends_refuse_it(name, belief_optimizer, monkeypatch):
    from pcfast.backends.cuda import backend as cuda
    from pcfast.backends.triton import backend as triton

    monkeypatch.setattr(cuda, "_unavailable", lambda device: "")
    monkeypatch.setattr(triton, "_unavailable", lambda kind, index: "")
    model, x, y = tanh_net()
    model, x = model.float(), x.float()
    with pytest.raises(pcfast.BackendError, match="strict predictive coding, not incremental: use eager"):
        pcfast.incremental_step(
            model,
            x,
            y,
            OPTIMIZERS["sgd"](model.parameters()),
            backend=name,
            belief_optimizer=belief_optimizer,
        )


def diverging() -> tuple[nn.Sequential, Tensor, Tensor, torch.optim.Optimizer]:
    """float32, and a learning rate far too large: errors overflow within 60 iterations."""
    model, x, y = tanh_net()
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4))
    return model, 30 * x.float(), y, torch.optim.SGD(model.parameters(), lr=1.0)


def test_divergence_leaves_the_parameters_of_the_iteration_before(backend):
    model, x, y, optimizer = diverging()
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(parameters(model)))
    with pytest.raises(pcfast.RelaxationDiverged, match="parameters stay as iteration") as caught:
        pcfast.incremental_step(model, x, y, optimizer, num_steps=200, backend=backend)
    assert caught.value.iteration == len(steps) + 1
    assert apart(parameters(model), steps[-1]) == 0
    assert all(bool(torch.isfinite(p).all()) for p in steps[-1])


@pytest.mark.parametrize("belief_optimizer", [GradientDescent(0.9), GradientDescent(0.35, 9.0)], ids=repr)
@pytest.mark.parametrize(
    "step_size", [30.0, (0.1, 0.1, *(40.0 + t for t in range(198)))], ids=["eta", "schedule"]
)
def test_beliefs_that_run_away_are_reported(step_size, belief_optimizer):
    result = []
    for backend in BACKENDS:
        model, x, y = tanh_net()
        model, x, steps_done = model.float(), x.float(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
        optimizer.register_step_post_hook(lambda *_, done=steps_done: done.append(1))
        settings_of = dict(
            step_size=step_size, num_steps=200, belief_optimizer=belief_optimizer, backend=backend
        )
        with pytest.raises(pcfast.RelaxationDiverged, match="parameters stay as iteration") as caught:
            pcfast.incremental_step(model, x, y, optimizer, **settings_of)
        error = caught.value
        eta = step_size[error.iteration - 1] if isinstance(step_size, tuple) else step_size
        assert (
            f"diverged in iteration {error.iteration} at layer {error.layer} with step size {eta:g}"
            in str(error)
        )
        assert error.iteration == len(steps_done) + 1
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        result.append(error.iteration)
    # the literal loop and its deviations overflow within an iteration of each other
    assert abs(result[0] - result[1]) <= 1


def test_deferred_divergence_zeroes_updates_and_is_reported_later():
    model, x, y, optimizer = diverging()
    pcfast.incremental_step(model, x, y, optimizer, num_steps=200, backend="eager", check="deferred")
    assert all(bool(torch.isfinite(p).all()) and not bool(p.grad.any()) for p in model.parameters())
    with pytest.raises(pcfast.RelaxationDiverged) as caught:
        pcfast.synchronize()
    model, x, y, optimizer = diverging()
    with pytest.raises(pcfast.RelaxationDiverged) as at_once:
        pcfast.incremental_step(model, x, y, optimizer, num_steps=200, backend="eager")
    assert (caught.value.iteration, caught.value.layer) == (at_once.value.iteration, at_once.value.layer)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_deferred_bad_labels_move_nothing(num_steps):
    model, x, y = tanh_net()
    before = parameters(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    settings_of = dict(num_steps=num_steps, backend="eager", check="deferred")
    pcfast.incremental_step(model, x, torch.full_like(y, 9), optimizer, **settings_of)
    assert apart(parameters(model), before) == 0
    with pytest.raises(pcfast.ArgumentError, match="labels out of range"):
        pcfast.synchronize()


def test_deferred_checks_change_no_number():
    result = []
    for check in ("sync", "deferred", "off"):
        model, x, y = tanh_net()
        pcfast.incremental_step(
            model, x, y, OPTIMIZERS["adam"](model.parameters()), check=check, backend="eager"
        )
        pcfast.synchronize()
        result.append(parameters(model))
    assert apart(result[0], result[1]) == apart(result[0], result[2]) == 0


# Training -------------------------------------------------------------------------------------------------------


def toy_run(out=None, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2)), nn.Linear(12, 3))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(120, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    data = datasets.Data(x[:90], y[:90], x[90:], y[90:])
    arguments = dict(epochs=3, batch_size=20, num_steps=4, method="incremental", progress=False, out=out)
    return model, training.train(model, data, **{**arguments, **changes})


@pytest.mark.parametrize("belief_optimizer", [None, GradientDescent(0.35)], ids=["plain", "momentum"])
def test_training_resumes_bit_by_bit(belief_optimizer, tmp_path):
    model, history = toy_run(tmp_path / "whole", belief_optimizer=belief_optimizer)
    toy_run(tmp_path / "parts", epochs=1, belief_optimizer=belief_optimizer)
    again, resumed = toy_run(tmp_path / "parts", resume=True, belief_optimizer=belief_optimizer)
    assert resumed.train_loss == history.train_loss
    assert apart(parameters(model), parameters(again)) == 0
    assert history.train_loss[-1] < history.train_loss[0]
    for changes, words in (
        ({"method": "strict"}, "method is incremental there, strict here"),
        ({"belief_optimizer": GradientDescent(0.45)}, "belief_optimizer is .* there, .*momentum=0.45.* here"),
    ):
        with pytest.raises(pcfast.ArgumentError, match=words):
            toy_run(tmp_path / "parts", resume=True, **{"belief_optimizer": belief_optimizer, **changes})


def test_training_refuses_what_does_not_fit_before_it_starts(tmp_path):
    with pytest.raises(pcfast.ArgumentTypeError, match=r"^belief_optimizer: got 'adam'.*pcfast\.Adam"):
        toy_run(tmp_path / "run", belief_optimizer="adam")
    with pytest.raises(pcfast.ArgumentError, match=r"^nudging: got .* with method 'incremental'"):
        toy_run(tmp_path / "run", nudging=pcfast.Nudging(), loss=nn.MSELoss())
    with pytest.raises(pcfast.ArgumentTypeError, match="bfloat16 autocast with method 'incremental'"):
        toy_run(tmp_path / "run", precision="bf16")
    with pytest.raises(pcfast.BackendError, match="triton"):
        toy_run(tmp_path / "run", backend="triton")
    assert not (tmp_path / "run").exists()


def test_the_command_trains_digits(tmp_path, capsys):
    arguments = ["train", "--method", "incremental", "--epochs", "5", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    accuracy = float(
        capsys.readouterr().out.splitlines()[-1].removeprefix("test accuracy ").removesuffix("%")
    )
    assert accuracy >= 95
