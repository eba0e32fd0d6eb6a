"""pcfast.checking: faults planted in a backend are found and named, right backends pass, bounds mean something."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcfast
from pcfast import networks
from pcfast.backends import BACKENDS, Eager
from pcfast.backends.eager.links import Link
from pcfast.checking.bounds import with_forward_errors_of
from pcfast.checking.checker import check
from pcfast.checking.copies import random_batches

SHAPE = (16, 20)


CPU_IN_BFLOAT16 = "its kernels' products read the state's dtype, not torch.bfloat16: use eager"


def net() -> nn.Sequential:
    """Five PC layers: the Gram form is layer 2's, the layers above run plainly."""
    return networks.mlp([20, 30, 30, 30, 30, 7])


def plant(monkeypatch, fault) -> None:
    """Register "faulty", eager whose outcome ``fault(outcome, problem)`` changes in place."""

    class Faulty(Eager):
        name = "faulty"

        def run(self, problem, plan):
            outcome = super().run(problem, plan)
            fault(outcome, problem)
            return outcome

    monkeypatch.setitem(BACKENDS, "faulty", Faulty())


def found_in(report, backend="faulty") -> set:
    """(precision, layer, quantity) of every row of the backend that is out."""
    return {(row.precision, row.layer, row.quantity) for row in report.failures if row.backend == backend}


# right backends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
def test_a_right_backend_passes(method):
    report = check(net(), SHAPE, method=method, draws=3)
    assert report.ok and not report.failures
    assert {(r.backend, r.reason) for r in report.refused} == {
        ("cuda", "it needs a CUDA device"), ("triton", "it needs a CUDA device"), ("cpu", CPU_IN_BFLOAT16),
    }  # fmt: skip
    ran = {("eager", "ieee"), ("eager", "bf16"), ("eager", "fp64"), ("cpu", "ieee"), ("cpu", "fp64")}
    assert {(row.backend, row.precision) for row in report.rows} == ran
    quantities = [
        (row.layer, row.quantity) for row in report.rows if (row.backend, row.precision) == ("eager", "ieee")
    ]
    assert quantities[:4] == [(1, "belief"), (1, "error"), (1, "update 0.0.weight"), (1, "update 0.0.bias")]
    assert len(quantities) == 5 * 4 and quantities[-1] == (5, "update 4.bias")
    assert set(report.worst()) == ran
    assert all(row.ratio <= worst.ratio for worst in report.worst().values() for row in report.rows
               if (row.backend, row.precision) == (worst.backend, worst.precision))  # fmt: skip


@pytest.mark.parametrize(
    "build, shape",
    [(networks.digits_mlp, (64, 64)), (networks.mnist_cnn, (64, 1, 28, 28))],
    ids=["mlp", "cnn"],
)
def test_bounds_are_not_vacuous(build, shape):
    report = check(build(), shape, num_steps=10)
    assert report.ok
    for precision, largest in (("ieee", 1e-3), ("bf16", 0.5), ("fp64", 1e-3)):
        rows = [row for row in report.rows if row.precision == precision]
        # a bias of five channels loses more to torch itself than anything else
        assert max(row.bound for row in rows if not row.quantity.endswith("bias")) < largest
        assert max(row.bound for row in rows) < 2 * largest
    assert not any("say nothing" in note for note in report.notes)


def test_the_literal_loop_in_low_precision_is_out():
    """Belief form (docs/method.md fact 8): errors are far below the beliefs' rounding."""
    torch.manual_seed(0)
    model = networks.mlp([64, 256, 256, 10])
    report = check(model, (256, 64), backends=["reference", "eager"], draws=3)
    out = found_in(report, "reference")
    assert ("ieee", 2, "update 1.0.weight") in out and ("bf16", 2, "update 1.0.weight") in out
    assert not found_in(report, "eager")
    assert [(r.backend, r.precision, r.reason) for r in report.refused] == [
        ("reference", "fp64", "it is the truth itself")
    ]


# planted faults ------------------------------------------------------------------------------------------------


def test_a_scaled_update_is_named(monkeypatch):
    def scale(outcome, problem):
        for name, parameter in problem.model.named_parameters():
            if name == "1.0.weight" and parameter in outcome.gradients:
                outcome.gradients[parameter] = outcome.gradients[parameter] * (1 + 1e-3)

    plant(monkeypatch, scale)
    report = check(net(), SHAPE, draws=3)
    assert not report.ok
    # in bfloat16 a thousandth is lost in rounding
    assert found_in(report) == {("ieee", 2, "update 1.0.weight"), ("fp64", 2, "update 1.0.weight")}
    assert not found_in(report, "eager")
    worst = report.worst()["faulty", "ieee"]
    assert (worst.layer, worst.quantity) == (2, "update 1.0.weight")
    assert worst.error == pytest.approx(1e-3, rel=1e-2) and worst.bound < 1e-5


def test_masks_of_the_last_iteration_are_found(monkeypatch):
    """The updates need the masks at the last beliefs; those of the iteration before are wrong for relu."""

    class Stale(Eager):
        name = "faulty"

        def run(self, problem, plan):
            with mock.patch.object(Link, "linearize_at_final", lambda self: None):
                return super().run(problem, plan)

    monkeypatch.setitem(BACKENDS, "faulty", Stale())
    out = found_in(check(net(), SHAPE, draws=3, step_size=0.3, precisions=["ieee", "fp64"]))
    assert {quantity.split()[0] for _, _, quantity in out} == {"update"}  # beliefs and errors are right
    assert {layer for _, layer, _ in out} == {3, 4}  # above the Gram form, with a relu
    assert {precision for precision, _, _ in out} == {"ieee", "fp64"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_draw_is_out(monkeypatch, bad):
    """A median would hide it."""
    batches = random_batches(net(), SHAPE, draws=3)

    def spoil(outcome, problem):
        if outcome.errors and torch.equal(problem.x.float(), batches[1][0]):
            outcome.errors[2][0, 0] = bad

    plant(monkeypatch, spoil)
    report = check(net(), batches)
    assert found_in(report) == {(p, 2, "error") for p in ("ieee", "bf16", "fp64")}
    worst = report.worst()["faulty", "ieee"]
    assert not math.isfinite(worst.error) and worst.ratio == math.inf


def test_another_backend_that_ran_is_found(monkeypatch):
    class Other(Eager):
        name = "other"

        def run(self, problem, plan):
            outcome = super().run(problem, plan)
            outcome.fell_back = "eager", "its kernels do not compile"
            return outcome

    monkeypatch.setitem(BACKENDS, "other", Other())
    report = check(net(), SHAPE, draws=1, precisions=["ieee"])
    (row,) = (row for row in report.rows if row.backend == "other")
    assert not row.ok and row.message == "asked for other, but eager ran"


def test_a_candidate_that_diverges_or_crashes_is_a_failing_row(monkeypatch):
    def diverge(outcome, problem):
        if problem.x.dtype == torch.float64:
            raise pcfast.RelaxationDiverged(3, 2, problem.step_size)
        raise RuntimeError("a kernel broke")

    plant(monkeypatch, diverge)
    report = check(net(), SHAPE, draws=2, precisions=["ieee", "fp64"])
    rows = {row.precision: row for row in report.rows if row.backend == "faulty"}
    assert len(rows) == 2 and not any(row.ok for row in rows.values())
    assert rows["fp64"].layer == 2 and "diverged in iteration 3 at layer 2" in rows["fp64"].message
    assert rows["ieee"].message == "RuntimeError: a kernel broke"
    assert {row.backend for row in report.failures} == {"faulty"}


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_an_update_that_is_missing_or_misshapen_is_found(monkeypatch, change):
    def spoil(outcome, problem):
        parameters = dict(problem.model.named_parameters())
        if not outcome.gradients:
            return
        if change == "missing":
            del outcome.gradients[parameters["0.0.bias"]]
        elif change == "shape":
            outcome.gradients[parameters["0.0.bias"]] = torch.zeros(1)
        else:
            outcome.gradients[parameters["4.bias"]] = torch.ones(7)

    plant(monkeypatch, spoil)
    model = net()
    if change == "extra":
        model[4].bias.requires_grad_(False)
    row = check(model, SHAPE, draws=1, precisions=["ieee"]).worst()["faulty", "ieee"]
    layer, name, message = {
        "missing": (1, "update 0.0.bias", "nothing instead of shape (30,)"),
        "shape": (1, "update 0.0.bias", "shape (1,) instead of shape (30,)"),
        "extra": (5, "update 4.bias", "the reference has no such update"),
    }[change]
    assert (row.layer, row.quantity, row.message) == (layer, name, message)


# what cannot run -----------------------------------------------------------------------------------------------


class Unable(Eager):
    name = "unable"

    def supports(self, request):
        return (True, "") if request.dtype == torch.float64 else (False, "float64 only")

    def run(self, problem, plan):
        raise pcfast.BackendError("no such kernel")


def test_what_cannot_run_is_listed(monkeypatch):
    monkeypatch.setitem(BACKENDS, "unable", Unable())
    report = check(net(), SHAPE, draws=1)
    assert report.ok and {row.backend for row in report.rows} == {"cpu", "eager"}
    assert {(r.backend, r.precision, r.reason) for r in report.refused} == {
        *(
            (name, precision, "it needs a CUDA device")
            for name in ("cuda", "triton")
            for precision in ("ieee", "bf16", "fp64")
        ),
        ("cpu", "bf16", CPU_IN_BFLOAT16),
        ("unable", "ieee", "float64 only"),
        ("unable", "bf16", "float64 only"),
        ("unable", "fp64", "no such kernel"),
    }
    with pytest.raises(pcfast.BackendError, match="unable in ieee: float64 only"):
        check(net(), SHAPE, draws=1, backends=["unable"], precisions=["ieee"])
    with pytest.raises(pcfast.BackendError, match="no such kernel"):
        check(net(), SHAPE, draws=1, backends=["unable"])
    with pytest.raises(pcfast.BackendError, match="the truth itself"):
        check(net(), SHAPE, draws=1, backends=["reference"], precisions=["fp64"])


def test_divergence_of_the_truth_is_raised():
    with pytest.raises(pcfast.RelaxationDiverged):
        check(net(), SHAPE, draws=1, step_size=100.0, num_steps=300)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(backends=["fast"]), "backends: got 'fast'"),
        (dict(precisions=["fp8"]), "precision: got 'fp8'"),
        (dict(precisions=["tf32"], device="cpu"), "tf32 on cpu"),
        (dict(precisions=[]), "precisions: got none"),
        (dict(method="loose"), "method: got 'loose'"),
        (dict(num_steps=-1), "num_steps: got -1"),
        (dict(draws=0), "draws: got 0"),
        (dict(device="cuda:99"), "device"),
        (dict(loss=lambda output, y: output.sum()), "Pass batches"),
        (dict(data=(16, 21)), "x: got shape"),
        (dict(data=(16,)), "x: got shape"),
        (dict(data=[]), "data: got no batches"),
        (dict(data=[torch.zeros(2, 20)]), "pairs"),
        (dict(model=nn.Linear(2, 2)), "nn.Sequential"),
        (dict(model=nn.Sequential(nn.Linear(20, 3).requires_grad_(False))), "requires grad"),
        (dict(model=nn.Sequential(nn.Linear(20, 3, dtype=torch.complex64))), "real parameters"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments, words):
    arguments = {"model": net(), "data": SHAPE, **arguments}
    with pytest.raises(pcfast.ArgumentError) as caught:
        check(arguments.pop("model"), arguments.pop("data"), **arguments)
    assert words in str(caught.value)


def test_a_module_that_fails_in_float64_is_reported_in_words():
    class Single(nn.Module):
        def forward(self, v):
            return v @ torch.eye(30)

    with pytest.raises(pcfast.ModelError, match="fails in float64 on x of shape"):
        check(nn.Sequential(nn.Linear(20, 30), Single(), nn.Linear(30, 7)), SHAPE, draws=1)


# zero in truth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", [0.0, 0.1])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("method", ["fixed_prediction", "strict"])
def test_layers_that_nothing_has_reached(method, num_steps, step_size):
    report = check(net(), SHAPE, method=method, num_steps=num_steps, step_size=step_size, draws=2)
    assert report.ok
    reached = 5 if step_size == 0 else 5 - max(num_steps - 1, 0)
    absolute = {(row.layer, row.quantity.split()[0]) for row in report.rows if row.relative_to == "nothing"}
    assert absolute == {(l, what) for l in range(1, reached) for what in ("error", "update")}
    for row in report.rows:
        if row.relative_to == "nothing":
            assert row.error == 0 and row.bound < 1e-10


def test_anything_in_a_layer_that_nothing_has_reached_is_out(monkeypatch):
    def leak(outcome, problem):
        if outcome.errors:
            outcome.errors[1] = outcome.errors[1] + 1e-9

    plant(monkeypatch, leak)
    out = found_in(check(net(), SHAPE, num_steps=2, draws=2))
    assert out == {(p, 1, "error") for p in ("ieee", "bf16", "fp64")}


def test_errors_below_the_truths_own_rounding():
    """1e-15 of the beliefs: the literal loop has no digit of them, deviation form all; neither is at fault."""
    report = check(networks.mlp([20, *[16] * 8, 7], nn.Tanh), SHAPE, num_steps=9, step_size=0.01, draws=2)
    assert report.ok
    assert {row.layer for row in report.rows if row.relative_to == "nothing"} >= {1}


# networks of all kinds -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Opaque: a residual block with a parameter that is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.unused = nn.Linear(width, width), nn.Parameter(torch.ones(3))

    def forward(self, v):
        return v + torch.tanh(self.inner(v))


def test_dropout_batch_norm_and_opaque_modules():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 9, 12)),
        Block(12),
        nn.Linear(12, 5),
    )
    report = check(model, (16, 3, 8, 8), method="exact", draws=3)
    assert report.ok
    assert any("1 dropout module ran in eval mode" in note for note in report.notes)
    # a bias below a BatchNorm has no gradient but rounding; it is held to the layer's update
    kinds = {row.quantity: row.relative_to for row in report.rows if row.layer == 1}
    assert kinds["update 0.0.bias"] == "layer" and kinds["update 0.0.weight"] == "truth"
    assert not any("unused" in row.quantity for row in report.rows)
    assert any(row.quantity == "update 2.inner.weight" for row in report.rows)
    # strict relaxation subtracts the outputs of the opaque block
    report = check(model, (16, 3, 8, 8), draws=3, precisions=["ieee", "fp64"])
    assert not any(row.precision == "fp64" for row in report.failures)
    assert report.ok or any("does not know Block" in note for note in report.notes)


def test_shared_frozen_and_parametrized():
    torch.manual_seed(0)
    shared = nn.Linear(20, 20)
    model = nn.Sequential(
        nn.Sequential(shared, nn.Tanh()),
        nn.Sequential(shared, nn.Tanh()),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(20, 20)), nn.Tanh()),
        nn.Linear(20, 7),
    )
    model[3].weight.requires_grad_(False)
    report = check(model, SHAPE, method="exact", draws=2)
    assert report.ok
    names = [row.quantity for row in report.rows if row.precision == "ieee" and "update" in row.quantity]
    assert "update 0.0.weight" in names and "update 3.bias" in names and "update 3.weight" not in names


def test_a_network_that_draws_says_so():
    class Noise(nn.Module):
        def forward(self, v):
            return v + torch.randn(()).to(v)

    model = nn.Sequential(nn.Sequential(nn.Linear(20, 9), Noise(), nn.Tanh()), nn.Linear(9, 7))
    report = check(model, SHAPE, method="exact", draws=1)
    assert report.ok  # one number in the default dtype: the same for every precision
    assert any("draws random numbers" in note for note in report.notes)


def test_a_relaxation_that_runs_away_is_noted():
    model = networks.mlp([20, 30, 30, 7])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    report = check(model, SHAPE, draws=1, num_steps=15, precisions=["fp64"], step_size=0.3)
    assert any("runs away" in note for note in report.notes)


def test_nothing_of_the_callers_changes():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Dropout()), nn.Linear(30, 7)
    )
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    check(model, SHAPE, draws=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert not torch.is_autocast_enabled("cpu")


def test_no_bound_is_no_pass():
    """A forward pass that overflows in float32 says nothing about what a backend may lose."""
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 7))
    x = torch.rand(4, 20)
    x[0, 0] = 3e38
    with torch.no_grad():
        model[0].weight[0, 0] = 100.0
    y = torch.tensor([0, 1, 2, 3])
    report = check(model, [(x, y)], method="exact")
    assert not any(row.ok for row in report.rows if row.precision == "ieee" and row.layer == 1)
    assert all(row.ok for row in report.rows if row.precision == "fp64")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype):
    report = check(networks.mlp([20, 16, 7]).to(dtype), SHAPE, draws=2, num_steps=5)
    assert report.ok
    assert any("rounded to float32" in note for note in report.notes) == (dtype == torch.float64)


@pytest.mark.parametrize(
    "loss",
    [
        "mse",
        nn.MSELoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 7), label_smoothing=0.1),
    ],
    ids=["mse", "mse sum", "weighted"],
)
def test_losses(loss):
    report = check(networks.mlp([20, 16, 7]), SHAPE, loss=loss, draws=2, num_steps=5)
    assert report.ok


def test_own_batches_and_loss():
    batches = [(torch.randn(5, 20), torch.rand(5, 7)) for _ in range(2)]
    report = check(
        networks.mlp([20, 16, 7]), batches, loss=lambda output, y: F.l1_loss(output, y), num_steps=5
    )
    assert report.ok and report.draws == 2 and report.x_shape == (5, 20)


def test_the_result_is_a_function_of_the_seed():
    model = networks.mlp([20, 16, 7])
    first, again, other = (check(model, SHAPE, draws=1, num_steps=5, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.rows != other.rows


def test_random_batches():
    (x, y), (other, _) = random_batches(net(), (4, 20), draws=2, seed=3)
    assert x.shape == (4, 20) and x.dtype == torch.float32 and float(x.min()) >= 0 and float(x.max()) < 1
    assert y.shape == (4,) and y.dtype == torch.int64 and int(y.max()) < 7
    assert not torch.equal(x, other)
    # the width of an opaque network's output takes a run
    (_, y), *_ = random_batches(nn.Sequential(nn.Linear(20, 3), nn.ELU()), (4, 20), loss="mse")
    assert y.shape == (4, 3)


def test_progress_counts_relaxations():
    seen = []
    check(
        net(),
        SHAPE,
        draws=2,
        num_steps=2,
        precisions=["ieee", "fp64"],
        progress=lambda *step: seen.append(step),
    )
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert seen[-1] == (
        12,
        12,
        "done",
    )  # per draw the truth, what ieee costs, and two runs of cpu and of eager
    assert seen[0][2] == "reference in float64, draw 1 of 2" and "cpu in ieee, draw 1 of 2" in seen[2][2]


# the rounding of a forward pass --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_with_forward_errors_rounds_as_torch_does(dtype):
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 12), nn.GELU()),
        Block(12),
        nn.Linear(12, 5),
    )
    model.requires_grad_(False)
    x = torch.rand(6, 3, 8, 8)
    statistics = model[0][1].running_mean.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        noisy = with_forward_errors_of(model, x)
        rounded = copy.deepcopy(model)(x).double()
    assert torch.equal(model[0][1].running_mean, statistics)
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(noisy(x.double()), rounded, rtol=1e-15, atol=1e-15)
    exact = copy.deepcopy(model).double()(x.double())
    assert 1e-9 < float((rounded - exact).norm() / exact.norm()) < 0.05


def test_a_module_that_runs_twice_gets_no_offset():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.rand(3, 4)
    noisy = with_forward_errors_of(model, x)
    assert not noisy[0]._forward_hooks and len(noisy[1]._forward_hooks) == 1
