"""The cuda backend: one thread block keeps a network's weights and its samples' state for the whole relaxation.

Planning (shared_memory.py, kernel_params.py) is pure Python; the kernel is csrc/resident/.
"""

from .backend import Cuda

__all__ = ["Cuda"]
