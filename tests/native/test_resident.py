"""Backend "cuda" with its kernels compiled for the CPU: the resident kernel against float64, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import threading
from itertools import pairwise

import against_reference
import golden
import kernel_networks
import pytest
import torch
from accuracy import allowed_error, assert_gradients_agree, assert_states_agree
from against_reference import updates
from drawing import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_networks import RESIDENT as NETWORKS
from kernel_networks import clamped, mlp
from native_build import needs_gcc
from networks_for_tests import IN_KERNELS, LOSSES, architectures, loss_and_target
from plans import planned, wherever_possible
from torch import nn

import pcfast
from pcfast.backends import BACKENDS, choose_backend
from pcfast.backends.cuda import backend, geometry, native
from pcfast.backends.cuda import kernel_params as program
from pcfast.backends.cuda import launch as loop
from pcfast.backends.cuda import shared_memory as placement
from pcfast.checking.bounds import relative_error
from pcfast.checking.checker import check
from pcfast.cli import main
from pcfast.losses import describe_loss
from pcfast.precision import switched
from pcfast.problem import plan as planning

pytestmark = needs_gcc
BATCH = 9
assert_close_to_float64 = functools.partial(against_reference.assert_close_to_float64, backend="cuda")


@pytest.fixture(autouse=True)
def launches(host_module, monkeypatch) -> list[tuple]:
    """Kernels run on the CPU; arguments of every launch."""
    monkeypatch.setenv(native.ON_HOST, str(host_module))
    module, seen = native.load(), []
    run = module.resident

    def counted(*arguments):
        seen.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(module, "resident", counted)
    return seen


def placed_by(launches: list[tuple]) -> program.Program:
    """What the last launch ran."""
    return program.Program.from_buffer_copy(launches[-1][0])


@pytest.fixture
def samples(monkeypatch):
    """Fixes how many samples a block has."""
    placement.place.cache_clear()
    yield lambda count: monkeypatch.setattr(placement, "SAMPLES", (count,))
    placement.place.cache_clear()


@pytest.fixture(autouse=True)
def _no_plans_left():
    yield
    planning.plan.cache_clear()


networks = pytest.mark.parametrize("name", NETWORKS)


#: What products read -> what switches it on, on a CPU too.
MODES = {
    "ieee": contextlib.nullcontext,
    "tf32": lambda: switched(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
}
modes = pytest.mark.parametrize("mode", MODES)


drawn = functools.partial(kernel_networks.drawn, NETWORKS)


# the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_matches_torch2pc(path, launches):
    """None of these networks is refused."""
    golden.assert_matches(path, "cuda")
    meta, model, _ = golden.load(path)
    assert len(launches) == (meta["method"] == "Strict" and len(model) > 1)


@pytest.mark.parametrize(
    ("num_steps", "step_size", "a_block"),
    [(0, 0.1, 1), (1, 0.1, 2), (2, 0.1, 3), (3, 0.1, 4), (7, 0.1, 8), (4, 0.1, 16), (20, 0.5, 12)],
)
@networks
def test_against_the_reference(name, num_steps, step_size, a_block, samples, launches):
    samples(a_block)
    assert_close_to_float64(*drawn(name), num_steps=num_steps, step_size=step_size)
    assert len(launches) == 2


@pytest.mark.parametrize("step_size", [0.0, 1.0])
@networks
def test_step_sizes(name, step_size):
    assert_close_to_float64(*drawn(name), num_steps=4, step_size=step_size)


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize(("momentum", "schedule"), [(0.8, False), (0.0, True), (0.5, True)])
@pytest.mark.parametrize("num_steps", [2, 7])
@pytest.mark.parametrize(
    "name", ["mlp", "nothing but a copy", "conv", "pools before activations", "strides and paddings"]
)
def test_momentum_and_schedules(name, num_steps, momentum, schedule, gram, monkeypatch, launches):
    wherever_possible(monkeypatch, gram)
    eta = tuple(0.3 * 0.8**t for t in range(num_steps)) if schedule else 0.2
    optimizer = pcfast.GradientDescent(momentum=momentum)
    assert_close_to_float64(*drawn(name), num_steps=num_steps, step_size=eta, belief_optimizer=optimizer)
    assert len(launches) == 2
    layers = placed_by(launches).layers
    assert any(layer.velocity_sample for layer in layers) == (momentum > 0)


def test_momentum_from_given_beliefs():
    model, x, y = drawn("mlp")
    vinit = [None, *(torch.randn_like(v) for v in pcfast.relax(model, x, y).beliefs[1:])]
    optimizer = pcfast.GradientDescent(momentum=0.7)
    for num_steps in (0, 1, 5):
        assert_close_to_float64(model, x, y, vinit=vinit, num_steps=num_steps, belief_optimizer=optimizer)


@networks
def test_a_batch_of_one(name, samples):
    samples(4)
    assert_close_to_float64(*drawn(name, 1), num_steps=6)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 9])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_both_forms_of_the_clamped_layer(name, num_steps, gram, monkeypatch, samples, launches):
    samples(4)
    model, x, y = clamped(name)
    wherever_possible(monkeypatch, gram)
    result = pcfast.relax(model, x, y, num_steps=num_steps, backend="cuda")
    assert result.run.plan.gram == (gram and num_steps > 2)
    assert placed_by(launches).layers[1].gram == result.run.plan.gram
    assert_close_to_float64(model, x, y, num_steps=num_steps)


@pytest.mark.parametrize("loss_name", [name for name in LOSSES if name != "custom"])
@pytest.mark.parametrize("width", [10, 40])
def test_losses(loss_name, width, samples, launches):
    samples(3)
    torch.manual_seed(3)
    model, x = mlp(8, 12, 9, width), torch.randn(BATCH, 8)
    loss, y = loss_and_target(loss_name, BATCH, width)
    single = loss.float() if isinstance(loss, nn.Module) else loss
    assert_close_to_float64(model, x, y.float() if y.is_floating_point() else y, loss=single, num_steps=4)
    assert len(launches) == 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_labels(reduction, smoothing, weighted, samples, launches):
    samples(2)
    model, x, y = drawn("mlp")
    y[::3] = -7
    weight = torch.linspace(0.2, 3, 10) if weighted else None
    loss = nn.CrossEntropyLoss(weight, ignore_index=-7, reduction=reduction, label_smoothing=smoothing)
    assert_close_to_float64(model, x, y, loss=loss, num_steps=4)
    result, truth = (pcfast.relax(model, x, y, loss=loss, backend=name) for name in ("cuda", "eager"))
    assert relative_error(result.loss, truth.loss) < 1e-6 and len(launches) == 3


def test_labels_out_of_range(launches):
    model, x, y = drawn("mlp")
    y[5] = 10
    said = []
    for name in ("eager", "cuda"):
        with pytest.raises(pcfast.ArgumentError) as raised:
            pcfast.relax(model, x, y, backend=name)
        said.append(str(raised.value))
    assert said[0] == said[1] and not launches
    said = []
    for name in ("eager", "cuda"):
        pcfast.pc_loss(model, x, y, backend=name, check="deferred").backward()
        with pytest.raises(pcfast.PcfastError) as raised:
            pcfast.synchronize()
        said.append(str(raised.value))
    assert said[0] == said[1] and len(launches) == 1


@pytest.mark.parametrize("normalizer", [4, 100])
def test_a_mean_over_another_batch(normalizer):
    assert_close_to_float64(*drawn("mlp"), num_steps=4, normalizer=normalizer)


@pytest.mark.parametrize("normalizer", [BATCH, 10**4 * BATCH])
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_activations(activation, normalizer, launches):
    """Also with errors far below the beliefs' rounding, of which nothing may cancel (docs/method.md fact 8)."""
    torch.manual_seed(5)
    model, x = mlp(8, 15, 14, 9, 6, activation=IN_KERNELS[activation]), 2 * torch.randn(BATCH, 8)
    y = torch.randn(BATCH, 6)
    assert_close_to_float64(model, x, y, loss=nn.MSELoss(), num_steps=6, normalizer=normalizer)
    assert len(launches) == 2


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_constant_images(activation, pool, samples):
    """Every window of the pool is a tie: the first element wins, in both orders of pool and activation."""
    samples(2)
    act = IN_KERNELS[activation]
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), act()),
        nn.Sequential(nn.Conv2d(3, 4, 1), act(), pool(2)),
        nn.Sequential(nn.Conv2d(4, 4, 2), pool(2), act()),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh()),
        nn.Linear(5, 3),
    )  # fmt: skip
    x, y = (
        torch.ones(3, 1, 8, 8) * torch.tensor([0.0, 1.0, -0.7])[:, None, None, None],
        torch.tensor([0, 1, 2]),
    )
    for num_steps in (0, 1, 3, 5):
        assert_close_to_float64(model, x, y, num_steps=num_steps)


@pytest.mark.parametrize("a_block", [1, 4])
@pytest.mark.parametrize("name", ["mlp", "conv", "strides and paddings", "bare", "nothing but a copy"])
def test_beliefs_to_start_from(name, a_block, samples):
    samples(a_block)
    model, x, y = drawn(name)
    shapes = [v.shape for v in pcfast.relax(model, x, y, backend="eager").beliefs]
    vinit = [None, *(torch.randn(shape) if l % 3 else None for l, shape in enumerate(shapes[1:], start=1))]
    for num_steps in (0, 1, 2, 5):
        assert_close_to_float64(model, x, y, vinit=vinit, num_steps=num_steps)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, neither side by side nor at a multiple of 16 bytes."""
    held = torch.full((tensor.numel() * 2 + 1,), float("nan"))[1:].view(*tensor.shape, 2)[..., 0]
    result = held.permute(*reversed(range(tensor.dim()))) if len(set(tensor.shape)) == 1 else held
    result.copy_(tensor)
    assert result.data_ptr() % 16 and not result.is_contiguous()
    return result


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers side by side, at no multiple of 8 bytes."""
    result = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert result.data_ptr() % 8 and result.is_contiguous()
    return result


@pytest.mark.parametrize("moved", [strided, shifted])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_inputs_in_any_layout(name, moved):
    model, x, y = drawn(name)
    for parameter in model.parameters():
        parameter.data = moved(parameter.data)
    shapes = [v.shape for v in pcfast.relax(model, x, y, backend="eager").beliefs]
    vinit = [None, *(moved(torch.randn(shape)) for shape in shapes[1:])]
    probabilities = moved(torch.rand(BATCH, shapes[-1][1]).softmax(1))
    assert_close_to_float64(model, moved(x), y, num_steps=4)
    assert_close_to_float64(model, moved(x), probabilities, vinit=vinit, num_steps=4)


@examples(60)
@given(
    architecture=architectures(IN_KERNELS),
    loss_name=st.sampled_from(LOSSES),
    num_steps=st.one_of(st.integers(0, 8), st.integers(9, 40)),
    step_size=st.sampled_from((0.0, 0.05, 0.1, 0.3, 0.5, 1.0)),
    batch=st.sampled_from((1, 2, 5, 17)),
    a_block=st.sampled_from(placement.SAMPLES),
    starts=st.booleans(),
    gram=st.sampled_from((True, True, False)),
    seed=st.integers(0, 10**6),
)
def test_any_network_agrees_or_is_refused(
    architecture,
    loss_name,
    num_steps,
    step_size,
    batch,
    a_block,
    starts,
    gram,
    seed,
    samples,
    launches,
    monkeypatch,
):
    samples(a_block)
    placement.place.cache_clear()
    wherever_possible(monkeypatch, gram)
    model, shape = architecture
    torch.manual_seed(seed)
    for parameter in model.parameters():  # the strategy's draws do not seed torch
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, batch, model[-1].out_features)
    arguments = dict(loss=loss, step_size=step_size, num_steps=num_steps)
    if starts:
        vhat = pcfast.relax(model, x, y, method="exact", backend="eager").activations
        arguments["vinit"] = [None, *(v + 0.3 * torch.randn_like(v) for v in vhat[1:])]
    ok, reason = BACKENDS["cuda"].supports(
        planned(
            model, x.shape, dtype=x.dtype, num_steps=num_steps, fresh=not starts, loss=describe_loss(loss).kind
        )
    )  # fmt: skip
    del launches[:]
    if not ok:
        assert reason
        with pytest.raises(pcfast.BackendError) as raised:
            pcfast.relax(model, x, y, backend="cuda", **arguments)
        assert reason in str(raised.value) and not launches
        return
    try:
        truth = pcfast.relax(model, x, y, backend="reference", **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)  # what happens then has tests of its own
    # a relaxation that runs away amplifies rounding without bound
    assume(all(e is None or float(e.norm()) < 1e3 for e in truth.errors))
    result = pcfast.relax(model, x, y, backend="cuda", **arguments)
    assert result.run.plan.backend == "cuda" and len(launches) == (len(model) > 1)
    assert_states_agree(result, truth, num_steps)
    assert relative_error(result.loss, truth.loss) < 1e-12
    for v, v_true in zip(result.activations, truth.activations, strict=True):
        assert float((v - v_true).norm()) <= allowed_error(v_true, v_true, 1)
    by_backend = [
        dict(zip(model.parameters(), updates(model, x, y, backend=name, **arguments), strict=True))
        for name in ("cuda", "reference")
    ]
    assert_gradients_agree(*by_backend, model, truth, num_steps)


@pytest.mark.parametrize("method", ["exact", "fixed_prediction"])
def test_methods_without_a_loop(method, launches):
    model, x, y = drawn("conv")
    result = updates(model, x, y, method=method, backend="cuda")
    assert pcfast.last_run().plan.backend == "cuda" and not launches
    for p, q in zip(result, updates(model, x, y, method=method, backend="eager"), strict=True):
        assert torch.equal(p, q)


def test_one_layer_has_no_loop(launches):
    assert_close_to_float64(nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    assert not launches


# Tensor Cores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "a_block"), [(0, 1), (3, 4), (7, 8), (5, 16)])
@networks
def test_tf32(name, num_steps, a_block, samples, launches):
    """Operands have 11 bits. The update of one bias, where numbers cancel, loses most."""
    samples(a_block)
    model, x, y = drawn(name)
    with MODES["tf32"]():
        loss = "cross_entropy" if name != "one class" else "mse"
        y = y if name != "one class" else torch.randn(BATCH, 1)
        assert_close_to_float64(model, x, y, loss=loss, bound=1e-2, num_steps=num_steps)
        result = updates(model, x, y, loss=loss, backend="cuda", num_steps=num_steps)
    assert {layer.operand for layer in placed_by(launches).layers[1 : len(model)]} & {
        program.OPERANDS["tf32"]
    }
    exact = updates(model, x, y, loss=loss, backend="cuda", num_steps=num_steps)
    assert num_steps == 0 or not all(map(torch.equal, result, exact))


@pytest.mark.parametrize("a_block", [1, 3, 8, 16])
@networks
def test_bf16_within_the_projects_bounds(name, a_block, samples, launches):
    samples(a_block)
    model, x, _ = drawn(name)
    report = check(model, tuple(x.shape), num_steps=5, draws=3, backends=["cuda"], precisions=["bf16"])
    assert report.ok, report.failures
    assert {layer.operand for layer in placed_by(launches).layers[1 : len(model)]} & {
        program.OPERANDS["bf16"]
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_16_bits(dtype, launches):
    """bfloat16 is relaxed in bfloat16; float16, in which deviations underflow, in float32."""
    model, x, y = drawn("mlp")
    model, x = model.to(dtype), x.to(dtype)
    result = pcfast.relax(model, x, y, backend="cuda")
    truth = pcfast.relax(*against_reference.in_double(model, x, y), backend="reference")
    operand = {torch.bfloat16: "bf16", torch.float16: "ieee"}[dtype]
    assert placed_by(launches).layers[1].operand == program.OPERANDS[operand]
    for e, e_true in zip(result.errors[1:], truth.errors[1:], strict=True):
        assert e.dtype == torch.float32 and relative_error(e, e_true) < (3e-2 if operand == "bf16" else 3e-6)


@pytest.mark.parametrize("mode", ["tf32", "bf16"])
@pytest.mark.parametrize("num_steps", [3, 4, 9])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_the_gram_form_on_tensor_cores(name, num_steps, mode, monkeypatch, samples, launches):
    samples(4)
    wherever_possible(monkeypatch, True)
    model, x, y = clamped(name)
    with MODES[mode]():
        assert pcfast.relax(model, x, y, num_steps=num_steps, backend="cuda").run.plan.gram
        assert placed_by(launches).layers[1].operand == program.OPERANDS[mode]
        if mode == "tf32":
            assert_close_to_float64(model, x, y, bound=8 * 2**-11, num_steps=num_steps)
    if mode == "bf16":
        report = check(
            model, tuple(x.shape), num_steps=num_steps, draws=3, backends=["cuda"], precisions=["bf16"]
        )
        assert report.ok, report.failures


# the same bits --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Loop:
    """One call of loop.relax."""

    placement: placement.Placement
    inputs: loop.Inputs
    num_steps: int

    def run(self, rows=slice(None), **changed) -> loop.ResidentOutputs:
        """The kernel alone for some of the batch."""
        inputs, placed = self.inputs, dataclasses.replace(self.placement, **changed)
        below = inputs.below[rows]

        def shapes(given):
            return [None if shape is None else (below.shape[0], *shape[1:]) for shape in given]

        inputs = dataclasses.replace(
            inputs,
            below=below,
            starts=inputs.starts and [t if t is None else t[rows] for t in inputs.starts],
            y=inputs.y[rows],
            shapes=shapes(inputs.shapes),
            inner_shapes=shapes(inputs.inner_shapes),
        )
        return loop.relax(placed, inputs, self.num_steps, gradients=True, output_gradient=True)


def captured(monkeypatch, model, x, y, **arguments) -> Loop:
    seen = []
    run = loop.relax
    with monkeypatch.context() as patch:
        patch.setattr(loop, "relax", lambda *a, **k: seen.append(Loop(*a)) or run(*a, **k))
        pcfast.pc_loss(model, x, y, backend="cuda", **arguments)
    (one,) = seen
    return one


def results(result: loop.ResidentOutputs, rows=slice(None)) -> list[torch.Tensor]:
    """Everything by samples that the loop gives."""
    tensors = [*result.vhat, *result.beliefs, *result.errors, *result.local_errors, result.output_gradient]
    tensors += [result.gram_sum, result.gram_sum_before]
    return [t[rows] for t in tensors if t is not None]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 2
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@modes
@pytest.mark.parametrize(
    "name", ["mlp", "long sums", "classes beyond a warp", "conv", "pools before activations"]
)
def test_a_sample_has_the_same_bits_in_any_batch_place_and_block(name, mode, monkeypatch, samples):
    model, x, y = drawn(name, 17)
    num_steps = len(model) + 1  # every layer has moved, and nothing is left as it was
    loss = nn.CrossEntropyLoss(reduction="sum")  # a mean is over the batch
    for vinit in (
        None,
        [None, *(torch.randn(17, *v.shape[1:]) for v in pcfast.relax(model, x, y).beliefs[1:])],
    ):
        of_blocks = []
        for a_block in placement.SAMPLES:
            samples(a_block)
            placement.place.cache_clear()
            with MODES[mode]():
                one = captured(monkeypatch, model, x, y, num_steps=num_steps, vinit=vinit, loss=loss)
            assert (one.placement.samples, one.placement.operands.linear) == (a_block, mode)
            of_blocks.append(one.run())
        whole = results(of_blocks[0])
        assert all(t.isfinite().all() for t in whole)
        for other in of_blocks[1:]:
            assert_same_bits(results(other), whole)
        for rows in (slice(0, 1), slice(16, 17), slice(2, 7), torch.arange(16, -1, -1)):
            assert_same_bits(results(one.run(rows)), [t[rows] for t in whole])
        assert_same_bits(results(one.run()), results(one.run()))
        for threads in (32, 96, 512):
            assert_same_bits(results(one.run(threads=threads)), whole)


def test_twice_the_same_bits():
    model, x, y = drawn("conv")
    first, again = (pcfast.relax(model, x, y, backend="cuda", num_steps=9) for _ in range(2))
    for a, b in zip([*first.beliefs, *first.errors[1:]], [*again.beliefs, *again.errors[1:]], strict=True):
        assert torch.equal(a, b)
    for p, q in zip(*(updates(model, x, y, backend="cuda") for _ in range(2)), strict=True):
        assert torch.equal(p, q)


# what goes wrong ------------------------------------------------------------------------------------------------


def linear(*widths: int, scale: float, dtype=torch.float32) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(8, 20, 20, 20, 5), (8, 60, 7, 5)])
@pytest.mark.parametrize("step_size", [1e2, 1e10, 1e30])
def test_divergence_names_the_iteration_and_the_layer(step_size, widths, dtype):
    model = linear(*widths, scale=40, dtype=dtype)
    x, y = torch.randn(BATCH, 8, dtype=dtype), torch.randint(0, 5, (BATCH,))
    result = {}
    for tried in ("reference", "cuda"):
        with pytest.raises(
            pcfast.RelaxationDiverged, match=r"iteration .* layer .*smaller step_size"
        ) as caught:
            pcfast.relax(model, x, y, backend=tried, step_size=step_size, num_steps=200)
        result[tried] = caught.value
    # layer 1 in Gram form is bad with its sum, not with the beliefs that it stands for
    assert abs(result["cuda"].iteration - result["reference"].iteration) <= 1
    assert abs(result["cuda"].layer - result["reference"].layer) <= 1


def test_divergence_is_reported_later_where_checks_are_deferred():
    model, x, y = linear(8, 20, 20, 5, scale=40), torch.randn(BATCH, 8), torch.randint(0, 5, (BATCH,))
    pcfast.pc_loss(model, x, y, step_size=1e4, num_steps=60, backend="cuda", check="deferred").backward()
    assert all(not p.grad.any() for p in model.parameters())
    with pytest.raises(pcfast.RelaxationDiverged, match="iteration"):
        pcfast.synchronize()


@pytest.mark.parametrize("name", ["mlp", "conv", "bare conv"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_sample(bad, name, samples):
    samples(4)
    model, x, y = drawn(name)
    arguments = dict(loss=nn.CrossEntropyLoss(reduction="sum"), num_steps=9, backend="cuda", check="off")
    clean = pcfast.relax(model, x, y, **arguments)
    x[2].view(-1)[1] = bad
    result = pcfast.relax(model, x, y, **arguments)
    others = torch.arange(BATCH) != 2
    for l in range(1, len(model) + 1):
        assert torch.equal(result.errors[l][others], clean.errors[l][others])
        assert torch.equal(result.beliefs[l][others], clean.beliefs[l][others])
    if bad != bad:
        assert all(e[2].isnan().any() for e in result.errors[1:])


@pytest.mark.parametrize("layer", range(1, 6))
def test_where_nan_comes_first(layer, monkeypatch):
    """One iteration takes it one layer up and one down."""
    model, x, y = mlp(4, 6, 7, 8, 7, 6, 5), torch.randn(BATCH, 4), torch.randint(0, 5, (BATCH,))
    vinit = [None, *(torch.zeros_like(v) for v in pcfast.relax(model, x, y).beliefs[1:])]
    vinit[layer][3, 1] = float("nan")
    one = captured(monkeypatch, model, x, y, vinit=vinit, num_steps=3, check="off")
    distances = [max(abs(l - layer), 1) for l in range(1, 6)]
    assert one.run().first_bad.tolist() == [*(t if t <= 3 else loop._NEVER for t in distances), loop._NEVER]
    assert one.run(torch.arange(BATCH) != 3).first_bad.tolist() == [loop._NEVER] * 6


def test_nan_wins_in_a_pool():
    model, x, y = drawn("conv")
    with torch.no_grad():
        model[1][0].bias[2] = float("nan")
    arguments = dict(num_steps=5, check="off", loss=nn.CrossEntropyLoss(reduction="sum"))
    result, truth = (pcfast.relax(model, x, y, backend=name, **arguments) for name in ("cuda", "eager"))
    for e, e_true in zip(result.errors[1:], truth.errors[1:], strict=True):
        assert torch.equal(e.isnan(), e_true.isnan())
    with pytest.raises(pcfast.RelaxationDiverged, match="the forward pass of layer 2 is not finite"):
        pcfast.relax(model, x, y, backend="cuda")


class Mystery(nn.Module):
    def forward(self, a):
        return a * 2


def around(*layers: nn.Module, features: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(*layers), nn.Flatten(), nn.Linear(features, 3))


REFUSED = {
    "too large": (lambda: mlp(9, 600, 600, 10), (9,), {}, "one sample and the loop's weights take .* a block has"),
    "too many layers": (lambda: mlp(4, *[4] * 16, 3), (4,), {}, "17 layers; .* has room for 16"),
    "own loss": (lambda: mlp(4, 5, 3), (4,), dict(loss=lambda o, y: o.sum()), "cross-entropy and mse"),
    "energies": (lambda: mlp(4, 5, 3), (4,), dict(energies=True), "energies .* stay on chip"),
    "too many steps": (lambda: mlp(4, 5, 3), (4,), dict(num_steps=2**32 + 3), "4,294,967,299"),
    "opaque": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), Mystery())),
        (4,),
        {},
        r"layer 2 \(Linear - Mystery\): .*Mystery",
    ),
    "grouped": (lambda: around(nn.Conv2d(4, 4, 3, groups=2)), (2, 6, 6), {}, "layer 2 .*grouped or dilated"),
    "dilated": (lambda: around(nn.Conv2d(4, 4, 2, dilation=2)), (2, 6, 6), {}, "layer 2 .*grouped or dilated"),
    "overlapping pool": (
        lambda: around(nn.MaxPool2d(2, 1), nn.Identity(), features=36), (2, 6, 6), {}, "layer 2 .*MaxPool2d overlap",
    ),
    "two pools": (
        lambda: around(nn.MaxPool2d(2), nn.AvgPool2d(2), features=4), (2, 6, 6), {}, "layer 2 .*pools twice",
    ),
    "output pools": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.Conv2d(4, 3, 3), nn.AvgPool2d(2), nn.Flatten())),
        (2, 6, 6),
        {},
        "layer 2 .*the output layer pools",
    ),
    "two activations": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Tanh()), nn.Linear(5, 3)),
        (4,),
        {},
        "layer 2 .*more than one activation",
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Tanh()), nn.Linear(5, 3)),
        (4,),
        {},
        "layer 2 .*BatchNorm1d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_run_is_refused_with_the_reason(what, launches):
    make, shape, arguments, reason = REFUSED[what]
    model = make()
    x, y = torch.randn(2, *shape), torch.tensor([0, 1])
    with pytest.raises(
        pcfast.BackendError, match=f'^backend "cuda" cannot run this: .*{reason}.*backend="auto"'
    ):
        pcfast.relax(model, x, y, backend="cuda", **arguments)
    assert not launches


def test_devices_and_dtypes(monkeypatch):
    def reason(device, dtype=torch.float32):
        ok, why = BACKENDS["cuda"].supports(planned(mlp(4, 5, 3), (2, 4), device, dtype))
        assert ok == (why == "")
        return why

    assert reason("cpu") == reason("cpu", torch.float64) == ""
    assert reason("cuda") == "the kernels were built for the CPU"
    assert reason("mps") == "it needs a CUDA device, not mps"
    monkeypatch.delenv(native.ON_HOST)
    assert reason("cpu") == "it needs a CUDA device"
    monkeypatch.setenv(native.ON_HOST, "/no/such/module.so")
    assert "there is no such file" in reason("cpu")


def test_float64_is_for_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(backend, "_unavailable", lambda device: "")
    monkeypatch.setattr(native, "on_host", lambda: False)
    request = planned(mlp(4, 5, 3), (2, 4), "cuda", torch.float64)
    with pytest.raises(pcfast.BackendError, match=r"float32, not torch\.float64: use eager"):
        choose_backend("cuda", request)


def test_auto_does_not_choose_it(launches):
    model, x, y = drawn("mlp")
    assert pcfast.relax(model, x, y).run.plan.backend == "cpu" and not launches
    assert dict(pcfast.explain(model, tuple(x.shape)).plan.refusals)["cuda"] == (
        "its kernels run on the CPU for tests alone: ask for it by name"
    )


@pytest.mark.parametrize(
    ("status", "text"),
    [(1, "invalid argument"), (9, "invalid configuration argument"), (700, "unrecognized error code"),
     (-1, "an argument that the kernel cannot use")],
)  # fmt: skip
def test_a_launch_that_fails(status, text, monkeypatch):
    monkeypatch.setattr(native.load(), "resident", lambda *arguments: status)
    model, x, y = drawn("mlp")
    with pytest.raises(
        pcfast.BackendError, match=f"could not be launched on cpu: {text}. .*restart Python.*eager"
    ):
        pcfast.pc_loss(model, x, y, backend="cuda")


def test_the_module_answers_what_it_cannot_launch(monkeypatch):
    """Shared memory, threads and samples a lane beyond the kernel's."""
    one = captured(monkeypatch, *drawn("mlp"))
    for threads in (0, 31, 48, 1024):
        with pytest.raises(pcfast.BackendError, match="an argument that the kernel cannot use"):
            one.run(threads=threads)
    for name, value, text in (("group", 5, "cannot use"), ("elements", 1 << 20, "cannot use")):
        what = program.Program.from_buffer_copy(one.placement.program)
        setattr(what, name, value)
        with pytest.raises(pcfast.BackendError, match=text):
            one.run(program=bytes(what))
    with pytest.raises(pcfast.BackendError, match="an argument that the kernel cannot use"):
        one.run(scalar_bytes=2)


def test_the_structs_are_those_of_the_kernel(monkeypatch):
    module = native.load()
    assert module.resident_sizes() == program.sizes()
    constants = module.resident_constants()
    assert geometry.differences(constants) == []
    with monkeypatch.context() as patch:
        patch.setattr(module, "resident_constants", lambda: constants.replace("kMmaN 8", "kMmaN 7"))
        with pytest.raises(
            pcfast.BackendError, match=r"kMmaN: \(7,\) in the module, \(8,\) here.*make native"
        ):
            pcfast.pc_loss(*drawn("mlp"), backend="cuda")
    monkeypatch.setattr(module, "resident_sizes", lambda: (1, 2, 3))
    model, x, y = drawn("mlp")
    with pytest.raises(
        pcfast.BackendError, match=r"built from other sources: they read \(1, 2, 3\).*make native"
    ):
        pcfast.pc_loss(model, x, y, backend="cuda")


# the house ------------------------------------------------------------------------------------------------------


def test_explain_shows_the_placement():
    model, x, y = drawn("conv")
    text = str(pcfast.explain(model, tuple(x.shape), backend="cuda"))
    result = pcfast.relax(model, x, y, backend="cuda")
    assert result.run.plan.backend == "cuda"
    assert "shared-memory-resident kernel: weights and state in one block's shared memory" in text
    assert "1 sample per block, 9 blocks of 512 threads" in text and "1 wave\n" in text
    for words in (
        "layer 2 (Conv2d - Tanh - MaxPool2d): weights ",
        "layer 4 (Linear): weights ",
        "all layers: scratch ",
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(words)]
        assert " bytes" in line


@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
def test_check_covers_it(method, launches):
    model = copy.deepcopy(drawn("conv")[0])
    report = check(model, (16, 2, 8, 8), method=method, num_steps=5, draws=3)
    assert report.ok, report.failures
    rows = {(row.backend, row.precision) for row in report.rows}
    assert {("cuda", "ieee"), ("cuda", "fp64")} <= rows
    assert len(launches) >= 6 * (method == "strict")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_within_the_projects_bounds(activation):
    model = mlp(20, 31, 17, 10, activation=IN_KERNELS[activation])
    report = check(model, (16, 20), draws=9, num_steps=5, backends=["cuda"], precisions=["ieee", "fp64"])
    assert report.ok and len(report.rows) == 2 * 4 * 3, report.failures


def test_the_command_line_checks_it(capsys):
    options = ["--method", "strict", "--num-steps", "6", "--draws", "1", "--batch-size", "4"]
    options += ["--precision", "ieee", "--precision", "fp64"]
    assert main(["check", *options, "--backend", "cuda", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert '"cuda"' in json.dumps(result)
    assert main(["check", *options]) == 0
    assert "strict on cuda" in capsys.readouterr().out


def test_the_papers_network(launches):
    """In Gram form, three samples a block of an H200."""
    torch.manual_seed(7)
    report = check(pcfast.networks.mnist_cnn(), (7, 1, 28, 28), draws=3, num_steps=20, backends=["cuda"],
                   precisions=["ieee"])  # fmt: skip
    assert report.ok, report.failures
    assert placed_by(launches).layers[1].gram


def test_two_threads_relax_at_a_time():
    given = [drawn(name) for name in ("mlp", "conv")]
    expected = [updates(*one, backend="cuda") for one in given]
    result: list[list] = [[], []]

    def work(i: int) -> None:
        result[i] += [updates(*given[i], backend="cuda") for _ in range(5)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, several in zip(expected, result, strict=True):
        assert len(several) == 5
        for again in several:
            assert_same_bits(again, one)
