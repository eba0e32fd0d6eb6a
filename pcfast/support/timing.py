"""Timing of contenders in turns, so that what else happens on a machine strikes all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

import torch

#: Seconds that one call takes; a clock makes as many calls as it needs.
Clock = Callable[[Callable[[], object]], float]
Name = TypeVar("Name", bound=Hashable)

#: A contender that takes so many times as long as the best is not measured again.
PRUNE_RATIO = 2.0
_MIN_SAMPLE = 2e-3  # seconds


def in_turns(
    ready: Mapping[Name, Callable[[], object]], clock: Clock, rounds: int
) -> tuple[dict[Name, float], dict[Name, Exception]]:
    """Median seconds of each contender, and what those raised that failed.

    Contenders take turns, in a new order each round.
    """
    samples: dict[Name, list[float]] = {name: [] for name in ready}
    failed: dict[Name, Exception] = {}
    order, dice = list(ready), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            try:
                samples[name].append(clock(ready[name]))
            except Exception as failure:  # of torch, triton, the driver: such a contender is out
                failed[name] = failure
        order = [name for name in order if name not in failed]
        best = min((median(samples[name]) for name in order), default=0.0)
        order = [name for name in order if median(samples[name]) <= PRUNE_RATIO * best]
    return {name: median(taken) for name, taken in samples.items() if name not in failed}, failed


def clock_of(device: torch.device) -> Clock:
    """A GPU's own time between events on torch's current stream; on the CPU the host's."""
    return _Events(device) if device.type == "cuda" else _on_host


def _on_host(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class _Events:
    """A GPU's time between two events on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def __call__(self, run: Callable[[], object]) -> float:
        once = self._time(run, 1)
        return once if once >= _MIN_SAMPLE else self._time(run, round(_MIN_SAMPLE / max(once, 1e-7)))

    def _time(self, run: Callable[[], object], calls: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(self._stream)
        for _ in range(calls):
            run()
        last.record(self._stream)
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls  # it tells milliseconds


def reason_of(failure: Exception) -> str:
    """What was raised, in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0]}" if lines else type(failure).__name__
