"""What holds in every test on a CUDA device, or, with PCFAST_FAKE_CUDA=1, on a CPU in its place (fake_cuda.py)."""

import os

import gpu_helpers
import pytest
from torch import Tensor, nn

import pcfast
from pcfast.backends import choice
from pcfast.backends.cuda import native
from pcfast.precision import CONVOLUTIONS, PRODUCTS
from pcfast.relaxation import cuda_graphs

if os.environ.get("PCFAST_FAKE_CUDA") == "1":
    import fake_cuda

    fake_cuda.install()

    def pytest_collection_modifyitems(items):
        fake_cuda.skip_what_needs_a_device(items)


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch, tmp_path):
    """ "auto" runs eager unless a test says what is qualified; records of this machine are left alone."""
    monkeypatch.setenv("PCFAST_QUALIFY", "0")
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PCFAST_BACKEND", raising=False)
    choice.forget()
    yield
    choice.forget()


@pytest.fixture(autouse=True)
def _clean():
    """IEEE float32, no graphs and no reports left over from another test, before and after."""
    before = {switch: switch.state for switch in (PRODUCTS, CONVOLUTIONS)}
    for switch in before:
        switch.state = switch.of("ieee")
    cuda_graphs.CACHE.clear()
    pcfast.synchronize()
    yield
    cuda_graphs.CACHE.clear()
    for switch, state in before.items():
        switch.state = state
    pcfast.synchronize()


@pytest.fixture
def launches(backend, monkeypatch) -> list[int]:
    """Statuses of the resident kernel's launches so far, on backend "cuda"."""
    seen = []
    if backend == "cuda":
        module = native.load()
        launch = module.resident

        def counted(*arguments) -> int:
            seen.append(launch(*arguments))
            return seen[-1]

        monkeypatch.setattr(module, "resident", counted)
    return seen


@pytest.fixture
def ours(backend, launches):
    """Updates of a backend. A replayed step may be the one that was recorded, which has launched."""

    def run(model: nn.Sequential, x: Tensor, y: Tensor, **settings) -> list[Tensor]:
        before = len(launches)
        result = gpu_helpers.updates(model, x, y, backend=backend, **settings)
        name, replayed, _ = gpu_helpers.last()
        assert name == backend
        if backend == "cuda":
            assert set(launches[before:]) <= {0} and (replayed or len(launches) == before + 1)
        return result

    return run
