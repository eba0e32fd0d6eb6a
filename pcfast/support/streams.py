"""CUDA streams that a thread keeps for itself.

torch hands out 32 streams a device, round robin: one made for every capture would in the end be one that another
thread works on, whose launches then land in the graph, and would bring a cuBLAS workspace of its own each time.
"""

from __future__ import annotations

import threading

import torch

_own = threading.local()


def kept_beside(stream: torch.cuda.Stream, count: int) -> list[torch.cuda.Stream]:
    """This thread's ``count`` streams that accompany ``stream``, always the same ones.

    Those of another stream are others: cuBLAS has one workspace for a thread and stream, and graphs captured on the
    same stream share it. They are replayed on ``stream`` one after another, never side by side.
    """
    if not hasattr(_own, "by_stream"):
        _own.by_stream = {}
    result = _own.by_stream.setdefault((stream.device_index, stream.cuda_stream), [])
    while len(result) < count:
        result.append(torch.cuda.Stream(stream.device))
    return result[:count]
