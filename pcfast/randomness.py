"""Replay of random numbers: one dropout mask a step, reused in every iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


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
