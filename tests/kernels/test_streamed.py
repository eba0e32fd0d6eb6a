"""Backend "triton", interpreted: the launch code, tables and kernels against float64."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import json
import mmap
import types
from collections import Counter
from itertools import pairwise

import against_reference
import interpreter
import kernel_networks
import pytest
import torch
import triton
import triton.language as tl
from against_reference import MOVING, assert_bfloat16_loses_what_eager_does, in_double, updates
from drawing import examples
from hypothesis import given
from hypothesis import strategies as st
from kernel_networks import GRAM_TAILS, conv_net, mlp, narrowing_conv_net
from kernel_networks import STREAMED as NETWORKS
from networks_for_tests import LOSSES, loss_and_target
from plans import planned
from torch import nn

import pcfast
from pcfast.backends import BACKENDS, chips, choice, choose_backend, gpu_constants, kernel_backend
from pcfast.backends.kernel_forms import LinearForm, PointwiseForm, TorchForm
from pcfast.backends.triton import arena as layouts
from pcfast.backends.triton import backend, designs, failures, launch_plan
from pcfast.backends.triton import loop as loops
from pcfast.backends.triton import roofline as floor
from pcfast.backends.triton.arena import Arena, LayoutBuilder
from pcfast.backends.triton.loop import Loop
from pcfast.backends.triton.tensor_layout import padded
from pcfast.checking.bounds import relative_error
from pcfast.checking.checker import check
from pcfast.cli import main
from pcfast.kernels.grouped_gemm import EPILOGUE_SUBTILE
from pcfast.kernels.limits import LOSS_COLUMNS
from pcfast.kernels.linear_problems import (
    FEEDBACK,
    GEMM,
    PREDICT,
    FeedbackProblem,
    PredictProblem,
    as_numbers,
)
from pcfast.kernels.tf32 import round_to_tf32, rounded_to_tf32
from pcfast.precision import switched, use_precision
from pcfast.problem import plan as planning
from pcfast.problem.plan import Plan
from pcfast.training import trainer as training

BATCH = 9


@triton.jit
def rounding_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, round_to_tf32(tl.load(x + at)))


@pytest.fixture(autouse=True)
def _gaps_between_matrices_are_out_of_bounds(monkeypatch):
    """Each matrix of an arena is a range of its own for the sanitizer; so is its padding, which belongs to it."""
    place = Arena.__init__

    def guarded(self, layout, *arguments):
        place(self, layout, *arguments)
        for arena, operand in ((self.state, False), (self.operand, True)):
            if arena is self.state and operand:
                continue
            matrices = {m for _, m in layout.matrices if m.operand == operand}
            interpreter.extents(arena, sorted((m.first, m.elements) for m in matrices))

    monkeypatch.setattr(Arena, "__init__", guarded)


@pytest.fixture
def staged(monkeypatch):
    """No weights are close to a program: the loop runs stage by stage."""
    find = designs.target_of
    monkeypatch.setattr(designs, "target_of", lambda *a: dataclasses.replace(find(*a), l1_bytes_per_sm=0))


_LETTERS = {LinearForm: "l", PointwiseForm: "p", TorchForm: "t"}
networks = pytest.mark.parametrize("name", NETWORKS)


drawn = functools.partial(kernel_networks.drawn, NETWORKS)
assert_close_to_float64 = functools.partial(against_reference.assert_close_to_float64, backend="triton")


# the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 7])
@networks
def test_against_the_reference(name, num_steps):
    assert_close_to_float64(*drawn(name), num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "wide output", "one unit"])
def test_stage_by_stage(name, num_steps, staged):
    assert_close_to_float64(*drawn(name), num_steps=num_steps)


@networks
def test_the_forms_that_the_layers_take(name, monkeypatch):
    made = []
    find = designs.design
    monkeypatch.setattr(designs, "design", lambda *a: made.append(find(*a)) or made[-1])
    updates(*drawn(name), backend="triton")
    assert "".join(_LETTERS[type(form)] for form in made[0].forms[2:]) == NETWORKS[name][2]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_the_gram_form(num_steps, whole, request):
    if not whole:
        request.getfixturevalue("staged")
    torch.manual_seed(2)
    model, x, y = mlp(12, 60, 7, 5, 4), torch.randn(BATCH, 12), torch.randint(0, 4, (BATCH,))
    result = pcfast.relax(model, x, y, num_steps=num_steps, backend="triton")
    assert result.run.plan.gram == (num_steps > 2)
    assert_close_to_float64(model, x, y, num_steps=num_steps)
    two = mlp(12, 60, 4)
    assert pcfast.relax(two, x, y, num_steps=num_steps, backend="triton").run.plan.gram == (num_steps > 1)
    assert_close_to_float64(two, x, y, num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [3, 4, 7])
@pytest.mark.parametrize("tail", GRAM_TAILS)
def test_the_gram_form_of_a_convolution(tail, num_steps, launches):
    model, x, y = narrowing_conv_net(tail)
    result = pcfast.relax(model, x, y, num_steps=num_steps, backend="triton")
    assert result.run.plan.gram
    counted = Counter(name for name, _ in launches)
    by_torch = "torch" in tail
    # layer 2 of 4 has an error from iteration 3 on, and layer 1 would move from then on
    assert (counted["gram_update"], counted["error_and_delta"]) == (0 if by_torch else num_steps - 2,) * 2
    assert counted["update"] == 0
    assert_close_to_float64(model, x, y, num_steps=num_steps)


def test_the_gram_form_of_a_convolution_in_bfloat16():
    model, x, _ = narrowing_conv_net("relu, max")
    report = check(model, tuple(x.shape), draws=3, num_steps=5, backends=["triton"], precisions=["bf16"])
    assert pcfast.last_run().plan.gram
    assert report.ok and {row.backend for row in report.rows} == {"triton"}, report.failures


def test_divergence_in_gram_form_is_layer_1s():
    model, x, y = narrowing_conv_net("nothing")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    with pytest.raises(pcfast.RelaxationDiverged) as caught:
        pcfast.relax(model, x, y, backend="triton", check="sync", step_size=1e4, num_steps=20)
    assert caught.value.iteration is not None and caught.value.layer == 1


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("width", [10, 40])
def test_losses(loss_name, width):
    torch.manual_seed(3)
    model, x = mlp(8, 12, 9, width, dtype=torch.float64), torch.randn(BATCH, 8, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, BATCH, width)
    truth = pcfast.relax(model, x, y, loss=loss, num_steps=4, backend="reference")
    single = loss.float() if isinstance(loss, nn.Module) else loss
    y = y.float() if y.is_floating_point() else y
    result = pcfast.relax(
        copy.deepcopy(model).float(), x.float(), y, loss=single, num_steps=4, backend="triton"
    )
    for eps, eps_true in zip(result.errors[1:], truth.errors[1:], strict=True):
        assert relative_error(eps, eps_true) < 3e-6


@pytest.mark.parametrize(("precision", "activation"), [("ieee", nn.GELU), ("bf16", nn.ReLU)])
def test_within_the_projects_bounds(precision, activation):
    """pcfast check's rule, whose yardstick is backpropagation in the same precision."""
    report = check(
        mlp(20, 31, 17, 10, activation=activation), (16, 20), draws=9, num_steps=5, backends=["triton"],
        precisions=[precision],
    )  # fmt: skip
    assert report.ok and {row.backend for row in report.rows} == {"triton"}, report.failures


def test_the_cnn_within_the_projects_bounds():
    report = check(
        conv_net(), (8, 2, 8, 8), draws=3, num_steps=4, backends=["triton"], precisions=["ieee", "bf16"]
    )
    assert report.ok and {row.precision for row in report.rows} == {"ieee", "bf16"}, report.failures


def test_tf32_where_torch_allows_it():
    model, x, y = drawn("mlp")
    truth = pcfast.relax(*in_double(model, x, y), num_steps=5, backend="reference").errors[2]
    result = {}
    before = torch.backends.cuda.matmul.fp32_precision
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            result[precision] = relative_error(
                pcfast.relax(model, x, y, num_steps=5, backend="triton").errors[2], truth
            )
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert result["ieee"] < 1e-6 < 1e-5 < result["tf32"] < 1e-2


@examples(12)
@given(
    widths=st.lists(st.sampled_from((1, 2, 7, 15, 16, 17, 31, 32, 33)), min_size=2, max_size=5),
    activation=st.sampled_from((nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Identity)),
    batch=st.sampled_from((1, 2, 15, 16, 17, 33)),
    num_steps=st.integers(0, 6),
    step_size=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    momentum=st.sampled_from((0.0, 0.5)),
    waning=st.booleans(),
    close=st.booleans(),
)
def test_any_mlp(widths, activation, batch, num_steps, step_size, momentum, waning, close):
    if waning:
        step_size = [step_size / (1 + t) for t in range(num_steps)]
    torch.manual_seed(4)
    model, x, y = (
        mlp(*widths, 6, activation=activation),
        torch.randn(batch, widths[0]),
        torch.randint(0, 6, (batch,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        find = designs.target_of
        patch.setattr(
            designs,
            "target_of",
            lambda *a: dataclasses.replace(find(*a), l1_bytes_per_sm=10**6 if close else 0),
        )
        assert_close_to_float64(
            model, x, y, bound=1e-5, num_steps=num_steps, step_size=step_size,
            belief_optimizer=pcfast.GradientDescent(momentum),
        )  # fmt: skip


def test_beliefs_to_start_from(staged):
    model, x, y = drawn("mlp")
    vinit = [None, torch.randn(BATCH, 20), None, torch.randn(BATCH, 17), None]
    double, x2 = in_double(model, x)
    wide = [v if v is None else v.double() for v in vinit]
    for num_steps in (0, 1, 4):
        truth = pcfast.relax(double, x2, y, vinit=wide, num_steps=num_steps, backend="reference")
        result = pcfast.relax(model, x, y, vinit=vinit, num_steps=num_steps, backend="triton")
        for l in range(1, 5):
            assert relative_error(result.errors[l], truth.errors[l]) < 3e-6, (num_steps, l)
            assert relative_error(result.beliefs[l], truth.beliefs[l]) < 3e-6, (num_steps, l)


@networks
def test_energies(name):
    model, x, y = drawn(name)
    truth = pcfast.relax(*in_double(model, x, y), num_steps=5, energies=True, backend="reference")
    result = pcfast.relax(model, x, y, num_steps=5, energies=True, backend="triton")
    torch.testing.assert_close(result.energies.double(), truth.energies, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "fixed_prediction"])
def test_methods_without_a_loop(method):
    model, x, y = drawn("conv")
    result = updates(model, x, y, method=method, backend="triton")
    assert pcfast.last_run().plan.backend == "triton"
    for p, q in zip(result, updates(model, x, y, method=method, backend="eager"), strict=True):
        assert torch.equal(p, q)


def test_one_layer_has_no_loop():
    model, x, y = nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    assert_close_to_float64(model, x, y, num_steps=3)


def test_inputs_in_any_layout():
    model, x, y = drawn("conv")
    expected = updates(model, x, y, backend="triton", num_steps=4)
    strided = torch.empty(BATCH, 8, 8, 4)[..., ::2].permute(0, 3, 1, 2).copy_(x)
    assert not strided.is_contiguous()
    for p, q in zip(updates(model, strided, y, backend="triton", num_steps=4), expected, strict=True):
        assert relative_error(p, q) < 1e-6


def test_twice_the_same_bits_and_rows_do_not_depend_on_their_batch(staged):
    model, x, y = drawn("mlp")
    settings = dict(loss=nn.CrossEntropyLoss(reduction="sum"), num_steps=5, backend="triton")
    whole = pcfast.relax(model, x, y, **settings)
    again = pcfast.relax(model, x, y, **settings)
    part = pcfast.relax(model, x[:3], y[:3], **settings)
    for e, f, g in zip(whole.errors[2:], again.errors[2:], part.errors[2:], strict=True):
        assert torch.equal(e, f)
        assert relative_error(g, e[:3]) < 1e-6


# momentum and schedules of step sizes ------------------------------------------------------------------------------

ways = pytest.mark.parametrize("way", MOVING)


def velocities(made: launch_plan.Design) -> set[str]:
    return {name for name, _ in made.layout.matrices if "velocity" in name}


def expected_velocities(made: launch_plan.Design) -> set[str]:
    """With momentum. Where torch moves layer 1's stand-ins, it keeps their velocities too."""
    if not made.gram:
        return {f"velocity{l}" for l in range(1, made.depth)}
    by_kernels = set() if isinstance(made.forms[2], TorchForm) else {"s_velocity2", "sum_velocity2"}
    return by_kernels | {f"velocity{l}" for l in range(2, made.depth)}


@ways
@networks
def test_momentum_and_schedules(name, way, made):
    model, x, y = drawn(name)
    assert_close_to_float64(model, x, y, num_steps=7, **MOVING[way](7))
    assert velocities(made[0]) == (expected_velocities(made[0]) if way != "schedule" else set())


@ways
@pytest.mark.parametrize("num_steps", [2, 5])
@pytest.mark.parametrize("name", ["mlp", "wide output", "one unit"])
def test_momentum_and_schedules_stage_by_stage(name, num_steps, way, staged, launches):
    settings = MOVING[way](num_steps)
    assert_close_to_float64(*drawn(name), num_steps=num_steps, **settings)
    fed = [keywords for kernel, keywords in launches if kernel == "linear_feedback"]
    momentum = settings.get("belief_optimizer", pcfast.GradientDescent()).momentum
    sizes = settings.get("step_size", (0.1,) * num_steps)
    # the errors' relaxation and the updates'
    assert [(k["eta"], k["momentum"]) for k in fed] == [(eta, momentum) for eta in sizes] * 2


@ways
def test_one_launch_for_all_iterations_reads_the_schedule(way, launches):
    settings = MOVING[way](6)
    assert_close_to_float64(*drawn("mlp"), num_steps=6, **settings)
    assert [name for name, _ in launches] == ["mlp_relaxation"] * 2
    for _, keywords in launches:
        if "step_size" in settings:
            assert torch.equal(keywords["eta"], torch.tensor(settings["step_size"]))
        else:
            assert (keywords["eta"], keywords["momentum"]) == (0.1, 0.9)


@ways
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("num_steps", [3, 4, 6])
def test_momentum_and_schedules_in_gram_form(num_steps, whole, way, made, request):
    if not whole:
        request.getfixturevalue("staged")
    torch.manual_seed(2)
    for model in (mlp(12, 60, 7, 5, 4), mlp(12, 60, 4)):
        made.clear()
        x, y = torch.randn(BATCH, 12), torch.randint(0, 4, (BATCH,))
        assert_close_to_float64(model, x, y, num_steps=num_steps, **MOVING[way](num_steps))
        assert made[0].gram and made[0].fuse_loop == whole
        assert velocities(made[0]) == (expected_velocities(made[0]) if way != "schedule" else set())


@ways
@pytest.mark.parametrize("tail", GRAM_TAILS)
def test_momentum_and_schedules_in_the_gram_form_of_a_convolution(tail, way, launches, made):
    model, x, y = narrowing_conv_net(tail)
    assert_close_to_float64(model, x, y, num_steps=5, **MOVING[way](5))
    assert made[0].gram and made[0].gram_by_torch == ("torch" in tail)
    counted = Counter(name for name, _ in launches)
    assert counted["gram_update"] == (0 if made[0].gram_by_torch else 2 * (5 - 2))


@pytest.mark.parametrize("staged_or_whole", ["staged", "whole"])
@ways
def test_momentum_and_schedules_from_given_beliefs(way, staged_or_whole, request):
    if staged_or_whole == "staged":
        request.getfixturevalue("staged")
    model, x, y = drawn("mlp")
    vinit = [None, torch.randn(BATCH, 20), None, torch.randn(BATCH, 17), None]
    for num_steps in (0, 1, 5):
        assert_close_to_float64(model, x, y, vinit=vinit, num_steps=num_steps, **MOVING[way](num_steps))
    model, x, y = drawn("conv")
    vinit = [None, torch.randn(BATCH, 3, 6, 6), torch.randn(BATCH, 45), None, None]
    assert_close_to_float64(model, x, y, vinit=vinit, num_steps=4, **MOVING[way](4))


@pytest.mark.parametrize("name", ["mlp", "conv", "bare conv", "torch's layers"])
def test_beliefs_that_no_error_has_reached_have_no_velocity(name):
    model, x, y = drawn(name)
    for num_steps in range(1, len(model)):
        result = pcfast.relax(model, x, y, num_steps=num_steps, backend="triton", **MOVING["both"](num_steps))
        moved = [not torch.equal(*pair) for pair in zip(result.beliefs, result.activations, strict=True)]
        expected = [l >= len(model) - num_steps for l in range(1, len(model))]
        assert moved == [False, *expected, False]


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("name", ["mlp", "conv", "torch's layers"])
def test_velocities_start_from_zero_in_every_relaxation(name, close, request):
    if not close:
        request.getfixturevalue("staged")
    model, x, y = drawn(name)
    settings = dict(num_steps=5, backend="triton", **MOVING["both"](5))
    first, second = (updates(model, x, y, **settings) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_energies_with_momentum_and_a_schedule(name):
    model, x, y = drawn(name)
    settings = dict(num_steps=5, energies=True, **MOVING["both"](5))
    truth = pcfast.relax(*in_double(model, x, y), backend="reference", **settings)
    result = pcfast.relax(model, x, y, backend="triton", **settings)
    torch.testing.assert_close(result.energies.double(), truth.energies, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("net", ["mlp", "conv", "mlp in Gram form", "conv in Gram form"])
@ways
def test_momentum_and_schedules_in_bfloat16(way, net):
    if net == "conv in Gram form":
        model, x, y = narrowing_conv_net("tanh")
    elif net == "mlp in Gram form":
        torch.manual_seed(2)
        model, x, y = mlp(12, 60, 7, 5, 4), torch.randn(BATCH, 12), torch.randint(0, 4, (BATCH,))
    else:
        model, x, y = drawn(net)
    plans = assert_bfloat16_loses_what_eager_does(
        model, x, y, backend="triton", num_steps=6, **MOVING[way](6)
    )
    assert [plan.gram for plan in plans] == ["Gram" in net] * 2


@ways
def test_momentum_and_schedules_in_tf32(way):
    model, x, y = drawn("mlp")
    settings = dict(num_steps=5, **MOVING[way](5))
    truth = pcfast.relax(*in_double(model, x, y), backend="reference", **settings).errors[2]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        result = pcfast.relax(model, x, y, backend="triton", **settings).errors[2]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    # each of 5 iterations rounds operands to 11 bits
    assert 1e-5 < relative_error(result, truth) < 5 * 2**-11


# what is launched -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_two_dependent_launches_an_iteration_however_deep(num_steps, launches, staged):
    model, x, y = mlp(8, 20, 20, 20, 20, 20, 5), torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    updates(model, x, y, num_steps=num_steps, backend="triton")
    assert [name for name, _ in launches] == ["linear_predict", "linear_feedback"] * num_steps


def test_one_launch_for_all_iterations_where_the_weights_are_close(launches):
    updates(*drawn("mlp"), num_steps=9, backend="triton")
    assert [name for name, _ in launches] == ["mlp_relaxation"]


def test_only_the_active_front_is_multiplied(launches, staged):
    depth, num_steps = 6, 4
    model, x, y = mlp(8, 20, 20, 20, 20, 20, 5), torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    updates(model, x, y, num_steps=num_steps, backend="triton")
    done = Counter()
    for name, keywords in launches:
        count = keywords["products"] if name == "linear_predict" else keywords["count"]
        for place in range(count):
            done[name, depth - place] += 1
    for layer in range(2, depth + 1):
        predictions, feedbacks = planning.strict_products(depth, num_steps, True, layer)
        assert (done["linear_predict", layer], done["linear_feedback", layer]) == (predictions, feedbacks)


def test_a_convolution_costs_one_elementwise_launch_a_stage(launches):
    updates(*drawn("conv"), num_steps=8, backend="triton")
    counted = Counter(name for name, _ in launches)
    # layer 2 of 4 has an error from iteration 3 on and moves layer 1 from iteration 3 on
    assert counted == {"linear_predict": 8, "linear_feedback": 8, "error_and_delta": 6, "update": 6}


@pytest.mark.parametrize("momentum", [False, True])
def test_the_design_gives_every_matrix_its_own_place(momentum):
    model, x, _ = drawn("conv")
    network = pcfast.model.describe.describe(model)
    shapes = network.shapes(tuple(x.shape))
    for precision, gram in itertools.product(("bf16", "tf32"), (False, True)):
        target = launch_plan.CompileTarget(precision, 132, 0, False)
        made = designs.design(network, shapes, gram, "cross_entropy", True, target, momentum)
        assert bool(velocities(made)) == momentum
        assert all(not m.operand for name, m in made.layout.matrices if "velocity" in name)
        for operand in (False, True):
            places = sorted(
                {m for _, m in made.layout.matrices if m.operand == operand}, key=lambda m: m.first
            )
            assert all(a.first + a.elements <= b.first for a, b in pairwise(places))
        assert all(m.first % 64 == 0 for _, m in made.layout.matrices)


@pytest.fixture
def far(monkeypatch):
    """Every matrix lies past the 2^31st element of its arena, in memory that is only reserved."""
    begin = LayoutBuilder.__init__

    def shifted(self):
        begin(self)
        self._sizes = dict.fromkeys(self._sizes, 2**31)

    def reserved(elements, *, dtype, device):
        flags = (
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        )  # MAP_NORESERVE, which Python names from 3.13 on
        return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)

    monkeypatch.setattr(LayoutBuilder, "__init__", shifted)
    monkeypatch.setattr(layouts, "torch", types.SimpleNamespace(zeros=reserved))
    designs.design.cache_clear()
    yield
    designs.design.cache_clear()


@pytest.mark.parametrize("close", [True, False])
def test_offsets_past_two_to_the_31(close, far, request, launches):
    if not close:
        request.getfixturevalue("staged")
    model, x, y = drawn("mlp")
    assert_close_to_float64(model, x, y, num_steps=5)
    assert ("mlp_relaxation" in {name for name, _ in launches}) == close


@pytest.mark.parametrize("name", ["conv", "wide output"])
def test_offsets_past_two_to_the_31_in_bfloat16_and_beside_convolutions(name, far):
    model, x, y = drawn(name)
    assert_close_to_float64(model, x, y, num_steps=4)
    with use_precision("bf16", x.device):
        result = updates(model, x, y, num_steps=4, backend="triton")
        truth = updates(model, x, y, num_steps=4, backend="eager")
    for p, q in zip(result, truth, strict=True):
        assert relative_error(p, q) < 0.1


# what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_divergence_names_the_iteration_and_the_layer(name):
    model, x, y = drawn(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    model = nn.Sequential(
        *[m if i == len(model) - 1 else nn.Sequential(m[0], *m[2:]) for i, m in enumerate(model)]
    )
    arguments = dict(step_size=1e4, num_steps=20)
    result = {}
    for tried in ("eager", "triton"):
        with pytest.raises(pcfast.RelaxationDiverged) as caught:
            pcfast.relax(model, x, y, backend=tried, check="sync", **arguments)
        result[tried] = caught.value
    assert result["triton"].iteration is not None
    assert abs(result["triton"].iteration - result["eager"].iteration) <= 1


@pytest.mark.parametrize("way", ["momentum", "schedule"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_divergence_with_momentum_or_in_the_middle_of_a_schedule(name, way):
    model, x, y = drawn(name)
    settings = {"step_size": (0.1,) * 5 + (1e6,) * 15}
    if way == "momentum":
        settings = {"step_size": 1e4, "belief_optimizer": pcfast.GradientDescent(0.9)}
    linear = nn.Sequential(*(m[0] if isinstance(m, nn.Sequential) else m for m in model))
    if name == "conv":
        linear = nn.Sequential(model[0][0], nn.Sequential(model[1][0], *model[1][2:]), model[2][0], model[3])
    result = {}
    for tried in ("eager", "triton"):
        with pytest.raises(pcfast.RelaxationDiverged, match="with step size") as caught:
            pcfast.relax(linear, x, y, backend=tried, check="sync", num_steps=20, **settings)
        result[tried] = caught.value.iteration
    assert way == "momentum" or result["eager"] > 5
    assert abs(result["triton"] - result["eager"]) <= 1


def test_divergence_is_reported_later_where_checks_are_deferred():
    model, x, y = drawn("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    linear = nn.Sequential(*(m[0] if isinstance(m, nn.Sequential) else m for m in model))
    pcfast.pc_loss(linear, x, y, step_size=1e4, num_steps=20, backend="triton", check="deferred").backward()
    assert all(not p.grad.any() for p in linear.parameters())
    with pytest.raises(pcfast.RelaxationDiverged, match="iteration"):
        pcfast.synchronize()


def test_what_it_cannot_run_is_refused_by_name():
    class Mystery(nn.Module):
        def forward(self, a):
            return a * 2

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3), Mystery()), nn.Linear(3, 2))
    with pytest.raises(pcfast.BackendError, match=r"layer 1 .*Mystery.*backend=\"auto\""):
        pcfast.relax(model, torch.randn(2, 4), torch.tensor([0, 1]), backend="triton")
    with pytest.raises(pcfast.BackendError, match=r"float32, not torch\.float64"):
        pcfast.relax(
            mlp(4, 3, 2).double(), torch.randn(2, 4).double(), torch.tensor([0, 1]), backend="triton"
        )


def test_sizes_beyond_the_kernels_integers_are_refused():
    def request(*layers: nn.Module, sample: tuple[int, ...] = (4,), batch: int = 2) -> Plan:
        return planned(nn.Sequential(*layers), (batch, *sample))

    def linear(width: int) -> list[nn.Module]:
        return list(mlp(4, width, 3))

    def bare(width: int) -> list[nn.Module]:
        return [nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)]

    with torch.device("meta"):
        too_large = {
            r"layer 1 .*16,777,216 outputs a sample.*smaller layers": request(*linear(2**24)),
            r"layer 1 .*8,388,480 channels.*smaller layers": request(*bare(65535 * 128)),
            r"layer 1 .*2,147,483,648 samples times pixels.*smaller batches": request(
                *linear(8), batch=2**31
            ),
        }
        # 2^24 numbers a sample are nothing to kernels that see pixels and channels
        maps = [nn.Conv2d(1, 64, 1), nn.Conv2d(64, 2, 1), nn.MaxPool2d(256), nn.Flatten(), nn.Linear(8, 3)]
        fits = [
            request(*linear(2**24 - 16)), request(*bare(65535 * 128 - 1)), request(*maps, sample=(1, 512, 512)),
        ]  # fmt: skip
    for words, asked in too_large.items():
        with pytest.raises(pcfast.BackendError, match=words):
            choose_backend("triton", asked)
        assert choose_backend("auto", asked)[0].name in ("cpu", "eager")
    for asked in fits:
        assert choose_backend("triton", asked)[0].name == "triton"


def in_triton(*_, **__):
    raise RuntimeError("PassManager::run failed")


# a function of triton's, as far as a traceback tells
in_triton = types.FunctionType(
    in_triton.__code__, {"__name__": "triton.compiler", "RuntimeError": RuntimeError}
)


@pytest.mark.parametrize(
    ("name", "launch", "layers"),
    [
        ("mlp", "launch_linear_predict", r"layer 4 \(Linear\)"),
        ("conv", "launch_linear_feedback", r"layer 4 \(Linear\)"),
        ("conv", "update", r"layer 2 \(Conv2d - Tanh - MaxPool2d - Flatten\)"),
        ("wide output", "output_error", r"layer 2 \(Linear\)"),
    ],
)
def test_a_kernel_that_does_not_compile_is_an_error_of_the_backend(name, launch, layers, staged, monkeypatch):
    monkeypatch.setattr(loops, launch, in_triton)
    model, x, y = drawn(name)
    words = f"{layers}: triton could not compile .*PassManager.*C compiler.*eager"
    for _ in range(2):
        with pytest.raises(pcfast.BackendError, match=words):
            pcfast.relax(model, x, y, backend="triton")


@pytest.mark.parametrize(("kind", "offsets"), [(PredictProblem, PREDICT), (FeedbackProblem, FEEDBACK)])
def test_kernels_read_a_descriptor_where_the_host_writes_it(kind, offsets):
    names = [field.name for field in dataclasses.fields(kind)]
    numbers = as_numbers(kind(**{name: 100 + place for place, name in enumerate(names)}))
    for place, name in enumerate(names):
        # as the interpreter reads it, as the compiler does, and as the main loop of both kinds does
        read = [getattr(owner, name.upper()) for owner in (offsets, offsets.value)]
        read += [getattr(GEMM, name.upper())] if hasattr(GEMM, name.upper()) else []
        assert {numbers[at] for at in read} == {100 + place}
    assert str(offsets.value) in repr(offsets)  # what triton's cache key holds


def test_a_whole_relaxation_that_does_not_compile_names_its_layers(monkeypatch):
    monkeypatch.setattr(loops, "launch_mlp_relaxation", in_triton)
    with pytest.raises(
        pcfast.BackendError, match=r"^layer 2 .*, layer 3 .*, layer 4 \(Linear\): triton could not"
    ):
        pcfast.relax(*drawn("mlp"), backend="triton")


def test_what_is_wrong_in_a_kernel_is_not_taken_for_its_compilation(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("not triton's")

    monkeypatch.setattr(loops, "launch_mlp_relaxation", broken)
    with pytest.raises(RuntimeError, match=r"^not triton's"):
        pcfast.relax(*drawn("mlp"), backend="triton")


@pytest.fixture
def automatic(monkeypatch):
    """ "auto" chooses the backend where it may run, and what it finds out is forgotten."""
    monkeypatch.setattr(kernel_backend, "AUTOMATIC_DEVICES", ("cpu",))
    monkeypatch.setattr(BACKENDS["cpu"], "automatic", lambda device: (False, "the CPU stands for a GPU"))
    monkeypatch.setattr(choice, "_unqualified", lambda backend, *_: "")
    monkeypatch.setattr(choice, "_fastest", lambda planned, able, graphs: (able[0], (), []))
    monkeypatch.setattr(choice, "_kept", {})
    monkeypatch.setattr(failures, "_reasons", {})


@pytest.mark.parametrize("energies", [False, True])
def test_auto_falls_back_where_kernels_do_not_compile(energies, automatic, monkeypatch, caplog):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Tanh(), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(20, 9), nn.Tanh()),
        nn.Linear(9, 4),
    )
    x, y = torch.randn(BATCH, 12), torch.randint(0, 4, (BATCH,))
    result = {}
    for tried in ("eager", "auto"):
        mine = copy.deepcopy(model)
        torch.manual_seed(3)
        if tried == "auto":
            assert pcfast.explain(mine, tuple(x.shape)).plan.backend == "triton"
            monkeypatch.setattr(loops, "launch_linear_feedback", in_triton)
            monkeypatch.setattr(loops, "launch_mlp_relaxation", in_triton)
            caplog.set_level("INFO", "pcfast")
        run = pcfast.relax(mine, x, y, num_steps=5, energies=energies, backend=tried)
        result[tried] = (*run.beliefs, *run.errors[1:], mine[0][1].running_mean, torch.rand(2))
        result[tried] += (run.energies,) if energies else ()
    for ours, eager in zip(result["auto"], result["eager"], strict=True):
        assert torch.equal(ours, eager)
    plan = pcfast.last_run().plan
    assert plan.backend == "eager" and "could not compile" in dict(plan.refusals)["triton"]
    explained = pcfast.explain(mine, tuple(x.shape))
    assert explained.plan.backend == "eager" and "PassManager" in explained.refused["triton"]
    for _ in range(2):
        assert pcfast.relax(mine, x, y, num_steps=5).run.plan.backend == "eager"
    said = [record.message for record in caplog.records if "could not compile" in record.message]
    # once as the loop falls back, and once as "auto" passes the backend over
    assert len(said) == 2 and all(line.startswith("running on eager: ") for line in said)
    other = pcfast.explain(mlp(12, 8, 4), tuple(x.shape))
    assert other.plan.backend == "triton"  # what fails for one network may compile for another


def test_divergence_is_located_after_a_fall_back(automatic, monkeypatch):
    monkeypatch.setattr(loops, "launch_mlp_relaxation", in_triton)
    model, x, y = drawn("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    linear = nn.Sequential(*(m[0] if isinstance(m, nn.Sequential) else m for m in model))
    result = []
    for tried in ("eager", "auto"):
        with pytest.raises(pcfast.RelaxationDiverged) as caught:
            pcfast.relax(linear, x, y, backend=tried, check="sync", step_size=1e4, num_steps=20)
        result.append((caught.value.iteration, caught.value.layer))
    assert result[0] == result[1]
    assert len(failures._reasons) == 1


@pytest.mark.parametrize(
    ("capability", "hip", "installed", "words"),
    [
        ((7, 5), None, True, r"compute capability 8\.0 or newer, this GPU has 7\.5"),
        ((9, 0), "6.2", True, "needs an NVIDIA GPU"),
        ((9, 0), None, False, "pip install triton"),
        ((9, 0), None, True, ""),
    ],
)
def test_devices_that_cannot_run_it(capability, hip, installed, words, monkeypatch):
    chip = dataclasses.replace(chips.DEFAULT, capability=capability)
    monkeypatch.setattr(chips, "chip_of", lambda device: chip)
    monkeypatch.setattr(torch.version, "hip", hip)
    find = backend.importlib.util.find_spec
    monkeypatch.setattr(
        backend.importlib.util,
        "find_spec",
        lambda name: find(name) if installed or name != "triton" else None,
    )
    backend._unavailable.cache_clear()
    request = planned(mlp(4, 3, 2), (2, 4), "cuda:0")
    try:
        if words:
            with pytest.raises(pcfast.BackendError, match=words + r".*backend=\"auto\""):
                choose_backend("triton", request)
        else:
            assert choose_backend("triton", request)[0].name == "triton"
    finally:
        backend._unavailable.cache_clear()


def test_kernels_that_cannot_be_imported_are_a_reason(monkeypatch):
    def broken(name):
        raise RuntimeError("two releases of LLVM")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    backend._unavailable.cache_clear()
    try:
        assert backend._unavailable(torch.device("cpu"), None) == (
            "its kernels cannot be imported: RuntimeError: two releases of LLVM"
        )
    finally:
        backend._unavailable.cache_clear()


def test_auto_does_not_choose_it():
    model, x, y = drawn("mlp")
    assert pcfast.relax(model, x, y).run.plan.backend == "cpu"
    refusals = dict(pcfast.explain(model, tuple(x.shape)).plan.refusals)
    assert refusals["triton"] == "its kernels run on the CPU for tests alone: ask for it by name"
    assert BACKENDS["triton"].supports(planned(model, x.shape)) == (True, "")


def test_explain_names_tier_kernels_and_tiles(staged):
    model, x, _ = drawn("conv")
    text = str(pcfast.explain(model, tuple(x.shape), backend="triton"))
    assert "state in global memory" in text and "tiles of 16 x 16 x 16" in text
    assert (
        "layer 2 (Conv2d - Tanh - MaxPool2d - Flatten): cuDNN's convolution, pointwise_error in tiles" in text
    )
    assert "layer 4 (Linear): linear_predict, linear_feedback; floor " in text
    # layer 1 stands outside the loop
    assert text.count("us an iteration (") == len(model) - 1
    assert "floors from matmul_tf32_tflops (" in text
    model, x, _ = drawn("mlp")
    assert "bytes of loop weights" in str(pcfast.explain(model, tuple(x.shape), backend="triton"))
    text = str(pcfast.explain(mlp(12, 20, 200), (BATCH, 12), backend="triton"))
    assert (
        "layer 2 (Linear): linear_predict, linear_feedback, loss in output_error in tiles of 1 x 256" in text
    )


@pytest.mark.parametrize("close", [True, False])
def test_explain_names_the_velocities(close, request):
    if not close:
        request.getfixturevalue("staged")
    model, x, _ = drawn("mlp")
    settings = dict(backend="triton", num_steps=5, step_size=[0.1] * 5)  # without the Gram form
    assert "velocities" not in str(pcfast.explain(model, tuple(x.shape), **settings))
    text = str(
        pcfast.explain(model, tuple(x.shape), belief_optimizer=pcfast.GradientDescent(0.5), **settings)
    )
    assert "beliefs move by GradientDescent(momentum=0.5" in text
    # rows padded to 16: beliefs of 20, 33 and 17 units
    assert f"momentum: velocities of what moves, {4 * BATCH * (32 + 48 + 32):,} bytes" in text


def floors_of(
    model: nn.Sequential, sample: tuple[int, ...], gram: bool = False, momentum: bool = False, **settings
) -> dict:
    network = pcfast.model.describe.describe(model)
    shapes = network.shapes((BATCH, *sample))
    target = launch_plan.CompileTarget(
        **{"precision": "bf16", "sm_count": 132, "l1_bytes_per_sm": 0, "interpreted": False, **settings}
    )
    made = designs.design(network, shapes, gram, "cross_entropy", True, target, momentum)
    return floor.floors(network, shapes, made, dataclasses.replace(gpu_constants.load(), l2_bytes=0))


def test_floors_count_products_and_bytes():
    result = floors_of(conv_net(), (2, 8, 8))
    assert sorted(result) == [2, 3, 4]
    # 6 x 6 places of 5 channels, a 3 x 3 kernel over 3 channels, forth and back
    assert result[2].macs == 2 * BATCH * 36 * 5 * 27
    # predict: d below, uhat before the pool, d, the error and delta, the weights; feedback: delta, the error below,
    # d twice and its copy, the weights
    above, below, inner, weights = BATCH * 45, BATCH * 108, BATCH * 180, 5 * 27
    predict = 2 * below + 4 * inner + (4 + 4 + 2) * above + 2 * weights
    assert result[2].bytes == predict + 2 * above + (4 + 8 + 2) * below + 2 * weights
    # at the top the output and the target take the place of d
    predict = 2 * BATCH * 13 + (4 + 8 + 4 + 2) * BATCH * 5 + 2 * 65
    assert result[4].bytes == predict + 2 * BATCH * 5 + (4 + 8 + 2) * BATCH * 13 + 2 * 65


def test_floors_in_gram_form():
    model, x, _ = narrowing_conv_net("nothing")
    network = pcfast.model.describe.describe(model)
    (plain, result) = (floors_of(model, tuple(x.shape[1:]), gram)[2] for gram in (False, True))
    assert result.macs == planning.gram_macs(network, network.shapes(tuple(x.shape))) < plain.macs
    # uhat, s, d, the error and delta; delta, s and its sum twice, the Gram matrix
    size, gram = BATCH * 3 * 4 * 6, 3 * 3 * 5 * 3
    assert result.bytes == size * (4 + 4 + 4 + 4 + 2) + size * (2 + 16) + 2 * gram


def test_floors_count_velocities():
    """Read and written once an iteration, where the layer above moves them; in Gram form of s and of its sum."""
    cnn = (conv_net(), (2, 8, 8), False, {2: BATCH * 108, 3: BATCH * 45, 4: BATCH * 13})
    model, x, _ = narrowing_conv_net("nothing")
    in_gram_form = (model, tuple(x.shape[1:]), True, {2: 2 * BATCH * 3 * 4 * 6, 3: BATCH * 72, 4: BATCH * 7})
    for model, sample, gram, numbers in (cnn, in_gram_form):
        plain, result = (floors_of(model, sample, gram, momentum) for momentum in (False, True))
        assert {l: result[l].bytes - plain[l].bytes for l in result} == {l: 8 * n for l, n in numbers.items()}
        assert all(result[l].macs == plain[l].macs for l in result)


def test_floors_of_convolutions_follow_their_own_switch():
    settings = dict(precision="tf32x3", convolution_precision="tf32")
    fast, slow = (
        floors_of(conv_net(), (2, 8, 8), **settings),
        floors_of(conv_net(), (2, 8, 8), precision="tf32x3"),
    )
    rate, _ = floor.matrix_rate("tf32", gpu_constants.load())
    by_memory = fast[2].bytes / (gpu_constants.load().copy_bandwidth_gbs * 1e9)
    assert fast[2].seconds == max(fast[2].macs / rate, by_memory)
    assert slow[2].seconds == max(3 * slow[2].macs / rate, by_memory)
    assert fast[3] == slow[3]


def test_training_runs_on_it(tmp_path):
    torch.manual_seed(5)
    x = torch.randn(40, 6)
    data = (x, (x[:, 0] > 0).long(), x, (x[:, 0] > 0).long())
    ran = {}
    for tried in ("eager", "triton"):
        model = mlp(6, 8, 5, 2)
        torch.manual_seed(6)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        history = training.train(
            model, data, epochs=2, batch_size=16, num_steps=4, backend=tried, out=tmp_path / tried,
            progress=False,
        )  # fmt: skip
        assert pcfast.last_run().plan.backend == tried
        ran[tried] = history.train_loss
    torch.testing.assert_close(torch.tensor(ran["triton"]), torch.tensor(ran["eager"]), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_a_training_step_under_torch_compile(name, launches):
    """One operator in the traced graph, whose bits are those of an eager call; weights change in between."""
    model, x, y = drawn(name)
    twin = copy.deepcopy(model)

    def step(each):
        return pcfast.pc_loss(each, x, y, num_steps=4, backend="triton")

    torch.compiler.reset()
    try:
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            for each, function in ((model, compiled), (twin, step)):
                launches.clear()
                function(each).backward()
                assert launches and pcfast.last_run().plan.backend == "triton"
                with torch.no_grad():
                    for parameter in each.parameters():
                        parameter.sub_(parameter.grad, alpha=0.5)
                        parameter.grad = None
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.equal(p, q)
    finally:
        torch.compiler.reset()


def test_the_command_line_checks_it(capsys):
    options = ["--net", "mlp", "--widths", "6", "--num-steps", "3", "--batch-size", "8", "--draws", "3"]
    options += ["--method", "strict", "--precision", "ieee"]
    assert main(["check", *options]) == 0
    assert "strict on triton" in capsys.readouterr().out


def test_the_command_line_trains_on_it(tmp_path, capsys):
    options = ["--net", "mlp", "--widths", "6", "--epochs", "1", "--num-steps", "1", "--batch-size", "512"]
    assert main(["train", *options, "--backend", "triton", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert pcfast.last_run().plan.backend == "triton"


@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3"])
@pytest.mark.parametrize("batch", [1, 300, 20000])
@pytest.mark.parametrize("close", [0, 10**6])
def test_designs_for_a_gpu_hold_together(precision, batch, close):
    """What the kernels assert at compile time, and what the loop takes for granted, for many sizes."""
    for widths, activation in itertools.product(
        ((784, 600, 600, 10), (64, 128, 128, 10), (8, 40, 64), (8, 40, 65), (4096,) * 5), (nn.ReLU, nn.GELU)
    ):
        with torch.device("meta"):
            model = mlp(*widths, activation=activation)
        network = pcfast.model.describe.describe(model)
        shapes = network.shapes((batch, widths[0]))
        target = launch_plan.CompileTarget(precision, 132, close, False)
        made = designs.design(network, shapes, False, "cross_entropy", True, target)
        assert len(made.predicts) == 1 or not made.fuse_loop
        assert sorted(l for launch in made.predicts for l in launch.layers) == list(range(2, made.depth + 1))
        for launch in made.predicts:
            if launch.loss is not None:
                rows = launch.tiles.block_m * launch.tiles.block_n
                assert launch.tiles.block_n <= LOSS_COLUMNS and rows <= EPILOGUE_SUBTILE.value
                assert widths[-1] <= launch.tiles.block_n
        assert made.wide_top == (widths[-1] > LOSS_COLUMNS)


def test_tf32_operands_are_rounded_and_not_truncated():
    x = torch.randn(4096)
    rounded = rounded_to_tf32(x)
    assert float(((rounded - x) / x).abs().max()) <= 2**-11
    assert abs(float(((rounded - x) / x).mean())) < 1e-5  # truncation would give -2^-11.5
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    special[0] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    torch.testing.assert_close(rounded_to_tf32(special), special, equal_nan=True, rtol=0, atol=0)
    out = torch.empty(4096)
    rounding_kernel[(1,)](x, out, 4096)
    assert torch.equal(out, rounded)


# memory --------------------------------------------------------------------------------------------------------


def live_bytes() -> dict[int, int]:
    """Bytes of every storage that some tensor holds, by address."""
    tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


#: name -> (network of at least four layers, shape of a sample)
LARGE = {
    "mlp": (lambda: mlp(16, 32, 96, 96, 16), (16,)),
    "Gram form": (lambda: mlp(16, 512, 64, 64, 16), (16,)),
    "conv": (
        lambda: nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(3)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16)),
        ),
        (4, 4, 4),
    ),
    "pooled conv": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            nn.Linear(32, 16),
        ),
        (4, 8, 8),
    ),
    "conv in Gram form": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 24, 3, padding=1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(24, 4, 3), nn.Tanh(), nn.Flatten()),
            nn.Sequential(nn.Linear(144, 32), nn.Tanh()),
            nn.Linear(32, 16),
        ),
        (4, 8, 8),
    ),
}


def claimed_bytes(made: launch_plan.Design, model: nn.Sequential, batch: int, precision: str) -> int:
    """What docs/kernels.md says that a relaxation keeps."""
    operand = 2 if precision == "bf16" else 4
    depth, bounds = made.depth, made.boundaries
    sizes = [bound.size for bound in bounds]
    inner = [0, sizes[1], *(floor.inner_size(made, l) for l in range(2, depth + 1))]  # before a pool
    numbers = 4 * sum(sizes[1:]) + 4 * sum(inner[1:])  # vhat and uhat, layer 1's too
    numbers += operand * sum(inner[2:])  # delta
    for l in range(1, depth):
        if l == 1 and made.gram:
            numbers += 4 * 3 * inner[2]  # s, its sum, and what that was before the last iteration
            numbers += 4 * 2 * inner[2] * made.momentum  # the velocities of s and its sum
        else:
            numbers += (4 + 4) * sizes[l]  # d, eps
            linear = isinstance(made.forms[l + 1], LinearForm)
            if precision == "bf16" or (precision == "tf32" and linear):
                numbers += operand * sizes[l]  # d as operand
            numbers += 4 * sizes[l] * made.momentum  # its velocity
        flattened = bounds[l].permuted and isinstance(made.forms[l + 1], LinearForm)
        pooled = getattr(made.forms[l], "pool", None) is not None
        numbers += 4 * (flattened + pooled) * sizes[l]  # vhat in torch's order; what follows the pool reads
    # at the output: s, eps, vhat and the target again, the target, its gradient
    numbers += 4 * 6 * sizes[depth]
    weights = 0
    for l, form in enumerate(made.forms):
        if isinstance(form, LinearForm):  # as operands; the Gram matrix takes the place of W_2
            read = form.out_features if made.gram and l == 2 else form.in_features
            weights += operand * padded(form.out_features) * padded(read)
        elif made.gram and l == 2:
            weights += operand * form.inner[2] ** 2 * 25  # of a 3 x 3 kernel
    if precision == "bf16":  # as the forward pass reads them
        weights += operand * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    return batch * numbers + weights


@pytest.mark.parametrize(("name", "precision", "momentum"), [
    *((name, "bf16", 0.5) for name in LARGE), ("mlp", "tf32", 0.0), ("pooled conv", "tf32", 0.0),
    ("Gram form", "ieee", 0.0), ("conv", "ieee", 0.5),
])  # fmt: skip
def test_memory_above_the_parameters(name, precision, momentum, staged, monkeypatch):
    batch = 64
    make, sample = LARGE[name]
    model, x = make(), torch.randn(batch, *sample)
    y = torch.randint(0, 16, (batch,))
    result, peaks, before = [], [], live_bytes()
    run = Loop.run

    def mine() -> int:
        return sum(size for address, size in live_bytes().items() if address not in before)

    def watched(self, *arguments):
        run(self, *arguments)
        result.append((self.design, mine()))

    def between(launch, *arguments, **keywords):
        peaks.append(mine())
        launch(*arguments, **keywords)

    monkeypatch.setattr(Loop, "run", watched)
    for launch in ("error_and_delta", "update", "gram_update"):  # around them lies what torch's products left
        monkeypatch.setattr(loops, launch, functools.partial(between, getattr(loops, launch)))
    matmul, products = torch.backends.cuda.matmul, "tf32" if precision == "tf32" else "ieee"
    autocast = use_precision("bf16" if precision == "bf16" else "ieee", x.device)
    with autocast, switched(matmul, "fp32_precision", products):
        pcfast.pc_loss(
            model, x, y, backend="triton", num_steps=6 if "Gram" in name else 4,  # where it pays; where all are live
            belief_optimizer=pcfast.GradientDescent(momentum),
        )  # fmt: skip
    ((made, kept),) = result
    assert made.gram == ("Gram" in name) and made.momentum == (momentum > 0)
    operand = 2 if precision == "bf16" else 4
    claimed = claimed_bytes(made, model, batch, precision)
    assert kept <= claimed + 4096  # tables, biases, gaps between matrices
    if peaks:
        temporary = operand * batch * max(floor.inner_size(made, 2), made.boundaries[1].size)
        assert max(peaks) <= claimed + temporary + 4096
