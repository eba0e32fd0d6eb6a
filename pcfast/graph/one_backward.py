"""exact, zero_divergence and fixed prediction's closed form on a graph: one forward and one backward pass.

Fixed prediction is linear in its sources. With xi_s = 1 for a source s (a clamped node, a loss), every path from a
source down to node k adds a(t) times the product of the transposed Jacobians along it, where

    a_k(0) = 0        a_k(t+1) = a_k(t) - eta_k (pi_k a_k(t) - xi_c(t))        xi_k = pi_k a_k

follows the path from node to node, c the child above k on it. Paths whose scalars are the same are one sum: with one
step size and one precision those of equal length, so that the backward pass carries a polynomial in the length.
"""

from __future__ import annotations

from torch import Tensor

from ..backends.divergence import Checks
from ..problem.belief_optimizers import GradientDescent, StepSize, step_size_of
from .forward import forward_pass
from .problem import GraphOutcome, GraphPlan, GraphProblem, weighted
from .strict import Loop

#: The (eta, pi) of the nodes of a path, from its source on: paths of equal keys have equal scalars.
Key = tuple[tuple[StepSize, float], ...]


def one_backward(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    """ "exact" and "zero_divergence": every free node's error is the energy's gradient there."""
    forward = forward_pass(problem, plan, nodes)
    checks, out = Checks(problem, forward), forward.outcome(problem)
    pulled: list[Tensor | None] = [forward.sources.get(k) for k in range(len(nodes))]
    held = {*problem.clamped, *problem.losses}
    for k, error in enumerate(forward.base_errors):
        if error is not None and k not in held:  # a root that starts away from its prior's mean stays there
            held.add(k)
            pulled[k] = weighted(error, problem.weights[k])
    for c in range(len(nodes) - 1, -1, -1):
        if pulled[c] is None or nodes[c] is None:
            continue
        inputs = problem.spec.nodes[c].inputs
        found, below = nodes[c].differentiate(
            pulled[c], [i not in held for i in inputs], need_gradients=problem.wanted.gradients
        )
        out.add_gradients(found, c + 1)
        for i, e in zip(inputs, below, strict=True):
            if e is not None:
                pulled[i] = e if pulled[i] is None else pulled[i] + e
    if problem.wanted.gradients:
        for k, node in enumerate(nodes):
            if node is not None and pulled[k] is None:
                out.add_gradients(node.zero_gradients(), k + 1)
    results = [(k + 1, e) for k, e in enumerate(pulled) if e is not None]
    if problem.wanted.states:
        base = forward.base_errors
        # exact has beliefs of the output, too: algorithm 1 of Rosenbaum (2022)
        stay = held - set(problem.losses) if problem.method == "exact" else held
        out.errors = forward.filled([base[k] if k in problem.clamped else e for k, e in enumerate(pulled)])
        out.beliefs = [
            v.clone() if k in stay or pulled[k] is None else v - pulled[k]
            for k, v in enumerate(forward.values)
        ]
    checks.finish(out, results)
    forward.update_statistics(out)
    return out


def scalars(
    above: tuple[float, ...] | None, eta: StepSize, pi: float, num_steps: int, optimizer: GradientDescent
) -> tuple[float, ...]:
    """a(0..n) of a node below one whose weighted scalars are ``above``; None: a source's, 1 at all times."""
    a, velocity, result = 0.0, 0.0, [0.0]
    for t in range(1, num_steps + 1):
        pull = pi * a - (1.0 if above is None else above[t - 1])
        velocity = optimizer.momentum * velocity + pull
        step = pull + optimizer.momentum * velocity if optimizer.nesterov else velocity
        a = a - step_size_of(eta, t) * step
        result.append(a)
    return tuple(result)


def path_keys(problem: GraphProblem) -> list[set[Key]] | str:
    """For every node the keys of the paths from sources to it that count, or why there is no closed form."""
    optimizer = problem.optimizer
    if not optimizer.linear:
        return f"beliefs are not linear in their errors with {optimizer}"
    free, nodes = problem.free, problem.spec.nodes
    if any(isinstance(problem.weights[k], Tensor) for k in free):
        return "a precision for each unit is no scalar of a node"
    if any(not nodes[k].inputs and nodes[k].kind == "prior" and k in problem.start for k in free):
        return "a root that starts away from its prior's mean has an error of its own"
    if problem.wanted.energies:
        return "energies are those of every iteration"
    keys: list[set[Key]] = [set() for _ in nodes]
    for c in range(len(nodes) - 1, -1, -1):
        source = c in problem.clamped or c in problem.losses
        carried = {()} if source and nodes[c].inputs else keys[c]
        for i in nodes[c].inputs:
            if i in problem.clamped or i in problem.losses:
                continue
            step = problem.step_sizes[i], problem.weights[i]
            # a path of n + 1 nodes and more has not been walked in n iterations
            keys[i] |= {(*key, step) for key in carried if len(key) < problem.num_steps}
            if len(keys[i]) > max(problem.num_steps, 1):
                return f"node {nodes[i].name!r} has paths of more kinds than there are iterations"
    return keys


def closed_form(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    """Fixed prediction; :func:`path_keys` has to give keys."""
    n, optimizer = problem.num_steps, problem.optimizer
    forward = forward_pass(problem, plan, nodes)
    checks, out = Checks(problem, forward), forward.outcome(problem)
    known: dict[Key, tuple[float, ...]] = {}

    def a_of(key: Key) -> tuple[float, ...]:
        if key not in known:
            above = None
            if key[:-1]:
                pi = key[-2][1]
                above = tuple(pi * a for a in a_of(key[:-1]))
            known[key] = scalars(above, *key[-1], n, optimizer)
        return known[key]

    sums: list[dict[Key, Tensor]] = [
        {} for _ in nodes
    ]  # at every node, by key, of the products along its paths
    errors: list[Tensor | None] = [None] * len(nodes)
    beliefs: list[Tensor] = list(forward.values)
    results: list[tuple[int, Tensor]] = []
    for c in range(len(nodes) - 1, -1, -1):
        carried, pi = sums[c], problem.weights[c]
        if c in forward.sources:
            errors[c] = forward.base_errors[c] if c in problem.clamped else forward.sources[c]
            carried = {(): forward.sources[c]}
        elif carried:
            at = max(n - 1, 0)
            errors[c] = sum(g * a_of(key)[at] for key, g in carried.items())
            beliefs[c] = forward.values[c] - sum(g * a_of(key)[n] for key, g in carried.items())
            results += [(c + 1, errors[c]), (c + 1, beliefs[c])]
        node, inputs = nodes[c], problem.spec.nodes[c].inputs
        if node is None:
            continue
        if problem.wanted.gradients:
            if errors[c] is None:
                out.add_gradients(node.zero_gradients(), c + 1)
            else:
                error = errors[c] if c in problem.losses else weighted(errors[c], pi)
                out.add_gradients(node.gradients(error), c + 1)
        wanted = [i not in problem.clamped for i in inputs]
        for key, g in carried.items():
            if len(key) >= n or not any(wanted):
                continue
            _, below = node.differentiate(g, wanted, need_gradients=False)
            for i, e in zip(inputs, below, strict=True):
                if e is not None:
                    longer = (*key, (problem.step_sizes[i], problem.weights[i]))
                    sums[i][longer] = sums[i][longer] + e if longer in sums[i] else e
    if problem.wanted.states:
        out.errors = forward.filled(errors)
        out.beliefs = [
            v.clone() if v is given else v for v, given in zip(beliefs, forward.values, strict=True)
        ]
    checks.finish(out, results, lambda: Loop(problem, forward).locate(checks.raise_where_bad))
    forward.update_statistics(out)
    return out
