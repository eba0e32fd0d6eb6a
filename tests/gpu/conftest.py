"""What holds in every test on a CUDA device."""

import pytest
import torch

import pcfast
from pcfast import graphs


@pytest.fixture(autouse=True)
def _clean():
    """IEEE float32, no graphs and no reports left over from another test, before and after."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    graphs.CACHE.clear()
    pcfast.synchronize()
    yield
    graphs.CACHE.clear()
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision
    pcfast.synchronize()
