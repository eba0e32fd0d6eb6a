"""Backends: ways to run the same relaxation. One file each."""

from .base import Backend
from .choice import choose_backend, log_fallback
from .cpu.backend import Cpu
from .cuda.backend import Cuda
from .eager.backend import Eager
from .reference import Reference
from .registry import BACKENDS
from .triton.backend import Triton

__all__ = [
    "BACKENDS", "Backend", "Cpu", "Cuda", "Eager", "Reference", "Triton", "choose_backend", "log_fallback",
]  # fmt: skip
