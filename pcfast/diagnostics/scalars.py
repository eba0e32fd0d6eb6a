"""A run in numbers, one set an epoch: losses and scores, and how one relaxation goes."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from ..errors import RelaxationDiverged
from ..model.graph import Graph
from ..problem.plan import canonical
from ..problem.settings import Settings
from ..problem.types import Wanted
from ..relaxation.solve import solve
from ..support import modes
from ..support.replay import recorded_buffers, replaying
from ..training.history import History
from .diagnosis import METHODS, convergence


def of_history(history: History) -> dict[str, float]:
    """The last epoch's: train/loss, test/accuracy, ..., seconds."""
    return {name.replace("_", "/"): column[-1] for name, column in history.columns.items()}


def of_relaxation(model: nn.Sequential | Graph, x: Tensor, y: Tensor, settings: Settings) -> dict[str, float]:
    """Energy at the first and the last iteration, what part is left, and convergence; NaN where it diverges.

    Of the plain target, also where training nudges it. Nothing for graphs, and for methods in which beliefs descend
    no energy. In eval mode; parameters, ``.grad``, buffers, modes and torch's random state stay as they are.
    """
    if isinstance(model, Graph) or canonical(settings.method) not in METHODS or not settings.num_steps:
        return {}
    replay, buffers = replaying(x.device), recorded_buffers(model)
    settings = replace(settings, nudging=None, check="sync")
    try:
        with modes.evaluating(model), replay(), buffers():
            outcome, _ = solve(model, x, y, settings, Wanted(energies=True, belief_gradients=True))
    except RelaxationDiverged:
        first = last = converged = math.nan
    else:
        totals = outcome.energies.double().sum(1)
        first, last = totals[0].item(), totals[-1].item()
        converged = convergence(outcome.belief_gradients)[-1].item()
    left = last / first if first else math.nan
    values = {"energy_first": first, "energy_last": last, "energy_left": left, "convergence": converged}
    return {f"relaxation/{name}": value for name, value in values.items()}
