"""PredictiveCoding in DDP, FSDP2 and torch.compile on several processes; docs/scaling.md against them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from processes import in_group, on_processes
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pcfast
from pcfast.bench import distributed, report, scaling
from pcfast.bench.workloads import WORKLOADS
from pcfast.problem.plan import TRAINING_METHODS
from pcfast.relaxation import cuda_graphs
from pcfast.support import host

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

RECORD = {"machine": {"processor": "P", "threads": 1, "python": "3", "torch": "2"}, "recorded": "2026-11-30"}


def test_updates_are_those_of_one_process():
    entries = ("exact", "strict", "error_based", "strict, centred nudging")
    (rows, again) = on_processes(in_group, 2, distributed.rows_of, entries, limit=120)
    assert rows == again
    cases = {(row["entry"], row["wrapper"]) for row in rows}
    assert cases == {(e, w) for e in entries for w in distributed.WRAPPERS} | {
        (method, distributed.TRAIN) for method in TRAINING_METHODS
    }
    assert max(row["difference"] for row in rows) < 1e-12
    size = scaling.payload_bytes(distributed.network()) * 2  # in float64
    for row in rows:
        if row["wrapper"].startswith("DDP"):
            assert row["collectives"] == {"allreduce": [1, size]}, row
    made = distributed.collective_cells({"distributed": rows})
    assert made[0][2] == "collectives of a step on 2 processes" and [
        "1 allreduce" in row[2] for row in made
    ].count(1)


def test_the_comparison_sees_a_missing_normalizer():
    (worst,) = set(on_processes(in_group, 2, unnormalised))
    assert worst > 1e-3


def unnormalised() -> float:
    ddp = distributed.WRAPPERS["DDP"]

    def without(pc):
        pc.normalizer = None
        return ddp(pc)

    distributed.WRAPPERS["without"] = without
    return max(
        row["difference"]
        for row in distributed.rows_of(["strict"], ["without"])
        if row["wrapper"] == "without"
    )


def mixed(by_layer: bool) -> float:
    """The distance of FSDP2's updates in bfloat16 from those of one process in float32."""
    truth, _ = distributed.updates("strict", None)
    pc = pcfast.PredictiveCoding(distributed.network().float(), **distributed.RELAXATION)
    pc.normalizer = distributed.ROWS
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in pc.model if by_layer else ():
        fully_shard(layer, mp_policy=policy)
    fully_shard(pc, mp_policy=policy)
    x, y = (part[dist.get_rank() :: dist.get_world_size()] for part in distributed.batch())
    (dist.get_world_size() * pc(x.float(), y)).backward()
    result = [parameter.grad.full_tensor().double() for parameter in pc.parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in pc.parameters())
    return distributed.difference([result], truth[:1])


@pytest.mark.parametrize("by_layer", [False, True])
def test_fsdp_in_mixed_precision(by_layer):
    for distance in on_processes(in_group, 2, mixed, by_layer):
        assert 1e-5 < distance < 0.05  # bfloat16 has 8 bits


TOLERANCE = {"tolerance": 1e-4, "num_steps": 40, "normalizer": distributed.ROWS}


def ended_early(wrapper: str | None, as_on_cuda: bool = False) -> tuple[list[torch.Tensor], int]:
    """Updates with a tolerance, and how many iterations the rows of this process run by themselves."""
    pc = pcfast.PredictiveCoding(distributed.network(), **TOLERANCE)
    x, y = distributed.batch()
    if wrapper:
        x, y = (part[dist.get_rank() :: dist.get_world_size()] for part in (x, y))
        if as_on_cuda:  # where the host cannot leave the loop
            host.readable, cuda_graphs.ineligible_reason = lambda device: False, cuda_graphs._refusal
        distributed.WRAPPERS[wrapper](pc)(x, y)
        assert not as_on_cuda or "processes decide" in pcfast.last_run().not_replayed_because
    else:
        pc(x, y).backward()
    alone = pcfast.relax(pc.model, x, y, backend="reference", **TOLERANCE).iterations
    return [parameter.grad.clone() for parameter in pc.parameters()], int(alone)


@pytest.mark.parametrize(
    ("wrapper", "as_on_cuda"), [("DDP", False), ("DDP", True), ("DDP, torch.compile", False)]
)
def test_processes_end_a_relaxation_together(wrapper, as_on_cuda):
    truth, whole = ended_early(None)
    every = on_processes(in_group, 2, ended_early, wrapper, as_on_cuda)
    assert len({whole, *(alone for _, alone in every)}) == 3 and whole < TOLERANCE["num_steps"]
    for updates, _ in every:
        assert distributed.difference([updates], [truth]) < 1e-12


def refused() -> list[str]:
    said = []
    model = distributed.network()
    x, y = distributed.batch()
    sharded = fully_shard(pcfast.PredictiveCoding(distributed.network(), tolerance=0.1))
    for call in (
        lambda: pcfast.pc_loss(DistributedDataParallel(model), x, y),
        lambda: pcfast.PredictiveCoding(nn.Sequential(DistributedDataParallel(model[0]), model[1])),
        lambda: pcfast.PredictiveCoding(model, method="incremental"),
        lambda: sharded(x, y),
    ):
        with pytest.raises(pcfast.ArgumentError) as error:
            call()
        said.append(str(error.value))
    return said


def test_what_cannot_be_wrapped_is_refused():
    for whole, part, incremental, tolerance in on_processes(in_group, 2, refused):
        assert "DistributedDataParallel(pcfast.PredictiveCoding(model, ...))" in whole
        assert "DistributedDataParallel" in part
        assert "incremental_step" in incremental
        assert "fully_shard" in tolerance and "DistributedDataParallel" in tolerance


def measured(name: str) -> list[tuple[dict, int]]:
    """(collectives, bytes of parameters, updates and Adam's moments here) in DDP, and by layer in FSDP2."""
    workload, size = WORKLOADS[name], dist.get_world_size()
    result = []
    for sharded in (False, True):
        model, x, y = workload.draw(torch.device("cpu"), rows=2)
        pc = pcfast.PredictiveCoding(model, method="exact")
        if sharded:
            for layer in model:
                fully_shard(layer)
        module = fully_shard(pc) if sharded else DistributedDataParallel(pc, gradient_as_bucket_view=True)
        optimizer = torch.optim.Adam(pc.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            with distributed.Collectives() as collectives:
                (size * module(x, y)).backward()
            optimizer.step()
        kept = [t for p in pc.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.dim()]
        local = [t.to_local() if sharded else t for t in kept]
        result.append((collectives.counts, sum(t.numel() * t.element_size() for t in local)))
    return result


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["mlp_600", "mnist_cnn"])
def test_the_page_counts_what_processes_send_and_keep(name, size):
    cost = scaling.cost(WORKLOADS[name], size, 2)
    model = WORKLOADS[name].make()
    payload, padded = scaling.payload_bytes(model), scaling.sharded_payload_bytes(model, size)
    state = scaling.cost(WORKLOADS[name], 1, 2).memory_bytes - 4 * payload
    ddp_memory, fsdp_memory = [], []
    for (ddp, kept), (fsdp, local) in on_processes(in_group, size, measured, name):
        assert ddp == {"allreduce": [cost.collectives, payload]}
        layers = sum(1 for layer in model if list(layer.parameters()))
        assert fsdp == {"allgather_base": [layers, padded], "reduce_scatter_base": [layers, padded]}
        ddp_memory.append(kept + state)
        fsdp_memory.append(local + payload + state)
    assert cost.sent_bytes == 2 * (size - 1) * payload // size
    assert set(ddp_memory) == {cost.memory_bytes}
    assert max(fsdp_memory) == cost.sharded_memory_bytes


def test_costs_on_paper():
    strict, exact = (WORKLOADS[name] for name in ("mlp_600", "mlp_600_exact"))
    one, eight = scaling.cost(strict, 1, 300), scaling.cost(strict, 8, 300)
    work = pcfast.explain(strict.make(), (300, 784), method="strict", num_steps=20).plan.work.total
    assert one.flop == eight.flop == 2 * work
    assert one.share == 0 < eight.share < scaling.cost(exact, 8, 300).share
    least = scaling.hidden_from(strict, 8)
    assert scaling.cost(strict, 8, least).share < scaling.HIDDEN <= scaling.cost(strict, 8, least // 2).share
    assert least * 4 <= scaling.hidden_from(exact, 8)  # as docs/scaling.md says


def test_the_page_is_made_from_the_newest_record(tmp_path, monkeypatch):
    page = report.SCALING.read_text()
    assert report.with_scaling(page, report.newest("distributed")) == page
    row = {"entry": "strict", "wrapper": "DDP", "processes": 2, "difference": 3e-16}
    rows = [{**row, "collectives": {"allreduce": [2, 4096]}}]
    monkeypatch.setattr(
        distributed, "run", lambda: {**RECORD, "commit": "c", "sources": "s", "distributed": rows}
    )
    result = CliRunner().invoke(distributed.distributed, ["--json", str(tmp_path / "record.json")])
    assert result.exit_code == 0 and "2 allreduce" in result.output
    made = report.with_scaling(page, [distributed.run()])
    assert "| strict | 3e-16 |" in made and "| DDP | 3e-16 | 2 allreduce | 4,096 |" in made
    assert "commit c. **Older than the code.**" in made and report.NOT_RECORDED not in made
