"""A known model is recognised while only values change, and whatever else changes is noticed."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcfast
from pcfast.model import module_state
from pcfast.model.describe import SETTINGS, describe
from pcfast.model.snapshot import snapshot
from pcfast.problem.settings import Settings
from pcfast.relaxation.solve import prepare
from pcfast.support import cpu_module


@pytest.fixture(autouse=True, params=["native", "python"])
def _comparison(request, monkeypatch):
    """Compiled, and as it is without a compiler."""
    if request.param == "python":
        monkeypatch.setattr(module_state, "_native", lambda: None)
    elif module_state._native() is None:
        pytest.skip(cpu_module.load_error())


class Doubling(nn.Linear):
    """A class of its own: autograd runs it."""

    def forward(self, v):
        return 2 * super().forward(v)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.LeakyReLU(0.1)),
        nn.Sequential(Doubling(6, 6), nn.Dropout(0.5)),
        nn.Linear(6, 3),
    )
    model[2].note = "an attribute that nobody reads"
    return model.eval()


def swapped(model):
    model[0][0].weight, model[1][0].weight = model[1][0].weight, model[0][0].weight


def reordered(model):
    first, second, last = model
    for name, layer in zip("012", (second, first, last), strict=True):
        model._modules[name] = layer


def wider(model):
    model[2].weight.data, model[2].bias.data = torch.randn(4, 6), torch.randn(4)


def hooks_of_old_are_dropped(model):
    model[2]._forward_hooks = type(model[2]._forward_hooks)()
    model[2].register_forward_hook(lambda module, given, output: 3 * output)


def moved_across_a_border(model):
    model[0].add_module("moved", model[1][0])
    del model[1][0]


def a_forward_for_an_attribute(model):
    del model[2].note
    model[2].forward = lambda v: F.linear(v, 3 * model[2].weight)


def other_attributes(model):
    model[2].__dict__ = dict(model[2].__dict__)
    snapshot(model)
    model[2].forward = lambda v: F.linear(v, 3 * model[2].weight)


CHANGES = {
    "a parameter": lambda m: setattr(m[2], "weight", nn.Parameter(torch.randn(3, 6))),
    "parameters swapped": swapped,
    "a bias less": lambda m: setattr(m[2], "bias", None),
    "a parameter more": lambda m: m[1][0].register_parameter("scale", nn.Parameter(torch.ones(6))),
    "a parameter frozen": lambda m: m[2].weight.requires_grad_(False),
    "shapes in place": wider,
    "a dtype in place": lambda m: m.double(),
    "a buffer": lambda m: setattr(m[0][1], "running_mean", torch.ones(6)),
    "a buffer more": lambda m: m[2].register_buffer("seen", torch.zeros(1)),
    "the mode": lambda m: m.train(),
    "a slope": lambda m: setattr(m[0][2], "negative_slope", 0.7),
    "a layer": lambda m: m.__setitem__(2, nn.Linear(6, 3)),
    "a layer more": lambda m: m.append(nn.Linear(3, 3)),
    "a layer less": lambda m: m.pop(2),
    "the order": reordered,
    "an inner module": lambda m: m[0].__setitem__(2, nn.Tanh()),
    "a name": lambda m: m._modules.__setitem__("last", m._modules.pop("2")),
    "a class": lambda m: setattr(m[2], "__class__", Doubling),
    "a forward": lambda m: setattr(m[2], "forward", lambda v: F.linear(v, 3 * m[2].weight)),
    "a forward for an attribute": a_forward_for_an_attribute,
    "a forward in other attributes": other_attributes,
    "a layer moved across a border": moved_across_a_border,
    "a layer in a layer": lambda m: m[2].add_module("aux", nn.Linear(2, 2)),
    "a hook": lambda m: m[2].register_forward_hook(lambda module, given, output: 3 * output),
    "a hook among others": hooks_of_old_are_dropped,
    "a hook before": lambda m: m[0].register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    "a hook backward": lambda m: m[2].register_full_backward_hook(lambda *_: None),
}  # fmt: skip


def updates(model, x, y):
    model.zero_grad()
    torch.manual_seed(3)
    pcfast.pc_loss(model, x, y, backend="eager").backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change):
    model = net()
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    for _ in range(2):
        updates(model, x, y)
    known = snapshot(model)
    assert snapshot(model) is known
    change(model)
    assert snapshot(model) is not known
    x = x.to(model[2].weight.dtype) if len(model) > 2 else x
    noticed = updates(model, x, y)
    vars(model).pop("_pcfast_snapshot", None)  # nothing is known
    for ours, theirs in zip(noticed, updates(model, x, y), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_a_hook_on_every_module_is_noticed():
    model = net()
    prepare(model, torch.randn(5, 6), torch.zeros(5, dtype=torch.long), Settings())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(pcfast.ModelError, match="hooks on every module"):
            snapshot(model)
    finally:
        handle.remove()


def test_values_and_memory_may_change():
    model = net()
    known = snapshot(model)
    layout = known.layout
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    assert snapshot(model) is known and known.layout is layout
    model[2].weight.data = model[2].weight.data.clone()
    assert snapshot(model) is known and known.layout != layout
    moved = known.layout
    model[0][0].weight.data = model[0][0].weight.data.t()  # the same memory, read another way
    assert snapshot(model) is known and known.layout != moved


EXAMPLES = {
    **dict.fromkeys(SETTINGS, ()),
    nn.Linear: (4, 4), nn.Conv2d: (4, 4, 3), nn.MaxPool2d: ([2, 2],), nn.AvgPool2d: (2,), nn.AdaptiveAvgPool2d: (2,),
    nn.Unflatten: (1, (2, 2)), nn.BatchNorm1d: (4,), nn.BatchNorm2d: (4,), pcfast.Scale: (2.0,),
}  # fmt: skip

OTHERS = {"padding": (1, 1), "padding_mode": "reflect", "approximate": "tanh", "unflattened_size": (1, 4)}


def other(name, value):
    """A value that an attribute does not have."""
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool) or value is None:
        return 7 if value is None else not value
    if isinstance(value, tuple | list):
        return type(value)(entry + 1 for entry in value)
    return value + 1


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_what_describes_a_module_is_compared(kind):
    """Of every attribute by which a description changes the snapshot notices the change."""
    module = kind(*EXAMPLES[kind])
    model = nn.Sequential(module)
    public = [name for name in vars(module) if not name.startswith("_")]
    decisive = set()
    for name in public:
        known, before = snapshot(model), describe(model)
        kept = getattr(module, name)
        setattr(module, name, other(name, kept))
        try:
            after = describe(model)
        except RuntimeError:  # a shape that torch itself refuses
            after = None
        if after != before:
            decisive.add(name)
            assert not known.holds(model), name
        setattr(module, name, kept)
        assert snapshot(model).holds(model)
    assert decisive <= set(SETTINGS[kind])


@pytest.mark.parametrize(
    "change",
    [lambda pool: pool.kernel_size.__setitem__(0, 3), lambda pool: setattr(pool, "stride", 1.0)],
    ids=["inside a list", "of its type"],
)
def test_a_setting_that_changes_is_noticed(change):
    model = nn.Sequential(nn.MaxPool2d([2, 2], stride=1))
    known = snapshot(model)
    assert known.holds(model)
    change(model[0])
    assert not known.holds(model)


def without_registering(model):
    weight = model[1].weight
    del model[1].weight
    model[1].weight = weight.detach()


@pytest.mark.parametrize(
    "make",
    [
        without_registering,
        lambda m: setattr(m[0], "forward", m[0].forward),
        lambda m: m[0].register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "1", nn.MaxPool2d(np.array([1, 1]))),
    ],
    ids=["a weight as an attribute", "a forward of its own", "a hook", "a setting that is an array"],
)
def test_what_cannot_be_compared_is_described_in_every_call(make):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    make(model)
    assert not snapshot(model).reusable and snapshot(model) is not snapshot(model)


def refers_to_itself(model):
    model[2].weight.register_hook(lambda gradient: gradient / len(model))


@pytest.mark.parametrize(
    "tie", [lambda model: None, refers_to_itself], ids=["plain", "that refers to itself"]
)
def test_a_snapshot_keeps_no_model_alive(tie):
    """A plain one goes with its last reference, as without a snapshot."""
    model = net()
    tie(model)
    snapshot(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        if tie is refers_to_itself:
            gc.collect()
        assert gone() is None
    finally:
        gc.enable()


def test_what_functional_call_puts_in_is_not_kept():
    model = net()
    tensors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    gone = [weakref.ref(tensor) for tensor in tensors.values()]
    pc = pcfast.PredictiveCoding(model)
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    torch.func.functional_call(pc, tensors, (torch.randn(5, 6), torch.randint(0, 3, (5,))))
    del tensors
    gc.collect()
    assert not any(tensor() is not None for tensor in gone)


def test_copies_are_other_models():
    model = net()
    known = snapshot(model)
    for copied in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert snapshot(copied) is not known and snapshot(copied) is snapshot(copied)
    assert b"pcfast" not in pickle.dumps(nn.Sequential(model[2])).replace(b"_pcfast_snapshot", b"")
    assert snapshot(model) is known


CALLS = {
    "settings": dict(num_steps=7),
    "a bool for a number": dict(normalizer=True, error=pcfast.ArgumentError),
    "a float for an int": dict(num_steps=20.0, error=pcfast.ArgumentTypeError),
    "a schedule with a bool": dict(step_size=(0.1, True), num_steps=2, error=pcfast.ArgumentTypeError),
    "a loss": dict(loss="mse", y=torch.randn(5, 3)),
    "labels that are probabilities": dict(y=torch.rand(5, 3)),
    "rows": dict(x=torch.randn(4, 6), error=pcfast.ShapeError),
    "a dtype": dict(x=torch.randn(5, 6).double(), error=pcfast.ArgumentTypeError),
    "an input that requires grad": dict(x=torch.randn(5, 6).requires_grad_(), error=pcfast.ArgumentError),
    "a target that requires grad": dict(
        y=torch.rand(5, 3).requires_grad_(), error=pcfast.ArgumentError
    ),
    "an input that is no tensor": dict(x=[[1.0]], error=pcfast.ArgumentTypeError),
    "an infinite input": dict(x=torch.full((5, 6), float("inf")), error=pcfast.NonFiniteError),
    "a label out of range": dict(y=torch.full((5,), 3), error=pcfast.ArgumentError),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_another_kind_of_call_is_validated(case):
    """What a first call accepts decides nothing about one that differs."""
    model = net()
    first = {"x": torch.randn(5, 6), "y": torch.randint(0, 3, (5,))}
    pcfast.pc_loss(model, **first)
    pcfast.pc_loss(model, **first, step_size=(0.1, 1.0), num_steps=2)
    error, given = case.get("error"), {**first, **{k: v for k, v in case.items() if k != "error"}}
    if error:
        with pytest.raises(error):
            pcfast.pc_loss(model, **given)
        return
    torch.manual_seed(1)
    ours = pcfast.pc_loss(model, **given)
    torch.manual_seed(1)
    assert torch.equal(ours, pcfast.pc_loss(copy.deepcopy(model), **given))


def test_a_schedule_that_changes_inside_is_noticed():
    model = net()
    sizes = torch.full((20,), 0.1)
    given = model, torch.randn(5, 6), torch.randint(0, 3, (5,))
    pcfast.pc_loss(*given, step_size=sizes)
    sizes[3] = float("nan")
    with pytest.raises(pcfast.ArgumentError, match="step_size"):
        pcfast.pc_loss(*given, step_size=sizes)


def test_autocast_is_noticed():
    model = net()
    given = torch.randn(5, 6), torch.randint(0, 3, (5,)), Settings()
    plans = [prepare(model, *given)[1]]
    with torch.autocast("cpu", torch.bfloat16):
        plans.append(prepare(model, *given)[1])
    plans.append(prepare(model, *given)[1])
    assert plans[0].precision.operand == torch.float32 and plans[1].precision.operand == torch.bfloat16
    assert plans[2] is plans[0]
