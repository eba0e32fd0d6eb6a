"""What would run, and why; on a GPU that is here or on a chip that is not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .backends import BACKENDS, chips, choose_backend
from .backends.chips import Chip
from .backends.choice import requested
from .errors import ArgumentError, ArgumentTypeError, ShapeError
from .graph import GraphPlan, choose
from .graph.run import BACKENDS as GRAPH_BACKENDS
from .graph.run import ONLY_CHAINS
from .losses import LossLike
from .model.describe import describe
from .model.graph import Graph
from .model.graph_spec import GraphSpec, describe_graph
from .model.placement import common_placement
from .model.spec import Network
from .precision import choose_precision
from .problem import validation
from .problem.belief_optimizers import PLAIN, BeliefOptimizer
from .problem.nudging import Nudging
from .problem.plan import ALIASES, Plan, plan
from .problem.settings import Settings
from .relaxation import cuda_graphs, on_graphs


@dataclass(frozen=True, repr=False)
class Explanation:
    """A plan in words; ``print`` it.

    Attributes:
        network: the model as pcfast reads it.
        plan: backend, Gram form, precision, exact work. Its backend is "" where several are left that only a
            measurement on the device tells apart (:attr:`candidates`).
        refused: backend -> why it does not run.
        kernels: what the backend says about the layers, where it has kernels of its own.
        chip: that was asked for by name; None for a device.
        candidates: with backend "auto" on a chip that is not here: backend -> what it says about the layers.
    """

    network: Network
    plan: Plan
    refused: dict[str, str]
    kernels: tuple[str, ...] = ()
    chip: Chip | None = None
    candidates: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        plan = self.plan
        said = [alias for alias, method in ALIASES.items() if method == plan.method]
        method = f"{plan.method} ({' or '.join(said)})" if said else plan.method
        where = f"backend {plan.backend}" if plan.backend else f"one of {', '.join(self.candidates)}"
        lines = [f"{method}, {plan.num_steps} iterations, on {where}"]
        if self.chip is not None:
            lines += [f"  {line}" for line in _chip_in_words(self.chip)]
        if self.candidates:
            lines.append(f"  {MEASURED_THERE}")
        lines += [f"  {name} refused: {reason}" for name, reason in self.refused.items()]
        if not plan.belief_optimizer.plain:
            lines.append(f"beliefs move by {plan.belief_optimizer}")
        state, operand = (
            str(d).removeprefix("torch.") for d in (plan.precision.state, plan.precision.operand)
        )
        if plan.literal:
            lines.append("precision: the model's own")
        else:
            lines.append(f"precision: state {state}, matrix operands {operand}")
        if plan.precision.note:
            lines.append(f"  {plan.precision.note}")
        lines.append(f"Gram form of layer 1: {'yes' if plan.gram else 'no'} ({plan.gram_reason})")
        if plan.literal:
            lines.append("multiply-adds a step: not counted for the literal loop")
        elif plan.method == "incremental":
            lines.append("multiply-adds a step: not counted where parameters move between iterations")
        elif plan.work is None:
            lines.append("multiply-adds a step: not known, an opaque layer hides its shapes")
        else:
            work = plan.work
            lines.append(
                f"multiply-adds a step: {work.total:,} = {work.forward:,} forward + {work.relaxation:,} relaxation "
                f"+ {work.gradients:,} weight gradients"
            )
        for layer, shapes in zip(self.network.layers, plan.shapes, strict=True):
            size = "shape not known" if shapes is None else f"{shapes[0]} -> {shapes[-1]}"
            lines.append(f"{layer.label}: {size}")
        lines += [f"  {op.name} runs through torch autograd: {op.why}" for op in self.network.opaque]
        lines += self.kernels
        for name, kernels in self.candidates.items():
            lines += [f"on backend {name}:", *(f"  {line}" for line in kernels or (NO_KERNELS,))]
        return "\n".join(lines)


#: What a plan for a chip that is not here cannot say.
MEASURED_THERE = (
    "which of these is faster, and with which tiles, is measured on the device: pcfast bench, pcfast tune"
)
NO_KERNELS = "PyTorch's operations: no kernels of its own"


def _chip_in_words(chip: Chip) -> list[str]:
    bound = f"compute capability {chip.capability[0]}.{chip.capability[1]}, {chip.sm_count} SMs, "
    bound += (
        f"{chip.shared_memory_per_block_bytes:,} bytes of shared memory per block, "
        f"{chip.shared_memory_per_sm_bytes:,} per SM, {chip.l2_bytes >> 20} MiB of L2, "
        f"{chip.memory_bandwidth_gbs:,g} GB/s"
    )
    stand_in = f", with the figures of an {chip.figures_of}" if chip.figures_of else ""
    return [f"for {chip.name}{stand_in}, planned without one: {bound}", f"figures from {chip.source}"]


@dataclass(frozen=True, repr=False)
class GraphExplanation:
    """What runs a graph that is no chain; ``print`` it.

    Attributes:
        spec: the graph as pcfast reads it.
        method: that is asked for.
        backend: that runs.
        refused: backend -> why it does not run.
    """

    spec: GraphSpec
    method: str
    backend: str
    refused: dict[str, str]

    def __repr__(self) -> str:
        lines = [f"{self.method} on a graph of {len(self.spec.nodes)} nodes, on backend {self.backend}"]
        lines += [f"  {name} refused: {reason}" for name, reason in self.refused.items()]
        for node in self.spec.nodes:
            inputs = ", ".join(self.spec.names[i] for i in node.inputs)
            lines.append(node.label + (f" <- {inputs}" if inputs else ""))
        lines += [f"  {op.name} runs through torch autograd: {op.why}" for op in self.spec.opaque]
        return "\n".join(lines)


def _of_graph(graph: Graph, method: str, backend: str) -> GraphExplanation | None:
    """None for a graph that is a chain."""
    spec = describe_graph(graph)
    if spec.is_chain():
        return None
    method = validation.checked_method(method, moves=True)
    where, dtype = common_placement(graph) or (torch.device("cpu"), torch.get_default_dtype())
    planned = GraphPlan(spec, (), (), method, 0, PLAIN, where, dtype, choose_precision(where.type, dtype))
    chosen = choose(requested(backend), planned)
    refused = {name: ONLY_CHAINS for name in BACKENDS if name not in GRAPH_BACKENDS} | dict(chosen.refusals)
    return GraphExplanation(spec, method, chosen.backend, refused)


def explain(
    model: nn.Sequential | Graph,
    x_shape: tuple[int, ...],
    device: str | torch.device | None = None,
    *,
    method: str = "strict",
    num_steps: int = 20,
    backend: str = "auto",
    step_size: float | Sequence[float] = 0.1,
    belief_optimizer: BeliefOptimizer | None = None,
    nudging: Nudging | None = None,
    vinit: list[Tensor | None] | float | None = None,
    loss: LossLike | None = None,
    reduction: str = "sum",
    update_scale: float = 1.0,
    tolerance: float | None = None,
) -> Explanation | GraphExplanation:
    """Say which backend would run, why the others were passed over, and the exact work.

    Args:
        model: ``nn.Sequential`` of PC layers; of a :class:`pcfast.Graph` that is no chain ``method`` and ``backend``
            alone are looked at.
        x_shape: shape of the input, batch included.
        device: where it would run; None means where the model is. A chip's name, "h200", "a100", "b200", "rtx4090"
            and others, or an architecture, "sm_90a", asks for a GPU that need not be here, by its published figures.
            Precision is that of torch's switches for CUDA; ``pcfast.precision.use_precision("bf16",
            torch.device("cuda"))`` is bfloat16 autocast also where torch sees no GPU.
        method, num_steps, backend, step_size, belief_optimizer, nudging, vinit, reduction, update_scale, tolerance:
            as for :func:`pcfast.pc_loss`, or method "incremental"; the work is that of all iterations.
        loss: as for :func:`pcfast.pc_loss`; None where it is not decided yet.

    Raises:
        ArgumentError and its kinds, BackendError.
    """
    if isinstance(model, Graph):
        graph = _of_graph(model, method, backend)
        if graph is not None:
            return graph
        model = on_graphs.sequential_of(model)
    network = describe(model)
    settings = Settings(
        loss, method, step_size, num_steps, belief_optimizer, nudging, backend, vinit, reduction, update_scale,
        tolerance=tolerance,
    )  # fmt: skip
    relaxing = settings.checked(moves=True)
    method, optimizer = relaxing.method, relaxing.belief_optimizer
    _, num_steps = validation.fixed_settings(method, network.depth, relaxing.step_size, relaxing.num_steps)
    described = settings.described_loss(known=False)
    try:
        shape = tuple(int(size) for size in x_shape)
    except (TypeError, ValueError):
        raise ArgumentTypeError("x_shape", repr(x_shape), "a tuple of ints, batch included") from None
    if len(shape) < 2 or min(shape) < 1:
        raise ShapeError("x_shape", str(shape), "(batch, ...) with positive sizes")
    where, dtype = common_placement(model) or (torch.device("cpu"), torch.get_default_dtype())
    chip = None
    if device is not None:
        where, chip = device_or_chip(device)
    if not isinstance(vinit, list | tuple):
        validation.check_start_of_all(vinit, method)
    fresh = vinit is None and (optimizer.rests or num_steps == 0)
    kind = "cross_entropy" if described is None else described.kind
    planned = plan(
        network, where, dtype, shape, choose_precision(where.type, dtype), method, num_steps, fresh,
        loss=kind, belief_optimizer=optimizer, nudging=nudging, tolerance=relaxing.tolerance,
    )  # fmt: skip
    with contextlib.nullcontext() if chip is None else chips.planning_for(chip):
        asked = requested(backend)
        if chip is not None and asked == "auto":
            return _by_candidates(network, planned, chip)
        chosen, planned = choose_backend(backend, planned, graphs=cuda_graphs.switched_on())
        refused = dict(planned.refusals)
        for name in BACKENDS:
            if name != chosen.name and name not in refused:
                wanted = (
                    f'backend="{asked}" was asked for' if asked != "auto" else f"{chosen.name} comes first"
                )
                refused[name] = wanted
        return Explanation(network, planned, refused, tuple(chosen.describe(planned)), chip)


def device_or_chip(device: str | torch.device) -> tuple[torch.device, Chip | None]:
    """What ``device`` names: a device that is here, or CUDA and the chip to plan for in its place.

    Raises:
        ArgumentError: neither; the message has the chips' names.
    """
    if isinstance(device, str) and (chip := chips.by_name(device)):
        return torch.device("cuda"), chip
    try:
        return validation.checked_device(device), None
    except ArgumentError as error:
        needed = f"{error.needed}; or a chip that need not be here: {chips.names()}"
        raise ArgumentError("device", error.given, needed, error.remedy) from error


def _by_candidates(network: Network, planned: Plan, chip: Chip) -> Explanation:
    """What "auto" has to choose from on a chip that is not here: every backend that runs the plan there."""
    answers = {name: backend.supports(planned) for name, backend in BACKENDS.items()}
    refused = {name: reason for name, (ok, reason) in answers.items() if not ok}
    able = [BACKENDS[name] for name, (ok, _) in answers.items() if ok]
    fast = [backend for backend in able if not backend.literal]
    if len(fast or able) > 1:
        kernels = {backend.name: tuple(backend.describe(planned)) for backend in fast}
        refused |= {backend.name: "it is the literal loop" for backend in able if backend.literal}
        return Explanation(network, planned, refused, chip=chip, candidates=kernels)
    chosen, planned = choose_backend((fast or able)[0].name, planned)
    refused |= {backend.name: f"{chosen.name} comes first" for backend in able if backend is not chosen}
    return Explanation(network, planned, refused, tuple(chosen.describe(planned)), chip)
