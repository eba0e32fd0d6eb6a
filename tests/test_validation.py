"""Bad input: one specific exception that names the argument, what was given and what is needed; .grad untouched."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcfast

BATCH, INPUTS, CLASSES = 4, 6, 3


def net(**kwargs):
    return nn.Sequential(
        nn.Sequential(nn.Linear(INPUTS, 5, **kwargs), nn.ReLU()),
        nn.Linear(5, CLASSES, **kwargs),
    )


def pc_loss(model, x, y, **arguments):
    return pcfast.pc_loss(model, x, y, **arguments)


def relax(model, x, y, **arguments):
    return pcfast.relax(model, x, y, **arguments)


def pc_infer(model, x, y, *, loss="cross_entropy", method="strict", step_size=0.1, num_steps=20, **arguments):
    names = {"exact": "Exact", "fixed_prediction": "FixedPred", "strict": "Strict"}
    return pcfast.PCInfer(model, loss, x, y, names[method], eta=step_size, n=num_steps, **arguments)


#: the drop-in names arguments as its caller wrote them
TORCH2PC_WORDS = {"x": "X", "y": "Y", "loss": "LossFun", "step_size": "eta", "num_steps": "n"}
ENTRIES = [pc_loss, relax, pc_infer]
BACKENDS = ["eager", "reference"]


@pytest.fixture(params=ENTRIES, ids=lambda entry: entry.__name__)
def entry(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def good(**changes):
    """Arguments of a call that works, with changes."""
    x = torch.randn(BATCH, INPUTS)
    y = torch.arange(BATCH) % CLASSES
    return {"model": net(), "x": x, "y": y, **changes}


def refused(entry, kind, argument, *words, **arguments):
    """Call, and check the exception's class, argument and words and that .grad is as before."""
    arguments = {**good(), **arguments}
    if entry is pc_infer:
        argument = TORCH2PC_WORDS.get(argument, argument)
    model = arguments["model"]
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    held = {}
    for p in parameters:
        if not (nn.parameter.is_lazy(p) or p.is_meta):
            p.grad = torch.full_like(p, 7.0)
            held[p] = p.grad
    with pytest.raises(kind) as caught:
        entry(**arguments)
    assert type(caught.value) is kind
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument}: got ")
    for word in words:
        assert word in str(caught.value)
    for p, grad in held.items():
        assert p.grad is grad
        assert bool((grad == 7.0).all())
    return caught.value


def test_the_good_call_works(entry, backend):
    entry(**good(), backend=backend)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda x: x.double(), pcfast.ArgumentTypeError, ("float64", "float32")),
        (lambda x: x.half(), pcfast.ArgumentTypeError, ("float16", "float32")),
        (lambda x: x.long(), pcfast.ArgumentTypeError, ("int64", "floating")),
        (lambda x: x > 0, pcfast.ArgumentTypeError, ("bool", "floating")),
        (lambda x: x.numpy(), pcfast.ArgumentTypeError, ("ndarray", "torch.Tensor")),
        (lambda x: x.tolist(), pcfast.ArgumentTypeError, ("list", "torch.Tensor")),
        (lambda x: None, pcfast.ArgumentTypeError, ("NoneType", "torch.Tensor")),
        (lambda x: x[0], pcfast.ShapeError, ("(6,)", "2 dimensions")),
        (lambda x: x[0, 0], pcfast.ShapeError, ("()", "2 dimensions")),
        (lambda x: x[:0], pcfast.ShapeError, ("(0, 6)", "empty batch")),
        (lambda x: x[:, :0], pcfast.ShapeError, ("(4, 0)",)),
        (lambda x: x[:, :5], pcfast.ShapeError, ("(4, 5)", "layer 1", "Linear", "6")),
        (lambda x: x.to_sparse(), pcfast.ArgumentTypeError, ("sparse", "dense")),
        (lambda x: x.to("meta"), pcfast.ArgumentError, ("meta", "cpu")),
        (lambda x: x.clone().requires_grad_(), pcfast.ArgumentError, ("requires grad", "detach")),
    ],
    ids=[
        "float64",
        "float16",
        "int64",
        "bool",
        "numpy",
        "list",
        "None",
        "1-D",
        "0-D",
        "empty-batch",
        "no-features",
        "features",
        "sparse",
        "meta",
        "requires-grad",
    ],
)
def test_x(entry, make, kind, words):
    refused(entry, kind, "x", *words, x=make(torch.randn(BATCH, INPUTS)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_x_not_finite(entry, backend, value):
    x = torch.randn(BATCH, INPUTS)
    x[2, 3] = x[3, 0] = value
    refused(
        entry,
        pcfast.NonFiniteError,
        "x",
        "NaN or infinity in row 2 and 1 more",
        "finite",
        x=x,
        backend=backend,
    )


def test_meta_model_with_cpu_input(entry):
    refused(entry, pcfast.ArgumentError, "x", "a tensor on cpu", "meta", model=net(device="meta"))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda y: y[:3], pcfast.ShapeError, ("3 rows", "4 rows")),
        (lambda y: y.to("meta"), pcfast.ArgumentError, ("meta", "cpu")),
        (lambda y: y.int(), pcfast.ArgumentTypeError, ("int32", "int64")),
        (lambda y: y > 0, pcfast.ArgumentTypeError, ("bool", "int64")),
        (lambda y: y.tolist(), pcfast.ArgumentTypeError, ("list", "torch.Tensor")),
        (lambda y: y.float(), pcfast.ShapeError, ("(4,)", "(4, 3)")),
        (lambda y: y.unsqueeze(1), pcfast.ShapeError, ("(4, 1)", "(4,)")),
        (lambda y: F.one_hot(y, CLASSES), pcfast.ShapeError, ("(4, 3)", "(4,)")),
        (lambda y: torch.tensor(1), pcfast.ShapeError, ("()", "(4,)")),
        (lambda y: torch.rand(BATCH, 2), pcfast.ShapeError, ("(4, 2)", "(4, 3)")),
    ],
    ids=["rows", "meta", "int32", "bool", "list", "float", "column", "one-hot", "0-D", "probabilities"],
)
def test_labels(entry, backend, make, kind, words):
    refused(entry, kind, "y", *words, y=make(torch.arange(BATCH) % CLASSES), backend=backend)


@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
@pytest.mark.parametrize("label", [-1, CLASSES, 10**6])
def test_labels_out_of_range(entry, backend, method, label):
    y = torch.tensor([0, 1, label, 2])
    lowest, highest = int(y.min()), int(y.max())
    words = (f"labels from {lowest} to {highest}", "labels from 0 to 2 for 3 classes")
    refused(entry, pcfast.ArgumentError, "y", *words, y=y, method=method, backend=backend)


def test_labels_out_of_range_under_no_grad():
    with torch.no_grad():
        refused(pc_loss, pcfast.ArgumentError, "y", "labels from 0 to 9", y=torch.tensor([0, 9, 1, 2]))


@pytest.mark.parametrize(
    ("y", "kind", "words"),
    [
        (torch.zeros(BATCH, 2), pcfast.ShapeError, ("(4, 2)", "(4, 3)")),
        (torch.zeros(BATCH), pcfast.ShapeError, ("(4,)", "(4, 3)")),
        (torch.zeros(1, CLASSES), pcfast.ShapeError, ("1 rows", "4 rows")),
        (torch.tensor(0.0), pcfast.ShapeError, ("()", "(4, 3)")),
        (torch.zeros(BATCH, CLASSES, dtype=torch.long), pcfast.ArgumentTypeError, ("int64", "floating")),
    ],
    ids=["columns", "vector", "broadcast", "0-D", "int64"],
)
def test_mse_target(entry, backend, y, kind, words):
    refused(
        entry, kind, "y", *words, y=y, loss="mse" if entry is not pc_infer else nn.MSELoss(), backend=backend
    )


@pytest.mark.parametrize("method", ["fixed_prediction", "strict"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (-1, pcfast.ArgumentError),
        (np.int32(-2), pcfast.ArgumentError),
        (2.0, pcfast.ArgumentTypeError),
        (np.float64(2), pcfast.ArgumentTypeError),
        (True, pcfast.ArgumentTypeError),
        (np.bool_(True), pcfast.ArgumentTypeError),
        ("2", pcfast.ArgumentTypeError),
        ([2], pcfast.ArgumentTypeError),
    ],
    ids=repr,
)
def test_num_steps(entry, method, value, kind):
    given = str(value) if kind is pcfast.ArgumentError else repr(value)
    refused(entry, kind, "num_steps", given, "an int >= 0", num_steps=value, method=method)


@pytest.mark.parametrize("method", ["fixed_prediction", "strict"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (-0.1, pcfast.ArgumentError),
        (float("nan"), pcfast.ArgumentError),
        (float("inf"), pcfast.ArgumentError),
        (np.float32("nan"), pcfast.ArgumentError),
        (10**400, pcfast.ArgumentError),
        ("0.1", pcfast.ArgumentTypeError),
        (True, pcfast.ArgumentTypeError),
        (np.bool_(True), pcfast.ArgumentTypeError),
        (None, pcfast.ArgumentTypeError),
        (0.1j, pcfast.ArgumentTypeError),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_step_size(entry, method, value, kind):
    refused(entry, kind, "step_size", "number >= 0", step_size=value, method=method)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("step_size", [1e39, (0.1, 1e300)])
def test_step_sizes_beyond_the_states_dtype(step_size, backend):
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2))
    with pytest.raises(
        pcfast.ArgumentError, match=r"step_size: got 1e\+.*, infinite in torch.float32; needed: at most"
    ):
        pcfast.relax(model, x, y, step_size=step_size, num_steps=2, backend=backend)
    # where it is a number, the relaxation says what became of it
    with pytest.raises(pcfast.RelaxationDiverged):
        pcfast.relax(model.double(), x.double(), y, step_size=1e300, num_steps=20, backend=backend)


@pytest.mark.parametrize("num_steps", [3, np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
@pytest.mark.parametrize("step_size", [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5)], ids=repr)
def test_numpy_scalars_are_accepted(entry, num_steps, step_size):
    arguments = good()
    entry(**arguments, num_steps=num_steps, step_size=step_size)
    result = pcfast.relax(**arguments, num_steps=num_steps, step_size=step_size)
    plain = pcfast.relax(**arguments, num_steps=3, step_size=0.5)
    assert all(torch.equal(a, b) for a, b in zip(result.beliefs, plain.beliefs, strict=True))
    assert type(result.run.plan.num_steps) is int


def test_integer_step_sizes_are_accepted(entry):
    entry(**good(), step_size=1)
    entry(**good(), step_size=0)


@pytest.mark.parametrize("name", ["method", "backend", "loss", "check"])
@pytest.mark.parametrize("value", ["nonsense", "Strict ", ""])
@pytest.mark.parametrize("call", [pc_loss, relax], ids=["pc_loss", "relax"])
def test_unknown_names(call, name, value):
    refused(call, pcfast.ArgumentError, name, repr(value), "one of", **{name: value})


@pytest.mark.parametrize("name", ["method", "backend", "check"])
@pytest.mark.parametrize("value", [None, 3, ["strict"]], ids=repr)
@pytest.mark.parametrize("call", [pc_loss, relax], ids=["pc_loss", "relax"])
def test_names_that_are_no_strings(call, name, value):
    refused(call, pcfast.ArgumentError, name, repr(value), "one of", **{name: value})


@pytest.mark.parametrize("error_type", ["strict", "Backprop", None, ["Strict"]], ids=repr)
def test_pcinfer_unknown_error_type(error_type):
    def call(model, x, y):
        return pcfast.PCInfer(model, nn.CrossEntropyLoss(), x, y, error_type)

    refused(call, pcfast.ArgumentError, "ErrType", repr(error_type), "Strict")


@pytest.mark.parametrize("error_type", ["Exact", "FixedPred", "Strict"])
def test_pcinfer_with_a_model_that_has_no_length(error_type):
    def call(model, x, y):
        return pcfast.PCInfer(model, nn.CrossEntropyLoss(), x, y, error_type, n=None)

    refused(call, pcfast.ModelError, "model", model=nn.Linear(INPUTS, CLASSES))


def test_pcinfer_unknown_backend():
    refused(pc_infer, pcfast.ArgumentError, "backend", "'nonsense'", "reference", backend="nonsense")


# losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [3, None, torch.zeros(())], ids=["int", "None", "tensor"])
def test_loss_not_callable(entry, backend, loss):
    words = (type(loss).__name__, "callable")
    refused(entry, pcfast.ArgumentTypeError, "loss", *words, loss=loss, backend=backend)


def test_loss_class_instead_of_an_instance(entry):
    words = ("class CrossEntropyLoss", "Add ()")
    refused(entry, pcfast.ArgumentTypeError, "loss", *words, loss=nn.CrossEntropyLoss)


@pytest.mark.parametrize(
    "y", [torch.linspace(-1, 1, 7), torch.tensor(2.0), (1, 2), None, "anything"], ids=str
)
def test_y_may_be_anything_for_a_callable(entry, backend, y):
    entry(**good(y=y), loss=lambda output, y: output.square().sum(), backend=backend)


@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "shape (4,)"),
        (lambda output, y: output.sum(0), "shape (3,)"),
        (lambda output, y: 1.0, "float"),
        (lambda output, y: None, "NoneType"),
    ],
    ids=["none", "vector", "float", "None"],
)
def test_loss_not_scalar(entry, backend, method, loss, given):
    refused(entry, pcfast.ArgumentError, "loss", given, "scalar", loss=loss, method=method, backend=backend)


@pytest.mark.parametrize("method", ["exact", "fixed_prediction", "strict"])
@pytest.mark.parametrize(
    "loss",
    [lambda output, y: torch.ones(()), lambda output, y: output.detach().sum()],
    ids=["constant", "detached"],
)
def test_loss_independent_of_the_output(entry, backend, method, loss):
    words = ("does not depend on the model's output", "differentiable")
    refused(entry, pcfast.ArgumentError, "loss", *words, loss=loss, method=method, backend=backend)


def test_loss_of_something_else_that_requires_grad(entry, backend):
    weight = torch.ones((), requires_grad=True)

    def loss(output, y):
        return weight * 2

    refused(entry, pcfast.ArgumentError, "loss", "does not depend", loss=loss, backend=backend)
    assert weight.grad is None


@pytest.mark.parametrize("call", [pc_loss, relax], ids=["pc_loss", "relax"])
@pytest.mark.parametrize("value", [0, -3, 1.5, True, "4"], ids=repr)
def test_normalizer(call, value):
    refused(call, pcfast.ArgumentError, "normalizer", repr(value), "positive int", normalizer=value)


@pytest.mark.parametrize("call", [pc_loss, relax], ids=["pc_loss", "relax"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        lambda output, y: F.cross_entropy(output, y),
        nn.CrossEntropyLoss(weight=torch.ones(CLASSES)),
        nn.CrossEntropyLoss(ignore_index=0),
    ],
    ids=["sum", "callable", "weights", "ignore_index"],
)
def test_normalizer_needs_a_mean_over_rows(call, loss):
    refused(call, pcfast.ArgumentError, "normalizer", "mean", loss=loss, normalizer=8)


def test_energies_with_exact():
    refused(
        relax,
        pcfast.ArgumentError,
        "energies",
        "True",
        "method with iterations",
        energies=True,
        method="exact",
    )


# models ---------------------------------------------------------------------------------------------------


class OwnForward(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class OwnModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, CLASSES)

    def forward(self, x):
        return self.layer(x)


def _frozen_dtype():
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Linear(5, CLASSES).double())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nn.Sequential, ("empty", "at least one layer")),
        (OwnModule, ("OwnModule", "nn.Sequential")),
        (lambda: nn.Linear(INPUTS, CLASSES), ("Linear", "nn.Sequential")),
        (lambda: nn.ModuleList([nn.Linear(INPUTS, CLASSES)]), ("ModuleList", "nn.Sequential")),
        (lambda: None, ("NoneType", "nn.Sequential")),
        (lambda: OwnForward(nn.Linear(INPUTS, CLASSES)), ("OwnForward", "overrides", "element by element")),
        (_frozen_dtype, ("0.weight", "float32", "1.weight", "float64")),
        (
            lambda: nn.Sequential(nn.Linear(INPUTS, 5), nn.Linear(5, CLASSES, device="meta")),
            ("0.weight", "cpu", "1.weight", "meta"),
        ),
        (lambda: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, CLASSES)), ("0.weight", "initialised")),
    ],
    ids=["empty", "module", "layer", "list", "None", "own-forward", "dtypes", "devices", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_models(entry, make, words):
    refused(entry, pcfast.ModelError, "model", *words, model=make())


def test_a_subclass_that_keeps_the_forward_is_fine(entry):
    class Named(nn.Sequential):
        pass

    entry(**good(model=Named(*net())))


@pytest.mark.parametrize("call", [pc_loss, pcfast.PredictiveCoding], ids=["pc_loss", "PredictiveCoding"])
def test_model_without_parameters(call):
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    if call is pc_loss:
        refused(call, pcfast.ModelError, "model", "without parameters", model=model)
    else:
        pc = pcfast.PredictiveCoding(model)
        refused(lambda model, x, y: pc(x, y), pcfast.ModelError, "model", "without parameters", model=model)


def test_relax_needs_no_parameters():
    result = pcfast.relax(**good(model=nn.Sequential(nn.Flatten(), nn.ReLU()), y=torch.zeros(BATCH).long()))
    assert len(result.beliefs) == 3


@pytest.mark.parametrize(
    ("layers", "argument", "words"),
    [
        (
            [nn.Linear(INPUTS, 5), nn.Sequential(nn.Linear(4, 3), nn.ReLU())],
            "model",
            ("(4, 5)", "Linear", "layer 2"),
        ),
        ([nn.Linear(INPUTS, 5), nn.Conv2d(1, 2, 3)], "model", ("(4, 5)", "Conv2d", "layer 2", "(batch, 1,")),
        ([nn.Linear(INPUTS, 5), nn.MaxPool2d(2)], "model", ("(4, 5)", "MaxPool2d", "layer 2")),
        (
            [nn.Linear(INPUTS, 5), nn.AdaptiveAvgPool2d(2)],
            "model",
            ("(4, 5)", "AdaptiveAvgPool2d", "layer 2"),
        ),
        ([nn.Linear(INPUTS, 5), nn.BatchNorm1d(4)], "model", ("(4, 5)", "BatchNorm1d", "layer 2")),
        ([nn.Linear(INPUTS, 5), nn.BatchNorm2d(5)], "model", ("(4, 5)", "BatchNorm2d", "layer 2")),
        ([nn.Linear(INPUTS, 5), nn.Unflatten(1, (2, 2))], "model", ("(4, 5)", "Unflatten", "layer 2")),
        ([nn.Flatten(0), nn.Linear(24, 3)], "x", ("(4, 6)", "Flatten", "layer 1", "start_dim")),
        ([nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 3)], "model", ("(4, 1, 2, 3)", "Conv2d", "layer 2")),
        ([nn.Unflatten(1, (1, 2, 3)), nn.MaxPool2d(4)], "model", ("(4, 1, 2, 3)", "MaxPool2d", "layer 2")),
    ],
    ids=[
        "linear",
        "conv",
        "max-pool",
        "adaptive",
        "batchnorm1d",
        "batchnorm2d",
        "unflatten",
        "flatten",
        "kernel",
        "window",
    ],
)
def test_layer_shapes(entry, backend, layers, argument, words):
    model = nn.Sequential(*layers)
    model.append(nn.Linear(3, 3))
    refused(entry, pcfast.ShapeError, argument, *words, model=model, backend=backend)


def one_row(first, backend):
    model = nn.Sequential(nn.Sequential(first, nn.Linear(INPUTS, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3))
    return {"model": model, "x": torch.randn(1, INPUTS), "y": torch.zeros(1).long(), "backend": backend}


def test_batchnorm_with_one_value_per_channel(entry, backend):
    arguments = one_row(nn.Identity(), backend)
    words = ("(1, 5)", "BatchNorm1d in layer 2", "more than one value per channel", "model.eval()")
    refused(entry, pcfast.ShapeError, "model", *words, **arguments)
    assert int(arguments["model"][1].num_batches_tracked) == 0
    arguments["model"].eval()
    entry(**arguments)


def test_batchnorm_with_one_value_per_channel_behind_an_opaque_module(entry):
    arguments = one_row(nn.Softplus(), "eager")
    words = ("one value per channel", "more than one value", "BatchNorm", "model.eval()")
    refused(entry, pcfast.ShapeError, "x", *words, **arguments)
    assert int(arguments["model"][1].num_batches_tracked) == 0


@pytest.mark.parametrize("call", [pc_loss, relax], ids=["pc_loss", "relax"])
def test_layer_that_returns_no_tensor(call, backend):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(Pair(), nn.Linear(INPUTS, CLASSES))
    refused(
        call, pcfast.ModelError, "model", "tuple", "one tensor to one tensor", model=model, backend=backend
    )


# vinit ----------------------------------------------------------------------------------------------------


def test_vinit_with_another_method(entry):
    arguments = good()
    start = pcfast.relax(**arguments).beliefs
    for method in ("exact", "fixed_prediction"):
        refused(
            entry,
            pcfast.ArgumentError,
            "vinit",
            method,
            "strict",
            **arguments,
            vinit=start,
            method=method,
        )


@pytest.mark.parametrize(
    ("change", "kind", "argument", "words"),
    [
        (lambda v: v[:-1], pcfast.ArgumentError, "vinit", ("2 entries", "3 beliefs")),
        (lambda v: [*v, None], pcfast.ArgumentError, "vinit", ("4 entries", "3 beliefs")),
        (lambda v: v[1], pcfast.ArgumentError, "vinit", ("Tensor", "3 beliefs")),
        (lambda v: [v[0] + 1, *v[1:]], pcfast.ArgumentError, "vinit[0]", ("differ from x",)),
        (lambda v: [v[0][:2], *v[1:]], pcfast.ArgumentError, "vinit[0]", ("x itself or None",)),
        (lambda v: [None, v[1][:, :4], None], pcfast.ShapeError, "vinit[1]", ("(4, 4)", "(4, 5)")),
        (lambda v: [None, v[1][:1], None], pcfast.ShapeError, "vinit[1]", ("(1, 5)", "4 rows")),
        (lambda v: [None, v[1][0, 0], None], pcfast.ShapeError, "vinit[1]", ("()", "4 rows")),
        (lambda v: [None, None, v[2][:, :1]], pcfast.ShapeError, "vinit[2]", ("(4, 1)", "(4, 3)")),
        (lambda v: [None, v[1].tolist(), None], pcfast.ArgumentTypeError, "vinit[1]", ("list", "tensor")),
        (lambda v: [None, v[1].to("meta"), None], pcfast.ArgumentError, "vinit[1]", ("meta", "cpu")),
    ],
    ids=["short", "long", "tensor", "v0", "v0-rows", "columns", "broadcast", "0-D", "output", "list", "meta"],
)
def test_vinit(entry, backend, change, kind, argument, words):
    arguments = good()
    start = change(pcfast.relax(**arguments).beliefs)
    refused(entry, kind, argument, *words, **arguments, vinit=start, backend=backend)


def test_vinit_not_finite(entry, backend):
    start = [None, torch.full((BATCH, 5), float("nan")), None]
    refused(entry, pcfast.NonFiniteError, "vinit[1]", "NaN or infinity", vinit=start, backend=backend)


# other entries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "argument"),
    [
        ({"x_shape": (4, 5)}, pcfast.ShapeError, "x"),
        ({"x_shape": (6,)}, pcfast.ShapeError, "x_shape"),
        ({"x_shape": (0, 6)}, pcfast.ShapeError, "x_shape"),
        ({"x_shape": 6}, pcfast.ArgumentTypeError, "x_shape"),
        ({"x_shape": ("a", 6)}, pcfast.ArgumentTypeError, "x_shape"),
        ({"method": "nonsense"}, pcfast.ArgumentError, "method"),
        ({"backend": "nonsense"}, pcfast.ArgumentError, "backend"),
        ({"num_steps": -1}, pcfast.ArgumentError, "num_steps"),
        ({"num_steps": 2.0}, pcfast.ArgumentTypeError, "num_steps"),
        ({"model": nn.Linear(6, 3)}, pcfast.ModelError, "model"),
    ],
)
def test_explain(arguments, kind, argument):
    with pytest.raises(kind) as caught:
        pcfast.explain(**{"model": net(), "x_shape": (BATCH, INPUTS), **arguments})
    assert type(caught.value) is kind
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("call", "argument", "kind"),
    [
        (lambda m, v, g: pcfast.torch2pc.FixedPredPCPredErrs(m, v[:-1], g), "vhat", pcfast.ArgumentError),
        (lambda m, v, g: pcfast.torch2pc.FixedPredPCPredErrs(m, v, g[:, :2]), "dLdy", pcfast.ShapeError),
        (lambda m, v, g: pcfast.torch2pc.FixedPredPCPredErrs(m, v, g.tolist()), "dLdy", pcfast.ShapeError),
        (
            lambda m, v, g: pcfast.torch2pc.ExactPredErrs(m, "mse", v[0], g, [v[0], None, v[2]]),
            "vhat[1]",
            pcfast.ArgumentError,
        ),
        (
            lambda m, v, g: pcfast.torch2pc.StrictPCPredErrs(m, v[1:], "mse", g, 0.1, 2),
            "vinit",
            pcfast.ArgumentError,
        ),
        (lambda m, v, g: pcfast.torch2pc.SetPCGrads(m, v[:-1], v[0]), "epsilon", pcfast.ArgumentError),
        (lambda m, v, g: pcfast.torch2pc.SetPCGrads(m, v, v[0], [v[0]]), "v", pcfast.ArgumentError),
        (
            lambda m, v, g: pcfast.torch2pc.SetPCGrads(m, [None, v[1][:, :2], v[2]], v[0], v),
            "epsilon[1]",
            pcfast.ShapeError,
        ),
        (
            lambda m, v, g: pcfast.torch2pc.SetPCGrads(m, v, v[0], [v[0], v[1][:, :2], v[2]]),
            "v[1]",
            pcfast.ShapeError,
        ),
    ],
)
def test_torch2pc_parts(call, argument, kind):
    model = net()
    values = [torch.randn(BATCH, size) for size in (INPUTS, 5, CLASSES)]
    held = [torch.full_like(p, 7.0) for p in model.parameters()]
    for p, grad in zip(model.parameters(), held, strict=True):
        p.grad = grad
    with pytest.raises(kind) as caught:
        call(model, values, torch.randn(BATCH, CLASSES))
    assert type(caught.value) is kind
    assert caught.value.argument == argument
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
