"""What both backends of kernels do on a CUDA device alike: plain, recorded and replayed, whatever the caller does.

What is judged how: gpu_helpers.py.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from gpu_helpers import (
    CLASSES,
    CNN,
    DEVICE,
    FIRST,
    MLP,
    PRECISIONS,
    ROWS,
    SMOOTH,
    STEPS,
    TOO_FAST,
    allowed,
    bound_of,
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
from torch import Tensor

import pcfast
from pcfast.precision import use_precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMED = [(backend, name) for backend, networks in SMOOTH.items() for name in networks]
both = pytest.mark.parametrize("backend", SMOOTH)
smooth = pytest.mark.parametrize(("backend", "name"), NAMED)
# the streamed kernels' other precisions: test_triton_cuda.py
smooth_in_every_precision = pytest.mark.parametrize(
    ("backend", "name", "precision"),
    [(b, name, p) for b, name in NAMED for p in (PRECISIONS if b == "cuda" else ("ieee",))],
)


@smooth_in_every_precision
def test_one_step_agrees_plain_recorded_and_replayed(name, precision, backend, ours):
    model, _, _ = problem(*SMOOTH[backend][name])
    for now in ((backend, False, FIRST), (backend, True, ""), (backend, True, "")):
        _, x, y = problem(*SMOOTH[backend][name])
        truth = in_float64(model, x, y)
        with use_precision(precision, DEVICE):
            result = ours(model, x, y)
        assert last() == now
        assert distance(result, truth) <= bound_of(model, x, y, truth, precision)


@both
@pytest.mark.parametrize("method", ["exact", "fixed_prediction"])
def test_methods_without_a_loop_are_those_of_eager(method, backend, launches):
    model, x, y = problem(*MLP)
    eager = updates(model, x, y, method=method, backend="eager")
    result = updates(model, x, y, method=method, backend=backend)
    assert last()[0] == backend and launches == []
    assert distance(result, eager) < 1e-6


@smooth
def test_replays_follow_weights_updated_in_place_and_new_inputs(name, backend, ours, launches):
    model, x, y = problem(*SMOOTH[backend][name])
    for _ in range(2):
        ours(model, x, y)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        _, x, y = problem(*SMOOTH[backend][name])
        before = len(launches)
        replayed = ours(model, x, y)
        assert last() == (backend, True, "") and len(launches) == before
        fresh = ours(copy.deepcopy(model), x, y)  # other addresses: a first call
        assert not last()[1]
        assert distance(replayed, fresh) < 1e-5
        truth = in_float64(model, x, y)
        assert distance(replayed, truth) <= allowed(model, x, y, truth)


@smooth
def test_step_size_and_number_of_steps_may_change(name, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
    result = {}
    for settings in [*[(0.1, 8)] * 2, *[(0.05, 8)] * 2, *[(0.1, 3)] * 2, (0.1, 1), (0.1, 0), (0.1, 8)]:
        now = dict(zip(("step_size", "num_steps"), settings, strict=True))
        truth = in_float64(model, x, y, **now)
        reached = [
            index for index, update in enumerate(truth) if update.any()
        ]  # few steps: upper layers alone
        got = ours(model, x, y, **now)
        assert all(not update.any() for index, update in enumerate(got) if index not in reached)
        bound = allowed(model, x, y, in_float64(model, x, y))
        assert distance([got[i] for i in reached], [truth[i] for i in reached]) <= bound
        result.setdefault(settings, []).append(got)
    assert same_bits(result[0.1, 8][-1], result[0.1, 8][1])
    assert not same_bits(result[0.1, 8][0], result[0.05, 8][0])


@both
def test_batches_of_several_sizes_take_turns(backend, ours):
    """An epoch whose last batch is smaller, twice."""
    model, _, _ = problem(*MLP)
    for rows in (ROWS, ROWS, 20, ROWS, ROWS, 20, 1):
        _, x, y = problem(*MLP, rows=rows)
        truth = in_float64(model, x, y)
        assert distance(ours(model, x, y), truth) <= allowed(model, x, y, truth)


@smooth
def test_inputs_that_are_views(name, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
    labels = torch.stack([y, y], 1)[:, 1]
    for kind, view in views_of(x).items():
        truth = in_float64(model, view, y)
        bound = allowed(model, view.contiguous(), y, truth)
        for _ in range(2):
            assert distance(ours(model, view, labels), truth) <= bound, kind


@both
def test_channels_last_inputs_and_weights(backend, ours):
    model, x, y = problem(*CNN)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    for _ in range(3):
        assert distance(ours(model, x, y), truth) <= bound


@smooth
def test_another_stream(name, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
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
            result = ours(model, x, y)
            assert last()[1] == expected
    torch.cuda.current_stream().wait_stream(stream)
    assert distance(result, truth) <= bound


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@smooth
def test_another_device_than_the_current_one(name, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
    truth = in_float64(model, x, y)
    bound = allowed(model, x, y, truth)
    model, x, y = model.to("cuda:1"), x.to("cuda:1"), y.to("cuda:1")
    for expected in (False, True, True):
        result = ours(model, x, y)
        assert last()[1] == expected and result[0].device == x.device
        assert torch.cuda.current_device() == 0
        assert distance(result, truth) <= bound


@pytest.mark.parametrize(("backend", "name"), [each for each in NAMED if each[0] == "triton"])
def test_under_torch_compile(name, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
    expected = ours(copy.deepcopy(model), x, y)
    torch.compiler.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(each):
        return pcfast.pc_loss(each, x, y, backend=backend, **STEPS)

    for _ in range(3):
        model.zero_grad(set_to_none=True)
        step(model).backward()
        assert last()[0] == backend
        assert distance([parameter.grad for parameter in model.parameters()], expected) < 1e-5
    torch.compiler.reset()


@smooth_in_every_precision
def test_inside_a_capture_of_the_callers(name, precision, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
    other = torch.randn_like(x)
    with use_precision(precision, DEVICE):
        expected = updates(copy.deepcopy(model), other, y, backend=backend)
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
            result = ours(model, x, y)
        assert last() == (backend, False, "the caller is capturing a graph already")
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    truth = in_float64(model, x, y)
    bound = bound_of(model, x, y, truth, precision)
    assert distance(result, truth) <= bound and distance(expected, truth) <= bound
    pcfast.synchronize()


@both
def test_threads_do_not_disturb_each_other(backend, ours):
    cases = [problem(*each) for each in SMOOTH[backend].values() for _ in range(3)]
    alone = [ours(*case) for case in cases]

    def gradients(model, x, y) -> list[Tensor]:
        loss = pcfast.pc_loss(model, x, y, backend=backend, **STEPS)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    def work(case) -> list[list[Tensor]]:
        return [gradients(*case) for _ in range(4)]

    result = in_threads([functools.partial(work, case) for case in cases])
    for expected, runs in zip(alone, result, strict=True):
        assert all(distance(run, expected) < 1e-5 for run in runs)
    pcfast.synchronize()


@smooth
@pytest.mark.parametrize("check", ["auto", "off"])
def test_a_step_never_waits_for_the_device(name, check, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
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
    assert last() == (backend, True, "")


@smooth
def test_divergence_names_iteration_and_layer(name, backend):
    model, x, _ = problem(*SMOOTH[backend][name])
    target = 1e3 * torch.ones(ROWS, CLASSES, device=DEVICE)
    with pytest.raises(pcfast.RelaxationDiverged) as truth:
        updates(copy.deepcopy(model).cpu(), x.cpu(), target.cpu(), backend="eager", check="sync", **TOO_FAST)
    for _ in range(3):  # plain, recorded, replayed
        with pytest.raises(pcfast.RelaxationDiverged) as result:
            updates(model, x, target, backend=backend, check="sync", **TOO_FAST)
        assert abs(result.value.iteration - truth.value.iteration) <= 1
        assert 1 <= result.value.layer <= len(model)


@smooth
def test_deferred_divergence_zeroes_the_updates_and_is_reported_once(name, backend, ours):
    model, x, y = problem(*SMOOTH[backend][name])
    target = 1e3 * torch.ones(ROWS, CLASSES, device=DEVICE)
    for _ in range(3):
        result = updates(model, x, target, backend=backend, check="deferred", **TOO_FAST)
        assert not any(update.any() for update in result)
        with pytest.raises(pcfast.RelaxationDiverged) as failure:
            pcfast.synchronize()
        assert failure.value.iteration is not None and failure.value.step_size == TOO_FAST["step_size"]
        pcfast.synchronize()
        assert all(update.any() for update in ours(model, x, y))
        pcfast.synchronize()
