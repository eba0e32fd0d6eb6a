"""pc_loss and PredictiveCoding in training: gradients, optimisers, AMP, losses, precisions, starts, threads.

Oracles: torch autograd of the same loss (method "exact"), hand-written numpy loops (linear nets), the literal
reference backend (strict), and plain arithmetic on the gradients of a first call.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import logging
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcfast
from pcfast.losses import half_squared_error
from pcfast.support import log

METHODS = ("exact", "fixed_prediction", "strict")
BACKENDS = ("eager", "reference")
ERR_TYPES = {"exact": "Exact", "fixed_prediction": "FixedPred", "strict": "Strict"}
STEPS = {"step_size": 0.2, "num_steps": 6}
CLASSES = 4


def mlp(dtype=torch.float64) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, CLASSES),
    ).to(dtype)


def batch(rows: int = 6, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5, dtype=dtype), torch.randint(0, CLASSES, (rows,))


def grads(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def updates(model: nn.Sequential, x: Tensor, y, **settings) -> list[Tensor]:
    """The updates of one pc_loss, ``.grad`` left empty."""
    model.zero_grad(set_to_none=True)
    pcfast.pc_loss(model, x, y, **{**STEPS, **settings}).backward()
    result = grads(model)
    model.zero_grad(set_to_none=True)
    return result


def autograd_updates(model: nn.Module, x: Tensor, y, function) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of plain backpropagation."""
    value = function(model(x), y)
    return value.detach(), list(torch.autograd.grad(value, list(model.parameters())))


def distance(result: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative Frobenius distance of a tensor from its truth."""
    assert len(result) == len(truth)
    return max(
        float((f - t).norm() / t.norm()) if t.any() else float(f.norm())
        for f, t in zip(result, truth, strict=True)
    )


def same_bits(result: list[Tensor], truth: list[Tensor]) -> bool:
    return len(result) == len(truth) and all(map(torch.equal, result, truth))


# The loss tensor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradients_accumulate_and_equal_those_of_pcinfer(method):
    model, (x, y) = mlp(), batch()
    other = batch()
    pcfast.PCInfer(model, F.cross_entropy, x, y, ERR_TYPES[method], eta=0.2, n=6)
    first = grads(model)
    pcfast.PCInfer(model, F.cross_entropy, *other, ERR_TYPES[method], eta=0.2, n=6)
    second = grads(model)
    model.zero_grad(set_to_none=True)
    settings = {**STEPS, "method": method}
    if method != "strict":  # PCInfer's states of methods without a loop are eager's
        settings["backend"] = "eager"
    pcfast.pc_loss(model, x, y, **settings).backward()
    assert same_bits(grads(model), first)
    pcfast.pc_loss(model, *other, **settings).backward()
    assert same_bits(grads(model), [a + b for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("method", METHODS)
def test_scaling_the_returned_loss_scales_the_updates_only(method):
    model, (x, y) = mlp(), batch()
    plain = updates(model, x, y, method=method)
    (2 * pcfast.pc_loss(model, x, y, method=method, **STEPS)).backward()
    assert same_bits(grads(model), [2 * g for g in plain])


def test_return_output_gives_the_forward_pass():
    model, (x, y) = mlp(), batch()
    loss, output = pcfast.pc_loss(model, x, y, return_output=True, **STEPS)
    with torch.no_grad():
        expected = model(x)
    assert distance([output], [expected]) < 1e-14
    assert not output.requires_grad
    torch.testing.assert_close(loss.detach(), F.cross_entropy(expected, y), rtol=1e-13, atol=0)
    assert loss.dim() == 0 and loss.requires_grad


def test_no_grad_gives_the_forward_loss_and_relaxes_nothing():
    model, (x, y) = mlp(), batch()
    pcfast.pc_loss(model, x, y, **STEPS)
    before = pcfast.last_run()
    with torch.no_grad():
        loss = pcfast.pc_loss(model, x, y, **STEPS)
        pair = pcfast.pc_loss(model, x, y, return_output=True, **STEPS)
        expected = model(x)
    assert pcfast.last_run() is before
    assert torch.equal(loss, F.cross_entropy(expected, y)) and not loss.requires_grad
    assert torch.equal(pair[0], loss) and torch.equal(pair[1], expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimiser_step_between_pc_loss_and_backward_changes_nothing():
    model, (x, y) = mlp(), batch()
    expected = updates(model, x, y)
    loss = pcfast.pc_loss(model, x, y, **STEPS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    loss.backward()
    assert same_bits(grads(model), expected)


def test_changing_a_batch_after_pc_loss_changes_nothing():
    model, (x, y) = mlp(), batch()
    expected = updates(model, x, y)
    loss = pcfast.pc_loss(model, x, y, **STEPS)
    x.fill_(7.0)
    y.zero_()
    loss.backward()
    assert same_bits(grads(model), expected)


def test_two_losses_then_two_backwards():
    model, one, two = mlp(), batch(), batch(4)
    expected = [a + b for a, b in zip(updates(model, *one), updates(model, *two), strict=True)]
    losses = [pcfast.pc_loss(model, *data, **STEPS) for data in (one, two)]
    for loss in losses:
        loss.backward()
    assert same_bits(grads(model), expected)


def test_backward_twice_needs_retain_graph():
    model, (x, y) = mlp(), batch()
    plain = updates(model, x, y)
    loss = pcfast.pc_loss(model, x, y, **STEPS)
    loss.backward(retain_graph=True)
    loss.backward()
    assert same_bits(grads(model), [2 * g for g in plain])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_create_graph_is_refused():
    model, (x, y) = mlp(), batch()
    loss = pcfast.pc_loss(model, x, y, **STEPS)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*create_graph=True"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen", ["0.0.weight", "1.0.bias", "2.weight"])
def test_frozen_parameters_get_nothing_and_leave_the_others_alone(frozen, method, backend):
    model, (x, y) = mlp(), batch()
    settings = {"method": method, "backend": backend, **STEPS}
    expected = dict(zip(dict(model.named_parameters()), updates(model, x, y, **settings), strict=True))
    model.get_parameter(frozen).requires_grad_(False)
    pcfast.pc_loss(model, x, y, **settings).backward()
    for name, parameter in model.named_parameters():
        if name == frozen:
            assert parameter.grad is None
        else:
            assert distance([parameter.grad], [expected[name]]) < 1e-13, name


def test_a_frozen_model_gives_a_loss_without_graph():
    model, (x, y) = mlp().requires_grad_(False), batch()
    assert not pcfast.pc_loss(model, x, y, **STEPS).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_shared_by_layers_get_the_sum(method, backend):
    shared = nn.Linear(6, 6).double()
    tied = nn.Sequential(nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh()), shared)
    untied = nn.Sequential(*(copy.deepcopy(layer) for layer in tied))
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 6, (5,))
    single = updates(untied, x, y, method=method, backend=backend)
    expected = [single[0] + single[2] + single[4], single[1] + single[3] + single[5]]
    assert distance(updates(tied, x, y, method=method, backend=backend), expected) < 1e-13


# Optimisers, AMP, checkpoints ----------------------------------------------------------------------------------

_ADAM_EPS = 1e-8
OPTIMISERS = {
    "sgd": (functools.partial(torch.optim.SGD, lr=0.1), lambda p, g: p - 0.1 * g),
    "adam": (
        functools.partial(torch.optim.Adam, lr=0.1, eps=_ADAM_EPS),
        lambda p, g: p - 0.1 * g / (g.abs() + _ADAM_EPS),
    ),
    "adamw": (
        functools.partial(torch.optim.AdamW, lr=0.1, eps=_ADAM_EPS, weight_decay=0.5),
        lambda p, g: 0.95 * p - 0.1 * g / (g.abs() + _ADAM_EPS),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_optimiser_step_equals_its_formula(name):
    make, formula = OPTIMISERS[name]
    model, (x, y) = mlp(), batch()
    module = pcfast.PredictiveCoding(model, **STEPS)
    expected = [
        formula(p.detach().clone(), g) for p, g in zip(model.parameters(), updates(model, x, y), strict=True)
    ]
    optimiser = make(module.parameters())
    module(x, y).backward()
    optimiser.step()
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-12, atol=1e-14)


def test_clip_grad_norm():
    model, (x, y) = mlp(), batch()
    plain = updates(model, x, y)
    norm = torch.cat([g.flatten() for g in plain]).norm()
    pcfast.pc_loss(model, x, y, **STEPS).backward()
    limit = float(norm) / 3
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), limit), norm)
    assert distance(grads(model), [g * limit / (norm + 1e-6) for g in plain]) < 1e-12


def test_grad_scaler_scales_the_updates_and_never_the_relaxation():
    model, (x, y) = mlp(torch.float32), batch(dtype=torch.float32)
    plain = updates(model, x, y)
    expected = [p.detach() - 0.5 * g for p, g in zip(model.parameters(), plain, strict=True)]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(pcfast.pc_loss(model, x, y, **STEPS)).backward()
    assert same_bits(grads(model), [1024 * g for g in plain])  # a power of two: no rounding
    scaler.step(optimiser)
    scaler.update()
    torch.testing.assert_close(list(model.parameters()), expected)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "deepcopy"])
def test_the_module_survives(how):
    loss = nn.CrossEntropyLoss(weight=torch.rand(CLASSES, dtype=torch.float64), label_smoothing=0.1)
    module, (x, y) = pcfast.PredictiveCoding(mlp(), loss=loss, method="strict", **STEPS), batch()
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = pickle.loads(pickle.dumps(module)) if how == "pickle" else copy.deepcopy(module)
    for each in (module, twin):
        each(x, y).backward()
    assert same_bits(grads(twin), grads(module))
    assert repr(twin) == repr(module)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


def test_state_dicts_load_with_weights_only():
    module, twin, (x, y) = (
        pcfast.PredictiveCoding(mlp(), **STEPS),
        pcfast.PredictiveCoding(mlp(), **STEPS),
        batch(),
    )
    assert list(module.state_dict()) == [f"model.{name}" for name in module.model.state_dict()]
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (module, twin):
        each(x, y).backward()
    assert same_bits(grads(twin), grads(module))


def test_the_module_predicts_without_y_and_passes_return_output_on():
    module, (x, y) = pcfast.PredictiveCoding(mlp(), method="exact"), batch()
    assert torch.equal(module(x), module.model(x))
    loss, output = module(x, y, return_output=True)
    assert distance([output], [module(x).detach()]) < 1e-14
    torch.testing.assert_close(loss.detach(), F.cross_entropy(output, y), rtol=1e-13, atol=0)


def test_class_weights_move_with_the_module():
    weight = torch.rand(CLASSES)
    module = pcfast.PredictiveCoding(mlp(torch.float32), loss=nn.CrossEntropyLoss(weight=weight))
    module.double()
    assert module.loss.weight.dtype == torch.float64
    module(*batch()).backward()
    assert all(g.dtype == torch.float64 for g in grads(module))


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"method": "predictive"}, "method"),
        ({"step_size": -0.1}, "step_size"),
        ({"num_steps": 1.5}, "num_steps"),
        ({"loss": "hinge"}, "loss"),
        ({"check": "never"}, "check"),
        ({"normalizer": 8, "loss": nn.MSELoss(reduction="sum")}, "normalizer"),
    ],
)
def test_the_module_refuses_bad_settings_when_it_is_made(settings, argument):
    with pytest.raises(pcfast.ArgumentError) as failure:
        pcfast.PredictiveCoding(mlp(), **settings)
    assert failure.value.argument == argument


# Micro-batches -------------------------------------------------------------------------------------------------


def accumulated(model, x, y, cut: int, factor: float = 1.0, **settings) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    for part in (slice(cut), slice(cut, None)):
        (factor * pcfast.pc_loss(model, x[part], y[part], **STEPS, **settings)).backward()
    result = grads(model)
    model.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["cross_entropy", "mse"])
@pytest.mark.parametrize("reduction", ["sum", "normalizer"])
def test_micro_batches_equal_the_full_batch(reduction, kind, method):
    model, (x, y) = mlp(), batch(8)
    if kind == "mse":
        y = torch.randn(8, CLASSES, dtype=torch.float64)
    modules = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
    settings = {"method": method, "loss": modules[kind](reduction="sum")}
    if reduction == "normalizer":
        settings = {"method": method, "loss": kind}
    full = updates(model, x, y, **settings)
    if reduction == "normalizer":
        settings["normalizer"] = 8
    assert distance(accumulated(model, x, y, 3, **settings), full) < 1e-12  # 3 rows, then 5


def test_strict_with_a_plain_mean_over_micro_batches_differs():
    model, (x, y) = mlp(), batch(8)
    full = updates(model, x, y, method="strict")
    assert distance(accumulated(model, x, y, 4, factor=0.5, method="strict"), full) > 1e-3


@pytest.mark.parametrize("method", ["exact", "fixed_prediction"])
def test_linear_methods_with_a_plain_mean_over_micro_batches_weighted(method):
    model, (x, y) = mlp(), batch(8)
    full = updates(model, x, y, method=method)
    assert distance(accumulated(model, x, y, 4, factor=0.5, method=method), full) < 1e-12


# Losses --------------------------------------------------------------------------------------------------------

_SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.3)
_WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64))
_BOTH = nn.CrossEntropyLoss(
    weight=torch.tensor([0.5, 2.0, 0.3, 1.5], dtype=torch.float64), label_smoothing=0.2
)
#: name -> (loss, the same as a function of (output, y), kind of target)
LOSSES = {
    "cross_entropy": ("cross_entropy", F.cross_entropy, "labels"),
    "mse": ("mse", F.mse_loss, "dense"),
    "F.cross_entropy": (F.cross_entropy, F.cross_entropy, "labels"),
    "label smoothing": (_SMOOTH, _SMOOTH, "labels"),
    "class weights": (_WEIGHTED, _WEIGHTED, "labels"),
    "class weights, smoothed": (_BOTH, _BOTH, "labels"),
    "class weights, probabilities": (_BOTH, _BOTH, "probabilities"),
    "default ignore_index": (nn.CrossEntropyLoss(), F.cross_entropy, "labels with -100"),
    "ignore_index": (*[nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)] * 2, "labels"),
    "ignore_index, sum": (*[nn.CrossEntropyLoss(ignore_index=1, reduction="sum")] * 2, "labels"),
    "probabilities": (nn.CrossEntropyLoss(), F.cross_entropy, "probabilities"),
    "probabilities, smoothed": (_SMOOTH, _SMOOTH, "probabilities"),
    "nn.MSELoss": (nn.MSELoss(), F.mse_loss, "dense"),
    "nn.MSELoss, sum": (nn.MSELoss(reduction="sum"), lambda o, t: (o - t).square().sum(), "dense"),
    "half": (half_squared_error, lambda o, t: 0.5 * (o - t).square().sum(), "dense"),
    "partial": (*[functools.partial(F.cross_entropy, label_smoothing=0.2, reduction="sum")] * 2, "labels"),
    "lambda": (*[lambda o, t: (o - t).abs().pow(3).mean()] * 2, "dense"),
}


def conv_net() -> nn.Sequential:
    """Maps (B, 2, 6, 5) to class scores (B, 4, 3, 4) at every position."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 5, (3, 2)), nn.Tanh()), nn.Conv2d(5, CLASSES, (2, 1))
    ).double()


def problem_for(target: str, spatial: bool):
    model = conv_net() if spatial else mlp()
    x = torch.randn(6, *((2, 6, 5) if spatial else (5,)), dtype=torch.float64)
    places = (3, 4) if spatial else ()
    if target == "dense":
        y = torch.randn(6, CLASSES, *places, dtype=torch.float64)
    elif target == "probabilities":
        y = torch.randn(6, CLASSES, *places, dtype=torch.float64).softmax(1)
    else:
        y = torch.randint(0, CLASSES, (6, *places))
        if target == "labels with -100":
            y[1] = -100
    return model, x, y


@pytest.mark.parametrize("spatial", [False, True], ids=["rows", "spatial"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, spatial):
    loss, function, target = LOSSES[name]
    model, x, y = problem_for(target, spatial)
    value, expected = autograd_updates(model, x, y, function)
    result = pcfast.pc_loss(model, x, y, loss=loss, method="exact", backend="eager")
    torch.testing.assert_close(result.detach(), value, rtol=1e-12, atol=0)
    assert distance(updates(model, x, y, loss=loss, method="exact", backend="eager"), expected) < 1e-12
    strict = [updates(model, x, y, loss=loss, method="strict", backend=b) for b in BACKENDS]
    assert distance(*strict) < 1e-10
    assert distance(strict[0], expected) > 1e-4  # strict relaxation is not backpropagation


def test_a_label_that_is_ignored_has_no_influence():
    model, x, y = problem_for("labels with -100", spatial=False)
    expected = updates(model, x, y)
    x[1] += 1.0
    assert distance(updates(model, x, y), expected) < 1e-14


# Precisions and backends ---------------------------------------------------------------------------------------


def dtypes(result: pcfast.Relaxation) -> set[torch.dtype]:
    lists = (result.activations, result.beliefs, result.errors, [result.loss, result.output_gradient])
    return {tensor.dtype for entries in lists for tensor in entries if tensor is not None}


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_keeps_float32_state(method):
    model, (x, y) = mlp(torch.float32), batch(32, torch.float32)
    truth = updates(copy.deepcopy(model).double(), x.double(), y, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        result = pcfast.relax(model, x, y, method=method, backend="eager", **STEPS)
        found = updates(model, x, y, method=method, backend="eager")
    assert dtypes(result) == {torch.float32}
    assert result.run.plan.precision.operand == torch.bfloat16
    assert {g.dtype for g in found} == {torch.float32}
    error = distance([g.double() for g in found], truth)
    assert 1e-4 < error < 0.1, "bfloat16 products, in deviation form"


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_model_runs_with_float32_state(method):
    model, (x, y) = mlp(torch.bfloat16), batch(32, torch.bfloat16)
    truth = updates(copy.deepcopy(model).double(), x.double(), y, method=method)
    assert dtypes(pcfast.relax(model, x, y, method=method, backend="eager", **STEPS)) == {torch.float32}
    result = updates(model, x, y, method=method, backend="eager")
    assert {g.dtype for g in result} == {torch.bfloat16}
    assert distance([g.double() for g in result], truth) < 0.1


def test_float16_autocast_runs_in_float32_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    model, (x, y) = mlp(torch.float32), batch(dtype=torch.float32)
    expected = updates(model, x, y)
    with caplog.at_level(logging.INFO, logger="pcfast"), torch.autocast("cpu", torch.float16):
        for _ in range(2):
            assert same_bits(updates(model, x, y), expected)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("float16 autocast: float32 operands")


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_float64_model_runs_in_float64(backend):
    model, (x, y) = mlp(), batch()
    pcfast.pc_loss(model, x, y, **STEPS, backend="auto" if backend == "cpu" else backend)
    plan = pcfast.last_run().plan
    assert (plan.backend, plan.precision.state, plan.precision.operand) == (backend, *[torch.float64] * 2)


def complex_problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="Complex modules"):
        model.to(torch.complex128)
    x, y = (torch.randn(5, size, dtype=torch.complex128) for size in (3, 2))
    return model, x, y


def squared_modulus(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).abs().square().sum()


def test_auto_falls_back_to_the_reference_and_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    model, x, y = complex_problem()
    expected = autograd_updates(model, x, y, squared_modulus)[1]
    with caplog.at_level(logging.INFO, logger="pcfast"):
        for _ in range(2):
            result = updates(model, x, y, loss=squared_modulus, method="exact")
    assert distance(result, expected) < 1e-12
    assert pcfast.last_run().plan.backend == "reference"
    (message,) = [record.message for record in caplog.records]
    assert "running on reference" in message and "complex128" in message


def test_non_finite_complex_input_is_reported():
    model, x, y = complex_problem()
    x[2, 1] = complex(0.0, float("nan"))
    with pytest.raises(pcfast.NonFiniteError, match="row 2"):
        pcfast.pc_loss(model, x, y, loss=squared_modulus)


def test_a_backend_asked_for_by_name_raises_with_the_reason():
    model, x, y = complex_problem()
    with pytest.raises(pcfast.BackendError, match=r'"eager" cannot run this.*complex128.*backend="auto"'):
        pcfast.pc_loss(model, x, y, loss=squared_modulus, backend="eager")


# The methods against closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "exact"},
        {"method": "fixed_prediction", "step_size": 1.0, "num_steps": 3},
        {"method": "fixed_prediction", "step_size": 1, "num_steps": 17},
    ],
    ids=["exact", "n = L", "n > L"],
)
def test_backpropagation_is_met(settings, backend):
    model, (x, y) = mlp(), batch()
    expected = autograd_updates(model, x, y, F.cross_entropy)[1]
    assert distance(updates(model, x, y, backend=backend, **settings), expected) < 1e-13


def test_fixed_prediction_before_the_errors_arrive_is_not_backpropagation():
    model, (x, y) = mlp(), batch()
    settings = {"method": "fixed_prediction", "step_size": 1.0, "num_steps": 2}
    result, expected = updates(model, x, y, **settings), autograd_updates(model, x, y, F.cross_entropy)[1]
    assert not result[0].any() and not result[1].any()  # n = L - 1: nothing has reached layer 1
    assert distance(result[2:], expected[2:]) < 1e-13


def linear_net(*widths: int) -> tuple[nn.Sequential, list[np.ndarray]]:
    layers = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers), [layer.weight.detach().numpy() for layer in layers]


def numpy_strict(weights, beliefs, y, eta: float, steps: int):
    """Strict relaxation of a bias-free linear net under the loss sum (mu - y)^2, by hand.

    ``beliefs``: v_0..v_{L-1} at the start. Returns v_0..v_{L-1}, eps_1..eps_L and the updates of all weights.
    """
    v, depth = [b.copy() for b in beliefs], len(weights)

    def errors_at(v):
        mu = [v[l] @ weights[l].T for l in range(depth)]
        return [mu[l] - v[l + 1] for l in range(depth - 1)] + [2 * (mu[-1] - y)]

    errors = errors_at(v)
    for _ in range(steps):
        errors = errors_at(v)
        for l in range(1, depth):
            v[l] = v[l] + eta * (errors[l - 1] - errors[l] @ weights[l])
    return v, errors, [error.T @ below for error, below in zip(errors, v, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_iterations_of_a_linear_net_by_hand(steps, backend):
    model, (w1, w2) = linear_net(4, 5, 3)
    x, y = (torch.randn(6, size, dtype=torch.float64) for size in (4, 3))
    eta, x0, target = 0.3, x.numpy(), y.numpy()
    vhat = x0 @ w1.T
    top = 2 * (vhat @ w2.T - target)
    v = vhat - eta * top @ w2
    expected = [np.zeros_like(w1), top.T @ v]  # iteration 1: no error below the top yet
    if steps == 2:
        bottom, top = vhat - v, 2 * (v @ w2.T - target)
        v = v + eta * (bottom - top @ w2)
        expected = [bottom.T @ x0, top.T @ v]
    settings = {"loss": nn.MSELoss(reduction="sum"), "step_size": eta, "num_steps": steps}
    result = updates(model, x, y, backend=backend, **settings)
    torch.testing.assert_close(result, [torch.from_numpy(e) for e in expected], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_iterations_of_a_linear_net_reach_the_equilibrium(backend):
    """v* solves v = W1 x - 2 W2^T (W2 v - y), and there the updates are products of its errors."""
    model, (w1, w2) = linear_net(4, 5, 3)
    x, y = (torch.randn(6, size, dtype=torch.float64) for size in (4, 3))
    right = x.numpy() @ w1.T + 2 * y.numpy() @ w2
    v = np.linalg.solve(np.eye(5) + 2 * w2.T @ w2, right.T).T
    bottom, top = x.numpy() @ w1.T - v, 2 * (v @ w2.T - y.numpy())
    settings = {"loss": nn.MSELoss(reduction="sum"), "step_size": 0.2, "num_steps": 250, "backend": backend}
    result = pcfast.relax(model, x, y, **settings)
    torch.testing.assert_close(result.beliefs[1], torch.from_numpy(v), rtol=1e-10, atol=1e-11)
    expected = [torch.from_numpy(bottom.T @ x.numpy()), torch.from_numpy(top.T @ v)]
    assert distance(updates(model, x, y, **settings), expected) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("given", [(1, 2), (1,), (2,)])
def test_vinit_is_honoured(given, steps, backend):
    model, weights = linear_net(4, 6, 5, 3)
    x, y = (torch.randn(7, size, dtype=torch.float64) for size in (4, 3))
    forward = [x, model[0](x).detach(), model[:2](x).detach()]
    vinit = [None, *(torch.randn_like(f) if l in given else None for l, f in enumerate(forward) if l), None]
    starts = [f if v is None else v for f, v in zip(forward, vinit[:3], strict=True)]
    v, errors, expected = numpy_strict(weights, [s.numpy() for s in starts], y.numpy(), 0.1, steps)
    settings = {"loss": nn.MSELoss(reduction="sum"), "step_size": 0.1, "num_steps": steps}
    settings |= {"vinit": vinit, "backend": backend}
    result = pcfast.relax(model, x, y, **settings)
    for l in (1, 2):
        torch.testing.assert_close(result.beliefs[l], torch.from_numpy(v[l]), rtol=1e-12, atol=1e-13)
    for l in (1, 2, 3):
        torch.testing.assert_close(result.errors[l], torch.from_numpy(errors[l - 1]), rtol=1e-12, atol=1e-13)
    found = updates(model, x, y, **settings)
    torch.testing.assert_close(found, [torch.from_numpy(e) for e in expected], rtol=1e-12, atol=1e-13)


def test_the_hand_written_loop_agrees_from_the_forward_pass():
    """Ties numpy_strict to torch: at the forward pass only the top error is not zero, and it is dLoss/dmu."""
    model, weights = linear_net(4, 6, 5, 3)
    x, y = (torch.randn(7, size, dtype=torch.float64) for size in (4, 3))
    forward = [x, model[0](x).detach(), model[:2](x).detach()]
    _, errors, _ = numpy_strict(weights, [f.numpy() for f in forward], y.numpy(), 0.1, 0)
    output = model(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((output - y).square().sum(), output)
    torch.testing.assert_close(torch.from_numpy(errors[-1]), gradient)
    assert max(np.abs(errors[0]).max(), np.abs(errors[1]).max()) < 1e-14


# Threads -------------------------------------------------------------------------------------------------------


def test_threads_do_not_disturb_each_other():
    jobs = [(mlp(), *batch(5 + i), method) for i, method in enumerate(("strict", "fixed_prediction"))]
    serial = [updates(model, x, y, method=method) for model, x, y, method in jobs]
    result: list[list] = [[], []]
    runs: list = [None, None]
    together = threading.Barrier(2)

    def work(index: int) -> None:
        model, x, y, method = jobs[index]
        together.wait()
        for _ in range(10):
            result[index].append(updates(model, x, y, method=method))
        runs[index] = pcfast.last_run().plan.method

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == ["strict", "fixed_prediction"]
    for index in range(2):
        assert len(result[index]) == 10
        assert all(same_bits(each, serial[index]) for each in result[index])


def test_a_plain_backward_hands_the_updates_on_without_a_copy(monkeypatch):
    """At a gradient of one that is not kept, parameters take the tensors that the relaxation computed."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    given = []
    apply = pcfast.autograd._Updates.forward

    def spy(ctx, loss, scale, gradients, *parameters):
        given[:] = [gradient.data_ptr() for gradient in gradients]
        return apply(ctx, loss, scale, gradients, *parameters)

    monkeypatch.setattr(pcfast.autograd._Updates, "forward", staticmethod(spy))
    pcfast.pc_loss(model, x, y).backward()
    once = [p.grad.clone() for p in model.parameters()]
    assert [p.grad.data_ptr() for p in model.parameters()] == given
    for factor, keep in ((1.0, True), (0.5, False)):
        model.zero_grad()
        loss = pcfast.pc_loss(model, x, y)
        (factor * loss).backward(retain_graph=keep)
        assert not {p.grad.data_ptr() for p in model.parameters()} & set(given)
        assert all(torch.equal(p.grad, factor * g) for p, g in zip(model.parameters(), once, strict=True))
        if keep:
            loss.backward()
            assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_a_gradient_that_two_parameters_share_is_copied():
    """Updates handed on without a copy never share memory with another parameter's."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(7, 5))

        def forward(self, v):
            return v + self.a + self.b  # one gradient for both

    model = nn.Sequential(nn.Linear(6, 5), Shift(), nn.Linear(5, 3))
    pcfast.pc_loss(model, torch.randn(7, 6), torch.randint(0, 3, (7,))).backward()
    a, b = model[1].a.grad, model[1].b.grad
    assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_updates_that_overlap_are_not_handed_on():
    """torch expands the gradient of a sum: in-place operations would raise on it."""
    model, p = nn.Sequential(nn.Linear(6, 3)), nn.Parameter(torch.ones(4))
    loss = pcfast.pc_loss(
        model, torch.randn(7, 6), torch.randint(0, 3, (7,)),
        loss=lambda output, y: F.cross_entropy(output, y) + p.sum(),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, [p])
    assert torch.equal(gradient.mul_(2), torch.full((4,), 2.0))


def test_updates_from_hooks_of_saved_tensors_are_copied():
    model, kept = nn.Sequential(nn.Linear(6, 3)), []

    def pack(tensor):
        kept.append(tensor.clone())
        return kept[-1].numpy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        loss = pcfast.pc_loss(model, torch.randn(7, 6), torch.randint(0, 3, (7,)))
    loss.backward()
    for parameter in model.parameters():
        assert any(torch.equal(parameter.grad, tensor) for tensor in kept)
        assert parameter.grad.data_ptr() not in {tensor.data_ptr() for tensor in kept}


def test_compiled_autograd_traces_the_backward_pass():
    model = nn.Sequential(nn.Linear(6, 3))
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    pcfast.pc_loss(model, x, y).backward()
    plain = model[0].weight.grad.clone()
    model.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        pcfast.pc_loss(model, x, y).backward()
    assert torch.equal(model[0].weight.grad, plain)
