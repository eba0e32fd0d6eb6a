"""Networks that are graphs: what they compute, and the ePC program's loops on its own ResNet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcfast
from pcfast import datasets, networks
from pcfast.losses import half_squared_error


def small(**settings) -> pcfast.Graph:
    torch.manual_seed(0)
    return networks.resnet18(10, width=4, **settings)


def test_resnet18_is_a_resnet():
    net = small(projection=1)
    assert len(net.names) == 1 + 18 and net.inputs_of["b21b"] == ("b21a", "b12b")
    assert sum(p.numel() for p in networks.resnet18(projection=1).parameters()) > 11_000_000
    x = torch.randn(2, 3, 32, 32)
    v = net.stem(x)
    for stage in range(1, 5):
        for block in (1, 2):
            main, skip = net.get_submodule(f"b{stage}{block}b")[0].branches
            v = F.relu(main(net.get_submodule(f"b{stage}{block}a")(v)) + skip(v))
    assert v.shape == (2, 32, 4, 4)
    truth = net.y(v)
    assert torch.allclose(net(x), truth, atol=1e-5) and truth.shape == (2, 10)
    for wrong in ({"blocks": ()}, {"blocks": (2, 0)}, {"width": 0}, {"projection": 2}, {"num_classes": 0}):
        with pytest.raises(pcfast.ArgumentError):
            networks.resnet18(**{"width": 4, **wrong})


@pytest.mark.parametrize("blocks", [(1, 1), (2, 2, 2, 2), (4, 4, 4)])
def test_mupc_keeps_the_size_of_activations(blocks):
    """Whatever the depth and the width, activations stay about 1 and outputs about width^-1/2."""
    sizes = []
    for width in (8, 32):
        torch.manual_seed(0)
        net = networks.resnet18(width=width, blocks=blocks, mupc=True, activation=nn.Tanh)
        assert not any("bias" in name for name, _ in net.named_parameters())
        values = net.values({"x": torch.randn(4, 3, 16, 16)})
        last = f"b{len(blocks)}{blocks[-1]}b"
        sizes.append(values[last].detach().std())
        assert 0.3 < sizes[-1] < 3 and values["y"].std() < 1
    assert 0.5 < sizes[0] / sizes[1] < 2


def epc_program(net: pcfast.Graph, x, y, step_size: float, iters: int) -> dict[str, torch.Tensor]:
    """PCESkipConnection of the ePC program: errors descend E by autograd, weights E_local, states held.

    A block's input, and what its projection makes of it, goes to the block's second layer.
    """
    names = list(net.names[1:])
    errors: dict = {name: 0.0 for name in names}

    def states(detached: bool):
        v, total = {"x": x}, 0.0
        for name in names:
            others = {n: torch.zeros(len(x)) for n in names if n not in v and n != name}
            prediction = net.values({**v, **others})[name]
            if name == "y":
                return total + half_squared_error(prediction, y)
            v[name] = prediction + errors[name]
            if detached:
                v[name] = v[name].detach()
                total = total + 0.5 * (prediction - v[name]).square().sum()
            else:
                total = total + 0.5 * torch.as_tensor(errors[name]).square().sum()

    with torch.no_grad():
        shapes = net.values({"x": x})
    errors = {name: torch.zeros_like(shapes[name]).requires_grad_(True) for name in names[:-1]}
    for _ in range(iters):
        gradients = torch.autograd.grad(states(False), list(errors.values()))
        errors = {
            name: (e - step_size * g).detach().requires_grad_(True)
            for (name, e), g in zip(errors.items(), gradients, strict=True)
        }
    net.zero_grad()
    states(True).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("pooled", [False, True])
def test_error_based_is_the_epc_programs_loop_on_its_resnet(backend, pooled):
    net = small(blocks=(1, 1, 1), pooled_beliefs=pooled).double()  # BatchNorm in training mode, as there
    assert net.values({"x": torch.zeros(2, 3, 16, 16).double()})["b31b"].shape[2:] == (
        (1, 1) if pooled else (4, 4)
    )
    x, y = torch.randn(3, 3, 16, 16).double(), torch.rand(3, 10).double()
    truth = epc_program(net, x, y, 0.05, 5)
    net.zero_grad()
    loss = pcfast.pc_loss(
        net, x, y, loss=half_squared_error, method="error_based", step_size=0.05, num_steps=5, backend=backend
    )
    loss.backward()
    assert pcfast.last_run().plan.backend == backend
    scale = max(float(g.norm()) for g in truth.values())
    for name, p in net.named_parameters():
        # a bias in front of BatchNorm has a gradient of zero
        assert (p.grad - truth[name]).norm() <= 1e-10 * max(float(truth[name].norm()), 1e-3 * scale), name


@pytest.mark.parametrize("method", ["strict", "fixed_prediction", "error_based", "exact"])
@pytest.mark.parametrize("mupc", [False, True])
def test_resnet_eager_is_the_literal_loop(method, mupc):
    net = small(blocks=(1, 2), mupc=mupc, projection=1).double()
    x, y = torch.randn(2, 3, 8, 8).double(), torch.randint(0, 10, (2,))
    results = []
    for backend in ("eager", "reference"):
        net.zero_grad()
        pcfast.pc_loss(net, x, y, method=method, num_steps=8, backend=backend).backward()
        results.append([p.grad.clone() for p in net.parameters()])
    scale = max(float(g.abs().max()) for g in results[1])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-10 * scale


def test_a_residual_classifier_learns_digits():
    torch.manual_seed(0)
    data = datasets.load("digits", shape="flat")
    net = networks.residual_mlp([64, 64, 64, 64, 64, 10])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    for _ in range(12):
        for rows in torch.randperm(len(data.x_train)).split(32):
            optimizer.zero_grad()
            pcfast.pc_loss(net, data.x_train[rows], data.y_train[rows], step_size=0.1, num_steps=8).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(data.x_test).argmax(1) == data.y_test).double().mean()
    assert accuracy >= 0.95
    with pytest.raises(pcfast.ArgumentError):
        networks.residual_mlp([64, 32, 10])


def test_a_decoder_has_a_latent_root():
    net = networks.decoder(3, [8, 6], classes=4)
    assert net.names == ("z", "label", "h1", "x") and net.outputs == ("x",)
    assert net(label=torch.eye(4)).shape == (4, 6)
    x = torch.rand(5, 6)
    settled = pcfast.relax(net, clamp={"x": x, "label": torch.eye(4)[[0, 1, 2, 3, 0]]}, num_steps=50)
    assert settled.beliefs["z"].shape == (5, 3) and settled.beliefs["z"].abs().max() > 0
    with pytest.raises(pcfast.ArgumentError):
        networks.decoder(0, [3])
