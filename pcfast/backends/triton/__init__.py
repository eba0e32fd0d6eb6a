"""The triton backend: strict relaxation by fused Triton kernels, weights and state in device memory.

launch_plan.py decides, from shapes alone, what becomes of each layer and where everything lies; loop.py runs it.
"""

from ..._moved import names_of
from .backend import Triton

__all__ = ["Triton"]

__getattr__ = names_of(__name__, "backend")
