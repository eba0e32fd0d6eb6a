"""Timing: rounds in which the contenders take turns, medians, and the ceilings that floors are held against."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .contenders import PreparedStep, switches

ROUNDS, QUICK_ROUNDS = 21, 5
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are timed several at a time
SECONDS_OF_A_CEILING = 0.5
MIB = 2**20


@dataclass(frozen=True)
class Times:
    """Seconds of a call: median, 20th and 80th percentile; ``host`` is when the call returned (None on a CPU).

    ``clock`` names what measured them.
    """

    median: float
    p20: float
    p80: float
    host: float | None
    samples: int
    clock: str


class WallClock:
    """The host's time, until the device is done."""

    name = "wall"

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Seconds since the start; waits."""
        self.wait()
        return time.perf_counter() - self.started


class EventClock:
    """A GPU's time between two events on torch's current stream: the host's wait for the device is not in it."""

    name = "events"

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self.first.record(self.stream)

    def stop(self) -> float:
        """Seconds since the start; waits."""
        self.last.record(self.stream)
        self.last.synchronize()
        return self.first.elapsed_time(self.last) / 1e3  # it tells milliseconds


def when_done() -> float:
    """The host's clock once the GPU has done all that it was given: a timer for pytest-benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def clock_of(step: PreparedStep, device: torch.device) -> WallClock | EventClock:
    """Events wherever they see the step's work."""
    return EventClock(device) if device.type == "cuda" and not step.off_stream else WallClock(step.wait)


def take_turns(
    steps: Sequence[tuple[str, PreparedStep]],
    precision: str,
    device: torch.device,
    rounds: int,
    enough: Callable[[], bool],
) -> dict[str, Times]:
    """Time all ``steps`` in rounds, in a new order each, so that a noisy or throttling machine hits all alike.

    ``enough()`` stops after a round; at least three are run.
    """
    order, dice = list(steps), random.Random(0)
    with switches(precision, device):
        calls = {name: _calls_a_sample(step) for name, step in steps}
        clocks = {name: clock_of(step, device) for name, step in steps}
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in steps}
        for done in range(rounds):
            dice.shuffle(order)
            for name, step in order:
                samples[name].append(_sample(step, calls[name], clocks[name]))
            if done >= 2 and enough():
                break
    return {name: _times(result, device, clocks[name].name) for name, result in samples.items()}


def _calls_a_sample(step: PreparedStep) -> int:
    step.run()  # warm-up: libraries set themselves up, graphs are recorded on the second call
    step.run()
    step.wait()
    start = time.perf_counter()
    step.run()
    step.wait()
    return max(1, round(SHORTEST_SAMPLE / max(time.perf_counter() - start, 1e-7)))


def _sample(step: PreparedStep, calls: int, clock: WallClock | EventClock) -> tuple[float, float]:
    """(seconds a call, seconds until the call returned)."""
    step.wait()
    collecting = gc.isenabled()
    gc.disable()
    try:
        clock.start()
        called = time.perf_counter()
        for _ in range(calls):
            step.run()
        returned = time.perf_counter()
        return clock.stop() / calls, (returned - called) / calls
    finally:
        if collecting:
            gc.enable()


def _times(samples: list[tuple[float, float]], device: torch.device, clock: str) -> Times:
    whole = torch.tensor([s for s, _ in samples], dtype=torch.float64)
    p20, median, p80 = (float(whole.quantile(q)) for q in (0.2, 0.5, 0.8))
    host = float(torch.tensor([h for _, h in samples]).median()) if device.type == "cuda" else None
    return Times(median, p20, p80, host, len(samples), clock)


def peak_memory(step: PreparedStep, precision: str, device: torch.device) -> int:
    """Bytes of CUDA memory that one call needs above what is held before it."""
    with switches(precision, device):
        step.run()
        step.wait()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step.run()
        step.wait()
        return torch.cuda.max_memory_allocated(device) - before


def ceilings(precision: str, device: torch.device, quick: bool) -> dict[str, float]:
    """Rates of this machine: multiply-adds a second of a large product in ``precision``, copied bytes a second.

    A copy counts bytes read and bytes written.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024 if quick else 2048
    # made in bfloat16: autocast would cast 8192 x 8192 numbers twice in every product
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn((1024 if on_gpu else 64) * MIB // 4, device=device)
    target = torch.empty_like(source)
    products = _best(lambda: a @ b, precision, device)
    copies = _best(lambda: target.copy_(source), precision, device)
    return {
        "multiply_adds_per_s": size**3 / products,
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / copies,
    }


def _best(run: Callable[[], object], precision: str, device: torch.device) -> float:
    """Seconds of the fastest of many calls: a ceiling is what the machine can do, not what it did on average."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    with switches(precision, device), torch.no_grad():
        run()
        seconds: list[float] = []
        while len(seconds) < 7 or sum(seconds) < SECONDS_OF_A_CEILING:
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
    return min(seconds)
