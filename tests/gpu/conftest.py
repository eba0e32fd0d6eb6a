"""What holds in every test on a CUDA device."""

import pytest

import pcfast
from pcfast import graphs
from pcfast.precision import CONVOLUTIONS, PRODUCTS


@pytest.fixture(autouse=True)
def _clean():
    """IEEE float32, no graphs and no reports left over from another test, before and after."""
    before = {switch: switch.state for switch in (PRODUCTS, CONVOLUTIONS)}
    for switch in before:
        switch.state = switch.of("ieee")
    graphs.CACHE.clear()
    pcfast.synchronize()
    yield
    graphs.CACHE.clear()
    for switch, state in before.items():
        switch.state = state
    pcfast.synchronize()
