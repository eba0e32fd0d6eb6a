"""What users do to modules and losses after building them, and what eager must not miss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pcfast
from pcfast.training.checkpoints import loss_name


def net():
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 4)
    ).double()


def step(model, backend):
    torch.manual_seed(1)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 4, (9,))
    model.zero_grad()
    pcfast.pc_loss(model, x, y, backend=backend).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_frozen_batchnorm_statistics_stay():
    """track_running_stats = False on a module that has statistics: torch leaves them alone."""
    model = net()
    norm = model[0][1]
    norm.track_running_stats = False
    before = {name: value.clone() for name, value in norm.named_buffers()}
    updates = [step(model, backend) for backend in ("eager", "reference")]
    for name, value in norm.named_buffers():
        assert torch.equal(value, before[name]), name
    for ours, theirs in zip(*updates, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_a_patched_forward_is_used():
    model = net()
    first = model[0][0]
    plain = step(model, "eager")
    first.forward = lambda v: F.linear(v, first.weight * 3, first.bias)
    eager, reference = step(model, "eager"), step(model, "reference")
    for ours, theirs in zip(eager, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(eager[0], plain[0])
    assert "another forward" in str(pcfast.explain(model, (9, 6)))


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=torch.ones(6, dtype=torch.float64)),
        nn.CrossEntropyLoss(weight=torch.ones(2, dtype=torch.float64)),
        nn.CrossEntropyLoss(label_smoothing=1.5),
    ],
)
def test_losses_that_torch_refuses_are_refused(loss, backend):
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.zeros(9, dtype=torch.long)
    with pytest.raises(pcfast.ArgumentError) as caught:
        pcfast.pc_loss(net(), x, y, loss=loss, backend=backend)
    assert caught.value.argument == "loss"


def test_class_weights_belong_to_a_runs_identity():
    first, second = (nn.CrossEntropyLoss(weight=torch.tensor(w)) for w in ([1.0, 2.0], [2.0, 1.0]))
    assert loss_name(first) != loss_name(second)
    assert loss_name(first) == loss_name(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0])))


def test_settings_of_the_module_can_be_changed_and_are_checked():
    model = net()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 4, (9,))
    pc = pcfast.PredictiveCoding(model, step_size=0.1)
    pc.step_size, pc.method = 0.3, "fixed_prediction"
    pc(x, y).backward()
    changed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pcfast.pc_loss(model, x, y, step_size=0.3, method="fixed_prediction").backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(changed, model.parameters(), strict=True))
    pc.step_size = -1
    with pytest.raises(pcfast.ArgumentError, match="step_size"):
        pc(x, y)


def energies_of_a_chain(depth, step_size):
    """First and last energy of strict relaxation in a chain of orthogonal maps, |J| = 1."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(depth))).double()
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    x, y = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    result = pcfast.relax(model, x, y, loss="mse", step_size=step_size, num_steps=400, energies=True)
    return float(result.energies[0].sum()), float(result.energies[-1].sum())


@pytest.mark.parametrize("depth", [2, 3, 6, 12])
def test_the_stated_step_size_is_safe(depth):
    """docs/guide.md: step_size (1 + |J|)^2 < 2 is safe at any depth."""
    first, last = energies_of_a_chain(depth, 0.95 * 2 / 4)
    assert last <= first


def test_the_stated_limit_is_sharp_for_long_chains():
    first, last = energies_of_a_chain(12, 1.1 * 2 / 4)
    assert last > 1e6 * first
