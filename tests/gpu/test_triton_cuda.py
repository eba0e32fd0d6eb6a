"""The triton backend on a CUDA device: its fused kernels within the project's bounds, replayed, and repeatable.

What is judged how: gpu_helpers.py.
"""

from __future__ import annotations

import copy

import gpu_helpers
import implicit_convolutions
import pytest
import torch
from against_reference import MOVING
from gpu_helpers import (
    CLASSES,
    DEVICE,
    FIRST,
    PRECISIONS,
    ROWS,
    STEPS,
    Batch,
    Case,
    allowed,
    bare_layers,
    distance,
    in_float64,
    last,
    problem,
    same_bits,
    smooth_cnn,
    updates,
)
from torch import Tensor, nn

import pcfast
from pcfast import networks
from pcfast.checking import checker as checking
from pcfast.precision import use_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMOOTH = gpu_helpers.SMOOTH["triton"]

ONE_LAUNCH, TWO_STAGES = "one launch for all iterations, mlp_relaxation", "two stages an iteration"
GIB = 2**30


def mixed() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(37, 61), nn.GELU()),
        nn.Sequential(nn.Linear(61, 53), nn.SiLU()),
        nn.Sequential(nn.Linear(53, 70), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(70, 45), nn.Sigmoid()),
        nn.Linear(45, CLASSES),
    )


def small_cifar_cnn() -> nn.Sequential:
    """networks.cifar_cnn with few channels."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(16 * 3 * 3, 32), nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, CLASSES),
    )


CASES = {
    "fits": Case(lambda: networks.mlp([64, 128, 128, CLASSES]), (64,), ONE_LAUNCH),
    "mlp_600": Case(networks.mlp_600, (784,), TWO_STAGES, batch=300),
    "wide_cross_entropy": Case(
        lambda: networks.mlp([48, 96, 1000]), (48,), "loss in output_error", precisions=("ieee", "bf16")
    ),
    "wider_than_a_row_tile": Case(
        lambda: networks.mlp([48, 96, 1500]), (48,), "loss in output_error", precisions=("tf32",)
    ),
    "wide_mse": Case(
        lambda: networks.mlp([48, 96, 200]),
        (48,),
        "loss in output_error",
        loss="mse",
        precisions=("ieee", "bf16"),
    ),
    "mse": Case(
        lambda: networks.mlp([48, 64, 48, 20]), (48,), ONE_LAUNCH, loss="mse", precisions=("ieee", "bf16")
    ),
    "bare_layers": Case(bare_layers, (30,), "pointwise_error", precisions=("ieee", "bf16")),
    "mnist_cnn": Case(lambda: networks.mnist_cnn((1, 14, 14)), (1, 14, 14), TWO_STAGES),
    "cifar_cnn": Case(small_cifar_cnn, (3, 12, 12), TWO_STAGES),
    "mixed": Case(mixed, (37,), "several activations", precisions=("ieee",)),
    "odd_sizes": Case(lambda: networks.mlp([37, 61, 53, 7]), (37,), ONE_LAUNCH, precisions=("tf32", "bf16")),
    # smooth: one relu of a single sample on its kink decides a whole update
    "batch_of_one": Case(
        lambda: networks.mlp([37, 64, 64, CLASSES], nn.Tanh),
        (37,),
        ONE_LAUNCH,
        batch=1,
        precisions=("ieee", "bf16"),
    ),
    "one_hidden_layer": Case(
        lambda: networks.mlp([64, 96, CLASSES]), (64,), ONE_LAUNCH, precisions=("bf16",)
    ),
    "deep": Case(lambda: networks.mlp([64, *[48] * 8, CLASSES], nn.Tanh), (64,), "", precisions=("bf16",)),
    # from some thousand rows on launches have larger tiles, into which the output layer's loss does not fit
    "large_batch_fits": Case(
        networks.digits_mlp, (64,), ONE_LAUNCH, batch=5000, num_steps=5, precisions=("bf16",)
    ),
    "large_batch_staged": Case(
        lambda: networks.mlp([64, 600, 600, CLASSES]),
        (64,),
        TWO_STAGES,
        batch=9000,
        num_steps=5,
        precisions=("tf32", "bf16"),
    ),
}


def narrowing_cnn() -> nn.Sequential:
    """Layer 2 has far fewer channels than layer 1."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(24, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(100, 32), nn.Tanh()),
        nn.Linear(32, CLASSES),
    )


GRAM = {
    "linear": (lambda: networks.mlp([37, 256, 48, CLASSES], nn.Tanh), (37,)),
    "convolution": (narrowing_cnn, (3, 12, 12)),
}


@pytest.fixture
def implicit(monkeypatch):
    implicit_convolutions.everywhere(monkeypatch)


def ours(model: nn.Sequential, x: Tensor, y: Tensor, **settings) -> list[Tensor]:
    """Updates of the triton backend."""
    result = updates(model, x, y, backend="triton", **settings)
    assert last()[0] == "triton"
    return result


# Right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name, case in CASES.items() for precision in case.precisions],
)
def test_networks_are_within_the_projects_bounds(name, precision):
    case = CASES[name]
    model = case.make()
    shape = (case.batch, *case.sample)
    with use_precision(precision, DEVICE):
        assert case.says in str(pcfast.explain(model, shape, DEVICE, backend="triton"))
    report = checking.check(
        model, shape, loss=case.loss, num_steps=case.num_steps, backends=["triton"], precisions=[precision],
        device=DEVICE, draws=3 if case.batch > 1000 else 5,
    )  # fmt: skip
    assert report.ok, report.failures
    assert {row.backend for row in report.rows} == {"triton"} and not report.refused
    assert last() == ("triton", True, "")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["cifar_cnn", "average_pools"])
def test_implicit_convolutions_are_within_the_projects_bounds(name, precision, implicit):
    make, sample = (small_cifar_cnn if name == "cifar_cnn" else smooth_cnn), (3, 12, 12)
    model = make()
    with use_precision(precision, DEVICE):
        assert "conv_predict in tiles" in str(
            pcfast.explain(model, (ROWS, *sample), DEVICE, num_steps=12, backend="triton")
        )
    report = checking.check(
        model,
        (ROWS, *sample),
        num_steps=12,
        backends=["triton"],
        precisions=[precision],
        device=DEVICE,
        draws=5,
    )
    assert report.ok, report.failures
    assert {row.backend for row in report.rows} == {"triton"} and not report.refused
    assert last() == ("triton", True, "")


def test_implicit_convolutions_follow_weights_updated_in_place(implicit):
    model, x, y = problem(*SMOOTH["convolutions"])
    for _ in range(2):
        ours(model, x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    replayed = ours(model, x, y)
    assert last()[1]
    truth = in_float64(model, x, y)
    assert distance(replayed, truth) <= allowed(model, x, y, truth)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gram_form_of_a_convolution(precision):
    model = narrowing_cnn()
    shape = (ROWS, 3, 12, 12)
    with use_precision(precision, DEVICE):
        assert "pointwise_gram" in str(pcfast.explain(model, shape, DEVICE, num_steps=12, backend="triton"))
    report = checking.check(
        model, shape, num_steps=12, backends=["triton"], precisions=[precision], device=DEVICE, draws=5
    )
    assert report.ok, report.failures
    assert last() == ("triton", True, "")


def test_energies_and_given_beliefs_take_the_stages_one_by_one():
    model, x, y = problem(*SMOOTH["one_launch"])
    wide, settings = copy.deepcopy(model).double(), {"loss": nn.CrossEntropyLoss(reduction="sum"), **STEPS}
    truth = pcfast.relax(wide, x.double(), y, backend="reference", energies=True, **settings)
    result = pcfast.relax(model, x, y, backend="triton", energies=True, **settings)
    torch.testing.assert_close(result.energies.double(), truth.energies, rtol=1e-4, atol=1e-6)
    start = [None, *(v + 0.1 for v in truth.beliefs[1:3]), None]
    truth = pcfast.relax(wide, x.double(), y, backend="reference", vinit=start, **settings)
    start = [None if v is None else v.float() for v in start]
    result = pcfast.relax(model, x, y, backend="triton", vinit=start, **settings)
    assert (
        distance(result.beliefs, truth.beliefs) < 1e-5
        and distance(result.errors[1:], truth.errors[1:]) < 1e-4
    )


def allowed_moving(model, x, y, truth: list[Tensor], precision: str, settings: dict) -> float:
    """As gpu_helpers.allowed, and three times what eager on this device loses: momentum sums up rounding, and the
    CPU has no TF32."""
    autocast = torch.bfloat16 if precision == "bf16" else None
    eager = updates(copy.deepcopy(model), x, y, backend="eager", **settings)
    assert last()[0] == "eager"
    return max(allowed(model, x, y, truth, autocast, **settings), 3 * distance(eager, truth))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("convolutions", ["composed", "implicit"])
@pytest.mark.parametrize("way", MOVING)
@pytest.mark.parametrize("name", SMOOTH)
def test_momentum_and_schedules(name, way, convolutions, precision, request):
    """Plain, recorded and replayed. Two step sizes follow each other as arguments of launches, or from a table."""
    if convolutions == "implicit":
        if name != "convolutions":
            pytest.skip("a network without convolutions")
        request.getfixturevalue("implicit")
    model, x, y = problem(*SMOOTH[name])
    settings = MOVING[way](STEPS["num_steps"])
    with use_precision(precision, DEVICE):
        truth = in_float64(model, x, y, **settings)
        bound = allowed_moving(model, x, y, truth, precision, settings)
        result = []
        for now in (("triton", False, FIRST), ("triton", True, ""), ("triton", True, "")):
            result.append(ours(model, x, y, **settings))
            assert last() == now
            assert distance(result[-1], truth) <= bound
    assert same_bits(result[1], result[2])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", MOVING)
@pytest.mark.parametrize("name", GRAM)
def test_momentum_and_schedules_in_gram_form(name, way, precision):
    model, x, y = problem(*GRAM[name])
    settings = {"num_steps": 12, **MOVING[way](12)}
    with use_precision(precision, DEVICE):
        truth = in_float64(model, x, y, **settings)
        bound = allowed_moving(model, x, y, truth, precision, settings)
        for _ in range(3):
            assert distance(ours(model, x, y, **settings), truth) <= bound
            assert pcfast.last_run().plan.gram


# Repeatable ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("convolutions", ["composed", "implicit"])
def test_runs_are_bit_for_bit_equal(name, precision, convolutions, request):
    if convolutions == "implicit":
        if name != "convolutions":
            pytest.skip("a network without convolutions")
        request.getfixturevalue("implicit")
    model, x, y = problem(*SMOOTH[name])
    with use_precision(precision, DEVICE):
        pcfast.use_cuda_graphs(False)
        try:
            plain = [ours(model, x, y) for _ in range(3)]
        finally:
            pcfast.use_cuda_graphs(True)
        ours(model, x, y)
        replayed = [ours(model, x, y) for _ in range(3)]
    assert last()[1]
    assert all(same_bits(run, plain[0]) for run in plain)
    assert all(same_bits(run, replayed[0]) for run in replayed)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["one_launch", "two_stages"])
def test_a_row_does_not_depend_on_its_batch(name, precision, gram):
    with use_precision(precision, DEVICE):
        count = 300 if DEVICE.type == "cuda" else 70  # interpreted kernels are slow
        batch = Batch("triton", *SMOOTH[name], count, gram)
        for first, end in ((0, 1), (count - 1, count), (0, 37), (count // 3, count // 3 + 37)):
            batch.assert_alone_as_in_the_batch(slice(first, end))


def test_a_row_does_not_depend_on_its_batch_where_tiles_grow():
    with use_precision("bf16", DEVICE):
        batch = Batch("triton", *SMOOTH["two_stages"], 9000, gram=False, num_steps=5)
        for rows in (slice(0, 40), slice(8963, 9000)):
            batch.assert_alone_as_in_the_batch(rows)


def test_a_matrix_of_more_than_two_to_the_31_elements():
    needed, free = 110 * GIB, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / GIB:.0f} GiB of GPU memory, {free / GIB:.0f} are free")
    width = 4096
    rows = 2**31 // width + 130
    with use_precision("bf16", DEVICE):
        batch = Batch(
            "triton",
            lambda: networks.mlp([16, 16, width, CLASSES], nn.Tanh),
            (16,),
            rows,
            gram=False,
            num_steps=4,
        )
        assert dict(batch.run.results)[2].numel() > 2**31
        for ends in (slice(0, 40), slice(rows - 40, rows)):
            batch.assert_alone_as_in_the_batch(ends)
    del batch
    torch.cuda.empty_cache()


# What goes wrong -----------------------------------------------------------------------------------------------


def test_what_the_kernels_cannot_do_is_refused_by_name():
    model, x, y = problem(*SMOOTH["one_launch"])
    with pytest.raises(pcfast.BackendError, match="compute in float32, not"):
        updates(model.double(), x.double(), y, backend="triton")
    opaque = nn.Sequential(nn.Sequential(nn.Linear(37, 12), nn.Softmax(1)), nn.Linear(12, CLASSES)).to(DEVICE)
    with pytest.raises(pcfast.BackendError, match="Softmax"):
        updates(opaque, x, y, backend="triton")


# In words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "word"), [("ieee", "tf32x3"), ("tf32", "tf32"), ("bf16", "bf16")])
def test_explain_names_the_kernels(precision, word):
    model = networks.mnist_cnn()
    with use_precision(precision, DEVICE):
        text = str(pcfast.explain(model, (300, 1, 28, 28), DEVICE, backend="triton"))
        whole = str(pcfast.explain(networks.digits_mlp(), (32, 64), DEVICE, backend="triton"))
    assert "on backend triton" in text and 'eager refused: backend="triton" was asked for' in text
    assert f"products of linear layers in {word}" in text
    assert TWO_STAGES in text and "linear_predict for layer" in text
    assert "linear_feedback into layers 2, 3, 4" in text
    assert "its input is clamped: evaluated once, outside the loop" in text
    assert ONE_LAUNCH in whole and f"in {word}" in whole
