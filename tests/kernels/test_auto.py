""" "auto" among backends of kernels: interpreted kernels stand in for a GPU's, and a clock is told what they cost."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graph_recorder import Recorder
from kernel_networks import mlp
from torch import nn

import pcfast
from pcfast.backends import BACKENDS, chips, choice, device_identity, kernel_backend, timings
from pcfast.backends.qualification import automatic, record, run
from pcfast.backends.qualification.record import FAILED, QUALIFIED, Qualification, Verdict
from pcfast.backends.triton import config_cache
from pcfast.backends.triton.configs import FUSED, Choices, LoopKey
from pcfast.checking import qualification as children
from pcfast.cli import main
from pcfast.relaxation import contest, cuda_graphs
from pcfast.support import log as logs

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parent


def qualification(**failed: str) -> Qualification:
    """Everything of triton's is qualified but what failed: kind -> reason."""
    kinds, unavailable = children.kinds_on(CPU)
    verdicts = {
        kind: Verdict(FAILED, failed[kind.name]) if kind.name in failed else Verdict(QUALIFIED)
        for kind in kinds
    }
    return Qualification(device_identity.identity_of(CPU), "2026-01-01", verdicts, unavailable)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """ "auto" considers the CPU, whose kernels are qualified; a cache folder of its own."""
    monkeypatch.setattr(kernel_backend, "AUTOMATIC_DEVICES", ("cpu",))
    monkeypatch.setattr(BACKENDS["cpu"], "automatic", lambda device: (False, "the CPU stands for a GPU"))
    monkeypatch.setattr(contest, "ROUNDS", 3)
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.forget()
    config_cache.invalidate()
    logs._said.clear()
    record.save(CPU, qualification())
    yield tmp_path / "cache"
    choice.forget()
    config_cache.invalidate()


class Clock:
    """Tells of each backend the seconds that it is given; counts what it timed."""

    def __init__(self, ran: list[str], prices: dict[str, float]) -> None:
        self._ran, self._prices = ran, prices
        self.timed = 0

    def __call__(self, run) -> float:
        self.timed += 1
        self._ran.clear()
        run()
        return self._prices[self._ran[-1]]


@pytest.fixture
def priced(monkeypatch):
    """``priced(eager=1.0, triton=0.5)``: a clock by which the backends cost so much."""
    ran: list[str] = []
    for name in ("triton", "eager"):
        backend = BACKENDS[name]

        def recorded(problem, plan, _name=name, _run=backend.run):
            ran.append(_name)
            return _run(problem, plan)

        monkeypatch.setattr(backend, "run", recorded)

    def make(**prices: float) -> Clock:
        clock = Clock(ran, prices)
        monkeypatch.setattr(contest, "clock_of", lambda device: clock)
        return clock

    return make


def problem(model=None, count: int = 5):
    torch.manual_seed(0)
    model = model or mlp(12, 20, 10)
    return model, torch.randn(count, 12), torch.randint(0, 10, (count,))


def relaxed(case, **settings):
    model, x, y = case
    return pcfast.relax(model, x, y, num_steps=2, **settings)


def backend_of(case, **settings) -> str:
    return relaxed(case, **settings).run.plan.backend


# what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("triton", "chosen"),
    [(0.5, "triton"), (0.94, "triton"), (0.97, "eager"), (1.04, "eager"), (3.0, "eager")],
)
def test_the_fastest_runs_and_eager_where_the_difference_is_noise(triton, chosen, priced, caplog):
    caplog.set_level(logging.INFO, "pcfast")
    clock, case = priced(eager=1.0, triton=triton), problem()
    explained = pcfast.explain(case[0], case[1].shape, num_steps=2)
    assert explained.plan.backend == "eager" and "the first call does it" in explained.refused["triton"]
    first = relaxed(case)
    assert first.run.plan.backend == chosen and 2 * contest.ROUNDS >= clock.timed > contest.ROUNDS
    counted, other = clock.timed, "eager" if chosen == "triton" else "triton"
    again = relaxed(case)
    assert again.run.plan == first.run.plan and clock.timed == counted
    by_name = relaxed(case, backend=chosen)
    for ours in (first, again):
        assert all(map(torch.equal, ours.beliefs, by_name.beliefs))
    plan = pcfast.explain(
        case[0], case[1].shape, num_steps=2
    ).plan  # what a caller of pc_loss wants: other tensors
    assert plan.contenders
    said = dict(first.run.plan.refusals)[other]
    assert (
        "ms a relaxation here" in said
        and f"{chosen} {1e3 * {'eager': 1.0, 'triton': triton}[chosen]:.3g} ms" in said
    )
    assert sum("timed on strict" in entry.message for entry in caplog.records) == 1


def test_the_chosen_is_at_most_5_percent_slower_than_eager():
    for eager, triton in ((1.0, 1.06), (1.0, 1.05), (1.0, 1.0), (1.0, 0.9), (1e-9, 1.0)):
        measured = timings.Timings("", "", {"eager": eager, "triton": triton}, {})
        assert measured.seconds[measured.fastest(measured.seconds)] <= 1.05 * eager


def test_backend_and_environment_override(priced, monkeypatch):
    priced(eager=1.0, triton=0.5)
    case = problem()
    assert backend_of(case) == "triton" and backend_of(case, backend="eager") == "eager"
    monkeypatch.setenv(choice.VARIABLE, "reference")
    assert backend_of(case) == "reference" and backend_of(case, backend="triton") == "triton"
    explained = pcfast.explain(case[0], case[1].shape)
    assert explained.plan.backend == "reference"
    assert explained.refused["eager"] == 'backend="reference" was asked for'
    monkeypatch.setenv(choice.VARIABLE, "fastest")
    with pytest.raises(
        pcfast.ArgumentError, match=r"PCFAST_BACKEND: got 'fastest'; needed: one of \['auto', 'cuda'"
    ):
        relaxed(case)


def test_off_a_gpu_kernels_are_for_tests(priced, monkeypatch):
    clock = priced()
    monkeypatch.setattr(kernel_backend, "AUTOMATIC_DEVICES", ("cuda",))
    assert backend_of(problem()) == "eager" and clock.timed == 0


# the record ----------------------------------------------------------------------------------------------------


def test_another_process_reads_what_was_measured(priced):
    priced(eager=1.0, triton=0.5)
    case = problem()
    assert backend_of(case) == "triton"
    code = (
        "import interpreter, test_auto as t\n"
        "interpreter.repair()\n"
        "t.kernel_backend.AUTOMATIC_DEVICES = ('cpu',)\n"
        "t.BACKENDS['cpu'].automatic = lambda device: (False, 'the CPU stands for a GPU')\n"
        "def clock_of(device): raise AssertionError('timed again')\n"
        "t.contest.clock_of = clock_of\n"
        "print(t.backend_of(t.problem()))"
    )
    paths = [HERE.parent.parent, HERE, HERE.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["triton"], done.stderr


def test_the_first_process_to_measure_decides(priced):
    clock, case = priced(eager=1.0, triton=0.5), problem()
    assert backend_of(case) == "triton"
    path = timings.path_of(CPU)
    (key,) = json.loads(path.read_bytes())["plans"]
    choice.forget()
    timings._known[chips.device_key(CPU)] = {}  # read before the other process wrote
    clock._prices = {"eager": 0.1, "triton": 0.5}
    counted = clock.timed
    assert backend_of(case) == "triton" and clock.timed > counted
    assert json.loads(path.read_bytes())["plans"][key]["seconds"] == {"triton": 0.5, "eager": 1.0}


@pytest.mark.parametrize("change", ["driver", "tiles", "batch", "iterations", "momentum", "graphs"])
def test_times_hold_for_what_they_were_measured_on(change, priced, monkeypatch):
    clock, case, settings = priced(eager=1.0, triton=0.5), problem(), {}
    assert backend_of(case) == "triton"
    clock._prices, counted = {"eager": 0.1, "triton": 0.5}, clock.timed
    if change == "driver":
        changed = replace(device_identity.identity_of(CPU), driver="another")
        for module in (record, timings):
            monkeypatch.setattr(module, "identity_of", lambda device: changed)
        choice.forget()
        record.save(CPU, replace(qualification(), identity=changed))
    elif change == "tiles":
        config_cache.save(CPU, Choices({LoopKey("tf32x3", ((10, 20),), False): FUSED}))
    elif change == "batch":
        case = problem(case[0], 6)
    elif change == "momentum":
        settings = {"belief_optimizer": pcfast.GradientDescent(momentum=0.5)}
    elif change == "iterations":
        assert pcfast.relax(*case, num_steps=5).run.plan.backend == "eager" and clock.timed > counted
        return
    else:
        monkeypatch.setattr(cuda_graphs, "_switched_on", False)
    assert backend_of(case, **settings) == "eager" and clock.timed > counted


def test_damaged_times_are_as_none(priced, caplog):
    clock, case = priced(eager=1.0, triton=0.5), problem()
    assert backend_of(case) == "triton"
    path, counted = timings.path_of(CPU), clock.timed
    whole = json.loads(path.read_bytes())
    (key,) = whole["plans"]
    entry = whole["plans"][key]
    damaged = [whole | {"format": 9}, whole | {"for": {}}, whole | {"plans": 3}, []]
    damaged += [
        whole | {"plans": {key: entry | {"seconds": wrong}}} for wrong in (3, {"eager": float("nan")})
    ]
    for content in (b"{", b"\xff", *(json.dumps(value).encode() for value in damaged)):
        path.write_bytes(content)
        caplog.clear()
        logs._said.clear()
        assert timings._read(CPU) == {} and str(path) in caplog.text
    choice.forget()
    assert backend_of(case) == "triton" and clock.timed > counted
    choice.forget()
    counted = clock.timed
    assert backend_of(case) == "triton" and clock.timed == counted  # written anew


def test_a_folder_that_cannot_be_written(priced, tmp_path, monkeypatch, caplog):
    clock, case = priced(eager=1.0, triton=0.5), problem()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "file" / "cache"))
    automatic.adopt(CPU, qualification())
    for _ in range(2):
        assert backend_of(case) == "triton" and clock.timed <= 2 * contest.ROUNDS
    assert caplog.text.count("cannot be written") == 1


# nothing is disturbed ------------------------------------------------------------------------------------------


def test_measuring_leaves_nothing_behind(priced, monkeypatch):
    priced(eager=1.0, triton=0.5)
    eager, drawn = BACKENDS["eager"], []
    run = eager.run
    monkeypatch.setattr(eager, "run", lambda *arguments: drawn.append(torch.rand(1)) or run(*arguments))
    model, x, y = problem()
    untimed = copy.deepcopy(model)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    loss = pcfast.pc_loss(model, x, y, num_steps=2)
    assert pcfast.last_run().plan.backend == "triton" and drawn
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    loss.backward()
    pcfast.pc_loss(untimed, x, y, num_steps=2, backend="triton").backward()
    for ours, theirs in zip(model.parameters(), untimed.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    pcfast.synchronize()


@pytest.mark.parametrize(
    ("module", "words"),
    [(lambda: nn.BatchNorm1d(20), "moves its statistics"), (lambda: nn.Dropout(0.5), "draws random numbers")],
    ids=["statistics", "dropout"],
)
def test_what_keeps_a_state_is_not_measured_and_eager_runs(module, words, priced):
    clock = priced()
    made = nn.Sequential(nn.Sequential(nn.Linear(12, 20), module(), nn.Tanh()), nn.Linear(20, 10))
    case = problem(made)
    other = copy.deepcopy(case)
    torch.manual_seed(3)
    ours = relaxed(case)
    assert ours.run.plan.backend == "eager" and clock.timed == 0
    assert words in dict(ours.run.plan.refusals)["triton"]
    torch.manual_seed(3)
    assert all(map(torch.equal, ours.beliefs, relaxed(other, backend="eager").beliefs))
    for mine, theirs in zip(case[0].buffers(), other[0].buffers(), strict=True):
        assert torch.equal(mine, theirs)
    if words == "moves its statistics":
        clock._prices.update(eager=1.0, triton=0.5)
        assert backend_of((made.eval(), *case[1:])) == "triton"


def test_a_loss_of_the_callers_own_is_not_measured(priced):
    clock, calls = priced(), []

    def loss(output, y):
        calls.append(1)
        return (output - nn.functional.one_hot(y, 10)).square().sum()

    assert backend_of(problem(), loss=loss) == "eager" and clock.timed == 0
    counted = len(calls)
    assert backend_of(problem(), loss=loss, backend="eager") == "eager" and len(calls) == 2 * counted


def test_faults_of_the_data_are_the_callers_and_nothing_is_recorded(priced):
    priced(eager=1.0, triton=0.5)
    model, x, y = problem()
    for _ in range(2):
        with pytest.raises(pcfast.RelaxationDiverged):
            pcfast.relax(model, x, y, step_size=1e30, num_steps=8)
        with pytest.raises(pcfast.ArgumentError, match="labels"):
            pcfast.relax(model, x, y + 10, num_steps=2)
    assert not timings.of_device(CPU) and not timings.path_of(CPU).exists()
    pcfast.synchronize()
    assert backend_of((model, x, y)) == "triton"


def test_deferred_reports_of_measured_runs_are_dropped(priced):
    priced(eager=1.0, triton=0.5)
    model, x, y = problem()
    pcfast.relax(model, x, y, step_size=1e30, num_steps=8, check="deferred")
    with pytest.raises(pcfast.RelaxationDiverged):
        pcfast.synchronize()
    pcfast.synchronize()  # one call, one report


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error"), MemoryError()]
)
def test_a_backend_that_fails_is_out_and_the_call_goes_on(failure, priced, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "pcfast")
    clock, case = priced(eager=1.0), problem()

    def fails(problem, plan):
        raise failure

    monkeypatch.setattr(BACKENDS["triton"], "run", fails)
    ours = relaxed(case)
    assert (
        ours.run.plan.backend == "eager" and type(failure).__name__ in dict(ours.run.plan.refusals)["triton"]
    )
    assert all(map(torch.equal, ours.beliefs, relaxed(case, backend="eager").beliefs))
    counted = clock.timed
    assert backend_of(case) == "eager" and clock.timed == counted
    assert sum("is out" in entry.message for entry in caplog.records) == 1


def test_what_is_replayed_is_measured_as_replays(priced, monkeypatch):
    clock, case = priced(eager=1.0, triton=0.5), problem()
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "ineligible_reason", lambda *_: "")
    monkeypatch.setattr(cuda_graphs, "CACHE", cuda_graphs.GraphCache(4, recorder))
    problem_of, plan = contest_arguments(case)
    assert contest.decided(problem_of, plan).backend == "triton"
    assert recorder.recorded == 2 and recorder.replayed == clock.timed and len(cuda_graphs.CACHE) == 0


def contest_arguments(case):
    from pcfast.problem.settings import Settings
    from pcfast.relaxation.solve import prepare

    return prepare(*case, Settings(num_steps=2))


# which kinds a plan needs --------------------------------------------------------------------------------------


def test_a_kind_that_is_not_qualified_is_named(priced):
    clock, case = priced(eager=1.0, triton=0.5), problem()
    record.save(CPU, qualification(mlp_relaxation="it did not end within 45 s", pooling="wrong"))
    choice.forget()
    explained = pcfast.explain(case[0], case[1].shape)
    assert explained.refused["triton"] == (
        "triton mlp_relaxation in ieee is not qualified on this device: it did not end within 45 s"
    )
    assert backend_of(case) == "eager" and clock.timed == 0
    bare = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 10))
    assert backend_of(problem(bare)) == "triton"  # linear and pointwise kernels


def test_without_a_record_the_first_call_qualifies(priced, monkeypatch):
    priced(eager=1.0, triton=0.5)
    case, asked = problem(), []
    record.path_of(CPU).unlink()
    choice.forget()
    monkeypatch.setattr(run, "tested", lambda *_: asked.append(1) or qualification())
    assert "pcfast qualify" in pcfast.explain(case[0], case[1].shape).refused["triton"] and not asked
    with torch.inference_mode():
        x = case[1].clone()
        assert backend_of((case[0], x, case[2])) == "triton"
    assert backend_of(case) == "triton" and asked == [1]


def test_each_kind_runs_the_kernels_that_it_names(launches):
    """A reduced set of cases, in a process of its own: numbers and bits are right, and each runs what it is for."""
    named = {"linear_gram": "linear_feedback", "wide_output": "output_error", "pointwise_gram": "gram_update"}
    kinds, _ = children.kinds_on(CPU)
    for kind in kinds:
        if kind.precision == "ieee" and kind.name in named:
            del launches[:]
            model, case = (
                children.CASES["triton", kind.name][0].model(),
                children.CASES["triton", kind.name][0],
            )
            with config_cache.using(children._forced(kind, case, model, CPU)):
                children._check_bits(kind, case, model, CPU)
            assert named[kind.name] in {name for name, _ in launches}


CHILD = """
import sys
sys.path[:0] = {paths!r}
import interpreter
interpreter.repair()
from pcfast.checking import qualification as q
found = q.kinds_on
def few(device):
    kinds, unavailable = found(device)
    wanted = ("linear_gram", "bf16"), ("wide_output", "ieee")
    return [kind for kind in kinds if (kind.name, kind.precision) in wanted], unavailable
q.kinds_on = few
from pcfast.backends.triton import loop
launch = loop.output_error
def wrong(**keywords):
    launch(**keywords)
    keywords["error"].mul_(1.01)
loop.output_error = wrong
q.main()
"""


def test_a_child_qualifies_interpreted_kernels(monkeypatch):
    """End to end; a fault is planted in a launch, and found."""
    paths = [str(HERE.parent.parent), str(HERE), str(HERE.parent)]
    monkeypatch.setattr(run, "command", lambda: [sys.executable, "-c", CHILD.format(paths=paths)])
    result = pcfast.qualify("cpu", limit_s=300, kind_limit_s=200)
    shown = {str(kind): verdict for kind, verdict in result.verdicts.items()}
    wrong = shown.pop("triton wide_output in ieee")
    assert wrong.status == FAILED and "error" in wrong.reason and "bound" in wrong.reason
    assert shown == {"triton linear_gram in bf16": Verdict(QUALIFIED)}
    assert record.load(CPU) == result and set(result.unavailable) == {"cuda"}


def test_info_shows_the_times(priced, capsys):
    priced(eager=1.0, triton=0.5)
    backend_of(problem())
    assert main(["info", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["timings"]
    assert shown["backend"] == "triton" and shown["seconds"] == {"triton": 0.5, "eager": 1.0}
    assert "x (5, 12), layers 20 - 10, 2 iterations" in shown["what"]
    assert main(["info"]) == 0
    assert "triton 500 ms" in capsys.readouterr().out
