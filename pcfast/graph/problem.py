"""What a relaxation on a graph is asked for and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..losses import Loss
from ..model.graph_spec import GraphSpec
from ..precision import Precision
from ..problem.belief_optimizers import BeliefOptimizer, StepSize, step_size_of
from ..problem.nudging import Nudging
from ..problem.types import Outcome, Wanted

Weight = float | Tensor  # a node's precision: a number, or one a unit


@dataclass(frozen=True)
class GraphPlan:
    """What runs, as far as it does not change from batch to batch.

    Attributes:
        spec: the graph.
        clamped, targets: names of nodes that are held at values, and of those whose prediction a loss is taken at.
        method, num_steps, belief_optimizer, device, dtype, precision: as in :class:`pcfast.problem.plan.Plan`.
        backend: "reference" or "eager".
        refusals: (backend, reason) for those that were passed over.
    """

    spec: GraphSpec
    clamped: tuple[str, ...]
    targets: tuple[str, ...]
    method: str
    num_steps: int
    belief_optimizer: BeliefOptimizer
    device: torch.device
    dtype: torch.dtype
    precision: Precision
    backend: str = ""
    refusals: tuple[tuple[str, str], ...] = ()


@dataclass(eq=False)
class GraphProblem:
    """One relaxation, validated. Dicts are by a node's index in ``spec.nodes``; nobody changes them.

    Attributes:
        model: whose modules the paths of ``spec`` name.
        rows: of the batch.
        clamped: values of the nodes that are held.
        losses: (loss, target) of the nodes whose prediction a loss is taken at; they have no beliefs of their own.
        start: beliefs that free nodes start at, a number for all units; others start at their prediction, or at zero.
        step_sizes: eta_k of every node.
        weights: pi_k of every node, of a loss's node what the loss counts.
        temperature: of the Langevin noise; 0 for none.
        generator: what draws it; None for torch's own.
        check, raise_now, move: as in :class:`pcfast.problem.types.Problem`.
        nudging: of the losses' targets, or None.
        tolerance: of an early exit, or None.
        wanted: what the caller will read.
    """

    model: nn.Module
    spec: GraphSpec
    rows: int
    clamped: dict[int, Tensor]
    losses: dict[int, tuple[Loss, object]]
    start: dict[int, Tensor | float]
    step_sizes: list[StepSize]
    weights: list[Weight]
    wanted: Wanted
    method: str
    num_steps: int
    optimizer: BeliefOptimizer
    temperature: float = 0.0
    generator: torch.Generator | None = None
    raise_now: bool = True
    deferred: bool = False
    check: bool = True
    move: object = None
    nudging: Nudging | None = None
    tolerance: float | None = None

    @property
    def x(self) -> Tensor:
        """One of the tensors given: where it lies, everything lies."""
        targets = (y for _, y in self.losses.values() if isinstance(y, Tensor))
        return next(value for value in (*self.clamped.values(), *targets))

    @property
    def step_size(self) -> StepSize:
        """The largest, for messages that name no node."""
        return max(
            self.step_sizes, key=lambda size: max(size, default=0.0) if isinstance(size, tuple) else size
        )

    @property
    def free(self) -> list[int]:
        """Nodes whose beliefs move."""
        return [k for k in range(len(self.spec.nodes)) if k not in self.clamped and k not in self.losses]

    @property
    def last_arrival(self) -> int:
        """The iteration that finds an error at the last of the nodes that errors reach from predictions."""
        nodes, free, t = self.spec.nodes, self.free, 1
        reached = {k for k in (*self.clamped, *self.losses) if nodes[k].kind != "root"}
        while True:
            moved = {k for k in free if k in reached or reached.intersection(self.spec.children[k])}
            changed = moved | {c for k in moved for c in self.spec.children[k]}
            changed = {k for k in changed if nodes[k].kind != "root"}
            if changed <= reached:
                return t
            reached, t = reached | changed, t + 1

    def start_of(self, node: int, like: Tensor) -> Tensor:
        """What a free node's beliefs start at; ``like``: its prediction, in the dtype to start in.

        Raises:
            ShapeError: a start of another shape.
        """
        start = self.start.get(node, like)
        if not isinstance(start, Tensor):
            return torch.full_like(like, start)
        if start.shape != like.shape:
            raise ShapeError(
                f"vinit[{self.spec.names[node]!r}]", f"shape {tuple(start.shape)}",
                f"{tuple(like.shape)}, that of the node's prediction",
            )  # fmt: skip
        return start.to(like.dtype)

    def check_weight(self, node: int, shape: tuple[int, ...]) -> None:
        """Raise ShapeError where a tensor of precisions is not one a unit of values of ``shape`` (rows, ...)."""
        weight = self.weights[node]
        if isinstance(weight, Tensor) and tuple(weight.shape) != tuple(shape[1:]):
            raise ShapeError(
                f"precision[{self.spec.names[node]!r}]", f"shape {tuple(weight.shape)}",
                f"{tuple(shape[1:])}, one a unit",
            )  # fmt: skip

    def step_size_at(self, node: int, iteration: int) -> float:
        """eta_t of a node."""
        return step_size_of(self.step_sizes[node], iteration)

    def noise(self, like: Tensor, node: int, iteration: int) -> Tensor:
        """What Langevin noise adds to beliefs in an iteration: sqrt(2 eta T) times standard normal numbers."""
        scale = math.sqrt(2 * self.step_size_at(node, iteration) * self.temperature)
        drawn = torch.empty(like.shape, dtype=like.dtype, device=like.device).normal_(
            generator=self.generator
        )
        return drawn.mul_(scale)


@dataclass
class GraphOutcome(Outcome):
    """As :class:`pcfast.problem.types.Outcome`: lists run over the nodes, ``loss`` is the energy at the start.

    Attributes:
        outputs: predictions of the graph's outputs at the start.
        settled: of nodes that a loss is taken at, by index, their predictions as the last iteration found them.
    """

    outputs: list[Tensor] = field(default_factory=list)
    settled: dict[int, Tensor] = field(default_factory=dict)


def weighted(error: Tensor | None, weight: Weight) -> Tensor | None:
    """pi eps; None for zero."""
    if error is None or (isinstance(weight, float) and weight == 1.0):
        return error
    return error * weight


def node_energy(error: Tensor, weight: Weight) -> Tensor:
    """pi |eps|^2 / 2, 0-dim."""
    return 0.5 * (error.abs().square() * weight).sum()
