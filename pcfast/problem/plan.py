"""Planning: pure functions from a described problem to a frozen, self-explaining plan.

Counts of multiply-adds here are exact: they count the products that the clamped input (docs/method.md fact 2), the
active front (fact 3) and the Gram form (fact 7) leave, and are what every speed claim is held against.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ..model import spec as specs
from ..precision import Precision
from ..support.hashing import hashed_once
from .belief_optimizers import PLAIN, BeliefOptimizer
from .nudging import Nudging
from .types import NOTHING_BUT_UPDATES, Wanted

METHODS = ("exact", "fixed_prediction", "strict", "error_based", "zero_divergence")
#: What trains a network: the methods, and what moves parameters in every iteration (incremental.py).
TRAINING_METHODS = (*METHODS, "incremental")
#: The field's other words for them: PCX, JPC and the ePC program call strict relaxation PC or sPC.
ALIASES = {
    "pc": "strict", "spc": "strict", "ipc": "incremental", "epc": "error_based", "bp": "exact",
}  # fmt: skip
#: Those that iterate; the others are one forward and one backward pass.
LOOPS = ("strict", "error_based", "incremental")


def canonical(method: str) -> str:
    """The name of a method that may be given by one of :data:`ALIASES`; whatever else as it is."""
    return ALIASES.get(method, method) if isinstance(method, str) else method


def in_words() -> str:
    """The aliases, for messages and help texts."""
    return ", ".join(f"{alias} = {method}" for alias, method in ALIASES.items())


@dataclass(frozen=True)
class Work:
    """Multiply-adds of the matrix products of one training step."""

    forward: int
    relaxation: int
    gradients: int

    @property
    def total(self) -> int:
        return self.forward + self.relaxation + self.gradients


@hashed_once
@dataclass(frozen=True)
class Plan:
    """What is asked for, as far as it does not change from batch to batch, and what will run.

    Attributes:
        network, device, dtype: the model's.
        x_shape: of the input, batch included.
        method, num_steps: as for :func:`pcfast.relax`.
        fresh: the relaxation starts from the forward pass and moves only what errors reach (active front and Gram
            form, docs/method.md facts 3 and 7, hold).
        wanted: what the caller will read.
        loss: "cross_entropy", "mse" or "callable"; None where the gradient at the output is given instead.
        belief_optimizer: how beliefs move.
        nudging: of the target, or None.
        tolerance: of the early exit (early_exit.py), or None.
        precision: dtypes; they do not apply to the literal loop.
        shapes: per layer the shapes at its operations' boundaries; None from the first opaque one on.
        gram: the clamped layer runs in Gram form.
        gram_reason: why, or why not.
        work: exact count of multiply-adds; None where shapes are not known, for the literal loop and "incremental".
        backend: name of the backend that runs; "" before one was chosen.
        refusals: (backend, reason) for every backend that was passed over.
        literal: the literal loop, in the model's own dtype and with no short cuts.
        contenders: backends among which "auto" chooses once they were timed; until then ``backend`` runs.
    """

    network: specs.Network
    device: torch.device
    dtype: torch.dtype
    x_shape: tuple[int, ...]
    method: str
    num_steps: int
    fresh: bool
    wanted: Wanted
    loss: str | None
    belief_optimizer: BeliefOptimizer
    nudging: Nudging | None
    tolerance: float | None
    precision: Precision
    shapes: tuple
    gram: bool
    gram_reason: str
    work: Work | None
    backend: str = ""
    refusals: tuple[tuple[str, str], ...] = ()
    literal: bool = False
    contenders: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """L."""
        return self.network.depth

    @property
    def relaxations(self) -> int:
        """How many run one after another from one forward pass."""
        return _relaxations(self.nudging)


def _relaxations(nudging: Nudging | None) -> int:
    return 1 if nudging is None else len(nudging.pushes)


@dataclass(frozen=True)
class _Cost:
    """Multiply-adds of one operation or of a chain of them, and whether it has weights.

    Attributes:
        product: of one product with each of its weight matrices.
        point: of making an input the current point where nobody reads the output (Step.at).
        reach: that an error passes inside it on its way down to its lowest weights.
    """

    product: int
    point: int
    reach: int
    weights: bool


def _op_cost(op: specs.Op, shape: specs.Shape) -> _Cost:
    if isinstance(op, specs.Residual):
        return _chain_cost(op.ops, op.inner_shapes(shape))
    product = op.macs(shape)
    return _Cost(product, point=0, reach=0, weights=op.has_parameters)


def _chain_cost(ops: tuple[specs.Op, ...], shapes: tuple[specs.Shape, ...]) -> _Cost:
    """shapes: at the operations' boundaries."""
    costs = [_op_cost(op, shape) for op, shape in zip(ops, shapes[:-1], strict=True)]
    product = sum(cost.product for cost in costs)
    point = product - costs[-1].product + costs[-1].point if costs else 0
    lowest = next((i for i, cost in enumerate(costs) if cost.weights), None)
    if lowest is None:
        return _Cost(product, point, 0, weights=False)
    reach = costs[lowest].reach + sum(cost.product for cost in costs[lowest + 1 :])
    return _Cost(product, point, reach, weights=True)


def _layer_costs(network: specs.Network, shapes: tuple) -> list[_Cost]:
    return [_chain_cost(layer.ops, inner) for layer, inner in zip(network.layers, shapes, strict=True)]


def layer_macs(network: specs.Network, shapes: tuple) -> list[int]:
    """Multiply-adds of one product through each layer."""
    return [cost.product for cost in _layer_costs(network, shapes)]


def gram_macs(network: specs.Network, shapes: tuple) -> int:
    """Multiply-adds of one product with the Gram matrix of layer 2, which must have one."""
    return _gram_cost(network, shapes)[1]


def _gram_cost(network: specs.Network, shapes: tuple) -> tuple[int, int, int] | str:
    """(building G, one product with G, one product with W) of layer 2's first operation, or why it has no G."""
    if network.depth < 2:
        return "there is one layer only"
    layer = network.layers[1]
    head = layer.ops[0] if layer.ops else None
    if isinstance(head, specs.Residual):
        return "layer 2 begins with a residual block, whose skip reads layer 1's beliefs"
    if not isinstance(head, specs.Linear | specs.Conv2d):
        why = (
            ": the derivative of its activation is each row's own"
            if isinstance(head, specs.Elementwise)
            else ""
        )
        return f"layer 2 does not begin with a linear layer or a convolution{why}"
    if isinstance(head, specs.Conv2d) and (
        head.stride != (1, 1) or head.padding != (0, 0) or head.dilation != (1, 1) or head.groups != 1
    ):
        return "layer 2's convolution is strided, padded, dilated or grouped"
    if shapes[1] is None:
        return "the shape of layer 2's input is not known before an opaque module has run"
    shape_in, shape_out = shapes[1][:2]
    if isinstance(head, specs.Linear):
        rows = head.macs(shape_in) // (head.in_features * head.out_features)
        build = head.in_features * head.out_features**2
        apply = rows * head.out_features**2
    else:
        rows, columns = head.kernel
        span = (2 * rows - 1) * (2 * columns - 1)
        build = span * head.out_channels**2 * head.in_channels * rows * columns
        apply = shape_out[0] * shape_out[2] * shape_out[3] * head.out_channels**2 * span
    return build, apply, head.macs(shape_in)


def strict_products(depth: int, num_steps: int, fresh: bool, layer: int) -> tuple[int, int]:
    """How often strict relaxation multiplies by layer ``layer``'s weights: (predictions, feedbacks).

    Layer 1's prediction is constant and nothing below it moves, so it counts (0, 0). From a forward-pass
    start, iteration t works on predictions l > L-t+1 and feeds back through l > L-t (active front, fact 3).
    """
    if layer == 1:
        return 0, 0
    if not fresh:
        return num_steps, num_steps
    return max(0, num_steps - (depth - layer + 1)), max(0, num_steps - (depth - layer))


def count_work(
    network: specs.Network,
    shapes: tuple,
    method: str,
    num_steps: int,
    fresh: bool,
    gram: bool,
    relaxations: int = 1,
) -> Work | None:
    """Exact multiply-adds of one training step (every parameter trained).

    With several ``relaxations`` the layers whose input has moved are evaluated at the forward pass again in between.
    """
    if any(inner is None for inner in shapes):
        return None
    if method == "incremental":
        return None  # which products are left depends on what the optimiser moves
    depth, costs = network.depth, _layer_costs(network, shapes)
    forward = sum(cost.product for cost in costs)
    if method == "error_based":
        return _error_based_work(costs, num_steps)
    if method not in LOOPS:
        feedback = forward - costs[0].product + costs[0].reach
        return Work(forward, feedback, forward)
    relaxation = gradients = once = between = 0
    lowest_error = max(1, depth - num_steps + 1) if fresh else 1
    if num_steps == 0:
        lowest_error = depth if fresh else 1
    for layer, cost in enumerate(costs, start=1):
        predictions, feedbacks = strict_products(depth, num_steps, fresh, layer)
        if layer >= lowest_error:
            gradients += cost.product + cost.reach
        # masks at the last beliefs need every product but that of the layer's last operation
        moved_input = layer > 1 and (not fresh or layer - 1 >= depth - num_steps)
        final = cost.point if moved_input else 0
        between += cost.product if moved_input else 0
        if gram and layer == 2 and feedbacks:
            build, apply, head = _gram_cost(network, shapes)
            once += build
            relaxation += feedbacks * apply + min(feedbacks, 2) * head
            # further products inside layer 2 stay as they are
            alone = len(network.layers[1].ops) == 1
            relaxation += (predictions + feedbacks) * (cost.product - head) + (0 if alone else final - head)
        else:
            relaxation += (predictions + feedbacks) * cost.product + final
    relaxation = once + relaxations * relaxation + (relaxations - 1) * between
    return Work(forward, relaxation, relaxations * gradients)


def _error_based_work(costs: list[_Cost], num_steps: int) -> Work:
    """Every iteration pulls the output's error down to layer 2 and recomputes layers 2..L at the new errors."""
    forward = sum(cost.product for cost in costs)
    lowest_error = 1 if num_steps else len(costs)
    gradients = sum(cost.product + cost.reach for cost in costs[lowest_error - 1 :])
    return Work(forward, 2 * num_steps * (forward - costs[0].product), gradients)


def choose_gram(
    network: specs.Network,
    shapes: tuple,
    method: str,
    num_steps: int,
    fresh: bool,
    energies: bool,
    belief_optimizer: BeliefOptimizer = PLAIN,
) -> tuple[bool, str]:
    """Whether the clamped layer runs in Gram form (fact 7), and why.

    One relaxation decides: with several the Gram matrix is built once, which makes it cheaper still.
    """
    if method == "error_based":
        return False, "error_based recomputes layer 1's state from its error"
    if method == "incremental":
        return False, "the parameters move between iterations"
    if method not in LOOPS:
        return False, f"{method} has no loop"
    if not belief_optimizer.linear:
        return False, f"layer 1's beliefs are not linear in its errors with {belief_optimizer}"
    if not fresh:
        return False, "the relaxation does not start from the forward pass"
    if energies:
        return False, "energies need layer 1's error in every iteration"
    cost = _gram_cost(network, shapes)
    if isinstance(cost, str):
        return False, cost
    if strict_products(network.depth, num_steps, fresh, 2)[1] == 0:
        return False, "the relaxation ends before it reaches layer 1"
    if any(inner is None for inner in shapes):
        predictions, feedbacks = strict_products(network.depth, num_steps, fresh, 2)
        plain = (predictions + feedbacks) * cost[2]
        gram = cost[0] + feedbacks * cost[1] + min(feedbacks, 2) * cost[2]
    else:
        plain, gram = (
            count_work(network, shapes, method, num_steps, fresh, form).relaxation for form in (False, True)
        )
    comparison = f"{gram:,} multiply-adds in Gram form, {plain:,} without"
    return gram < plain, comparison


@functools.lru_cache(maxsize=256)
def plan(
    network: specs.Network,
    device: torch.device,
    dtype: torch.dtype,
    x_shape: tuple[int, ...],
    precision: Precision,
    method: str = "strict",
    num_steps: int = 20,
    fresh: bool = True,
    wanted: Wanted = NOTHING_BUT_UPDATES,
    loss: str | None = "cross_entropy",
    belief_optimizer: BeliefOptimizer = PLAIN,
    nudging: Nudging | None = None,
    tolerance: float | None = None,
) -> Plan:
    """Plan one problem, before a backend is chosen (:func:`on_backend`); arguments as :class:`Plan`'s attributes.

    Cached: the arguments compare by value, the network by its layer specs.

    Raises:
        ShapeError: the input does not fit the network.
    """
    shapes = network.shapes(x_shape)
    energies = wanted.energies or tolerance is not None
    gram, gram_reason = choose_gram(network, shapes, method, num_steps, fresh, energies, belief_optimizer)
    work = count_work(network, shapes, method, num_steps, fresh, gram, _relaxations(nudging))
    return Plan(
        network, device, dtype, x_shape, method, num_steps, fresh, wanted, loss, belief_optimizer, nudging, tolerance,
        precision, shapes, gram, gram_reason, work,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def on_backend(
    planned: Plan,
    backend: str,
    refusals: tuple[tuple[str, str], ...] = (),
    *,
    literal: bool = False,
    contenders: tuple[str, ...] = (),
) -> Plan:
    """``planned``, to run on ``backend``. A ``literal`` one takes no short cuts, so there is nothing to count."""
    chosen = replace(planned, backend=backend, refusals=refusals, contenders=contenders)
    if not literal:
        return chosen
    reason = f"the {backend} backend runs the literal loop"
    return replace(chosen, literal=True, gram=False, gram_reason=reason, work=None)


@functools.lru_cache(maxsize=256)
def undecided(planned: Plan) -> Plan:
    """``planned`` before a backend was chosen for it; not for a literal one."""
    return replace(planned, backend="", refusals=(), contenders=())
