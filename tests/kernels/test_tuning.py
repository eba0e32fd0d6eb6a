"""Tuning under the interpreter: a clock that is told what launches cost, planted faults, the file of choices."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import types
from dataclasses import replace

import pytest
import torch
from test_streamed import conv_net, mlp
from torch import nn

import pcfast
from pcfast.backends.triton import config_cache, designs
from pcfast.backends.triton import loop as loops
from pcfast.backends.triton.configs import (  # fmt: skip
    COMPOSED,
    FUSED,
    IMPLICIT,
    NONE,
    STAGED,
    Choices,
    ConvolutionKey,
    LaunchKey,
    LoopKey,
    from_json,
    to_json,
)
from pcfast.backends.triton.tiles import LinearTiles, fused_loop_tiles, linear_tiles
from pcfast.checking import checker as checking
from pcfast.cli import main
from pcfast.support import log as logs
from pcfast.tuning import tuner as tuning
from pcfast.tuning.search_space import candidates

CPU = torch.device("cpu")
STEPS = 3
LAUNCHES = ("launch_linear_predict", "launch_linear_feedback", "launch_mlp_relaxation")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own for the file of choices, and none loaded before or after."""
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "ROUNDS", 1)  # the clocks here always say the same
    config_cache.invalidate()
    logs._said.clear()
    yield tmp_path / "cache"
    config_cache.invalidate()


@pytest.fixture
def launched(monkeypatch):
    """(kernel, rows, columns) of every launch of a linear kernel, in order."""
    seen = []
    for name in LAUNCHES:
        run = getattr(loops, name)

        def record(*arguments, _name=name, _run=run, **keywords):
            tiles = keywords["gemm"].tiles
            seen.append((_name.removeprefix("launch_"), tiles.block_m, tiles.block_n))
            return _run(*arguments, **keywords)

        monkeypatch.setattr(loops, name, record)
    return seen


@pytest.fixture
def priced(launched):
    """``priced(prices)``: a clock by which a launch costs ``prices`` of (kernel, rows, columns), else 100 seconds."""

    def make(prices: dict):
        def clock(run) -> float:
            launched.clear()
            run()
            return sum(prices.get(launch, 100.0) for launch in launched)

        return clock

    return make


def network(*widths: int):
    torch.manual_seed(0)
    return mlp(*(widths or (12, 20, 14, 10)))


def batch(classes: int = 10, shape=(12,), count: int = 9):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *shape, generator=generator)
    return x, torch.randint(0, classes, (count,), generator=generator)


def tune(model, clock, data=None, **settings) -> pcfast.TuningReport:
    x, y = data or batch()
    return pcfast.tune(model, x, y, num_steps=STEPS, clock=clock, **settings)


def ran(model, launched, data=None) -> set:
    """Kernels and tiles of one relaxation."""
    x, y = data or batch()
    launched.clear()
    pcfast.relax(model, x, y, num_steps=STEPS, backend="triton")
    return set(launched)


FUSED_32 = ("mlp_relaxation", 32, 16)
STAGED_TILES = {("linear_predict", 16, 32): 1.0, ("linear_feedback", 32, 16): 2.0}


# what wins -----------------------------------------------------------------------------------------------------


def test_the_cheapest_tiles_win_and_run_from_then_on(launched, priced, folder):
    """Here and in other processes, which read what was written."""
    model = network()
    assert ran(model, launched) == {("mlp_relaxation", 16, 16)}
    report = tune(model, priced({FUSED_32: 1.0}))
    assert report.after < report.before and report.check.ok and report.path.parent == folder
    assert {row.backend for row in report.check.rows} == {"triton"}
    assert ran(model, launched) == {FUSED_32}
    key = next(key for key in report.choices if isinstance(key, LaunchKey))
    assert key.kernel == "mlp_relaxation" and key.batch is None
    code = "import test_tuning as t; print(t.loop_design(t.network()).feedback.tiles.block_m)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["32"], done.stderr


def test_one_launch_or_stages(launched, priced):
    model = network()
    report = tune(model, priced({("linear_predict", 16, 16): 1.0, ("linear_feedback", 16, 16): 1.0}))
    (loop,) = (key for key in report.choices if isinstance(key, LoopKey))
    assert report.choices.get(loop) == STAGED
    assert {name for name, *_ in ran(model, launched)} == {"linear_predict", "linear_feedback"}


def test_tiles_of_stages(launched, priced):
    """A wide output has its loss in a launch of its own, so only stages are possible."""
    model, data = network(12, 20, 40), batch(40)
    report = tune(model, priced(STAGED_TILES), data)
    assert not any(isinstance(key, LoopKey) for key in report.choices)
    assert ran(model, launched, data) == set(STAGED_TILES)


def test_the_loser_of_a_close_race_is_tuned_too(priced):
    """Stages are slower than one launch with the tiles that the rules give, and faster with better ones."""
    prices = {("linear_predict", 16, 16): 2.0, ("linear_feedback", 16, 16): 2.0}
    # 3 iterations of 2 + 2 against 10 for all of them, then 3 of 2 + 1
    report = tune(
        network(), priced({**prices, ("mlp_relaxation", 16, 16): 10.0, ("linear_feedback", 32, 16): 1.0})
    )
    assert [d.chosen for d in report.decisions if d.what.startswith("the loop")] == [FUSED, STAGED]


def test_convolutions(launched, monkeypatch):
    model, data = conv_net(), batch(5, (2, 8, 8))
    multiplied = []
    for name in ("launch_conv_predict", "launch_conv_feedback"):
        run = getattr(loops, name)
        monkeypatch.setattr(loops, name, lambda *a, _run=run, **k: multiplied.append(None) or _run(*a, **k))

    def clock(run) -> float:
        multiplied.clear()
        run()
        return 1.0 if multiplied else 2.0

    report = tune(model, clock, data)
    (key,) = (key for key in report.choices if isinstance(key, ConvolutionKey))
    assert report.choices.get(key) == IMPLICIT
    multiplied.clear()
    ran(model, launched, data)
    assert multiplied


def test_a_convolution_in_gram_form_leaves_no_choice():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 12, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(12, 3, 3), nn.Tanh(), nn.Flatten()),
        nn.Linear(12, 5),
    )
    x, y = batch(5, (2, 6, 6))
    assert pcfast.explain(model, tuple(x.shape), num_steps=7).plan.gram
    report = pcfast.tune(model, x, y, num_steps=7, clock=lambda run: 1.0)
    assert report.decisions and not [made for made in report.decisions if "convolution" in made.what]


def test_what_runs_now_stays_where_nothing_is_faster(priced, folder):
    report = tune(network(), priced({("mlp_relaxation", 16, 16): 1.0}))
    assert not len(report.choices) and report.check is None and report.path is None
    assert report.before == report.after
    assert not list(folder.glob("*.json"))


def test_a_dry_run_leaves_no_trace(launched, priced, folder):
    """No file, the model and torch's random state as they were; its progress ends where it said."""
    model, told = network(), []
    x, y = batch()
    pcfast.pc_loss(model, x, y, num_steps=STEPS).backward()
    parameters = [p.clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    before = torch.get_rng_state()
    report = tune(model, priced({FUSED_32: 1.0}), save=False, progress=lambda *what: told.append(what))
    assert torch.equal(before, torch.get_rng_state())
    for p, value, gradient in zip(model.parameters(), parameters, gradients, strict=True):
        assert torch.equal(p, value) and torch.equal(p.grad, gradient)
    assert len(report.choices) and report.path is None
    assert not folder.exists()
    assert ran(network(), launched) == {("mlp_relaxation", 16, 16)}
    done = [done for done, *_ in told]
    assert told[-1][0] == told[-1][1] and done == sorted(done)


# what is out ---------------------------------------------------------------------------------------------------


def planted(monkeypatch, fault) -> None:
    """mlp_relaxation on tiles of 32 rows goes wrong."""
    run = loops.launch_mlp_relaxation

    def faulty(state, *arguments, **keywords):
        run(state, *arguments, **keywords)
        if keywords["gemm"].tiles.block_m == 32:
            fault(state)

    monkeypatch.setattr(loops, "launch_mlp_relaxation", faulty)


def test_a_candidate_that_computes_something_wrong_is_out(priced, folder, monkeypatch):
    planted(monkeypatch, lambda state: state.mul_(1.01))
    report = tune(network(), priced({FUSED_32: 1.0}))
    trials = [t for d in report.decisions for t in d.trials if t.choice.startswith("32 x 16")]
    assert [t.seconds for t in trials] == [None] and trials[0].reason.startswith("wrong: ")
    assert not len(report.choices) and not list(folder.glob("*.json"))


def test_a_candidate_that_does_not_launch_is_out(priced, monkeypatch):
    def fail(state):
        raise RuntimeError("out of resource: shared memory")

    planted(monkeypatch, fail)
    report = tune(network(), priced({FUSED_32: 1.0}))
    reasons = [t.reason for d in report.decisions for t in d.trials if t.seconds is None]
    assert reasons == ["RuntimeError: out of resource: shared memory"]


def test_a_wrong_winner_is_never_written(launched, priced, folder, monkeypatch):
    """What slips through the sieve is held to pcfast check's bounds."""
    planted(monkeypatch, lambda state: state.mul_(1.01))
    monkeypatch.setattr(tuning._CorrectnessCheck, "check", lambda *_: None)
    with pytest.raises(pcfast.BackendError, match=r"out of its bounds.*nothing was written"):
        tune(network(), priced({FUSED_32: 1.0}))
    assert not list(folder.glob("*.json"))
    assert ran(network(), launched) == {("mlp_relaxation", 16, 16)}


@pytest.mark.parametrize("works", [True, False])
def test_graphs_are_timed_where_training_replays_them(works, priced, monkeypatch):
    recorded = []

    def record(work):
        if not works:
            raise RuntimeError("not while capturing")
        work()
        return None, lambda: recorded.append(None) or work()

    # not the relaxation's own graphs, which need a GPU
    stand_in = types.SimpleNamespace(
        ineligible_reason=lambda *_: "", record_cuda=record, CACHE=tuning.cuda_graphs.CACHE
    )
    monkeypatch.setattr(tuning, "cuda_graphs", stand_in)
    assert len(tune(network(), priced({FUSED_32: 1.0})).choices)
    assert bool(recorded) == works


def test_only_what_was_verified_is_written(priced):
    """Tiles of stages that lost against one launch are not in the file."""
    prices = {("mlp_relaxation", 16, 16): 9.0, FUSED_32: 1.0, ("linear_feedback", 32, 16): 1.0}
    prices |= {("linear_predict", 16, 16): 2.0, ("linear_feedback", 16, 16): 2.0}
    report = tune(network(), priced(prices))
    assert any("linear_feedback" in d.what for d in report.decisions)
    assert {key.kernel for key in report.choices if isinstance(key, LaunchKey)} == {"mlp_relaxation"}


def test_input_that_cannot_be_tuned(priced, monkeypatch, tmp_path):
    x, y = batch()
    with pytest.raises(pcfast.ArgumentError, match="CUDA"):
        pcfast.tune(network(), x, y)
    with pytest.raises(pcfast.ModelError, match="no loop"):
        tune(nn.Sequential(nn.Linear(12, 10)), priced({}))
    (tmp_path / "file").touch()
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(pcfast.ArgumentError, match=r"PCFAST_CACHE: got .*file"):
        tune(network(), priced({}))


# choices and designs -------------------------------------------------------------------------------------------


def loop_design(model, count: int = 9):
    settings = pcfast.problem.settings.Settings(num_steps=STEPS, backend="triton")
    return designs.design_of(pcfast.relaxation.prepare(model, *batch(count=count), settings)[1])


def test_choices_are_part_of_the_design(launched):
    model = network()
    by_rule = loop_design(model)
    chosen = replace(by_rule.feedback.tiles, block_m=32)
    with config_cache.using(Choices({by_rule.feedback.key: chosen})):
        tuned = loop_design(model)
        assert ran(model, launched) == {FUSED_32}
    assert tuned.feedback.tiles == chosen and tuned.feedback.programs == 1
    assert loop_design(model) is by_rule  # designs stay cached by value
    with config_cache.using(Choices({by_rule.loop: STAGED})):
        assert not loop_design(model).fuse_loop
        assert {name for name, *_ in ran(model, launched)} == {"linear_predict", "linear_feedback"}


def test_what_decides_on_bits_does_not_depend_on_the_batch():
    model = network(12, 40, 30, 10)
    few, many = loop_design(model, 3), loop_design(model, 40)
    assert few.loop == many.loop and few.feedback.key == many.feedback.key
    with config_cache.using(Choices({few.loop: STAGED})):
        assert loop_design(model, 3).feedback.key != loop_design(model, 40).feedback.key


def test_another_order_of_sums_is_not_taken():
    by_rule = loop_design(network())
    other = replace(by_rule.feedback.tiles, block_k=2 * by_rule.feedback.tiles.block_k)
    with config_cache.using(Choices({by_rule.feedback.key: other})):
        assert loop_design(network()).feedback.tiles == by_rule.feedback.tiles


@pytest.mark.parametrize("precision", ["bf16", "tf32", "tf32x3"])
def test_candidates_keep_the_reduction_and_hold_the_loss(precision):
    by_rule = linear_tiles([(64, 600, 600)], precision, 132)
    sizes = ((600, 600),)
    for loss in (False, True):
        result = candidates(LaunchKey("linear_predict", precision, loss, 64, sizes), by_rule, False)
        assert result and len(set(result)) == len(result)
        assert {tiles.block_k for tiles in result} == {by_rule.block_k}
        if loss:
            assert {(tiles.block_m, tiles.block_n) for tiles in result} == {
                (by_rule.block_m, by_rule.block_n)
            }
    result = candidates(
        LaunchKey("mlp_relaxation", precision, True, None, sizes), fused_loop_tiles(precision), False
    )
    assert {tiles.block_n for tiles in result} == {fused_loop_tiles(precision).block_n}


# the file ------------------------------------------------------------------------------------------------------

TILES = LinearTiles(32, 16, 16, 4, 1, "tuned")


def entry(batch_size: int) -> dict:
    return {LaunchKey("linear_feedback", "tf32x3", False, batch_size, ((40, 30), (12, 40))): TILES}


EVERY_KIND = Choices({
    **entry(5),
    LaunchKey("mlp_relaxation", "bf16", True, None, ((10, 30),)): TILES,
    LoopKey("tf32", ((10, 30), (30, 40)), True): FUSED,
    ConvolutionKey("bf16", (8, 8, 2, 3, (3, 3), (1, 1), (0, 0), None, (1, 1))): COMPOSED,
})  # fmt: skip


def test_choices_as_json():
    assert from_json(json.loads(json.dumps(to_json(EVERY_KIND)))) == EVERY_KIND
    assert hash(from_json(to_json(EVERY_KIND))) == hash(EVERY_KIND)


def test_saving_adds_to_what_is_there(folder):
    config_cache.save(CPU, Choices(entry(1)))
    path = config_cache.save(CPU, Choices(entry(2)))
    assert config_cache.load(CPU) == Choices(entry(1) | entry(2)) == config_cache.active(CPU)
    assert [file for file in folder.iterdir() if file.name != ".lock"] == [path]


def test_two_writers_lose_nothing():
    def write(first: int) -> None:
        for number in range(first, first + 10):
            config_cache.save(CPU, Choices(entry(number)))

    code = (
        "import torch, test_tuning as t\n"
        "for n in range(100, 110): t.config_cache.save(torch.device('cpu'), t.Choices(t.entry(n)))"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=environment())
    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(120) == 0
    batches = sorted(key.batch for key in config_cache.load(CPU))
    assert batches == [*range(20), *range(100, 110)]


def environment() -> dict:
    paths = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)),
                                          os.environ.get("PYTHONPATH")]))  # fmt: skip
    return {**os.environ, "PYTHONPATH": paths}


def test_a_stale_digest_is_ignored_and_said_once(caplog, monkeypatch):
    config_cache.save(CPU, Choices(entry(1)))
    monkeypatch.setattr(config_cache, "sources_digest", lambda: "another")
    config_cache.invalidate()
    with caplog.at_level(logging.INFO, "pcfast"):
        assert config_cache.active(CPU) == config_cache.load(CPU) == NONE
    (record,) = caplog.records
    assert "tuned for other kernels" in record.message and "pcfast tune" in record.message


def test_a_file_under_another_ones_name_is_not_taken(caplog, monkeypatch):
    path = config_cache.save(CPU, Choices(entry(1)))
    monkeypatch.setattr(config_cache, "sources_digest", lambda: "another")
    path.rename(config_cache.path_of(CPU))
    assert config_cache.load(CPU) == NONE
    assert "it was tuned for" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b'{"format": 99}', "no list", "no kind", "no tiles", "no power of 2", "other names"],
)  # fmt: skip
def test_a_broken_file_is_named_with_the_remedy(content, caplog, launched):
    path = config_cache.save(CPU, Choices(entry(1)))
    if isinstance(content, str):
        record = json.loads(path.read_bytes())
        if content == "no list":
            record["choices"] = 3
        elif content == "no kind":
            record["choices"][0]["kind"] = "other"
        elif content == "no tiles":
            record["choices"][0]["choice"] = "wide"
        elif content == "no power of 2":
            record["choices"][0]["choice"]["block_m"] = 48
        else:
            tiles = record["choices"][0]["choice"]
            tiles["rows"] = tiles.pop("block_m")
        content = json.dumps(record).encode()
    path.write_bytes(content)
    config_cache.invalidate()
    assert ran(network(), launched) == {("mlp_relaxation", 16, 16)}
    assert str(path) in caplog.text and "pcfast tune" in caplog.text and "Delete" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING
    config_cache.save(CPU, Choices(entry(2)))  # replaced whole
    assert config_cache.active(CPU) == Choices(entry(2))


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("PCFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert config_cache.folder() == tmp_path / "pcfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(config_cache.folder()) == "/home/somebody/.cache/pcfast"


def test_importing_and_other_backends_read_nothing(folder):
    config_cache.save(CPU, Choices(entry(1)))
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, found: opened.append(str(found[0])) if event == 'open' else None)\n"
        "import pcfast, torch\n"
        "import test_tuning as t\n"
        "x, y = t.batch()\n"
        "pcfast.relax(t.network(), x, y, num_steps=2, backend='eager')\n"
        f"mine = lambda: [name for name in opened if {str(folder)!r} in name]\n"
        "assert not mine(), mine()\n"
        "for count in (3, 4):\n"
        "    t.loop_design(t.network(), count)\n"
        "    assert len(mine()) == 1, mine()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(__file__), env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_draws_keep_shapes_and_values():
    x, y = batch(5, (2, 3))
    draws = tuning._draws(x, y)
    assert len(draws) == tuning._DRAWS and draws[0][0] is x
    for drawn, targets in draws[1:]:
        assert drawn.shape == x.shape and torch.equal(drawn.sort(0).values, x.sort(0).values)
        assert torch.equal(targets.sort().values, y.sort().values)
    assert checking.check(network(), tuning._draws(*batch()), num_steps=2, method="strict").ok


# the command line ----------------------------------------------------------------------------------------------

SMALL = [
    "tune",
    "--net",
    "mlp",
    "--widths",
    "20,14",
    "--batch-size",
    "9",
    "--num-steps",
    str(STEPS),
    "--device",
    "cpu",
]


def test_the_command(priced, capsys, folder, monkeypatch):
    """With a clock by which tiles of 32 rows are the fastest."""
    command, reports = sys.modules["pcfast.cli.tune"], []
    clock = priced({FUSED_32: 1.0})
    monkeypatch.setattr(
        command,
        "tune_model",
        lambda *a, **k: reports.append(pcfast.tune(*a, clock=clock, **k)) or reports[-1],
    )
    assert main(SMALL) == 0
    text = capsys.readouterr().out
    assert "100000.000 ms before, 1000.000 ms after" in text
    assert f"within their bounds; written to {config_cache.path_of(CPU)}" in " ".join(text.split())
    row = next(line for line in text.splitlines() if "tiles of mlp_relaxation" in line)
    assert "16 x 16 x 16" in row and "32 x 16 x 16" in row
    assert main(SMALL) == 0  # from here on it is what runs
    assert "nothing is faster" in capsys.readouterr().out

    saved = []

    def tuned_before(*_, save, **__):
        saved.append(save)
        return replace(reports[0], path=reports[0].path if save else None)

    monkeypatch.setattr(command, "tune_model", tuned_before)
    assert main([*SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["changed"] and (result["before_s"], result["after_s"]) == (100.0, 1.0)
    assert result["path"] == str(config_cache.path_of(CPU))
    assert main([*SMALL, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "nothing was written" in text and "written to" not in text
    assert saved == [True, False]


def test_the_command_without_a_gpu(capsys):
    assert main(SMALL) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: --device: got cpu; needed: a CUDA device")
