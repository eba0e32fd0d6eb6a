"""Implicit convolutions wherever the triton backend can run them."""

from __future__ import annotations

import dataclasses

from pcfast.backends.triton import designs
from pcfast.backends.triton.configs import IMPLICIT, Choices, ConvolutionKey

__all__ = ["EveryConvolution", "everywhere"]


class EveryConvolution(Choices):
    """Implicit wherever it is possible."""

    def get(self, key, default=None):
        return IMPLICIT if isinstance(key, ConvolutionKey) else super().get(key, default)

    def __eq__(self, other):
        return isinstance(other, EveryConvolution)

    __hash__ = Choices.__hash__


def everywhere(monkeypatch) -> None:
    """For the rest of the test."""
    find = designs.target_of
    monkeypatch.setattr(
        designs, "target_of", lambda *a: dataclasses.replace(find(*a), choices=EveryConvolution())
    )
