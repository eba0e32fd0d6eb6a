"""Backends: ways to run the same relaxation. One file each."""

from __future__ import annotations

from ..errors import ArgumentError, BackendError
from ..problem.plan import Plan, on_backend
from ..support.log import info_once
from .base import Backend
from .cpu.backend import Cpu
from .cuda.backend import Cuda
from .eager.backend import Eager
from .reference import Reference
from .triton.backend import Triton

#: In the order in which "auto" tries them.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Cuda(), Triton(), Cpu(), Eager(), Reference())
}


def choose_backend(name: str, planned: Plan) -> tuple[Backend, Plan]:
    """The backend that will run ``planned``, and the plan for it, which says why others were passed over.

    Raises:
        ArgumentError: an unknown name.
        BackendError: a backend asked for by name cannot run this.
    """
    if name != "auto":
        if not isinstance(name, str) or name not in BACKENDS:
            raise ArgumentError("backend", repr(name), f"one of {['auto', *BACKENDS]}")
        backend = BACKENDS[name]
        ok, reason = backend.supports(planned)
        if not ok:
            raise BackendError(f'backend "{name}" cannot run this: {reason}. Use backend="auto".')
        return backend, on_backend(planned, name, literal=backend.literal)
    refusals: list[tuple[str, str]] = []
    for backend in BACKENDS.values():
        ok, reason = backend.automatic(planned.device)  # before supports, which may import a compiler
        if ok:
            ok, reason = backend.supports(planned)
        if ok:
            log_fallback(backend.name, tuple(refusals))
            return backend, on_backend(planned, backend.name, tuple(refusals), literal=backend.literal)
        refusals.append((backend.name, reason))
    raise BackendError("no backend can run this: " + "; ".join(f"{n}: {why}" for n, why in refusals))


def log_fallback(name: str, refusals: tuple[tuple[str, str], ...]) -> None:
    """Say once which backend runs where "auto" passed over others."""
    if refusals:
        info_once(f"running on {name}: " + "; ".join(f"{n} refused ({why})" for n, why in refusals))
