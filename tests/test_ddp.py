"""DistributedDataParallel over two processes against one process with the full batch.

PredictiveCoding's docstring gives the recipes. Rosenbaum's strict relaxation is not linear in the loss's scale,
so a shard must be relaxed at the full batch's scale, and DDP's average over processes must be undone.
"""

from __future__ import annotations

import datetime
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pcfast

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

WORLD = 2
ROWS = 8
STEPS = {"step_size": 0.2, "num_steps": 7}
LEARNING_RATE, UPDATES = 0.1, 3
METHODS = ("exact", "fixed_prediction", "strict")

_SUM = nn.CrossEntropyLoss(reduction="sum")
#: name -> (settings of PredictiveCoding, factor of the returned loss)
RECIPES = {f"sum, {method}": ({"loss": _SUM, "method": method}, WORLD) for method in METHODS}
RECIPES |= {f"mean, {method}": ({"method": method}, 1) for method in METHODS[:2]}
RECIPES |= {
    f"mean with normalizer, {method}": ({"method": method, "normalizer": ROWS}, WORLD) for method in METHODS
}
PLAIN_MEAN_STRICT = "mean, strict"
CASES = {**RECIPES, PLAIN_MEAN_STRICT: ({"method": "strict"}, 1)}


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.ReLU()),
        nn.Linear(7, 4),
    ).double()


def full_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 4, (ROWS,), generator=generator)


def first_update_and_trained(module: nn.Module, model: nn.Module, x, y, factor: float):
    """Gradients of the first update, and the parameters after a few SGD steps."""
    optimiser = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    first = None
    for _ in range(UPDATES):
        optimiser.zero_grad()
        (factor * module(x, y)).backward()
        first = first or [parameter.grad.clone() for parameter in model.parameters()]
        optimiser.step()
    return first, [parameter.detach().clone() for parameter in model.parameters()]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no host name to resolve, no port to clash
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    x, y = (part.chunk(WORLD)[rank] for part in full_batch())
    results = {}
    for name, (settings, factor) in CASES.items():
        module = pcfast.PredictiveCoding(network(), **STEPS, **settings)
        parallel = nn.parallel.DistributedDataParallel(module)
        results[name] = first_update_and_trained(parallel, module.model, x, y, factor)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> list[dict]:
    """Each process's results of all cases."""
    folder = str(tmp_path_factory.mktemp("ddp"))
    torch.multiprocessing.spawn(process, args=(folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


def single(name: str):
    settings = {key: value for key, value in CASES[name][0].items() if key != "normalizer"}
    module = pcfast.PredictiveCoding(network(), **STEPS, **settings)
    return first_update_and_trained(module, module.model, *full_batch(), 1)


def distance(result: list, truth: list) -> float:
    return max(float((f - t).norm() / t.norm()) for f, t in zip(result, truth, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_processes_equal_the_full_batch(name, distributed):
    gradients, trained = single(name)
    for rank in range(WORLD):
        result, weights = distributed[rank][name]
        assert distance(result, gradients) < 1e-12
        assert distance(weights, trained) < 1e-12


def test_strict_with_a_plain_mean_differs(distributed):
    gradients, _ = single(PLAIN_MEAN_STRICT)
    result, _ = distributed[0][PLAIN_MEAN_STRICT]
    assert distance(result, gradients) > 1e-3


def test_processes_stay_together(distributed):
    one, two = distributed
    for name in CASES:
        assert all(map(torch.equal, one[name][1], two[name][1])), name
