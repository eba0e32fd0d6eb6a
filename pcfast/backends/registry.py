"""The backends that there are."""

from __future__ import annotations

from .base import Backend
from .cpu.backend import Cpu
from .cuda.backend import Cuda
from .eager.backend import Eager
from .reference import Reference
from .triton.backend import Triton

#: In the order in which they are asked whether they can run a plan.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Cuda(), Triton(), Cpu(), Eager(), Reference())
}
