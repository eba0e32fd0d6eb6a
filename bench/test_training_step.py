"""A training step on mlp_600 (batch 300, n = 20, float32): pcfast against the literal loop and backpropagation.

Run with `make bench`. Contenders of a method take turns within one test, so that a noisy machine hits them alike;
the table at the end gives medians and ratios. A run is refused (the gate fails) unless the updates agree first.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from literal import literal_step

import pcfast
from pcfast import networks

BATCH, STEP_SIZE, NUM_STEPS, ROUNDS = 300, 0.1, 20, 15


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    return networks.mlp_600(), torch.rand(BATCH, 784), torch.randint(0, 10, (BATCH,))


def pc_step(setting, method):
    model, x, y = setting
    for parameter in model.parameters():
        parameter.grad = None
    pcfast.pc_loss(model, x, y, method=method, step_size=STEP_SIZE, num_steps=NUM_STEPS).backward()


def backpropagation_step(setting):
    model, x, y = setting
    for parameter in model.parameters():
        parameter.grad = None
    F.cross_entropy(model(x), y).backward()


def updates(setting, step):
    step()
    return [p.grad.clone() for p in setting[0].parameters()]


#: method -> (what it is measured against, allowed difference of the updates, wanted ratio)
CASES = {
    "strict": ("literal loop", 1e-2, ">= 2.5"),  # the literal loop itself is 1e-3 off in float32
    "fixed_prediction": ("literal loop", 1e-2, ">= 15"),
    "exact": ("backpropagation", 1e-5, "<= 1.3 of its time"),
}


@pytest.mark.parametrize("method", CASES)
def test_training_step(benchmark, setting, method):
    name, tolerance, wanted = CASES[method]
    model, x, y = setting

    def step():
        pc_step(setting, method)

    def baseline():
        if method == "exact":
            backpropagation_step(setting)
        else:
            literal_step(model, F.cross_entropy, x, y, method, STEP_SIZE, NUM_STEPS)

    for ours, theirs in zip(updates(setting, step), updates(setting, baseline), strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm()), "correctness gate"

    baseline_times = []

    def take_turns():  # untimed, before each timed step
        start = time.perf_counter()
        baseline()
        baseline_times.append(time.perf_counter() - start)

    benchmark.pedantic(step, setup=take_turns, rounds=ROUNDS, warmup_rounds=2)
    theirs, ours = statistics.median(baseline_times[2:]), benchmark.stats.stats.median
    benchmark.extra_info.update(
        baseline=name, baseline_ms=theirs * 1e3, ours_ms=ours * 1e3, speed_up=theirs / ours, wanted=wanted
    )
    print(
        f"\n{method}: {ours * 1e3:.2f} ms, {name}: {theirs * 1e3:.2f} ms, "
        f"{theirs / ours:.2f} times as fast, {ours / theirs:.2f} of its time (wanted {wanted})"
    )


def test_host_overhead(benchmark):
    """pc_loss + backward on a net so small that tensor work hardly counts, against that bare tensor work."""
    torch.manual_seed(0)
    model = networks.mlp((4, 3, 3, 3, 2))
    x, y = torch.rand(2, 4), torch.randint(0, 2, (2,))

    def step():
        pcfast.pc_loss(model, x, y, method="exact").backward()

    def bare():
        F.cross_entropy(model(x), y).backward()

    bare_times = []

    def take_turns():
        start = time.perf_counter()
        bare()
        bare_times.append(time.perf_counter() - start)

    benchmark.pedantic(step, setup=take_turns, rounds=300, warmup_rounds=20)
    ours, theirs = benchmark.stats.stats.median, statistics.median(bare_times[20:])
    benchmark.extra_info.update(ours_us=ours * 1e6, bare_us=theirs * 1e6)
    print(
        f"\nhost time a step: {ours * 1e6:.0f} us, model(x) and backward alone: {theirs * 1e6:.0f} us, "
        f"overhead {(ours - theirs) * 1e6:.0f} us for {len(list(model.parameters()))} parameters"
    )
