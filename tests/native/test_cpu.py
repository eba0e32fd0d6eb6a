"""Backend "cpu": its native call against float64, its threads, what it refuses and what it says of bad values."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import against_reference
import golden
import kernel_networks
import pytest
import torch
from accuracy import allowed_error, assert_gradients_agree, assert_states_agree
from against_reference import MOVING, updates
from drawing import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_networks import ON_CPUS, RESIDENT, clamped, mlp
from networks_for_tests import IN_KERNELS, LOSSES, architectures, loss_and_target, residual_networks
from plans import planned, wherever_possible
from torch import nn

import pcfast
from pcfast.backends import BACKENDS
from pcfast.backends.cpu import relaxation, speed
from pcfast.backends.cpu.relaxation import Call
from pcfast.checking.bounds import relative_error
from pcfast.checking.checker import check
from pcfast.losses import describe_loss
from pcfast.model.grouping import flattened
from pcfast.problem import plan as planning
from pcfast.support import cpu_module as native

pytestmark = pytest.mark.skipif(os.environ.get("PCFAST_NATIVE") == "0", reason="PCFAST_NATIVE=0")
BATCH, NETWORKS = kernel_networks.BATCH, RESIDENT | ON_CPUS
assert_close_to_float64 = functools.partial(against_reference.assert_close_to_float64, backend="cpu")
drawn = functools.partial(kernel_networks.drawn, NETWORKS)
networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[Call]:
    """The native calls of a test."""
    assert native.load_error() == "", "compile it: make native"
    seen, run = [], Call.outcome

    def counted(self):
        seen.append(self)
        return run(self)

    monkeypatch.setattr(Call, "outcome", counted)
    return seen


@pytest.fixture
def instruction_set():
    """Switches to the kernels of one of the instruction sets that this CPU has."""
    module = native.load()
    before = module.used()
    yield module.use
    module.use(before)


@pytest.fixture
def form(request, monkeypatch) -> str:
    """In what layers of any width run one backward pass."""

    def forget():
        speed.natively.cache_clear()
        relaxation._fixed.cache_clear()

    forget()
    if request.param == speed.ROWS:
        monkeypatch.setattr(speed, "_MAX_WEIGHT_BYTES_ONCE", 0)
    yield request.param
    forget()


forms = pytest.mark.parametrize("form", [speed.LANE_GROUPS, speed.ROWS], indirect=True)
instruction_sets = pytest.mark.parametrize(
    "isa", [] if native.load_error() else native.load().instruction_sets()
)


@pytest.fixture(autouse=True)
def _no_plans_left():
    yield
    planning.plan.cache_clear()


# the same numbers -----------------------------------------------------------------------------------------------


@instruction_sets
@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_matches_torch2pc(path, isa, instruction_set, calls):
    instruction_set(isa)
    golden.assert_matches(path, "cpu")
    meta, model, _ = golden.load(path)
    assert len(calls) == (meta["method"] == "Strict" and len(model) > 1)


@pytest.mark.parametrize(
    ("num_steps", "step_size", "batch"),
    [(0, 0.1, 1), (1, 0.1, 9), (3, 0.1, 33), (7, 0.1, 16), (20, 0.5, 50), (4, 0.0, 9), (4, 1.0, 9)],
)
@networks
def test_against_the_reference(name, num_steps, step_size, batch, calls):
    assert_close_to_float64(*drawn(name, batch), num_steps=num_steps, step_size=step_size)
    assert len(calls) == 2


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize(
    "name", ["mlp", "nothing but a copy", "conv", "pools before activations", "residual with factors"]
)
def test_momentum_and_schedules(name, moving, gram, monkeypatch):
    wherever_possible(monkeypatch, gram)
    for num_steps in (2, 7):
        assert_close_to_float64(*drawn(name), num_steps=num_steps, **MOVING[moving](num_steps))


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("num_steps", [2, 3, 4, 9])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_both_forms_of_the_clamped_layer(name, num_steps, gram, monkeypatch):
    wherever_possible(monkeypatch, gram)
    model, x, y = clamped(name)
    assert pcfast.relax(model, x, y, num_steps=num_steps, backend="cpu").run.plan.gram == (
        gram and num_steps > 2
    )
    assert_close_to_float64(model, x, y, num_steps=num_steps)


@pytest.mark.parametrize("loss_name", [name for name in LOSSES if name != "custom"])
@pytest.mark.parametrize(
    ("method", "form"),
    [("strict", speed.LANE_GROUPS), ("exact", speed.LANE_GROUPS), ("exact", speed.ROWS)],
    indirect=["form"],
)
def test_losses(loss_name, method, form, calls):
    torch.manual_seed(3)
    model, x = mlp(8, 12, 9, 10), torch.randn(BATCH, 8)
    loss, y = loss_and_target(loss_name, BATCH, 10)
    loss, y = loss.float() if isinstance(loss, nn.Module) else loss, y.float() if y.is_floating_point() else y
    if method == "strict":
        assert_close_to_float64(model, x, y, loss=loss, num_steps=4)
    result, truth = (
        [pcfast.pc_loss(model, x, y, loss=loss, method=method, backend=name).detach(), *updates(
            model, x, y, loss=loss, method=method, backend=name)]
        for name in ("cpu", "eager")
    )  # fmt: skip
    assert len(calls) == (4 if method == "strict" else 2)
    assert max(map(relative_error, result, truth)) < 2e-6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_labels(reduction, smoothing, weighted):
    model, x, y = drawn("mlp", 40)
    y[::3] = -7
    weight = torch.linspace(0.2, 3, 10) if weighted else None
    loss = nn.CrossEntropyLoss(weight, ignore_index=-7, reduction=reduction, label_smoothing=smoothing)
    assert_close_to_float64(model, x, y, loss=loss, num_steps=4)
    result, truth = (pcfast.relax(model, x, y, loss=loss, backend=name) for name in ("cpu", "eager"))
    assert relative_error(result.loss, truth.loss) < 1e-6
    assert pcfast.relax(model, x, torch.full_like(y, -7), loss=loss, backend="cpu").loss == 0


@instruction_sets
@pytest.mark.parametrize("normalizer", [BATCH, 10**4 * BATCH])
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_activations(activation, normalizer, isa, instruction_set):
    """Also with errors far below the beliefs' rounding, of which nothing may cancel (docs/method.md fact 8).

    With SSE2 a product and a sum are two roundings, with the others the compiler makes one of them.
    """
    instruction_set(isa)
    torch.manual_seed(5)
    model, x = mlp(8, 15, 14, 9, 6, activation=IN_KERNELS[activation]), 2 * torch.randn(BATCH, 8)
    y = torch.randn(BATCH, 6)
    assert_close_to_float64(model, x, y, loss=nn.MSELoss(), num_steps=6, normalizer=normalizer)


@instruction_sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_differences_keep_their_digits_at_any_distance(activation, dtype, isa, instruction_set):
    """One layer, whose deviation s comes from beliefs to start from: far below rounding to far beyond it."""
    instruction_set(isa)
    u = torch.linspace(-6, 6, 61, dtype=torch.float64).repeat_interleave(40)
    s = torch.cat(
        [10.0 ** torch.arange(-18, 2, dtype=torch.float64), -(10.0 ** torch.arange(-18, 2))]
    ).repeat(61)
    act = IN_KERNELS[activation]()
    model = nn.Sequential(nn.Linear(1, 1), act, nn.Linear(1, 1)).to(dtype)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1)
            layer.bias.fill_(0)
    x = u.to(dtype)[:, None]
    start = [None, x + s.to(dtype)[:, None], None, None]
    s = (start[1] - x).double()  # as rounding leaves it
    result = pcfast.relax(model, x, torch.zeros_like(x), loss="mse", num_steps=0, vinit=start, backend="cpu")
    wide = IN_KERNELS[activation]()
    at = x.double()
    truth = (wide(at + s) - wide(at)).detach()
    eps = torch.finfo(dtype).eps
    error = (result.errors[2].double() - truth).abs()
    # a few units of the difference, and of what rounding of the point itself makes of the derivative there
    bound = 32 * eps * (truth.abs() + s.abs() * (1 + at.abs())) + 16 * 2.0**-52 * (1 + at.abs() + s.abs())
    assert (error <= bound).all(), (at[error > bound], s[error > bound], error[error > bound])


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
def test_constant_images(activation, pool):
    """Every window of the pool is a tie: the first element wins, in both orders of pool and activation."""
    act = IN_KERNELS[activation]
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), act()),
        nn.Sequential(nn.Conv2d(3, 4, 1), act(), pool(2)),
        nn.Sequential(nn.Conv2d(4, 4, 2), pool(2), act()),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh()),
        nn.Linear(5, 3),
    )
    x, y = (
        torch.ones(3, 1, 8, 8) * torch.tensor([0.0, 1.0, -0.7])[:, None, None, None],
        torch.tensor([0, 1, 2]),
    )
    for num_steps in (0, 1, 3, 5):
        assert_close_to_float64(model, x, y, num_steps=num_steps)


@pytest.mark.parametrize("name", ["mlp", "conv", "bare", "nothing but a copy", *ON_CPUS])
def test_beliefs_to_start_from(name):
    model, x, y = drawn(name, 20)
    shapes = [v.shape for v in pcfast.relax(model, x, y, backend="eager").beliefs]
    vinit = [None, *(torch.randn(shape) if l % 3 else None for l, shape in enumerate(shapes[1:], start=1))]
    for num_steps in (0, 1, 2, 5):
        assert_close_to_float64(model, x, y, vinit=vinit, num_steps=num_steps)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_inputs_in_any_layout(name):
    """Strided, shifted off every boundary, and lazily negated."""

    def moved(tensor):
        held = torch.full((tensor.numel() * 2 + 1,), float("nan"))[1:].view(*tensor.shape, 2)[..., 0]
        return held.copy_(tensor)

    model, x, y = drawn(name)
    for parameter in model.parameters():
        parameter.data = moved(parameter.data)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    assert_close_to_float64(model, moved(x), y, num_steps=4)
    assert_close_to_float64(model, negated, y, num_steps=4)


@instruction_sets
@examples(60)
@given(
    architecture=st.one_of(architectures(IN_KERNELS), residual_networks()),
    activations_first=st.booleans(),
    loss_name=st.sampled_from(LOSSES),
    num_steps=st.one_of(st.integers(0, 8), st.integers(9, 40)),
    step_size=st.sampled_from(
        (0.0, 0.05, 0.1, 0.3, 0.5, 0.9)
    ),  # 1 puts beliefs right onto the kinks of bare relus
    batch=st.sampled_from((1, 2, 5, 17)),
    starts=st.booleans(),
    gram=st.sampled_from((True, True, False)),
    seed=st.integers(0, 10**6),
)
def test_any_network_agrees_or_is_refused(
    isa,
    architecture,
    activations_first,
    loss_name,
    num_steps,
    step_size,
    batch,
    starts,
    gram,
    seed,
    instruction_set,
    calls,
    monkeypatch,
):
    instruction_set(isa)
    wherever_possible(monkeypatch, gram)
    model, shape = architecture
    model.eval()  # of BatchNorm
    if activations_first:
        model = pcfast.group_layers(flattened(model), beliefs="before_activation")
    torch.manual_seed(seed)
    for parameter in model.parameters():  # the strategy's draws do not seed torch
        nn.init.normal_(parameter, std=0.9 / parameter[0].numel() ** 0.5)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    loss, y = loss_and_target(loss_name, batch, model(x).shape[1])
    arguments = dict(loss=loss, step_size=step_size, num_steps=num_steps)
    if starts:
        vhat = pcfast.relax(model, x, y, method="exact", backend="eager").activations
        arguments["vinit"] = [None, *(v + 0.3 * torch.randn_like(v) for v in vhat[1:])]
    kind = describe_loss(loss).kind
    plan = planned(model, x.shape, dtype=x.dtype, num_steps=num_steps, fresh=not starts, loss=kind)
    ok, reason = BACKENDS["cpu"].supports(plan)
    calls.clear()
    if not ok:
        with pytest.raises(pcfast.BackendError) as raised:
            pcfast.relax(model, x, y, backend="cpu", **arguments)
        assert reason and reason in str(raised.value) and not calls
        return
    try:
        truth = pcfast.relax(model, x, y, backend="reference", **arguments)
    except pcfast.RelaxationDiverged:
        assume(False)  # what happens then has tests of its own
    # a relaxation that runs away amplifies rounding without bound
    assume(all(e is None or float(e.norm()) < 1e3 for e in truth.errors))
    shaken = pcfast.relax(model, x * (1 + 2**-51), y, backend="reference", **arguments)
    moved = [float((v - w).norm()) for v, w in zip(truth.beliefs, shaken.beliefs, strict=True)]
    steady = zip(moved[1:], truth.errors[1:], truth.beliefs[1:], strict=True)
    assume(all(by < allowed_error(e, v, num_steps) / 4 for by, e, v in steady))
    result = pcfast.relax(model, x, y, backend="cpu", **arguments)
    assert result.run.plan.backend == "cpu" and len(calls) == (len(model) > 1)
    assert_states_agree(result, truth, num_steps)
    assert relative_error(result.loss, truth.loss) < 1e-12
    for v, v_true in zip(result.activations, truth.activations, strict=True):
        assert float((v - v_true).norm()) <= allowed_error(v_true, v_true, 1)
    by_backend = [
        dict(zip(model.parameters(), updates(model, x, y, backend=name, **arguments), strict=True))
        for name in ("cpu", "reference")
    ]
    assert_gradients_agree(*by_backend, model, truth, num_steps)


@forms
@pytest.mark.parametrize("batch", [1, 16, 40])
@pytest.mark.parametrize("method", ["exact", "zero_divergence", "fixed_prediction"])
@pytest.mark.parametrize("name", ["mlp", "bare", "activated output", "one unit"])
def test_methods_without_a_loop(method, name, batch, form, calls):
    model, x, y = drawn(name, batch)
    moving = MOVING["both"](7) if method == "fixed_prediction" else {}
    result = updates(model, x, y, method=method, num_steps=7, backend="cpu", **moving)
    in_rows = form == speed.ROWS
    assert pcfast.last_run().plan.backend == "cpu"
    assert len(calls) == (not in_rows or name != "bare")  # a layer without a product is no matter of rows
    truth = updates(
        *against_reference.in_double(model, x, y), method=method, num_steps=7, backend="reference", **moving
    )
    for p, q in zip(result, truth, strict=True):
        assert relative_error(p, q) < 3e-6


def test_one_layer_has_no_loop(calls):
    model, x, y = nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    assert_close_to_float64(model, x, y)
    assert [call.relaxes for call in calls] == [False]


@instruction_sets
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_one_backward_pass_in_rows(activation, dtype, isa, instruction_set, monkeypatch):
    """Products by torch's BLAS, in widths that fill no vector."""
    instruction_set(isa)
    monkeypatch.setattr(speed, "_MAX_WEIGHT_BYTES_ONCE", 0)
    torch.manual_seed(5)
    model, x = (
        mlp(8, 15, 14, 9, 6, activation=IN_KERNELS[activation]).to(dtype),
        2 * torch.randn(37, 8).to(dtype),
    )
    y = torch.randint(0, 6, (37,))
    result = updates(model, x, y, method="exact", backend="cpu")
    assert speed.natively(pcfast.last_run().plan) == speed.ROWS
    truth = updates(*against_reference.in_double(model, x, y), method="exact", backend="reference")
    for p, q in zip(result, truth, strict=True):
        assert relative_error(p, q) < 40 * torch.finfo(dtype).eps


@forms
def test_parameters_that_are_shared_frozen_or_not_there(form):
    torch.manual_seed(2)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False),
        nn.Sequential(shared, nn.Tanh()),
        nn.Sequential(shared, nn.Tanh()),
        nn.Linear(6, 3),
    )
    for frozen in (model[0], model[3]):
        frozen.weight.requires_grad_(False)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    for method in ("strict", "exact"):
        grads = []
        for name in ("cpu", "eager"):
            model.zero_grad(set_to_none=True)
            pcfast.pc_loss(model, x, y, method=method, backend=name).backward()
            grads.append([p.grad for p in model.parameters()])
        for result, truth in zip(*grads, strict=True):
            assert (result is None) == (truth is None)
            assert result is None or relative_error(result, truth) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_within_the_projects_bounds(name):
    model, x, _ = drawn(name)
    report = check(model, tuple(x.shape), num_steps=5, draws=3, backends=["cpu"], precisions=["ieee", "fp64"])
    assert report.ok, report.failures


def test_errors_that_fade_below_the_normal_range():
    """They count as zero; nothing else changes, and the thread's mode comes back."""
    torch.manual_seed(0)
    model = mlp(8, *[16] * 40, 4)
    x, y = torch.randn(20, 8), torch.randint(0, 4, (20,))
    result, truth = (updates(model, x, y, num_steps=50, backend=name) for name in ("cpu", "eager"))
    smallest = torch.finfo(torch.float32).tiny
    assert float(truth[0].abs().max()) < smallest
    for p, q in zip(result, truth, strict=True):
        assert float((p - q).norm()) <= 1e-5 * float(q.norm()) + 100 * smallest
    assert float(torch.tensor([smallest]) / 4) > 0


# threads --------------------------------------------------------------------------------------------------------


@instruction_sets
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("name", [*IN_KERNELS, "conv", "classes beyond a warp"])
def test_a_samples_bits_depend_on_nothing_but_itself(name, gram, isa, instruction_set, monkeypatch):
    """Not on its batch, its place in it, or the number of threads; nor do the sums of the updates on the threads.

    The planner chooses the clamped layer's form by the size of the batch; here it is fixed.
    """
    instruction_set(isa)
    wherever_possible(monkeypatch, gram)
    if name in IN_KERNELS:
        torch.manual_seed(1)
        model = mlp(9, 23, 14, 5, activation=IN_KERNELS[name])
        x, y = torch.randn(77, 9), torch.randint(0, 5, (77,))
    else:
        model, x, y = drawn(name, 77)
    settings = dict(loss=nn.CrossEntropyLoss(reduction="sum"), num_steps=6, backend="cpu")
    whole = pcfast.relax(model, x, y, **settings)
    for first, last in ((0, 77), (3, 4), (30, 41), (32, 64), (60, 77)):
        part = pcfast.relax(model, x[first:last], y[first:last], **settings)
        for result, truth in zip(
            [*part.beliefs, *part.errors[1:]], [*whole.beliefs, *whole.errors[1:]], strict=True
        ):
            assert torch.equal(result, truth[first:last])
    grads = updates(model, x, y, **settings)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, updates(model, x, y, **settings), grads))
            assert torch.equal(pcfast.relax(model, x, y, **settings).beliefs[1], whole.beliefs[1])
    finally:
        torch.set_num_threads(threads)


def test_python_threads_relax_at_the_same_time():
    """The memory of a call is its own; the last call's is kept for one of the next."""
    problems = [drawn(name, 30) for name in ("mlp", "conv", "long sums", "bare")]

    def relaxed(k: int) -> torch.Tensor:
        return pcfast.relax(*problems[k % 4], num_steps=3, backend="cpu").beliefs[1]

    truth = [relaxed(k) for k in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(relaxed, range(80)))
    assert all(torch.equal(result, truth[k % 4]) for k, result in enumerate(results))


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_openmp_runtime_and_a_fork():
    """The threads are torch's; after a fork, in which no thread survives, one thread computes."""
    code = """
import os, torch, pcfast
from pcfast.networks import mlp
from pcfast.support import cpu_module as native
model, x, y = mlp([64, 200, 200, 10]), torch.randn(256, 64), torch.randint(0, 10, (256,))
def relaxed(): return pcfast.relax(model, x, y, num_steps=5, backend="cpu").beliefs[1]
truth = relaxed()
mapped = (line[73:].strip() for line in open("/proc/self/maps"))
runtimes = {path for path in mapped if any(name in path for name in ("gomp", "libomp", "iomp"))}
assert len(runtimes) == 1 and native.openmp_runtime() in runtimes, runtimes
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(relaxed(), truth) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("same")
"""
    assert run_python(code, OMP_NUM_THREADS="2").strip() == "same"


# what is said of a plan ------------------------------------------------------------------------------------------


def test_explain_says_what_lies_where(instruction_set):
    instruction_set(native.load().instruction_sets()[0])
    model = mlp(12, 60, 7, 5, 4)
    lines = pcfast.explain(model, (33, 12)).kernels
    assert f"instruction set {native.load().used()}, " in lines[1]
    # layers 2 to 4 of the Gram form, 8 samples of 4 bytes: uhat, tanh(uhat) and d, of the output uhat and d
    assert (
        "5 lane groups of up to 8 samples" in lines[2]
        and f" {8 * 4 * (3 * 7 + 3 * 5 + 2 * 4):,} bytes of state" in lines[2]
    )
    assert lines[3].startswith(f"{4 * (60 * 7 + 7 * 5 + 5 * 4):,} bytes of weights")
    wide = pcfast.explain(mlp(784, 600, 600, 10), (300, 784), method="exact")
    assert wide.plan.backend == "cpu" and "torch's BLAS" in wide.kernels[0]
    convolutions = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Sequential(nn.Flatten(), nn.Linear(128, 2)))
    assert "through torch" in pcfast.explain(convolutions, (9, 64, 3, 3), method="exact").kernels[0]


# what is refused, and what is said of bad values -----------------------------------------------------------------


def refusal(model, shape, **asked) -> str:
    ok, reason = BACKENDS["cpu"].supports(planned(model, shape, **asked))
    assert not ok
    return reason


def test_refusals():
    plain = mlp(4, 5, 3)
    assert "hardtanh" in refusal(mlp(4, 5, 3, activation=nn.Hardtanh), (2, 4)).lower()
    assert "BatchNorm1d" in refusal(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), (2, 4)
    )
    grouped = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 2))
    assert "grouped" in refusal(grouped, (2, 2, 4, 4))
    assert "callable" not in refusal(plain, (2, 4), loss="callable") and "cross-entropy" in refusal(
        plain, (2, 4), loss="callable"
    )
    assert "torch.bfloat16" in refusal(plain.bfloat16(), (2, 4), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16" in refusal(plain.float(), (2, 4))
    assert "on a CPU" in refusal(plain, (2, 4), device="cuda")
    assert "layer 2" in refusal(mlp(4, 900, 900, 3), (64, 4)) and "layer 2" in refusal(
        mlp(4, 600, 600, 3), (2, 4)
    )
    wide = nn.Sequential(nn.Conv2d(3, 96, 3), nn.Conv2d(96, 96, 3), nn.Flatten(), nn.Linear(96, 2))
    assert "torch's convolutions are faster" in refusal(wide, (8, 3, 5, 5))
    for asked in (dict(tolerance=0.1), dict(belief_optimizer=pcfast.Adam()), dict(method="error_based")):
        assert "eager" in refusal(plain, (2, 4), **asked)


def test_without_the_module_auto_takes_eager_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(native, "_MODULE", "pcfast._cpu_absent")
    native._find.cache_clear()
    try:
        model, x, y = drawn("mlp")
        run = pcfast.relax(model, x, y).run
        assert run.plan.backend == "eager" and "without a C++ compiler" in dict(run.plan.refusals)["cpu"]
        with pytest.raises(
            pcfast.BackendError, match=r"are not compiled: .*Install one .*install pcfast again"
        ):
            pcfast.relax(model, x, y, backend="cpu")
    finally:
        native._find.cache_clear()


@pytest.mark.parametrize("check", ["sync", "deferred"])
@pytest.mark.parametrize("method", ["strict", "exact", "fixed_prediction"])
@forms
def test_bad_values_are_reported_as_by_eager(form, method, check, calls):
    def said(model, x, y, **settings) -> list[tuple]:
        result = []
        for name in ("eager", "cpu"):
            try:
                pcfast.pc_loss(model, x, y, method=method, check=check, backend=name, **settings)
                pcfast.synchronize()
            except pcfast.PcfastError as error:
                result.append((type(error), str(error)))
        return result

    model, x, y = drawn("mlp", 40)
    wrong = y.clone()
    wrong[35] = 10
    overflowing, infinite = mlp(12, 20, 17, 10), mlp(12, 20, 17, 10)
    with torch.no_grad():
        overflowing[1][0].bias[3] = float("inf")
        overflowing[1][1] = nn.Identity()
        infinite[2].weight.mul_(1e38)
    cases = [
        (model, x, wrong, {}),
        (model, torch.where(torch.arange(40)[:, None] == 37, float("nan"), x), y, {}),
        (overflowing, x, y, {}),
        (infinite, x, torch.randn(40, 10), {"loss": "mse"}),
    ]
    for case in cases:
        eager, cpu = said(*case[:3], **case[3])
        assert eager == cpu
    assert len(calls) >= len(cases) - 1


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("gram", [True, False])
def test_divergence_names_iteration_and_layer(gram, backend):
    """Those where float64 leaves float32's range, but for what one multiplication by step_size reaches."""
    widths = (6, 64, 5, 4, 3) if gram else (6, 5, 48, 4, 3)
    largest = torch.finfo(torch.float32).max
    for seed, step_size in ((0, 3.0), (1, 5.0), (2, 10.0)):
        torch.manual_seed(seed)
        model = mlp(*widths, activation=nn.ReLU)
        x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
        with pytest.raises(pcfast.RelaxationDiverged) as raised:
            pcfast.pc_loss(model, x, y, step_size=step_size, num_steps=300, backend=backend)
        iteration, layer = raised.value.iteration, raised.value.layer
        before, at = (
            [
                float(v.abs().max())
                for v in pcfast.relax(
                    model.double(), x.double(), y, step_size=step_size, num_steps=n, backend="reference"
                ).beliefs[1:-1]
            ]
            for n in (iteration - 1, iteration)
        )
        assert max(before) < largest < max(at) * step_size and at[layer - 1] * step_size > largest
