"""Residual blocks: their energy, their accuracy, what is refused, training.

That they agree with the literal loops: tests/test_modules.py, and on random networks tests/test_agreement.py.
"""

import copy
import functools
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from accuracy import allowed_error
from energy import relax_by_optimizer
from plans import planned
from torch import nn

import pcfast
from pcfast import datasets
from pcfast.backends import BACKENDS
from pcfast.backends.cuda import backend as cuda
from pcfast.backends.triton import backend as triton
from pcfast.checking import checker as checking
from pcfast.checking.bounds import relative_error, same_precision_bound, with_forward_errors_of
from pcfast.cli.building import takes_flat_input
from pcfast.model.describe import describe
from pcfast.problem.settings import Settings
from pcfast.relaxation.cuda_graphs import graph_key
from pcfast.relaxation.solve import prepare
from pcfast.training import trainer as training

METHODS = ("exact", "fixed_prediction", "strict")


class Skip(nn.Sequential):
    """x + f(x) written out; to pcfast a module like any other."""

    def forward(self, x):
        return x + super().forward(x.clone())


def residual_mlp(block=pcfast.Residual, activation=nn.Tanh, *, inputs=64, width=128, blocks=4, outputs=10):
    return nn.Sequential(
        nn.Sequential(nn.Linear(inputs, width), activation()),
        *(block(nn.Linear(width, width), activation()) for _ in range(blocks)),
        nn.Linear(width, outputs),
    )


def residual_cnn(block=pcfast.Residual):
    """With normalisation, nested blocks, and blocks that are parts of a layer."""

    def conv(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    return nn.Sequential(
        nn.Sequential(conv(1, 4), nn.BatchNorm2d(4), nn.ReLU()),
        block(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6), block(nn.GELU(), conv(6, 6)), conv(6, 4)),
        nn.Sequential(block(nn.Tanh(), conv(4, 4)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 9)),
        block(nn.Linear(9, 9), nn.SiLU()),
        nn.Linear(9, 3),
    )


def updates(model, x, y, **arguments):
    model.zero_grad()
    pcfast.pc_loss(model, x, y, **arguments).backward()
    return [p.grad.clone() for p in model.parameters()]


# The energy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("make", [residual_mlp, residual_cnn])
def test_strict_descends_the_energy_with_the_skip_inside_the_prediction(make, momentum, backend):
    """Autograd on the sum of 0.5 |v_{l-1} + f_l(v_{l-1}) - v_l|^2 and the loss, leaf beliefs, torch's own SGD."""
    torch.manual_seed(1)
    model, plain = make().double(), make(Skip).double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(7, 64, dtype=torch.float64)
    x = x if make is residual_mlp else x.view(7, 1, 8, 8)
    y, loss, steps = torch.randint(0, 3, (7,)), nn.CrossEntropyLoss(reduction="sum"), [0.1, 0.05] * 6
    truth = relax_by_optimizer(
        plain, x, y, loss=loss, step_sizes=steps,
        make=lambda leaves: torch.optim.SGD(leaves, lr=1.0, momentum=momentum),
    )  # fmt: skip
    settings = dict(loss=loss, step_size=steps, num_steps=12, backend=backend)
    settings["belief_optimizer"] = pcfast.GradientDescent(momentum)
    result = pcfast.relax(copy.deepcopy(model), x, y, **settings)
    for l in range(1, len(model)):
        bound = allowed_error(truth.errors[l], truth.beliefs[l], 12)
        assert float((result.beliefs[l] - truth.beliefs[l]).norm()) <= bound
        assert float((result.errors[l] - truth.errors[l]).norm()) <= bound
    for (name, _), update in zip(model.named_parameters(), updates(model, x, y, **settings), strict=True):
        expected = truth.gradients[name]
        # a bias below BatchNorm has an update of rounding alone
        assert relative_error(update, expected) < 1e-9 or float((update - expected).norm()) < 1e-12, name


# Accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_skips_lose_no_digits(activation, dtype):
    """The rule of tests/test_precision.py holds; plain differences of the block as an unknown module break it."""
    model, unknown = residual_mlp(activation=activation), residual_mlp(Skip, activation)
    unknown.load_state_dict(model.state_dict())
    double = copy.deepcopy(model).double()
    draws = [(torch.rand(300, 64), torch.randint(0, 10, (300,))) for _ in range(5)]

    def backpropagated(model, x, y):
        model.zero_grad()
        F.cross_entropy(model(x).to(x.dtype), y).backward()
        return [p.grad.clone() for p in model.parameters()]

    def in_precision(function, *arguments, **settings):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return function(*arguments, **settings)

    def errors(run, truth):
        """Medians over the draws, by parameter."""
        rows = [map(relative_error, run(x, y), truth(double, x.double(), y)) for x, y in draws]
        return [median(column) for column in zip(*rows, strict=True)]

    def relaxed(model, x, y):
        return updates(model, x, y, backend="reference")

    def with_forward_errors(x, y):
        return relaxed(in_precision(with_forward_errors_of, model, x), x.double(), y)

    backpropagation = max(errors(lambda *xy: in_precision(backpropagated, model, *xy), backpropagated))
    bounds = [same_precision_bound(backpropagation, e) for e in errors(with_forward_errors, relaxed)]

    def relaxed_in_eager(net, *xy):
        return in_precision(updates, net, *xy, backend="eager")

    result = errors(functools.partial(relaxed_in_eager, model), relaxed)
    pcfast.use_precise_deviations(False)
    try:
        lost = errors(functools.partial(relaxed_in_eager, unknown), relaxed)
    finally:
        pcfast.use_precise_deviations(True)
    assert all(error <= bound for error, bound in zip(result, bounds, strict=True))
    # only the output layer, whose error does not come through a block, keeps its digits
    assert all(error > 5 * bound for error, bound in zip(lost[:-2], bounds[:-2], strict=True))


def test_every_backend_at_hand_passes_the_check():
    assert checking.check(residual_mlp(width=24, blocks=2), (16, 64), draws=3).ok


# The module -----------------------------------------------------------------------------------------------------


def test_parameters_are_named_as_in_a_sequential():
    modules = nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4)
    plain, block = nn.Sequential(*modules), pcfast.Residual(*(copy.deepcopy(m) for m in modules))
    assert block.load_state_dict(plain.state_dict()) == nn.Module().load_state_dict({})
    x = torch.randn(3, 4)
    assert torch.equal(block(x), x + plain(x))
    assert torch.equal(pcfast.Residual(nn.ReLU(inplace=True))(x), x + x.relu())
    assert torch.equal(pcfast.Residual()(x), 2 * x)


@pytest.mark.parametrize(
    "block", [pcfast.Residual(nn.Linear(6, 1)), pcfast.Residual(nn.Linear(6, 6), nn.Linear(6, 7))]
)
def test_a_branch_that_changes_the_shape_is_refused(block):
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    with pytest.raises(pcfast.ShapeError, match=r"makes \(4, [17]\) of \(4, 6\)"):
        block(x)
    for backend in ("reference", "eager"):
        with pytest.raises(pcfast.ShapeError, match=r"keeps the shape, not one that gives \(4, [17]\)"):
            pcfast.pc_loss(nn.Sequential(block, nn.Linear(6, 3)), x, y, backend=backend)
        # behind a module that hides the shapes, when it runs
        with pytest.raises(pcfast.ShapeError, match=r"makes \(4, [17]\) of \(4, 6\)"):
            pcfast.pc_loss(nn.Sequential(nn.Softplus(), block, nn.Linear(6, 3)), x, y, backend=backend)


def test_a_shape_that_does_not_fit_inside_is_named():
    inner = pcfast.Residual(nn.Linear(6, 6), nn.Linear(5, 6))
    model = nn.Sequential(nn.Linear(6, 6), pcfast.Residual(inner), nn.Linear(6, 3))
    with pytest.raises(
        pcfast.ShapeError,
        match=r"layer 2 .*needed: \(batch, \.\.\., 5\) at the Linear inside, not \(4, 6\)\.",
    ):
        pcfast.explain(model, (4, 6))


def test_a_branch_that_returns_no_tensor_is_refused():
    with pytest.raises(pcfast.ModelError, match="branch that returns a tuple"):
        pcfast.Residual(nn.GRU(4, 4))(torch.randn(3, 4))


def test_a_model_is_no_block():
    with pytest.raises(pcfast.ModelError, match=r"Residual, which overrides Sequential\.forward"):
        describe(pcfast.Residual(nn.Linear(4, 4)))


def test_group_layers_keeps_blocks_whole():
    block = pcfast.Residual(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    flat = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), block, nn.ReLU(), nn.Linear(8, 3))
    grouped = pcfast.group_layers(flat)
    assert [len(group) for group in grouped] == [2, 3, 2] and grouped[1] is block
    x = torch.randn(4, 6)
    assert torch.equal(grouped(x), flat(x))


def test_the_command_line_sees_a_linear_layer_inside_a_block():
    assert takes_flat_input(nn.Sequential(pcfast.Residual(nn.Linear(4, 4)), nn.Linear(4, 3)))
    assert not takes_flat_input(nn.Sequential(pcfast.Residual(nn.Conv2d(1, 1, 1)), nn.Flatten()))


# What runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dropout_draws_one_mask_a_step(method):
    """The same draw on both backends, with plain dropout outside of blocks too."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3)),
        pcfast.Residual(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5)),
        nn.Sequential(pcfast.Residual(nn.Dropout(0.2), pcfast.Residual(nn.Dropout(0.5))), nn.Linear(8, 3)),
    ).double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 3, (9,))
    result = []
    for backend in ("reference", "eager"):
        torch.manual_seed(3)
        result.append(
            updates(model, x, y, method=method, backend=backend, loss=nn.CrossEntropyLoss(reduction="sum"))
        )
    for truth, update in zip(*result, strict=True):
        assert relative_error(update, truth) < 1e-11


@pytest.mark.parametrize("method", METHODS)
def test_kernels_refuse_blocks(method, monkeypatch):
    monkeypatch.setattr(triton, "_unavailable", lambda *_: "")
    monkeypatch.setattr(cuda, "_unavailable", lambda *_: "")
    nested = nn.Sequential(
        nn.Linear(8, 9), nn.Sequential(nn.Tanh(), pcfast.Residual(nn.Linear(9, 9))), nn.Linear(9, 3)
    )
    request = planned(nested, (5, 8), method=method)
    for name in ("triton", "cuda"):
        reason = "layer 2 (Tanh - Residual(Linear)): no kernel adds a skip: use eager"
        assert BACKENDS[name].supports(request) == (False, reason)
        with pytest.raises(pcfast.BackendError, match="no kernel adds a skip"):
            pcfast.pc_loss(nested, torch.randn(5, 8), torch.randint(0, 3, (5,)), backend=name, method=method)
    explanation = pcfast.explain(nested, (5, 8), method=method)
    assert method != "strict" or explanation.plan.backend == "eager"
    assert "layer 2 (Tanh - Residual(Linear)): (5, 9) -> (5, 9)" in repr(explanation)


def test_the_gram_form_needs_layer_1s_beliefs_out_of_the_loop():
    plan = pcfast.explain(residual_mlp(), (300, 64)).plan
    assert not plan.gram and "layer 2 begins with a residual block" in plan.gram_reason


def test_graphs_record_blocks_unless_autograd_runs_inside():
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))

    def ready(branch):
        model = nn.Sequential(nn.Linear(6, 8), pcfast.Residual(*branch), nn.Linear(8, 3))
        return prepare(model, x, y, Settings(num_steps=4))

    known, opaque = ready([nn.Linear(8, 8), nn.Tanh()]), ready([nn.Linear(8, 8), nn.Softplus()])
    assert BACKENDS["eager"].replays(*known) == (True, "")
    ok, reason = BACKENDS["eager"].replays(*opaque)
    assert not ok and "Softplus runs through autograd" in reason
    assert graph_key(*known) == graph_key(*known)
    assert hash(known[1].network) == hash(describe(known[0].model))
    assert opaque[1].work is None


def test_a_compiled_step_runs_blocks():
    model = residual_cnn()
    x, y = torch.randn(5, 1, 8, 8), torch.randint(0, 3, (5,))
    plain = copy.deepcopy(model)

    def step(x, y):
        return pcfast.pc_loss(model, x, y, num_steps=5)

    torch.compiler.reset()
    torch.compile(step, backend="aot_eager", fullgraph=True)(x, y).backward()
    torch.compiler.reset()
    expected = updates(plain, x, y, num_steps=5)
    assert all(torch.equal(p.grad, update) for p, update in zip(model.parameters(), expected, strict=True))
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


# Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["strict", "fixed_prediction"])
def test_digits_are_learned(method):
    model = residual_mlp(blocks=2)
    history = training.train(
        model, datasets.digits(), epochs=10, batch_size=32, method=method, step_size=0.1, progress=False,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.001, weight_decay=0.1),
    )  # fmt: skip
    assert pcfast.last_run().plan.backend in ("eager", "cpu")
    assert history.test_accuracy[-1] >= 0.95
