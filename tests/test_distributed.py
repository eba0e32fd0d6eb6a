"""Training on several processes: updates, checkpoints and failures are those of one process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import command, in_group, on_processes
from torch import nn

import pcfast
from pcfast import networks, presets
from pcfast.cli import main
from pcfast.datasets import Data
from pcfast.errors import ArgumentError
from pcfast.losses import half_squared_error
from pcfast.problem.plan import TRAINING_METHODS
from pcfast.training import train

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

ROWS = 17  # batches of 8, 8 and 1: the last has fewer rows than processes
STEPS = {"step_size": 0.2, "num_steps": 5}
RECONSTRUCTS = {
    "task": "reconstruct", "loss": half_squared_error, "reduction": "sum_beliefs_mean_weights",
    "node_precision": {"z": 0.5, "x": 2.0},
}  # fmt: skip
#: name -> settings of train, and the network where it is not ``network()``
CASES = {method: {"method": method} for method in TRAINING_METHODS}
CASES |= {
    "a sum loss": {"loss": nn.CrossEntropyLoss(reduction="sum")},
    "a mean of beliefs": {"loss": half_squared_error, "reduction": "mean", "num_steps": 4},
    "a mean of weights, iPC": {
        "loss": half_squared_error, "reduction": "sum_beliefs_mean_weights", "method": "incremental"
    },
    "a preset": {**presets.jpc(step_size=0.5, num_steps=4, loss="mse")},
    "nudging by epoch": {"loss": "mse", "nudging": pcfast.Nudging("centred", beta=0.2), "nudging_growth": 0.1},
    "no last batch": {"drop_last": True},
    "parts that do not learn": {"partly": True},
    "parts that do not learn, iPC": {"partly": True, "method": "incremental"},
    "errors that do not reach layer 1": {"num_steps": 1},
    "a precision a layer": {"node_precision": [1.0, 2.0, 0.5]},
    "a graph": {"network": "residual"},
    "a graph, iPC": {"network": "residual", "method": "incremental", "update_scale": 0.1},
    "latent variables": {"network": "decoder", **RECONSTRUCTS},
    "latent variables and classes": {"network": "conditional decoder", "method": "error_based", **RECONSTRUCTS},
}  # fmt: skip


def network(*, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout)),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, 4),
    ).double()


def graph(name: str) -> pcfast.Graph:
    torch.manual_seed(3)
    if name == "residual":
        return networks.residual_mlp([5, 8, 8, 4]).double()
    return networks.decoder(3, [8, 4], nn.Tanh, classes=5 if name == "conditional decoder" else 0).double()


class Spare(nn.Module):
    """Has a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return x.sin()  # which pcfast does not know


def partly_trained() -> nn.Sequential:
    """With parameters that are not used, frozen, and used twice, and a frozen BatchNorm."""
    model = network()
    same = nn.Linear(7, 7).double()
    model[1].append(Spare())
    model[1].append(nn.BatchNorm1d(7).double().eval())
    model[0][0].bias.requires_grad_(False)
    model.insert(2, nn.Sequential(same, nn.Tanh()))
    model.insert(3, nn.Sequential(same, nn.Tanh()))
    return model


def rows(settings: dict) -> Data:
    x = torch.randn(2 * ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y = torch.arange(2 * ROWS) % 4
    if settings.get("loss", "cross_entropy") in ("mse", F.mse_loss, half_squared_error) or "jpc" in str(
        settings
    ):
        y = F.one_hot(y, 4).double()
    return Data(x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:])


def trained(settings: dict, group=None) -> tuple[list[torch.Tensor], dict]:
    settings = {"epochs": 2, "batch_size": 8, "progress": False, **STEPS, **settings}
    model = partly_trained() if settings.pop("partly", False) else network()
    if "network" in settings:
        model = graph(settings.pop("network"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5, weight_decay=0.1)
    history = train(model, rows(settings), optimizer=optimizer, process_group=group, **settings)
    measured = {name: values for name, values in vars(history).items() if name != "seconds"}
    return [parameter.detach() for parameter in model.parameters()], measured


def all_cases() -> dict:
    return {name: trained(settings, dist.group.WORLD) for name, settings in CASES.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_learn_what_one_learns(size):
    every = on_processes(in_group, size, all_cases)
    for name, settings in CASES.items():
        weights, history = trained(settings)
        for rank in range(size):
            result, measured = every[rank][name]
            assert all(map(torch.equal, result, every[0][name][0])), (name, rank)
            worst = max(float((r - w).norm() / w.norm()) for r, w in zip(result, weights, strict=True))
            assert worst < 1e-12, (name, rank, worst)
            for column, values in history.items():
                assert measured[column] == pytest.approx(values, rel=1e-10, nan_ok=True), (name, column)


def resumed(folder: str, sizes: list[int], epochs: list[int], dropout: float) -> list[torch.Tensor]:
    """The weights of a run whose parts ran on ``sizes`` processes, each as far as its number of epochs."""
    for size, last in zip(sizes, epochs, strict=True):
        weights = on_processes(in_group, size, part, folder, last, last != epochs[0], dropout)[0]
    return weights


def part(folder: str, epochs: int, resume: bool, dropout: float) -> list[torch.Tensor]:
    model = network(dropout=dropout)
    group = dist.group.WORLD
    settings = {
        "epochs": epochs,
        "batch_size": 8,
        "progress": False,
        "out": folder,
        "resume": resume,
        **STEPS,
    }
    train(model, rows({}), process_group=group, **settings)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(("sizes", "dropout"), [([2, 2], 0.5), ([2, 3], 0.0)])
def test_a_run_is_resumed_on_as_many_or_on_others(sizes, dropout, tmp_path):
    parts = resumed(f"{tmp_path}/parts", sizes, [1, 3], dropout)
    whole = resumed(f"{tmp_path}/whole", [sizes[0]], [3], dropout)
    if sizes == [2, 2]:
        assert all(map(torch.equal, parts, whole))
    else:
        for p, w in zip(parts, whole, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-12, atol=0)
    model = network(dropout=dropout)  # and in one process
    train(
        model, rows({}), epochs=4, batch_size=8, progress=False, out=tmp_path / "parts", resume=True, **STEPS
    )


def masks() -> torch.Tensor:
    """What dropout drew for this process's rows of the first batch."""
    seen = []
    model = network(dropout=0.5)
    model[0][2].register_forward_hook(lambda module, inputs, output: seen.append(output.detach() == 0))
    settings = {"epochs": 1, "batch_size": 16, "drop_last": True, "progress": False, **STEPS}
    train(model, rows({}), process_group=dist.group.WORLD, **settings)
    return next(mask for mask in seen if mask.any())


def test_dropout_differs_between_processes():
    one, two = on_processes(in_group, 2, masks)
    assert one.shape == two.shape and not torch.equal(one, two)


def refused() -> list[str]:
    said = []
    for settings in ({"loss": lambda output, y: F.cross_entropy(output, y)}, {"batch_size": 1}):
        with pytest.raises(ArgumentError) as error:
            trained(settings, dist.group.WORLD)
        said.append(str(error.value))
    with pytest.raises(ArgumentError) as error:
        trained({}, "gloo")
    return [*said, str(error.value)]


def test_what_cannot_be_divided_is_refused():
    for loss, batch, group in on_processes(in_group, 2, refused):
        assert "reduction = 'sum'" in loss and "1 rows on 2 processes" in batch and "process_group" in group


#: --model files: what goes wrong -> (module, options)
MODELS = {
    "weights": "torch.manual_seed(int(os.environ['RANK']))",
    "shapes": "width += int(os.environ['RANK'])",
    "backend": "os.environ['RANK'] == '1' and pcfast.backends.BACKENDS.pop('eager')",
    "batchnorm": "layers = [nn.BatchNorm1d(8)]",
    "syncbatchnorm": "layers = [nn.SyncBatchNorm(8)]",
    "raises": "layers = [Dies(lambda: 1 / 0)]",
    "killed": "layers = [Dies(lambda: os.kill(os.getpid(), 9))]",
    "diverges": "layers = [Dies(lambda: float('inf'))]",
}
MODEL_FILE = """
import os, torch, pcfast
from torch import nn

class Dies(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x):
        self.calls += torch.is_grad_enabled() or self.training
        if os.environ["RANK"] == "1" and self.calls > 40:
            x = x * self.how()
        return x

def make():
    width, layers = 8, []
    {line}
    return nn.Sequential(nn.Sequential(nn.Linear(64, width), *layers), nn.Linear(width, 10))
"""


def ended(tmp_path, name: str, *options: object) -> tuple[list[tuple[int, str, str]], list[str], float]:
    """Statuses and output of two processes of ``pcfast train``, the lines on standard error, and the seconds."""
    (tmp_path / "mynet.py").write_text(MODEL_FILE.format(line=MODELS[name]))
    start = time.monotonic()
    given = ("--epochs", 2, "--batch-size", 64, "--num-steps", 3, "--out", tmp_path / "run", *options)
    answers = on_processes(command, 2, "train", "--model", f"{tmp_path}/mynet.py:make", *given)
    lines = [line for answer in answers if answer for line in answer[2].splitlines()]
    return answers, lines, time.monotonic() - start


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("weights", (), ["model 0.0.weight", "rank 1", "rank 0"]),
        ("shapes", (), ["network.0", "on rank 1"]),
        ("backend", ("--backend", "eager"), ["rank 1", "eager"]),
        ("batchnorm", (), ["BatchNorm1d at 0.1", "2 processes", "LayerNorm or GroupNorm", "eval mode"]),
        ("syncbatchnorm", (), ["SyncBatchNorm at 0.1", "LayerNorm or GroupNorm"]),
        ("weights", ("--batch-size", 1), ["--batch-size", "1 rows on 2 processes"]),
        ("weights", ("--device", "cuda:7"), ["--device", "cuda:7"]),
        ("weights", ("--resume",), ["--out", "no run at"]),
    ],
)
def test_bad_input_is_one_line_of_rank_0(name, options, words, tmp_path):
    answers, lines, _ = ended(tmp_path, name, *options)
    assert [answer[0] for answer in answers] == [2, 2], answers
    assert len(lines) == 1 and answers[0][2] and all(word in lines[0] for word in words), lines
    assert not (tmp_path / "run").exists()


def left_running(*arguments: object) -> tuple[int, list[str]]:
    """The exit status of a command, and its process groups' threads that are there still."""
    status, *_ = command(*arguments)
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return status, [name for name in names if "gloo" in name]


def test_no_thread_outlives_a_command(tmp_path):
    """One that does may abort the interpreter as it ends, which has another exit status then."""
    given = ("train", "--batch-size", 1, "--out", tmp_path / "run")
    assert on_processes(left_running, 2, *given) == [(2, []), (2, [])]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", ["rank 1", "ZeroDivisionError"]),
        ("diverges", ["rank 1", "not finite"]),
        ("killed", ["rank 0", "another process", "killed"]),
    ],
)
def test_a_process_that_dies_ends_all_with_its_reason(name, words, tmp_path):
    answers, lines, seconds = ended(tmp_path, name, "--backend", "eager")
    assert answers[0][0] == 1 and (answers[1] is None if name == "killed" else answers[1][0] == 1)
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert seconds < 30


def test_compare_shares_out_the_methods(tmp_path):
    options = ("--widths", 12, "--num-steps", 3, "--batch-size", 300, "--epochs", 1, "--iterations", "1,2")
    methods = ("--method", "strict", "--method", "fixed_prediction", "--method", "exact")
    given = ("compare", *options, *methods, "--out")
    answers = on_processes(command, 2, *given, tmp_path / "two")
    one = on_processes(command, 1, *given, tmp_path / "one")
    assert [status for status, *_ in (*answers, *one)] == [0, 0, 0], answers
    assert answers[1][1] == "" and answers[0][1].replace("two", "one") == one[0][1]
    for name in ("training.csv", "updates.csv", "iterations.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    (status, _, said), (other, *_, silent) = on_processes(command, 2, "compare", "--step-size", -1)
    assert (status, other) == (2, 2) and "--step-size" in said and silent == ""


def test_a_decoder_is_trained_and_drawn_from_once(tmp_path):
    given = ("--widths", 12, "--latent", 3, "--num-steps", 4, "--batch-size", 100, "--epochs", 1, "--out")
    answers = on_processes(command, 2, "train", "--task", "generate", *given, tmp_path / "two")
    (one,) = on_processes(command, 1, "train", "--task", "generate", *given, tmp_path / "one")
    assert [status for status, *_ in answers] == [0, 0] and answers[1][1] == "", answers
    assert answers[0][1].splitlines()[-1] == one[1].splitlines()[-1]  # R^2
    assert (tmp_path / "two" / "samples.png").read_bytes()[:4] == b"\x89PNG"


def wrong_sums(*arguments: object) -> tuple[int, str, str]:
    from pcfast.bench import workers

    right = workers._step
    workers._step = lambda ddp, x, y: right(ddp, 2 * x, y)
    return command(*arguments)


def test_bench_times_steps_of_all_processes(tmp_path, capsys):
    given = ("bench", "mlp_128", "tiny_exact", "--workers", "--quick", "--json", tmp_path / "record.json")
    (status, said, _), (other, silent, _) = on_processes(command, 2, *given)
    assert (status, other) == (0, 0) and "mlp_128, ieee, 2 processes" in said and silent == ""
    first, _ = json.loads((tmp_path / "record.json").read_text())["workers"]
    assert (first["processes"], first["rows"], first["all_reduces"]) == (2, 128, 1)
    assert first["bytes"] == 4 * (784 * 128 + 128 * 128 + 128 * 10 + 128 + 128 + 10)
    assert first["seconds"] > 0 < first["alone_seconds"]
    closed = on_processes(wrong_sums, 2, "bench", "tiny_exact", "--workers", "--quick")
    assert [status for status, *_ in closed] == [1, 1] and "gate closed" in closed[0][1]
    assert main(["bench", "--workers"]) == 2 and "torchrun" in capsys.readouterr().err
    for alone in (("bench", "--quick"), ("diagnose",)):
        (status, _, said), (other, _, silent) = on_processes(command, 2, *alone)
        assert (status, other) == (2, 2) and f"2 processes of pcfast {alone[0]}" in said and silent == ""
