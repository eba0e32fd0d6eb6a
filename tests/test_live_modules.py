"""Modules that pcfast does not know run on what is live at the call (parameters, hooks, modes), or are refused."""

import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

import pcfast
from pcfast.support import cpu_module

BACKENDS = ["eager", "reference"]
METHODS = ["exact", "fixed_prediction", "strict", "error_based", "zero_divergence"]
X = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


class Reads(nn.Module):
    """Reads a weight of another module, which it does not register."""

    def __init__(self, owner):
        super().__init__()
        self.owner = [owner]

    def forward(self, a):
        return torch.tanh(F.linear(a, self.owner[0].weight))


class Recurrent(nn.Module):
    """Keeps references of its parameters in a list, as torch's recurrent layers do."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(6, 6, batch_first=True)

    def forward(self, a):
        return self.cell(a[:, None])[0][:, 0]


class Checkpointed(nn.Module):
    def __init__(self, reentrant, p=0.0):
        super().__init__()
        self.f, self.reentrant = nn.Sequential(nn.Linear(6, 6), nn.Dropout(p), nn.Tanh()), reentrant

    def forward(self, a):
        return self.f(a) if self.reentrant is None else checkpoint(self.f, a, use_reentrant=self.reentrant)


def net(make=lambda: nn.LayerNorm(6)):
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(5, 6), make()), nn.Linear(6, 3)).double()


def tied():
    torch.manual_seed(0)
    owner = nn.Linear(6, 6)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Sequential(owner, Reads(owner)), Reads(owner), nn.Linear(6, 3)
    ).double()


def check_backpropagation(model, backend, loss=F.cross_entropy, extra=()):
    """``exact`` gives what torch's own backward gives every parameter."""
    trained = [*model.parameters(), *extra]
    want = torch.autograd.grad(loss(model(X), Y), trained)
    pcfast.pc_loss(model, X, Y, loss=loss, method="exact", backend=backend).backward()
    for parameter, gradient in zip(trained, want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [tied, lambda: net(Recurrent), lambda: net(lambda: Checkpointed(False))])
def test_every_parameter_in_the_graph_gets_its_gradient(make, backend):
    check_backpropagation(make(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_parameters_act_once(method, backend):
    plain, hooked, calls = tied(), tied(), []
    for p in hooked.parameters():
        p.register_hook(lambda g: 0.5 * g)
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    for model in (plain, hooked):
        loss = pcfast.pc_loss(model, X, Y, method=method, backend=backend)
        assert not calls
        loss.backward()
    assert len(calls) == len(list(hooked.parameters()))
    for p, q in zip(plain.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, 0.5 * p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("computed", [False, True])
def test_functional_call(computed, backend):
    pc = pcfast.PredictiveCoding(net(), method="exact", backend=backend)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in pc.named_parameters()}
    lent = {name: 2 * p if computed else p for name, p in leaves.items()}
    want = torch.autograd.grad(
        F.cross_entropy(functional_call(pc, lent, (X,)), Y), list(leaves.values()), retain_graph=True
    )
    result = torch.autograd.grad(functional_call(pc, lent, (X, Y)), list(leaves.values()))
    torch.testing.assert_close(result, want)


def test_functional_transforms_are_refused():
    pc = pcfast.PredictiveCoding(net())
    values = {name: p.detach() for name, p in pc.named_parameters()}
    for transform in (torch.func.grad, lambda f: lambda p: torch.func.vjp(f, p)):
        with pytest.raises(pcfast.PcfastError, match=r"torch\.func"):
            transform(lambda p: functional_call(pc, p, (X, Y)))(values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints(method, backend):
    """Reentrant ones are refused by name; others give the same numbers, dropout's masks included."""
    with pytest.raises(pcfast.ModelError, match="use_reentrant=True"):
        pcfast.pc_loss(net(lambda: Checkpointed(True)), X, Y, method=method, backend=backend)
    result = []
    for reentrant in (None, False):
        model = net(lambda r=reentrant: Checkpointed(r, 0.5))
        torch.manual_seed(7)
        pcfast.pc_loss(model, X, Y, method=method, backend=backend).backward()
        result.append([*(p.grad for p in model.parameters()), torch.rand(3)])
    torch.testing.assert_close(*result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    model = net()
    want = pcfast.relax(model, X, Y, backend=backend)
    with torch.inference_mode():
        result = pcfast.relax(model, X.clone(), Y.clone(), backend=backend)
        made_there = net()
    torch.testing.assert_close(result.errors[1:], want.errors[1:], rtol=0, atol=0)
    with pytest.raises(pcfast.ModelError, match="inference_mode"):
        pcfast.pc_loss(made_there, X, Y, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replaced_weights_count_by_their_own_size(backend):
    model = net(lambda: nn.BatchNorm1d(6))
    norm = model[0][1]
    for owner, rows in ((model[0][0], 4), (norm, 4)):
        for name, p in list(owner.named_parameters()):
            setattr(owner, name, nn.Parameter(p.detach()[:rows]))
    norm.running_mean, norm.running_var = norm.running_mean[:4], norm.running_var[:4]
    model[1].weight = nn.Parameter(model[1].weight.detach()[:, :4])
    check_backpropagation(model, backend)


# the model's own call --------------------------------------------------------------------------------------


class Itself(nn.Sequential):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(super().__iter__()))


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_the_model_itself_are_refused(register):
    model = net()
    pc = pcfast.PredictiveCoding(model)
    handle = getattr(model, register)(lambda *_: None)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pcfast.ModelError, match="hooks itself"):
            pc(X, Y)
    handle.remove()
    pc(X, Y)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_every_module_are_refused(register):
    handle = register(lambda *_: None)
    try:
        with pytest.raises(pcfast.ModelError, match="every module"):
            pcfast.pc_loss(net(), X, Y)
    finally:
        handle.remove()
    pcfast.pc_loss(net(), X, Y)


def test_a_call_of_another_kind_is_refused_outside_and_run_inside():
    for kind in (Itself, Backwards):
        with pytest.raises(pcfast.ModelError, match=kind.__name__):
            pcfast.pc_loss(kind(nn.Linear(5, 5), nn.Linear(5, 5)).double(), X, Y)
        check_backpropagation(net(lambda k=kind: k(nn.Linear(6, 6), nn.Tanh())), "eager")


# sharded layers --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_shard_by_layer(backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = net(), net()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mesh = init_device_mesh("cpu", (1,))
                pc = pcfast.PredictiveCoding(sharded, backend=backend)
                fully_shard(sharded[0][1], mesh=mesh)
                fully_shard(sharded[0], mesh=mesh)
                with pytest.raises(pcfast.ModelError, match="fully_shard"):
                    pc(X, Y)
                fully_shard(pc, mesh=mesh)
                optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (plain, pc)]
                for _ in range(2):
                    with torch.no_grad():
                        pc(X, Y)
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    pcfast.pc_loss(plain, X, Y, backend=backend).backward()
                    pc(X, Y).backward()
                    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
                        torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=0, atol=0)
                    for optimizer in optimizers:
                        optimizer.step()
        finally:
            dist.destroy_process_group()


# losses ----------------------------------------------------------------------------------------------------


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, output, y):
        return F.cross_entropy(output * self.scale, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_the_loss(backend):
    temperature, model = Temperature(), net()
    check_backpropagation(model, backend, temperature, [temperature.scale])
    model = net()
    check_backpropagation(model, backend, lambda o, y: F.cross_entropy(o, y) + model[1].weight.square().sum())
    weights = nn.Parameter(torch.ones(3, dtype=torch.float64))
    probabilities = F.one_hot(Y, 3).double()
    loss = nn.CrossEntropyLoss(weight=weights)
    (want,) = torch.autograd.grad(loss(model(X), probabilities), [weights])
    pcfast.pc_loss(model, X, probabilities, loss=loss, backend=backend).backward()
    torch.testing.assert_close(weights.grad, want)
    with pytest.raises(pcfast.ArgumentError, match="incremental"):
        pcfast.incremental_step(model, X, Y, torch.optim.SGD(model.parameters(), 0.1), loss=Temperature())


def test_a_loss_is_assigned_whatever_it_was():
    pc = pcfast.PredictiveCoding(net(), loss=nn.CrossEntropyLoss())
    for loss in ("mse", nn.MSELoss(), F.mse_loss, Temperature()):
        pc.loss = loss
        assert pc.loss is loss
        assert ("loss" in pc._modules) == isinstance(loss, nn.Module)
    pc(X, Y).backward()
    assert pc.loss.scale.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ["sync", "deferred", "off"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_batch_of_ignored_labels_changes_nothing(loss, check, backend):
    model, ignored = net(), torch.full((8,), -100)
    value = pcfast.pc_loss(model, X, ignored, loss=loss, check=check, backend=backend)
    value.backward()
    pcfast.synchronize()
    with torch.no_grad():
        assert value == 0 == pcfast.pc_loss(model, X, ignored, loss=loss, check=check)
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


@pytest.mark.parametrize("y", [Y.to(torch.uint8), F.one_hot(Y, 3).float()], ids=["uint8", "float32"])
def test_what_trains_also_evaluates(y):
    model = net()
    trained = pcfast.pc_loss(model, X, y)
    with torch.no_grad():
        torch.testing.assert_close(pcfast.pc_loss(model, X, y), trained.detach())


def resized(parameter: nn.Parameter, size: int) -> None:
    parameter.untyped_storage().resize_(size)


@pytest.mark.parametrize("method", ["exact", "strict"])
@pytest.mark.parametrize("backend", ["cpu", *BACKENDS])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_memory_that_is_freed_between_calls_is_noticed(name, backend, method):
    """As FSDP2 frees that of gathered parameters; it may lie elsewhere when it is there again."""
    if backend == "cpu" and cpu_module.load_error():
        pytest.skip(cpu_module.load_error())
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)).double()
    parameter = getattr(model[0][0], name)
    values, size = parameter.detach().clone(), parameter.untyped_storage().nbytes()

    def updates() -> list[torch.Tensor]:
        model.zero_grad()
        pcfast.pc_loss(model, X, Y, method=method, backend=backend).backward()
        return [p.grad.clone() for p in model.parameters()]

    truth = updates()
    resized(parameter, 0)
    with pytest.raises((pcfast.ArgumentError, RuntimeError), match=r"memory was freed|storage of size 0"):
        updates()
    held = [torch.empty(size, dtype=torch.uint8) for _ in range(8)]  # takes the place
    resized(parameter, size)
    parameter.data.copy_(values)
    assert all(map(torch.equal, updates(), truth)) and held
