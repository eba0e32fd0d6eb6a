"""The eager backend: deviations from the forward pass in PyTorch operations."""

from ..._moved import names_of
from .backend import Eager

__all__ = ["Eager"]

__getattr__ = names_of(__name__, "backend")
