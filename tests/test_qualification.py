"""Qualification by children that only follow the protocol: what is made of them, the record, who runs it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import planned

import pcfast
from pcfast.backends import BACKENDS, device_identity, generation
from pcfast.backends.kernel_backend import KernelBackend
from pcfast.backends.kernel_kinds import KernelKind
from pcfast.backends.qualification import automatic, record, run
from pcfast.backends.qualification.record import FAILED, QUALIFIED, UNTESTED, Verdict
from pcfast.checking.cases import CASES
from pcfast.cli import main
from pcfast.networks import mlp
from pcfast.support import log as logs

CPU = torch.device("cpu")
A, B, C = (KernelKind("cuda", name, "ieee") for name in "abc")
FINE = Verdict(QUALIFIED)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of its own; nothing is known before or after."""
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "cache"))
    for name in ("LOCAL_RANK", "RANK", automatic.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    automatic.forget()
    logs._said.clear()
    yield tmp_path / "cache"
    automatic.forget()


CHILD = """
import json, os, signal, sys, time
writer, left_out = int(sys.argv[2]), json.loads(sys.argv[3])
kinds = [["cuda", name, "ieee"] for name in "abc"]
open({started!r}, "a").write(f"{{os.getpid()}}\\n")
say = lambda **message: os.write(writer, json.dumps(message).encode() + b"\\n")
{first}
say(kinds=kinds, unavailable={{"triton": "not here"}})
for kind in kinds:
    if kind in left_out:
        continue
    say(begin=kind)
    verdict = ("qualified", "")
    if kind[1] == "b":
        {in_b}
    say(verdict=verdict)
say(end=True)
"""


@pytest.fixture
def children(tmp_path, monkeypatch):
    """``children(in_b, first)``: children that do so while they test b, or before they say anything.

    Gives a function for the numbers of those that were started.
    """
    started = tmp_path / "started"

    def make(in_b: str = "pass", first: str = ""):
        code = CHILD.format(started=str(started), in_b=in_b, first=first)
        monkeypatch.setattr(run, "command", lambda: [sys.executable, "-c", code])
        return lambda: [int(line) for line in started.read_text().split()] if started.exists() else []

    return make


# what becomes of a child ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_b", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("os.abort()", "was killed by SIGABRT"),
        ("sys.exit('no such symbol')", "ended with status 1: no such symbol"),
        ("os.write(writer, b'{\"verd'); os._exit(3)", "ended with status 3"),
    ],
)
def test_a_child_that_dies_disqualifies_what_it_tested_and_nothing_else(in_b, words, children, folder):
    started = children(in_b)
    seen = []
    result = pcfast.qualify("cpu", progress=lambda done, total, what: seen.append((done, total, what)))
    assert result.verdicts == {A: FINE, B: Verdict(FAILED, f"the child process {words}"), C: FINE}
    assert result.unavailable == {"triton": "not here"} and not result.ok
    assert len(started()) == 2
    assert seen == [(0, 3, str(A)), (1, 3, str(B)), (2, 3, str(C)), (3, 3, "done")]
    assert record.load(CPU) == result and record.path_of(CPU).parent == folder
    assert "was killed" in result.refusal([A, B]) or "ended with status" in result.refusal([A, B])
    assert result.refusal([A, C]) == ""
    assert "it is of no qualification" in result.refusal([KernelKind("cuda", "d", "ieee")])


def test_a_kind_that_does_not_end_is_killed_and_the_others_go_on(children):
    started = children("time.sleep(60)")
    result = pcfast.qualify("cpu", kind_limit_s=0.5)
    assert result.verdicts == {A: FINE, B: Verdict(FAILED, "it did not end within 0.5 s"), C: FINE}
    for number in started():
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_what_the_time_does_not_reach_is_untested(children):
    children("time.sleep(60)")
    result = pcfast.qualify("cpu", limit_s=1.0)
    late = Verdict(UNTESTED, "not reached within 1 s")
    assert result.verdicts == {A: FINE, B: late, C: late}
    assert result.refusal([C]).endswith(
        "not tested on this device: not reached within 1 s; run pcfast qualify"
    )


def test_a_child_that_reports_a_fault_and_ends_is_followed_by_another(children):
    started = children("say(verdict=('failed', 'wrong')); os._exit(0)")
    assert pcfast.qualify("cpu").verdicts == {A: FINE, B: Verdict(FAILED, "wrong"), C: FINE}
    assert len(started()) == 2


def test_where_no_child_gets_to_a_kernel_nothing_is_recorded(children, folder):
    children(first="sys.exit('no module named torch')")
    with pytest.raises(
        pcfast.BackendError, match=r"ended with status 1: no module named torch.*pcfast qualify"
    ):
        pcfast.qualify("cpu")
    assert record.load(CPU) is None


# the record ----------------------------------------------------------------------------------------------------


def test_another_identity_is_not_taken(children, monkeypatch):
    children()
    path, known = record.path_of(CPU), device_identity.identity_of(CPU)
    pcfast.qualify("cpu")
    for field in ("driver", "torch", "triton", "sources", "module", "pcfast", "capability", "device"):
        other = replace(known, **{field: "another"})
        monkeypatch.setattr(record, "identity_of", lambda device, other=other: other)
        assert record.path_of(CPU) != path and record.load(CPU) is None
        path.rename(record.path_of(CPU))  # under another one's name
        assert record.load(CPU) is None
        record.path_of(CPU).rename(path)


def test_identity_of_a_gpu(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\n"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    gpu, names = torch.device("cuda", 0), []
    for file, expected in ((driver, "580.65.06"), (tmp_path / "none", "CUDA 13000")):
        monkeypatch.setattr(device_identity, "_DRIVER_FILE", file)
        device_identity._identity.cache_clear()
        known = device_identity.identity_of(gpu)
        names.append(known.file_name("qualification"))
        assert (known.device, known.capability, known.driver) == ("NVIDIA H200", "9.0", expected)
        assert (
            known.torch == torch.__version__
            and known.pcfast == pcfast.__version__
            and len(known.sources) == 64
        )
    device_identity._identity.cache_clear()
    assert names[0] != names[1] and names[0].startswith("qualification_nvidia-h200-9.0_")


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff", b"[]", b'{"format": 0}', "kinds", "status", "unavailable", "when"],
)
def test_a_damaged_record_is_as_none(damage, children, caplog):
    started = children()
    path = record.save(CPU, pcfast.qualify("cpu"))
    if isinstance(damage, str):
        content = json.loads(path.read_bytes())
        if damage == "status":
            content["kinds"][0]["status"] = "excellent"
        else:
            content[damage] = 3
        damage = json.dumps(content).encode()
    path.write_bytes(damage)
    automatic.forget()
    for _ in range(2):
        assert record.load(CPU) is None
    said = [entry for entry in caplog.records if "cannot be read" in entry.message]
    assert len(said) == 1 and str(path) in said[0].message and said[0].levelno == logging.WARNING
    assert automatic.refusal(CPU, [A], may_run=True) == "" and len(started()) == 2
    assert record.load(CPU) is not None


def test_a_folder_that_cannot_be_written(children, tmp_path, monkeypatch, caplog):
    started = children()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PCFAST_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert automatic.refusal(CPU, [A], may_run=True) == ""
    assert len(started()) == 1
    assert len([entry for entry in caplog.records if "cannot be written" in entry.message]) == 1
    automatic.forget()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(automatic.time, "sleep", lambda seconds: pytest.fail("it waits"))
    assert "local rank 0 can write no qualification" in automatic.refusal(CPU, [A], may_run=True)


# by itself -----------------------------------------------------------------------------------------------------


def test_once_a_process_and_a_machine(children, caplog):
    started = children("verdict = ('failed', 'wrong numbers')")
    caplog.set_level(logging.INFO, "pcfast")
    assert "the first call does it" in automatic.refusal(CPU, [A], may_run=False) and not started()
    assert automatic.refusal(CPU, [A], may_run=True) == ""
    assert automatic.refusal(CPU, [A, B], may_run=True) == (
        "cuda b in ieee is not qualified on this device: wrong numbers"
    )
    automatic.forget()
    assert automatic.refusal(CPU, [A], may_run=False) == ""  # of the file
    assert len(started()) == 1
    before, after = (entry for entry in caplog.records if "its kernels" in entry.message)
    assert before.levelno == logging.WARNING and "2 of 3 kinds qualified" in after.message


def test_it_can_be_switched_off(children, monkeypatch, caplog):
    started = children()
    caplog.set_level(logging.INFO, "pcfast")
    monkeypatch.setenv(automatic.VARIABLE, "0")
    for _ in range(2):
        assert "run pcfast qualify" in automatic.refusal(CPU, [A], may_run=True)
    assert not started() and len(caplog.records) == 1 and "eager runs" in caplog.records[0].message
    pcfast.qualify("cpu")
    assert automatic.refusal(CPU, [A], may_run=True) == ""


def test_not_inside_a_capture_nor_while_a_compiler_traces(children, monkeypatch):
    started = children()
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(record, "load", lambda device: None)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "inside a capture" in automatic.refusal(gpu, [A], may_run=True)
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        before = generation.current()
        assert "traces" in automatic.refusal(CPU, [A], may_run=True) and generation.current() > before
    assert not started()
    assert automatic.refusal(CPU, [A], may_run=True) == "" and len(started()) == 1


def test_where_no_child_starts_eager_runs_and_it_is_said(children, caplog):
    started = children(first="sys.exit(1)")
    for _ in range(2):
        assert "no kernel could be tested" in automatic.refusal(CPU, [A], may_run=True)
    assert len(started()) == 1 and "no kernel could be tested" in caplog.text


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "RANK"])
def test_other_ranks_wait_for_the_record_of_rank_0(variable, children, monkeypatch):
    started = children()
    result = pcfast.qualify("cpu")
    record.path_of(CPU).unlink()
    automatic.forget()
    monkeypatch.setenv(variable, "1")
    timer = threading.Timer(0.5, record.save, (CPU, result))
    timer.start()
    assert automatic.refusal(CPU, [A], may_run=True) == ""
    assert not timer.is_alive() and len(started()) == 1


def test_other_ranks_do_not_wait_for_ever(children, monkeypatch, caplog):
    started = children()
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(run, "LIMIT_S", 0.1)
    monkeypatch.setattr(automatic, "_MARGIN_S", 0.2)
    for _ in range(2):
        assert "local rank 0 has written no qualification" in automatic.refusal(CPU, [A], may_run=True)
    assert not started() and "eager runs on cpu" in caplog.text


OTHER_PROCESS = """
import sys, torch
from pcfast.backends.kernel_kinds import KernelKind
from pcfast.backends.qualification import automatic, run
run.command = lambda: [sys.executable, "-c", sys.argv[1]]
print("ready", flush=True)
sys.stdin.readline()
print(repr(automatic.refusal(torch.device("cpu"), [KernelKind("cuda", "a", "ieee")], may_run=True)), flush=True)
"""


def test_of_two_processes_one_tests_and_the_other_reads(children):
    started = children("time.sleep(1)")
    root = str(Path(pcfast.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, run.command()[2]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    with contextlib.closing(other.stdout):
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.close()
        assert automatic.refusal(CPU, [A], may_run=True) == ""
        assert other.stdout.readline() == "''\n" and other.wait(60) == 0
    assert len(started()) == 1


# kinds ---------------------------------------------------------------------------------------------------------


def test_every_kind_has_cases():
    backends = [backend for backend in BACKENDS.values() if isinstance(backend, KernelBackend)]
    assert set(CASES) == {(backend.name, name) for backend in backends for name in backend.kind_names}


def test_what_has_no_loop_needs_no_kernels():
    for name in ("cuda", "triton"):
        assert not BACKENDS[name].kernel_kinds(planned(mlp([4, 3, 2]), (2, 4), method="exact"))
    kinds = BACKENDS["cuda"].kernel_kinds(planned(mlp([4, 3, 2]), (2, 4)))
    assert {str(kind) for kind in kinds} == {"cuda linear in ieee", "cuda gram in ieee"}


# the command line ----------------------------------------------------------------------------------------------


def test_the_command(children, capsys):
    children("verdict = ('failed', 'wrong numbers')")
    assert main(["qualify", "--device", "cpu", "--dry-run"]) == 1
    text = capsys.readouterr().out
    assert "wrong numbers" in text and "2 of 3 kinds of kernels qualified on cpu" in text
    assert "not tested: triton: not here" in text and record.load(CPU) is None
    assert main(["qualify", "--device", "cpu", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [kind["status"] for kind in result["kinds"]] == ["qualified", "failed", "qualified"]
    assert result["path"] == str(record.path_of(CPU)) and Path(result["path"]).exists()


def test_info_shows_the_record(children, capsys, monkeypatch):
    from pcfast.backends import kernel_backend

    children("verdict = ('failed', 'wrong numbers')")
    monkeypatch.setattr(kernel_backend, "AUTOMATIC_DEVICES", ("cpu",))
    assert main(["info"]) == 0
    assert "no kernel is qualified on cpu yet: pcfast qualify" in capsys.readouterr().out
    pcfast.qualify("cpu")
    assert main(["info", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)["qualifications"]
    assert (
        shown["kinds"][1]["reason"] == "wrong numbers" and shown["for"]["device"] == "cpu" and shown["when"]
    )
    assert main(["info"]) == 0
    assert "wrong numbers" in capsys.readouterr().out
