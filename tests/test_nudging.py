"""Nudging: positive, negative and centred, against relaxations towards targets written out by hand."""

from __future__ import annotations

import pytest
import torch
from accuracy import ULP, assert_gradients_agree, assert_states_agree
from drawing import examples
from energy import relax_by_optimizer
from hypothesis import assume, given
from hypothesis import strategies as st
from networks_for_tests import architectures
from torch import nn

import pcfast
from pcfast import Adam, GradientDescent, Nudging

BOTH = pytest.mark.parametrize("backend", ["reference", "eager"])
KINDS = ("positive", "negative", "centred")


def net() -> nn.Sequential:
    """Wide in front, so that layer 1 runs in Gram form."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(20, 40), nn.Tanh()),
        nn.Sequential(nn.Linear(40, 12), nn.Sigmoid()),
        nn.Sequential(nn.Linear(12, 10), nn.Tanh()),
        nn.Linear(10, 3),
    ).double()


def data(rows: int = 7):
    return torch.randn(rows, 20, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)


def gradients(model, x, y, **arguments):
    """Parameter -> update, from pc_loss."""
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **{"loss": "mse", **arguments}).backward()
    return {p: p.grad.clone() for p in model.parameters()}


def by_hand(model, x, y, kind, beta, *, loss, make=torch.optim.SGD, step_sizes=(0.1,) * 20):
    """Parameter -> update: torch.optim on the energy, the target nudged, and the states of the first relaxation."""
    with torch.no_grad():
        vhat = model(x)
    signs = {"positive": (1,), "negative": (-1,), "centred": (1, -1)}[kind]
    result = [
        (sign, relax_by_optimizer(
            model, x, vhat - sign * beta * (vhat - y), loss=loss, step_sizes=step_sizes, make=make
        ))
        for sign in signs
    ]  # fmt: skip
    updates = {
        parameter: sum(run.gradients[name] / (sign * beta) for sign, run in result) / len(result)
        for name, parameter in model.named_parameters()
    }
    return updates, result[0][1]


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_towards_the_nudged_target(kind, beta, reduction, backend):
    model, (x, y) = net(), data()
    loss = nn.MSELoss(reduction=reduction)
    truth, states = by_hand(model, x, y, kind, beta, loss=loss)
    arguments = dict(loss=loss, nudging=Nudging(kind, beta), backend=backend)
    result = gradients(model, x, y, **arguments)
    plan = pcfast.last_run().plan
    assert plan.backend == backend and plan.relaxations == (2 if kind == "centred" else 1)
    assert plan.gram == (backend == "eager")
    # rounding of beliefs counts 1 / beta times
    assert_gradients_agree(result, truth, model, states, 20 * max(1, 1 / beta))
    if kind != "centred":
        relaxed = pcfast.relax(model, x, y, energies=True, **arguments)
        assert_states_agree(relaxed, states, 20)
        away = (1 if kind == "positive" else -1) * beta * (relaxed.activations[-1] - y)
        first = float(loss(relaxed.activations[-1], relaxed.activations[-1] - away))
        assert float(relaxed.energies[0, -1]) == pytest.approx(first, rel=1e-12)


@BOTH
def test_positive_nudging_all_the_way_is_the_relaxation_towards_the_target(backend):
    model, (x, y) = net(), data()
    plain = gradients(model, x, y, backend=backend)
    nudged = gradients(model, x, y, backend=backend, nudging=Nudging("positive", 1.0))
    for p, update in plain.items():
        # vhat - (vhat - y) rounds y by an ulp of vhat
        assert float((nudged[p] - update).norm()) <= 64 * ULP * 20 * max(float(update.norm()), 1.0)


@BOTH
@pytest.mark.parametrize("num_steps", [0, 20])
def test_the_returned_loss_is_the_forward_passs(backend, num_steps):
    model, (x, y) = net(), data()
    truth = nn.functional.mse_loss(model(x), y)
    for kind in KINDS:
        nudging = Nudging(kind, 0.3)
        arguments = dict(loss="mse", num_steps=num_steps, nudging=nudging, backend=backend)
        loss, output = pcfast.pc_loss(model, x, y, return_output=True, **arguments)
        assert loss.item() == pytest.approx(truth.item(), rel=1e-14)
        torch.testing.assert_close(output, model(x).detach(), rtol=1e-14, atol=0)
        with torch.no_grad():
            assert float(pcfast.pc_loss(model, x, y, **arguments)) == pytest.approx(float(truth), rel=1e-14)


@BOTH
def test_small_nudges_give_the_limit_and_centring_cancels_the_first_order(backend):
    """U(beta) / beta = U' + beta U'' / 2 + ...: the sides miss U' by O(beta), their mean by O(beta^2)."""
    model, (x, y) = net(), data()
    loss = nn.MSELoss(reduction="sum")

    def update(kind, beta):
        result = gradients(model, x, y, loss=loss, nudging=Nudging(kind, beta), backend=backend)
        return torch.cat([g.flatten() for g in result.values()])

    limit = update("centred", 1e-3)
    for kind, order in (("positive", 1), ("negative", 1), ("centred", 2)):
        far, near = (float((update(kind, beta) - limit).norm()) for beta in (0.2, 0.1))
        assert far / near == pytest.approx(2**order, rel=0.15), kind


@BOTH
def test_parts_of_a_batch_add_up_with_a_normalizer(backend):
    model, (x, y) = net(), data(9)
    arguments = dict(nudging=Nudging("centred", 0.2), backend=backend)
    whole = gradients(model, x, y, **arguments)
    parts = [
        gradients(model, x[rows], y[rows], normalizer=9, **arguments) for rows in (slice(4), slice(4, 9))
    ]
    for p, update in whole.items():
        assert float((parts[0][p] + parts[1][p] - update).norm()) <= 1e-11 * float(update.norm())


@examples(60)
@given(
    architecture=architectures(),
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from((0.05, 0.3, 1.0, 1.5)),
    reduction=st.sampled_from(("mean", "sum")),
    optimizer=st.sampled_from((None, GradientDescent(0.8), GradientDescent(0.5, 0.1), Adam(eps=1.0))),
    num_steps=st.integers(0, 15),
    step_size=st.sampled_from((0.05, 0.1, 0.3)),
    from_start=st.booleans(),
    batch=st.sampled_from((1, 2, 5)),
    seed=st.integers(0, 10**6),
)
def test_eager_equals_reference(
    architecture, kind, beta, reduction, optimizer, num_steps, step_size, from_start, batch, seed
):
    model, shape = architecture
    torch.manual_seed(seed)
    for parameter in model.parameters():  # the strategy's draws do not seed torch
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    y = torch.randn(batch, model[-1].out_features, dtype=torch.float64)
    arguments = dict(
        loss=nn.MSELoss(reduction=reduction),
        num_steps=num_steps,
        step_size=step_size,
        belief_optimizer=optimizer,
    )
    if from_start:
        vhat = pcfast.relax(model, x, y, num_steps=0, loss="mse").activations
        arguments["vinit"] = [None, *(v + 0.1 * torch.randn_like(v) for v in vhat[1:])]
    side = Nudging("positive" if kind == "centred" else kind, beta)
    try:
        truth = pcfast.relax(model, x, y, backend="reference", nudging=side, **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)
    # a relaxation that runs away amplifies rounding without bound
    assume(all(e is None or float(e.norm()) < 1e3 for e in truth.errors))
    result = pcfast.relax(model, x, y, backend="eager", nudging=side, **arguments)
    # momentum sums gradients; Adam divides by eps at most
    counted = num_steps * (5 if isinstance(optimizer, GradientDescent) else 2)
    assert_states_agree(result, truth, counted)
    nudging = Nudging(kind, beta)
    assert_gradients_agree(
        gradients(model, x, y, backend="eager", nudging=nudging, **arguments),
        gradients(model, x, y, backend="reference", nudging=nudging, **arguments),
        model,
        truth,
        max(counted, 1) * max(1, 1 / beta),
    )


def test_small_nudges_in_float32_keep_their_digits():
    """eager never subtracts mu_L and its target; the literal loop loses 1 / beta of its digits."""
    model, (x, y) = net(), data(50)
    nudging = Nudging("centred", 1e-3)
    truth = [g.clone() for g in gradients(model, x, y, nudging=nudging, backend="reference").values()]
    model.float()
    errors = {}
    for backend in ("eager", "reference"):
        result = gradients(model, x.float(), y.float(), nudging=nudging, backend=backend).values()
        errors[backend] = max(
            float((g.double() - t).norm() / t.norm()) for g, t in zip(result, truth, strict=True)
        )
    # 20 iterations, each with products over at most 40 terms
    assert errors["eager"] <= 20 * 40**0.5 * 2**-24
    assert errors["reference"] > 10 * errors["eager"]


def test_dropout_and_batchnorm_are_evaluated_once_a_step_for_both_relaxations():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.4)),
        nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Tanh()),
        nn.Linear(8, 3),
    ).double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    result = []
    for backend in ("reference", "eager"):
        torch.manual_seed(5)
        tracked = int(model[1][1].num_batches_tracked)
        update = gradients(model, x, y, nudging=Nudging("centred", 0.5), backend=backend)
        assert int(model[1][1].num_batches_tracked) == tracked + 1
        result.append(update)
    for p, update in result[0].items():
        assert float((result[1][p] - update).norm()) <= 1e-11 * max(float(update.norm()), 1e-2)


def test_a_relaxation_that_diverges_on_either_side_raises():
    model, (x, y) = net(), data()
    for kind in KINDS:
        for how in ({"backend": "reference"}, {"backend": "eager"}, {"check": "deferred"}):
            with pytest.raises(pcfast.RelaxationDiverged, match="in iteration"):
                pcfast.pc_loss(
                    model, x, y, loss="mse", step_size=1e6, num_steps=99, nudging=Nudging(kind), **how
                )
                pcfast.synchronize()


# Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "argument", "words"),
    [
        (lambda: Nudging("up"), "kind", ("'up'", "centred")),
        (lambda: Nudging("negative", 0.0), "beta", ("0.0", "> 0", "divided")),
        (lambda: Nudging("positive", -0.1), "beta", ("-0.1", 'kind="negative"')),
        (lambda: Nudging("positive", float("nan")), "beta", ("nan",)),
        (lambda: Nudging("positive", "1"), "beta", ("'1' (str)",)),
    ],
)
def test_bad_nudges_are_refused(make, argument, words):
    with pytest.raises(pcfast.ArgumentError) as caught:
        make()
    assert caught.value.argument == argument
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("call", [pcfast.pc_loss, pcfast.relax, pcfast.PredictiveCoding])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "fixed_prediction"}, ("fixed_prediction", "linear", "needed: method strict")),
        ({"method": "exact"}, ("exact", "linear")),
        ({"loss": "cross_entropy"}, ("not mse", 'loss="mse"')),
        ({"loss": lambda output, y: (output - y).square().mean()}, ("not mse",)),
        ({"nudging": "centred"}, ("'centred' (str)", "pcfast.Nudging")),
        ({"nudging": 0.1}, ("0.1 (float)",)),
    ],
    ids=["fixed_prediction", "exact", "cross_entropy", "callable", "str", "float"],
)
def test_bad_combinations_are_refused(call, settings, words):
    model, (x, y) = net(), data()
    arguments = {"loss": "mse", "nudging": Nudging(), **settings}
    with pytest.raises(pcfast.ArgumentError) as caught:
        call(model, *(() if call is pcfast.PredictiveCoding else (x, y)), **arguments)
    assert caught.value.argument == "nudging"
    for word in words:
        assert word in str(caught.value)


def test_relax_refuses_two_relaxations_at_once():
    with pytest.raises(pcfast.ArgumentError, match="two relaxations"):
        pcfast.relax(net(), *data(), loss="mse", nudging=Nudging("centred"))


def test_beta_grows_to_one():
    nudging = Nudging("negative", 0.2)
    assert [nudging.grown(0.3, epoch).beta for epoch in range(5)] == pytest.approx([0.2, 0.5, 0.8, 1.0, 1.0])
    assert Nudging("positive", 2.0).grown(0.5, 3).beta == 2.0
    assert nudging.grown(0.0, 100) == nudging
