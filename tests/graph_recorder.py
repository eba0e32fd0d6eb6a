"""Graphs without a GPU: a recorder that runs the work again at each replay, into the tensors of the first result.

A result that shares memory with the graph's own, or with the caller's, therefore changes under the test.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


def tensors_of(value) -> list[Tensor]:
    """All tensors in a result, lists and dictionaries included."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for entry in value for t in tensors_of(entry)] if isinstance(value, list) else []


class Recorder:
    """As graphs.record_cuda, on any device."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.static: list[Tensor] = []

    def __call__(self, work):
        self.recorded += 1
        result = work()
        static = tensors_of(result)
        self.static += static

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(static, tensors_of(work()), strict=True):
                old.copy_(new)

        return result, replay
