"""The drop-in for Torch2PC: signatures, return lists, side effects, and the five parts of PCInfer.

The literal loops here are written from the published algorithms (Rosenbaum 2022, algorithms 1 to 3) with
torch.autograd.functional.vjp, apart from the package. docs/torch2pc.md names the tests of its differences.
"""

from __future__ import annotations

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import vjp

import pcfast
from pcfast.torch2pc import (
    ExactPredErrs,
    FixedPredPCPredErrs,
    FwdPassPlus,
    PCInfer,
    SetPCGrads,
    StrictPCPredErrs,
)

BACKENDS = ("eager", "reference")
ERR_TYPES = ("Exact", "FixedPred", "Strict")
LOSS = nn.CrossEntropyLoss()
DEPTH, CLASSES = 3, 4


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, CLASSES),
    ).double()


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten()),
        nn.Linear(16, CLASSES),
    ).double()


NETWORKS = {"mlp": (mlp, (5,)), "cnn": (cnn, (1, 8, 8))}


def problem(name: str = "mlp", rows: int = 6):
    make, shape = NETWORKS[name]
    return make(), torch.randn(rows, *shape, dtype=torch.float64), torch.randint(0, CLASSES, (rows,))


def forward_values(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    values = [x]
    with torch.no_grad():
        for layer in model:
            values.append(layer(values[-1]))
    return values


def random_like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(tensor) for tensor in tensors]


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(result, truth, rtol: float = 1e-11) -> None:
    """Lists of tensors and None, entry by entry; ``rtol`` is relative to the truth's norm."""
    assert len(result) == len(truth)
    for index, (f, t) in enumerate(zip(result, truth, strict=True)):
        if t is None:
            assert f is None, index
        else:
            assert f.shape == t.shape and f.dtype == t.dtype, index
            assert float((f - t).norm()) <= rtol * float(t.norm()) + 1e-15, index


# Literal computations ------------------------------------------------------------------------------------------


def literal_fixed_prediction(model, vhat, top_error, eta, n):
    v, epsilon = [value.clone() for value in vhat], [None] * DEPTH + [top_error]
    for _ in range(n):
        for l in reversed(range(DEPTH)):
            epsilon[l] = vhat[l] - v[l]
            feedback = vjp(model[l], vhat[l], epsilon[l + 1])[1]
            v[l] = v[l] + eta * (epsilon[l] - feedback)
    return v, epsilon


def literal_strict(model, vinit, loss, y, eta, n):
    v, epsilon = [value.clone() for value in vinit], [None] * (DEPTH + 1)
    for _ in range(n):
        output = model[DEPTH - 1](v[DEPTH - 1]).detach().requires_grad_()
        epsilon[DEPTH] = torch.autograd.grad(loss(output, y), output)[0]
        for l in reversed(range(1, DEPTH)):
            epsilon[l] = (model[l - 1](v[l - 1]) - v[l]).detach()
            feedback = vjp(model[l], v[l], epsilon[l + 1])[1]
            v[l] = v[l] + eta * (epsilon[l] - feedback)
    return v, epsilon


def literal_exact(model, loss, y, vhat):
    """Gradients of the loss at vhat_L by the chain rule through Jacobians at the given vhat."""
    output = vhat[-1].clone().requires_grad_()
    epsilon = [None] * DEPTH + [torch.autograd.grad(loss(output, y), output)[0]]
    for l in reversed(range(1, DEPTH)):
        epsilon[l] = vjp(model[l], vhat[l], epsilon[l + 1])[1]
    return [None, *(vhat[l] - epsilon[l] for l in range(1, DEPTH + 1))], epsilon


def literal_grads(model, epsilon, v) -> list[Tensor]:
    result = []
    for l, layer in enumerate(model, start=1):
        result += torch.autograd.grad(layer(v[l - 1]), list(layer.parameters()), epsilon[l])
    return result


# Names and signatures ------------------------------------------------------------------------------------------

_EMPTY = inspect.Parameter.empty
#: As published.
SIGNATURES = {
    FwdPassPlus: {"model": _EMPTY, "LossFun": _EMPTY, "X": _EMPTY, "Y": _EMPTY},
    FixedPredPCPredErrs: {"model": _EMPTY, "vhat": _EMPTY, "dLdy": _EMPTY, "eta": 1, "n": None},
    StrictPCPredErrs: {
        "model": _EMPTY,
        "vinit": _EMPTY,
        "LossFun": _EMPTY,
        "Y": _EMPTY,
        "eta": _EMPTY,
        "n": _EMPTY,
    },
    ExactPredErrs: {"model": _EMPTY, "LossFun": _EMPTY, "X": _EMPTY, "Y": _EMPTY, "vhat": None},
    SetPCGrads: {"model": _EMPTY, "epsilon": _EMPTY, "X": _EMPTY, "v": None},
    PCInfer: {
        "model": _EMPTY,
        "LossFun": _EMPTY,
        "X": _EMPTY,
        "Y": _EMPTY,
        "ErrType": _EMPTY,
        "eta": 0.1,
        "n": 20,
        "vinit": None,
    },
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signatures(function):
    *published, ours = inspect.signature(function).parameters.values()
    assert [(p.name, p.default) for p in published] == list(SIGNATURES[function].items())
    assert {p.kind for p in published} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert (ours.name, ours.default, ours.kind) == ("backend", "auto", inspect.Parameter.KEYWORD_ONLY)


def test_pcinfer_is_exported():
    assert pcfast.PCInfer is PCInfer


def test_the_page_for_users_names_tests_that_exist():
    page = (Path(__file__).parents[1] / "docs" / "torch2pc.md").read_text()
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", page))
    assert len(named) >= 15
    assert {name for name in named if not callable(globals().get(name))} == set()


# PCInfer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_lists_and_their_none_entries(err_type, backend):
    model, x, y = problem()
    vhat, loss, top, v, epsilon = PCInfer(model, LOSS, x, y, err_type, n=5, backend=backend)
    assert len(vhat) == len(v) == len(epsilon) == DEPTH + 1
    empty = {"Exact": ([0], [0]), "FixedPred": ([], []), "Strict": ([], [0])}[err_type]
    assert [l for l, value in enumerate(v) if value is None] == empty[0]
    assert [l for l, value in enumerate(epsilon) if value is None] == empty[1]
    assert_same(vhat, forward_values(model, x))
    assert torch.equal(vhat[0], x)
    assert loss.dim() == 0
    torch.testing.assert_close(loss, LOSS(model(x), y).detach(), rtol=1e-13, atol=0)
    output = vhat[-1].clone().requires_grad_()
    assert_same([top], torch.autograd.grad(LOSS(output, y), output))
    if err_type == "FixedPred":
        assert float((v[0] - x).norm()) > 1e-6  # v_0 moves
        assert_same([epsilon[-1]], [top])
    if err_type == "Strict":
        assert torch.equal(v[0], x) and torch.equal(v[-1], vhat[-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_pcinfer_equals_the_literal_algorithms(err_type, network, backend):
    model, x, y = problem(network)
    eta, n = 0.3, 5
    forward = forward_values(model, x)
    exact_v, exact = literal_exact(model, LOSS, y, forward)
    if err_type == "Exact":
        v, epsilon, points = exact_v, exact, forward
    elif err_type == "FixedPred":
        v, epsilon = literal_fixed_prediction(model, forward, exact[-1], eta, n)
        points = forward
    else:
        v, epsilon = literal_strict(model, forward, LOSS, y, eta, n)
        points = v
    expected = literal_grads(model, epsilon, points)
    result = PCInfer(model, LOSS, x, y, err_type, eta, n, backend=backend)
    assert_same(result[3], v)
    assert_same(result[4], epsilon, rtol=1e-10)
    assert_same(grads(model), expected, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_composing_the_five_functions_equals_pcinfer(err_type, backend):
    model, x, y = problem("cnn")
    eta, n = 0.2, 4
    whole = PCInfer(model, LOSS, x, y, err_type, eta=eta, n=n, backend=backend)
    expected = grads(model)
    model.zero_grad(set_to_none=True)

    vhat, loss, top = FwdPassPlus(model, LOSS, x, y, backend=backend)
    points = None
    if err_type == "Exact":
        v, epsilon = ExactPredErrs(model, LOSS, x, y, vhat, backend=backend)
    elif err_type == "FixedPred":
        v, epsilon = FixedPredPCPredErrs(model, vhat, top, eta, n, backend=backend)
        points = vhat
    else:
        v, epsilon = StrictPCPredErrs(model, vhat, LOSS, y, eta, n, backend=backend)
        points = v
    assert all(p.grad is None for p in model.parameters())  # only SetPCGrads touches .grad
    assert SetPCGrads(model, epsilon, x, points, backend=backend) is None
    assert_same(vhat, whole[0])
    assert_same([loss, top], whole[1:3])
    assert_same(v, whole[3])
    assert_same(epsilon, whole[4], rtol=1e-10)
    assert_same(grads(model), expected, rtol=1e-10)


@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_grad_is_assigned_not_accumulated(err_type):
    model, x, y = problem()
    PCInfer(model, LOSS, x, y, err_type, n=3)
    first = grads(model)
    PCInfer(model, LOSS, x, y, err_type, n=3)
    assert_same(grads(model), first, rtol=0)


class Half(nn.Module):
    """A layer with a parameter that it never uses."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.used


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_unused_and_frozen_parameters_get_none(err_type, backend):
    model = nn.Sequential(Half(), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, CLASSES)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    model[1][0].weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from before
    PCInfer(model, LOSS, x, y, err_type, n=5, backend=backend)
    none = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert none == {"0.unused", "1.0.weight"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_shared_parameters_get_the_sum(err_type, backend):
    shared = nn.Linear(5, 5).double()
    tied = nn.Sequential(nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh()), shared)
    untied = nn.Sequential(*(copy.deepcopy(layer) for layer in tied))
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 5, (6,))
    for model in (tied, untied):
        PCInfer(model, LOSS, x, y, err_type, n=5, backend=backend)
    single = grads(untied)
    expected = [single[0] + single[2] + single[4], single[1] + single[3] + single[5]]
    assert_same(grads(tied), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_n_none_means_the_depth_for_fixedpred(backend):
    model, x, y = problem()
    results = [PCInfer(model, LOSS, x, y, "FixedPred", 0.3, n, backend=backend) for n in (None, DEPTH)]
    for one, two in zip(*results, strict=True):
        assert_same(*([r] if isinstance(r, Tensor) else r for r in (one, two)), rtol=0)
    vhat, _, top = FwdPassPlus(model, LOSS, x, y)
    default = FixedPredPCPredErrs(model, vhat, top, backend=backend)  # eta = 1, n = L: backpropagation
    assert_same(default[1][1:], literal_exact(model, LOSS, y, vhat)[1][1:])


def test_an_input_that_requires_grad_is_refused():
    model, x, y = problem()
    with pytest.raises(pcfast.ArgumentError, match="requires grad") as failure:
        PCInfer(model, LOSS, x.requires_grad_(), y, "Strict")
    assert failure.value.argument == "X"


@pytest.mark.parametrize("err_type", ["FixedPred", "Strict"])
def test_a_tensor_as_eta_is_refused(err_type):
    model, x, y = problem()
    with pytest.raises(pcfast.ArgumentTypeError, match="Tensor") as failure:
        PCInfer(model, LOSS, x, y, err_type, eta=torch.tensor(0.1))
    assert failure.value.argument == "eta"


@pytest.mark.parametrize("err_type", ["FixedPred", "Strict"])
@pytest.mark.parametrize("eta", [-0.1, float("inf"), float("nan")])
def test_a_negative_eta_is_refused(eta, err_type):
    model, x, y = problem()
    with pytest.raises(pcfast.ArgumentError, match="finite number >= 0") as failure:
        PCInfer(model, LOSS, x, y, err_type, eta=eta)
    assert failure.value.argument == "eta"


@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_an_unbatched_input_is_refused(err_type):
    model, x, y = problem()
    with pytest.raises(pcfast.ShapeError, match="unsqueeze") as failure:
        PCInfer(model, LOSS, x[0], y[0], err_type)
    assert failure.value.argument == "X"


def test_a_module_list_is_refused():
    model, x, y = problem()
    with pytest.raises(pcfast.ModelError, match=r"ModuleList.*nn\.Sequential"):
        PCInfer(nn.ModuleList(model), LOSS, x, y, "Strict")
    PCInfer(nn.Sequential(*nn.ModuleList(model)), LOSS, x, y, "Strict")


def test_lazy_modules_are_refused():
    x, y = torch.randn(6, 5), torch.randint(0, CLASSES, (6,))
    model = nn.Sequential(nn.Sequential(nn.LazyLinear(8), nn.Tanh()), nn.LazyLinear(CLASSES))
    with pytest.raises(pcfast.ModelError, match="one forward pass"):
        PCInfer(model, LOSS, x, y, "Strict")
    model(x)
    PCInfer(model, LOSS, x, y, "Strict")


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_sequential_that_does_more_than_its_elements_is_refused():
    model, x, y = problem()
    with pytest.raises(pcfast.ModelError, match=r"overrides Sequential\.forward"):
        PCInfer(Doubled(*model), LOSS, x, y, "Strict")
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(pcfast.ModelError, match="hooks"):
        PCInfer(model, LOSS, x, y, "Strict")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flat_model_has_a_layer_for_each_module(backend):
    """As in Torch2PC; grouped it is another algorithm, whose updates are not those."""
    flat, x, y = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double(), *problem()[1:]
    assert len(flat) == DEPTH
    v, epsilon = literal_strict(flat, forward_values(flat, x), LOSS, y, 0.3, 8)
    result = PCInfer(flat, LOSS, x, y, "Strict", 0.3, 8, backend=backend)
    assert_same(result[3], v)
    assert_same(result[4], epsilon, rtol=1e-10)
    expected = grads(flat)
    PCInfer(pcfast.group_layers(flat), LOSS, x, y, "Strict", 0.3, 8, backend=backend)
    assert (flat[0].weight.grad - expected[0]).norm() > 0.01 * expected[0].norm()


def test_n_none_is_refused_for_strict():
    model, x, y = problem()
    with pytest.raises(pcfast.ArgumentTypeError) as failure:
        PCInfer(model, LOSS, x, y, "Strict", n=None)
    assert failure.value.argument == "n"


def test_exact_reads_neither_eta_nor_n():
    model, x, y = problem()
    PCInfer(model, LOSS, x, y, "Exact")
    expected = grads(model)
    PCInfer(model, LOSS, x, y, "Exact", eta="unread", n=None)
    assert_same(grads(model), expected, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ["FixedPred", "Strict"])
def test_no_steps_leave_beliefs_and_evaluate_errors(err_type, backend):
    model, x, y = problem()
    vhat, _, top, v, epsilon = PCInfer(model, LOSS, x, y, err_type, n=0, backend=backend)
    assert_same(v, forward_values(model, x))
    assert_same([epsilon[-1]], [top])
    assert all(not error.any() for error in epsilon[1:-1])
    expected = literal_grads(model[-1:], [None, top], [vhat[-2]])
    assert_same(grads(model[-1]), expected)
    assert all(not g.any() for g in grads(model[:-1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vinit_is_honoured(backend):
    model, x, y = problem()
    vinit = [x, *random_like(forward_values(model, x)[1:])]
    v, epsilon = literal_strict(model, vinit, LOSS, y, 0.2, 4)
    expected = literal_grads(model, epsilon, v)
    result = PCInfer(model, LOSS, x, y, "Strict", 0.2, 4, vinit=vinit, backend=backend)
    assert_same(result[0], forward_values(model, x))  # vhat is the forward pass all the same
    assert_same(result[3], v)
    assert_same(result[4], epsilon)
    assert_same(grads(model), expected)


@pytest.mark.parametrize("err_type", ["Exact", "FixedPred"])
def test_vinit_is_refused_where_it_means_nothing(err_type):
    model, x, y = problem()
    with pytest.raises(pcfast.ArgumentError) as failure:
        PCInfer(model, LOSS, x, y, err_type, vinit=forward_values(model, x))
    assert failure.value.argument == "vinit"


@pytest.mark.parametrize("unknown", ["strict", "Modified", None, ["Exact"]])
def test_an_unknown_errtype_is_refused(unknown):
    model, x, y = problem()
    with pytest.raises(pcfast.ArgumentError, match=r"Exact.*FixedPred.*Strict") as failure:
        PCInfer(model, LOSS, x, y, unknown)
    assert failure.value.argument == "ErrType"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_raises_and_leaves_grad(backend):
    model, x, y = problem()
    PCInfer(model, LOSS, x, y, "Exact")
    before = grads(model)
    with pytest.raises(pcfast.RelaxationDiverged) as failure:
        PCInfer(model, nn.MSELoss(reduction="sum"), x, 1e3 * torch.ones(6, CLASSES).double(), "Strict",
                eta=1e3, n=200, backend=backend)  # fmt: skip
    assert failure.value.iteration > 1 and failure.value.layer in (1, 2, 3)
    assert_same(grads(model), before, rtol=0)


def test_nothing_is_printed(capfd):
    model, x, y = problem()
    for err_type in ERR_TYPES:
        PCInfer(model, LOSS, x, y, err_type, n=3)
    assert capfd.readouterr() == ("", "")
    imported = subprocess.run(
        [sys.executable, "-c", "import pcfast.torch2pc"], capture_output=True, text=True, check=True
    )
    assert imported.stdout == ""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_results_carry_no_graph(err_type, backend):
    model, x, y = problem()
    vhat, loss, top, v, epsilon = PCInfer(model, LOSS, x, y, err_type, n=3, backend=backend)
    tensors = [t for t in (*vhat, loss, top, *v, *epsilon, *grads(model)) if t is not None]
    assert not any(t.requires_grad for t in tensors)


# What a step does once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_batchnorm_statistics_move_once(err_type, backend):
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh()), nn.Linear(8, CLASSES)).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    PCInfer(model, LOSS, x, y, err_type, n=7, backend=backend)
    twin(x)  # one forward pass in training mode
    assert int(norm.num_batches_tracked) == 1
    assert_same(list(model.buffers())[:2], list(twin.buffers())[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dropout_mask_a_step(backend):
    """With one mask in all iterations, fixed prediction at eta = 1, n = L is backpropagation under that mask."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.5)),
        nn.Linear(64, CLASSES),
    ).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    torch.manual_seed(5)
    PCInfer(model, LOSS, x, y, "FixedPred", eta=1.0, n=3, backend=backend)
    result = grads(model)
    torch.manual_seed(5)
    expected = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    assert_same(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("err_type", ERR_TYPES)
def test_modules_that_work_in_place_are_safe(err_type, backend):
    def net(inplace: bool) -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(inplace), nn.Linear(8, 7), nn.Hardtanh(inplace=inplace), nn.Linear(7, 4)
        ).double()

    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    results = []
    for inplace in (False, True):
        model = net(inplace)
        results.append((PCInfer(model, LOSS, x, y, err_type, n=6, backend=backend), grads(model)))
    (plain, expected), (result, found_grads) = results
    for index in (0, 3, 4):
        assert_same(result[index], plain[index], rtol=0)
    assert_same(found_grads, expected, rtol=0)


def test_float32_is_more_exact_than_the_literal_loop():
    """The literal loop subtracts beliefs from predictions; with a mean loss that cancels (docs/method.md fact 8)."""
    model, x, y = problem(rows=300)
    PCInfer(model, LOSS, x, y, "Strict", backend="reference")
    truth = grads(model)
    model.float()
    errors = {}
    for backend in BACKENDS:
        PCInfer(model, LOSS, x.float(), y, "Strict", backend=backend)
        result = grads(model)
        errors[backend] = max(
            float((f.double() - t).norm() / t.norm()) for f, t in zip(result, truth, strict=True)
        )
    assert errors["eager"] < 1e-5 < errors["reference"]
    assert errors["eager"] < errors["reference"] / 10


# The parts with arguments of the caller's own ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("eta", "n"), [(0.3, 1), (0.3, 6), (1.0, 3), (1.7, 4)])
def test_fixedpred_round_any_activations(eta, n, network, backend):
    model, x, _ = problem(network)
    vhat = random_like(forward_values(model, x))
    top = torch.randn_like(vhat[-1])
    v, epsilon = literal_fixed_prediction(model, vhat, top, eta, n)
    result = FixedPredPCPredErrs(model, vhat, top, eta, n, backend=backend)
    assert_same(result[0], v)
    assert_same(result[1], epsilon, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_exact_round_any_activations(network, backend):
    model, x, y = problem(network)
    vhat = random_like(forward_values(model, x))
    v, epsilon = literal_exact(model, LOSS, y, vhat)
    result = ExactPredErrs(model, LOSS, x, y, vhat, backend=backend)
    assert_same(result[0], v)
    assert_same(result[1], epsilon)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_makes_its_own_forward_pass(backend):
    model, x, y = problem()
    v, epsilon = literal_exact(model, LOSS, y, forward_values(model, x))
    result = ExactPredErrs(model, LOSS, x, y, backend=backend)
    assert_same(result[0], v)
    assert_same(result[1], epsilon)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("n", [1, 5])
def test_strict_from_any_beliefs(n, network, backend):
    model, x, y = problem(network)
    vinit = random_like(forward_values(model, x))
    v, epsilon = literal_strict(model, vinit, LOSS, y, 0.2, n)
    result = StrictPCPredErrs(model, vinit, LOSS, y, 0.2, n, backend=backend)
    assert_same(result[0], v)
    assert_same(result[1], epsilon)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("own_beliefs", [True, False])
def test_setpcgrads_from_any_errors_and_beliefs(own_beliefs, network, backend):
    model, x, _ = problem(network)
    forward = forward_values(model, x)
    v, epsilon = random_like(forward) if own_beliefs else None, random_like(forward)
    expected = literal_grads(model, epsilon, v or forward)
    SetPCGrads(model, [None, *epsilon[1:]], x, v, backend=backend)
    assert_same(grads(model), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_part_draws_a_dropout_mask_of_its_own(backend):
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(64, 64)).double()
    vhat, top = [torch.ones(4, 64).double()] * 4, torch.randn(4, 64, dtype=torch.float64)
    errors = [FixedPredPCPredErrs(model, vhat, top, eta=1.0, n=3, backend=backend)[1] for _ in range(2)]
    (zeros_0, zeros_1), other = ([error == 0 for error in epsilon[:2]] for epsilon in errors)
    assert zeros_1.any() and not torch.equal(zeros_1, other[1])  # each call draws
    assert zeros_0.sum() > zeros_1.sum() * 1.2  # and each layer
    torch.manual_seed(0)
    expected = FixedPredPCPredErrs(model, vhat, top, eta=1.0, n=3, backend="eager")[1]
    torch.manual_seed(0)
    assert_same(FixedPredPCPredErrs(model, vhat, top, eta=1.0, n=3, backend=backend)[1], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_move_batchnorm_statistics_only_in_a_forward_pass(backend):
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh()), nn.Linear(8, CLASSES)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, CLASSES, (6,))
    vhat, _, top = FwdPassPlus(model, LOSS, x, y, backend=backend)
    assert int(norm.num_batches_tracked) == 1
    _, epsilon = FixedPredPCPredErrs(model, vhat, top, backend=backend)
    ExactPredErrs(model, LOSS, x, y, vhat, backend=backend)
    SetPCGrads(model, epsilon, x, vhat, backend=backend)
    SetPCGrads(model, epsilon, x, backend=backend)
    assert int(norm.num_batches_tracked) == 1
    ExactPredErrs(model, LOSS, x, y, backend=backend)
    assert int(norm.num_batches_tracked) == 2
    StrictPCPredErrs(model, vhat, LOSS, y, 0.1, 5, backend=backend)
    assert int(norm.num_batches_tracked) == 3
