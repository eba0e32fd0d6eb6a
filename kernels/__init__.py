"""Triton kernels of pcfast, one file a fused stage; installed as ``pcfast.kernels``.

Nothing here imports triton: a kernel file is imported by the backend that runs it, so that pcfast imports and
works where triton is not installed.
"""
