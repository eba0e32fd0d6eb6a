"""Fixed prediction's closed form: one scalar a layer (docs/method.md fact 1)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from ...errors import RelaxationDiverged
from ...problem.belief_optimizers import PLAIN, GradientDescent, StepSize, step_size_of


def scalar_chain(
    depth: int, step_size: StepSize, optimizer: GradientDescent = PLAIN
) -> Iterator[tuple[float, ...]]:
    """The scalar recursion that fixed prediction is (closed form, docs/method.md fact 1), in float64.

    Yields (c_0(t), ..., c_L(t)) for t = 0, 1, 2, ..., until a schedule ends: c_0 = 1, c_d(0) = m_d(0) = 0,

        m_d(t) = momentum m_d(t-1) + c_d(t-1) - c_{d-1}(t-1)        c_d(t) = c_d(t-1) - eta_t m_d(t)

    which is c_d(t) = (1 - eta) c_d(t-1) + eta c_{d-1}(t-1) without momentum; Nesterov's steps along the gradient
    plus momentum m_d(t). c_d belongs to layer L-d.
    """
    momentum = optimizer.momentum
    row, velocity = (1.0,) + (0.0,) * depth, (0.0,) * (depth + 1)
    yield row
    for t in range(1, len(step_size) + 1) if isinstance(step_size, tuple) else itertools.count(1):
        eta = step_size_of(step_size, t)
        pull = (0.0, *(row[d] - row[d - 1] for d in range(1, depth + 1)))
        velocity = tuple(momentum * m + p for m, p in zip(velocity, pull, strict=True))
        steps = velocity
        if optimizer.nesterov:
            steps = tuple(p + momentum * m for m, p in zip(velocity, pull, strict=True))
        row = tuple(c - eta * s for c, s in zip(row, steps, strict=True))
        yield row


@functools.lru_cache(maxsize=256)
def fixed_prediction_factors(
    depth: int,
    num_steps: int,
    step_size: StepSize,
    limit: float | None = None,
    lowest: int = 0,
    optimizer: GradientDescent = PLAIN,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The factors of g_{L-d}, d = 0..L, after ``num_steps`` iterations of fixed prediction.

    Returns:
        ``(errors, beliefs)``: c_d(n-1) of the last iteration's errors (c_d(0) for n = 0), and c_d(n) of the
        beliefs vhat_{L-d} - c g_{L-d}.

    Raises:
        RelaxationDiverged: a factor of a layer l >= ``lowest`` exceeds ``limit``.
    """
    errors = beliefs = None
    for t, row in enumerate(itertools.islice(scalar_chain(depth, step_size, optimizer), num_steps + 1)):
        for layer in range(lowest, depth + 1):
            if limit is not None and not abs(row[depth - layer]) <= limit:
                raise RelaxationDiverged(t, max(layer, 1), step_size)
        still = row == beliefs and not optimizer.momentum and not isinstance(step_size, tuple)
        errors, beliefs = (row if beliefs is None else beliefs), row
        if still:  # the next row is a function of this one alone: all that follow are the same
            break
    return errors, beliefs
