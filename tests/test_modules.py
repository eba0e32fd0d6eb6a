"""Every kind of layer: both backends in float64 against the methods written out in plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accuracy import ULP, allowed_error
from literal import relax_literally
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import pcfast

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

BATCH, CLASSES = 5, 3
BACKENDS = ["reference", "eager"]
RUNS = [
    ("exact", 0),
    ("fixed_prediction", 0),
    ("fixed_prediction", 3),
    ("strict", 0),
    ("strict", 1),
    ("strict", 12),
]
RUNS += [("error_based", 0), ("error_based", 3), ("zero_divergence", 0)]
LOSS = nn.CrossEntropyLoss(reduction="sum")  # errors of order one: nothing hides in rounding


def seq(*layers):
    return nn.Sequential(*layers)


def block(*layers):
    return pcfast.Residual(*layers)


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.map = nn.Linear(size, size)

    def forward(self, x):
        return x + torch.sin(self.map(x))


class InPlace(nn.Module):
    """Works on its input in place, as user code may."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        x.mul_(2).sub_(0.5)
        return torch.sin(x) * self.scale


class Unused(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.used, self.unused = nn.Linear(size, size), nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.used(x)


class Centred(nn.Module):
    """Subtracts a running mean that it updates in training mode, and reads the buffer it has written."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x * torch.exp(-self.mean) - self.mean


class Noise(nn.Module):
    def forward(self, x):
        return x * (0.5 + torch.rand_like(x))


class TwiceAround(pcfast.Residual):
    def forward(self, x):
        return 2 * x + self[0](x)


def hooked():
    layer = nn.Linear(5, 4)
    layer.register_forward_hook(lambda module, inputs, output: torch.sin(output))
    return layer


def shared():
    layer = seq(nn.Linear(6, 6), nn.Tanh())
    return seq(layer, nn.Tanh(), layer, nn.Linear(6, CLASSES))


def shared_inside():
    layer = nn.Linear(6, 6)
    return seq(seq(layer, nn.Tanh(), layer), seq(nn.Tanh(), layer), nn.Linear(6, CLASSES))


def with_eval(model, *paths):
    for path in paths:
        model.get_submodule(path).eval()
    return model


def mlp(*middle):
    """Linear to 5 units, ``middle`` as layers, linear to the classes."""
    return seq(nn.Linear(6, 5), *middle, nn.Linear(5, CLASSES))


def cnn(*middle, features, channels=2):
    return seq(
        seq(nn.Conv2d(2, channels, 3), nn.Tanh()), *middle, seq(nn.Flatten(), nn.Linear(features, CLASSES))
    )


VECTOR, IMAGE = (6,), (2, 9, 9)

# name -> (shape of one row of x, model)
CASES = {
    # batch normalisation
    "bn1d": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5)))),
    "bn1d-bare": (VECTOR, lambda: mlp(nn.BatchNorm1d(5), nn.Tanh())),
    "bn1d-first": (VECTOR, lambda: seq(nn.BatchNorm1d(6), *mlp(nn.Tanh()))),
    "bn1d-last": (VECTOR, lambda: seq(*mlp(nn.Tanh()), nn.BatchNorm1d(CLASSES))),
    "bn1d-twice": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5)))),
    "bn1d-sequence": ((4, 3), lambda: seq(nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES))),
    "bn1d-not-affine": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5, affine=False), nn.Tanh()))),
    "bn1d-no-statistics": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh()))),
    "bn1d-no-statistics-eval": (
        VECTOR,
        lambda: mlp(seq(nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh())).eval(),
    ),
    "bn1d-momentum-none": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5, momentum=None), nn.Tanh()))),
    "bn1d-momentum-zero": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5, momentum=0.0), nn.Tanh()))),
    "bn1d-momentum-one": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5, momentum=1.0), nn.Tanh()))),
    "bn1d-large-eps": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5, eps=0.3), nn.Tanh()))),
    "bn1d-eval": (VECTOR, lambda: mlp(seq(nn.BatchNorm1d(5), nn.Tanh())).eval()),
    "bn1d-eval-alone": (
        VECTOR,
        lambda: with_eval(mlp(nn.BatchNorm1d(5), seq(nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5))), "1"),
    ),
    "bn2d": (IMAGE, lambda: cnn(seq(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)), features=18)),
    "bn2d-eval": (IMAGE, lambda: cnn(nn.BatchNorm2d(2), nn.ReLU(), features=98).eval()),
    # modules without a spec
    "residual": (VECTOR, lambda: mlp(Residual(5), nn.ReLU())),
    "residual-first": (VECTOR, lambda: seq(Residual(6), nn.Linear(6, CLASSES))),
    "residual-last": (VECTOR, lambda: seq(nn.Linear(6, CLASSES), Residual(CLASSES))),
    "elu": (VECTOR, lambda: mlp(seq(nn.ELU(), nn.Linear(5, 5)), nn.ELU())),
    "softplus": (VECTOR, lambda: mlp(nn.Softplus())),
    "layer-norm": (VECTOR, lambda: mlp(seq(nn.LayerNorm(5), nn.Tanh()))),
    "conv1d": ((2, 7), lambda: seq(seq(nn.Conv1d(2, 3, 3), nn.Tanh()), nn.Flatten(), nn.Linear(15, CLASSES))),
    "hook": (VECTOR, lambda: seq(nn.Linear(6, 5), hooked(), nn.Linear(4, CLASSES))),
    "weight-norm": (VECTOR, lambda: seq(nn.Linear(6, 5), weight_norm(nn.Linear(5, 4)), nn.Linear(4, CLASSES))),
    "in-place": (VECTOR, lambda: seq(InPlace(6), nn.Linear(6, 5), InPlace(5), nn.Linear(5, CLASSES))),
    "unused": (VECTOR, lambda: mlp(Unused(5), nn.Tanh())),
    "spectral-norm": (VECTOR, lambda: mlp(spectral_norm(nn.Linear(5, 5)), nn.Tanh())),
    "own-statistics": (VECTOR, lambda: mlp(Centred(5), nn.Tanh())),
    "reflect": (IMAGE, lambda: cnn(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), features=98)),
    "subclass": (VECTOR, lambda: mlp(type("Doubled", (nn.Linear,), {"forward": lambda s, x: x * 2})(5, 5))),
    "prelu": (VECTOR, lambda: mlp(nn.PReLU(5), nn.GroupNorm(1, 5))),
    # in-place, shared and empty layers
    "relu-in-place": (VECTOR, lambda: seq(seq(nn.Linear(6, 5), nn.ReLU(inplace=True)), nn.Linear(5, CLASSES))),
    "relu-in-place-bare": (VECTOR, lambda: seq(nn.ReLU(inplace=True), *mlp(nn.ReLU(inplace=True)))),
    "leaky-in-place": (VECTOR, lambda: mlp(nn.LeakyReLU(0.2, inplace=True), nn.Linear(5, 5), nn.SiLU(inplace=True))),
    "hardtanh": (VECTOR, lambda: mlp(nn.Hardtanh(), seq(nn.Linear(5, 5), nn.Hardtanh(-0.2, 0.1)), nn.ReLU6())),
    "hardtanh-in-place": (VECTOR, lambda: mlp(nn.Hardtanh(-0.5, 2, inplace=True), nn.ReLU6(inplace=True))),
    "relu-in-place-last": (VECTOR, lambda: seq(*mlp(nn.Tanh()), nn.ReLU(inplace=True))),
    "shared": (VECTOR, shared),
    "shared-inside": (VECTOR, shared_inside),
    "identity": (VECTOR, lambda: mlp(nn.Identity(), nn.Tanh(), seq(), seq(nn.Identity()))),
    "identity-first": (VECTOR, lambda: seq(nn.Identity(), *mlp(nn.Tanh()))),
    "identity-last": (VECTOR, lambda: seq(*mlp(nn.Tanh()), seq())),
    "frozen": (VECTOR, lambda: seq(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES).requires_grad_(False))),
    # residual blocks
    "block": (VECTOR, lambda: mlp(block(nn.Linear(5, 5), nn.Tanh()), nn.Tanh())),
    "block-first": (VECTOR, lambda: seq(block(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)), *mlp(nn.Tanh()))),
    "block-last": (VECTOR, lambda: seq(*mlp(nn.Tanh()), block(nn.Linear(CLASSES, CLASSES)))),
    "block-alone": (VECTOR, lambda: seq(block(nn.Linear(6, 6), nn.GELU()))),
    "block-part": (VECTOR, lambda: mlp(seq(nn.Linear(5, 4), nn.Tanh(), block(nn.Linear(4, 4)), nn.Linear(4, 5)))),
    "block-gram": (VECTOR, lambda: seq(nn.Linear(6, 64), seq(nn.Linear(64, 5), block(nn.Tanh(), nn.Linear(5, 5))),
                                       nn.Linear(5, CLASSES))),
    "blocks-nested": (VECTOR, lambda: mlp(block(nn.Tanh(), block(nn.Linear(5, 5), nn.ReLU()), nn.Linear(5, 5)))),
    "blocks-row": (VECTOR, lambda: mlp(*(block(nn.Linear(5, 5), nn.Sigmoid()) for _ in range(4)))),
    "block-identity": (VECTOR, lambda: mlp(block(), block(nn.Identity()), block(block()))),
    "block-in-place": (VECTOR, lambda: mlp(block(nn.ReLU(True), nn.Linear(5, 5)), block(nn.ReLU(inplace=True)))),
    "block-bn": (VECTOR, lambda: mlp(block(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5)), block(nn.BatchNorm1d(5)))),
    "block-bn-eval": (VECTOR, lambda: mlp(block(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU())).eval()),
    "block-shared": (VECTOR, lambda: mlp(*[block(nn.Linear(5, 5), nn.Tanh())] * 2)),
    "block-frozen": (VECTOR, lambda: mlp(block(nn.Linear(5, 5), nn.Tanh()).requires_grad_(False), nn.Linear(5, 5))),
    "block-subclass": (VECTOR, lambda: mlp(type("Named", (pcfast.Residual,), {})(nn.Linear(5, 5), nn.Tanh()))),
    "block-3d": ((4, 6), lambda: seq(block(nn.Linear(6, 6), nn.Tanh()), nn.Flatten(), nn.Linear(24, CLASSES))),
    "block-reshaped": ((4, 3), lambda: seq(block(nn.Flatten(), nn.Linear(12, 12), nn.Unflatten(1, (4, 3))),
                                           nn.Flatten(), nn.Linear(12, CLASSES))),
    "block-conv": (IMAGE, lambda: cnn(block(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
                                            nn.Conv2d(3, 2, 3, padding="same")), nn.ReLU(), features=98)),
    "block-pool": (IMAGE, lambda: cnn(block(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), block(nn.AvgPool2d(3, 1, 1)),
                                      features=98)),
    "block-around-opaque": (VECTOR, lambda: mlp(block(nn.Linear(5, 5), nn.ELU(), Residual(5)))),
    "block-around-hook": (VECTOR, lambda: mlp(nn.Linear(5, 4), block(nn.Linear(4, 5), hooked()), nn.Linear(4, 5))),
    "block-changed": (VECTOR, lambda: mlp(TwiceAround(nn.Linear(5, 5)))),
    # shapes
    "linear-3d": ((4, 6), lambda: seq(*mlp(nn.Tanh()), nn.Flatten(), nn.Linear(12, CLASSES))),
    "linear-3d-wide": ((4, 9), lambda: seq(nn.Linear(9, 33), nn.Linear(33, 2), nn.Flatten(), nn.Linear(8, 3))),
    "unflatten": ((12,), lambda: seq(nn.Unflatten(1, (3, -1)), nn.Linear(4, 5), nn.Flatten(1), nn.Linear(15, 3))),
    "flatten-part": (IMAGE, lambda: seq(nn.Conv2d(2, 2, 8), nn.Flatten(2), nn.Flatten(), nn.Linear(8, CLASSES))),
    # pooling
    "max": (IMAGE, lambda: cnn(nn.MaxPool2d(2), features=18)),
    "max-ceil": (IMAGE, lambda: cnn(nn.MaxPool2d(2, ceil_mode=True), features=32)),
    "max-odd": (IMAGE, lambda: cnn(nn.MaxPool2d((3, 2)), features=12)),
    "max-overlapping": (IMAGE, lambda: cnn(nn.MaxPool2d(3, 2), features=18)),
    "max-overlapping-ceil": (IMAGE, lambda: cnn(nn.MaxPool2d(3, 3, 1, ceil_mode=True), features=18)),
    "max-padded": (IMAGE, lambda: cnn(nn.MaxPool2d(2, 2, 1), features=32)),
    "max-padded-ceil": (IMAGE, lambda: cnn(nn.MaxPool2d(2, 2, 1, ceil_mode=True), features=32)),
    "avg-padded-ceil": (IMAGE, lambda: cnn(nn.AvgPool2d(2, 2, 1, ceil_mode=True), features=32)),
    "max-gaps": (IMAGE, lambda: cnn(nn.MaxPool2d(2, 3), features=8)),
    "max-dilated": (IMAGE, lambda: cnn(nn.MaxPool2d(2, 2, dilation=2), features=18)),
    "max-after-relu": (IMAGE, lambda: seq(seq(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
                                          nn.Flatten(), nn.Linear(48, CLASSES))),
    "max-after-hardtanh": (IMAGE, lambda: seq(seq(nn.Conv2d(2, 3, 3), nn.Hardtanh(-0.3, 0.2), nn.MaxPool2d(2)),
                                              nn.Flatten(), nn.Linear(27, CLASSES))),
    "max-after-gelu": (IMAGE, lambda: cnn(seq(nn.GELU(), nn.MaxPool2d(2)), features=18)),
    "avg": (IMAGE, lambda: cnn(nn.AvgPool2d(2), features=18)),
    "avg-padded": (IMAGE, lambda: cnn(nn.AvgPool2d(3, 2, 1), features=32)),
    "avg-padded-not-counted": (IMAGE, lambda: cnn(nn.AvgPool2d(3, 2, 1, count_include_pad=False), features=32)),
    "avg-ceil": (IMAGE, lambda: cnn(nn.AvgPool2d(2, ceil_mode=True), features=32)),
    "avg-divisor": (IMAGE, lambda: cnn(nn.AvgPool2d(2, divisor_override=3), features=18)),
    "adaptive": (IMAGE, lambda: cnn(nn.AdaptiveAvgPool2d((3, 2)), features=12)),
    "adaptive-one": (IMAGE, lambda: cnn(nn.AdaptiveAvgPool2d(1), features=2)),
    # convolutions
    "conv-stride": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, 3, stride=2), features=27)),
    "conv-uneven": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0)), features=60)),
    "conv-dilated": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, 3, dilation=2), features=27)),
    "conv-groups": (IMAGE, lambda: cnn(nn.Conv2d(4, 6, 3, groups=2, bias=False), features=150, channels=4)),
    "conv-same": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, 3, padding="same"), features=147)),
    "conv-same-dilated": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, 3, padding="same", dilation=2), features=147)),
    "conv-same-even": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, 2, padding="same"), features=147)),
    "conv-valid": (IMAGE, lambda: cnn(nn.Conv2d(2, 3, 3, padding="valid"), features=75)),
    "conv-gram": (IMAGE, lambda: seq(nn.Conv2d(2, 32, 2), seq(nn.Conv2d(32, 1, 2), nn.Tanh()),
                                     nn.Flatten(), nn.Linear(49, CLASSES))),
    "scale": (VECTOR, lambda: mlp(seq(pcfast.Scale(0.5), nn.Tanh(), pcfast.Scale(2.0)))),
    "linear-gram": (VECTOR, lambda: seq(nn.Linear(6, 64), seq(nn.Linear(64, 5), nn.Tanh()), nn.Linear(5, CLASSES))),
}  # fmt: skip

#: Cases with modules that are to be read as opaque, and only those.
OPAQUE = {
    "residual",
    "residual-first",
    "residual-last",
    "elu",
    "softplus",
    "layer-norm",
    "conv1d",
    "hook",
    "weight-norm",
    "in-place",
    "unused",
    "spectral-norm",
    "own-statistics",
    "reflect",
    "subclass",
    "prelu",
    "max-dilated",
    "conv-same-even",
    "block-around-opaque",
    "block-around-hook",
    "block-changed",
}


def problem(case, seed=3):
    torch.manual_seed(seed)
    shape, make = CASES[case] if isinstance(case, str) else case
    model = make().double()
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    return model, x, torch.randint(0, CLASSES, (BATCH,))


def agree_all(result, truth, num_steps=1):
    """Updates by name. A gradient that cancels to zero keeps the rounding of the largest one."""
    assert set(result) == set(truth)
    scale = max(1.0, *(float(gradient.norm()) for gradient in truth.values()))
    for name, gradient in truth.items():
        agree(result[name], gradient, num_steps, scale)


def updates(model, x, y, **arguments):
    """Name -> update, from pc_loss."""
    model.zero_grad()
    pcfast.pc_loss(model, x, y, loss=LOSS, **arguments).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(result, truth, num_steps=1, scale=1.0):
    """float64: to the error that docs/method.md allows of states of norm ``scale``."""
    bound = 1e-10 * float(truth.norm()) + 64 * ULP * max(num_steps, 1) * max(scale, float(truth.norm()))
    assert result.shape == truth.shape
    assert float((result - truth).norm()) <= bound


def check_against_literal(model, x, y, method, num_steps, backend, step_size=0.1):
    arguments = {"method": method, "num_steps": num_steps, "step_size": step_size}
    truth = relax_literally(model, x, y, loss=LOSS, **arguments)
    plain = copy.deepcopy(model)
    plain(x.clone())

    result = pcfast.relax(copy.deepcopy(model), x, y, loss=LOSS, backend=backend, **arguments)
    assert result.run.plan.backend == backend
    for l, (v, v_true) in enumerate(zip(result.beliefs, truth.beliefs, strict=True)):
        if method != "exact" or l:
            agree(v, v_true, num_steps)
    for e, e_true, v_true in zip(result.errors, truth.errors, truth.beliefs, strict=True):
        assert (e is None) == (e_true is None)
        if e is not None:
            assert float((e - e_true).norm()) <= allowed_error(e_true, v_true, num_steps)

    agree_all(updates(model, x, y, backend=backend, **arguments), truth.gradients, num_steps)

    for (name, buffer), once in zip(model.named_buffers(), plain.buffers(), strict=True):
        if backend == "reference" or not buffer.is_floating_point():
            assert torch.equal(buffer, once), name
        else:
            torch.testing.assert_close(buffer, once, rtol=4 * ULP, atol=ULP)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "num_steps"), RUNS, ids=lambda value: str(value))
@pytest.mark.parametrize("case", CASES)
def test_modules(case, method, num_steps, backend):
    model, x, y = problem(case)
    before = x.clone()
    check_against_literal(model, x, y, method, num_steps, backend)
    assert torch.equal(x, before)


@pytest.mark.parametrize("case", CASES)
def test_exact_is_backpropagation_through_the_whole_model(case):
    model, x, y = problem(case)
    LOSS(copy.deepcopy(model)(x.clone()), y)  # the model itself runs
    result = updates(copy.deepcopy(model), x, y, method="exact", backend="eager")
    LOSS(model(x.clone()), y).backward()
    agree_all(result, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("case", CASES)
def test_which_modules_are_opaque(case):
    model, x, _ = problem(case)
    opaque = pcfast.explain(model, tuple(x.shape)).network.opaque
    assert bool(opaque) == (case in OPAQUE)


@pytest.mark.parametrize("case", ["linear-gram", "conv-gram", "block-gram"])
def test_the_gram_cases_run_in_gram_form(case):
    model, x, y = problem(case)
    assert pcfast.relax(model, x, y, num_steps=12).run.plan.gram
    assert not pcfast.relax(model, x, y, num_steps=1).run.plan.gram


# batch normalisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["pc_loss", "relax", "PCInfer", "no_grad"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_once_a_step(call, momentum, backend):
    torch.manual_seed(1)
    model = mlp(seq(nn.BatchNorm1d(5, momentum=momentum), nn.ReLU())).double()
    plain = copy.deepcopy(model)
    for _ in range(3):
        x, y = torch.randn(BATCH, 6, dtype=torch.float64), torch.randint(0, CLASSES, (BATCH,))
        if call == "pc_loss":
            pcfast.pc_loss(model, x, y, backend=backend).backward()
        elif call == "relax":
            pcfast.relax(model, x, y, backend=backend)
        elif call == "PCInfer":
            pcfast.PCInfer(model, LOSS, x, y, "Strict", backend=backend)
        else:
            with torch.no_grad():
                pcfast.pc_loss(model, x, y, backend=backend)
        plain(x)
        norm, truth = model[1][0], plain[1][0]
        assert torch.equal(norm.num_batches_tracked, truth.num_batches_tracked)
        torch.testing.assert_close(norm.running_mean, truth.running_mean, rtol=16 * ULP, atol=ULP)
        torch.testing.assert_close(norm.running_var, truth.running_var, rtol=16 * ULP, atol=ULP)
    assert int(norm.num_batches_tracked) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_the_same_tensors_as_before(backend):
    """Optimisers of averaged models, DDP and checkpoints hold on to buffers."""
    model, x, y = problem("bn2d")
    held = dict(model.named_buffers())
    pcfast.pc_loss(model, x, y, backend=backend).backward()
    assert all(buffer is held[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mode_switched_between_calls_is_honoured(backend):
    model, x, y = problem("bn1d")
    for training in (True, False, True):
        model.train(training)
        check_against_literal(model, x, y, "strict", 3, backend)


# random layers --------------------------------------------------------------------------------------------


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


DROPOUTS = {
    "dropout": (
        VECTOR,
        lambda layer: seq(seq(nn.Linear(6, 8), layer, nn.ReLU()), nn.Linear(8, 3)),
        nn.Dropout,
        (8,),
    ),
    "dropout-bare": (VECTOR, lambda layer: seq(nn.Linear(6, 8), layer, nn.Linear(8, 3)), nn.Dropout, (8,)),
    "dropout-first": (VECTOR, lambda layer: seq(layer, nn.Linear(6, 8), nn.Linear(8, 3)), nn.Dropout, (6,)),
    "dropout1d": (
        (4, 6),
        lambda layer: seq(layer, seq(nn.Linear(6, 2), nn.Tanh()), nn.Flatten(), nn.Linear(8, 3)),
        nn.Dropout1d,
        (4, 6),
    ),
    "dropout2d": (
        IMAGE,
        lambda layer: seq(seq(nn.Conv2d(2, 6, 3), layer, nn.Tanh()), nn.Flatten(), nn.Linear(294, 3)),
        nn.Dropout2d,
        (6, 7, 7),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "num_steps"), RUNS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", DROPOUTS)
def test_one_dropout_mask_a_step_as_torch_draws_it(name, method, num_steps, backend):
    shape, make, kind, at = DROPOUTS[name]
    model, x, y = problem((shape, lambda: make(kind(0.4))))
    torch.manual_seed(11)
    mask = kind(0.4)(torch.ones(BATCH, *at, dtype=torch.float64))
    assert bool((mask == 0).any())
    fixed = make(Mask(mask)).double()
    fixed.load_state_dict(model.state_dict())
    arguments = {"method": method, "num_steps": num_steps, "step_size": 0.1}
    truth = relax_literally(fixed, x, y, loss=LOSS, **arguments)

    torch.manual_seed(11)
    result = pcfast.relax(model, x, y, loss=LOSS, backend=backend, **arguments)
    after = torch.get_rng_state()
    for v, v_true in zip(result.beliefs[1:], truth.beliefs[1:], strict=True):
        agree(v, v_true, num_steps)
    torch.manual_seed(11)
    agree_all(updates(model, x, y, backend=backend, **arguments), truth.gradients, num_steps)
    torch.manual_seed(11)
    model(x)
    assert torch.equal(after, torch.get_rng_state())  # a step draws what one forward pass draws


RANDOM = {
    "dropout": (VECTOR, lambda: mlp(nn.Dropout(0.5), seq(nn.Linear(5, 5), nn.Dropout(0.2), nn.Tanh()))),
    "dropout2d": (IMAGE, lambda: cnn(seq(nn.Dropout2d(0.5), nn.ReLU()), nn.Dropout(0.5), features=98)),
    "noise": (VECTOR, lambda: mlp(Noise(), seq(nn.Linear(5, 5), Noise()))),
    "both": (VECTOR, lambda: mlp(seq(nn.Dropout(0.3), Noise()), nn.Dropout(0.3), nn.Tanh())),
    "shared": (VECTOR, lambda: mlp(*[nn.Dropout(0.5)] * 2)),
}


@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_layers_draw_alike_in_both_backends(name, method):
    model, x, y = problem(RANDOM[name])
    result = {}
    for backend in BACKENDS:
        for seed in (1, 2):
            torch.manual_seed(seed)
            result[backend, seed] = updates(model, x, y, method=method, num_steps=12, backend=backend)
            result[backend, seed, "next"] = torch.rand(3)
    for seed in (1, 2):
        agree_all(result["eager", seed], result["reference", seed], 12)
    assert torch.equal(result["eager", 1, "next"], result["reference", 1, "next"])
    first = next(iter(result["eager", 1]))
    assert not torch.equal(result["eager", 1][first], result["eager", 2][first])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_in_eval_mode_does_nothing(name, backend):
    shape, make, kind, _ = DROPOUTS[name]
    model, x, y = problem((shape, lambda: make(kind(0.4)).eval()))
    plain = make(nn.Identity()).double()
    plain.load_state_dict(model.state_dict())
    state = torch.get_rng_state()
    result = updates(model, x, y, backend=backend)
    assert torch.equal(state, torch.get_rng_state())
    for key, gradient in updates(plain, x, y, backend=backend).items():
        assert torch.equal(gradient, result[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p, backend):
    model, x, y = problem((VECTOR, lambda: mlp(nn.Dropout(p), nn.Tanh())))
    same, _, _ = problem((VECTOR, lambda: mlp(nn.Identity() if p == 0 else Mask(0.0), nn.Tanh())))
    truth = relax_literally(same, x, y, loss=LOSS, method="strict", step_size=0.1, num_steps=3)
    agree_all(updates(model, x, y, num_steps=3, backend=backend), truth.gradients, 3)


# parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
def test_an_unused_parameter_gets_none(method, backend):
    model, x, y = problem("unused")
    pcfast.pc_loss(model, x, y, method=method, backend=backend).backward()
    assert model[1].unused.grad is None
    model[1].unused.grad = torch.ones(5, dtype=torch.float64)
    pcfast.PCInfer(
        model, LOSS, x, y, {"exact": "Exact", "fixed_prediction": "FixedPred", "strict": "Strict"}[method],
        backend=backend,
    )  # fmt: skip
    assert model[1].unused.grad is None
    assert model[1].used.weight.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "num_steps"), RUNS, ids=lambda value: str(value))
@pytest.mark.parametrize("case", ["bn1d", "linear-gram", "conv-gram", "residual", "shared", "conv-groups"])
def test_frozen_parameters_change_nothing_else(case, method, num_steps, backend):
    arguments = {"method": method, "num_steps": num_steps, "backend": backend}
    model, x, y = problem(case)
    truth = updates(model, x, y, **arguments)
    for frozen in truth:
        model, x, y = problem(case)
        model.get_parameter(frozen).requires_grad_(False)
        result = updates(model, x, y, **arguments)
        agree_all(result, {name: gradient for name, gradient in truth.items() if name != frozen}, num_steps)


# layouts and ties -----------------------------------------------------------------------------------------


def _offset(x):
    room = torch.full((x.numel() + 7,), float("nan"), dtype=x.dtype)
    room[7:] = x.reshape(-1)
    return room[7:].view(x.shape)


LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, 0).contiguous().transpose(-1, 0),
    "offset": _offset,
    "every-other": lambda x: torch.stack([x, x + 1], -1).reshape(*x.shape[:-1], -1)[..., ::2],
    "rows": lambda x: torch.cat([x, x])[: len(x)],
    "expanded": None,  # the same row, stride 0
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case", ["linear-gram", "conv-gram", "flatten-part", "unflatten", "linear-3d", "bn2d"]
)
def test_layouts_of_x(case, layout, backend):
    model, x, y = problem(case)
    if layout == "expanded":
        other = x[:1].expand(x.shape)
        x = other.contiguous()
    else:
        other = LAYOUTS[layout](x)
    assert torch.equal(other, x)
    before = other.clone()
    truth = relax_literally(model, x, y, loss=LOSS, method="strict", step_size=0.1, num_steps=12)
    agree_all(updates(model, other, y, num_steps=12, backend=backend), truth.gradients, 12)
    assert torch.equal(other, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_too", [False, True])
@pytest.mark.parametrize(
    "case", ["conv-gram", "max", "max-ceil", "max-overlapping", "max-padded", "avg-padded", "adaptive", "bn2d",
             "conv-groups", "conv-stride", "reflect"]
)  # fmt: skip
def test_channels_last(case, model_too, backend):
    model, x, y = problem(case)
    other = x.to(memory_format=torch.channels_last)
    assert not other.is_contiguous()
    for method in ("exact", "strict"):
        truth = relax_literally(model, x, y, loss=LOSS, method=method, step_size=0.1, num_steps=12)
        turned = (
            copy.deepcopy(model).to(memory_format=torch.channels_last) if model_too else copy.deepcopy(model)
        )
        agree_all(
            updates(turned, other, y, method=method, num_steps=12, backend=backend), truth.gradients, 12
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "num_steps"), RUNS, ids=lambda value: str(value))
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 2, 1)],
    ids=["tiles", "ceil", "overlapping", "padded"],
)
def test_ties_of_constant_images_go_to_the_first_of_a_window(pool, method, num_steps, backend):
    """A convolution over a constant image is constant: every window ties. Small integers keep that exact."""

    torch.manual_seed(0)
    model = seq(nn.Conv2d(2, 2, 2), seq(pool, nn.Flatten()))
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-2, 3, model[0].weight.shape))
        model[0].bias.copy_(torch.tensor([1.0, -2.0]))
    features = model(torch.zeros(1, *IMAGE)).shape[1]
    model.append(nn.Linear(features, CLASSES)).double()
    x = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0], dtype=torch.float64).view(5, 1, 1, 1).expand(5, *IMAGE)
    y = torch.randint(0, CLASSES, (BATCH,))
    check_against_literal(model, x, y, method, num_steps, backend)


def test_the_first_of_a_tied_window_gets_the_error():
    """Closed form: one 2x2 window of equal values in layer 2, error 1 at its output."""
    model = seq(nn.Conv2d(1, 1, 1), seq(nn.MaxPool2d(2), nn.Flatten())).double()
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    for backend in BACKENDS:
        result = pcfast.relax(
            model, x, torch.zeros(1), loss=lambda o, y: o.sum(), method="exact", backend=backend
        )
        assert result.errors[1].flatten().tolist() == [1, 0, 0, 0]


# group_layers ---------------------------------------------------------------------------------------------


def flat_cnn():
    return seq(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1),
        nn.Conv2d(4, 3, 2), nn.PReLU(), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(),
        nn.Linear(8, CLASSES),
    )  # fmt: skip


def shape_of(model):
    return [[type(module).__name__ for module in group] for group in model]


def test_group_layers_on_a_flat_cnn():
    model = flat_cnn()
    grouped = pcfast.group_layers(model)
    assert shape_of(grouped) == [
        ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"],
        ["Conv2d", "PReLU", "Flatten"],
        ["Linear", "LayerNorm", "Tanh"],
        ["Linear"],
    ]
    assert [m for group in grouped for m in group] == list(model)  # shared, not copied
    assert shape_of(pcfast.group_layers(grouped)) == shape_of(grouped)  # nested groups stay
    grouped.eval()
    x = torch.randn(BATCH, *IMAGE)
    assert torch.equal(grouped(x), model(x))


@pytest.mark.parametrize(
    ("modules", "shape"),
    [
        ([nn.Flatten(), nn.Linear(6, 3)], [["Flatten", "Linear"]]),
        ([nn.Flatten(), nn.ReLU()], [["Flatten", "ReLU"]]),
        ([nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3)], [["Linear", "ReLU"], ["Linear"]]),
        ([nn.BatchNorm1d(6), nn.Linear(6, 3)], [["BatchNorm1d", "Linear"]]),
        ([nn.Linear(6, 3), nn.RMSNorm(3), nn.Tanh()], [["Linear", "RMSNorm", "Tanh"]]),
        (
            [nn.ReLU(), seq(nn.Linear(6, 3), nn.ReLU()), nn.Tanh(), nn.Linear(3, 3)],
            [["ReLU"], ["Linear", "ReLU"], ["Tanh", "Linear"]],
        ),
    ],
)
def test_group_layers(modules, shape):
    grouped = pcfast.group_layers(seq(*modules))
    assert shape_of(grouped) == shape
    x = torch.randn(BATCH, 6)
    assert torch.equal(grouped(x), seq(*modules)(x))


def test_group_layers_keeps_a_repeated_module():
    layer = nn.Linear(6, 6)
    assert [group[0] for group in pcfast.group_layers(seq(layer, nn.Tanh(), layer))] == [layer, layer]


class OwnForward(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (nn.Sequential(), "empty"),
        (nn.Linear(2, 2), "Linear"),
        (None, "NoneType"),
        (OwnForward(nn.ReLU()), "Own"),
    ],
    ids=["empty", "layer", "None", "own-forward"],
)
def test_group_layers_refuses(model, given):
    with pytest.raises(pcfast.ModelError, match=given) as caught:
        pcfast.group_layers(model)
    assert caught.value.argument == "model"


def test_functional_dropout_is_what_the_mask_stands_for():
    """The oracle of the dropout tests: torch's layer is its mask times the input."""
    x = torch.randn(BATCH, 7, dtype=torch.float64)
    torch.manual_seed(4)
    mask = F.dropout(torch.ones_like(x), 0.4)
    torch.manual_seed(4)
    assert torch.equal(F.dropout(x, 0.4), x * mask)
