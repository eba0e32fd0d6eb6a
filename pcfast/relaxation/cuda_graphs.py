"""CUDA-graph replay round any backend.

A relaxation launches the same kernels on the same addresses every step, so from its second call on it is
recorded once and replayed: no Python and no launches in between. A graph belongs to one key: plan, shapes,
strides, dtypes, parameter addresses, flags. Weight casts and Gram matrices are part of it, so it follows
weights that are updated in place. Inputs are copied in and results are cloned out: nothing the caller holds
lies in graph memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends import Backend
from ..problem import early_exit
from ..problem.plan import Plan
from ..problem.types import Outcome, Problem
from ..support.hashing import hashed_once
from ..support.log import info_once
from ..support.streams import kept_beside

#: A recorder runs a function once and gives its result and what replays it into that same result.
Recorder = Callable[[Callable[[], Outcome]], tuple[Outcome, Callable[[], None]]]

_switched_on = os.environ.get("PCFAST_CUDA_GRAPHS", "1") != "0"


def use_cuda_graphs(flag: bool) -> None:
    """Switch CUDA-graph replay on or off for this process (on at first, unless PCFAST_CUDA_GRAPHS=0)."""
    global _switched_on
    _switched_on = bool(flag)
    if not flag:
        CACHE.clear()


def switched_on() -> bool:
    """Whether graphs may be used in this process (:func:`use_cuda_graphs`)."""
    return _switched_on


def ineligible_reason(backend: Backend, problem: Problem, plan: Plan) -> str:
    """Why a problem is not replayed from a graph; "" where it is."""
    if not problem.x.is_cuda:
        return "CUDA graphs need a CUDA device"
    if not _switched_on:
        return "switched off"
    if torch.cuda.is_current_stream_capturing():
        return "the caller is capturing a graph already"
    return _refusal(backend, problem, plan)


def _refusal(backend: Backend, problem: Problem, plan: Plan) -> str:
    """The reasons that lie in the problem itself."""
    if problem.start is not None or problem.activations is not None or problem.output_gradient is not None:
        return "beliefs or activations were given by the caller"
    if problem.move is not None:
        return "an optimiser moves the parameters between iterations"
    if not isinstance(problem.y, Tensor):
        return "y is not a tensor"
    if plan.tolerance is not None and early_exit.deciding() is not None:
        return "processes decide together when the relaxation ends"
    return backend.replays(problem, plan)[1]


def _layout(tensor: Tensor) -> Hashable:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _numerics(plan: Plan) -> Hashable:
    """The switches that decide which kernels torch picks."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    # fp32_precision follows the older switches (allow_tf32, set_float32_matmul_precision) too; reading those
    # raises once somebody has used fp32_precision
    products = cublas.fp32_precision, cublas.allow_bf16_reduced_precision_reduction
    convolutions = None
    if plan.network.convolves:
        convolutions = cudnn.conv.fp32_precision, cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    return products, convolutions, torch.are_deterministic_algorithms_enabled()


@hashed_once
@dataclass(frozen=True)
class _Key:
    parts: tuple[Hashable, ...]


def graph_key(problem: Problem, plan: Plan) -> Hashable:
    """What a graph depends on. Equal keys may share a graph."""
    weight = problem.loss.weight
    parts = (
        plan,
        problem.step_size,
        (problem.raise_now, problem.check),
        _layout(problem.x),
        _layout(problem.y),
        (problem.loss.kind, problem.loss.settings, problem.loss.normalizer),
        None if weight is None else (weight.data_ptr(), _layout(weight)),
        problem.known.layout,
        _numerics(plan),
        torch.cuda.current_stream(problem.x.device).cuda_stream if problem.x.is_cuda else None,
        threading.get_ident(),  # cuBLAS and cuDNN handles are per thread, and capturing must not make any
    )
    return _Key(parts)


_NOTES = 256  # keys remembered as called once


def _trim(entries: OrderedDict, capacity: int) -> None:
    while len(entries) > capacity:
        entries.popitem(last=False)


def _copied(outcome: Outcome) -> Outcome:
    """The outcome in memory of its own, in few launches: times one is the same number, NaN and -0 too."""
    result: list[Tensor] = []
    outcome.mapped(lambda tensor: result.append(tensor) or tensor)
    real = [tensor for tensor in result if tensor.is_floating_point()]
    copies = iter(torch._foreach_mul(real, 1.0))
    return outcome.mapped(lambda tensor: next(copies) if tensor.is_floating_point() else tensor.clone())


@dataclass
class _Graph:
    x: Tensor
    y: Tensor
    result: Outcome
    replay: Callable[[], None]

    def run(self, problem: Problem) -> Outcome:
        self.x.copy_(problem.x)
        self.y.copy_(problem.y)
        self.replay()
        outcome = _copied(self.result)
        outcome.gradients = {
            parameter: outcome.gradients[index]
            for index, parameter in enumerate(problem.known.parameters)
            if index in outcome.gradients
        }
        return outcome


class GraphCache:
    """At most ``capacity`` recorded graphs, the least recently used dropped first.

    A key's first call runs plainly: it warms libraries up, and shapes that come once (a smaller last batch)
    are never recorded. A key whose recording failed runs plainly from then on, and says why once.
    """

    def __init__(self, capacity: int, recorder: Recorder) -> None:
        self.capacity, self.record = capacity, recorder
        self._graphs: OrderedDict[Hashable, _Graph | str] = OrderedDict()  # a str says why there is none
        # keys called once, and what a recording will read: it is not uploaded again, which no capture could do
        self._seen: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return sum(isinstance(entry, _Graph) for entry in self._graphs.values())

    def clear(self) -> None:
        with self._lock:
            self._graphs.clear()
            self._seen.clear()

    @torch.no_grad()
    def run(self, backend: Backend, problem: Problem, plan: Plan) -> tuple[Outcome, str]:
        """``(outcome, reason)``; the reason says why it was not replayed and is "" where it was."""
        key = graph_key(problem, plan)
        with self._lock:
            if key in self._seen:
                resources = self._seen.pop(key)
                self._graphs[key] = self._capture(backend, problem, plan)
                del resources
                _trim(self._graphs, self.capacity)
            if key in self._graphs:
                self._graphs.move_to_end(key)
                entry = self._graphs[key]
                if isinstance(entry, _Graph):
                    return entry.run(problem), ""
            else:
                entry = None
        outcome = backend.run(problem, plan)
        if entry is not None:
            return outcome, entry
        with self._lock:
            self._seen[key] = outcome.resources
            _trim(self._seen, _NOTES)
        return outcome, "first call of its kind: recorded from the next on"

    def _capture(self, backend: Backend, problem: Problem, plan: Plan) -> _Graph | str:
        x, y = problem.x.clone(), problem.y.clone()
        static = replace(problem, x=x, y=y)
        positions = {parameter: index for index, parameter in enumerate(problem.known.parameters)}

        def work() -> Outcome:
            outcome = backend.run(static, plan)
            # by position, so that the graph does not keep the model alive
            outcome.gradients, outcome.owners = {positions[p]: g for p, g in outcome.gradients.items()}, []
            return outcome

        try:
            result, replay = self.record(work)
        except RuntimeError as failure:
            reason = f"recording failed: {str(failure).splitlines()[0]}"
            info_once(f"CUDA graphs are not used for this network: {reason}")
            return reason
        return _Graph(x, y, result, replay)


def record_cuda(work: Callable[[], Outcome]) -> tuple[Outcome, Callable[[], None]]:
    """Capture ``work`` in a CUDA graph. Other threads may go on using CUDA meanwhile.

    In torch 2.11 they may not draw random numbers on this device: until the capture has ended torch takes them for
    part of it, and raises.
    """
    before = torch.cuda.current_stream()
    try:
        return _captured(work, before)
    except BaseException:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream current
        # torch 2.11 takes the device's random generator for captured until some capture succeeds: before that,
        # dropout and every replay raise
        with contextlib.suppress(RuntimeError):  # a broken context: the failure itself says so
            _captured(lambda: torch.zeros(1, device=before.device), before)
        raise
    finally:
        torch.cuda.set_stream(before)


def _captured(work: Callable[[], object], beside: torch.cuda.Stream) -> tuple:
    """``work``'s result and what replays it, captured on the stream that this thread keeps beside ``beside``."""
    graph = torch.cuda.CUDAGraph()
    # torch's own capture stream belongs to the first device that captured
    (stream,) = kept_beside(beside, 1)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


CACHE = GraphCache(capacity=16, recorder=record_cuda)


@torch.no_grad()
def apart(backend: Backend, problem: Problem, plan: Plan) -> Callable[[], object]:
    """What runs a problem again and again outside the cache: a replay where it is replayed, else plain calls.

    It has run once before this returns.
    """
    first = backend.run(problem, plan)
    if ineligible_reason(backend, problem, plan):
        return lambda: backend.run(problem, plan)
    recorded = CACHE.record(lambda: backend.run(problem, plan))
    # the graph reads what the runs uploaded, and writes its result
    return kept_alive(recorded[1], first.resources, recorded[0])


def kept_alive(replay: Callable[[], None], *needed: object) -> Callable[[], None]:
    """``replay``, which keeps ``needed`` alive."""

    def again(_alive: tuple = needed) -> None:
        replay()

    return again


def run(backend: Backend, problem: Problem, plan: Plan) -> tuple[Outcome, str]:
    """Run a problem, from a graph where that is possible: ``(outcome, why it was not replayed)``."""
    reason = ineligible_reason(backend, problem, plan)
    if reason:
        return backend.run(problem, plan), reason
    with torch.cuda.device(problem.x.device):
        return CACHE.run(backend, problem, plan)
