"""Fixed prediction's closed form: one scalar a layer (docs/method.md fact 1)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from .errors import RelaxationDiverged


def scalar_chain(depth: int, step_size: float) -> Iterator[tuple[float, ...]]:
    """The scalar recursion that fixed prediction is (docs/method.md fact 1), in float64.

    Yields (c_0(t), ..., c_L(t)) for t = 0, 1, 2, ...: c_0 = 1, c_d(0) = 0,
    c_d(t+1) = (1 - eta) c_d(t) + eta c_{d-1}(t). c_d belongs to layer L-d.
    """
    row = (1.0,) + (0.0,) * depth
    while True:
        yield row
        row = (1.0, *((1 - step_size) * row[d] + step_size * row[d - 1] for d in range(1, depth + 1)))


@functools.lru_cache(maxsize=256)
def fixed_prediction_factors(
    depth: int, num_steps: int, step_size: float, limit: float | None = None, lowest: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The factors of g_{L-d}, d = 0..L, after ``num_steps`` iterations of fixed prediction.

    Returns:
        ``(errors, beliefs)``: c_d(n-1) of the last iteration's errors (c_d(0) for n = 0), and c_d(n) of the
        beliefs vhat_{L-d} - c g_{L-d}.

    Raises:
        RelaxationDiverged: a factor of a layer l >= ``lowest`` exceeds ``limit``.
    """
    errors = beliefs = None
    for t, row in enumerate(itertools.islice(scalar_chain(depth, step_size), num_steps + 1)):
        for layer in range(lowest, depth + 1):
            if limit is not None and not abs(row[depth - layer]) <= limit:
                raise RelaxationDiverged(t, max(layer, 1), step_size)
        errors, beliefs = (row if beliefs is None else beliefs), row
    return errors, beliefs
