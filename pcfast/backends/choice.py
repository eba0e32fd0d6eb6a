"""Which backend runs a plan: the one asked for or, with "auto", the fastest of those that may."""

from __future__ import annotations

import os

from ..errors import ArgumentError, BackendError
from ..model import spec as specs
from ..precision import kernel_operands
from ..problem.plan import Plan, on_backend
from ..support.log import info_once
from . import generation, kernel_backend, timings
from .base import Backend
from .qualification import automatic
from .registry import BACKENDS

#: Names a backend that takes the place of "auto".
VARIABLE = "PCFAST_BACKEND"

_MAX_KEPT = 256
# what "auto" chose where kernels are considered, and the generation in which it did
_kept: dict[tuple, tuple[int, Plan]] = {}


def requested(name: str) -> str:
    """The backend that is asked for: ``name``, or in place of "auto" what the environment names."""
    given = os.environ.get(VARIABLE) if name == "auto" else None
    if given and given not in ("auto", *BACKENDS):
        raise ArgumentError(VARIABLE, repr(given), f"one of {['auto', *BACKENDS]}")
    return given or name


def choose_backend(
    name: str, planned: Plan, *, graphs: bool = True, may_qualify: bool = False
) -> tuple[Backend, Plan]:
    """The backend that will run ``planned``, and the plan for it, which says why others were passed over.

    With "auto" a backend of kernels takes part where they are qualified on the device. Among several backends the
    timings of this plan decide; before there are any the plan is eager's, and its ``contenders`` are to be timed.

    Args:
        graphs: CUDA graphs may be used. may_qualify: qualify the device now where nothing is known of it.

    Raises:
        ArgumentError: an unknown name.
        BackendError: a backend asked for by name cannot run this.
    """
    name = requested(name)
    if name == "auto":
        chosen = _automatic(planned, graphs, may_qualify)
        return BACKENDS[chosen.backend], chosen
    if not isinstance(name, str) or name not in BACKENDS:
        raise ArgumentError("backend", repr(name), f"one of {['auto', *BACKENDS]}")
    backend = BACKENDS[name]
    ok, reason = backend.supports(planned)
    if not ok:
        raise BackendError(f'backend "{name}" cannot run this: {reason}. Use backend="auto".')
    return backend, on_backend(planned, name, literal=backend.literal)


def _automatic(planned: Plan, graphs: bool, may_qualify: bool) -> Plan:
    if planned.device.type not in kernel_backend.AUTOMATIC_DEVICES:
        return _chosen(planned, graphs, may_qualify)
    key = planned, graphs, may_qualify, kernel_operands(planned.device, planned.precision)
    made, chosen = _kept.get(key, (None, None))
    if made != generation.current():
        now = generation.current()  # before: what is found for the moment alone advances it
        chosen = _chosen(planned, graphs, may_qualify)
        if len(_kept) >= _MAX_KEPT:
            _kept.clear()
        _kept[key] = now, chosen
    return chosen


def _chosen(planned: Plan, graphs: bool, may_qualify: bool) -> Plan:
    able, refusals = [], []
    # elsewhere the first that may is the fastest
    timed = planned.device.type in kernel_backend.AUTOMATIC_DEVICES
    for backend in BACKENDS.values():
        if able and (backend.literal or not timed):
            break
        ok, reason = backend.automatic(planned.device)  # before supports, which may import a compiler
        if ok:
            ok, reason = backend.supports(planned)
        if ok and isinstance(backend, kernel_backend.KernelBackend):
            reason = _unqualified(backend, planned, may_qualify)
        if reason:
            refusals.append((backend.name, reason))
        else:
            able.append(backend.name)
    if not able:
        raise BackendError("no backend can run this: " + "; ".join(f"{n}: {why}" for n, why in refusals))
    chosen, contenders = able[0], ()
    if len(able) > 1:
        chosen, contenders, slower = _fastest(planned, able, graphs)
        refusals += slower
    backend = BACKENDS[chosen]
    if not contenders:
        log_fallback(chosen, tuple(refusals))
    return on_backend(planned, chosen, tuple(refusals), literal=backend.literal, contenders=contenders)


def _unqualified(backend: kernel_backend.KernelBackend, planned: Plan, may_qualify: bool) -> str:
    """Why its kernels may not run a plan by "auto"; "" where they may."""
    needed = backend.kernel_kinds(planned)
    if not needed:
        return "no kernel of its own runs this"
    return automatic.refusal(planned.device, needed, may_run=may_qualify)


def _fastest(
    planned: Plan, able: list[str], graphs: bool
) -> tuple[str, tuple[str, ...], list[tuple[str, str]]]:
    """``(backend, contenders, refusals)`` among those that may run."""
    rule = timings.FALLBACK if timings.FALLBACK in able else able[0]
    reason = not_timed(planned)
    if reason:
        words = f"qualified, but not timed, so that {rule} runs: {reason}"
        return rule, (), [(name, words) for name in able if name != rule]
    known = timings.of_device(planned.device).get(timings.key_of(planned, graphs))
    if known is None or not known.covers(able):
        words = f"qualified, and not timed against {rule} yet: the first call does it"
        return rule, tuple(able), [(name, words) for name in able if name != rule]
    best = known.fastest(able) or rule
    refusals = []
    for name in able:
        if name in known.out:
            refusals.append((name, known.out[name]))
        elif name != best:
            took, least = known.seconds[name], known.seconds[best]
            refusals.append((name, f"{1e3 * took:.3g} ms a relaxation here, {best} {1e3 * least:.3g} ms"))
    return best, (), refusals


def not_timed(planned: Plan) -> str:
    """Why a plan's backends are not timed against each other; "" where they are."""
    for layer in planned.network.layers:
        for op in layer.ops:
            if isinstance(op, specs.Dropout):
                return f"{layer.label} draws random numbers"
            if isinstance(op, specs.BatchNorm) and op.moves_statistics:
                return f"{layer.label} moves its statistics in every call"
    if planned.loss == "callable":
        return "a loss that pcfast does not know may change with every call"
    return ""


def log_fallback(name: str, refusals: tuple[tuple[str, str], ...]) -> None:
    """Say once which backend runs where "auto" passed over others."""
    if refusals:
        info_once(f"running on {name}: " + "; ".join(f"{n} refused ({why})" for n, why in refusals))


def forget() -> None:
    """Choose anew, from what the files say now."""
    automatic.forget()
    timings.forget()
