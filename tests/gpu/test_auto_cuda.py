""" "auto" on a GPU: the first call of a plan times the backends that are qualified, later ones run the fastest."""

from __future__ import annotations

import gpu_helpers
import pytest
import torch
from gpu_helpers import updates
from torch import nn

import pcfast
from pcfast.backends import choice, device_identity, kernel_backend, timings
from pcfast.backends.qualification import automatic
from pcfast.backends.qualification.record import QUALIFIED, Qualification, Verdict
from pcfast.checking import qualification as children

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def qualified(monkeypatch) -> torch.device:
    """Every kind of kernels that is here, on the device that they are qualified on."""
    device = gpu_helpers.DEVICE
    monkeypatch.setattr(kernel_backend, "AUTOMATIC_DEVICES", (device.type,))
    kinds, unavailable = children.kinds_on(device)
    assert kinds
    verdicts = dict.fromkeys(kinds, Verdict(QUALIFIED))
    identity = device_identity.identity_of(device)
    automatic.adopt(device, Qualification(identity, "2026-01-01", verdicts, unavailable))
    return device


def network(device: torch.device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 20), nn.Tanh()), nn.Linear(20, 10)).to(device)
    return model, torch.randn(9, 12).to(device), torch.randint(0, 10, (9,)).to(device)


def test_auto_runs_what_was_fastest(qualified):
    model, x, y = network(qualified)
    state = torch.get_rng_state()
    first = updates(model, x, y)
    assert torch.equal(state, torch.get_rng_state())
    chosen = pcfast.last_run().plan.backend
    (timed,) = timings.of_device(qualified).values()
    assert not timed.out and len(timed.seconds) >= 2
    assert timed.seconds[chosen] <= timings.MARGIN * timed.seconds["eager"]
    again, by_name = updates(model, x, y), updates(model, x, y, backend=chosen)
    assert pcfast.last_run().plan.backend == chosen
    for tensors in zip(first, again, by_name, strict=True):
        assert all(torch.equal(tensors[0], other) for other in tensors[1:])
    choice.forget()
    assert len(timings.of_device(qualified)) == 1  # of the file
    pcfast.synchronize()


def test_auto_inside_a_capture_of_the_callers_times_nothing(qualified):
    model, x, y = network(qualified)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: warm up on a side stream
        pcfast.relax(model, x, y, num_steps=3, check="off", backend="eager")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pcfast.relax(model, x, y, num_steps=3, check="off")
    assert pcfast.last_run().plan.backend == "eager" and not timings.of_device(qualified)
