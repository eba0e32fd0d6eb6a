"""The cuda backend's resident kernel on a CUDA device: within the project's bounds, replayed, and repeatable.

What is judged how: gpu_helpers.py. Every test here also asserts that the resident kernel was launched, or replayed.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import gpu_helpers
import pytest
import torch
from gpu_helpers import (
    CLASSES,
    DEVICE,
    PRECISIONS,
    STEPS,
    Batch,
    Case,
    bare_layers,
    bound_of,
    distance,
    in_float64,
    last,
    problem,
    same_bits,
    smooth_cnn,
    updates,
)
from torch import nn

import pcfast
from pcfast import networks
from pcfast.checking import checker as checking
from pcfast.precision import use_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("launches"),
]
SMOOTH = gpu_helpers.SMOOTH["cuda"]
GRAM, NO_GRAM = "Gram form of layer 1: yes", "Gram form of layer 1: no"


def mixed() -> nn.Sequential:
    """Every activation but relu, and no size that anything divides."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(37, 61), nn.GELU()),
        nn.Sequential(nn.Linear(61, 53), nn.SiLU()),
        nn.Sequential(nn.Linear(53, 70), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(70, 45), nn.Sigmoid()),
        nn.Sequential(nn.Linear(45, 31), nn.GELU(approximate="tanh")),
        nn.Sequential(nn.Linear(31, 33), nn.Tanh()),
        nn.Linear(33, CLASSES),
    )


def padded_cnn() -> nn.Sequential:
    """Strides and padding, which have no Gram form; both pools; a layer that only pools."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 9, 3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.AvgPool2d(2),
        nn.Sequential(nn.Conv2d(9, 7, (2, 1)), nn.ReLU(), nn.Flatten()),
        nn.Linear(7 * 2 * 3, CLASSES),
    )


CASES = {
    "mnist_cnn": Case(networks.mnist_cnn, (1, 28, 28), GRAM, batch=300),
    "mlp_128": Case(lambda: networks.mlp([784, 128, 128, CLASSES]), (784,), GRAM, batch=128),
    "digits": Case(networks.digits_mlp, (64,), GRAM),
    "few_steps": Case(networks.digits_mlp, (64,), NO_GRAM, num_steps=2),
    "odd_sizes": Case(lambda: networks.mlp([37, 61, 53, 7]), (37,), GRAM),
    "widening": Case(lambda: networks.mlp([37, 19, 101, 7]), (37,), NO_GRAM),
    "one_and_one": Case(lambda: networks.mlp([1, 1, 1, 2], nn.Tanh), (1,), "", batch=3, precisions=("ieee",)),
    "one_hidden_layer": Case(lambda: networks.mlp([64, 96, CLASSES]), (64,), GRAM),
    "mixed": Case(mixed, (37,), ""),
    "padded_cnn": Case(padded_cnn, (2, 24, 25), NO_GRAM),
    "smooth_cnn": Case(smooth_cnn, (3, 12, 12), ""),
    "bare_layers": Case(bare_layers, (30,), NO_GRAM),
    "deep": Case(lambda: networks.mlp([64, *[48] * 14, CLASSES], nn.Tanh), (64,), GRAM, num_steps=20),
    "mse": Case(lambda: networks.mlp([48, 64, 48, 20]), (48,), GRAM, loss="mse"),
    "wide_output": Case(lambda: networks.mlp([48, 32, 200]), (48,), "", precisions=("ieee", "bf16")),
    # smooth: one relu of a single sample on its kink decides a whole update
    "batch_of_one": Case(lambda: networks.mlp([64, 128, 128, CLASSES], nn.Tanh), (64,), NO_GRAM, batch=1),
    "batch_of_one_image": Case(lambda: networks.mnist_cnn((1, 14, 14)), (1, 14, 14), "", batch=1),
    # several samples a block: the last block is not full, nor its last group of samples
    "last_block_not_full": Case(networks.mnist_cnn, (1, 28, 28), GRAM, batch=301),
    "several_waves": Case(networks.digits_mlp, (64,), GRAM, batch=5003, num_steps=5),
}


@pytest.fixture
def backend() -> str:
    return "cuda"


# Right ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name, case in CASES.items() for precision in case.precisions],
)
def test_networks_are_within_the_projects_bounds(name, precision, launches):
    case = CASES[name]
    model = case.make()
    shape = (case.batch, *case.sample)
    with use_precision(precision, DEVICE):
        text = str(pcfast.explain(model, shape, DEVICE, num_steps=case.num_steps, backend="cuda"))
    assert "shared-memory-resident" in text and case.says in text
    report = checking.check(
        model, shape, loss=case.loss, num_steps=case.num_steps, backends=["cuda"], precisions=[precision],
        device=DEVICE, draws=3 if case.batch > 1000 else 5,
    )  # fmt: skip
    assert report.ok, report.failures
    assert {row.backend for row in report.rows} == {"cuda"} and not report.refused
    assert last()[0] == "cuda" and launches and not any(launches)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 100, 1000])
@pytest.mark.parametrize("name", SMOOTH)
def test_any_number_of_steps_agrees(name, num_steps, precision, ours):
    model, x, y = problem(*SMOOTH[name])
    truth = in_float64(model, x, y, num_steps=num_steps)
    # few steps: upper layers alone are reached
    reached = [index for index, update in enumerate(truth) if update.any()]
    with use_precision(precision, DEVICE):
        result = ours(model, x, y, num_steps=num_steps)
    assert all(not update.any() for index, update in enumerate(result) if index not in reached)
    # what is not reached has no relative error; the bound of more steps is not smaller
    bound = bound_of(model, x, y, in_float64(model, x, y), precision)
    if num_steps > STEPS["num_steps"]:
        bound = max(bound, bound_of(model, x, y, truth, precision, num_steps=num_steps))
    assert distance([result[i] for i in reached], [truth[i] for i in reached]) <= bound


@pytest.mark.parametrize("name", SMOOTH)
def test_states_agree_with_float64_from_the_forward_pass_and_from_given_beliefs(name, launches):
    model, x, y = problem(*SMOOTH[name])
    wide, settings = copy.deepcopy(model).double(), {"loss": nn.CrossEntropyLoss(reduction="sum"), **STEPS}
    truth = pcfast.relax(wide, x.double(), y, backend="reference", **settings)
    start = [None, *(v + 0.1 for v in truth.beliefs[1:-1]), None]
    moved = pcfast.relax(wide, x.double(), y, backend="reference", vinit=start, **settings)
    for expected, vinit in ((truth, None), (moved, [None if v is None else v.float() for v in start])):
        result = pcfast.relax(model, x, y, backend="cuda", vinit=vinit, **settings)
        assert distance(result.beliefs, expected.beliefs) < 1e-5
        assert distance(result.errors[1:], expected.errors[1:]) < 1e-4
    assert launches == [0, 0]


# Repeatable ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["mnist_cnn", "odd_sizes", "padded_cnn"])
def test_runs_are_bit_for_bit_equal(name, precision, ours):
    case = CASES[name]
    model, x, y = problem(case.make, case.sample, rows=101)
    y = y % 7  # the fewest classes of them
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
@pytest.mark.parametrize("name", SMOOTH)
def test_a_sample_does_not_depend_on_its_batch(name, precision, gram):
    """Batches of other sizes have other numbers of samples a block, and other last blocks."""
    with use_precision(precision, DEVICE):
        batch = Batch("cuda", *SMOOTH[name], 1003, gram)
        for rows in (slice(0, 1), slice(1002, 1003), slice(0, 37), slice(100, 400), slice(5, 1003)):
            batch.assert_alone_as_in_the_batch(rows)


# Replay and what the caller does -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMOOTH)
def test_weights_that_are_views(name, precision, ours):
    """At odd offsets in a buffer of all parameters, and with other strides than a new layer's."""
    model, x, y = problem(*SMOOTH[name])
    misplaced = copy.deepcopy(model)
    flat = torch.zeros(1 + sum(p.numel() + p.numel() % 2 for p in model.parameters()), device=DEVICE)
    first = 1
    for own in misplaced.parameters():
        own.data, first = (
            flat[first : first + own.numel()].view_as(own).copy_(own.data),
            first + own.numel() + own.numel() % 2,
        )
        assert own.data_ptr() % 8 == 4
    strided = copy.deepcopy(model)
    for own in strided.parameters():
        if own.dim() > 1:
            own.data = own.data.transpose(0, 1).contiguous().transpose(0, 1)
    truth = in_float64(model, x, y)
    bound = bound_of(model, x, y, truth, precision)
    for other in (misplaced, strided):
        with use_precision(precision, DEVICE):
            assert distance(ours(other, x, y), truth) <= bound


# What goes wrong -----------------------------------------------------------------------------------------------


AFTER_AN_ERROR = """
import os
from unittest import mock

import torch

import pcfast
from pcfast import networks
from pcfast.backends.cuda import launch as loop

seen, prepare = [], loop.prepare
model = networks.mlp([37, 64, 53, 10]).cuda()
x, y = torch.randn(33, 37, device="cuda"), torch.zeros(33, dtype=torch.int64, device="cuda")
pcfast.use_cuda_graphs(False)
with mock.patch.object(loop, "prepare", lambda *a, **k: seen.append(prepare(*a, **k)) or seen[-1]):
    pcfast.pc_loss(model, x, y, backend="cuda")
pcfast.synchronize()
(found, launch), = seen
launch()
torch.cuda.synchronize()

torch.ones(4, device="cuda")[torch.full((1,), 10**6, device="cuda")]  # an assertion fails on the device
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("torch:", str(error).splitlines()[0], flush=True)
# a whole step does not get as far as the kernel
try:
    pcfast.pc_loss(model, x, y, backend="cuda")
except Exception as error:
    print("step:", type(error).__name__, str(error).splitlines()[0], flush=True)
try:
    launch()
except pcfast.BackendError as error:
    print("kernel:", error, flush=True)
os._exit(0)  # what is left of the context cannot be torn down
"""


def test_a_launch_after_an_error_that_broke_the_context_names_cause_and_remedy():
    done = subprocess.run([sys.executable, "-c", AFTER_AN_ERROR], capture_output=True, text=True, timeout=300)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and list(said) == ["torch", "step", "kernel"], done.stdout + done.stderr
    assert "device-side assert" in said["torch"] and "device-side assert" in said["step"]
    assert "could not be launched on cuda" in said["kernel"] and "device-side assert" in said["kernel"]
    assert "restart Python" in said["kernel"]


def test_what_the_kernel_cannot_do_is_refused_by_name(launches):
    model, x, y = problem(*SMOOTH["mlp"])
    with pytest.raises(pcfast.BackendError, match="compute in float32, not"):
        updates(copy.deepcopy(model).double(), x.double(), y, backend="cuda")
    with pytest.raises(pcfast.BackendError, match="bytes of shared memory"):
        updates(networks.mlp([37, 600, 600, CLASSES]).to(DEVICE), x, y, backend="cuda")
    with pytest.raises(pcfast.BackendError, match="stay on chip"):
        pcfast.relax(model, x, y, backend="cuda", energies=True)
    with pytest.raises(pcfast.BackendError, match="cross-entropy and mse"):
        updates(model, x, y, loss=lambda output, y: output.square().sum(), backend="cuda")
    opaque = nn.Sequential(nn.Sequential(nn.Linear(37, 12), nn.Softmax(1)), nn.Linear(12, CLASSES)).to(DEVICE)
    with pytest.raises(pcfast.BackendError, match="Softmax"):
        updates(opaque, x, y, backend="cuda")
    assert launches == []
