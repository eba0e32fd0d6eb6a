"""Streams of captures, and what a failed capture leaves, on a stand-in for CUDA; uploads kept until a recording."""

from __future__ import annotations

import contextlib
import gc
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch

from pcfast.backends.triton.streams import Branches
from pcfast.bench import contenders
from pcfast.relaxation import cuda_graphs
from pcfast.support import streams
from pcfast.support.hashing import hashed_once
from pcfast.support.uploads import uploaded

CUDA = torch.device("cuda")


class FakeCuda:
    """Streams and captures as torch 2.11 has them: after a capture that failed its stream stays current, and the
    generator ``capturing`` until another has succeeded.
    """

    def __init__(self) -> None:
        self.made, self.captures, self.used = 0, [], []
        self.broken = self.capturing = False
        self.current = self.stream(torch.device("cpu"))

    def stream(self, device):
        self.made += 1
        return Stream(self.made, device)

    def use(self, stream):
        self.used.append(stream.cuda_stream)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        before, self.current, self.capturing = self.current, stream, True
        self.captures.append((stream.cuda_stream, capture_error_mode))
        failed = True
        try:
            yield
            failed = self.broken
        finally:
            if failed:
                raise RuntimeError("the capture failed")
        self.current, self.capturing = before, False


@dataclass
class Stream:
    cuda_stream: int
    device: torch.device
    device_index: int = 0

    def wait_stream(self, other) -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(streams, "_own", threading.local())
    for name, value in {
        "Stream": fake.stream,
        "stream": fake.use,
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda device=None: fake.current,
        "set_stream": lambda stream: setattr(fake, "current", stream),
        "CUDAGraph": Graph,
        "graph": fake.graph,
        "is_current_stream_capturing": lambda: fake.capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


@pytest.mark.parametrize("broken", [False, True])
def test_a_failed_capture_leaves_the_stream_and_the_generator_usable(broken, cuda):
    before, cuda.broken = cuda.current, broken

    def work():
        assert cuda.capturing
        raise ValueError("not in a capture")

    with pytest.raises(RuntimeError, match="the capture failed") as failure:
        cuda_graphs.record_cuda(work)
    assert isinstance(failure.value.__context__, ValueError)
    assert cuda.current is before and cuda.capturing == broken
    assert cuda.captures == 2 * [(2, "thread_local")]


def test_a_thread_captures_on_one_stream_beside_each_of_the_callers(cuda):
    def captured_on() -> int:
        cuda_graphs.record_cuda(lambda: None)
        return cuda.captures[-1][0]

    here, elsewhere = {captured_on() for _ in range(40)}, set()
    thread = threading.Thread(target=lambda: elsewhere.update(captured_on() for _ in range(3)))
    thread.start()
    thread.join()
    cuda.current = cuda.stream(CUDA)
    beside_another = {captured_on() for _ in range(3)}
    assert [len(result) for result in (here, elsewhere, beside_another)] == [1, 1, 1]
    assert len(here | elsewhere | beside_another) == 3


def test_benchmarks_capture_as_steps_do(cuda):
    """Beside jax's threads, say, whose allocations would end a capture in torch's default mode."""
    step = contenders.graphed(CUDA, lambda: [torch.ones(())])
    step.run()
    assert [mode for _, mode in cuda.captures] == ["thread_local"] and len(step.updates()) == 1


def test_branches_of_captures_take_the_same_streams(cuda):
    ran = []

    def work() -> None:
        branches = Branches(CUDA)
        for count in (3, 1, 2):
            branches.run([lambda i=i: ran.append(i) for i in range(count)])

    for _ in range(20):
        cuda_graphs.record_cuda(work)
    assert ran == 20 * [1, 2, 0, 0, 1, 0]
    assert cuda.used == 20 * [3, 4, 3] and cuda.made == 4


def test_an_upload_is_made_once_and_kept_as_long_as_it_is_held():
    made = []

    @uploaded(capacity=2)
    def table(*key) -> torch.Tensor:
        made.append(key)
        return torch.tensor(key)

    held = table(1)
    for i in range(2, 6):
        table(i)
    gc.collect()
    assert table(1) is held and len(made) == 5
    assert torch.equal(table(5), torch.tensor([5])) and len(made) == 5  # of the last two
    table(2)
    assert made[5:] == [(2,)]


@hashed_once
@dataclass(frozen=True)
class Counted:
    value: object


def test_a_hash_is_computed_once_and_not_carried_to_another_process():
    class Value:
        asked = 0

        def __hash__(self):
            Value.asked += 1
            return 5

    key = Counted(Value())
    assert len({hash(key) for _ in range(3)}) == 1 and Value.asked == 1
    named = Counted("a string, whose hash every process computes otherwise")
    expected = hash(named)
    again = pickle.loads(pickle.dumps(named))
    assert vars(again) == {"value": named.value} and again == named and hash(again) == expected
