"""pc_loss inside torch.compile: the same numbers as an eager call, from one operator in the traced graph.

The oracle is the same call without a compiler, on a copy of the model, bit by bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import Unsupported

import pcfast
from pcfast import compiled
from pcfast.losses import half_squared_error

CLASSES = 4
STEPS = {"step_size": 0.2, "num_steps": 6}
_CAN_BUILD = (
    shutil.which(os.environ.get("CXX", "g++")) is not None
    and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
)
# What torch's compiler does, and warns of itself.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",
        "`torch.jit.script_method` is deprecated:DeprecationWarning",
    )
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiled:
    """A function under torch.compile, and the operators in every graph that was traced of it."""

    def __init__(self, function, backend: str = "aot_eager", **options) -> None:
        self.graphs: list[list[str]] = []
        build = lookup_backend(backend)

        def record(module, inputs):
            self.graphs.append([str(node.target) for node in module.graph.nodes])
            return build(module, inputs)

        self._call = torch.compile(function, backend=record, **{"fullgraph": True, **options})

    def __call__(self, *arguments, **settings):
        return self._call(*arguments, **settings)

    @property
    def steps(self) -> list[int]:
        """Per graph, how many predictive-coding steps are in it."""
        return [targets.count("pcfast.step.default") for targets in self.graphs]


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, CLASSES),
    )


def with_batchnorm() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, CLASSES))


def with_dropout() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5)), nn.Linear(8, CLASSES))


def tied() -> nn.Sequential:
    shared = nn.Linear(5, 5)
    return nn.Sequential(
        nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Tanh()), nn.Linear(5, CLASSES)
    )


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(27, 9), nn.ReLU()),
        nn.Linear(9, CLASSES),
    )


class Residual(nn.Module):
    """A module that pcfast does not know, with a norm, dropout, and a parameter that it does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.25))
        self.spare = nn.Linear(width, 1)

    def forward(self, v: Tensor) -> Tensor:
        return v + self.inner(v)


def with_residual() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8)), Residual(8), nn.Linear(8, CLASSES))


NETWORKS = {
    "mlp": (mlp, 5),
    "convnet": (convnet, 64),
    "batchnorm": (with_batchnorm, 5),
    "dropout": (with_dropout, 5),
    "tied": (tied, 5),
    "residual": (with_residual, 5),
}


def batch(width: int = 5, rows: int = 6, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width, dtype=dtype), torch.randint(0, CLASSES, (rows,))


def loss_of(model, x, y, **settings):
    return pcfast.pc_loss(model, x, y, **{**STEPS, **settings})


def assert_same(result, truth) -> None:
    """Equal to the bit; None equals None."""
    assert len(result) == len(truth)
    for ours, theirs in zip(result, truth, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def assert_same_step(step, model, x, y, function=loss_of, **settings) -> None:
    """``step``, which is ``function`` compiled, gives its results: loss, output, ``.grad``, statistics."""
    results = []
    twin = copy.deepcopy(model)
    for call, each in ((step, model), (function, twin)):
        torch.manual_seed(7)
        result = call(each, x, y, **settings)
        result = list(result) if isinstance(result, tuple) else [result]
        if result[0].requires_grad:
            result[0].backward()
        results.append([*result, *(p.grad for p in each.parameters()), *each.state_dict().values()])
        each.zero_grad(set_to_none=True)
    assert results[0][0].requires_grad == results[1][0].requires_grad
    assert_same(*results)


# A training step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "strict") for name in NETWORKS),
        ("mlp", "exact"),
        ("residual", "fixed_prediction"),
        ("convnet", "error_based"),
        ("batchnorm", "zero_divergence"),
    ],
)
def test_training_is_that_of_an_eager_loop(name, method):
    make, width = NETWORKS[name]
    ours = make()
    theirs = copy.deepcopy(ours)
    step = Compiled(loss_of)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    for number in range(3):
        x, y = batch(width)
        for model, function, optimiser in zip((ours, theirs), (step, loss_of), optimisers, strict=True):
            optimiser.zero_grad()
            torch.manual_seed(number)
            function(model, x, y, method=method).backward()
            optimiser.step()
        assert_same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert_same(list(ours.state_dict().values()), list(theirs.state_dict().values()))
    assert step.steps == [1]


@pytest.mark.skipif(not _CAN_BUILD, reason="torch's inductor needs a C++ compiler and Python's headers")
@pytest.mark.parametrize("name", ["batchnorm", "convnet"])
def test_a_step_among_other_work_by_inductor(name):
    """Compiled code round the step is equal to rounding."""

    def train(model, x, y):
        with torch.no_grad():
            before = model(x).softmax(1)
        loss, output = loss_of(model, x, y, return_output=True)
        return loss / 3 * (output.argmax(1) == y).sum().clamp(min=1), before

    make, width = NETWORKS[name]
    ours = make()
    theirs = copy.deepcopy(ours)
    step = Compiled(train, backend="inductor")
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    for _ in range(3):
        x, y = batch(width)
        result = []
        for model, function, optimiser in zip((ours, theirs), (step, train), optimisers, strict=True):
            optimiser.zero_grad()
            loss, before = function(model, x, y)
            loss.backward()
            optimiser.step()
            result.append([loss.detach(), before, *model.state_dict().values()])
        torch.testing.assert_close(*result, rtol=1e-5, atol=1e-6)
    assert step.steps == [1]


def test_the_module_under_torch_compile():
    weight = torch.rand(CLASSES)
    module = pcfast.PredictiveCoding(with_batchnorm(), loss=nn.CrossEntropyLoss(weight=weight), **STEPS)

    def call(module, x, y, **settings):
        return module(x, y, **settings)

    step = Compiled(call)
    assert_same_step(step, module, *batch(), function=call)
    module.step_size, module.method = 0.05, "fixed_prediction"
    assert_same_step(step, module, *batch(), function=call, return_output=True)
    module.loss = nn.CrossEntropyLoss(reduction="sum")
    assert_same_step(step, module, *batch(), function=call)
    assert set(step.steps) == {1}


def test_equal_steps_draw_masks_of_their_own():
    def twice(model, x, y):
        return loss_of(model, x, y) + 2 * loss_of(model, x, y)

    step = Compiled(twice)
    assert_same_step(step, with_dropout(), *batch(), function=twice)
    assert step.steps == [2]


def test_a_parameter_that_only_another_layer_uses():
    residual = Residual(5)
    model = nn.Sequential(residual, residual.spare, nn.Linear(1, CLASSES))
    step = Compiled(loss_of)
    assert_same_step(step, model, *batch())
    assert step.steps == [1]


# The operator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["train", "start", "forward"])
@pytest.mark.parametrize("name", ["batchnorm", "residual"])
def test_opcheck(name, how):
    make, width = NETWORKS[name]
    model, (x, y) = make(), batch(width)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # opcheck compares two calls
    parameters = list(model.parameters())
    if how == "forward":
        parameters = [parameter.detach() for parameter in parameters]
    beliefs, given = ([torch.rand(6, 8)], "01" + "0" * (len(model) - 1)) if how == "start" else ([], "")
    torch.library.opcheck(
        compiled.step,
        (
            x, y, parameters, list(model.buffers()), None, beliefs, given, torch.empty(0),
            compiled.MODELS.key(model), "cross_entropy", "mean", -100, 0.0, None, "strict", 0.2, 6, "auto", "auto",
            None, how != "forward",
        ),
    )  # fmt: skip


def test_eager_calls_leave_the_operator_alone():
    """They do not even import it, nor torch's compiler."""
    code = """
import sys, torch, pcfast
assert "torch._dynamo" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(5, 4))
module = pcfast.PredictiveCoding(model)
x, y = torch.rand(3, 5), torch.tensor([0, 1, 3])
pcfast.pc_loss(model, x, y).backward()
module(x, y).backward()
with torch.no_grad():
    module(x, y)
assert "pcfast.compiled" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_models_own_tensors_are_used_in_place(monkeypatch):
    """No copies of parameters and buffers are made where the graph has not changed them."""
    copied = []

    @contextlib.contextmanager
    def lent(own, given):
        copied.extend(o for o, g in zip(own, given, strict=True) if o.data_ptr() != g.data_ptr())
        yield

    monkeypatch.setattr(compiled, "swap_parameters", lent)
    step, model = Compiled(loss_of), with_batchnorm()
    for _ in range(2):
        step(model, *batch()).backward()
    assert copied == []


def test_values_that_the_graph_has_changed_are_used():
    def halve_then_train(model, x, y):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
            for buffer in model.buffers():
                buffer.add_(1)
        first = loss_of(model, x, y)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        return first + loss_of(model, x, y)

    step, model = Compiled(halve_then_train), with_batchnorm()
    for _ in range(2):
        assert_same_step(step, model, *batch(), function=halve_then_train)
    assert step.steps == [2]


def test_weights_changed_between_calls_are_used():
    step, model, (x, y) = Compiled(loss_of, "eager"), mlp(), batch()
    assert_same_step(step, model, x, y)
    with torch.no_grad():
        model[0][0].weight.add_(1.0)
    assert_same_step(step, model, x, y)
    model.load_state_dict(mlp().state_dict())
    assert_same_step(step, model, x, y)
    model[1][0].weight.data = torch.rand(7, 8)
    assert_same_step(step, model, x, y)
    model[2] = nn.Linear(7, CLASSES)
    assert_same_step(step, model, x, y)
    assert set(step.steps) == {1}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_double_backward_is_refused(backend):
    step, model = Compiled(loss_of, backend), mlp()
    with pytest.raises(RuntimeError, match=None if backend == "aot_eager" else "differentiated twice"):
        first, *_ = torch.autograd.grad(step(model, *batch()), list(model.parameters()), create_graph=True)
        first.sum().backward()


# Models by key --------------------------------------------------------------------------------------------------


def test_a_model_that_is_gone_leaves_no_entry():
    step, model = Compiled(loss_of, "eager"), mlp()
    step(model, *batch()).backward()
    key, alive = compiled.MODELS.key(model), weakref.ref(model)
    gc.collect()
    count = len(compiled.MODELS)
    assert compiled.MODELS[key] is model
    del model
    gc.collect()
    assert alive() is None and len(compiled.MODELS) == count - 1
    with pytest.raises(RuntimeError, match=f"no model {key}"):
        compiled.MODELS[key]


def test_copies_of_a_model_are_told_apart():
    step, model = Compiled(loss_of, "eager"), mlp()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    for each in (model, other, model, other):
        assert_same_step(step, each, *batch())
    assert step.steps == [1, 1]


def test_threads_agree_on_keys():
    models, result = [mlp() for _ in range(4)], []

    def work() -> None:
        result.append([compiled.MODELS.key(model) for model in models])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(result[0])) == 4 and all(keys == result[0] for keys in result)


# Arguments ------------------------------------------------------------------------------------------------------


def test_step_size_and_number_of_steps_may_change():
    step, model = Compiled(loss_of, "eager"), mlp()
    for step_size in (0.1, 0.2):
        assert_same_step(step, model, *batch(), step_size=step_size)
    traced = len(step.graphs)
    for num_steps in (3, 4, 20, 9):
        assert_same_step(step, model, *batch(), num_steps=num_steps)
    assert len(step.graphs) <= traced + 2  # an argument from its second value on


@pytest.mark.parametrize("name", ["batchnorm", "convnet"])
def test_a_smaller_last_batch(name):
    make, width = NETWORKS[name]
    step, model = Compiled(loss_of), make()
    for rows in (6, 6, 5, 3, 7):
        assert_same_step(step, model, *batch(width, rows))
    assert step.steps == [1, 1]  # for 6 rows, and for any number


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_no_grad_gives_the_forward_loss(name):
    make, width = NETWORKS[name]
    step, model = Compiled(loss_of), make()
    with torch.no_grad():
        assert_same_step(step, model, *batch(width), return_output=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_step(step, model, *batch(width), return_output=True)
    with torch.inference_mode():
        assert_same_step(step, model, *batch(width))
    assert_same_step(step, model, *batch(width))
    assert step.steps == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["convnet", "residual"])
def test_autocast_round_the_function_and_in_it(name):
    def inside(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, x, y, return_output=True)

    make, width = NETWORKS[name]
    step, model = Compiled(loss_of), make()
    assert_same_step(step, model, *batch(width), return_output=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(step, model, *batch(width), return_output=True)
    assert_same_step(Compiled(inside), model, *batch(width), function=inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype(dtype):
    step, model = Compiled(loss_of), with_residual().to(dtype)
    assert_same_step(step, model, *batch(dtype=dtype), return_output=True)


def test_channels_last_weights():
    step, model = Compiled(loss_of), convnet().to(memory_format=torch.channels_last)
    assert_same_step(step, model, *batch(64))


_WEIGHT = torch.tensor([0.5, 2.0, 0.1, 1.5])
LOSSES = {
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted and smoothed": nn.CrossEntropyLoss(weight=_WEIGHT.clone(), label_smoothing=0.1),
    "function": F.cross_entropy,
    "partial": functools.partial(F.cross_entropy, weight=_WEIGHT.clone(), ignore_index=2),
    "mse": nn.MSELoss(),
    "mse, sum": functools.partial(F.mse_loss, reduction="sum"),
    "mse, half": half_squared_error,
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    step, model, loss = Compiled(loss_of, "eager"), mlp(), LOSSES[name]
    x, y = batch()
    if name.startswith("mse"):
        y = torch.rand(6, CLASSES)
    assert_same_step(step, model, x, y, loss=loss)
    for weight in (getattr(loss, "weight", None), getattr(loss, "keywords", {}).get("weight")):
        if weight is not None:
            weight.mul_(2)
            assert_same_step(step, model, x, y, loss=loss)
    assert step.steps == [1]


def test_losses_that_differ_in_their_settings_are_told_apart():
    step, model, (x, y) = Compiled(loss_of, "eager"), mlp(), batch()
    for smoothing in (0.0, 0.3):
        assert_same_step(step, model, x, y, loss=nn.CrossEntropyLoss(label_smoothing=smoothing))
    for weight in torch.rand(2, CLASSES):
        assert_same_step(step, model, x, y, loss=nn.CrossEntropyLoss(weight=weight))
    for normalizer in (12, 14):
        assert_same_step(step, model, x, y, normalizer=normalizer)


def test_beliefs_to_start_from():
    step, model, (x, y) = Compiled(loss_of), mlp(), batch()
    for vinit in ([None, torch.rand(6, 8), None, None], (x, torch.rand(6, 8), torch.rand(6, 7), None)):
        assert_same_step(step, model, x, y, vinit=vinit)
    assert step.steps == [1, 1]


def test_changes_of_the_model_are_noticed():
    step, model = Compiled(loss_of, "eager"), with_residual()
    assert_same_step(step, model, *batch())
    model[0][0].weight.requires_grad_(False)
    assert_same_step(step, model, *batch())
    model.eval()
    assert_same_step(step, model, *batch())
    model.requires_grad_(False)
    assert_same_step(step, model, *batch())
    assert step.steps == [1, 1, 1, 1]


# Outside the graph ----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A module whose buffer moves in a way that pcfast cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, v: Tensor) -> Tensor:
        self.calls += 1
        return v * self.weight


def with_counting() -> nn.Sequential:
    return nn.Sequential(Counting(), nn.Linear(5, CLASSES))


def with_hook() -> nn.Sequential:
    model = mlp()
    model[0][0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def doubled(output: Tensor, y: Tensor) -> Tensor:
    return 2 * F.cross_entropy(output, y)


OUTSIDE = {
    "a buffer that moves": (with_counting, {}),
    "a hook": (with_hook, {}),
    "a loss of one's own": (mlp, {"loss": doubled}),
    "the literal loop": (mlp, {"backend": "reference"}),
    "a belief optimiser": (mlp, {"belief_optimizer": pcfast.GradientDescent(0.5)}),
    "a schedule": (mlp, {"step_size": (0.2, 0.2, 0.1, 0.1, 0.1, 0.1)}),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_does_not_fit_runs_outside_the_graph(name):
    make, settings = OUTSIDE[name]

    def train(model, x, y, **settings):
        return loss_of(model, x * 2, y, **settings) * 3

    step, model = Compiled(train, fullgraph=False), make()
    for _ in range(2):
        assert_same_step(step, model, *batch(), function=train, **settings)
    assert set(step.steps) == {0}
    with pytest.raises(Unsupported, match=r"outside the graph: docs/behaviour\.md"):
        Compiled(train)(model, *batch(), **settings)


def test_nudging_runs_outside_the_graph():
    def train(model, x, y):
        return loss_of(model, x, y, loss="mse", nudging=pcfast.Nudging("centred", 0.5))

    step, model = Compiled(train, fullgraph=False), mlp()
    assert_same_step(step, model, torch.randn(6, 5), torch.randn(6, CLASSES), function=train)
    assert set(step.steps) <= {0}


class Branching(nn.Module):
    """A module whose control flow depends on values, which a compiler does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, v: Tensor) -> Tensor:
        return self.linear(v if v.sum().item() > 0 else -v)


def test_control_flow_that_depends_on_values_breaks_the_graph():
    step, model = Compiled(loss_of, fullgraph=False), nn.Sequential(Branching(), nn.Linear(5, CLASSES))
    x, y = batch()
    for sign in (1, -1):
        assert_same_step(step, model, sign * x, y)
    assert set(step.steps) == {0}


def test_losses_of_one_code_are_told_apart():
    step, model, (x, y) = Compiled(loss_of, fullgraph=False), mlp(), batch()
    for factor in (1, 2):
        assert_same_step(step, model, x, y, loss=lambda output, y, factor=factor: factor * doubled(output, y))


# Errors ---------------------------------------------------------------------------------------------------------


def failure(call, *arguments, **settings) -> pcfast.PcfastError:
    with pytest.raises(pcfast.PcfastError) as caught:
        call(*arguments, **settings)
    return caught.value


ERRORS = {
    "x of another width": (lambda x, y: (x[:, :4], y), {}),
    "x of another dtype": (lambda x, y: (x.double(), y), {}),
    "NaN in x": (lambda x, y: (x / 0 * 0, y), {}),
    "rows of y": (lambda x, y: (x, y[:3]), {}),
    "labels out of range": (lambda x, y: (x, y + 9), {}),
    "dtype of y": (lambda x, y: (x, y.int()), {}),
    "method": (lambda x, y: (x, y), {"method": "predictive"}),
    "step size": (lambda x, y: (x, y), {"step_size": -1.0}),
    "divergence": (lambda x, y: (x, y), {"step_size": 1e3, "num_steps": 50}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_an_eager_call(name):
    change, settings = ERRORS[name]
    x, y = change(*batch())
    ours = with_batchnorm()
    theirs = copy.deepcopy(ours)
    step = Compiled(loss_of, "eager")
    result = failure(step, ours, x, y, **settings)
    expected = failure(loss_of, theirs, x, y, **settings)
    assert type(result) is type(expected) and str(result) == str(expected)
    assert_same(list(ours.state_dict().values()), list(theirs.state_dict().values()))
    assert step.steps == [1]
    assert_same_step(step, ours, *batch())  # and nothing is left behind


def test_a_setting_of_the_wrong_type():
    step, model = Compiled(loss_of, fullgraph=False), mlp()
    x, y = batch()
    assert failure(step, model, x, y, num_steps=1.5).argument == "num_steps"
    assert failure(step, model, x, y, loss="hinge").argument == "loss"
    assert failure(step, model, x.requires_grad_(), y).argument == "x"


@pytest.mark.parametrize("belief_optimizer", [None, pcfast.GradientDescent(0.35)], ids=["plain", "momentum"])
def test_incremental_step_runs_outside_the_graph(belief_optimizer):
    def step_of(model, x, y, optimizer):
        settings = {"belief_optimizer": belief_optimizer, **STEPS}
        return pcfast.incremental_step(model, x, y, optimizer, **settings) * 2

    ours = mlp()
    theirs = copy.deepcopy(ours)
    step = Compiled(step_of, fullgraph=False)
    optimisers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (ours, theirs)]
    for _ in range(2):
        x, y = batch()
        result = [f(m, x, y, o) for f, m, o in zip((step, step_of), (ours, theirs), optimisers, strict=True)]
        assert_same([result[0], *ours.parameters()], [result[1], *theirs.parameters()])
    assert not any(step.steps)
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="moves the parameters with an optimiser between iterations"):
        Compiled(step_of)(ours, *batch(), optimisers[0])
