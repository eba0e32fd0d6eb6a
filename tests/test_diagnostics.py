"""What pcfast tells about a run: energies, explain, last_run; and that a run keeps to itself."""

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from accuracy import ULP, allowed_error
from literal import relax_literally
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pcfast

BACKENDS = ["reference", "eager"]
METHODS = ["exact", "fixed_prediction", "strict", "error_based", "zero_divergence"]
BATCH, CLASSES = 5, 3


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def mlp(wide=5):
    """Four PC layers; with a wide first layer the second runs in Gram form."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, wide), nn.Tanh()),
        nn.Sequential(nn.Linear(wide, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()),
        nn.Linear(4, CLASSES),
    )


def cnn():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(3, 2, 2), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(8, CLASSES),
    )


MODELS = {"mlp": (mlp, (6,)), "gram": (lambda: mlp(40), (6,)), "cnn": (cnn, (1, 7, 7))}


def problem(name):
    make, shape = MODELS[name]
    x = torch.randn(BATCH, *shape, dtype=torch.float64)
    return make().double(), x, torch.randint(0, CLASSES, (BATCH,))


# energies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), "custom"], ids=str
)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
@pytest.mark.parametrize("method", ["fixed_prediction", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_energies(name, method, num_steps, loss, backend):
    model, x, y = problem(name)
    if loss == "custom":

        def loss(output, y):
            return (output - F.one_hot(y, CLASSES)).abs().pow(1.5).sum()

    settings = {"loss": loss, "method": method, "step_size": 0.2, "num_steps": num_steps}
    truth = relax_literally(model, x, y, **settings)
    result = pcfast.relax(model, x, y, energies=True, backend=backend, **settings)
    depth = len(model)
    assert result.energies.shape == (num_steps, depth)
    assert result.energies.dtype == torch.float64
    expected = torch.tensor(truth.energies, dtype=torch.float64).reshape(num_steps, depth)
    torch.testing.assert_close(result.energies, expected, rtol=1e-9, atol=64 * ULP * max(num_steps, 1))
    if num_steps:
        assert bool((expected[0, :-1] == 0).all())  # from the forward pass no hidden layer has an error yet
        assert float(expected[0, -1]) == pytest.approx(float(result.loss))
    if num_steps == 9:
        assert bool((expected[-1, :-1] > 0).all())


@pytest.mark.parametrize("num_steps", [0, 1, 9, 30])
@pytest.mark.parametrize("method", ["fixed_prediction", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_energies_change_nothing_else(name, method, num_steps, backend):
    model, x, y = problem(name)
    settings = {"method": method, "num_steps": num_steps, "backend": backend}
    plain = pcfast.relax(model, x, y, **settings)
    recorded = pcfast.relax(model, x, y, energies=True, **settings)
    assert plain.energies is None
    gram = backend == "eager" and method == "strict" and num_steps >= 9
    assert (plain.run.plan.gram, recorded.run.plan.gram) == (gram, False)
    for l in range(1, len(model) + 1):
        v, e = plain.beliefs[l], plain.errors[l]
        assert float((recorded.beliefs[l] - v).norm()) <= allowed_error(e, v, num_steps)
        assert float((recorded.errors[l] - e).norm()) <= allowed_error(e, v, num_steps)


def test_energies_are_none_unless_asked_for(backend):
    model, x, y = problem("mlp")
    assert pcfast.relax(model, x, y, backend=backend).energies is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energies_of_lower_precisions_are_float32(dtype):
    model, x, y = problem("mlp")
    result = pcfast.relax(model.to(dtype), x.to(dtype), y, energies=True, num_steps=2, backend="eager")
    assert result.energies.dtype == torch.float32


# what relax gives back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gram", "cnn"])
def test_forward_pass_loss_and_output_gradient(name, method, backend):
    model, x, y = problem(name)
    result = pcfast.relax(model, x, y, method=method, backend=backend)
    values = [x]
    for layer in model:
        values.append(layer(values[-1]))
    values[-1].retain_grad()
    loss = F.cross_entropy(values[-1], y)
    loss.backward()
    for found, truth in zip(result.activations, values, strict=True):
        torch.testing.assert_close(found, truth.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.output_gradient, values[-1].grad, rtol=1e-12, atol=1e-15)
    assert result.loss.shape == ()
    assert not any(v.requires_grad for v in [*result.activations, *result.beliefs, result.loss])


@pytest.mark.parametrize("method", METHODS)
def test_relax_leaves_parameters_and_grad_alone(method, backend):
    model, x, y = problem("mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    held = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = held[name]
    pcfast.relax(model, x, y, method=method, backend=backend)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is held[name]
        assert bool((p.grad == 7.0).all())


class Passing(nn.Module):
    """Returns its very input."""

    def forward(self, x):
        return x


ALIASING = {
    "flatten-first": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES)),
    "identity-first": lambda: nn.Sequential(nn.Identity(), nn.Linear(6, CLASSES)),
    "passing-first": lambda: nn.Sequential(Passing(), nn.Linear(6, CLASSES)),
    "relu-first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, CLASSES)),
    "dropout-first": lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(6, CLASSES)),
    "identity-last": lambda: nn.Sequential(nn.Linear(6, CLASSES), nn.Identity()),
    "views-only": lambda: nn.Sequential(nn.Flatten(), nn.Identity()),
    "gram": lambda: nn.Sequential(nn.Linear(6, 40), nn.Linear(40, CLASSES)),
}


def tensors(*results):
    return [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    ("method", "num_steps"), [("exact", 0), *((m, n) for m in METHODS[1:] for n in (0, 1, 4))]
)
@pytest.mark.parametrize("loss", ["mse", lambda output, y: (output * y).sum()], ids=["mse", "product"])
@pytest.mark.parametrize("name", ALIASING)
def test_results_share_no_memory_with_inputs(name, loss, method, num_steps, backend):
    model = ALIASING[name]()
    outputs = 6 if name == "views-only" else CLASSES
    x, y = torch.randn(BATCH, 6), torch.randn(BATCH, outputs)
    settings = {"loss": loss, "method": method, "num_steps": num_steps, "backend": backend}
    inputs = [x, y, *model.parameters()]
    before = [value.detach().clone() for value in inputs]

    result = pcfast.relax(model, x, y, **settings)
    found = tensors(
        result.activations,
        result.beliefs,
        [e for e in result.errors if e is not None],
        result.loss,
        result.output_gradient,
    )
    if next(model.parameters(), None) is not None:
        value, output = pcfast.pc_loss(model, x, y, return_output=True, **settings)
        value.backward()
        found += [value.detach(), output, *(p.grad for p in model.parameters())]
    for tensor in found:
        tensor.zero_().add_(99)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))


@pytest.mark.parametrize("error_type", ["Exact", "FixedPred", "Strict"])
@pytest.mark.parametrize("name", ["flatten-first", "gram", "relu-first"])
def test_pcinfer_shares_beliefs_and_errors_with_nothing(name, error_type, backend):
    model = ALIASING[name]()
    x, y = torch.randn(BATCH, 6), torch.randn(BATCH, CLASSES)
    inputs = [x, y, *model.parameters()]
    before = [value.detach().clone() for value in inputs]
    _, loss, gradient, v, epsilon = pcfast.PCInfer(model, nn.MSELoss(), x, y, error_type, backend=backend)
    grads = [p.grad.clone() for p in model.parameters()]
    for tensor in tensors([e for e in [*v, *epsilon] if e is not None], loss, gradient):
        tensor.zero_().add_(99)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


# explain and last_run -------------------------------------------------------------------------------------


def test_explain_says_backend_gram_form_and_work():
    model = nn.Sequential(nn.Linear(6, 40), nn.Sequential(nn.Linear(40, 4), nn.ReLU()), nn.Linear(4, CLASSES))
    explanation = pcfast.explain(model, (BATCH, 6), num_steps=10)
    text = str(explanation)
    assert "strict (pc or spc), 10 iterations, on backend cpu" in text
    assert "reference refused: cpu comes first" in text
    assert "precision: state float32, matrix operands float32" in text
    assert "Gram form of layer 1: yes" in text
    forward = BATCH * (6 * 40 + 40 * 4 + 4 * 3)
    assert f"{forward:,} forward" in text
    assert explanation.plan.work.forward == explanation.plan.work.gradients == forward
    assert f"layer 2 (Linear - ReLU): {(BATCH, 40)} -> {(BATCH, 4)}" in text
    assert explanation.refused == {
        "cuda": "it needs a CUDA device",
        "triton": "it needs a CUDA device",
        "eager": "cpu comes first",
        "reference": "cpu comes first",
    }


def test_explain_without_gram_form_says_why():
    reasons = {
        "there is one layer only": (nn.Sequential(nn.Linear(6, 3)), {}),
        "exact has no loop": (mlp(40), {"method": "exact"}),
        "does not begin with a linear layer or a convolution: the derivative of its activation is each row's own": (
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
            {},
        ),
        "ends before it reaches layer 1": (mlp(40), {"num_steps": 2}),
        "without": (mlp(2), {}),  # the count decides
    }
    for reason, (model, settings) in reasons.items():
        text = str(pcfast.explain(model, (BATCH, 6), **settings))
        line = next(line for line in text.splitlines() if line.startswith("Gram form of layer 1: no"))
        assert reason in line


def test_explain_with_an_opaque_module_and_a_backend_by_name():
    model = nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3))
    text = str(pcfast.explain(model, (BATCH, 6), backend="reference"))
    assert "on backend reference" in text
    assert 'eager refused: backend="reference" was asked for' in text
    assert "Gram form of layer 1: no (the reference backend runs the literal loop)" in text
    assert "Softplus runs through torch autograd" in text
    assert "not known" in text
    assert "layer 3 (Linear): shape not known" in text


def test_explain_runs_nothing():
    calls = []
    model = mlp()
    model[1].register_forward_hook(lambda *_: calls.append(1))
    pcfast.explain(model, (BATCH, 6))
    assert not calls
    assert int(model[2][1].num_batches_tracked) == 0


@pytest.mark.parametrize("name", MODELS)
def test_explain_tells_what_runs(name, backend):
    model, x, y = problem(name)
    explained = pcfast.explain(model, tuple(x.shape), method="strict", num_steps=7, backend=backend).plan
    pcfast.pc_loss(model, x, y, num_steps=7, backend=backend)
    assert explained == pcfast.last_run().plan


@pytest.mark.parametrize("call", ["pc_loss", "relax", "PCInfer"])
def test_last_run(call, backend):
    model, x, y = problem("mlp")
    if call == "PCInfer":
        pcfast.PCInfer(model, nn.CrossEntropyLoss(), x, y, "Strict", n=7, backend=backend)
    else:
        getattr(pcfast, call)(model, x, y, num_steps=7, backend=backend)
    run = pcfast.last_run()
    assert (run.plan.backend, run.plan.method, run.plan.num_steps) == (backend, "strict", 7)
    assert not run.replayed
    assert "CUDA" in run.not_replayed_because


def test_last_run_belongs_to_the_thread_and_to_runs_that_ended():
    model, x, y = problem("mlp")
    result = pcfast.relax(model, x, y, num_steps=7)
    with pytest.raises(pcfast.ArgumentError):
        pcfast.relax(model, x, y, num_steps=-1)
    with torch.no_grad():
        pcfast.pc_loss(model, x, y, num_steps=5)
    assert pcfast.last_run() is result.run
    seen = ["never ran"]
    thread = threading.Thread(target=lambda: seen.append(pcfast.last_run()))
    thread.start()
    thread.join()
    assert seen[1] is None


# memory ---------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """Bytes in the storages of all tensors that operations made and that are still alive: the peak."""

    def __init__(self):
        super().__init__()
        self.peak, self._made = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        alive = {}
        kept = []
        for reference in self._made:
            tensor = reference()
            if tensor is not None:
                storage = tensor.untyped_storage()
                alive[storage.data_ptr()] = storage.nbytes()
                kept.append(reference)
        self._made = kept
        self.peak = max(self.peak, sum(alive.values()))
        return result


def peak_memory(call):
    call()  # caches fill
    with PeakMemory() as memory:
        call()
    return memory.peak


def test_the_memory_counter_counts():
    x = torch.zeros(1000)

    def loop(steps):
        kept = [x + 1 for _ in range(steps)]
        return sum(kept[1:], kept[0])

    assert peak_memory(lambda: x + 1) == 4000
    assert peak_memory(lambda: (x + 1).view(10, 100)) == 4000
    assert peak_memory(lambda: loop(30)) >= 30 * 4000


@pytest.mark.parametrize("method", ["fixed_prediction", "strict"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_does_not_grow_with_the_number_of_iterations(name, method, backend):
    model, x, y = problem(name)
    few, many = (
        peak_memory(lambda n=n: pcfast.pc_loss(model, x, y, method=method, num_steps=n, backend=backend))
        for n in (10, 60)
    )
    assert few == many
    assert few > sum(p.numel() for p in model.parameters()) * 8  # at least the updates


@pytest.mark.parametrize("name", MODELS)
def test_nothing_stays_behind(name, backend):
    """What a step made dies with its results, without the garbage collector."""
    model, x, y = problem(name)
    with PeakMemory() as memory:
        result = pcfast.relax(model, x, y, backend=backend)
        del result
        torch.zeros(1)
        alive = [tensor for reference in memory._made if (tensor := reference()) is not None]
    buffers = list(model.buffers())  # running statistics, moved in place
    assert not [tensor for tensor in alive if not any(tensor is buffer for buffer in buffers)]
