"""What a step costs a device when N of them share it: arithmetic from the planner's exact counts and named constants.

The tables in docs/scaling.md, which ``python -m pcfast.bench.report`` writes. Nothing here is measured; tests compare
bytes, collectives and memory with those of 2 and 4 processes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from pcfast import explain
from pcfast.backends import chips

from .workloads import WORKLOADS, Workload

DEVICES = (1, 2, 4, 8, 64, 1024)
#: Workloads of the table of costs; that of hidden communication has all.
SHOWN = (
    "mlp_600", "mlp_600_fixed", "mlp_600_exact", "mnist_cnn", "deep_mlp_32", "cifar_cnn", "wide_mlp", "vgg19",
)  # fmt: skip
CHIP = "h200"
#: What a step reaches of the chip's peak rate of IEEE float32 products.
OF_PEAK = 0.5
#: Devices that NVLink joins, and what one sends a second: 900 GB/s in both directions (NVIDIA H200 datasheet).
IN_A_NODE, NVLINK_BYTES_S = 8, 450e9
#: Beyond a node: 400 Gbit/s of InfiniBand a device (NVIDIA ConnectX-7 datasheet).
NETWORK_BYTES_S = 50e9
#: Of one step of a collective's tree, of which there are 2 log2 N.
LATENCY_S = 5e-6
FLOAT_BYTES = 4
#: Of a parameter: its update, and Adam's two moments.
UPDATES, MOMENTS = 1, 2
#: Of a layer's output while it relaxes: prediction, belief's deviation, error.
ARRAYS_A_LAYER = 3
#: torch.nn.parallel.DistributedDataParallel: the first bucket, and the others (bucket_cap_mb).
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
#: Communication of less than this part of a step counts as hidden.
HIDDEN = 0.1


@dataclass(frozen=True)
class Cost:
    """Of one step on one of ``devices``, each with ``rows`` rows of the batch.

    Attributes:
        flop: of the matrix products, two a multiply-add.
        sent_bytes: by one device, in a ring.
        collectives: DistributedDataParallel's all-reduces.
        memory_bytes: parameters, updates, moments and the relaxation's state, each device with all of them.
        sharded_memory_bytes: with FSDP2 a part of parameters, updates and moments; whole parameters for the step.
    """

    devices: int
    rows: int
    flop: int
    sent_bytes: int
    collectives: int
    memory_bytes: int
    sharded_memory_bytes: int

    @property
    def compute_s(self) -> float:
        return self.flop / (OF_PEAK * 1e12 * chips.by_name(CHIP).peak_tflops.ieee)

    @property
    def communication_s(self) -> float:
        if self.devices == 1:
            return 0.0
        rate = NVLINK_BYTES_S if self.devices <= IN_A_NODE else NETWORK_BYTES_S
        return self.sent_bytes / rate + 2 * math.log2(self.devices) * self.collectives * LATENCY_S

    @property
    def share(self) -> float:
        """Of the step that is communication: it starts where the relaxation ends."""
        return self.communication_s / (self.communication_s + self.compute_s)


def payload_bytes(model: nn.Module) -> int:
    """Of one all-reduce of all updates."""
    return FLOAT_BYTES * sum(parameter.numel() for parameter in model.parameters())


def all_reduces(model: nn.Module) -> int:
    """How many buckets DistributedDataParallel makes of the updates: one is closed once it is full."""
    count, filled, cap = 1, 0, FIRST_BUCKET_BYTES
    for parameter in reversed(list(model.parameters())):
        if filled >= cap:
            count, filled, cap = count + 1, 0, BUCKET_BYTES
        filled += FLOAT_BYTES * parameter.numel()
    return count


def sharded_payload_bytes(model: nn.Module, devices: int) -> int:
    """Of FSDP2's all-gather or reduce-scatter: every parameter is split along its first dimension, and padded."""
    rows = [(p.shape[0], p.numel() // p.shape[0]) for p in model.parameters()]
    return FLOAT_BYTES * sum(devices * math.ceil(first / devices) * rest for first, rest in rows)


@functools.cache
def _model(workload: Workload) -> nn.Sequential:
    """Shapes alone."""
    with torch.device("meta"):
        return workload.make()


@functools.cache
def cost(workload: Workload, devices: int, rows: int) -> Cost:
    """Of ``workload`` with ``rows`` rows on every device."""
    model = _model(workload)
    plan = explain(
        model, (rows, *workload.sample), CHIP, method=workload.method, num_steps=workload.num_steps
    ).plan
    payload = payload_bytes(model)
    outputs = sum(math.prod(shapes[-1]) for shapes in plan.shapes)
    state = FLOAT_BYTES * ARRAYS_A_LAYER * outputs
    kept = (1 + UPDATES + MOMENTS) * payload
    sharded = (1 + UPDATES + MOMENTS) * sharded_payload_bytes(model, devices) // devices
    return Cost(
        devices,
        rows,
        2 * plan.work.total,
        2 * (devices - 1) * payload // devices,
        all_reduces(model),
        kept + state,
        sharded + (payload if devices > 1 else 0) + state,
    )


def counted() -> list[Workload]:
    """The workloads whose multiply-adds the planner counts."""
    return [workload for workload in WORKLOADS.values() if workload.method != "incremental"]


def hidden_from(workload: Workload, devices: int) -> int | None:
    """Fewest rows a device, a power of two, from which communication is hidden; None beyond a million."""
    rows = (2**power for power in range(21))
    return next((r for r in rows if cost(workload, devices, r).share < HIDDEN), None)


def text() -> str:
    """Markdown: the constants, a table of costs, and one of the rows that hide communication."""
    chip = chips.by_name(CHIP)
    constants = (
        f"Constants: {chip.name} at {OF_PEAK:.0%} of {chip.peak_tflops.ieee:g} TFLOP/s (float32); up to "
        f"{IN_A_NODE} devices {NVLINK_BYTES_S / 1e9:g} GB/s a device, beyond {NETWORK_BYTES_S / 1e9:g} GB/s; "
        f"{LATENCY_S * 1e6:g} us for each of 2 log2 N steps of a collective; {ARRAYS_A_LAYER} arrays of a layer's "
        "output; Adam."
    )
    lines = [
        "| workload, rows a device | devices | GFLOP | MB sent | all-reduces | MB, DDP | MB, FSDP2 | compute "
        "| communication | of the step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for workload in (WORKLOADS[name] for name in SHOWN):
        for devices in DEVICES:
            c = cost(workload, devices, workload.batch)
            cells = [
                f"{workload.name}, {c.rows}" if devices == 1 else "",
                f"{devices:,}",
                f"{c.flop / 1e9:,.3g}",
                f"{c.sent_bytes / 1e6:,.3g}",
                str(c.collectives if devices > 1 else 0),
                f"{c.memory_bytes / 1e6:,.3g}",
                f"{c.sharded_memory_bytes / 1e6:,.3g}",
                _time(c.compute_s),
                _time(c.communication_s),
                f"{c.share:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    hidden = [
        f"| workload | {' | '.join(f'{n:,} devices' for n in DEVICES[1:])} |",
        "|" + "---|" * len(DEVICES),
    ]
    for workload in counted():
        least = (hidden_from(workload, devices) for devices in DEVICES[1:])
        hidden.append(
            f"| {workload.name} | {' | '.join('never' if r is None else f'{r:,}' for r in least)} |"
        )
    return "\n\n".join([
        constants, "\n".join(lines),
        f"Rows a device from which communication takes less than {HIDDEN:.0%} of a step:", "\n".join(hidden),
    ])  # fmt: skip


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms"
