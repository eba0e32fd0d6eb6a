"""The first call of its kind times the backends that "auto" may choose among; later ones run the fastest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..backends import BACKENDS, choose_backend, timings
from ..backends.base import on_device
from ..errors import BackendError, PcfastError
from ..problem.plan import Plan, on_backend, undecided
from ..problem.types import Problem
from ..support.log import info_once
from ..support.timing import clock_of, in_turns, reason_of
from . import cuda_graphs

ROUNDS = 5

_lock = threading.Lock()


class _NotTimed(Exception):
    """The problem itself is at fault: whoever runs it says how."""


def decided(problem: Problem, planned: Plan) -> Plan:
    """``planned``, or where it has contenders the plan of the one that is fastest on this problem.

    The measured relaxations leave nothing behind: parameters, ``.grad``, statistics and random states are as before,
    and what they find out about the data is not reported. A backend that fails is out, and the reason is kept.
    """
    if not planned.contenders or _capturing(planned.device):
        return planned
    asked, graphs = undecided(planned), cuda_graphs.switched_on()
    with _lock:
        _, chosen = choose_backend("auto", asked, graphs=graphs)
        if not chosen.contenders:  # timed by another thread meanwhile
            return chosen
        try:
            seconds, out = _measured(problem, asked, chosen.contenders)
        except _NotTimed:
            return planned
        result = timings.timings(asked, seconds, out)
        timings.keep(planned.device, timings.key_of(asked, graphs), result)
    info_once(f"timed on {result.what}: {words(result)}")
    return choose_backend("auto", asked, graphs=graphs)[1]


def words(result: timings.Timings) -> str:
    """Times, and what failed, in a line."""
    taken = [f"{name} {1e3 * seconds:.3g} ms" for name, seconds in result.seconds.items()]
    return "; ".join([", ".join(taken), *(f"{name} is out ({why})" for name, why in result.out.items())])


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    cuda = device.type == "cuda"
    with on_device(device), torch.random.fork_rng([device] if cuda else []):
        yield


def _measured(
    problem: Problem, asked: Plan, contenders: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds of each contender, and why the others are out."""
    problem = replace(problem, may_fall_back=False)
    ready, out = {}, {}
    with _undisturbed(asked.device):
        for name in contenders:
            try:
                ready[name] = cuda_graphs.apart(BACKENDS[name], problem, on_backend(asked, name))
            except Exception as failure:  # of kernels and their compilers, of memory
                if isinstance(failure, PcfastError) and not isinstance(failure, BackendError):
                    raise _NotTimed from failure
                out[name] = reason_of(failure)
        seconds, failed = in_turns(ready, clock_of(asked.device), ROUNDS)
    return seconds, out | {name: reason_of(failure) for name, failure in failed.items()}
