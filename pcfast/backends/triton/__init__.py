"""The triton backend: strict relaxation by fused Triton kernels, weights and state in device memory.

launch_plan.py decides, from shapes alone, what becomes of each layer and where everything lies; loop.py runs it.
"""

from .backend import Triton

__all__ = ["Triton"]
