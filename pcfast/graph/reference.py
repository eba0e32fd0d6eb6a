"""Relaxation on a graph literally, with torch autograd node by node (docs/graphs.md).

Any modules, any losses, any floating dtype; slow on purpose: it says what is right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..backends.reference import Layer, leaves_of
from ..errors import RelaxationDiverged
from ..model.graph import Prior, call
from ..problem import status
from ..problem.early_exit import EarlyExit, repeated
from ..problem.nudging import target_of
from ..problem.types import Outcome
from ..support import differentiation
from .forward import root_start
from .problem import GraphOutcome, GraphPlan, GraphProblem, node_energy


class _NodeLayer(Layer):
    """f_k as a function of its inputs' values."""

    def __init__(self, module, device, rows):
        super().__init__(module, device)
        self._rows = rows

    def call(self, *v):
        if isinstance(self.module, Prior):
            return self.module(self._rows).clone()
        return call(self.module, v)

    def pull(self, error: Tensor, *v: Tensor) -> list[Tensor]:
        """J^T error for every input."""
        with torch.enable_grad():
            leaves = leaves_of(v)
            mu = self(*leaves)
            tracked = [leaf for leaf in leaves if leaf.requires_grad]
            result = iter(differentiation.gradients(mu, tracked, error) if mu.requires_grad else ())
        found = [next(result, None) if leaf.requires_grad else None for leaf in leaves]
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@torch.no_grad()
def run(problem: GraphProblem, plan: GraphPlan) -> GraphOutcome:
    modules = problem.model._modules
    layers = [
        None if spec.kind == "root" else _NodeLayer(modules[spec.name], plan.device, problem.rows)
        for spec in problem.spec.nodes
    ]
    try:
        return _Relaxation(problem, plan, layers).run()
    except BaseException:
        for layer in layers:
            if layer is not None:
                layer.undo()
        raise


class _Relaxation:
    """Lists run over the nodes; mu and errors of a root without a prior are None."""

    def __init__(self, problem: GraphProblem, plan: GraphPlan, layers: list[_NodeLayer | None]) -> None:
        self.problem, self.plan, self.layers, self.nodes = problem, plan, layers, problem.spec.nodes
        self.energies: list[Tensor] = []
        self.settled: dict[int, Tensor] = {}  # predictions that losses are taken at, of the last errors
        self.targets = {k: y for k, (_, y) in problem.losses.items()}

    def inputs(self, k: int, v: list[Tensor]) -> list[Tensor]:
        return [v[i] for i in self.nodes[k].inputs]

    def values(self) -> list[Tensor]:
        """The forward pass: what is clamped, the roots' starts, and predictions."""
        problem, v = self.problem, []
        for k, layer in enumerate(self.layers):
            mu = None if layer is None else layer(*self.inputs(k, v)).detach()
            if k in problem.clamped:
                v.append(problem.clamped[k])
            elif mu is None:
                v.append(root_start(problem, k, self.plan.dtype))
            else:
                v.append(mu if self.nodes[k].inputs else problem.start_of(k, mu))
            problem.check_weight(k, v[k].shape)
        return v

    def predictions(self, v: list[Tensor]) -> list[Tensor | None]:
        return [
            None if layer is None else layer(*self.inputs(k, v)).detach()
            for k, layer in enumerate(self.layers)
        ]

    def errors(self, v: list[Tensor], mu: list[Tensor | None]) -> list[Tensor | None]:
        """eps_k = mu_k - v_k; of a loss's node pi dLoss/dmu."""
        result: list[Tensor | None] = []
        for k, prediction in enumerate(mu):
            if k in self.problem.losses:
                loss, _ = self.problem.losses[k]
                self.settled[k] = prediction
                gradient = loss.gradient_by_autograd(prediction, self.targets[k])
                result.append(gradient * self.problem.weights[k])
            else:
                result.append(None if prediction is None else prediction - v[k])
        return result

    def weighted(self, errors: list[Tensor | None]) -> list[Tensor | None]:
        """pi_k eps_k, which is what a node sends down."""
        return [
            e if e is None or k in self.problem.losses else e * self.problem.weights[k]
            for k, e in enumerate(errors)
        ]

    def energy(self, mu: list[Tensor | None], errors: list[Tensor | None]) -> Tensor:
        """Of every node pi |eps|^2 / 2, or pi times the loss."""
        row = []
        for k, error in enumerate(errors):
            if k in self.problem.losses:
                loss, _ = self.problem.losses[k]
                row.append(loss.value(mu[k], self.targets[k]) * self.problem.weights[k])
            else:
                row.append(torch.zeros(()) if error is None else node_energy(error, self.problem.weights[k]))
        return torch.stack([value.to(self.problem.x.device, self.plan.dtype) for value in row])

    def feedback(self, pulled: list[Tensor | None], v: list[Tensor]) -> list[Tensor]:
        """For every node the sum over its children of J^T pi eps."""
        result = [torch.zeros_like(value) for value in v]
        for c, error in enumerate(pulled):
            if error is not None and self.nodes[c].inputs:
                below = self.layers[c].pull(error, *self.inputs(c, v))
                for i, pull in zip(self.nodes[c].inputs, below, strict=True):
                    result[i] = result[i] + pull
        return result

    def pull_down(self, signals: list[Tensor | None], v: list[Tensor], moving: Collection[int]) -> None:
        """Add to the signals of ``moving`` nodes, in place, what they get from all nodes above them."""
        for c in range(len(v) - 1, -1, -1):
            if signals[c] is not None and self.nodes[c].inputs:
                below = self.layers[c].pull(signals[c], *self.inputs(c, v))
                for i, pull in zip(self.nodes[c].inputs, below, strict=True):
                    if i in moving:
                        signals[i] = signals[i] + pull

    def descend(
        self, v: list[Tensor], pulled: list[Tensor | None], below: list[Tensor], descents, t: int
    ) -> None:
        """Move the free nodes' beliefs, in place, in iteration ``t``; ``below`` as of :meth:`feedback`."""
        optimizer = self.problem.optimizer
        for k in self.problem.free:
            gradient = below[k] if pulled[k] is None else below[k] - pulled[k]
            if optimizer.weight_decay:
                gradient = gradient + optimizer.weight_decay * v[k]
            v[k] = v[k] + descents[k].move(gradient, self.problem.step_size_at(k, t), t)

    def run(self) -> GraphOutcome:
        problem = self.problem
        vhat = self.values()
        mu = self.predictions(vhat)
        loss_updates = []
        for k, (loss, y) in problem.losses.items():
            loss.check_target(tuple(vhat[k].shape), y)
            if loss.known:
                loss.prepare(vhat[k], y, raise_now=True)
            loss_updates += loss.gradients_by_autograd(vhat[k], y, parameters=problem.wanted.gradients)[1]
        errors = self.errors(vhat, mu)
        loss = self.energy(mu, errors).sum()
        if problem.check:
            _check(0, vhat)
            if not status.all_finite([loss, *(errors[k] for k in problem.losses)]):
                raise status.bad_loss()
        outputs = [vhat[k] if mu[k] is None else mu[k] for k in problem.spec.outputs]
        out = GraphOutcome(loss, outputs[0], outputs=outputs, activations=vhat)
        method = {
            "exact": self.exact, "zero_divergence": self.zero_divergence, "error_based": self.error_based,
            "incremental": self.incremental,
        }.get(problem.method, self.strict)  # fmt: skip
        for share in self.pushes(vhat):
            out.beliefs, out.errors, points, pulled = method(vhat, out)
            if problem.wanted.gradients and problem.method != "incremental":
                self.add_updates(out, points, pulled, share)
        out.settled = self.settled
        if problem.wanted.energies:
            empty = torch.zeros((0, len(self.nodes)), dtype=self.plan.dtype)
            out.energies = torch.stack(self.energies) if self.energies else empty
        if problem.wanted.gradients and problem.method != "incremental":
            out.add_gradients(loss_updates, len(self.nodes))
        if problem.check:
            results = [*enumerate(out.beliefs), *enumerate(out.errors)]
            results += [(layer - 1, update) for layer, update in out.updates_by_layer()]
            bad = [k for k, value in results if value is not None and not status.all_finite([value])]
            if bad:
                raise RelaxationDiverged(None, min(bad) + 1, problem.step_size)
        return out

    def pushes(self, vhat: list[Tensor]) -> Iterator[float]:
        """Set the targets of one relaxation after the other; yields what each one's updates count."""
        if self.problem.nudging is None:
            yield 1.0
            return
        for push, share in self.problem.nudging.pushes:
            self.targets = {k: target_of(push, vhat[k], y) for k, (_, y) in self.problem.losses.items()}
            yield share

    def add_updates(
        self, out: Outcome, points: list[Tensor], pulled: list[Tensor | None], share: float = 1.0
    ) -> None:
        for k, layer in enumerate(self.layers):
            if layer is not None:
                error = torch.zeros_like(points[k]) if pulled[k] is None else pulled[k]
                found = layer.parameter_gradients(error * share, *self.inputs(k, points))
                out.add_gradients(found, k + 1)

    # the methods: beliefs, errors, the values at which the updates are taken, the errors that they are taken with

    def strict(self, vhat, out):
        """All nodes at once; "fixed_prediction": predictions and Jacobians at the forward pass."""
        problem = self.problem
        fixed = problem.method == "fixed_prediction"
        v = [problem.start_of(k, value).clone() for k, value in enumerate(vhat)]
        descents = [problem.optimizer.descent() for _ in v]
        early = None
        if problem.tolerance is not None:
            early = EarlyExit(problem.tolerance, problem.last_arrival, problem.x.device)
            out.iterations = early.iterations
        for t in range(max(problem.num_steps, 1)):
            mu = self.predictions(vhat if fixed else v)
            errors = self.errors(v, mu)
            pulled = self.weighted(errors)
            if problem.num_steps == 0:
                break
            if problem.wanted.energies or early is not None:
                self.energies.append(self.energy(mu, errors))
            below = self.feedback(pulled, vhat if fixed else v)
            self.descend(v, pulled, below, descents, t + 1)
            if problem.temperature:
                for k in problem.free:
                    v[k] = v[k] + problem.noise(v[k], k, t + 1)
            if problem.check:
                _check(t + 1, v)
            if early is not None:
                early.see(t + 1, self.energies[-1])
                out.iterations = early.iterations
                if not early.going:
                    self.energies = repeated(self.energies, problem.num_steps)
                    break
        return v, errors, vhat if fixed else v, pulled

    def exact(self, vhat, out):
        """Backpropagation of the energy at the start; what does not start at its prediction stays."""
        errors = self.errors(vhat, self.predictions(vhat))
        sources = self.weighted(errors)
        held = {
            *self.problem.clamped,
            *self.problem.losses,
            *(k for k in self.problem.start if self.nodes[k].kind == "prior"),
        }
        gradients = [s if k in held else torch.zeros_like(vhat[k]) for k, s in enumerate(sources)]
        self.pull_down(gradients, vhat, set(range(len(vhat))) - held)
        stay = held - set(self.problem.losses)  # exact has beliefs of the output, too
        beliefs = [v if k in stay else v - gradients[k] for k, v in enumerate(vhat)]
        reported = [
            None if self.layers[k] is None else errors[k] if k in self.problem.clamped else g
            for k, g in enumerate(gradients)
        ]
        return beliefs, reported, vhat, gradients

    def zero_divergence(self, vhat, out):
        """Strict with step size 1 by levels: Song et al. (2020), Salvatori et al. (2022) for graphs.

        A node's level is the number of nodes on the longest path to it from where errors begin. At time t the errors
        of level t are read, and what they send down moves the nodes below, each of which keeps its value until all of
        its children have been read.
        """
        problem, count = self.problem, len(vhat)
        level = [0] * count
        for k in range(count - 1, -1, -1):
            level[k] = max((level[c] + 1 for c in problem.spec.children[k]), default=0)
        v, moves = list(vhat), [torch.zeros_like(value) for value in vhat]
        errors: list[Tensor | None] = [None] * count
        free = set(problem.free)
        for t in range(max(level) + 1):
            for k in range(count):
                if level[k] == t and k in free:
                    v[k] = v[k] - moves[k]
            mu = self.predictions(
                vhat
            )  # what a node of this level predicts from is of a higher one: at its start
            found = self.errors(v, mu)
            for k in range(count):
                if level[k] != t or found[k] is None:
                    continue
                errors[k] = found[k]
                if self.nodes[k].inputs:
                    pulled = self.weighted(found)[k]
                    below = self.layers[k].pull(pulled, *self.inputs(k, vhat))
                    for i, pull in zip(self.nodes[k].inputs, below, strict=True):
                        moves[i] = moves[i] + pull
        return v, errors, vhat, self.weighted(errors)

    def error_based(self, vhat, out):
        """The free nodes' errors are the variables: Goemaere et al., ePC."""
        problem = self.problem
        free = set(problem.free)
        # a root's error begins where its start leaves it; a root without a prior counts from its start
        errors: list[Tensor | None] = [
            e if k not in free else torch.zeros_like(vhat[k]) if self.nodes[k].inputs or e is None else e
            for k, e in enumerate(self.errors(vhat, self.predictions(vhat)))
        ]

        def states():
            v: list[Tensor] = []
            mu: list[Tensor | None] = []
            for k, layer in enumerate(self.layers):
                mu.append(None if layer is None else layer(*self.inputs(k, v)).detach())
                if k in problem.clamped:
                    v.append(problem.clamped[k])
                elif k in problem.losses:
                    v.append(mu[k])
                else:
                    v.append((vhat[k] if mu[k] is None else mu[k]) - errors[k])
            found = self.errors(v, mu)
            for k in range(len(v)):
                if k not in free:
                    errors[k] = found[k]
            return v, mu

        for t in range(problem.num_steps):
            v, mu = states()
            shown = [None if mu[k] is None else e for k, e in enumerate(errors)]
            if problem.wanted.energies:
                self.energies.append(self.energy(mu, shown))
            pulled = self.weighted(shown)
            signals = [torch.zeros_like(value) if k in free else pulled[k] for k, value in enumerate(v)]
            self.pull_down(signals, v, free)
            for k in free:
                own = 0.0 if pulled[k] is None else pulled[k]
                errors[k] = errors[k] + problem.step_size_at(k, t + 1) * (signals[k] - own)
            if problem.check:
                _check(t + 1, [e if e is not None else value for e, value in zip(errors, v, strict=True)])
        v, mu = states()
        shown = [None if mu[k] is None else e for k, e in enumerate(errors)]
        beliefs = [vhat[k] if k in problem.losses else value for k, value in enumerate(v)]  # none moves there
        return beliefs, shown, v, self.weighted(shown)

    def incremental(self, vhat, out):
        """Beliefs and parameters move together: Salvatori et al. (2024), iPC."""
        problem = self.problem
        v = [problem.start_of(k, value) for k, value in enumerate(vhat)]
        descents = [problem.optimizer.descent() for _ in v]
        errors: list[Tensor | None] = [None] * len(v)
        pulled = errors
        for t in range(problem.num_steps):
            errors = self.errors(v, self.predictions(v))
            pulled = self.weighted(errors)
            out.gradients, out.owners = {}, []
            self.add_updates(out, v, pulled)
            self.descend(v, pulled, self.feedback(pulled, v), descents, t + 1)
            if problem.check:
                _check(t + 1, v)
            for layer in self.layers:
                if layer is not None:
                    layer.keep()
            problem.move(out.gradients)
        return v, errors, v, pulled


def _check(iteration: int, tensors: list[Tensor]) -> None:
    bad = status.first_non_finite(tensors)
    if bad is not None:
        raise RelaxationDiverged(iteration, bad + 1, 0.0)
