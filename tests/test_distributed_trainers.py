"""The programs of docs/trainers.md on two processes: the weights of one."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
import torch.distributed as dist
from pages import names_of
from processes import in_group, on_processes
from torch import nn
from torch.utils.data import TensorDataset

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

BATCH, ROWS = 8, 36  # the last four rows of an epoch are left out


def needs(library: str):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f'{library} is not installed (pip install "pcfast[trainers]")')


#: Which the libraries give of themselves.
THEIR_WARNINGS = "Detected an existing checkpoint|.*LeafSpec.* is deprecated"


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, 4),
    )
    return nn.Sequential(*layers).double()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return x, torch.arange(ROWS) % 4


def trained(heading: str, **options) -> list[torch.Tensor]:
    """The weights after the page's ``train``."""
    model = network()
    warnings.filterwarnings("ignore", THEIR_WARNINGS)
    names_of("trainers.md", heading)["train"](
        model, TensorDataset(*rows()), batch_size=BATCH, epochs=2, **options
    )
    return [parameter.detach().clone() for parameter in model.parameters()]


def lightning(devices: int) -> list[torch.Tensor]:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return trained("Lightning", devices=devices, accelerator="cpu", **quiet)


def accelerate() -> list[torch.Tensor]:
    return trained("Accelerate", cpu=True)


def assert_the_same(one: list[list[torch.Tensor]], two: list[list[torch.Tensor]]) -> None:
    start = [parameter.detach() for parameter in network().parameters()]
    assert not any(map(torch.equal, one[0], start))
    for weights in two:
        for result, truth in zip(weights, one[0], strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-14)


def test_plain_loop():
    one, two = (on_processes(in_group, size, trained, "Plain loop") for size in (1, 2))
    assert_the_same(one, two)


@needs("lightning")
def test_lightning():
    one, two = (on_processes(lightning, size, size) for size in (1, 2))
    assert_the_same(one, two)


@needs("accelerate")
def test_accelerate():
    one, two = (on_processes(accelerate, size) for size in (1, 2))
    assert_the_same(one, two)


def sharded(steps: int, folder: str | None, resume: bool) -> list[torch.Tensor]:
    warnings.filterwarnings("ignore", THEIR_WARNINGS)
    names = names_of("trainers.md", "FSDP2")
    settings = {"batch_size": BATCH, "steps": steps, "folder": folder, "resume": resume}
    pc = names["train"](network(), *rows(), **settings)
    return [parameter.full_tensor().detach() for parameter in pc.parameters()]


def test_fsdp2_and_its_checkpoint_on_others(tmp_path):
    one, two = (on_processes(in_group, size, sharded, 3, f"{tmp_path}/{size}", False) for size in (1, 2))
    assert_the_same(one, two)
    other = on_processes(
        in_group, 1, sharded, 2, f"{tmp_path}/2", True
    )  # what two have written, and the reverse
    again = on_processes(in_group, 2, sharded, 2, f"{tmp_path}/1", True)
    assert_the_same(other, again)
    assert not torch.equal(other[0][0], one[0][0])


@needs("optuna")
def test_optuna():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    x, y = rows()
    data = (x[:28], y[:28], x[28:], y[28:])
    names = names_of("trainers.md", "Optuna")
    study = names["search"](network, data, trials=12, epochs=2, batch_size=BATCH, largest=8.0)
    pruned = [t for t in study.trials if t.state == optuna.trial.TrialState.PRUNED]
    finished = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert pruned and finished and len(pruned) + len(finished) == 12
    assert all(value <= 1 for t in finished for value in t.intermediate_values.values())
    assert min(t.params["step_size"] for t in pruned) > study.best_params["step_size"]
