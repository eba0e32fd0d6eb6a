"""One draw of random numbers and one move of buffers a step, in modules that pcfast does not know."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import pcfast

BACKENDS = ["eager", "reference"]
X, Y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
OWN = torch.Generator()

DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "in place": lambda: float(torch.empty(()).normal_()),
    "generator": lambda: float(torch.rand((), generator=OWN)),
    "of tensors": lambda: float(torch.normal(torch.zeros(2), torch.ones(2))[0]),
    "gamma": lambda: float(torch._standard_gamma(torch.ones(2))[0]),
    "python": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "numpy": lambda: float(np.random.rand()),
}


class Scaled(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw, self.drawn = draw, []

    def forward(self, a):
        self.drawn.append(self.draw())
        return a * (1 + 0.1 * abs(self.drawn[-1]))


def net(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), middle, nn.Linear(6, 3)).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", DRAWS)
def test_one_draw_a_step(source, backend):
    model = net(Scaled(DRAWS[source]))
    for step in (1, 2):
        pcfast.pc_loss(model, X, Y, num_steps=5, backend=backend)
        assert len(set(model[1].drawn)) == step
    assert len(model[1].drawn) > 8


@pytest.mark.parametrize(
    ("draw", "own"),
    [
        (lambda: tuple(torch.rand(3).tolist()), lambda: 0.0),
        (lambda: tuple(torch.rand(3).tolist()), lambda: float(torch.rand(()))),
        (random.random, lambda: 0.0),
    ],
    ids=["torch", "torch-both", "python"],
)
def test_other_threads_draw_on(draw, own):
    """What a thread draws while a step evaluates its modules never comes again."""
    drawn = []
    with ThreadPoolExecutor(1) as other:

        def meanwhile():
            drawn.append(other.submit(draw).result())
            return own()

        pcfast.pc_loss(net(Scaled(meanwhile)), X, Y, num_steps=9)
    assert len(set(drawn)) == len(drawn) > 8


class Counting(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.f, self.in_place = nn.Linear(6, 6), in_place
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mask", torch.ones(6, 6).tril())

    def forward(self, a):
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return torch.tanh(self.f(a)) * self.mask[0] * self.calls.clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [True, False])
def test_threads_count_every_step(in_place, backend):
    model = net(Counting(in_place))
    calls, mask = model[1].calls, model[1].mask
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(pcfast.pc_loss, model, X, Y, num_steps=3, backend=backend) for _ in range(24)]
    for future in done:
        future.result()
    assert int(model[1].calls) == 24
    assert (model[1].calls is calls) == in_place
    assert model[1].mask is mask
    assert mask._version == 0


class Named(nn.BatchNorm1d):
    """A BatchNorm that pcfast does not know."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", ["sync", "deferred"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.BatchNorm1d(6), lambda: nn.BatchNorm1d(6, momentum=None), lambda: Named(6), lambda: Counting(True),
     lambda: Counting(False)],
    ids=["known", "cumulative", "unknown", "in-place", "replaced"],
)  # fmt: skip
def test_a_bad_batch_leaves_the_buffers(make, check, backend):
    model, once = net(make()), net(make())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bad = X.clone()
    bad[0, 0] = float("inf") if check == "deferred" else 1.0
    step_size = 0.1 if check == "deferred" else 1e300  # found late: the forward pass is finite
    with pytest.raises((pcfast.NonFiniteError, pcfast.RelaxationDiverged)):
        pcfast.pc_loss(model, bad, Y, check=check, step_size=step_size, backend=backend).backward()
        pcfast.synchronize()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    pcfast.pc_loss(model, X, Y, check=check, backend=backend)
    once(X)
    for buffer, moved in zip(model.buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(buffer, moved)
