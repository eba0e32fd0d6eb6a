"""The benchmarks: the gate closes, clocks and floors are right, rows say what ran; records, README, GPU script."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pcfast
from pcfast import networks
from pcfast.backends import BACKENDS, Eager
from pcfast.bench import contenders, floor, gate, loops, measure, memory, report, runner, sources, tables
from pcfast.bench.contenders import CONTENDERS
from pcfast.bench.microbenchmarks import rounding
from pcfast.bench.workloads import WORKLOADS, Workload
from pcfast.cli import main

sys.path.append(str(Path(__file__).parent / "native"))

import native_build

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "mlp": Workload(
        "small_mlp", lambda: networks.mlp([6, 9, 8, 4], nn.Tanh), (6,), 5, "small", 4, num_steps=7
    ),
    "cnn": Workload(
        "small_cnn", lambda: networks.mnist_cnn((1, 10, 10)), (1, 10, 10), 3, "small", num_steps=6
    ),
}
METHODS = ("strict", "fixed_prediction", "incremental")
GELU_FIRST = Workload(
    "small_gelu",
    lambda: nn.Sequential(nn.Linear(6, 9), nn.Sequential(nn.GELU(), nn.Linear(9, 8), nn.GELU()), nn.Linear(8, 4)),
    (6,), 5, "small, beliefs before and behind activations", 4, num_steps=7,
)  # fmt: skip


#: Of incremental: what the small networks follow.
LR = 1e-3


def changed(workload: Workload, **values) -> Workload:
    return Workload(**{**workload.__dict__, **values})


# -------------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("workload", [*SMALL.values(), GELU_FIRST], ids=lambda workload: workload.name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["literal", "autograd", "plain", "jax"])
def test_baselines_compute_predictive_coding(workload, method, name):
    """Each, in float64 by the gate, against the reference backend; jax in float32 where it is installed."""
    workload = changed(workload, method=method, lr=LR if method == "incremental" else 0.0)
    if name == "autograd" and method == "fixed_prediction":
        assert "does not descend" in CONTENDERS[name].ineligible_reason(workload, "ieee", CPU)
        return
    why = CONTENDERS[name].ineligible_reason(workload, "ieee", CPU)
    if why:
        pytest.skip(why)
    verdict = gate.Gate(workload, CPU, workload.batch).judge(CONTENDERS[name], "ieee")
    assert verdict.reason == "" and 0 < verdict.error < 1  # in float32 belief form loses digits


@pytest.mark.parametrize("kind", SMALL)
def test_backpropagation_is_judged_as_the_gradient(kind):
    workload = SMALL[kind]  # strict: its updates are not the gradient
    verdict = gate.Gate(workload, CPU, workload.batch).judge(CONTENDERS["backpropagation"], "ieee")
    assert verdict.reason == "" and verdict.error < 1e-5


@pytest.mark.parametrize("kind", SMALL)
def test_the_compiled_body_is_the_same_iteration(kind):
    """Without code generation, which takes half a minute: ``iterate`` can be traced whole."""
    model, x, y = SMALL[kind].draw(CPU)
    with torch.no_grad():
        graph = torch.compile(loops.iterate, fullgraph=True, backend="eager")
        result = loops.plain_step(model, x, y, "strict", 0.1, 3, body=graph)
        expected = loops.plain_step(model, x, y, "strict", 0.1, 3)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_every_workload_is_known_to_the_baselines():
    for workload in WORKLOADS.values():
        with torch.device("meta"):
            model = workload.make()
            assert model(torch.empty(1, *workload.sample)).shape == (1, workload.classes), workload.name
        assert loops.unknown(model) == "", workload.name


def test_what_cannot_run_says_why():
    unknown = changed(
        SMALL["mlp"], make=lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.GELU("tanh")))
    )
    assert "GELU" in CONTENDERS["plain"].ineligible_reason(unknown, "ieee", CPU)
    assert "CUDA" in CONTENDERS["plain_graph"].ineligible_reason(SMALL["mlp"], "ieee", CPU)
    exact = changed(SMALL["mlp"], method="exact")
    assert "no loop" in CONTENDERS["literal"].ineligible_reason(exact, "ieee", CPU)


# -------------------------------------------------------------------------------------------------- gate


class Wrong(Eager):
    """Updates 0.1 % too large."""

    def run(self, problem, plan):
        outcome = super().run(problem, plan)
        outcome.gradients = {p: g * 1.001 for p, g in outcome.gradients.items()}
        return outcome


@pytest.fixture
def wrong_backend(monkeypatch):
    backend = Wrong()
    backend.name = "wrong"
    monkeypatch.setitem(BACKENDS, "wrong", backend)
    monkeypatch.setitem(CONTENDERS, "wrong", contenders._backend("wrong"))


@pytest.fixture
def small_workloads(monkeypatch):
    for workload in SMALL.values():
        monkeypatch.setitem(WORKLOADS, workload.name, workload)
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 1e-4)
    monkeypatch.setattr(measure, "SECONDS_OF_A_CEILING", 0.01)


def timed(record: dict, contender: str) -> dict:
    return next(row for row in record["rows"] if row["contender"] == contender)


def test_no_number_from_a_wrong_backend(wrong_backend, small_workloads):
    record = runner.run(["small_mlp"], ["eager", "wrong"], ["ieee"], CPU, quick=True)
    assert timed(record, "eager")["status"] == "timed"
    row = timed(record, "wrong")
    assert row["status"] == "skipped" and row["reason"].startswith("gate closed: layer")
    assert "seconds" not in row and row["error"] > row["bound"]


def test_a_wrong_baseline_is_not_timed(small_workloads, monkeypatch):
    def prepare(workload, model, x, y, precision):
        step = contenders._literal(workload, model, x, y, precision)
        return contenders.PreparedStep(step.run, lambda: [1.001 * u for u in step.updates()], step.wait)

    monkeypatch.setitem(
        CONTENDERS, "literal", contenders.Contender("literal", False, "", lambda *_: "", prepare, 1)
    )
    row = timed(runner.run(["small_mlp"], ["literal"], ["ieee"], CPU, quick=True), "literal")
    assert row["status"] == "skipped" and "off in float64" in row["reason"]


def test_a_baseline_that_breaks_is_named_and_the_others_go_on(small_workloads, monkeypatch):
    def prepare(*_):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setitem(
        CONTENDERS, "plain", contenders.Contender("plain", False, "", lambda *_: "", prepare, 1)
    )
    record = runner.run(["small_mlp"], ["plain", "eager"], ["ieee"], CPU, quick=True)
    assert timed(record, "plain")["reason"] == "failed: RuntimeError: no compiler here"
    assert timed(record, "eager")["status"] == "timed"


@pytest.fixture(scope="module")
def deep_gate():
    """Of a network so deep that float64 loses the first layers' updates: there bounds are widest."""
    return gate.Gate(WORKLOADS["deep_mlp_32"], CPU, runner.GATE_ROWS["cpu"])


@pytest.mark.parametrize("name", ["literal", "plain", "jax"])
def test_the_right_algorithm_may_lose_what_float64_loses(deep_gate, name):
    why = CONTENDERS[name].ineligible_reason(deep_gate.workload, "ieee", CPU)
    if why:
        pytest.skip(why)
    verdict = deep_gate.judge(CONTENDERS[name], "ieee")
    assert verdict.reason == "" and verdict.error > 0.1  # in float32 it loses them where float64 does not


def test_no_error_is_told_of_what_float64_does_not_know(deep_gate):
    """A shift far below what float64 may lose, and far above the first layers' updates."""

    def prepare(*case):
        step = contenders._plain_eager(*case)
        return contenders.PreparedStep(
            step.run, lambda: [update + 1e-13 for update in step.updates()], step.wait
        )

    verdict = deep_gate.judge(another(prepare), "fp64")
    assert verdict.reason == "" and 0 < verdict.error < 0.1


def another(prepare) -> contenders.Contender:
    return contenders.Contender("another", False, "", lambda *_: "", prepare, 1)


def other_steps(more: int):
    """The plain loop with so many more iterations than asked for."""

    def prepare(workload, *rest):
        return contenders._plain_eager(changed(workload, num_steps=workload.num_steps + more), *rest)

    return prepare


def stale_jacobians(workload, model, x, y, precision):
    """The plain loop in which Jacobians stay at the forward pass."""
    kept, v = [], x
    for layer in model:
        v, saved = loops._forward(layer, v)
        kept.append(saved)

    def body(model, v, mu_1, y, step_size):
        _, errors = loops.iterate(model, v, mu_1, y, step_size)
        moved = [
            v[l] + step_size * (errors[l - 1] - loops._backward(model[l], kept[l], errors[l]))
            for l in range(1, len(model))
        ]
        return [v[0], *moved, v[-1]], errors

    return contenders._returning(x.device, contenders._plain(workload, model, x, y, body))


@pytest.mark.parametrize("prepare", [other_steps(-1), other_steps(1), stale_jacobians])
@pytest.mark.parametrize("deep", [False, True])
def test_a_loop_that_is_nearly_right_is_refused(prepare, deep, deep_gate):
    small_gate = gate.Gate(SMALL["mlp"], CPU, SMALL["mlp"].batch)
    verdict = (deep_gate if deep else small_gate).judge(another(prepare), "ieee")
    assert "off in float64" in verdict.reason


# ---------------------------------------------------------------------------------------------- clocks


class FakeGpu:
    """torch.cuda's events and stream, with a device time that only ``work`` moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0  # seconds
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.reached = False

            def record(self, stream):
                assert stream == "current stream"
                self.at = gpu.now

            def synchronize(self):
                self.reached = True

            def elapsed_time(self, later):
                assert later.reached
                return 1e3 * (later.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current stream")

    def work(self) -> None:
        self.now += 1000.0


def test_a_gpu_is_timed_by_its_events_and_what_they_do_not_see_by_the_host(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 1e-5)  # some calls a sample
    gpu, waits = FakeGpu(monkeypatch), []
    steps = [
        ("on the stream", contenders.PreparedStep(gpu.work, list, lambda: None)),
        ("off it", contenders.PreparedStep(gpu.work, list, lambda: waits.append(0), off_stream=True)),
    ]
    times = measure.take_turns(steps, "ieee", torch.device("cuda"), 4, lambda: False)
    seen, unseen = times["on the stream"], times["off it"]
    assert seen.clock == "events" and seen.p20 == seen.median == seen.p80 == pytest.approx(1000)
    assert unseen.clock == "wall" and 0 < unseen.host <= unseen.median < 100
    assert 0 < seen.host < 100
    assert len(waits) == 2 + 2 * 4  # warming up, then before and after every sample


def test_jax_alone_works_off_torchs_stream():
    workload = SMALL["mlp"]
    able = {
        name: contender
        for name, contender in CONTENDERS.items()
        if name != "plain_compiled" and not contender.ineligible_reason(workload, "ieee", CPU)
    }
    steps = {name: c.prepare(workload, *workload.draw(CPU), "ieee") for name, c in able.items()}
    assert {name for name, step in steps.items() if step.off_stream} == {"jax"} & set(steps)


# ------------------------------------------------------------------------------------------------ record


@pytest.mark.parametrize("precision", ["ieee", "bf16", "fp64"])
def test_a_record_holds_what_was_found(small_workloads, precision):
    seen = []
    names = ["eager", "literal", "plain", "plain_graph", "backpropagation"]
    record = runner.run(
        ["small_mlp", "small_cnn"],
        names,
        [precision],
        CPU,
        quick=True,
        progress=lambda *said: seen.append(said),
    )
    assert json.loads(json.dumps(record)) == record
    assert record["machine"]["torch"] == str(torch.__version__) and record["sources"] == sources.digest()
    assert [(row["workload"], row["contender"]) for row in record["rows"]] == [
        (workload.name, name) for workload in SMALL.values() for name in names
    ]
    assert seen[-1] == (2, 2, "done") and any("gate of literal" in what for _, _, what in seen)
    for row in record["rows"]:
        if row["contender"] == "plain_graph":
            assert row["status"] == "skipped" and "CUDA" in row["reason"]
            continue
        assert row["status"] == "timed" and row["reason"] == "" and row["precision"] == precision
        assert 0 < row["p20"] <= row["seconds"] <= row["p80"]
        assert row["samples"] == measure.QUICK_ROUNDS and row["host_seconds"] is None
        assert row["clock"] == "wall"
        limits = record["ceilings"][precision]
        products = row["multiply_adds"] / limits["multiply_adds_per_s"]
        assert row["floor_seconds"] == max(products, row["bytes"] / limits["copy_bytes_per_s"])
        assert 0 < row["energy_drop"] < 1


def test_counts_are_those_of_the_planner():
    workload = WORKLOADS["mlp_600"]
    model, x, _ = workload.draw(CPU, rows=300)
    counts = floor.counts_of(workload, model)
    assert counts["multiply_adds"] == pcfast.explain(model, x.shape).plan.work.total
    assert counts["bytes"] == 4 * (2 * sum(p.numel() for p in model.parameters()) + x.numel())
    limits = {"multiply_adds_per_s": counts["multiply_adds"] / 2.0, "copy_bytes_per_s": counts["bytes"] / 1.0}
    assert floor.floor_of(counts, limits) == {"floor_seconds": 2.0, "binding": "products"}


def test_a_run_out_of_time_says_so(small_workloads):
    record = runner.run(["small_mlp"], ["eager"], ["ieee"], CPU, quick=True, seconds=0)
    assert [row["reason"] for row in record["rows"]] == ["out of time"]


def test_what_was_found_is_kept_after_every_case(small_workloads, tmp_path, monkeypatch, capsys):
    """A run that is stopped in its second case has written the first; the file does not pass for a full run."""
    path, case, seen = tmp_path / "run.json", runner._case, []
    monkeypatch.setitem(WORKLOADS, "tiny_exact", SMALL["mlp"])

    def interrupted(workload, precision, *rest):
        seen.append((workload.name, precision))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return case(workload, precision, *rest)

    monkeypatch.setattr(runner, "_case", interrupted)
    monkeypatch.setenv("PCFAST_TRACEBACK", "1")
    command = ["bench", "tiny_exact", "--contender", "eager", "--precision", "ieee", "--precision", "bf16"]
    assert main([*command, "--quick", "--device", "cpu", "--json", str(path)]) == 130
    assert "in interrupted" in capsys.readouterr().err
    record = json.loads(path.read_text())
    first, second = record["rows"]
    assert first["status"] == "timed" and first["floor_seconds"] > 0
    assert second["precision"] == "bf16" and second["reason"] == "out of time"
    path.write_text(json.dumps({**record, "quick": False, "commit": "abc1234"}))
    with pytest.raises(Exception, match="did not end"):
        report.record(path)


def test_the_time_is_looked_at_before_every_contender(small_workloads, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(now))  # a second more at every look
    names = ["eager", "plain", "literal", "backpropagation"]
    record = runner.run(["small_mlp"], names, ["ieee"], CPU, quick=True, seconds=4)
    reasons = [timed(record, name)["reason"] for name in names]
    assert reasons == ["", "", "out of time", "out of time"] and record["complete"]


def test_compilers_run_once_for_a_case_and_once_for_the_gate_in_float64(small_workloads, monkeypatch):
    prepared = []

    def prepare(workload, model, x, y, precision):
        prepared.append((precision, x.dtype))
        return contenders._plain_eager(workload, model, x, y, precision)

    monkeypatch.setitem(CONTENDERS, "another", another(prepare))
    record = runner.run(["small_mlp"], ["another"], ["ieee", "bf16"], CPU, quick=True)
    assert [row["status"] for row in record["rows"]] == ["timed", "timed"]
    assert prepared == [("fp64", torch.float64), ("ieee", torch.float32), ("bf16", torch.float32)]


def test_the_ceiling_of_bf16_is_that_of_a_product_alone(monkeypatch):
    """Not of the casts of its operands, which autocast makes in every product."""
    monkeypatch.setattr(measure, "SECONDS_OF_A_CEILING", 0.0)
    casts, best = [], measure._best

    class NoCasts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            casts.extend([function] if function is torch.ops.aten._to_copy.default else [])
            return function(*args, **(kwargs or {}))

    def watched(run, *rest):
        with NoCasts():
            return best(run, *rest)

    monkeypatch.setattr(measure, "_best", watched)
    assert measure.ceilings("bf16", CPU, quick=True)["multiply_adds_per_s"] > 0 and casts == []


def test_what_would_take_minutes_is_not_started(small_workloads, monkeypatch):
    monkeypatch.setitem(runner.LONGEST_STEP, "cpu", 1e-9)
    row = timed(runner.run(["small_mlp"], ["literal"], ["ieee"], CPU, quick=True), "literal")
    assert "would take about" in row["reason"]


def test_contenders_take_turns():
    order = []

    def step(name: str) -> contenders.Step:
        return contenders.PreparedStep(lambda: order.append(name), list, lambda: None)

    times = measure.take_turns([("a", step("a")), ("b", step("b"))], "ieee", CPU, 6, lambda: False)
    assert times["a"].samples == times["b"].samples == 6
    switches = sum(first != second for first, second in pairwise(order))
    assert switches >= 6  # blocks, not all of one and then all of the other


def test_peak_memory_is_that_of_the_step():
    """mlp_600's literal loop holds a handful of (300, 600) tensors: megabytes, and not hundreds of them."""
    result = memory.in_a_process("mlp_600", "plain", "ieee")
    assert 1e6 < result < 3e8


# ------------------------------------------------------------------------------------- tables and README


def fake_rows() -> list[dict]:
    def row(contender, seconds, ours=False, exact=False):
        return {
            "workload": "w", "precision": "ieee", "method": "strict", "contender": contender, "ours": ours,
            "exact": exact, "status": "timed", "seconds": seconds, "p20": seconds, "p80": seconds, "error": 1e-7,
            "floor_seconds": 0.5, "reason": "", "multiply_adds": 10, "bytes": 5,
        }  # fmt: skip

    skipped = {**row("jax", 0.0), "status": "skipped", "reason": "jax is not installed"}
    return [
        row("eager", 1.0, ours=True),
        row("literal", 8.0),
        row("plain", 4.0),
        row("backpropagation", 0.2, exact=True),
        skipped,
    ]


def test_tables_compare_with_the_best_rival_in_predictive_coding():
    rows = fake_rows()
    assert tables.best_other(rows)["contender"] == "plain"  # neither ours nor the gradient
    cells = dict(zip(tables.headings(), tables.cells(rows[0], rows), strict=True))
    assert cells[">against literal"] == "8.00x" and cells[">against best other"] == "4.00x"
    assert cells[">of floor"] == "50%" and cells[">time"] == "1 s"
    assert tables.cells(rows[4], rows)[-1] == "jax is not installed"
    assert "gradient" in tables.cells(rows[3], rows)[-1]
    assert tables.time(1.234e-5) == "12.3 us"


def test_no_best_rival_where_the_gate_kept_one_out():
    rows = fake_rows()
    rows[4]["reason"] = "gate closed: its updates are off"
    assert tables.best_other(rows) is None
    assert tables.cells(rows[0], rows)[4] == ""


def fake_record(device: str = "cpu", digest: str | None = None) -> dict:
    return {
        "format": runner.FORMAT, "recorded": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "quick": False,
        "sources": digest or sources.digest(), "device": device, "rows": fake_rows(),
        "machine": {"processor": "A CPU", "threads": 2, "python": "3.11", "torch": "2.13"},
        "ceilings": {"ieee": {"multiply_adds_per_s": 1e10, "copy_bytes_per_s": 1e10}},
    }  # fmt: skip


def test_readme_says_that_no_gpu_was_measured_and_marks_old_records():
    assert report.text([fake_record()]).startswith(report.NOT_MEASURED)
    assert report.NOT_MEASURED not in report.text([fake_record("cuda"), fake_record()])
    assert "Older than the code" not in report.text([fake_record()])
    assert "Older than the code" in report.text([fake_record(digest="0" * 16)])


def test_the_digest_follows_the_sources(monkeypatch, tmp_path):
    before = sources.digest()
    (tmp_path / "pcfast" / "cli").mkdir(parents=True)
    package = tmp_path / "pcfast"
    (package / "__init__.py").write_text("")
    (package / "cli" / "x.py").write_text("1")
    monkeypatch.setattr(pcfast, "__file__", str(package / "__init__.py"))
    result = sources.digest()
    assert result != before
    (package / "cli" / "x.py").write_text("2")  # no training step runs through it
    assert sources.digest() == result
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cu").write_text("")
    assert sources.digest() != result


def test_the_picture_is_drawn(tmp_path):
    path = tmp_path / "speed.png"
    report.picture([fake_record("cuda"), fake_record()], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def deep_record(*depths: int) -> dict:
    """:func:`fake_record` of deep networks, in which the plain loop was refused from 32 layers on."""
    rows = [
        {**row, "workload": f"deep_mlp_{depth}", "num_steps": 4, "seconds": depth * row["seconds"]}
        for depth in depths
        for row in fake_rows()
        if depth < 32 or row["contender"] != "plain"
    ]
    return {**fake_record(), "rows": rows}


def test_time_against_depth_is_that_of_an_iteration(tmp_path):
    record = deep_record(32, 8)
    assert report.depth_lines(record) == {
        "ieee": {"pcfast": [(8, 2.0), (32, 8.0)], "literal": [(8, 16.0), (32, 64.0)], "plain": [(8, 8.0)]}
    }
    path = tmp_path / "depth.png"
    report.depth_picture([fake_record(), record], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "docs/depth.png" in report.text([fake_record(), record])


def test_one_depth_makes_no_line(tmp_path):
    for record in (fake_record(), deep_record(32)):
        assert report.depth_lines(record) == {}
        assert "docs/depth.png" not in report.text([record])
        report.depth_picture([record], tmp_path / "depth.png")
    assert not list(tmp_path.iterdir())


ON_A_CPU = {"rows": [{"contender": "cuda", "status": "timed"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ON_A_CPU, "leave their backends out"),
        ({"quick": True}, "no full run"),
        ({"format": 1}, "no full run"),
        ({"commit": "abc+"}, "not committed"),
        ({}, None),
    ],
)
def test_only_full_runs_of_committed_sources_are_recorded(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**fake_record(), **change}))
    if message is not None:
        with pytest.raises(Exception, match=message):
            report.record(path)
        return
    kept = report.record(path)
    assert kept == tmp_path / "results" / "cpu" / "2026-01-02-abc1234.json"
    with pytest.raises(Exception, match="never replaced"):
        report.record(path)
    assert [result["commit"] for result in report.newest()] == ["abc1234"]
    alone = fake_record()
    alone["machine"]["threads"] = 1
    path.write_text(json.dumps(alone))
    assert report.record(path).parent.name == "cpu-one-thread"
    assert [result["machine"]["threads"] for result in report.newest()] == [
        fake_record()["machine"]["threads"],
        1,
    ]


# ---------------------------------------------------------------------------------------------- kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def predicted(window: tuple[int, int], precision: str):
    """What a predict stage may do: inputs, the truth and its bounds."""
    s, uhat = torch.randn(3, 5, 6, 8).double() / 10, torch.randn(3, 5, 6, 8).double()
    d = torch.randn(3, 5, 6 // window[0], 8 // window[1]).double() / 10
    bound = rounding.product_bound(precision, 30, 5 * s.abs())
    return s, uhat, d, rounding.predict_truth(s, bound, uhat, d, window, True, rounding.OPERAND[precision])


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3"])
def test_the_kernels_gate_knows_rounding_from_mistakes(window, precision):
    s, uhat, d, truth = predicted(window, precision)
    lost = rounding.product_bound(precision, 30, s.abs())
    moved = F.max_pool2d(uhat + s + lost, window).relu() - F.max_pool2d(uhat, window).relu() - d
    fine = rounding.judged((moved.float(), truth.error, truth.error_bound))
    assert fine.right and 0 < fine.error < 0.1
    decided = truth.delta_bound.isfinite()
    assert decided.double().mean() > 0.8
    assert rounding.judged((truth.delta.float(), truth.delta, truth.delta_bound)).right
    for wrong in (
        truth.error + 0.1 * truth.error.abs().max(),
        truth.error.flip(0),
        truth.error * float("nan"),
    ):
        assert not rounding.judged((wrong, truth.error, truth.error_bound)).right
    assert not rounding.judged((-truth.delta, truth.delta, truth.delta_bound)).right


def test_one_bad_element_closes_the_kernels_gate():
    _, _, _, truth = predicted((2, 2), "tf32x3")
    result = truth.error.clone()
    result[1, 2, 0, 1] += 1e-3
    assert not rounding.judged((result, truth.error, truth.error_bound)).right
    nothing = torch.full_like(truth.error_bound, float("inf"))
    assert not rounding.judged((truth.error, truth.error, nothing)).right  # nothing was looked at


@needs_triton
def test_kernels_need_a_gpu(capsys, tmp_path):
    assert main(["bench", "--kernels", "--device", "cpu", "--json", str(tmp_path / "kernels.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --kernels") and "CUDA device" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["mlp_600"], "mlp_600"),
        (["--contender", "eager"], "--contender"),
        (["--precision", "fp64"], "--precision"),
    ],
)
def test_what_does_not_go_with_kernels_is_named(arguments, named, capsys):
    assert main(["bench", "--kernels", *arguments]) == 2
    assert named in capsys.readouterr().err


@needs_triton
def test_cases_of_all_kernels_take_turns():
    from pcfast.bench.microbenchmarks import run

    everything = run.chosen_cases(["ieee", "tf32", "bf16"], ["cuda", "triton"], False, quick=False)
    kernels = [case.kernel for case in everything]
    assert len(set(kernels[:10])) == len(set(kernels)) == 10
    keys = [(case.kernel, case.size, case.precision) for case in everything]
    assert len(keys) == len(set(keys))
    # the resident kernel's arrays stay on chip
    assert all((case.bytes > 0) == (case.kernel != "resident") for case in everything)
    quick = run.chosen_cases(["bf16"], ["cuda", "triton"], False, quick=True)
    assert {case.precision for case in quick} == {"bf16"}
    assert len(quick) == 20
    assert {case.kernel for case in quick} == set(kernels)


@needs_triton
def test_work_of_a_kernel_is_counted():
    from pcfast.bench.microbenchmarks import conv, linear

    case = linear._predict(2, 300, 600, 10, "bf16", False)
    assert case.multiply_adds == 2 * 300 * 600 * 10
    assert case.bytes == 2 * (2 * (300 * 600 + 600 * 10) + 300 * 10 * 14)
    layer = conv._layer(8, 3, 5, window=2)
    case = conv._feedback(4, layer, "tf32")
    assert case.multiply_adds == 4 * 64 * 5 * 27
    assert case.bytes == 4 * 27 * 5 + 4 * 16 * 5 * 5 + 4 * 64 * 3 * 16


def kernel_row(way: str, seconds: float, precision: str = "bf16", **values) -> dict:
    return {
        "kernel": "conv_predict", "size": "batch 2", "precision": precision, "way": way, "tiles": "64 x 64 x 64",
        "status": "timed", "reason": "", "seconds": seconds, "p20": seconds, "p80": seconds, "error": 1e-3,
        "multiply_adds": 10**6, "bytes": 10**3, "tflops": 2e-6 / seconds, "gbs": 1e-6 / seconds,
        "floor_seconds": 1e-6, "binding": "products", **values,
    }  # fmt: skip


def test_one_more_iteration_is_what_longer_launches_take_longer():
    """2 us of launch and 1 us an iteration."""
    rows = [
        kernel_row("cuda", (2e-6 + n * 1e-6) / n, "fp32", kernel="resident", size=f"net, batch 3, n = {n}")
        for n in (20, 50, 200)
    ]
    rows += [
        kernel_row("cuda", 1.0, "bf16", kernel="resident", size="net, batch 3, n = 20"),
        kernel_row("cuda", 1.0, "fp32", kernel="resident", size="net, batch 3", status="skipped"),
        kernel_row("triton", 1.0),
    ]
    ((name, seconds),) = tables.growth(rows)
    assert name == "net, batch 3, fp32" and seconds == pytest.approx([1e-6, 1e-6])
    assert tables.growth_lines(rows) == [
        "resident, net, batch 3, fp32: one more iteration takes 1 us, 1 us, 0.0% apart"
    ]
    rows[1]["seconds"] = 1e-9
    assert tables.growth_lines(rows)[0].endswith("lost in noise")
    # lengths are other work, not rivals
    assert len(tables.fastest_ways(rows)) == 5


def test_kernels_are_shown_only_where_they_were_timed(tmp_path, monkeypatch):
    assert report.text([fake_record()]) == report.text([fake_record()], [])
    rows = [
        kernel_row("triton", 4e-6),
        kernel_row("cuDNN + pointwise_error", 2e-6),
        kernel_row("triton", 1e-6, "tf32"),
        kernel_row("triton", 3e-6, size="batch 9"),
        kernel_row("triton", 1.0, "fp32", status="skipped", reason="out of time"),
    ]
    record = {**fake_record("cuda"), "rows": [], "kernels": rows}
    lines = report.text([fake_record()], [record]).split("\n")
    shown = [line for line in lines if line.startswith("| conv_predict")]
    assert shown == [
        "| conv_predict, batch 2, bf16 | cuDNN + pointwise_error | 2 us | 50% | triton | 2.00x | 1e-03 |",
        "| conv_predict, batch 2, tf32 | triton | 1 us | 100% |  |  | 1e-03 |",
    ]
    assert tables.kernel_cells(rows[0])[3:8] == ["4 us", "4 us - 4 us", "0.5", "0.25", "25% (products)"]
    assert tables.kernel_cells(rows[-1])[-1] == "out of time"

    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(record))
    assert report.record(path).name == "2026-01-02-abc1234-kernels.json"
    assert report.newest() == [] and report.newest("kernels") == [record]
    path.write_text(json.dumps({**record, "device": "cpu"}))
    with pytest.raises(Exception, match="on a CPU"):
        report.record(path)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_with_kernels_are_contenders_that_need_a_gpu(name, small_workloads):
    record = runner.run(["small_mlp"], [name, "eager"], ["ieee"], CPU, quick=True)
    row = timed(record, name)
    assert row["ours"] and row["status"] == "skipped" and "seconds" not in row
    assert "CUDA device" in row["reason"] or "not installed" in row["reason"]
    assert timed(record, "eager")["status"] == "timed"


# ------------------------------------------------------------------------------------------- command line


def test_the_command(small_workloads, tmp_path, capsys):
    path = tmp_path / "new" / "run.json"
    arguments = [
        "bench",
        "tiny_exact",
        "--contender",
        "eager",
        "--contender",
        "literal",
        "--quick",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--json", str(path)]) == 0
    output = capsys.readouterr().out
    assert "tiny_exact in ieee" in output and "no loop in exact" in output and "1 timed, 1 left out" in output
    assert json.loads(path.read_text())["quick"] is True


def test_the_command_fails_where_the_gate_closed(wrong_backend, small_workloads, capsys, monkeypatch):
    record = runner.run(["small_mlp"], ["wrong"], ["ieee"], CPU, quick=True)
    monkeypatch.setattr(runner, "run", lambda *_, **__: record)
    assert main(["bench", "--quick", "--device", "cpu"]) == 1
    assert "1 of pcfast's refused" in capsys.readouterr().out


def test_the_gpu_script_can_be_rehearsed(tmp_path, tmp_path_factory):
    """Every step without a GPU, as on the machine that has one; ``make rehearse`` also builds the CPU's module."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    if native_build.builds_here():
        environment["PCFAST_CUDA_ON_HOST"] = str(native_build.host_module(tmp_path_factory))
    done = subprocess.run(
        ["bash", ROOT / "bench" / "on_gpu.sh", tmp_path / "out", "--rehearse", "--minutes", "3"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    kernels = ["kernels.json"] if importlib.util.find_spec("triton") else []
    assert files == ["bench.json", "info.json", *kernels, "log.txt", "summary.txt"]
    assert "Whole training steps" in done.stdout  # tables stand there, too
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert done.stdout.rstrip().endswith(summary.rstrip())
    for step in (
        "build",
        "qualify",
        "info",
        "tools",
        "probes",
        "tests",
        "large",
        "constants",
        "kernels",
        "bench",
        "sanitizer",
    ):
        assert step in summary
    if kernels:
        record = json.loads((tmp_path / "out" / "kernels.json").read_text())
        by_kernel = tables.by_kernel(record["kernels"])
        assert len(by_kernel) == 10 and record["rows"] == []
        resident = by_kernel.pop("resident", None)
        assert {row["status"] for rows in by_kernel.values() for row in rows if row["size"]} == {"timed"}
        if resident is None:  # the CUDA kernels could not be compiled for the CPU
            assert "not rehearsed" in summary and by_kernel["those of cuda"][0]["reason"]
        else:
            timed_sizes = [
                row["size"] for row in resident if row["status"] == "timed" and row["precision"] == "fp32"
            ]
            assert timed_sizes == [f"9-14-12-4 relu, batch 5, n = {n}" for n in (3, 4, 6)]
    assert "FAILED" not in summary and "skipped" in summary
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["quick"] is True


@pytest.mark.parametrize("selection", ["PROBED", "LARGE", "SANITIZED"])
def test_probes_and_sanitizers_have_tests_to_run(selection):
    """Names that pytest knows: -k would leave one out without a word."""
    script = (ROOT / "bench" / "on_gpu.sh").read_text()
    names = re.search(rf'^{selection}="(.*?)"', script, flags=re.M)[1].split(" or ")
    tests = ["resident"] if selection == "SANITIZED" else ["kernels", "resident", "triton"]
    text = "".join((ROOT / "tests" / "gpu" / f"test_{name}_cuda.py").read_text() for name in tests)
    result = re.findall(r"def (test_\w+)", text) + re.findall(r'^    "(\w+)": Case', text, flags=re.M)
    assert all(any(name in each for each in result) for name in names)


def steps(folder: Path, seconds: int, commands: str) -> tuple[str, str, int]:
    """What ``commands``, with bench/steps.sh and so many seconds left, put into summary and log; exit status."""
    begin = f"""set -uo pipefail; source {ROOT}/bench/steps.sh; DEADLINE=$((SECONDS + {seconds})) STATUS=0
    SUMMARY={folder}/summary LOG={folder}/log SAID={folder}/said PYTHON={sys.executable}; : > $SUMMARY; : > $LOG
    """
    done = subprocess.run(
        ["bash", "-c", begin + commands], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.stderr == ""
    return (folder / "summary").read_text(), (folder / "log").read_text(), done.returncode


def test_a_step_whose_time_runs_out_leaves_what_it_found(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_broken():\n    assert 'what is' == 'wrong'\n"
        "def test_endless():\n    time.sleep(100)\n"
    )
    command = f"$PYTHON -m pytest -v --tb=short -p no:benchmark -p no:cacheprovider -n 1 {tmp_path}"
    # as where this shell was started in the background: Ctrl-C is ignored
    summary, log, status = steps(tmp_path, 100, f"trap '' INT; step tests 12 {command}; exit $STATUS")
    assert "not done after 12 s" in summary and status == 1
    assert "assert 'what is' == 'wrong'" in log and "KeyboardInterrupt" in log


def test_a_step_has_no_more_than_what_is_left_and_its_own_words(tmp_path):
    ran_out = 'timeout() { echo "within $3"; return 124; }'
    summary, log, status = steps(
        tmp_path,
        50,
        f"""step first 60 echo well; {ran_out}; step slow 600 sleep 30
        DEADLINE=$((SECONDS + 9)); step late 60 echo no; exit $STATUS""",
    )
    first, slow, late = summary.splitlines()
    assert first.endswith("s: well") and "not reached" in late and status == 1
    assert re.search(r"FAILED: not done after (50|49|48) s: within \1$", slow) and "== slow: sleep 30" in log


STAND_IN = """#!/bin/sh
case $* in *--help*) echo "memcheck racecheck" ;; esac
echo "unbuffered $PYTHONUNBUFFERED, preallocate $XLA_PYTHON_CLIENT_PREALLOCATE"
"""


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("1", "build native qualify info tools launches eager probed jax tests large"),
        ("2", "build native info constants kernels bench compilers memcheck racecheck synccheck"),
    ],
)
def test_the_parts_of_the_gpu_script_run_their_steps(part, names, tmp_path):
    """With a stand-in for Python and for compute-sanitizer, which both do nothing."""
    for name in ("python", "compute-sanitizer"):
        path = tmp_path / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "bench" / "on_gpu.sh", tmp_path / "out", "--part", part], capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert " ".join(line.split()[0] for line in summary) == names
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "unbuffered 1, preallocate false" in log
    if part == "1":
        runs = re.findall(r"-m pytest .*", log)
        assert len(runs) == 4 and all("-p no:benchmark" in run for run in runs)
        (probed,), (rest,) = (re.findall(rf"-k {begin}.*", log) for begin in (r"\(where", "not "))
        assert "two_to_the_31" in probed and "two_to_the_31" in rest  # last, and apart
    else:
        assert summary[-1].endswith("has no synccheck")
        for contender in re.findall(r"--contender (\S+)", log):
            assert contender in CONTENDERS
        assert "mlp_600 mnist_cnn --contender plain_compiled --contender jax" in log


def test_no_pipe_of_the_gpu_script_ends_in_a_quiet_grep():
    """It leaves at the first match; under pipefail the writer's SIGPIPE then looks like no match."""
    for script in (ROOT / "bench").glob("*.sh"):
        assert not re.search(r"\|\s*grep\s+-\w*q", script.read_text()), script


def test_the_gpu_script_runs_some_steps_alone(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "bench" / "on_gpu.sh", tmp_path / "out", "--rehearse", "--only", "constants,sanitizer"],
        env={**os.environ, "PYTHON": sys.executable}, cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text().split("\n")
    assert [line.split()[0] for line in summary if line] == ["build", "info", "constants", "sanitizer"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage"),
        (["out", "--only", "tests,nothing"], "'nothing' is no step"),
        (["out", "--minutes", "x"], "--minutes"),
        (["out", "--part", "3"], "1 or 2"),
        (["out", "--part", "1", "--only", "tests"], "one of the two"),
        (["a", "b"], "one folder"),
        (["out", "--fast"], "--fast"),
    ],
)
def test_the_gpu_script_names_bad_arguments(arguments, words, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "bench" / "on_gpu.sh", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_relaxation_descends_in_every_strict_workload_that_is_small():
    """PreparedStep size 0.1 is stable for the nets as they are drawn; otherwise times would be those of nonsense."""
    for name in ("mlp_600", "mnist_cnn", "mlp_128", "deep_mlp_8", "gelu_mlp", "mlp_600_first"):
        workload = WORKLOADS[name]
        model, x, y = workload.draw(CPU, rows=4)
        energies = pcfast.relax(
            model, x, y, step_size=workload.step_size, num_steps=workload.num_steps, energies=True
        ).energies
        total = energies.sum(1)
        assert math.isfinite(float(total[-1])) and float(total[-1]) < float(total[0])
        assert F.cross_entropy(model(x), y).item() == pytest.approx(float(total[0]), rel=1e-4)


@pytest.mark.parametrize("name", ["plain", "autograd"])
@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"lr": 2 * LR}, {"num_steps": 6}, {"step_size": 0.1001}])
def test_an_incremental_loop_that_is_nearly_right_is_refused(name, wrong):
    workload = changed(SMALL["mlp"], method="incremental", lr=LR, num_steps=7)

    def prepare(_, *rest):
        return CONTENDERS[name].prepare(changed(workload, **wrong), *rest)

    verdict = gate.Gate(workload, CPU, workload.batch).judge(another(prepare), "ieee")
    assert "off in float64" in verdict.reason


def test_ours_is_judged_in_incremental_as_the_others_and_in_float32():
    workload = changed(SMALL["mlp"], method="incremental", lr=LR)
    judge = gate.Gate(workload, CPU, workload.batch)
    verdict = judge.judge(CONTENDERS["eager"], "ieee")
    assert verdict.reason == "" and verdict.error <= verdict.bound < 1e-3
    step = CONTENDERS["eager"].prepare(workload, *judge.workload.draw(CPU), "ieee")
    step.run()
    first = [u.clone() for u in step.updates()]
    step.run()  # from the same parameters again
    assert all(map(torch.equal, first, step.updates()))

    def wrong_in_float32(*case):
        step, factor = CONTENDERS["eager"].prepare(*case), 1.001 if case[-1] == "ieee" else 1.0
        return replace(step, updates=lambda: [factor * u for u in step.updates()])

    wrong = replace(CONTENDERS["eager"], prepare=wrong_in_float32)
    assert "an update is 1.0e-03 off" in judge.judge(wrong, "ieee").reason
    assert "float32" in CONTENDERS["eager"].ineligible_reason(workload, "bf16", CPU)


ONE_QUICK = ("tiny_exact", "--contender", "eager", "--quick", "--device", "cpu")


def test_a_record_that_cannot_be_written_is_found_first_or_printed(
    small_workloads, tmp_path, capsys, monkeypatch
):
    assert main(["bench", "--json", "/proc/pcfast.json", *ONE_QUICK]) == 2
    assert "--json: got /proc/pcfast.json" in capsys.readouterr().err
    for minutes in ("nan", "inf", "-1"):
        assert main(["bench", "--minutes", minutes, *ONE_QUICK]) == 2
        assert "--minutes" in capsys.readouterr().err

    def full(path, record):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sys.modules["pcfast.cli.bench"], "write_json", full)
    monkeypatch.setattr(sys.modules["pcfast.cli.building"], "write_json", full)
    assert main(["bench", "--json", str(tmp_path / "r.json"), *ONE_QUICK]) == 2
    output = capsys.readouterr()
    assert "timed" in output.out and output.err.splitlines()[-1].endswith("r.json'")
