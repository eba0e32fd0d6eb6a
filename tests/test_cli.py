"""The command line as a whole: exit status, one line for bad input, info, completion, the pages made from it."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pcfast
from pcfast.__main__ import program as program_of_process
from pcfast.backends import BACKENDS, Eager
from pcfast.cli import main
from pcfast.cli import pcfast as program

ROOT = Path(__file__).resolve().parent.parent


def fails(capsys, *arguments: str) -> str:
    """Run the command line with input that it cannot use; returns its one line on standard error."""
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert "Traceback" not in output.err and output.out == ""
    return lines[0]


def test_without_a_command_it_explains_itself(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for command in ("train", "compare", "check", "info", "completion"):
        assert command in text and command in program.commands


def test_the_program_spares_the_garbage_collector_its_modules(monkeypatch, capsys):
    """Before the command, so that no collection goes through them, and after it, so that the last one does not."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(capsys.readouterr().out))
    monkeypatch.setattr(sys, "argv", ["pcfast", "--version"])
    assert program_of_process() == 0 and len(frozen) == 2
    assert frozen[0] == "" and pcfast.__version__ in frozen[1]
    monkeypatch.setattr(sys, "argv", ["pcfast", "no-command"])
    assert program_of_process() == 2


@pytest.mark.parametrize(("command", "times"), [("train", 1), ("compare", 1), ("bench", 0)])
def test_the_programs_training_keeps_its_memory(monkeypatch, capsys, command, times):
    """Not the benchmark, whose steps find what a user's find."""
    called = []
    monkeypatch.setattr("pcfast.__main__.keep_memory", lambda: called.append(True))
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr(sys, "argv", ["pcfast", command, "--help"])
    assert program_of_process() == 0 and len(called) == times


@pytest.mark.parametrize(("name", "searched"), [("pcfast", False), ("program.py", True)])
def test_imports_of_the_program_alone_are_not_searched_for_garbage(name, searched):
    code = (
        f"import gc, sys; sys.argv = [{name!r}]; whole = [];"  # collections that go through everything
        "gc.callbacks.append(lambda _, at: whole.append(gc.get_freeze_count()) if at['generation'] == 2 else None);"
        "import pcfast; print(0 in whole, gc.get_freeze_count() > 0, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split() == [str(searched), str(not searched), "True"], done.stderr


def test_version(capsys):
    assert main(["--version"]) == 0
    assert pcfast.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", program.commands)
def test_every_option_is_explained(command, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: pcfast {command}")
    for parameter in program.commands[command].params:
        assert parameter.param_type_name == "argument" or parameter.help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian"]),
        (["train", "--net", "transformer"], ["--net", "transformer", "cifar-cnn"]),
        (["train", "--method", "strictly"], ["--method", "strict", "fixed-prediction"]),
        (["train", "--epochs", "0"], ["--epochs", "0"]),
        (["train", "--epochs", "many"], ["--epochs", "many"]),
        (["train", "--seed", "-1"], ["--seed"]),
        (["train", "--lr", "0"], ["--lr"]),
        (["train", "--lr", "nan"], ["--lr", "nan"]),
        (["train", "--weight-decay", "inf"], ["--weight-decay", "inf"]),
        (["train", "--out", ""], ["--out", "empty"]),
        (["train", "--device", "meta"], ["--device", "meta"]),
        (["train", "--device", "mps"], ["--device", "mps"]),
        (["train", "--unknown", "1"], ["--unknown"]),
        (["train", "--widths", "600,x"], ["--widths", "600,x", "600,600"]),
        (["train", "--widths", "600,0"], ["--widths", "600,0"]),
        (["train", "--net", "cnn", "--widths", "3"], ["--widths", "mlp"]),
        (["train", "--net", "cnn", "--model", "a.py:f"], ["--net", "--model"]),
        (["train", "--num-steps", "-1"], ["--num-steps", "-1"]),
        (["train", "--step-size", "-0.1"], ["--step-size", "-0.1"]),
        (["train", "--step-size", "nan"], ["--step-size", "nan"]),
        (["train", "--momentum", "0.9"], ["--momentum", "adamw", "sgd"]),
        (["train", "--device", "gpu"], ["--device", "gpu", "cuda"]),
        (["train", "--precision", "tf32", "--device", "cpu"], ["--precision", "tf32", "cpu"]),
        (["train", "--data", "digits", "--data-dir", "."], ["digits"]),
        (["train", "--data", "mnist", "--data-dir", "no-such-folder"], ["--data-dir", "no-such-folder"]),
        (["train", "--data", "cifar100"], ["--data-dir: got none for cifar100", "cifar-100-binary.tar.gz"]),
        (["completion", "powershell"], ["powershell", "bash"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *arguments)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_a_device_that_is_not_here(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no CUDA device" in fails(capsys, "train", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "cuda:1" in fails(capsys, "train", "--device", "cuda:2")


def test_options_may_be_spelled_as_in_python(capsys):
    line = fails(capsys, "train", "--num_steps", "-1", "--method", "fixed-prediction")
    assert "--num-steps" in line


MODELS = {
    "def broken(:": ("raised SyntaxError", "broken"),
    "import no_such_module_xyz": ("no_such_module_xyz", "make"),
    "make = 3": ("without a function", "make"),
    "def make(): raise SystemExit(3)": ("SystemExit", "make"),
    "def make(): return 3": ("a int", "make"),
    "from torch import nn\nmake = nn.Sequential(nn.Linear(64, 10))": ("not a function", "make"),
    "from torch import nn\ndef make(): return nn.Sequential(nn.LazyLinear(10))": ("uninitialised", "make"),
    "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(64, 10)).requires_grad_(False)": (
        "to train",
        "make",
    ),
    "def make():\n    import os\n    os.stat('no-such-file')": ("(line 3)", "make"),
    "from torch import nn\nclass M(nn.Linear):\n"
    "    def forward(self, x):\n        raise OSError('disk')\ndef make(): return nn.Sequential(M(1, 1))": (
        "OSError: disk (line 4)",
        "make",
    ),
    "from torch import nn\ndef make(): return nn.Linear(64, 10)": ("a Linear", "make"),
    "from torch import nn\ndef make(): return nn.Sequential(nn.ReLU())": ("without parameters", "make"),
    "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(63, 10))": ("64", "make"),
    "from torch import nn\ndef make(): return nn.Sequential(nn.Linear(64, 3))": ("(2, 3)", "make"),
}


@pytest.mark.parametrize("source", MODELS)
def test_a_bad_model_file_is_named(source, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(source)
    cause, function = MODELS[source]
    before = list(sys.path)
    line = fails(capsys, "train", "--model", f"mine.py:{function}", "--epochs", "1")
    assert cause in line
    assert sys.path == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", "mine.py:1x", "nowhere.py:make", "mine.txt:make"])
def test_a_bad_model_argument_says_what_is_needed(spec, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("")
    assert "FILE.py:FUNCTION" in fails(capsys, "train", "--model", spec)


def test_the_installed_command_runs(tmp_path):
    """As a process: no traceback, one line, exit status; from ``python -m pcfast`` too."""
    for call in ([Path(sys.executable).with_name("pcfast")], [sys.executable, "-m", "pcfast"]):
        done = subprocess.run([*call, "train", "--net", "x"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and "--net" in done.stderr


# ------------------------------------------------------------------------------------------------- info


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"]["pcfast"] == pcfast.__version__
    assert result["versions"]["torch"] == str(torch.__version__)
    assert result["devices"][0]["device"] == "cpu" and result["devices"][0]["name"]
    on_cpu = {row["backend"]: row["reason"] for row in result["backends"] if row["device"] == "cpu"}
    assert on_cpu == {
        **dict.fromkeys(BACKENDS, ""),
        **dict.fromkeys(("cuda", "triton"), "it needs a CUDA device"),
    }


def test_info_says_why_a_backend_does_not_run(capsys, monkeypatch):
    class Absent(Eager):
        def supports(self, request):
            return False, "its kernels need a newer driver"

    monkeypatch.setitem(BACKENDS, "absent", Absent())
    assert main(["info"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "absent" in line]
    assert lines and all("no" in line and "newer driver" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_says_why_there_is_no_gpu(capsys):
    assert main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "cuda" in line and "none" in line)
    assert "CUDA" in line or "driver" in line


def test_info_names_a_missing_package(capsys, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "matplotlib" in line)
    assert "missing" in line and 'pip install "pcfast[train]"' in line


# ------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell, capsys, monkeypatch):
    # click asks bash for its version in a process of its own
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_PCFAST_COMPLETE" in script and f"{shell}_complete" in script


def test_values_are_completed(tmp_path):
    """What the script asks for: the words so far in the environment, the candidates on standard output."""
    environment = dict(
        os.environ, _PCFAST_COMPLETE="bash_complete", COMP_WORDS="pcfast train --net c", COMP_CWORD="3"
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("pcfast")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == {"cnn", "cifar-cnn"}


# ------------------------------------------------------------------------------------------------ pages


def load_pages():
    spec = importlib.util.spec_from_file_location("commands", ROOT / "docs" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", program.commands)
def test_a_page_says_what_the_command_says(command):
    pages = load_pages()
    page = (pages.PAGES / f"{command}.md").read_text()
    assert pages.with_reference(page, program.commands[command]) == page
    for parameter in program.commands[command].params:
        if parameter.param_type_name == "option":
            assert f"`{parameter.opts[0]}`" in page


def test_no_page_without_a_command():
    assert {path.stem for path in load_pages().PAGES.glob("*.md")} == set(program.commands)
