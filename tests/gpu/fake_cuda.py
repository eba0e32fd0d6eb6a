"""tests/gpu on a CPU, as far as Python goes: PCFAST_FAKE_CUDA=1, which conftest.py reads.

The device is the CPU; as on CUDA bad values are reported later and steps are recorded and replayed, by running them
again. The cuda backend's kernels are those of PCFAST_CUDA_ON_HOST, the triton backend's are interpreted where
TRITON_INTERPRET=1. What needs a device is skipped by name, with the reason: :data:`NEEDS_A_DEVICE`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

import gpu_helpers
import pytest
import torch
import torch.nn.functional as F
from graph_recorder import Recorder
from host_reads import NoHostReads
from torch import nn

from pcfast.problem import status
from pcfast.relaxation import cuda_graphs
from pcfast.relaxation import solve as relaxation
from pcfast.support import host

CPU = torch.device("cpu")

#: Patterns of tests' names -> why they cannot run here.
NEEDS_A_DEVICE = {
    r"inside_a_capture_of_the_callers": "a graph that the caller captures needs a device",
    r"another_stream": "streams need a device",
    r"another_device": "it needs two devices",
    r"after_an_error_that_broke_the_context": "there is no context that breaks",
    r"failed_recording": "it is torch's capture that fails",
    r"what_the_kernel_cannot_do": "the kernel's build for the CPU can do more",
    r"two_to_the_31|several_waves|large_batch|where_tiles_grow": "it takes a GPU's memory or speed",
    r"\btf32\b": "the CPU has no TF32, of which the bounds are made",
}


def reason_to_skip(name: str) -> str:
    return next((why for pattern, why in NEEDS_A_DEVICE.items() if re.search(pattern, name)), "")


def skip_what_needs_a_device(items: list[pytest.Item]) -> None:
    for item in items:
        if why := reason_to_skip(item.name.replace("-", " ").replace("[", " ").replace("]", " ")):
            item.add_marker(pytest.mark.skip(reason=f"with CUDA faked: {why}"))


class _Stream:
    """Work is done when its call returns."""

    cuda_stream = device_index = 0
    device = CPU

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass


class _Autocast(torch.autocast):
    """Of the device that there is."""

    def __init__(self, device_type: str, *arguments, **settings) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *arguments, **settings)


class _SyncDebugMode:
    """torch.cuda.set_sync_debug_mode: in "error" whatever reads on the host raises."""

    def __init__(self) -> None:
        self.reads: NoHostReads | None = None

    def set(self, mode: str) -> None:
        if self.reads is not None:
            self.reads.__exit__(None, None, None)
            self.reads = None
        if mode == "error":
            self.reads = NoHostReads().__enter__()

    def raise_arrived(self, *, wait: bool = False, _raise=status.raise_arrived) -> None:
        """It reads what has been copied to the host before."""
        before = "default" if self.reads is None else "error"
        self.set("default")
        try:
            _raise(wait=wait)
        finally:
            self.set(before)


def _linear(x, weight, bias=None, _linear=F.linear):
    """As cuBLAS, which takes another kernel for a small batch: a row's last bits depend on the batch."""
    result = _linear(x, weight, bias)
    return result * (1 + 2**-22) if len(x) < 64 and result.dtype == torch.float32 else result


def _record(work):
    """As a capture: nothing is computed before the first replay, so statistics and random numbers stay."""
    model = next(
        cell.cell_contents.model for cell in work.__closure__ if hasattr(cell.cell_contents, "model")
    )
    kept, state = [(buffer, buffer.clone()) for buffer in model.buffers()], torch.get_rng_state()
    recorded = Recorder()(work)
    for buffer, value in kept:
        buffer.copy_(value)
    torch.set_rng_state(state)
    return recorded


def _prepare(model, x, y, settings, *wanted, _prepare=relaxation.prepare, **given):
    """As on CUDA: checks are deferred, and "sync" waits for them."""
    check = settings.check
    if settings.backend != "reference":
        settings = dataclasses.replace(settings, check="off" if check == "off" else "deferred")
    problem, plan = _prepare(model, x, y, settings, *wanted, **given)
    if settings.backend != "reference":
        problem = dataclasses.replace(problem, raise_now=False, deferred=check != "sync")
    return problem, plan


def _ineligible_reason(backend, problem, plan) -> str:
    return cuda_graphs._refusal(backend, problem, plan) if cuda_graphs.switched_on() else "switched off"


def install() -> None:
    """For the life of the process; before the tests' modules are imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import interpreter

        interpreter.repair()
    gpu_helpers.DEVICE, debug = CPU, _SyncDebugMode()
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda: (0, 0),
        "synchronize": lambda device=None: None,
        "set_sync_debug_mode": debug.set,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
    }.items():
        setattr(torch.cuda, name, value)
    torch.autocast, F.linear = _Autocast, _linear
    for kind in (torch.Tensor, nn.Module):
        kind.cuda = lambda self, device=None: self
    cuda_graphs.CACHE = cuda_graphs.GraphCache(16, _record)
    cuda_graphs.ineligible_reason = _ineligible_reason
    relaxation.prepare, status.raise_arrived = _prepare, debug.raise_arrived
    host.readable = lambda device: False
