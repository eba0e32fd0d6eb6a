"""Graph replay without a GPU: keys, aliasing, bounds, failures and refusals of pcfast/relaxation/cuda_graphs.py.

A real recorder captures kernels; the one here (graph_recorder.py) runs the work again at each replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import subprocess
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from graph_recorder import Recorder, tensors_of
from host_reads import NoHostReads
from torch import Tensor, nn

import pcfast
from pcfast import precision
from pcfast.backends import BACKENDS, Eager
from pcfast.diagnostics.diagnosis import diagnose
from pcfast.model import spec as network
from pcfast.relaxation import cuda_graphs
from pcfast.support import host, log
from pcfast.support.uploads import uploaded
from pcfast.torch2pc import FixedPredPCPredErrs

METHODS = ("exact", "fixed_prediction", "strict", "error_based", "zero_divergence")
STEPS = {"step_size": 0.2, "num_steps": 4}
CLASSES = 4
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5])


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.0)),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, CLASSES),
    )


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5), torch.randint(0, CLASSES, (rows,))


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch) -> None:
    """The CPU stands for a CUDA device here, and there "auto" passes the CPU kernels over."""
    monkeypatch.setattr(BACKENDS["cpu"], "automatic", lambda device: (False, "no CPU"))


@pytest.fixture
def install(monkeypatch):
    """Install a cache whose graphs run on the CPU: ``install(capacity, recorder) -> cache``."""

    def put(capacity: int = 4, recorder=None) -> cuda_graphs.GraphCache:
        cache = cuda_graphs.GraphCache(capacity, recorder or Recorder())
        monkeypatch.setattr(cuda_graphs, "CACHE", cache)
        monkeypatch.setattr(
            cuda_graphs, "ineligible_reason", cuda_graphs._refusal
        )  # leaves out what only asks for CUDA
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        return cache

    return put


def loss_and_updates(model, x, y, **settings) -> list[Tensor]:
    """[loss, output, *updates] of one pc_loss, ``.grad`` left empty."""
    model.zero_grad(set_to_none=True)
    loss, output = pcfast.pc_loss(model, x, y, return_output=True, **{**STEPS, **settings})
    loss.backward()
    result = [loss.detach(), output, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return result


def same_bits(result: list[Tensor], truth: list[Tensor]) -> bool:
    return len(result) == len(truth) > 0 and all(map(torch.equal, result, truth))


# Keys ----------------------------------------------------------------------------------------------------------


def described(model, x, y, monkeypatch, *, run=pcfast.pc_loss, **settings):
    """``(backend, problem, plan)`` as they reach the graphs."""
    seen = []

    def spy(backend, problem, plan):
        seen.append((backend, problem, plan))
        return backend.run(problem, plan), "spied on"

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "run", spy)
        run(model, x, y, **{**STEPS, **settings})
    return seen[0]


def key_of(model, x, y, monkeypatch, **settings):
    _, problem, plan = described(model, x, y, monkeypatch, **settings)
    key = cuda_graphs.graph_key(problem, plan)
    hash(key)
    return key


def test_a_second_batch_has_the_same_key(monkeypatch):
    model = mlp()
    keys = [key_of(model, *batch(), monkeypatch) for _ in range(2)]
    with torch.no_grad():
        model[0][0].weight.add_(1.0)  # an update in place
    keys.append(key_of(model, *batch(), monkeypatch))
    keys.append(key_of(model, *batch(), monkeypatch, loss=nn.CrossEntropyLoss()))  # another object
    assert keys.count(keys[0]) == len(keys)


SETTINGS = {
    "num_steps": {"num_steps": 5},
    "step_size": {"step_size": 0.3},
    "schedule": {"step_size": (0.2, 0.2, 0.2, 0.1)},
    "belief optimiser": {"belief_optimizer": pcfast.GradientDescent(0.5)},
    "method": {"method": "exact"},
    "label smoothing": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "ignore_index": {"loss": nn.CrossEntropyLoss(ignore_index=0)},
    "reduction": {"loss": nn.CrossEntropyLoss(reduction="sum")},
    "class weights": {"loss": nn.CrossEntropyLoss(weight=WEIGHT)},
    "normalizer": {"normalizer": 12},
    "what is wanted": {"run": pcfast.relax},
    "checks": {"check": "off"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_change_the_key(name, monkeypatch):
    model, (x, y) = mlp(), batch()
    assert key_of(model, x, y, monkeypatch) != key_of(model, x, y, monkeypatch, **SETTINGS[name])


def test_nudging_changes_the_key(monkeypatch):
    model, (x, _) = mlp(), batch()
    y = torch.randn(6, CLASSES)
    nudges = (None, pcfast.Nudging("positive"), pcfast.Nudging("negative"), pcfast.Nudging("negative", 0.5))
    keys = {key_of(model, x, y, monkeypatch, loss="mse", nudging=nudging) for nudging in nudges}
    assert len(keys) == 4


def test_other_class_weights_change_the_key(monkeypatch):
    model, (x, y) = mlp(), batch()
    keys = {
        key_of(model, x, y, monkeypatch, loss=nn.CrossEntropyLoss(weight=weight))
        for weight in (
            WEIGHT,
            WEIGHT.clone(),
            WEIGHT.view(torch.int32).view(torch.float32),
            WEIGHT[:].double(),
        )
    }
    assert len(keys) == 3  # the third shares the first's memory, layout and dtype


MODELS = {
    "mlp": mlp,
    "dropout": lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)),
}
MODEL_CHANGES = {
    "frozen": ("mlp", lambda m: m[1][0].weight.requires_grad_(False)),
    "moved parameter": ("mlp", lambda m: setattr(m[2].bias, "data", m[2].bias.data.clone())),
    "new parameter": ("mlp", lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach().clone()))),
    "eval mode with dropout": ("dropout", lambda m: m.eval()),
    "dropout's p": ("dropout", lambda m: setattr(m[1], "p", 0.25)),
    "eval mode with batch norm": ("batch norm", lambda m: m.eval()),
    "batch norm's momentum": ("batch norm", lambda m: setattr(m[1], "momentum", 0.5)),
    "batch norm's eps": ("batch norm", lambda m: setattr(m[1], "eps", 0.5)),
    "moved buffer": ("batch norm", lambda m: setattr(m[1], "running_mean", m[1].running_mean.clone())),
    "activation": ("mlp", lambda m: m[1].__setitem__(1, nn.LeakyReLU())),
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_the_model_changes_the_key(name, monkeypatch):
    kind, change = MODEL_CHANGES[name]
    model, (x, y) = MODELS[kind](), batch()
    before = key_of(model, x, y, monkeypatch)
    assert before == key_of(model, x, y, monkeypatch)
    kept = [*model.parameters(), *model.buffers()]  # so that no address is used again
    change(model)
    assert key_of(model, x, y, monkeypatch) != before
    del kept


def test_the_keys_tensors_are_torchs_in_torchs_order():
    shared, tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3, bias=False)
    tied.weight = shared[0].weight
    model = nn.Sequential(
        shared, nn.Sequential(nn.BatchNorm1d(3, affine=False), shared, tied), nn.Linear(3, 1)
    )
    parameters, buffers = network.tensors_of(model)
    for result, expected in ((parameters, model.parameters()), (buffers, model.buffers())):
        assert list(map(id, result)) == list(map(id, expected))


def test_shapes_strides_and_dtypes_change_the_key(monkeypatch):
    model, (x, y) = mlp(), batch()
    probabilities = torch.rand(6, CLASSES).softmax(1)
    keys = [
        key_of(model, x, y, monkeypatch),
        key_of(model, *batch(7), monkeypatch),
        key_of(model, x.t().contiguous().t(), y, monkeypatch),
        key_of(model, x, torch.stack([y, y], 1)[:, 0], monkeypatch),
        key_of(model, x, y.to(torch.uint8), monkeypatch),
        key_of(model, x, probabilities, monkeypatch),
        key_of(model, x, probabilities.double(), monkeypatch),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(key_of(model, x, y, monkeypatch))
    assert len(set(keys)) == len(keys)


@contextlib.contextmanager
def switched(holder, name: str, value):
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


SWITCHES = {
    "cuDNN benchmark": (torch.backends.cudnn, "benchmark", True),
    "cuDNN deterministic": (torch.backends.cudnn, "deterministic", True),
    "cuDNN off": (torch.backends.cudnn, "enabled", False),
    "cuDNN TF32": (torch.backends.cudnn, "allow_tf32", False),
    "cuBLAS TF32": (torch.backends.cuda.matmul, "allow_tf32", True),
    "cuBLAS bfloat16 sums": (
        torch.backends.cuda.matmul,
        "allow_bf16_reduced_precision_reduction",
        False,
    ),
    "cuDNN precision": (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "cuBLAS precision": (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


_OLD_SWITCHES = "ignore:Please use the new API"  # of some torch releases, said of the older switches


@pytest.mark.filterwarnings(_OLD_SWITCHES)
@pytest.mark.parametrize("name", SWITCHES)
def test_torchs_switches_change_the_key(name, monkeypatch):
    """Those of cuDNN where it has something to run."""
    model, (x, y) = mlp(), batch()
    convolution = nn.Sequential(nn.Conv2d(1, 2, (2, 1)), nn.Flatten())
    convolving = nn.Sequential(nn.Unflatten(1, (1, 5, 1)), convolution, nn.Linear(8, CLASSES))
    before, convolved = (key_of(m, x, y, monkeypatch) for m in (model, convolving))
    with switched(*SWITCHES[name]):
        assert (key_of(model, x, y, monkeypatch) == before) == name.startswith("cuDNN")
        assert key_of(convolving, x, y, monkeypatch) != convolved


@pytest.mark.filterwarnings(_OLD_SWITCHES)
def test_matmul_precision_and_determinism_change_the_key(monkeypatch):
    model, (x, y) = mlp(), batch()
    before = key_of(model, x, y, monkeypatch)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert key_of(model, x, y, monkeypatch) != before
    finally:
        torch.set_float32_matmul_precision(precision)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not deterministic)
    try:
        assert key_of(model, x, y, monkeypatch) != before
    finally:
        torch.use_deterministic_algorithms(deterministic)


# Replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_first_call_plain_second_recorded_third_replayed(method, install):
    model, batches = mlp(), [batch() for _ in range(4)]
    plain = [loss_and_updates(model, *data, method=method) for data in batches]
    assert pcfast.last_run().not_replayed_because == "CUDA graphs need a CUDA device"
    recorder = Recorder()
    cache = install(recorder=recorder)
    seen = []
    for data, expected in zip(batches, plain, strict=True):
        assert same_bits(loss_and_updates(model, *data, method=method), expected)
        run = pcfast.last_run()
        seen.append(
            (run.replayed, run.not_replayed_because, recorder.recorded, recorder.replayed, len(cache))
        )
    first = "first call of its kind: recorded from the next on"
    assert seen == [(False, first, 0, 0, 0), (True, "", 1, 1, 1), (True, "", 1, 2, 1), (True, "", 1, 3, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_results_share_no_memory_with_the_graph_or_each_other(method, install):
    model, batches = mlp(), [batch() for _ in range(5)]
    plain = [tensors_of(pcfast.relax(model, *data, method=method, **STEPS)) for data in batches]
    recorder = Recorder()
    install(recorder=recorder)
    results = []
    for data, expected in zip(batches, plain, strict=True):
        result = tensors_of(pcfast.relax(model, *data, method=method, **STEPS))
        assert same_bits(result, expected)
        results.append(result)
    assert pcfast.last_run().replayed
    for result, expected in zip(results, plain, strict=True):
        assert same_bits(result, expected)  # no later call has changed an earlier result
    replayed = results[1:]
    memory = [{t.untyped_storage().data_ptr() for t in result} for result in replayed]
    memory += [{t.untyped_storage().data_ptr() for t in recorder.static}]
    memory += [{t.untyped_storage().data_ptr() for data in batches for t in data}]
    assert sum(map(len, memory)) == len(set.union(*memory))
    for tensor in results[-1]:
        tensor.fill_(float("nan"))
    again = tensors_of(pcfast.relax(model, *batches[0], method=method, **STEPS))
    assert same_bits(again, plain[0])


@pytest.mark.parametrize(
    "optimizer", [pcfast.GradientDescent(0.8), pcfast.GradientDescent(0.5, 0.1), pcfast.Adam()], ids=repr
)
def test_belief_optimisers_and_nudging_are_replayed(optimizer, install):
    model = mlp()
    batches = [(x, torch.randn(6, CLASSES)) for x, _ in (batch() for _ in range(3))]
    settings = dict(
        loss="mse",
        belief_optimizer=optimizer,
        step_size=(0.2, 0.1, 0.05, 0.1),
        nudging=pcfast.Nudging("centred", 0.5),
    )
    plain = [loss_and_updates(model, *data, **settings) for data in batches]
    install(recorder=Recorder())
    for data, expected in zip(batches, plain, strict=True):
        assert same_bits(loss_and_updates(model, *data, **settings), expected)
    assert pcfast.last_run().replayed


def test_two_losses_then_two_backwards(install):
    model, batches = mlp(), [batch() for _ in range(4)]
    plain = [loss_and_updates(model, *data)[2:] for data in batches]
    recorder = Recorder()
    install(recorder=recorder)
    for data in batches[:2]:
        loss_and_updates(model, *data)
    losses = [pcfast.pc_loss(model, *data, **STEPS) for data in batches[2:]]
    assert recorder.replayed == 3
    for loss in losses:
        loss.backward()
    expected = [a + b for a, b in zip(*plain[2:], strict=True)]
    assert same_bits([p.grad for p in model.parameters()], expected)


def test_the_callers_batch_is_left_alone(install):
    model, batches = mlp(), [batch() for _ in range(3)]
    copies = [(x.clone(), y.clone()) for x, y in batches]
    install()
    for data in batches:
        loss_and_updates(model, *data)
    for data, copied in zip(batches, copies, strict=True):
        assert same_bits(list(data), list(copied))


def test_weights_updated_in_place_are_followed(install):
    model, (x, y) = mlp(), batch()
    recorder = Recorder()
    install(recorder=recorder)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        with torch.no_grad():
            expected = F.cross_entropy(model(x), y)
        loss = pcfast.pc_loss(model, x, y, **STEPS)
        torch.testing.assert_close(loss.detach(), expected)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.01
    assert (recorder.recorded, recorder.replayed) == (1, 3)


def test_parameters_that_moved_are_not_replayed(install):
    model, (x, y) = mlp(), batch()
    install()
    for _ in range(2):
        loss_and_updates(model, x, y)
    old = model[2].bias.data
    model[2].bias.data = old + 1.0
    result = loss_and_updates(model, x, y)
    assert not pcfast.last_run().replayed
    torch.testing.assert_close(result[0], F.cross_entropy(model(x), y).detach())


def test_frozen_and_shared_parameters_keep_their_updates(install):
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(5, 5), nn.Sequential(shared, nn.Tanh()), shared)
    model[0].weight.requires_grad_(False)
    x, y = batch()
    plain = loss_and_updates(model, x, y)
    install()
    for _ in range(3):
        assert same_bits(loss_and_updates(model, x, y), plain)
    assert len(plain) == 2 + 3 and pcfast.last_run().replayed


def test_a_failing_step_under_replay_zeroes_its_updates_and_is_reported(install):
    model, good = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, CLASSES)), batch()
    settings = {"loss": "mse", "check": "deferred", **STEPS}
    y = torch.randn(6, CLASSES)
    plain = loss_and_updates(model, good[0], y, **settings)
    install()
    for _ in range(2):
        loss_and_updates(model, good[0], y, **settings)
    result = loss_and_updates(model, 1e37 * good[0], y, **settings)
    assert pcfast.last_run().replayed
    assert not any(update.any() for update in result[2:])
    with pytest.raises(pcfast.NonFiniteError):
        pcfast.synchronize()
    pcfast.synchronize()  # reported once
    assert same_bits(loss_and_updates(model, good[0], y, **settings), plain)


# Bounds and failures -------------------------------------------------------------------------------------------


def test_the_least_recently_used_is_dropped(install):
    model, recorder = mlp(), Recorder()
    cache = install(capacity=2, recorder=recorder)
    two, three, four = (batch(rows) for rows in (2, 3, 4))

    def replayed(data) -> bool:
        loss_and_updates(model, *data)
        return pcfast.last_run().replayed

    assert [replayed(data) for data in (two, two, three, three)] == [False, True, False, True]
    assert (len(cache), recorder.recorded) == (2, 2)
    assert replayed(two)
    assert not replayed(four)  # a first call drops nothing
    assert len(cache) == 2
    assert replayed(four) and len(cache) == 2  # drops three
    assert replayed(two)
    assert not replayed(three)
    assert replayed(three) and not replayed(four)  # drops four
    assert recorder.recorded == 4


def test_shapes_that_come_once_are_not_recorded(install, monkeypatch):
    model, recorder = mlp(), Recorder()
    cache = install(recorder=recorder)
    monkeypatch.setattr(cuda_graphs, "_NOTES", 4)  # the notes of first calls are bounded too
    for rows in range(1, 10):
        loss_and_updates(model, *batch(rows))
    loss_and_updates(model, *batch(1))
    assert (len(cache), recorder.recorded) == (0, 0)


def test_what_a_first_call_uploaded_is_there_at_its_recording(install, monkeypatch):
    """However many other first calls have come in between: a capture cannot upload."""
    made = []

    @uploaded(capacity=1)
    def table(rows: int) -> Tensor:
        made.append(rows)
        return torch.zeros(rows)

    run = Eager.run

    def reading_a_table(self, problem, plan):
        outcome = run(self, problem, plan)
        outcome.resources = table(len(problem.x))
        return outcome

    monkeypatch.setattr(Eager, "run", reading_a_table)
    install(capacity=9)
    model = mlp()
    for _ in range(2):
        for rows in (2, 3, 4):
            loss_and_updates(model, *batch(rows), backend="eager")
    assert pcfast.last_run().replayed and made == [2, 3, 4]


def test_a_failed_recording_falls_back_and_says_so_once(install, caplog, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    attempts = []

    def failing(work):
        attempts.append(work)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model, (x, y) = mlp(), batch()
    plain = loss_and_updates(model, x, y)
    cache = install(recorder=failing)
    reasons = []
    with caplog.at_level(logging.INFO, logger="pcfast"):
        for _ in range(4):
            assert same_bits(loss_and_updates(model, x, y), plain)
            reasons.append(pcfast.last_run().not_replayed_because)
    assert reasons[1:] == ["recording failed: operation not permitted"] * 3
    assert len(attempts) == 1 and len(cache) == 0
    (message,) = [record.message for record in caplog.records]
    assert message == "CUDA graphs are not used for this network: recording failed: operation not permitted"


def test_the_cache_does_not_keep_the_model_alive(install):
    def recorded_once(work):
        return work(), lambda: None  # unlike Recorder, keeps nothing of the work

    cache = install(recorder=recorded_once)
    model, (x, y) = mlp(), batch()
    for _ in range(2):
        loss_and_updates(model, x, y)
    assert len(cache) == 1
    gone = weakref.ref(model), weakref.ref(model[0][0].weight)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_switching_off_drops_all_graphs(install):
    cache = install()
    model, (x, y) = mlp(), batch()
    for _ in range(2):
        loss_and_updates(model, x, y)
    assert len(cache) == 1
    try:
        pcfast.use_cuda_graphs(False)
        assert len(cache) == 0
    finally:
        pcfast.use_cuda_graphs(True)


# Refusals ------------------------------------------------------------------------------------------------------


def on_cuda():
    """Stands for a problem on CUDA, as far as the questions asked first go."""
    return types.SimpleNamespace(x=types.SimpleNamespace(is_cuda=True))


def test_refused_where_switched_off_or_captured_already(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda_graphs.ineligible_reason(None, on_cuda(), None) == "the caller is capturing a graph already"
    try:
        pcfast.use_cuda_graphs(False)
        assert cuda_graphs.ineligible_reason(None, on_cuda(), None) == "switched off"
    finally:
        pcfast.use_cuda_graphs(True)


@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", "True")])
def test_the_environment_switches(value, expected):
    program = "from pcfast.relaxation import cuda_graphs; print(cuda_graphs._switched_on)"
    environment = {**os.environ, "PCFAST_CUDA_GRAPHS": value}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == expected


def _squares(output, y):
    return output.square().mean()


REFUSALS = {
    "beliefs or activations were given by the caller": lambda m, x, y: pcfast.pc_loss(
        m, x, y, vinit=[x, None, None, None]
    ),
    "y is not a tensor": lambda m, x, y: pcfast.pc_loss(m, x, None, loss=_squares),
    "a loss that pcfast does not know may change between calls": lambda m, x, y: pcfast.pc_loss(
        m, x, y, loss=_squares
    ),
    "the reference backend is not captured": lambda m, x, y: pcfast.pc_loss(m, x, y, backend="reference"),
    "Softplus runs through autograd (pcfast has no spec for this Softplus)": lambda m, x, y: pcfast.pc_loss(
        nn.Sequential(*m, nn.Softplus()), x, y
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason, install):
    recorder = Recorder()
    install(recorder=recorder)
    for _ in range(3):
        REFUSALS[reason](mlp(), *batch())
        assert pcfast.last_run().not_replayed_because == reason
        assert not pcfast.last_run().replayed
    assert recorder.recorded == 0


def test_activations_given_by_the_caller_are_refused(install):
    install()
    vhat = [torch.randn(6, size) for size in (5, 8, 7, CLASSES)]
    for _ in range(2):
        FixedPredPCPredErrs(mlp(), vhat, torch.randn(6, CLASSES))
        assert pcfast.last_run().not_replayed_because == "beliefs or activations were given by the caller"


# What may be captured at all -----------------------------------------------------------------------------------


def everything() -> nn.Sequential:
    """All that eager captures in one net, input (B, 1, 12, 12)."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.GELU(), nn.MaxPool2d(2, 1), nn.Dropout2d(0.2)),
        nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2), nn.SiLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(16, 9), nn.BatchNorm1d(9, momentum=None), nn.Sigmoid(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(9, 8), nn.GELU("tanh"), nn.Unflatten(1, (2, 4)), nn.Flatten()),
        nn.Sequential(nn.Linear(8, 7, bias=False), nn.LeakyReLU(), nn.Identity()),
        nn.Linear(7, CLASSES),
    )


@pytest.mark.parametrize("loss", ["labels", "probabilities", "class weights", "mse"])
@pytest.mark.parametrize("run", [pcfast.pc_loss, pcfast.relax], ids=["pc_loss", "relax"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", ["deferred", "off"])
def test_eager_never_waits_for_the_device(check, method, run, loss, monkeypatch):
    model, x, y = everything(), torch.randn(5, 1, 12, 12), torch.randint(0, CLASSES, (5,))
    function = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1) if loss == "class weights" else None
    if loss in ("probabilities", "mse"):
        y = torch.rand(5, CLASSES).softmax(1)
    settings = {"loss": function or ("mse" if loss == "mse" else "cross_entropy")}
    settings |= {"method": method, "check": check, "num_steps": 9}
    backend, problem, plan = described(model, x, y, monkeypatch, run=run, **settings)
    assert not plan.network.opaque
    assert backend.replays(problem, plan) == (True, "")
    problem = dataclasses.replace(problem, raise_now=False)  # as on CUDA
    monkeypatch.setattr(host, "readable", lambda device: False)
    with NoHostReads():
        outcome = backend.run(problem, plan)
    assert (outcome.status is None) == (check == "off")
    pcfast.synchronize()


def test_reads_by_the_host_are_noticed():
    with pytest.raises(RuntimeError, match="waits for the device"), NoHostReads():
        bool(torch.ones(()))
    with pytest.raises(RuntimeError, match="waits for the device"), NoHostReads():
        torch.arange(3)[torch.tensor(1)]


def test_process_wide_switches_are_put_back_by_the_last_thread_to_leave():
    owner = types.SimpleNamespace(deterministic=False)
    outer = precision.switched(owner, "deterministic", True)
    inner = precision.switched(owner, "deterministic", True)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert owner.deterministic is True
    inner.__exit__(None, None, None)
    assert owner.deterministic is False


# What only some calls ask for ------------------------------------------------------------------------------------


def test_early_exit_and_diagnoses_are_replayed_with_every_batch(install, monkeypatch):
    """As on CUDA: the host cannot leave the loop, and every batch ends where its own energy rests."""
    monkeypatch.setattr(host, "readable", lambda device: False)
    cache = install()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, CLASSES)).double()
    ends, settings = set(), {"step_size": 0.2, "num_steps": 40, "tolerance": 1e-3, "backend": "eager"}
    for index in range(6):
        x, y = batch()
        x = x.double() * (1 + index)
        result = pcfast.relax(
            model, x, y, energies=True, loss=nn.CrossEntropyLoss(reduction="sum"), **settings
        )
        assert result.run.replayed == (index > 0)
        k = int(result.iterations)
        plain = pcfast.relax(
            model, x, y, energies=True, loss=nn.CrossEntropyLoss(reduction="sum"), backend="reference",
            step_size=0.2, num_steps=k,
        )  # fmt: skip
        for v, truth in zip(result.beliefs, plain.beliefs, strict=True):
            torch.testing.assert_close(v, truth, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.energies[:k], plain.energies, rtol=1e-10, atol=1e-12)
        ends.add(k)
        seen = diagnose(model, x, y, step_size=0.2, num_steps=7, backend="eager")
        assert seen.run.replayed == (index > 0)
        again = diagnose(model, x, y, step_size=0.2, num_steps=7, backend="reference")
        torch.testing.assert_close(seen.belief_gradients, again.belief_gradients, rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(seen.angle_degrees, again.angle_degrees, rtol=1e-6, atol=1e-9)
    assert len(ends) > 1 and max(ends) < 40 and len(cache) == 2
