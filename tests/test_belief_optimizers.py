"""Momentum, weight decay, schedules and Adam for beliefs, against derivations that share no code with pcfast."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from accuracy import ULP, amplification, assert_gradients_agree, assert_states_agree
from drawing import examples
from energy import energy, relax_by_optimizer
from hypothesis import assume, given
from hypothesis import strategies as st
from literal import feedback
from networks_for_tests import LOSSES, architectures, belief_optimizers, loss_and_target
from plans import planned
from torch import nn

import pcfast
from pcfast import Adam, GradientDescent
from pcfast.backends import BACKENDS
from pcfast.backends.cuda import backend as cuda
from pcfast.backends.triton import backend as triton

BOTH = pytest.mark.parametrize("backend", ["reference", "eager"])
WANING = tuple(0.1 / (1 + 0.2 * t) for t in range(20))


def gradients(model, x, y, **arguments):
    """Parameter -> update, from pc_loss."""
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **arguments).backward()
    return {p: p.grad.clone() for p in model.parameters()}


# Against torch.optim on the energy ------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    """Wide in front, so that layer 1 runs in Gram form."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(20, 40), nn.Tanh()),
        nn.Sequential(nn.Linear(40, 12), nn.Sigmoid()),
        nn.Sequential(nn.Linear(12, 10), nn.Tanh()),
        nn.Linear(10, 3),
    ).double()


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 3, 3), nn.Tanh(), nn.Flatten()),
        nn.Linear(27, 3),
    ).double()


NETS = {"mlp": (mlp, (7, 20)), "cnn": (cnn, (4, 1, 12, 12))}
OPTIMIZERS = {
    "momentum": (GradientDescent(0.8), 0.1, lambda p: torch.optim.SGD(p, momentum=0.8)),
    "schedule": (GradientDescent(), WANING, torch.optim.SGD),
    "momentum and schedule": (GradientDescent(0.5), WANING, lambda p: torch.optim.SGD(p, momentum=0.5)),
    "decay": (
        GradientDescent(weight_decay=0.2),
        0.1,
        lambda p: torch.optim.SGD(p, weight_decay=0.2),
    ),
    "momentum, decay and schedule": (
        GradientDescent(0.7, 0.05),
        WANING,
        lambda p: torch.optim.SGD(p, momentum=0.7, weight_decay=0.05),
    ),
    "adam": (Adam(), 0.01, torch.optim.Adam),
    "adam, other betas": (
        Adam((0.0, 0.5), eps=1e-3),
        WANING,
        lambda p: torch.optim.Adam(p, betas=(0.0, 0.5), eps=1e-3),
    ),
}


@BOTH
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_beliefs_move_as_torch_optim_moves_them(name, net, num_steps, backend):
    optimizer, step_size, make = OPTIMIZERS[name]
    build, shape = NETS[net]
    model, x = build(), torch.randn(*shape, dtype=torch.float64)
    y = torch.randint(0, 3, (shape[0],))
    loss = nn.CrossEntropyLoss(reduction="sum")
    schedule = step_size[:num_steps] if isinstance(step_size, tuple) else (step_size,) * num_steps
    truth = relax_by_optimizer(model, x, y, loss=loss, step_sizes=schedule, make=make)
    arguments = dict(
        loss=loss,
        belief_optimizer=optimizer,
        step_size=schedule if isinstance(step_size, tuple) else step_size,
        num_steps=num_steps,
        backend=backend,
    )
    result = pcfast.relax(model, x, y, **arguments)
    plan = pcfast.last_run().plan
    assert plan.backend == backend and plan.belief_optimizer == optimizer
    if backend == "eager" and num_steps == 20:
        assert plan.gram == optimizer.linear, plan.gram_reason
    counted = num_steps * amplification(optimizer, step_size)
    assert_states_agree(result, truth, counted)
    names = {parameter: name for name, parameter in model.named_parameters()}
    updates = {p: truth.gradients[name] for p, name in names.items()}
    assert_gradients_agree(gradients(model, x, y, **arguments), updates, model, truth, counted)


def test_beliefs_that_no_error_has_reached_stay_where_adam_would_move_any_rounding():
    model, x, y = mlp().float(), torch.randn(7, 20), torch.randint(0, 3, (7,))
    for backend in ("reference", "eager"):
        result = pcfast.relax(model, x, y, belief_optimizer=Adam(), num_steps=2, backend=backend)
        moved = [not torch.equal(*pair) for pair in zip(result.beliefs, result.activations, strict=True)]
        assert moved == [False, False, True, True, False]


# Linear chains ---------------------------------------------------------------------------------------------------


def block_hessian(weights: list[torch.Tensor]) -> torch.Tensor:
    """d^2F/dz^2 for z = (v_1, ..., v_{L-1}) of one sample and a sum of squares at the output: block tridiagonal."""
    sizes = [len(w) for w in weights[:-1]]
    ends = np.cumsum([0, *sizes])
    hessian = torch.eye(ends[-1], dtype=torch.float64)
    for l, above in enumerate(weights[1:]):
        own = slice(ends[l], ends[l + 1])
        factor = 2.0 if l == len(weights) - 2 else 1.0  # d(mu - y)^2 = 2 (mu - y)
        hessian[own, own] += factor * above.T @ above
        if l + 1 < len(sizes):
            next = slice(ends[l + 1], ends[l + 2])
            hessian[next, own] = -above
            hessian[own, next] = -above.T
    return hessian


@BOTH
@pytest.mark.parametrize(
    ("momentum", "decay", "step_size"),
    [(0.0, 0.0, 0.1), (0.9, 0.0, 0.05), (0.6, 0.0, WANING), (0.0, 0.3, 0.1), (0.5, 0.1, WANING)],
)
def test_a_linear_chain_is_a_matrix_recursion(backend, momentum, decay, step_size):
    """(z, m) moves by one matrix an iteration about the energy's stationary point."""
    n, sizes = 20, [6, 9, 7, 5, 4]
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)))
    model.double()
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weights = [layer.weight.detach() for layer in model]
    hessian = block_hessian(weights)
    # at z = 0 only v_1's prediction and the output's error are there
    slope = torch.zeros(3, len(hessian), dtype=torch.float64)
    slope[:, : sizes[1]] = -x @ weights[0].T
    slope[:, -sizes[-2] :] -= 2 * y @ weights[-1]
    vhat = [x]
    for w in weights:
        vhat.append(vhat[-1] @ w.T)
    size = len(hessian)
    curved = hessian + decay * torch.eye(size, dtype=torch.float64)
    rest = torch.linalg.solve(curved, -slope.T)
    state = torch.cat([torch.cat(vhat[1:-1], 1).T - rest, torch.zeros(size, 3, dtype=torch.float64)])
    before = state
    eye = torch.eye(size, dtype=torch.float64)
    for t in range(n):
        eta = step_size[t] if isinstance(step_size, tuple) else step_size
        step = torch.cat([torch.cat([eye - eta * curved, -eta * momentum * eye], 1),
                          torch.cat([curved, momentum * eye], 1)])  # fmt: skip
        before, state = state, step @ state
    ends = np.cumsum(sizes[1:-1])[:-1].tolist()
    after, last = ([x, *torch.tensor_split((s[:size] + rest).T, ends, dim=1)] for s in (state, before))
    errors = [last[l] @ weights[l].T - last[l + 1] for l in range(3)] + [2 * (last[3] @ weights[3].T - y)]

    arguments = dict(
        loss=nn.MSELoss(reduction="sum"),
        belief_optimizer=GradientDescent(momentum, decay),
        step_size=step_size,
        num_steps=n,
        backend=backend,
    )
    result = pcfast.relax(model, x, y, **arguments)
    updates = gradients(model, x, y, **arguments)
    # the solve and both recursions: each rounds once an iteration at the scale of the beliefs
    bound = 64 * ULP * n / (1 - momentum) * float(torch.linalg.cond(curved))
    for l in range(4):
        scale = float(after[l].norm())
        assert float((result.beliefs[l] - after[l]).norm()) <= bound * scale, l
        assert float((result.errors[l + 1] - errors[l]).norm()) <= bound * max(scale, float(errors[l].norm()))
        truth = errors[l].T @ after[l]
        allowed = 2 * bound * scale * max(scale, float(errors[l].norm()))
        assert float((updates[model[l].weight] - truth).norm()) <= allowed, l


@BOTH
def test_one_step_is_the_finite_difference_of_the_energy(backend):
    model, decay, eta, h = mlp(), 0.3, 0.01, 1e-5
    x, y = torch.randn(2, 20, dtype=torch.float64), torch.randint(0, 3, (2,))
    loss = nn.CrossEntropyLoss(reduction="sum")
    start = [
        v + 0.1 * torch.randn_like(v) if l else v for l, v in enumerate(pcfast.relax(model, x, y).activations)
    ]
    result = pcfast.relax(
        model, x, y, loss=loss, vinit=start, num_steps=1, step_size=eta, backend=backend,
        belief_optimizer=GradientDescent(0.9, decay),
    )  # fmt: skip

    def regularised(beliefs):
        return float(energy(model, beliefs, y, loss)) + 0.5 * decay * sum(
            float(v.square().sum()) for v in beliefs[1:]
        )

    with torch.no_grad():
        for l in (1, 2, 3):
            slope = (start[l] - result.beliefs[l]) / eta
            for index in ((0, 0), (1, 4), (1, start[l].shape[1] - 1)):
                values = []
                for sign in (1, -1):
                    moved = [v.clone() for v in start[:-1]]
                    moved[l][index] += sign * h
                    values.append(regularised(moved))
                # truncation h^2 F''' / 6 and rounding ULP F / h: 1e-10 each at F about 10
                assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(slope[index]), abs=1e-8)


# Fixed prediction -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("num_steps", [0, 1, 3, 20])
@pytest.mark.parametrize(
    ("momentum", "step_size"),
    [(0.9, 0.1), (0.0, WANING), (0.5, WANING)],
    ids=["momentum", "schedule", "both"],
)
def test_fixed_prediction_keeps_its_closed_form(momentum, step_size, num_steps, net, backend):
    build, shape = NETS[net]
    model, x = build(), torch.randn(*shape, dtype=torch.float64)
    y, depth = torch.randint(0, 3, (shape[0],)), len(model)
    vhat = [x]
    for layer in model:
        vhat.append(layer(vhat[-1]).detach())
    leaf = vhat[-1].clone().requires_grad_()
    (top,) = torch.autograd.grad(nn.functional.cross_entropy(leaf, y), leaf)
    v, m = [value.clone() for value in vhat], [0.0] * depth
    errors = [vhat[l] - v[l] for l in range(depth)] + [top]
    for t in range(num_steps):
        errors = [vhat[l] - v[l] for l in range(depth)] + [top]
        for l in range(depth):
            m[l] = momentum * m[l] + feedback(model[l], vhat[l], errors[l + 1]) - errors[l]
            v[l] = v[l] - (step_size[t] if isinstance(step_size, tuple) else step_size) * m[l]
    result = pcfast.relax(
        model, x, y, method="fixed_prediction", num_steps=num_steps, backend=backend,
        step_size=step_size[:num_steps] if isinstance(step_size, tuple) else step_size,
        belief_optimizer=GradientDescent(momentum),
    )  # fmt: skip
    assert result.run.plan.backend == backend
    for l in range(depth + 1):
        bound = 64 * ULP * max(num_steps, 1) / (1 - momentum) * float(vhat[l].norm())
        assert float((result.beliefs[l] - v[l]).norm()) <= bound, l
        assert float((result.errors[l] - errors[l]).norm()) <= bound, l


@pytest.mark.parametrize("optimizer", [GradientDescent(weight_decay=0.1), Adam()], ids=["decay", "adam"])
def test_fixed_prediction_without_a_closed_form_runs_literally(optimizer):
    model, x = mlp(), torch.randn(7, 20, dtype=torch.float64)
    y = torch.randint(0, 3, (7,))
    arguments = dict(method="fixed_prediction", belief_optimizer=optimizer, step_size=0.05, num_steps=6)
    result = pcfast.relax(model, x, y, **arguments)
    assert result.run.plan.backend == "reference"
    assert "no closed form" in dict(result.run.plan.refusals)["eager"]
    with pytest.raises(pcfast.BackendError, match="no closed form"):
        pcfast.relax(model, x, y, backend="eager", **arguments)
    # layer L-1 alone: its feedback is constant, so it descends a quadratic that torch.optim can have
    leaf = result.activations[3].clone().requires_grad_()
    pull = feedback(model[3], result.activations[3], result.errors[4])
    make = torch.optim.Adam if isinstance(optimizer, Adam) else torch.optim.SGD
    by_torch = make([leaf], lr=0.05, weight_decay=optimizer.weight_decay)
    for _ in range(6):
        leaf.grad = leaf.detach() - result.activations[3] + pull
        by_torch.step()
    bound = 64 * ULP * 6 * amplification(optimizer, 0.05) * float(result.beliefs[3].norm())
    assert float((leaf.detach() - result.beliefs[3]).norm()) <= bound


# reference == eager ---------------------------------------------------------------------------------------------


@examples(60)
@given(
    architecture=architectures(),
    loss_name=st.sampled_from(LOSSES),
    method=st.sampled_from(("fixed_prediction", "strict", "strict")),
    optimizer=belief_optimizers,
    sizes=st.one_of(
        st.tuples(st.sampled_from((0.0, 0.05, 0.1, 0.3)), st.integers(0, 20)),
        st.lists(st.sampled_from((0.0, 0.03, 0.1, 0.2)), max_size=12),
    ),
    from_start=st.booleans(),
    batch=st.sampled_from((1, 2, 5, 17)),
    seed=st.integers(0, 10**6),
)
def test_eager_equals_reference(architecture, loss_name, method, optimizer, sizes, from_start, batch, seed):
    model, shape = architecture
    torch.manual_seed(seed)
    for parameter in model.parameters():  # the strategy's draws do not seed torch
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, batch, model[-1].out_features)
    step_size, num_steps = sizes if isinstance(sizes, tuple) else (sizes, len(sizes))
    assume(method == "strict" or optimizer.linear)
    arguments = dict(
        loss=loss, method=method, step_size=step_size, num_steps=num_steps, belief_optimizer=optimizer
    )
    if from_start and method == "strict":
        vhat = pcfast.relax(model, x, y, num_steps=0, loss=loss).activations
        arguments["vinit"] = [None, *(v + 0.1 * torch.randn_like(v) for v in vhat[1:])]
    try:
        truth = pcfast.relax(model, x, y, backend="reference", energies=True, **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)
    # a relaxation that runs away amplifies rounding without bound
    assume(all(e is None or float(e.norm()) < 1e3 for e in truth.errors))
    for energies in (False, True):  # with and without the Gram form
        result = pcfast.relax(model, x, y, backend="eager", energies=energies, **arguments)
        assert (truth.run.plan.backend, result.run.plan.backend) == ("reference", "eager")
        counted = num_steps * amplification(optimizer, step_size if num_steps else 0.0)
        assert_states_agree(result, truth, counted)
    if num_steps:
        scale = 1 + float(truth.energies.abs().max()) + max(float(v.norm()) ** 2 for v in truth.beliefs)
        allowed = 64 * ULP * counted * scale
        assert float((result.energies - truth.energies).abs().max()) <= allowed
    assert_gradients_agree(
        gradients(model, x, y, backend="eager", **arguments),
        gradients(model, x, y, backend="reference", **arguments),
        model,
        truth,
        counted,
    )


def test_none_is_plain_gradient_descent_and_a_constant_schedule_one_step_size():
    model, x, y = mlp().float(), torch.randn(7, 20), torch.randint(0, 3, (7,))
    plain = gradients(model, x, y, step_size=0.1, num_steps=5)
    for same in (
        {"belief_optimizer": GradientDescent()},
        {"step_size": [0.1] * 5},
        {"step_size": np.full(5, 0.1)},
        {"step_size": torch.full((5,), 0.1, dtype=torch.float64)},
    ):
        result = gradients(model, x, y, **{"step_size": 0.1, "num_steps": 5, **same})
        assert all(torch.equal(result[p], plain[p]) for p in plain)
    assert gradients(model, x, y, step_size=[], num_steps=0)


def test_float32_loses_no_more_with_momentum_than_without():
    """Deviation form throughout: belief form would lose 1e-7 of a belief in errors of 1e-4 of it."""
    model, x, y = mlp(), torch.randn(300, 20, dtype=torch.float64), torch.randint(0, 3, (300,))
    for optimizer, step_size in ((GradientDescent(0.9), WANING), (Adam(eps=1e-4), 1e-4)):
        arguments = dict(belief_optimizer=optimizer, step_size=step_size)
        truth = gradients(model.double(), x, y, backend="reference", **arguments)
        truth = [g.clone() for g in truth.values()]
        result = gradients(model.float(), x.float(), y, backend="eager", **arguments)
        for g, expected in zip(result.values(), truth, strict=True):
            # 20 iterations, each with products over at most 40 terms
            assert float((g.double() - expected).norm()) <= 20 * 40**0.5 * 2**-24 * float(expected.norm())


# Divergence -----------------------------------------------------------------------------------------------------


RUNAWAY = {
    "momentum": {"belief_optimizer": GradientDescent(0.9), "step_size": 30.0},
    "decay": {"belief_optimizer": GradientDescent(0.0, 9.0), "step_size": 30.0},
    "schedule": {"step_size": (0.1, 0.1, *(40.0 + t for t in range(198)))},
}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("strict", name) for name in RUNAWAY),
        ("fixed_prediction", "momentum"),
        ("fixed_prediction", "schedule"),
    ],
)
def test_divergence_is_found_where_the_reference_finds_it(method, name):
    model, x, y = mlp().float(), torch.randn(7, 20), torch.randint(0, 3, (7,))
    sizes, result = RUNAWAY[name]["step_size"], []
    for backend in ("reference", "eager"):
        with pytest.raises(pcfast.RelaxationDiverged) as caught:
            pcfast.pc_loss(model, x, y, method=method, num_steps=200, backend=backend, **RUNAWAY[name])
        error = caught.value
        result.append((error.iteration, error.layer))
        assert f"with step size {sizes if name != 'schedule' else sizes[error.iteration - 1]:g}." in str(
            error
        )
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error) and again.step_size == error.step_size == sizes
    if method == "strict":
        # the literal loop and its deviations overflow within an iteration of each other
        assert abs(result[0][0] - result[1][0]) <= 1
        with pytest.raises(pcfast.RelaxationDiverged, match="with step size"):
            pcfast.pc_loss(model, x, y, num_steps=200, check="deferred", **RUNAWAY[name])
            pcfast.synchronize()


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument", "words"),
    [
        (lambda: GradientDescent(momentum=1.0), "momentum", ("1.0", "[0, 1)", "never decays")),
        (lambda: GradientDescent(momentum=-0.1), "momentum", ("-0.1", "[0, 1)")),
        (lambda: GradientDescent(momentum=float("nan")), "momentum", ("nan",)),
        (lambda: GradientDescent(momentum="0.9"), "momentum", ("'0.9' (str)",)),
        (lambda: GradientDescent(weight_decay=-1e-3), "weight_decay", ("-0.001", ">= 0")),
        (lambda: GradientDescent(weight_decay=float("inf")), "weight_decay", ("inf",)),
        (lambda: Adam(betas=(0.9, 1.0)), "betas", ("1.0", "[0, 1)")),
        (lambda: Adam(betas=(-0.1, 0.9)), "betas", ("-0.1",)),
        (lambda: Adam(betas=0.9), "betas", ("0.9", "two numbers")),
        (lambda: Adam(betas=(0.9,)), "betas", ("two numbers",)),
        (lambda: Adam(eps=0.0), "eps", ("0.0", "> 0", "0 / 0")),
        (lambda: Adam(eps=True), "eps", ("True (bool)",)),
    ],
)
def test_bad_optimisers_are_refused(make, argument, words):
    with pytest.raises(pcfast.ArgumentError) as caught:
        make()
    assert caught.value.argument == argument
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("call", [pcfast.pc_loss, pcfast.relax, pcfast.PredictiveCoding, pcfast.explain])
@pytest.mark.parametrize(
    ("settings", "argument", "words"),
    [
        ({"belief_optimizer": "adam"}, "belief_optimizer", ("'adam'", "pcfast.Adam", "torch.optim")),
        ({"belief_optimizer": torch.optim.Adam}, "belief_optimizer", ("torch.optim",)),
        ({"belief_optimizer": Adam(), "method": "exact"}, "belief_optimizer", ("Adam(", "exact", "strict")),
        ({"belief_optimizer": GradientDescent(0.5), "method": "exact"}, "belief_optimizer", ("0.5",)),
        ({"step_size": [0.1] * 3, "num_steps": 4}, "step_size", ("3 numbers", "4", "step_size[t-1]")),
        ({"step_size": [0.1, -0.1], "num_steps": 2}, "step_size", ("-0.1", ">= 0")),
        ({"step_size": [0.1, "0.1"], "num_steps": 2}, "step_size", ("'0.1' (str)",)),
        ({"step_size": torch.ones(2, 2), "num_steps": 2}, "step_size", ("Tensor", "number >= 0")),
    ],
    ids=lambda value: None,
)
def test_bad_combinations_are_refused(call, settings, argument, words):
    model, x, y = mlp().float(), torch.randn(7, 20), torch.randint(0, 3, (7,))
    arguments = {pcfast.PredictiveCoding: (), pcfast.explain: ((7, 20),)}.get(call, (x, y))
    with pytest.raises(pcfast.ArgumentError) as caught:
        call(model, *arguments, **settings)
    assert caught.value.argument == argument
    for word in words:
        assert word in str(caught.value)


# What runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"belief_optimizer": GradientDescent(0.9)}, ""),
        (
            {"belief_optimizer": GradientDescent(0.9, 0.1)},
            "without weight decay, not by GradientDescent(momentum=0.9",
        ),
        ({"belief_optimizer": GradientDescent(weight_decay=0.1)}, "without weight decay, not by Gradient"),
        ({"belief_optimizer": Adam()}, "not by Adam"),
        ({"nudging": pcfast.Nudging()}, "no nudged target"),
        ({"method": "fixed_prediction", "belief_optimizer": Adam()}, "no closed form"),
        ({"method": "fixed_prediction", "belief_optimizer": GradientDescent(0.9)}, ""),
        ({}, ""),
    ],
)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_refuse_what_they_do_not_run(name, settings, reason, monkeypatch):
    monkeypatch.setattr(triton, "_unavailable", lambda *_: "")
    monkeypatch.setattr(cuda, "_unavailable", lambda *_: "")
    request = planned(mlp(), (7, 20), **settings)
    ok, why = BACKENDS[name].supports(request)
    assert ok == (not reason) and reason in why


def test_explain_says_how_beliefs_move_and_why_there_is_no_gram_form():
    model = mlp().float()
    result = pcfast.explain(model, (7, 20), belief_optimizer=GradientDescent(0.5, 0.1), step_size=WANING)
    assert "beliefs move by GradientDescent(momentum=0.5, weight_decay=0.1)" in repr(result)
    assert not result.plan.gram and "not linear" in result.plan.gram_reason
    assert "beliefs move by" not in repr(pcfast.explain(model, (7, 20)))
    assert pcfast.explain(model, (7, 20), belief_optimizer=GradientDescent(0.5)).plan.gram


def test_the_module_passes_its_settings_on():
    model, x, y = mlp().float(), torch.randn(7, 20), torch.randint(0, 3, (7,))
    optimizer = GradientDescent(0.5)
    pc = pcfast.PredictiveCoding(model, belief_optimizer=optimizer, step_size=[0.1, 0.05], num_steps=2)
    pc(x, y).backward()
    updates = [p.grad.clone() for p in model.parameters()]
    truth = gradients(model, x, y, belief_optimizer=optimizer, step_size=[0.1, 0.05], num_steps=2)
    assert all(map(torch.equal, updates, truth.values()))
    assert "step_size=(0.1, 0.05)" in repr(pc) and "GradientDescent(momentum=0.5" in repr(pc)
