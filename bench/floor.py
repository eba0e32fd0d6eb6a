"""The least time that a training step can take on a machine: what no kernel gets below."""

from __future__ import annotations

import math

from torch import nn

import pcfast

from .workloads import Workload


def counts_of(workload: Workload, model: nn.Sequential) -> dict[str, int]:
    """What a step cannot do without.

    multiply_adds: of the products that the algorithm leaves, counted exactly by the planner (docs/method.md, facts 1
    to 3 and 7). bytes: parameters and input read once, updates written once, in float32.
    """
    shape = (workload.batch, *workload.sample)
    plan = pcfast.explain(model, shape, method=workload.method, num_steps=workload.num_steps).plan
    parameters = sum(p.numel() for p in model.parameters())
    return {"multiply_adds": plan.work.total, "bytes": 4 * (2 * parameters + math.prod(shape))}


def floor_of(counts: dict, ceilings: dict[str, float]) -> dict:
    """The larger of the times of products and bytes at ``ceilings`` (:func:`bench.measure.ceilings`), and which."""
    products = counts["multiply_adds"] / ceilings["multiply_adds_per_s"]
    memory = counts["bytes"] / ceilings["copy_bytes_per_s"]
    return {
        "floor_seconds": max(products, memory),
        "binding": "products" if products >= memory else "bytes",
    }
