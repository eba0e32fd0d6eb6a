"""The triton backend on a CUDA device: its fused kernels within the project's bounds, replayed, and repeatable.

What is judged how: gpu_helpers.py.
"""

from __future__ import annotations

import copy
import functools

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
from pcfast.checking import checker as checking
from pcfast.precision import use_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ONE_LAUNCH, TWO_STAGES = "one launch for all iterations, mlp_relaxation", "two stages an iteration"
GIB = 2**30


def bare_layers() -> nn.Sequential:
    """As Torch2PC has them: activations are PC layers of their own."""
    return nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, CLASSES))


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


def smooth_cnn() -> nn.Sequential:
    """No kinks but a max-pool's: one step of it can be judged without medians."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(8, 12, 3), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.GELU(), nn.Flatten()),
        nn.Linear(16 * 4 * 4, CLASSES),
    )


def smooth_mlp() -> nn.Sequential:
    return networks.mlp([37, 64, 53, CLASSES], nn.Tanh)


def smooth_staged() -> nn.Sequential:
    """Its loop weights, 1.1 MB in bfloat16, are more than one SM has of L1."""
    return networks.mlp([64, 600, 600, 600, CLASSES], nn.Tanh)


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


SMOOTH = {
    "one_launch": (smooth_mlp, (37,)),
    "two_stages": (smooth_staged, (64,)),
    "convolutions": (smooth_cnn, (3, 12, 12)),
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
    found = updates(model, x, y, backend="triton", **settings)
    assert last()[0] == "triton"
    return found


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


@pytest.mark.parametrize("name", SMOOTH)
def test_one_step_agrees_plain_recorded_and_replayed(name):
    model, _, _ = problem(*SMOOTH[name])
    for now in (("triton", False, FIRST), ("triton", True, ""), ("triton", True, "")):
        _, x, y = problem(*SMOOTH[name])
        found = ours(model, x, y)
        assert last() == now
        truth = in_float64(model, x, y)
        assert distance(found, truth) <= allowed(model, x, y, truth)


@pytest.mark.parametrize("method", ["exact", "fixed_prediction"])
def test_methods_without_a_loop_are_those_of_eager(method):
    model, x, y = problem(*SMOOTH["one_launch"])
    eager = updates(model, x, y, method=method, backend="eager")
    assert distance(ours(model, x, y, method=method), eager) < 1e-6


def test_energies_and_given_beliefs_take_the_stages_one_by_one():
    model, x, y = problem(*SMOOTH["one_launch"])
    wide, settings = copy.deepcopy(model).double(), {"loss": nn.CrossEntropyLoss(reduction="sum"), **STEPS}
    truth = pcfast.relax(wide, x.double(), y, backend="reference", energies=True, **settings)
    found = pcfast.relax(model, x, y, backend="triton", energies=True, **settings)
    torch.testing.assert_close(found.energies.double(), truth.energies, rtol=1e-4, atol=1e-6)
    start = [None, *(v + 0.1 for v in truth.beliefs[1:3]), None]
    truth = pcfast.relax(wide, x.double(), y, backend="reference", vinit=start, **settings)
    start = [None if v is None else v.float() for v in start]
    found = pcfast.relax(model, x, y, backend="triton", vinit=start, **settings)
    assert (
        distance(found.beliefs, truth.beliefs) < 1e-5 and distance(found.errors[1:], truth.errors[1:]) < 1e-4
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
        found = []
        for now in (("triton", False, FIRST), ("triton", True, ""), ("triton", True, "")):
            found.append(ours(model, x, y, **settings))
            assert last() == now
            assert distance(found[-1], truth) <= bound
    assert same_bits(found[1], found[2])


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


# Replay and what the caller does -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_weights_updated_in_place_are_followed(name):
    model, x, y = problem(*SMOOTH[name])
    for _ in range(2):
        ours(model, x, y)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        replayed = ours(model, x, y)
        assert last()[1]
        fresh = ours(copy.deepcopy(model), x, y)  # other addresses: a first call
        assert not last()[1]
        assert distance(replayed, fresh) < 1e-5
        truth = in_float64(model, x, y)
        assert distance(replayed, truth) <= allowed(model, x, y, truth)


@pytest.mark.parametrize("name", ["one_launch", "two_stages"])
def test_step_size_and_number_of_steps_may_change(name):
    model, x, y = problem(*SMOOTH[name])
    found = {}
    for settings in [
        (0.1, 8),
        (0.1, 8),
        (0.05, 8),
        (0.05, 8),
        (0.1, 3),
        (0.1, 3),
        (0.1, 1),
        (0.1, 0),
        (0.1, 8),
    ]:
        now = dict(zip(("step_size", "num_steps"), settings, strict=True))
        truth = in_float64(model, x, y, **now)
        reached = [
            index for index, update in enumerate(truth) if update.any()
        ]  # few steps: upper layers alone
        got = ours(model, x, y, **now)
        assert all(not update.any() for index, update in enumerate(got) if index not in reached)
        bound = allowed(model, x, y, in_float64(model, x, y))
        assert distance([got[i] for i in reached], [truth[i] for i in reached]) <= bound
        found.setdefault(settings, []).append(got)
    assert same_bits(found[0.1, 8][-1], found[0.1, 8][1])
    assert not same_bits(found[0.1, 8][0], found[0.05, 8][0])


def test_batches_of_several_sizes_take_turns():
    """An epoch whose last batch is smaller, twice."""
    model, _, _ = problem(*SMOOTH["one_launch"])
    for rows in (ROWS, ROWS, 20, ROWS, ROWS, 20, 1):
        _, x, y = problem(*SMOOTH["one_launch"], rows=rows)
        truth = in_float64(model, x, y)
        assert distance(ours(model, x, y), truth) <= allowed(model, x, y, truth)


@pytest.mark.parametrize("name", SMOOTH)
def test_inputs_that_are_views(name):
    model, x, y = problem(*SMOOTH[name])
    labels = torch.stack([y, y], 1)[:, 1]
    for kind, view in views_of(x).items():
        truth = in_float64(model, view, y)
        bound = allowed(model, view.contiguous(), y, truth)
        for _ in range(2):
            assert distance(ours(model, view, labels), truth) <= bound, kind


def test_channels_last_inputs_and_weights():
    model, x, y = problem(*SMOOTH["convolutions"])
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    for _ in range(3):
        assert distance(ours(model, x, y), truth) <= bound


@pytest.mark.parametrize("name", SMOOTH)
def test_another_stream(name):
    model, x, y = problem(*SMOOTH[name])
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    for _ in range(2):
        ours(model, x, y)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for expected in (False, True, True):  # a graph of its own
            found = ours(model, x, y)
            assert last()[1] == expected
    torch.cuda.current_stream().wait_stream(stream)
    assert distance(found, truth) <= bound


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", SMOOTH)
def test_another_device_than_the_current_one(name):
    model, x, y = problem(*SMOOTH[name])
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    model, x, y = model.to("cuda:1"), x.to("cuda:1"), y.to("cuda:1")
    for expected in (False, True, True):
        found = ours(model, x, y)
        assert last()[1] == expected and found[0].device == x.device
        assert torch.cuda.current_device() == 0
        assert distance(found, truth) <= bound


@pytest.mark.parametrize("name", SMOOTH)
def test_under_torch_compile(name):
    model, x, y = problem(*SMOOTH[name])
    expected = ours(copy.deepcopy(model), x, y)
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(each):
        return pcfast.pc_loss(each, x, y, backend="triton", **STEPS)

    for _ in range(3):
        model.zero_grad(set_to_none=True)
        step(model).backward()
        assert last()[0] == "triton"
        assert distance([parameter.grad for parameter in model.parameters()], expected) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("name", SMOOTH)
def test_inside_a_capture_of_the_callers(name):
    model, x, y = problem(*SMOOTH[name])
    other = torch.randn_like(x)
    expected = updates(copy.deepcopy(model), other, y, backend="triton")

    def step() -> list[Tensor]:
        return ours(model, x, y)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: warm up on a side stream
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    pcfast.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    assert last() == ("triton", False, "the caller is capturing a graph already")
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert distance(found, expected) < 1e-5
    pcfast.synchronize()


def test_threads_do_not_disturb_each_other():
    cases = [(name, problem(*SMOOTH[name])) for name in SMOOTH for _ in range(2)]
    alone = [ours(*case) for _, case in cases]

    def gradients(model, x, y) -> list[Tensor]:
        loss = pcfast.pc_loss(model, x, y, backend="triton", **STEPS)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def work(case) -> list[list[Tensor]]:
        return [gradients(*case) for _ in range(4)]

    found = in_threads([functools.partial(work, case) for _, case in cases])
    for (name, _), expected, runs in zip(cases, alone, found, strict=True):
        assert all(distance(run, expected) < 1e-5 for run in runs), name
    pcfast.synchronize()


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("check", ["auto", "off"])
def test_a_step_never_waits_for_the_device(name, check):
    model, x, y = problem(*SMOOTH[name])
    ours(model, x, y, check=check)  # compiles kernels, uploads tables
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
    assert last() == ("triton", True, "")


# What goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_divergence_names_iteration_and_layer(name):
    model, x, _ = problem(*SMOOTH[name])
    target = 1e3 * torch.ones(ROWS, CLASSES, device=DEVICE)
    with pytest.raises(pcfast.RelaxationDiverged) as truth:
        updates(copy.deepcopy(model).cpu(), x.cpu(), target.cpu(), backend="eager", check="sync", **TOO_FAST)
    for _ in range(3):  # plain, recorded, replayed
        with pytest.raises(pcfast.RelaxationDiverged) as found:
            updates(model, x, target, backend="triton", check="sync", **TOO_FAST)
        assert abs(found.value.iteration - truth.value.iteration) <= 1
        assert 1 <= found.value.layer <= len(model)


@pytest.mark.parametrize("name", SMOOTH)
def test_deferred_divergence_zeroes_the_updates_and_is_reported_once(name):
    model, x, y = problem(*SMOOTH[name])
    target = 1e3 * torch.ones(ROWS, CLASSES, device=DEVICE)
    for _ in range(3):
        found = updates(model, x, target, backend="triton", check="deferred", **TOO_FAST)
        assert not any(update.any() for update in found)
        with pytest.raises(pcfast.RelaxationDiverged) as failure:
            pcfast.synchronize()
        assert failure.value.iteration is not None and failure.value.step_size == TOO_FAST["step_size"]
        pcfast.synchronize()
        assert all(update.any() for update in ours(model, x, y))
        pcfast.synchronize()


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
