"""Kernels that triton could not compile or launch: who is told, and where "auto" does not try them again."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable

from ...errors import BackendError
from ...model.spec import Network
from ...problem.plan import Plan
from .. import generation
from ..chips import device_key

# Why kernels did not compile for a network on a device.
_reasons: dict[tuple[Network, str, int | None], str] = {}


class KernelsFailed(BackendError):
    """Triton could not compile or launch a kernel, or what it made of one is not safe to run."""


def reason_of(plan: Plan) -> str:
    """Why kernels did not compile for a plan's network on its device before; "" where they did, or were not tried."""
    return _reasons.get(_place(plan), "")


def remember(plan: Plan, reason: str) -> None:
    """Have :func:`reason_of` say so from now on."""
    _reasons[_place(plan)] = reason
    generation.advance()


def forget() -> None:
    """Try all kernels again."""
    _reasons.clear()
    generation.advance()


def _place(plan: Plan) -> tuple[Network, str, int | None]:
    return plan.network, *device_key(plan.device)


@contextlib.contextmanager
def compiling(labels: Callable[[], str]):
    """Kernels are compiled at their first launch: say so where triton fails at it. labels: of layers at work.

    Raises:
        KernelsFailed: instead of triton's own exceptions.
    """
    try:
        yield
    except Exception as failure:
        from ...kernels.launching import UnsafeKernel  # here: it imports triton

        if isinstance(failure, UnsafeKernel):
            raise KernelsFailed(f"{labels()}: {failure}") from failure
        frames = {
            frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(failure.__traceback__)
        }
        # nothing is compiled: the fault is a kernel's own
        interpreted = "triton.runtime.interpreter" in frames
        if interpreted or not any(name.split(".")[0] == "triton" for name in frames):
            raise
        raise KernelsFailed(
            f"{labels()}: triton could not compile or launch a kernel: {type(failure).__name__}: {failure}. Check "
            "that triton fits torch and the driver (pcfast info) and that a C compiler is installed, or use "
            'backend="eager".'
        ) from failure
