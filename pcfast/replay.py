"""Replay of what a forward pass drew and found: one dropout mask a step, statistics that move once a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn


def replaying(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Remember torch's random state now; the returned context manager replays it and then restores the rest.

    Covers the CPU generator and, for a CUDA ``device``, that device's.
    """
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replay():
        with torch.random.fork_rng([device] if cuda_state is not None else []):
            torch.set_rng_state(cpu_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, device)
            yield

    return replay


def recorded_buffers(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Remember the module's buffers as they are; the returned context manager lends it copies of those.

    Every evaluation of a step starts from the same statistics, which move once. The buffers themselves are
    never written, not even to put them back: autograd graphs may hold them.
    """
    found = {
        (owner, name): buffer
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    }
    values = {buffer: buffer.clone() for buffer in found.values()}

    @contextlib.contextmanager
    def lend():
        held = {(owner, name): owner._buffers[name] for owner, name in found}
        copies = {buffer: value.clone() for buffer, value in values.items()}  # one, however often registered
        try:
            for (owner, name), buffer in found.items():
                owner._buffers[name] = copies[buffer]
            yield
        finally:
            for (owner, name), buffer in held.items():
                owner._buffers[name] = buffer

    return lend
