"""The streamed tier: strict relaxation by fused Triton kernels, weights and state in device memory.

design.py decides, from shapes alone, what becomes of each layer and where everything lies; loop.py runs it.
"""
