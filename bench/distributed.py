"""Updates on several processes against one's, and the collectives of a step: DDP, FSDP2, torch.compile.

    python -m pcfast.bench.distributed --json .benchmarks/distributed.json
    python -m pcfast.bench.report --record .benchmarks/distributed.json    # keep it; the tables in docs/scaling.md

In float64 on CPUs over gloo; nccl runs the same code. Every process has its rows of one batch, whose number no number
of processes divides; several steps of an optimiser follow each other, and the worst difference of them counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pcfast
from pcfast import networks, training
from pcfast.bench.runner import new_record
from pcfast.cli import main
from pcfast.cli.options import record_option
from pcfast.cli.output import print_cells
from pcfast.problem.nudging import Nudging
from pcfast.problem.plan import METHODS, TRAINING_METHODS
from pcfast.support.files import write_json

SIZES = (1, 2, 3, 4)
ROWS, STEPS, LR = 13, 4, 0.2
RELAXATION = {"step_size": 0.1, "num_steps": 6}
#: What a row of the table relaxes by: name -> settings of PredictiveCoding.
ENTRIES: dict[str, dict] = {method: {"method": method} for method in METHODS} | {
    "strict, Adam on beliefs": {"belief_optimizer": pcfast.Adam(), "step_size": 0.01},
    "strict, centred nudging": {"loss": "mse", "nudging": Nudging("centred", 0.2)},
}
#: ``pcfast train`` wraps for itself, and adds up the updates of incremental too.
TRAIN = "pcfast train"
Step = Callable[[Tensor, Tensor], None]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return networks.mlp((16, 24, 24, 10), nn.Tanh).double()


def batch(loss: str | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(ROWS, 16, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 10, (ROWS,), generator=generator)
    return x, nn.functional.one_hot(y, 10).double() if loss == "mse" else y


def _ddp(pc: pcfast.PredictiveCoding, **options) -> DistributedDataParallel:
    return DistributedDataParallel(pc, gradient_as_bucket_view=True, **options)


def _stepped(module: nn.Module) -> Step:
    """Torch averages over the processes: times their number is the sum."""
    return lambda x, y: (dist.get_world_size() * module(x, y)).backward()


def _accumulated(pc: pcfast.PredictiveCoding) -> Step:
    """Two micro-batches, and one all-reduce for both."""
    ddp = _ddp(pc)
    step = _stepped(ddp)

    def both(x: Tensor, y: Tensor) -> None:
        with ddp.no_sync():
            step(x[:1], y[:1])
        step(x[1:], y[1:])

    return both


def _sharded(pc: pcfast.PredictiveCoding, *, layers: bool) -> Step:
    for layer in pc.model if layers else ():
        fully_shard(layer)
    fully_shard(pc)
    return _stepped(pc)


#: What PredictiveCoding is wrapped in: name -> what makes a training step of it.
WRAPPERS: dict[str, Callable[[pcfast.PredictiveCoding], Step]] = {
    "DDP": lambda pc: _stepped(_ddp(pc)),
    "DDP, static_graph": lambda pc: _stepped(_ddp(pc, static_graph=True)),
    "DDP, no_sync": _accumulated,
    "DDP, torch.compile": lambda pc: _stepped(torch.compile(_ddp(pc), backend="aot_eager")),
    "FSDP2": partial(_sharded, layers=False),
    "FSDP2 by layer": partial(_sharded, layers=True),
}


class Collectives(TorchDispatchMode):
    """Collectives that start while it is active: name -> [how often, bytes of the whole tensors]."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            count = self.counts.setdefault(function._schema.name.removeprefix("c10d::").strip("_"), [0, 0])
            count[0] += 1
            count[1] += max(sizes, default=0)  # of gather and scatter the larger side
        return function(*args, **(kwargs or {}))


def updates(entry: str, wrapper: str | None) -> tuple[list[list[Tensor]], dict[str, list[int]]]:
    """The parameters' updates in every step, whole on every process, and the last step's collectives.

    ``wrapper`` None: one process with the whole batch.
    """
    pc = pcfast.PredictiveCoding(network(), **{**RELAXATION, **ENTRIES[entry]})
    x, y = batch(ENTRIES[entry].get("loss"))
    if wrapper is None:
        step = lambda x, y: pc(x, y).backward()  # noqa: E731
    else:
        pc.normalizer = ROWS
        step = WRAPPERS[wrapper](pc)
        x, y = (part[dist.get_rank() :: dist.get_world_size()] for part in (x, y))
    optimizer = torch.optim.SGD(pc.parameters(), lr=LR)
    result = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with Collectives() as collectives:
            step(x, y)
        result.append([_whole(parameter.grad).clone() for parameter in pc.parameters()])
        optimizer.step()
    return result, collectives.counts


def trained(method: str, group: dist.ProcessGroup | None) -> list[list[Tensor]]:
    """How far ``pcfast train`` has moved the parameters after two epochs with an uneven last batch."""
    model = network()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = batch()
    training.train(
        model, (x, y, x, y), method=method, epochs=2, batch_size=ROWS // 2, progress=False, process_group=group,
        optimizer=partial(torch.optim.SGD, lr=LR), **RELAXATION,
    )  # fmt: skip
    return [[p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(result: list[list[Tensor]], truth: list[list[Tensor]]) -> float:
    """The worst parameter's in the worst step, by the norm of its update."""
    pairs = (pair for r, t in zip(result, truth, strict=True) for pair in zip(r, t, strict=True))
    return max(float((r - t).norm() / t.norm()) for r, t in pairs)


def rows_of(entries=tuple(ENTRIES), wrappers=tuple(WRAPPERS)) -> list[dict]:
    """In a process group: a row an entry and wrapper; the same on every process."""

    def row(entry: str, wrapper: str, result, truth, counts) -> dict:
        worst = torch.tensor(difference(result, truth), dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        named = {"entry": entry, "wrapper": wrapper, "processes": dist.get_world_size()}
        return {**named, "difference": worst.item(), "collectives": counts}

    rows = []
    for entry in entries:
        truth, _ = updates(entry, None)
        for wrapper in wrappers:
            torch.compiler.reset()
            result, counts = updates(entry, wrapper)
            rows.append(row(entry, wrapper, result, truth, counts))
    for method in TRAINING_METHODS:
        rows.append(row(method, TRAIN, trained(method, dist.group.WORLD), trained(method, None), {}))
    return rows


def _process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    rows = rows_of()
    if rank == 0:
        write_json(Path(folder) / "rows.json", rows)
    dist.destroy_process_group()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def run() -> dict:
    """A record: ``distributed`` has a row an entry, wrapper and number of processes."""
    rows = []
    for size in SIZES:
        with _folder() as folder:
            torch.multiprocessing.spawn(_process, args=(size, str(folder)), nprocs=size)
            rows += json.loads((folder / "rows.json").read_text())
    return {**new_record(torch.device("cpu"), quick=False), "distributed": rows, "complete": True}


def difference_cells(record: dict) -> list[list[str]]:
    """The table of updates: heading, then a row an entry with the worst wrapper's difference by processes."""
    rows = record["distributed"]
    sizes = sorted({row["processes"] for row in rows})
    result = [["method", *(f"{size} process{'es' if size > 1 else ''}" for size in sizes)]]
    for entry in dict.fromkeys(row["entry"] for row in rows):
        worst = (
            max(r["difference"] for r in rows if (r["entry"], r["processes"]) == (entry, size))
            for size in sizes
        )
        result.append([entry, *(f"{value:.0e}" for value in worst)])
    return result


def collective_cells(record: dict) -> list[list[str]]:
    """The table of wrappers: heading, then a row a wrapper with the worst difference and a step's collectives."""
    rows = record["distributed"]
    most = max(row["processes"] for row in rows)
    result = [["in", "worst difference", f"collectives of a step on {most} processes", "bytes"]]
    for wrapper in dict.fromkeys(row["wrapper"] for row in rows):
        own = [row for row in rows if row["wrapper"] == wrapper]
        counts = next(row["collectives"] for row in own if row["processes"] == most)
        named = (f"{count} {name}" for name, (count, _) in counts.items())
        total = sum(size for _, size in counts.values())
        worst = max(row["difference"] for row in own)
        result.append([wrapper, f"{worst:.0e}", ", ".join(named), f"{total:,}" if counts else ""])
    return result


@click.command(help=__doc__.partition("\n")[0])
@record_option
def distributed(path: Path | None) -> None:
    record = run()
    print_cells("Updates against one process's", difference_cells(record))
    print_cells("Wrappers", collective_cells(record))
    if path is not None:
        write_json(path, record)


if __name__ == "__main__":
    sys.exit(main(command=distributed, name="python -m pcfast.bench.distributed"))
