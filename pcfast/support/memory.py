"""Where tensors lie, for native code."""

from __future__ import annotations

from torch import Tensor

from ..errors import ArgumentError


def address(tensor: Tensor) -> int:
    """Of a tensor's first element.

    Raises:
        ArgumentError: its memory was freed, which native code would take for a tensor that is not there, or read.
    """
    if not tensor.untyped_storage().nbytes() and tensor.numel():
        raise ArgumentError(
            "model",
            f"a tensor of shape {tuple(tensor.shape)} whose memory was freed",
            "tensors that hold their values",
            "fully_shard frees layers' parameters between calls: call the sharded PredictiveCoding module.",
        )
    return tensor.data_ptr()
