"""reference and eager agree in float64 on random architectures, losses, methods, n and eta."""

import pytest
import torch
from accuracy import amplifies_rounding, assert_gradients_agree, assert_states_agree
from drawing import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from networks_for_tests import LOSSES, architectures, loss_and_target, residual_networks
from torch import nn

import pcfast
from pcfast.checking.bounds import allowed_error, relative_error


def gradients(model, x, y, **arguments):
    """Parameter -> update, from pc_loss."""
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **arguments).backward()
    return {p: p.grad.clone() for p in model.parameters()}


problems = dict(
    loss_name=st.sampled_from(LOSSES),
    method=st.sampled_from(
        ("exact", "fixed_prediction", *["strict"] * 2, *["error_based"] * 2, "zero_divergence")
    ),
    num_steps=st.one_of(st.integers(0, 8), st.integers(9, 40)),
    step_size=st.sampled_from((0.0, 0.05, 0.1, 0.3, 0.5, 1.0)),
    batch=st.sampled_from((1, 2, 5, 17)),
    seed=st.integers(0, 10**6),
)


@examples(90)
@given(architecture=architectures(), **problems)
def test_eager_equals_reference(architecture, **problem):
    assert_agreement(*architecture, **problem)


@examples(90)
@given(architecture=residual_networks(), **problems)
def test_eager_equals_reference_with_residual_blocks(architecture, **problem):
    model, shape = architecture
    if problem["batch"] < 5:
        model.eval()  # the variance of one or two values may vanish
    assert_agreement(model, shape, **problem)


def assert_agreement(model, shape, loss_name, method, num_steps, step_size, batch, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():  # the strategies' draws do not seed torch
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, batch, model[-1].out_features)
    arguments = dict(loss=loss, method=method, step_size=step_size, num_steps=num_steps)
    try:
        truth = pcfast.relax(model, x, y, backend="reference", **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)  # what happens then has tests of its own
    assume(not amplifies_rounding(model, x, y, truth, num_steps, **arguments))
    result = pcfast.relax(model, x, y, backend="eager", **arguments)
    assert (truth.run.plan.backend, result.run.plan.backend) == ("reference", "eager")
    assert_states_agree(result, truth, num_steps)
    assert relative_error(result.loss, truth.loss) < 1e-13
    for v, v_true in zip(result.activations, truth.activations, strict=True):
        assert float((v - v_true).norm()) <= allowed_error(v_true, v_true, 1)
    assert_gradients_agree(
        gradients(model, x, y, backend="eager", **arguments),
        gradients(model, x, y, backend="reference", **arguments),
        model,
        truth,
        num_steps,
    )


@pytest.mark.parametrize("backend", ["reference", "eager"])
@given(architecture=architectures(), extra=st.integers(0, 5), seed=st.integers(0, 10**6))
@examples(25)
def test_fixed_prediction_with_unit_steps_is_backpropagation(backend, architecture, extra, seed):
    """eta = 1 and n >= L: the theorem of Millidge et al. (2020), Rosenbaum (2022) section "fixed prediction"."""
    model, shape = architecture
    torch.manual_seed(seed)
    x = torch.randn(5, *shape, dtype=torch.float64)
    y = torch.randint(0, model[-1].out_features, (5,))
    result = gradients(
        model, x, y, method="fixed_prediction", step_size=1.0, num_steps=len(model) + extra, backend=backend
    )
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for parameter in model.parameters():
        # the literal loop forms eps = vhat - v, which rounds at the scale of vhat
        tolerance = 1e-13 if backend == "eager" else 1e-9
        assert float((result[parameter] - parameter.grad).norm()) <= tolerance * max(
            float(parameter.grad.norm()), 1e-3
        )
