"""The forward pass of a graph in deviation form: every node's value, and what is wrong with it there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..deviation import Node, PriorNode, node_at_work
from ..losses import PreparedTarget
from ..problem import status
from .problem import GraphOutcome, GraphPlan, GraphProblem, Weight, node_energy, weighted

Nodes = list[Node | PriorNode | None]


@dataclass(eq=False)
class _Target:
    """A loss at one node's prediction: at any prediction its value and its gradient."""

    value_at: Callable[[Tensor], Tensor]
    gradient_at: Callable[[Tensor], Tensor]
    prepared: PreparedTarget | None = None  # of a loss that pcfast knows


@dataclass(eq=False)
class GraphForward:
    """Lists run over the nodes.

    Attributes:
        nodes: at work; None for roots without a prior.
        values: what every node's children read: beliefs at the start; of a loss's node its prediction.
        base_errors: mu - v there, of nodes whose value is not their prediction; None where it is.
        sources: what the errors start from, weighted by precision: of clamped nodes pi (mu - v), of losses the
            gradient.
        loss: the energy there.
        loss_updates: of parameters that the losses use themselves.
        invalid_labels: 0-dim bool, or None.
    """

    nodes: Nodes
    values: list[Tensor]
    base_errors: list[Tensor | None]
    sources: dict[int, Tensor]
    targets: dict[int, _Target]
    loss: Tensor
    loss_updates: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    invalid_labels: Tensor | None = None

    @property
    def vhat(self) -> list[Tensor | None]:
        """The values with nothing in front: as checks count layers, from 1."""
        return [None, *self.values]

    @property
    def loss_values(self) -> list[Tensor]:
        return [self.loss, *self.sources.values()]

    def outcome(self, problem: GraphProblem) -> GraphOutcome:
        """An outcome that holds what the forward pass gives."""
        outputs = [self.prediction(k) for k in problem.spec.outputs]
        out = GraphOutcome(self.loss, outputs[0], outputs=outputs)
        out.add_gradients(self.loss_updates, len(self.values))
        if problem.wanted.states:
            out.activations = self.values
        return out

    def prediction(self, k: int) -> Tensor:
        """mu_k at the start; of a root without a prior its value."""
        error = self.base_errors[k]
        return self.values[k] if error is None else self.values[k] + error

    def filled(self, errors: list[Tensor | None]) -> list[Tensor | None]:
        """The errors of nodes that predict, zeros for None; None for roots without a prior."""
        return [
            None if node is None else torch.zeros_like(v) if e is None else e
            for e, v, node in zip(errors, self.values, self.nodes, strict=True)
        ]

    def losses_at(self, outputs: dict[int, Tensor]) -> dict[int, Tensor]:
        """Every loss at its node's prediction in ``outputs``."""
        return {k: target.value_at(outputs[k]) for k, target in self.targets.items()}

    def energy_row(
        self, errors: list[Tensor | None], losses: dict[int, Tensor], weights: list[Weight]
    ) -> Tensor:
        """Of every node pi |eps|^2 / 2, or pi times its loss."""
        zero, row = self.loss.new_zeros(()), []
        for k, (error, node) in enumerate(zip(errors, self.nodes, strict=True)):
            if k in losses:
                value = losses[k] * weights[k]
            else:  # a root without a prior has no energy
                value = zero if error is None or node is None else node_energy(error, weights[k])
            row.append(value.to(zero.dtype))
        return torch.stack(row)

    def stacked(self, rows: list[Tensor]) -> Tensor:
        """The iterations' :meth:`energy_row`, (n, nodes)."""
        return torch.stack(rows) if rows else self.loss.new_zeros((0, len(self.nodes)))

    def add_updates(self, out: GraphOutcome, errors: list[Tensor | None], share: float = 1.0) -> None:
        """Add ``share`` of (df_k/dtheta_k)^T of weighted ``errors`` at the current points; None is zero."""
        for k, node in enumerate(self.nodes):
            if node is not None:
                found = node.zero_gradients() if errors[k] is None else node.gradients(errors[k])
                out.add_gradients([(p, g if share == 1 else g * share) for p, g in found], k + 1)

    def update_statistics(self, out: GraphOutcome) -> None:
        failed = None if out.status is None else status.failed(out.status)
        for node in self.nodes:
            if node is not None:
                node.update_statistics(failed)


def nodes_at_work(problem: GraphProblem, plan: GraphPlan) -> Nodes:
    return [node_at_work(spec, problem.model, plan.precision) for spec in problem.spec.nodes]


@contextlib.contextmanager
def undone_on_failure(nodes: Nodes) -> Iterator[None]:
    """Where this raises, statistics and other buffers are as they were."""
    try:
        yield
    except BaseException:
        for node in nodes:
            if node is not None:
                node.undo()
        raise


def root_start(problem: GraphProblem, k: int, dtype: torch.dtype) -> Tensor:
    """What a free root without a prior starts at: zeros, unless a start is given."""
    start, shape = problem.start.get(k, 0.0), problem.spec.nodes[k].shape
    if isinstance(start, Tensor):
        return start
    return torch.full((problem.rows, *shape), start, dtype=dtype, device=problem.x.device)


def forward_pass(problem: GraphProblem, plan: GraphPlan, nodes: Nodes) -> GraphForward:
    """Run it from the clamped values and the starts of the roots; then the losses."""
    to_state = plan.precision.to_state
    values: list[Tensor] = []
    errors: list[Tensor | None] = []
    sources: dict[int, Tensor] = {}
    for k, (spec, node) in enumerate(zip(problem.spec.nodes, nodes, strict=True)):
        prediction = None if node is None else node.forward([values[i] for i in spec.inputs], problem.rows)
        value = prediction
        if k in problem.clamped:
            value = problem.clamped[k]
            value = to_state(value) if value.is_floating_point() else value
        elif prediction is None:
            value = to_state(root_start(problem, k, plan.precision.state))
        elif not spec.inputs and k in problem.start:
            value = problem.start_of(k, prediction)
        problem.check_weight(k, value.shape)
        error = None if prediction is None or value is prediction else prediction - value
        if error is not None and k in problem.clamped:
            sources[k] = weighted(error, problem.weights[k])
        values.append(value)
        errors.append(error)
    return with_losses(problem, plan, nodes, values, errors, sources)


def with_losses(problem, plan, nodes, values, errors, sources) -> GraphForward:
    """The forward pass that gave ``values``, with the energy and its sources there."""
    targets, invalid, updates, energies = {}, None, [], []
    for k, (loss, y) in problem.losses.items():
        output = values[k]
        loss.check_target(tuple(output.shape), y)
        if loss.known:
            prepared = loss.prepare(output, y, raise_now=problem.raise_now)
            flaw = prepared.invalid_labels
            invalid = flaw if invalid is None or flaw is None else invalid | flaw
            targets[k] = _Target(
                lambda mu, loss=loss, prepared=prepared: loss.value_prepared(prepared, mu),
                lambda mu, loss=loss, prepared=prepared: loss.gradient(prepared, mu),
                prepared,
            )
            gradient = targets[k].gradient_at(output)
        else:
            targets[k] = _Target(
                lambda mu, loss=loss, y=y: loss.value(mu, y),
                lambda mu, loss=loss, y=y: loss.gradient_by_autograd(mu, y),
            )
            gradient, found = loss.gradients_by_autograd(output, y, parameters=problem.wanted.gradients)
            updates += found
        energies.append(targets[k].value_at(output) * problem.weights[k])
        sources[k] = weighted(gradient, problem.weights[k])
    energies += [node_energy(e, problem.weights[k]) for k, e in enumerate(errors) if e is not None]
    state = next(v for v in values if v.is_floating_point()).dtype
    total = torch.stack(energies).sum() if energies else torch.zeros((), dtype=state, device=problem.x.device)
    return GraphForward(nodes, values, errors, sources, targets, total, updates, invalid)
