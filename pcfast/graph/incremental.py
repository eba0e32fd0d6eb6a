"""Incremental predictive coding on a graph in deviation form (docs/methods.md; Salvatori et al., iPC).

As on chains: every node keeps what its prediction differs by from that of the first beliefs and parameters, whose
change counts as well. The loop is strict relaxation's, with the parameters' move in between.
"""

from __future__ import annotations

from ..backends.divergence import Checks, check_iteration
from .forward import forward_pass
from .problem import GraphOutcome, GraphPlan, GraphProblem, weighted
from .strict import Loop


def incremental(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    """Iterate; the outcome's gradients are those of the last iteration. Checks wait for the device."""
    forward = forward_pass(problem, plan, nodes)
    out = forward.outcome(problem)
    Checks(problem, forward).finish(out, [])
    loop = Loop(problem, forward)
    for node in nodes:
        if node is not None:
            node.snapshot_params()
    for t in range(1, problem.num_steps + 1):
        if t > 1:
            for node in nodes:
                if node is not None:
                    node.refresh()
        errors = loop.errors(shifts=t > 1)
        out.gradients, out.owners = {}, []
        forward.add_updates(out, [weighted(e, w) for e, w in zip(errors, loop.weights, strict=True)])
        loop.descend(errors, t)
        if problem.check:
            found = [(k + 1, e) for k, e in enumerate(errors) if e is not None]
            check_iteration(t, [*found, *out.updates_by_layer()], problem.step_size)
        if t == 1:
            forward.update_statistics(out)
        problem.move(out.gradients)
    if problem.num_steps == 0:
        forward.update_statistics(out)
    return out
