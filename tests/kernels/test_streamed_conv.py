"""Convolutions as implicit products in the loop of backend "triton", interpreted, against float64."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from itertools import pairwise

import implicit_convolutions
import kernel_networks
import pytest
import torch
from against_reference import MOVING, assert_bfloat16_loses_what_eager_does, in_double, updates
from drawing import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_networks import IMPLICIT as NETWORKS
from kernel_networks import conv_net, first
from test_streamed import (
    _gaps_between_matrices_are_out_of_bounds,  # noqa: F401 - a fixture
    assert_close_to_float64,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pcfast
from pcfast.backends.kernel_forms import LinearForm, PointwiseForm, TorchForm
from pcfast.backends.triton import launch_plan as designs
from pcfast.backends.triton import loop as loops
from pcfast.backends.triton.configs import IMPLICIT, Choices, ConvolutionKey
from pcfast.backends.triton.conv_form import ConvForm
from pcfast.checking.bounds import relative_error
from pcfast.checking.checker import check
from pcfast.problem import plan as planning

BATCH = 5


@pytest.fixture
def implicit(monkeypatch):
    implicit_convolutions.everywhere(monkeypatch)


_LETTERS = {LinearForm: "l", PointwiseForm: "p", ConvForm: "c", TorchForm: "t"}
networks = pytest.mark.parametrize("name", NETWORKS)


drawn = functools.partial(kernel_networks.drawn, NETWORKS, batch=BATCH)


def letters(made: designs.Design) -> str:
    return "".join(_LETTERS[type(form)] for form in made.forms[2:])


# which convolutions ----------------------------------------------------------------------------------------------


@networks
def test_the_forms_that_the_layers_take(name, made, implicit):
    updates(*drawn(name), num_steps=2, backend="triton")
    assert letters(made[0]) == NETWORKS[name][2]


@networks
def test_none_is_implicit_by_default(name, made):
    updates(*drawn(name), num_steps=2, backend="triton")
    assert letters(made[0]) == NETWORKS[name][2].replace("c", "p")


def designed(name: str, precision: str, choices: Choices, gram: bool = False) -> designs.Design:
    model, x, _ = drawn(name)
    network = pcfast.model.describe.describe(model)
    target = designs.CompileTarget(precision, 132, 0, False, choices=choices)
    return designs.design(network, network.shapes(tuple(x.shape)), gram, "cross_entropy", True, target)


def test_each_geometry_and_precision_is_chosen_for_itself():
    name = "convolutions one after another"
    geometry = designed(name, "bf16", implicit_convolutions.EveryConvolution()).forms[3].geometry
    chosen = Choices({ConvolutionKey("bf16", dataclasses.astuple(geometry)): IMPLICIT})
    assert letters(designed(name, "bf16", chosen)) == "pcpll"
    assert letters(designed(name, "tf32", chosen)) == "pppll"


def test_the_gram_form_of_a_convolution_is_another_convolution():
    """Its weight is the Gram matrix, and cuDNN multiplies with it."""
    assert (
        letters(designed("3x3 relu max", "tf32", implicit_convolutions.EveryConvolution(), gram=True))
        == "pll"
    )


@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3"])
def test_the_design_gives_every_matrix_its_own_place(precision):
    result = designed("convolutions one after another", precision, implicit_convolutions.EveryConvolution())
    for operand in (False, True):
        places = sorted({m for _, m in result.layout.matrices if m.operand == operand}, key=lambda m: m.first)
        assert all(a.first + a.elements <= b.first for a, b in pairwise(places))
    pooled = dict(result.layout.matrices)["delta2"]
    assert pooled.columns == 3 * 3 * 4 and pooled.operand == (precision != "tf32x3")


# the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
@networks
def test_against_the_reference(name, num_steps, implicit):
    assert_close_to_float64(*drawn(name), num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [4, 5])
@pytest.mark.parametrize("name", ["convolutions one after another", "bare"])
def test_iterations_in_which_the_front_arrives(name, num_steps, implicit):
    assert_close_to_float64(*drawn(name), num_steps=num_steps)


@pytest.mark.parametrize("name", ["3x3 relu max", "stride", "convolutions one after another"])
def test_one_sample(name, implicit):
    assert_close_to_float64(*drawn(name, batch=1), num_steps=5)


def test_maps_wider_than_a_tile(implicit):
    """Several tiles of rows and columns, and a reduction that does not end with a step."""
    torch.manual_seed(5)
    model = nn.Sequential(
        first(20),
        nn.Sequential(nn.Conv2d(20, 40, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(40 * 9, 4),
    )
    assert_close_to_float64(model, torch.randn(3, 2, 6, 6), torch.tensor([0, 3, 1]), num_steps=3)


@examples(10)
@given(
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    channels=st.tuples(st.sampled_from((1, 3, 16)), st.sampled_from((1, 5, 17))),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    activation=st.sampled_from((nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Identity)),
    pool=st.sampled_from((None, nn.MaxPool2d, nn.AvgPool2d)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.sampled_from((1, 2, 5)),
    num_steps=st.integers(0, 5),
    momentum=st.sampled_from((0.0, 0.5)),
)
def test_any_convolution(
    size, channels, kernel, stride, padding, activation, pool, window, batch, num_steps, momentum, implicit
):
    torch.manual_seed(6)
    out = [(s + 2 * p - k) // d + 1 for s, p, k, d in zip(size, padding, kernel, stride, strict=True)]
    tail = [activation()]
    if pool is not None:
        out = [s // w for s, w in zip(out, window, strict=True)]
        tail = [pool(window), activation()]
    assume(min(out) >= 1)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, channels[0], 1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(*channels, kernel, stride, padding), *tail, nn.Flatten()),
        nn.Linear(channels[1] * out[0] * out[1], 3),
    )
    x, y = torch.randn(batch, 1, *size), torch.randint(0, 3, (batch,))
    optimizer = pcfast.GradientDescent(momentum)
    assert_close_to_float64(model, x, y, bound=1e-5, num_steps=num_steps, belief_optimizer=optimizer)


def test_within_the_projects_bounds(implicit):
    report = check(
        conv_net(), (8, 2, 8, 8), draws=3, num_steps=4, backends=["triton"], precisions=["ieee", "bf16"]
    )
    assert report.ok and {row.precision for row in report.rows} == {"ieee", "bf16"}, report.failures


@pytest.mark.parametrize("name", ["gelu before max", "avg", "stride"])
def test_bfloat16_within_the_projects_bounds(name, implicit):
    model, x, _ = drawn(name)
    report = check(model, tuple(x.shape), draws=3, num_steps=4, backends=["triton"], precisions=["bf16"])
    assert report.ok and {row.backend for row in report.rows} == {"triton"}, report.failures


def test_beliefs_to_start_from(implicit):
    model, x, y = drawn("3x3 tanh max")
    vinit = [None, torch.randn(BATCH, 3, 6, 6), torch.randn(BATCH, 45), None, None]
    double, x2 = in_double(model, x)
    wide = [v if v is None else v.double() for v in vinit]
    for num_steps in (0, 1, 4):
        truth = pcfast.relax(double, x2, y, vinit=wide, num_steps=num_steps, backend="reference")
        result = pcfast.relax(model, x, y, vinit=vinit, num_steps=num_steps, backend="triton")
        for l in range(1, 5):
            assert relative_error(result.errors[l], truth.errors[l]) < 3e-6, (num_steps, l)
            assert relative_error(result.beliefs[l], truth.beliefs[l]) < 3e-6, (num_steps, l)


@pytest.mark.parametrize("way", MOVING)
@pytest.mark.parametrize("num_steps", [1, 2, 6])
@pytest.mark.parametrize(
    "name", ["3x3 relu max", "stride", "convolutions one after another", "bare", "torch's layers round it"]
)
def test_momentum_and_schedules(name, num_steps, way, made, launches, implicit):
    settings = MOVING[way](num_steps)
    assert_close_to_float64(*drawn(name), num_steps=num_steps, **settings)
    assert "c" in letters(made[0]) and made[0].momentum == (way != "schedule")
    sizes, momentum = (
        settings.get("step_size", (0.1,) * num_steps),
        {"momentum": 0.9, "both": 0.5}.get(way, 0.0),
    )
    for kernel, keywords in launches:
        if kernel == "conv_feedback":
            assert (keywords["eta"], keywords["momentum"]) == (sizes[keywords["iteration"] - 1], momentum)


@pytest.mark.parametrize("way", MOVING)
def test_momentum_and_schedules_from_given_beliefs(way, implicit):
    model, x, y = drawn("3x3 tanh max")
    vinit = [None, torch.randn(BATCH, 3, 6, 6), torch.randn(BATCH, 45), None, None]
    for num_steps in (1, 4):
        assert_close_to_float64(model, x, y, vinit=vinit, num_steps=num_steps, **MOVING[way](num_steps))


@pytest.mark.parametrize("way", MOVING)
def test_momentum_and_schedules_in_bfloat16(way, implicit):
    model, x, y = drawn("stride")
    assert_bfloat16_loses_what_eager_does(model, x, y, backend="triton", num_steps=6, **MOVING[way](6))


@pytest.mark.parametrize("name", ["3x3 relu max", "bare"])
def test_energies(name, implicit):
    model, x, y = drawn(name)
    truth = pcfast.relax(*in_double(model, x, y), num_steps=5, energies=True, backend="reference")
    result = pcfast.relax(model, x, y, num_steps=5, energies=True, backend="triton")
    torch.testing.assert_close(result.energies.double(), truth.energies, rtol=1e-5, atol=1e-12)


def test_weights_in_any_layout(implicit):
    model, x, y = drawn("3x3 tanh max")
    expected = updates(model, x, y, backend="triton", num_steps=4)
    result = updates(model.to(memory_format=torch.channels_last), x, y, backend="triton", num_steps=4)
    for p, q in zip(result, expected, strict=True):
        assert relative_error(p, q) < 1e-6


def test_rows_do_not_depend_on_their_batch(implicit):
    model, x, y = drawn("3x3 relu max")
    arguments = dict(loss=nn.CrossEntropyLoss(reduction="sum"), num_steps=5, backend="triton")
    whole = pcfast.relax(model, x, y, **arguments)
    again = pcfast.relax(model, x, y, **arguments)
    part = pcfast.relax(model, x[:2], y[:2], **arguments)
    for e, f, g in zip(whole.errors[2:], again.errors[2:], part.errors[2:], strict=True):
        assert torch.equal(e, f)
        assert relative_error(g, e[:2]) < 1e-6


# what is launched ------------------------------------------------------------------------------------------------


class Convolutions(TorchDispatchMode):
    """Counts torch's convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "convolution" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def torchs(monkeypatch):
    """torch's convolutions in the loop."""
    mode, run = Convolutions(), loops.Loop.run

    def watched(*arguments):
        with mode:
            run(*arguments)

    monkeypatch.setattr(loops.Loop, "run", watched)
    return mode


def test_one_launch_a_stage_and_no_convolution_of_torchs(launches, torchs, implicit):
    updates(*drawn("3x3 relu max"), num_steps=8, backend="triton")
    # layer 2 of 4 has an error from iteration 3 on and moves layer 1 from iteration 3 on
    expected = {"linear_predict": 8, "linear_feedback": 8, "conv_predict": 6, "conv_feedback": 6}
    assert Counter(name for name, _ in launches) == expected
    assert torchs.count == 0


def test_explain_names_their_tiles(implicit):
    model, x, _ = drawn("3x3 relu max")
    text = str(pcfast.explain(model, tuple(x.shape), backend="triton"))
    (line,) = (line for line in text.splitlines() if "conv_predict" in line)
    assert line.startswith("layer 2 (") and "; floor " in line
    tiles = r"tiles of \d+ x 16 x 32"
    assert re.search(f"conv_predict in {tiles}, conv_feedback in {tiles}, products in tf32x3", line)


def test_torchs_convolutions_are_counted(torchs):
    updates(*drawn("3x3 relu max"), num_steps=8, backend="triton")
    assert torchs.count == 5 + 6


@pytest.mark.parametrize("num_steps", [1, 3, 6])
def test_only_the_active_front_is_multiplied(num_steps, launches, implicit):
    updates(*drawn("convolutions one after another"), num_steps=num_steps, backend="triton")
    done = Counter()
    for name, keywords in launches:
        # the layers' numbers of output channels tell them apart
        if name == "conv_predict" and keywords["d"] is not None:
            done["predict", len(keywords["weight"])] += 1
        if name == "conv_feedback":
            done["feedback", len(keywords["weight"])] += 1
    for layer, out_channels in ((2, 3), (3, 5), (4, 6)):
        predictions, feedbacks = planning.strict_products(6, num_steps, True, layer)
        assert (done["predict", out_channels], done["feedback", out_channels]) == (predictions, feedbacks)


# what goes wrong -------------------------------------------------------------------------------------------------


def test_divergence_names_the_iteration_and_the_layer(implicit):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(45, 4),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    x, y = torch.randn(BATCH, 2, 6, 6), torch.randint(0, 4, (BATCH,))
    result = {}
    for tried in ("eager", "triton"):
        with pytest.raises(pcfast.RelaxationDiverged) as caught:
            pcfast.relax(model, x, y, backend=tried, check="sync", step_size=1e4, num_steps=20)
        result[tried] = caught.value
    assert result["triton"].layer == 1 or result["triton"].layer == result["eager"].layer
    assert abs(result["triton"].iteration - result["eager"].iteration) <= 1
