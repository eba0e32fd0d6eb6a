"""Compiled kernels on the executor: right against float64, and nothing reported."""

from __future__ import annotations

import cases
import pytest
from native_build import needs_gcc

from pcfast.backends.cuda import native


@pytest.mark.parametrize(
    "case", [case for case in cases.QUICK if not case.resident], ids=lambda case: case.id
)
def test_triton_kernels(case):
    assert_right(case)


@needs_gcc
@pytest.mark.parametrize("case", [case for case in cases.QUICK if case.resident], ids=lambda case: case.id)
def test_the_resident_kernel(case, host_module, resident_ptx, monkeypatch):
    monkeypatch.setenv(native.ON_HOST, str(host_module))
    assert_right(case, resident_ptx)


def assert_right(case, resident_ptx=None):
    device, error, allowed = cases.run(case, resident_ptx)
    ran = cases.kernels_run(device)
    assert set(case.scenario.kernels) <= set(ran), ran
    assert not device.reports, device.reports[:5]
    assert error <= allowed
