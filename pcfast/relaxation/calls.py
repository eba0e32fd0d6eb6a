"""Calls of one kind with one model: validated and planned at the first, and recognised from the second on.

Two calls are of one kind where everything is equal that validation and planning read, the model's snapshot aside:
settings, shapes, dtypes and flags of what is given, torch's switches. What depends on values is looked at in each.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..backends import choose_backend, generation
from ..backends.choice import requested
from ..errors import ArgumentError
from ..losses import Loss
from ..model.snapshot import Snapshot
from ..precision import choose_precision
from ..problem import reductions, validation
from ..problem.belief_optimizers import StepSize
from ..problem.plan import LOOPS, Plan, plan
from ..problem.settings import BEYOND_CHAINS, PLAIN, Settings
from ..problem.types import Wanted
from . import cuda_graphs

#: Kinds that are kept of one model.
_CAPACITY = 64

# of Settings, the loss aside, and what no chain's relaxation reads
_NAMES = tuple(field.name for field in fields(Settings) if field.name not in ("loss", *BEYOND_CHAINS))
_read = operator.attrgetter(*_NAMES)
_STEP_SIZE = _NAMES.index("step_size")
_NUMBERS = frozenset((int, float))
# torch 2.13 has no named dimensions any more
_has_names = getattr(Tensor, "has_names", lambda tensor: False)


@dataclass
class Call:
    """What is known of calls of one kind.

    Attributes:
        backend: as asked for.
        planned: before a backend is chosen.
        loss: described, of a loss that is given by name; else None.
        step_size: of the sum over rows.
        raise_now, deferred: as for :class:`pcfast.problem.types.Problem`.
    """

    backend: str
    planned: Plan
    loss: Loss | None
    step_size: StepSize
    raise_now: bool
    deferred: bool
    _chosen: tuple[Hashable, Plan] | None = field(default=None, repr=False)

    def on_backend(self) -> tuple[str, Plan]:
        """The backend asked for, and the plan for the one that runs; chosen anew where what decides has changed."""
        asked, graphs, chosen = requested(self.backend), cuda_graphs.switched_on(), self._chosen
        # what products read (precision.kernel_operands) decides where the resident kernel can place its arrays
        products = torch.backends.cuda.matmul.fp32_precision
        convolutions = torch.backends.cudnn.conv.fp32_precision if self.planned.device.type == "cuda" else ""
        state = generation.current(), asked, graphs, products, convolutions
        if chosen is None or chosen[0] != state:
            _, planned = choose_backend(asked, self.planned, graphs=graphs, may_qualify=True)
            # what was found for the moment alone has changed the generation by now, so that the next call asks again
            chosen = self._chosen = state, planned
        return asked, chosen[1]


def key_of(
    x, y, settings: Settings, loss: Loss | None, wanted: Wanted, output_gradient, move
) -> Hashable | None:
    """Equal for calls of one kind; None where a call has none. ``loss``: described, where it is not given by name."""
    x, y = _facts(x), _facts(y)
    if x is None or y is None:
        return None
    given = _read(settings)
    kinds = list(map(type, given))  # True equals 1
    if not PLAIN.issuperset(kinds):
        given = _with_schedule(given)
        if given is None:
            return None
    device = x[3].type if len(x) > 1 else "cpu"
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    described = settings.loss if type(settings.loss) is str else loss and (loss.kind, loss.settings)
    return (
        given, tuple(kinds), described, x, y, wanted, output_gradient is None, move is None, autocast,
        torch.is_grad_enabled(), torch.get_default_dtype(),
    )  # fmt: skip


def _with_schedule(given: tuple) -> tuple | None:
    """The settings with their list of step sizes as a tuple; None where others are not plain either."""
    sizes = given[_STEP_SIZE]
    others = (*given[:_STEP_SIZE], *given[_STEP_SIZE + 1 :])
    if type(sizes) not in (list, tuple) or not _NUMBERS.issuperset(map(type, sizes)):
        return None
    return (*others, tuple(sizes)) if PLAIN.issuperset(map(type, others)) else None


def _facts(value) -> tuple | None:
    """What validation reads of an argument; None of a tensor of a kind that it refuses."""
    if not isinstance(value, Tensor):
        return (type(value),)
    if value.is_nested or value.layout is not torch.strided or value.is_meta or _has_names(value):
        return None
    return type(value), value.shape, value.dtype, value.device, value.requires_grad


def remember(known: Snapshot, key: Hashable | None, call: Call) -> None:
    """Have ``known.calls`` answer for ``key`` from now on."""
    if key is not None:
        if len(known.calls) >= _CAPACITY:
            known.calls.clear()
        known.calls[key] = call


def understood(
    known: Snapshot, x, y, settings: Settings, loss: Loss | None, wanted: Wanted, output_gradient, move
) -> Call:
    """Validate and plan; arguments as for :func:`key_of`.

    Raises:
        ArgumentError and its kinds.
    """
    network = known.network
    relaxing = settings.checked(moves=move is not None)
    method, optimizer = relaxing.method, relaxing.belief_optimizer
    step_size, num_steps = validation.fixed_settings(
        method, network.depth, relaxing.step_size, relaxing.num_steps
    )
    dtype = validation.check_input(x, network, known.placement)
    if not (x.is_floating_point() or x.is_complex()):
        wanted = replace(wanted, input_error=False)  # integers do not move
    if method == "incremental":
        validation.check_moving_precision(x.device.type, dtype)
    if settings.reduction != "sum":
        rows = reductions.rows_of(x, settings.normalizer)
        optimizer, step_size = reductions.of_beliefs(settings.reduction, rows, optimizer, step_size)
    by_name = loss is None
    if by_name and output_gradient is None:
        loss = settings.described_loss()
    if loss is not None:
        if loss.known and dtype.is_complex and not network.opaque:
            raise ArgumentError(
                "loss", f"{loss.kind} of a complex output", "a loss of your own with a real value",
                "E.g. loss=lambda output, y: (output - y).abs().square().sum().",
            )  # fmt: skip
        validation.check_target_placement(x, y, by_rows=loss.known)
    deferred = settings.defers_checks(x)
    precision = choose_precision(x.device.type, dtype)
    fresh = settings.vinit is None and (optimizer.rests or num_steps == 0)
    planned = plan(
        network, x.device, dtype, tuple(x.shape), precision, method, num_steps, fresh, wanted, loss and loss.kind,
        optimizer, settings.nudging, relaxing.tolerance,
    )  # fmt: skip
    if method in LOOPS:
        validation.check_step_fits(step_size, precision.state)
    raise_now = not x.is_cuda and not deferred
    return Call(settings.backend, planned, loss if by_name else None, step_size, raise_now, deferred)
