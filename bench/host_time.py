"""What a call costs the host before any tensor work: validating, planning, and finding a recorded graph.

    python -m pcfast.bench.host_time --json .benchmarks/host.json
    python -m pcfast.bench.report --record .benchmarks/host.json    # keep it; the table in docs/architecture.md

Calls are known ones, the second of their kind and later. Times are the host's alone, so that a CPU tells what a GPU's
host would take; steps that replay nothing are timed beside them, against backpropagation by torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import nn

import pcfast
from pcfast.bench.contenders import PreparedStep
from pcfast.bench.measure import ROUNDS, take_turns
from pcfast.bench.runner import new_record
from pcfast.bench.workloads import WORKLOADS
from pcfast.cli import main
from pcfast.cli.options import record_option
from pcfast.cli.output import print_cells
from pcfast.problem.settings import Settings
from pcfast.relaxation import cuda_graphs
from pcfast.relaxation.solve import prepare
from pcfast.support.files import write_json

CPU = torch.device("cpu")
#: Workloads whose calls are timed, by number of layers, and those whose steps are, with backpropagation's.
CALLS = ("mlp_600", "deep_mlp_8", "deep_mlp_32", "deep_mlp_128")
STEPS = ("tiny_exact", "mlp_600_exact")


def calls_of(workload: str) -> dict[str, Callable[[], object]]:
    """Prepare a training step as on a GPU, checks deferred; and with the key of its graph."""
    model, x, y = WORKLOADS[workload].draw(CPU, rows=2)

    def prepared():
        with torch.no_grad():
            return prepare(model, x, y, Settings(check="deferred", backend="eager"))

    return {"prepare": prepared, "prepare and key": lambda: hash(cuda_graphs.graph_key(*prepared()))}


def steps_of(workload: str) -> dict[str, Callable[[], object]]:
    """A training step without the optimiser's, by ``auto``; and torch's, by backpropagation."""
    named = WORKLOADS[workload]
    model, x, y = named.draw(CPU)

    def stepped(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            loss().backward()

        return step

    return {
        "pcfast": stepped(lambda: pcfast.pc_loss(model, x, y, method=named.method)),
        "backpropagation": stepped(lambda: F.cross_entropy(model(x), y)),
    }


def _seconds(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Medians of rounds in turns."""
    steps = [(name, PreparedStep(function, list, lambda: None)) for name, function in functions.items()]
    return {
        name: times.median for name, times in take_turns(steps, "ieee", CPU, ROUNDS, lambda: False).items()
    }


def run() -> dict:
    """A record: ``host`` has a row a workload."""
    record = new_record(CPU, quick=False)
    rows = []
    for kind, workloads in ((calls_of, CALLS), (steps_of, STEPS)):
        for workload in workloads:
            layers = sum(isinstance(module, nn.Linear) for module in WORKLOADS[workload].make().modules())
            rows.append({"workload": workload, "layers": layers, "seconds": _seconds(kind(workload))})
    return {**record, "host": rows, "complete": True}


def cells(record: dict) -> list[list[str]]:
    """The table: heading, then a row a workload; of calls with the times that an earlier commit took, if recorded."""
    before = {row["workload"]: row["seconds"] for row in record.get("before", {}).get("host", ())}
    heading = ["call", "layers", "time", "before", "backpropagation", "of backpropagation"]
    result = [heading]
    for row in record["host"]:
        seconds, other = row["seconds"], row["seconds"].get("backpropagation")
        for name, value in seconds.items():
            if name == "backpropagation":
                continue
            earlier = before.get(row["workload"], {}).get(name)
            result.append(
                [
                    f"{row['workload']}: {'pc_loss and backward' if name == 'pcfast' else name}",
                    str(row["layers"]),
                    _micro(value),
                    "" if earlier is None else _micro(earlier),
                    "" if other is None else _micro(other),
                    "" if other is None else f"{value / other:.2f}x",
                ]
            )
    return result


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} us"


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--before",
    type=click.Path(exists=True, path_type=Path),
    help="This program's record of an earlier commit.",
)
@record_option
def host_time(before: Path | None, path: Path | None) -> None:
    torch.set_num_threads(1)
    record = run()
    if before is not None:
        earlier = json.loads(before.read_text())
        record["before"] = {name: earlier[name] for name in ("commit", "host")}
    print_cells("Host time", cells(record))
    if path is not None:
        write_json(path, record)


if __name__ == "__main__":
    sys.exit(main(command=host_time, name="python -m pcfast.bench.host_time"))
