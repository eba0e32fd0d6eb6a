"""The cuda backend's resident kernel on a CUDA device: within the project's bounds, replayed, and repeatable.

What is judged how: gpu_helpers.py. Every test here also asserts that the resident kernel was launched, or replayed.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
from gpu_helpers import (
    CLASSES,
    DEVICE,
    FIRST,
    PRECISIONS,
    ROWS,
    STEPS,
    TOO_FAST,
    Batch,
    Case,
    allowed,
    distance,
    in_float64,
    in_threads,
    last,
    no_waiting,
    problem,
    same_bits,
    updates,
    views_of,
)
from torch import Tensor, nn

import pcfast
from pcfast import networks
from pcfast.backends.cuda import native
from pcfast.checking import checker as checking
from pcfast.precision import use_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

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


def bare_layers() -> nn.Sequential:
    """As Torch2PC has them: activations are PC layers of their own."""
    return nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, CLASSES))


def smooth_mlp() -> nn.Sequential:
    return networks.mlp([37, 64, 53, CLASSES], nn.Tanh)


def smooth_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.GELU(), nn.Flatten()),
        nn.Linear(16 * 4 * 4, CLASSES),
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
SMOOTH = {"mlp": (smooth_mlp, (37,)), "cnn": (smooth_cnn, (3, 12, 12))}


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list[int]:
    """Statuses of the resident kernel's launches so far."""
    module, seen = native.load(), []
    launch = module.resident

    def counted(*arguments) -> int:
        seen.append(launch(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "resident", counted)
    return seen


@pytest.fixture
def ours(launches):
    """Updates of the cuda backend. A replayed step may be the one that was recorded, which has launched."""

    def run(model: nn.Sequential, x: Tensor, y: Tensor, **settings) -> list[Tensor]:
        before = len(launches)
        found = updates(model, x, y, backend="cuda", **settings)
        name, replayed, _ = last()
        assert name == "cuda"
        assert set(launches[before:]) <= {0} and (replayed or len(launches) == before + 1)
        return found

    return run


def bound_of(model: nn.Sequential, x: Tensor, y: Tensor, truth: list[Tensor], precision: str, **settings):
    """As gpu_helpers.allowed, in a precision."""
    with use_precision("tf32" if precision == "tf32" else "ieee", DEVICE):
        return allowed(model, x, y, truth, torch.bfloat16 if precision == "bf16" else None, **settings)


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
@pytest.mark.parametrize("name", SMOOTH)
def test_one_step_agrees_plain_recorded_and_replayed(name, precision, ours):
    model, _, _ = problem(*SMOOTH[name])
    for now in (("cuda", False, FIRST), ("cuda", True, ""), ("cuda", True, "")):
        _, x, y = problem(*SMOOTH[name])
        truth = in_float64(model, x, y)
        with use_precision(precision, DEVICE):
            found = ours(model, x, y)
        assert last() == now
        assert distance(found, truth) <= bound_of(model, x, y, truth, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 100, 1000])
@pytest.mark.parametrize("name", SMOOTH)
def test_any_number_of_steps_agrees(name, num_steps, precision, ours):
    model, x, y = problem(*SMOOTH[name])
    truth = in_float64(model, x, y, num_steps=num_steps)
    # few steps: upper layers alone are reached
    reached = [index for index, update in enumerate(truth) if update.any()]
    with use_precision(precision, DEVICE):
        found = ours(model, x, y, num_steps=num_steps)
    assert all(not update.any() for index, update in enumerate(found) if index not in reached)
    # what is not reached has no relative error; the bound of more steps is not smaller
    bound = bound_of(model, x, y, in_float64(model, x, y), precision)
    if num_steps > STEPS["num_steps"]:
        bound = max(bound, bound_of(model, x, y, truth, precision, num_steps=num_steps))
    assert distance([found[i] for i in reached], [truth[i] for i in reached]) <= bound


@pytest.mark.parametrize("name", SMOOTH)
def test_states_agree_with_float64_from_the_forward_pass_and_from_given_beliefs(name, launches):
    model, x, y = problem(*SMOOTH[name])
    wide, settings = copy.deepcopy(model).double(), {"loss": nn.CrossEntropyLoss(reduction="sum"), **STEPS}
    truth = pcfast.relax(wide, x.double(), y, backend="reference", **settings)
    start = [None, *(v + 0.1 for v in truth.beliefs[1:-1]), None]
    moved = pcfast.relax(wide, x.double(), y, backend="reference", vinit=start, **settings)
    for expected, vinit in ((truth, None), (moved, [None if v is None else v.float() for v in start])):
        found = pcfast.relax(model, x, y, backend="cuda", vinit=vinit, **settings)
        assert distance(found.beliefs, expected.beliefs) < 1e-5
        assert distance(found.errors[1:], expected.errors[1:]) < 1e-4
    assert launches == [0, 0]


@pytest.mark.parametrize("method", ["exact", "fixed_prediction"])
def test_methods_without_a_loop_are_those_of_eager(method, launches):
    model, x, y = problem(*SMOOTH["mlp"])
    eager = updates(model, x, y, method=method, backend="eager")
    found = updates(model, x, y, method=method, backend="cuda")
    assert last()[0] == "cuda" and launches == []
    assert distance(found, eager) < 1e-6


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


@pytest.mark.parametrize("name", SMOOTH)
def test_replays_follow_weights_updated_in_place_and_new_inputs(name, ours, launches):
    model, x, y = problem(*SMOOTH[name])
    for _ in range(2):
        ours(model, x, y)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        _, x, y = problem(*SMOOTH[name])
        before = len(launches)
        replayed = ours(model, x, y)
        assert last() == ("cuda", True, "") and len(launches) == before
        truth = in_float64(model, x, y)
        assert distance(replayed, truth) <= allowed(model, x, y, truth)


def test_step_size_and_number_of_steps_may_change(ours):
    model, x, y = problem(*SMOOTH["mlp"])
    found = {}
    for step_size, num_steps in [(0.1, 8), (0.1, 8), (0.05, 8), (0.1, 5), (0.05, 8), (0.1, 8)]:
        now = {"step_size": step_size, "num_steps": num_steps}
        truth = in_float64(model, x, y, **now)
        got = ours(model, x, y, **now)
        assert distance(got, truth) <= allowed(model, x, y, truth, **now)
        found.setdefault((step_size, num_steps), []).append(got)
    assert same_bits(found[0.1, 8][-1], found[0.1, 8][1])
    assert not same_bits(found[0.1, 8][0], found[0.05, 8][0])


def test_batches_of_several_sizes_take_turns(ours):
    """An epoch whose last batch is smaller, twice."""
    model, _, _ = problem(*SMOOTH["mlp"])
    for rows in (ROWS, ROWS, 20, ROWS, ROWS, 20, 1):
        _, x, y = problem(*SMOOTH["mlp"], rows=rows)
        truth = in_float64(model, x, y)
        assert distance(ours(model, x, y), truth) <= allowed(model, x, y, truth)


@pytest.mark.parametrize("name", SMOOTH)
def test_inputs_that_are_views(name, ours):
    model, x, y = problem(*SMOOTH[name])
    labels = torch.stack([y, y], 1)[:, 1]
    for kind, view in views_of(x).items():
        truth = in_float64(model, view, y)
        bound = allowed(model, view.contiguous(), y, truth)
        for _ in range(2):
            assert distance(ours(model, view, labels), truth) <= bound, kind


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


def test_channels_last_inputs_and_weights(ours):
    model, x, y = problem(*SMOOTH["cnn"])
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    for _ in range(3):
        assert distance(ours(model, x, y), truth) <= bound


@pytest.mark.parametrize("name", SMOOTH)
def test_another_stream(name, ours):
    model, x, y = problem(*SMOOTH[name])
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    for _ in range(2):
        ours(model, x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)  # what does not wait for this stream is too early
        x = x.clone()
        for expected in (False, True, True):  # a graph of its own
            found = ours(model, x, y)
            assert last()[1] == expected
    torch.cuda.current_stream().wait_stream(stream)
    assert distance(found, truth) <= bound


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device(ours):
    model, x, y = problem(*SMOOTH["mlp"])
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    model, x, y = model.to("cuda:1"), x.to("cuda:1"), y.to("cuda:1")
    assert torch.cuda.current_device() == 0
    for _ in range(3):
        found = ours(model, x, y)
        assert {update.device for update in found} == {torch.device("cuda:1")}
        assert distance(found, truth) <= bound
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SMOOTH)
def test_inside_a_capture_of_the_callers(name, precision, ours):
    model, x, y = problem(*SMOOTH[name])
    other = torch.randn_like(x)
    with use_precision(precision, DEVICE):
        expected = updates(copy.deepcopy(model), other, y, backend="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks for: warm up on a side stream
            for _ in range(3):
                ours(model, x, y)
        torch.cuda.current_stream().wait_stream(side)
        pcfast.synchronize()
        torch.clear_autocast_cache()  # casts made before would not be repeated in the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = ours(model, x, y)
        assert last() == ("cuda", False, "the caller is capturing a graph already")
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    truth = in_float64(model, x, y)
    bound = bound_of(model, x, y, truth, precision)
    assert distance(found, truth) <= bound and distance(expected, truth) <= bound
    pcfast.synchronize()


def test_threads_do_not_disturb_each_other(ours):
    cases = [problem(*SMOOTH[name]) for name in SMOOTH for _ in range(3)]
    alone = [ours(*case) for case in cases]

    def gradients(model, x, y) -> list[Tensor]:
        loss = pcfast.pc_loss(model, x, y, backend="cuda", **STEPS)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def work(case) -> list[list[Tensor]]:
        return [gradients(*case) for _ in range(4)]

    found = in_threads([functools.partial(work, case) for case in cases])
    for expected, runs in zip(alone, found, strict=True):
        assert all(distance(run, expected) < 1e-5 for run in runs)
    pcfast.synchronize()


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("check", ["auto", "off"])
def test_a_step_never_waits_for_the_device(name, check, ours):
    model, x, y = problem(*SMOOTH[name])
    ours(model, x, y, check=check)  # loads the module
    pcfast.use_cuda_graphs(False)
    try:
        with no_waiting():
            ours(model, x, y, check=check)
    finally:
        pcfast.use_cuda_graphs(True)
    for _ in range(2):
        ours(model, x, y, check=check)
    with no_waiting():
        ours(model, x, y, check=check)
    assert last() == ("cuda", True, "")


# What goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_divergence_names_iteration_and_layer(name):
    model, x, _ = problem(*SMOOTH[name])
    target = 1e3 * torch.ones(ROWS, CLASSES, device=DEVICE)
    with pytest.raises(pcfast.RelaxationDiverged) as truth:
        updates(copy.deepcopy(model).cpu(), x.cpu(), target.cpu(), backend="eager", check="sync", **TOO_FAST)
    for _ in range(3):  # plain, recorded, replayed
        with pytest.raises(pcfast.RelaxationDiverged) as found:
            updates(model, x, target, backend="cuda", check="sync", **TOO_FAST)
        assert abs(found.value.iteration - truth.value.iteration) <= 1
        assert 1 <= found.value.layer <= len(model)


@pytest.mark.parametrize("name", SMOOTH)
def test_deferred_divergence_zeroes_the_updates_and_is_reported_once(name, ours):
    model, x, y = problem(*SMOOTH[name])
    target = 1e3 * torch.ones(ROWS, CLASSES, device=DEVICE)
    for _ in range(3):
        found = updates(model, x, target, backend="cuda", check="deferred", **TOO_FAST)
        assert not any(update.any() for update in found)
        with pytest.raises(pcfast.RelaxationDiverged) as failure:
            pcfast.synchronize()
        assert failure.value.iteration is not None and failure.value.step_size == TOO_FAST["step_size"]
        pcfast.synchronize()
        assert all(update.any() for update in ours(model, x, y))
        pcfast.synchronize()


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
