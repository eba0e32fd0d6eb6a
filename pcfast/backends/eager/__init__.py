"""The eager backend: deviations from the forward pass in PyTorch operations."""

from .run import Eager

__all__ = ["Eager"]
