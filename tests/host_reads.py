"""Noticing that a step waits for the device, without one: a value goes to the host."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises where a value goes from the device to the host: a capture would fail there."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            raise RuntimeError(f"a synchronizing operation, {func}, waits for the device")
        return func(*args, **(kwargs or {}))
