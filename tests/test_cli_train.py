"""``pcfast train``: what it leaves, resuming, precisions, data from files, and the default run on digits."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pcfast
from pcfast import datasets, networks
from pcfast.cli import main
from pcfast.support.files import results_folder
from pcfast.training import trainer as training
from pcfast.training.run import evaluate
from pcfast.training.trainer import FILES

QUICK = ("--widths", "16", "--num-steps", "3", "--batch-size", "200")


def run(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_the_default_run_learns_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert run() == 0
    assert time.monotonic() - start < 60
    lines = capsys.readouterr().out.splitlines()
    out = Path("runs/digits")
    for name in FILES:
        assert str(out / name) in lines and (out / name).is_file()
    accuracy = float(lines[-1].removeprefix("test accuracy ").removesuffix("%"))
    assert accuracy >= 95
    model = networks.digits_mlp()
    model.load_state_dict(checkpoint_of(out)["model"])
    data = datasets.digits()
    assert evaluate(model, data.x_test, data.y_test)[1] == pytest.approx(accuracy / 100, abs=1e-4)


def test_json_is_the_only_output(tmp_path, capsys):
    assert run("--out", tmp_path / "run", "--epochs", 2, *QUICK, "--json") == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert output.err == ""
    assert len(result["history"]["test_accuracy"]) == 2
    assert result["files"] == [str(tmp_path / "run" / name) for name in FILES]


def test_a_resumed_run_takes_its_options_from_its_folder(tmp_path, capsys):
    options = (
        "--method",
        "fixed_prediction",
        "--optimizer",
        "sgd",
        "--momentum",
        0.5,
        "--lr",
        0.3,
        "--loss",
        "mse",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("--out", whole, "--epochs", 3, *QUICK, *options, "--seed", 4) == 0
    assert run("--out", parts, "--epochs", 1, *QUICK, *options, "--seed", 4) == 0
    assert run("--out", parts, "--resume", "--epochs", 3) == 0
    a, b = checkpoint_of(whole)["model"], checkpoint_of(parts)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert config_of(parts)["kept"]["momentum"] == 0.5
    capsys.readouterr()
    assert run("--out", parts, "--resume") == 0  # to the 3 epochs of its last call
    assert "3 epochs already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--widths", "17"), ["--resume", "--widths 16, not 17"]),
        (("--net", "cnn"), ["--resume", "--net", "not cnn"]),
        (("--lr", "0.1"), ["--resume", "lr", "0.1"]),
        (("--precision", "bf16"), ["--resume", "precision", "bf16"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, words, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    before = {name: (out / name).read_bytes() for name in FILES}
    capsys.readouterr()
    assert run("--out", out, "--resume", "--epochs", 2, *change) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error
    assert {name: (out / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("damage", ["missing", "no run", "config", "checkpoint"])
def test_what_cannot_be_resumed_is_named(damage, tmp_path, capsys):
    out = tmp_path / "run"
    if damage != "missing":
        out.mkdir()
    if damage in ("config", "checkpoint"):
        assert run("--out", out, "--epochs", 1, *QUICK) == 0
        name = "config.json" if damage == "config" else "checkpoint.pt"
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert run("--out", out, "--resume") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--out" in error and str(out) in error


def test_an_unusable_out_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("--out", out, *QUICK) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "--out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_start_leaves_an_earlier_run_where_it_is(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    for wrong in (("--num-steps", -1), ("--step-size", "inf"), ("--precision", "tf32", "--device", "cpu")):
        assert run("--out", out, "--epochs", 1, *QUICK, *wrong) == 2
    assert not (out / "earlier-1").exists()
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    assert (out / "earlier-1" / "checkpoint.pt").is_file()


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_precisions(precision, tmp_path, monkeypatch):
    seen = set()
    real = training.loss_with

    def spy(settings, model, x, y, **options):
        result = real(settings, model, x, y, **options)
        if torch.is_grad_enabled():
            plan = pcfast.last_run().plan
            seen.add((x.dtype, plan.precision.state, plan.precision.operand))
        return result

    monkeypatch.setattr(training, "loss_with", spy)
    assert run("--out", tmp_path / "run", "--epochs", 1, *QUICK, "--precision", precision) == 0
    expected = {
        "bf16": (torch.float32, torch.float32, torch.bfloat16),
        "fp64": (torch.float64, torch.float64, torch.float64),
    }
    assert seen == {expected[precision]}
    assert not torch.is_autocast_enabled("cpu")
    assert config_of(tmp_path / "run")["settings"]["precision"] == precision


@pytest.mark.parametrize("net", ["cnn", "cifar-cnn"])
def test_the_papers_networks_fit_any_data(net, tmp_path):
    out = tmp_path / "run"
    assert run("--out", out, "--net", net, "--epochs", 1, "--num-steps", 1, "--batch-size", 1437) == 0
    assert len(config_of(out)["settings"]["network"]) == {"cnn": 5, "cifar-cnn": 6}[net]


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text("WIDTH = 24\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nimport neighbour\n"
        "def make():\n"
        "    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, neighbour.WIDTH), nn.Tanh()), "
        "nn.Linear(24, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run("--model", "mine.py:make", "--epochs", 1, "--batch-size", 100, "--out", "run") == 0
    settings = config_of(Path("run"))["settings"]
    assert "Flatten" in settings["network"][0] and settings["data"]["x_train"].startswith(
        "float32 (1437, 1, 8, 8)"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run's folder knows where the model is
    assert run("--resume", "--out", tmp_path / "run", "--epochs", 2) == 0


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_mnist_from_files(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", generator.integers(0, 10, count, dtype=np.uint8))
    out = tmp_path / "run"
    assert (
        run("--data", "mnist", "--data-dir", tmp_path, "--epochs", 1, "--batch-size", 30, "--out", out) == 0
    )
    settings = config_of(out)["settings"]
    assert len(settings["network"]) == 5 and settings["num_steps"] == 20  # the paper's network and settings
    assert settings["optimizer"]["name"] == "Adam" and settings["optimizer"]["groups"][0]["lr"] == 0.002


def test_ctrl_c_keeps_the_run(tmp_path, capsys, monkeypatch):
    step = torch.optim.AdamW.step
    steps = []

    def interrupted(self, *arguments):
        steps.append(0)
        if len(steps) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 3, *QUICK) == 130
    error = capsys.readouterr().err.lstrip("\n")  # an empty line ends that of the terminal's ^C
    assert len(error.splitlines()) == 1 and "resuming" in error
    assert checkpoint_of(out)["epoch"] == 1
    assert run("--out", out, "--resume", "--epochs", 3) == 0


def test_divergence_is_status_1(tmp_path, capsys):
    assert run("--out", tmp_path / "run", *QUICK, "--step-size", 1e30, "--num-steps", 20, "--epochs", 1) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "diverged" in error and "step" in error


def test_json_stays_alone_where_the_model_prints(tmp_path):
    """At import, in the function, in forward, and past Python."""
    (tmp_path / "mine.py").write_text(
        "import os\nfrom torch import nn\nprint('import')\n"
        "class Loud(nn.Module):\n    def forward(self, x):\n        print('forward'); return x\n"
        "def make():\n    os.write(1, b'raw\\n')\n"
        "    return nn.Sequential(nn.Sequential(nn.Linear(64, 8), Loud()), nn.Linear(8, 10))\n"
    )
    call = [
        sys.executable,
        "-m",
        "pcfast",
        "train",
        "--model",
        "mine.py:make",
        "--epochs",
        "1",
        "--batch-size",
        "900",
    ]
    done = subprocess.run([*call, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["history"]["seconds"]) == 1
    assert all(word in done.stderr for word in ("import", "forward", "raw"))


def test_a_run_that_fails_first_leaves_an_earlier_run_alone(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("--out", out, "--epochs", 1, *QUICK, "--step-size", 1e30, "--num-steps", 20) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run("--out", tmp_path / "new" / "run", *QUICK, "--step-size", 1e30, "--num-steps", 20) == 1
    assert not (tmp_path / "new").exists()
    error = capsys.readouterr().err
    assert "--step-size" in error and "--method fixed-prediction" in error


def test_two_runs_do_not_write_to_one_folder(tmp_path, capsys):
    with results_folder(tmp_path / "run"):
        assert run("--out", tmp_path / "run", "--epochs", 1, *QUICK) == 2
    assert "no other run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # nothing was written: it is gone again
    assert run("--out", tmp_path / "run", "--epochs", 1, *QUICK) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)


def test_a_fault_of_our_own_is_one_line_too(tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise KeyError("something")

    monkeypatch.setattr(training, "train", broken)
    assert run("--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "KeyError" in error and "PCFAST_TRACEBACK" in error
    monkeypatch.setenv("PCFAST_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("--out", tmp_path / "run")


def process(folder: Path, *arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pcfast", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run(command, cwd=folder, env=environment, timeout=60, **options)


MODEL = (
    "from torch import nn\n"
    "def make(): return nn.Sequential(nn.Sequential(nn.Linear(64, 8), nn.Tanh()), nn.Linear(8, 10))\n"
)
RUNS = "import pathlib\npathlib.Path(__file__).with_name('RAN').touch()\n"


def refused(capsys, out: Path, *words: str) -> None:
    assert run("--out", out, "--resume", "--epochs", 2) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


def test_no_code_of_a_run_folder_runs_unless_the_checkpoint_knows_it(tmp_path, capsys):
    """A model file inside the folder, changed, swapped in config.json, or beside a damaged checkpoint."""
    out = tmp_path / "run"
    out.mkdir()
    file, other = out / "net.py", out / "other.py"
    file.write_text(MODEL)
    assert run("--out", out, "--epochs", 1, "--num-steps", 2, "--model", f"{file}:make") == 0
    other.write_text(RUNS + MODEL)
    config, checkpoint = (out / "config.json").read_text(), (out / "checkpoint.pt").read_bytes()
    capsys.readouterr()

    (out / "config.json").write_text(config.replace("net.py", "other.py"))
    refused(capsys, out, "config.json", "not the checkpoint's", "Remove it")
    (out / "config.json").write_text(config)
    file.write_text(RUNS + MODEL)
    refused(capsys, out, "net.py", "has changed", f"--model {file}:make")
    (out / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    assert run("--out", out, "--resume", "--epochs", 2, "--model", f"{file}:make") == 2
    assert "checkpoint.pt" in capsys.readouterr().err
    assert not (out / "RAN").exists()
    (out / "checkpoint.pt").write_bytes(checkpoint)  # named on the command line it may run
    assert run("--out", out, "--resume", "--epochs", 2, "--model", f"{file}:make") == 0
    assert (out / "RAN").exists()
    assert run("--out", out, "--resume", "--epochs", 3) == 0  # the file that it was resumed with


@pytest.mark.parametrize("change", [
    lambda c: None, lambda c: [], lambda c: "[" * 10**5, lambda c: "\0", lambda c: {**c, "settings": None},
    lambda c: {**c, "kept": [1]}, lambda c: {**c, "kept": {**c["kept"], "lr": "x"}}, lambda c: {"kept": c["kept"]},
    lambda c: {**c, "kept": {**c["kept"], "epochs": "many"}}, lambda c: {**c, "epochs": "many"},
    lambda c: {**c, "kept": {**c["kept"], "widths": [17]}},
])  # fmt: skip
def test_a_config_that_is_not_the_runs_is_named(change, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    changed = change(config_of(out))
    (out / "config.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    capsys.readouterr()
    refused(capsys, out, "--out", "config.json", "Remove it")
    (out / "config.json").unlink()
    assert run("--out", out, "--resume") == 0 and config_of(out)["kept"]["widths"] == [16]


def test_special_files_in_a_run_folder_are_not_waited_for(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("--out", out, "--epochs", 1, *QUICK) == 0
    capsys.readouterr()
    for name in ("config.json", "log.csv", "checkpoint.pt"):
        (out / name).unlink()
        os.mkfifo(out / name)
        refused(capsys, out, name)
        (out / name).unlink()
        (out / name).mkdir()
        refused(capsys, out, name)
        (out / name).rmdir()


def test_output_without_a_reader_costs_no_epoch(tmp_path):
    """status 141 for a pipe, 2 with one line for what is full; a closed one is nobody's."""
    quick = ("train", "--epochs", 2, *QUICK, "--out")
    end, start = os.pipe()
    os.close(end)
    done = process(tmp_path, *quick, "pipe", stdout=start)
    os.close(start)
    assert done.returncode == 141 and len(done.stderr.splitlines()) == 1
    with open("/dev/full", "w") as full:
        done = process(tmp_path, *quick, "full", stdout=full)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
            "error: standard output cannot be"
        )
        done = process(tmp_path, "info", stdout=full)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for extra, status in ((("--json",), 2), ((), 0)):
        line = f'"$0" -m pcfast {" ".join(map(str, quick))} closed {" ".join(extra)} >&-'
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            ["sh", "-c", line, sys.executable], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert [checkpoint_of(tmp_path / name)["epoch"] for name in ("pipe", "full", "closed")] == [2] * 3


def _answers_interrupts():
    """A shell's background job ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_signals_of_the_command(tmp_path):
    """The first one is answered while a long batch lasts, the second one ends it; before it no traceback.

    With eager: Python answers no signal during a call of the CPU kernels, which is the whole batch.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    for first, second in ((signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGINT)):
        command = [sys.executable, "-m", "pcfast", "train", "--backend", "eager", "--num-steps", "1000000"]
        child = subprocess.Popen(
            [*command, "--out", f"run{first}"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=_answers_interrupts,
        )  # fmt: skip
        try:
            while not (tmp_path / f"run{first}").exists():
                assert child.poll() is None
                time.sleep(0.05)
            time.sleep(1)
            child.send_signal(first)
            assert b"once more stops at once" in child.stdout.readline()
            child.send_signal(second)
            said, _ = child.communicate(timeout=30)
            assert child.returncode == 130 and b"Traceback" not in said
        finally:
            child.kill()  # it would train for days


@pytest.mark.parametrize(("option", "value"), [
    ("--epochs", 10**9), ("--num-steps", 10**9), ("--batch-size", 2**31), ("--seed", 2**32),
    ("--widths", f"{2**31 - 1},{2**31 - 1}"), ("--widths", 10**20), ("--lr", "nan"), ("--epochs", "9" * 5000),
])  # fmt: skip
def test_numbers_too_large_are_refused_at_once(option, value, tmp_path, capsys):
    assert run("--out", tmp_path / "run", option, value) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and option in error and not (tmp_path / "run").exists()


def test_a_lack_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory\nframe #0"
        )

    monkeypatch.setattr(training, "train", fails)
    assert run("--out", tmp_path / "run", *QUICK) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "not enough memory" in error and "frame" not in error


MODELS = {  # what stands before `make`, what it returns, and the exit status
    "complex with real outputs": (
        "import torch\nclass Square(nn.Module):\n    def forward(self, z): return (z * z.conj()).real\n",
        "nn.Sequential(nn.Sequential(nn.Linear(64, 8, dtype=torch.complex64)), "
        "nn.Sequential(nn.Linear(8, 10, dtype=torch.complex64), Square()))", 0,
    ),
    "complex outputs": (
        "import torch\n",
        "nn.Sequential(nn.Linear(64, 8, dtype=torch.cfloat), nn.Linear(8, 10, dtype=torch.cfloat))", "are complex",
    ),
    "parametrised": (
        "from torch.nn.utils.parametrizations import spectral_norm\n",
        "nn.Sequential(nn.Sequential(nn.Dropout(0.1), spectral_norm(nn.Linear(64, 8))), nn.Linear(8, 10))", 0,
    ),
    "flat by itself": (
        "class Own(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = nn.Linear(64, 8)\n"
        "    def forward(self, x): return self.inner(x)\n",
        "nn.Sequential(Own(), nn.Linear(8, 10))", "nn.Flatten()",
    ),
    "another process": (
        "import io, os, sys\nsys.path[:] = list(sys.path[1:])\nos.chdir('/')\nsys.stdout = io.StringIO()\n",
        "nn.Sequential(nn.Linear(64, 10), nn.Identity(), nn.Linear(10, 10))", 0,
    ),
    "no words": (
        "class Silent(BaseException):\n    def __str__(self): raise ValueError\ndef stop(): raise Silent\n", "stop()",
        "which raised Silent: no words",
    ),
    "ends in forward": (
        "class Ends(nn.Tanh):\n    def forward(self, x): raise SystemExit(0)\n",
        "nn.Sequential(nn.Sequential(nn.Linear(64, 8), Ends()), nn.Linear(8, 10))", "SystemExit: 0",
    ),
    "ends in training": (
        "class Ends(nn.Tanh):\n"
        "    def forward(self, x):\n        if self.training: raise SystemExit(0)\n        return x\n",
        "nn.Sequential(nn.Sequential(nn.Linear(64, 8), Ends()), nn.Linear(8, 10))", "ended the program",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_whatever_a_model_file_does(kind, tmp_path, capsys, monkeypatch):
    before, made, expected = MODELS[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("net.py").write_text(f"from torch import nn\n{before}def make(): return {made}\n")
    status = run(
        "--model", "net.py:make", "--epochs", 1, "--num-steps", 2, "--batch-size", 300, "--out", "run"
    )
    error = capsys.readouterr().err
    if expected == 0:
        assert status == 0, error
        assert (tmp_path / "run" / "checkpoint.pt").is_file()
    else:
        assert status == 2 and len(error.splitlines()) == 1 and expected in error
    if kind == "complex with real outputs":
        assert all(value.is_complex() for value in checkpoint_of(tmp_path / "run")["model"].values())
