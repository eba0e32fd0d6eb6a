"""What holds in every test on a CUDA device, or, with PCFAST_FAKE_CUDA=1, on a CPU in its place (fake_cuda.py)."""

import os

import pytest

import pcfast
from pcfast.precision import CONVOLUTIONS, PRODUCTS
from pcfast.relaxation import cuda_graphs

if os.environ.get("PCFAST_FAKE_CUDA") == "1":
    import fake_cuda

    fake_cuda.install()

    def pytest_collection_modifyitems(items):
        fake_cuda.skip_what_needs_a_device(items)


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
