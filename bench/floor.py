"""The least time that a training step can take on a machine: what no kernel gets below."""

from __future__ import annotations

import math

from torch import nn

import pcfast
from pcfast.model.describe import describe
from pcfast.problem.plan import Plan, layer_macs

from .workloads import Workload


def counts_of(workload: Workload, model: nn.Sequential) -> dict[str, int]:
    """What a step cannot do without.

    multiply_adds: of the products that the algorithm leaves, counted exactly by the planner (docs/method.md, facts 1
    to 3 and 7). bytes: parameters and input read once, updates written once, in float32.
    """
    shape = (workload.batch, *workload.sample)
    plan = pcfast.explain(model, shape, method=workload.method, num_steps=workload.num_steps).plan
    work = _incremental_work(model, plan) if plan.work is None else plan.work.total
    parameters = sum(p.numel() for p in model.parameters())
    return {"multiply_adds": work, "bytes": 4 * (2 * parameters + math.prod(shape))}


def _incremental_work(model: nn.Sequential, plan: Plan) -> int:
    """Multiply-adds of incremental in belief form, with every parameter moving: the planner knows no optimiser.

    Layer l's error comes in iteration L-l+1 (the active front, docs/method.md fact 3); its prediction moves one
    iteration later, the first layer's too, and the last iteration feeds nothing back.
    """
    macs, n = layer_macs(describe(model), plan.shapes), plan.num_steps
    total = sum(macs)  # the forward pass
    for behind, product in enumerate(reversed(macs)):
        gradients, predictions, feedbacks = n - behind, n - behind - 1, n - behind - 1
        first = behind == len(macs) - 1
        total += product * sum(max(0, times) for times in (gradients, predictions, 0 if first else feedbacks))
    return total


def floor_of(counts: dict, ceilings: dict[str, float]) -> dict:
    """The larger of the times of products and bytes at ``ceilings`` (:func:`bench.measure.ceilings`), and which."""
    products = counts["multiply_adds"] / ceilings["multiply_adds_per_s"]
    memory = counts["bytes"] / ceilings["copy_bytes_per_s"]
    return {
        "floor_seconds": max(products, memory),
        "binding": "products" if products >= memory else "bytes",
    }
