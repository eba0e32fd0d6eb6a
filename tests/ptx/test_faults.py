"""The three faults that executing PTX found are seen in kernels that still have them, and not without."""

from __future__ import annotations

import fault_kernels
import pytest
import torch
from executor.triton_driver import virtual_device

from pcfast.kernels import activations, async_proxy

_ENDING_IN_A_PRODUCT = {
    "silu": activations.SILU,
    "gelu": activations.GELU,
    "gelu_tanh": activations.GELU_TANH,
}


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize("name", _ENDING_IN_A_PRODUCT)
def test_a_difference_that_is_fused_with_a_product(name, contract):
    result = {}
    for exact in (False, True):
        u, out = torch.randn(256), torch.full((128,), 7.0)
        with virtual_device(80, contract=contract) as device:
            fault_kernels.distance_to_maximum[(1,)](u, out, _ENDING_IN_A_PRODUCT[name].value, exact)
        assert not device.reports
        result[exact] = float(out.abs().max())
    assert result[False] > 1e-8 and result[True] == 0


def product(rounded: bool) -> list[str]:
    a, b, out = torch.randn(64, 256), torch.randn(64, 256), torch.zeros(64, 64)
    with virtual_device(90) as device:
        fault_kernels.product_of_rounded[(1,)](a, b, out, 256, rounded, num_warps=4, num_stages=4)
    torch.testing.assert_close(out, a @ b.T, rtol=1e-2, atol=1e-1)
    return device.reports


@pytest.fixture
def an_empty_cache(monkeypatch, tmp_path):
    """What is compiled here lies nowhere else, in memory neither."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fault_kernels.product_of_rounded.device_caches.clear()
    yield
    fault_kernels.product_of_rounded.device_caches.clear()


def test_registers_of_a_product_under_way(an_empty_cache):
    """wgmma's left operand, made in registers, in a loop that waits for all products but some."""
    assert any("is used before the wait for its wgmma" in report for report in product(rounded=True))
    assert product(rounded=False) == []


@pytest.mark.skipif(not async_proxy._NEEDED, reason="this release of triton puts the fences in itself")
def test_copies_that_no_fence_makes_visible(an_empty_cache, monkeypatch):
    monkeypatch.setattr(async_proxy, "with_fences", lambda ptx: ptx)
    reports = product(rounded=False)
    assert reports and all("without fence.proxy.async behind it" in report for report in reports)
