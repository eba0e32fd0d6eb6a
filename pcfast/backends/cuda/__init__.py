"""The cuda backend: one thread block keeps a network's weights and its samples' state for the whole relaxation.

Planning (layer_shapes.py, tiling.py, shared_memory.py) is pure Python; the kernel is csrc/resident/.
"""

from ..._moved import names_of
from .backend import Cuda

__all__ = ["Cuda"]

__getattr__ = names_of(__name__, "backend")
