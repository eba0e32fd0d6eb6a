"""Values of the layers of a chain, or of the nodes of a graph, one each."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from .belief_optimizers import StepSize
from .validation import checked_step_sizes


class PerLayer:
    """One value for each layer of an ``nn.Sequential``, the first for layer 1.

        pcfast.pc_loss(model, x, y, step_size=pcfast.PerLayer(0.2, 0.1, 0.05))

    A plain sequence of step sizes is a schedule over the iterations. The output's beliefs do not move, so that a step
    size for the last layer may be left out.
    """

    def __init__(self, *values: float | Sequence[float] | Tensor) -> None:
        if not values:
            raise ArgumentError("values", "none", "one for each layer", "E.g. pcfast.PerLayer(0.2, 0.1).")
        self.values = values

    def __repr__(self) -> str:
        return f"PerLayer({', '.join(map(repr, self.values))})"


def _by_name(argument: str, given, names: Sequence[str], chain: bool) -> Mapping[str, object]:
    """``given`` values by name: a mapping, or of a chain a sequence, whose first name is the input's."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise ArgumentError(argument, f"the name {name!r}", f"names of nodes: {', '.join(names)}")
        return given
    values = given.values if isinstance(given, PerLayer) else tuple(given)
    if not chain:
        raise ArgumentTypeError(
            argument, f"a {type(given).__name__} for a Graph", "a number, or a mapping from nodes' names",
            "A Graph has no order of layers.",
        )  # fmt: skip
    layers = names[1:]
    least = len(layers) - 1 if argument == "step_size" else len(layers)
    if not max(least, 1) <= len(values) <= len(layers):
        raise ArgumentError(argument, f"{len(values)} values", f"{len(layers)}, one for each layer")
    return dict(zip(layers, values, strict=False))


def step_sizes(
    given, names: Sequence[str], free: Sequence[str], num_steps: int, chain: bool
) -> list[StepSize]:
    """The step size of every node, checked; those that do not move have 0 where none is given.

    Raises:
        ArgumentError and its kinds: an unknown name, a node that moves without a step size, no step size.
    """
    if not isinstance(given, Mapping | PerLayer):
        return [checked_step_sizes(given, num_steps)] * len(names)
    values = _by_name("step_size", given, names, chain)
    missing = [name for name in free if name not in values]
    if missing:
        raise ArgumentError(
            "step_size", f"none for {', '.join(missing)}", "one for each node whose beliefs move",
            "{**dict.fromkeys(graph.names, 0.1), ...} gives all of them one.",
        )  # fmt: skip
    return [checked_step_sizes(values[name], num_steps) if name in values else 0.0 for name in names]


def precisions(given, names: Sequence[str], chain: bool) -> list[float | Tensor]:
    """The precision of every node, checked; 1 where none is given.

    Raises:
        ArgumentError and its kinds: an unknown name, or a value that is no precision.
    """
    if given is None:
        return [1.0] * len(names)
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        return [checked_precision("precision", given)] * len(names)
    if not isinstance(given, Mapping | PerLayer | list | tuple):
        raise ArgumentTypeError(
            "precision",
            f"a {type(given).__name__}",
            "a number, one for each layer, or a mapping from nodes' names",
        )
    values = _by_name("precision", given, names, chain)
    return [checked_precision(f"precision[{n!r}]", values[n]) if n in values else 1.0 for n in names]


def checked_precision(argument: str, value) -> float | Tensor:
    """A finite number >= 0, or a tensor of them, one a unit."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not bool((value.isfinite() & (value >= 0)).all()):
            raise ArgumentError(argument, "a tensor", "finite floating values >= 0", "E.g. 1 / variance.")
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(
            argument, f"a {type(value).__name__}", "a number >= 0, or a tensor of one a unit"
        )
    if not math.isfinite(value) or value < 0:
        raise ArgumentError(argument, repr(value), "a finite number >= 0", "E.g. 1 / variance.")
    return float(value)
