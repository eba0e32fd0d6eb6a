"""How a relaxation went: energies, convergence, and how far its updates are from the gradient.

    g_l(t) = J_{l+1}^T eps_{l+1} - eps_l            the gradient of v_l, at the beliefs that iteration t found
    convergence(t) = 1 - |g(t)| / |g(1)|            over all layers l = 1..L-1 together

(docs/method.md; weight decay's part is in g). Beliefs rest where g = 0: convergence is 1 there, 0 at the start, and
negative where the gradient is larger than at the start, as while errors spread to layers that have larger ones, or
where the relaxation diverges. The energy gives no such fraction, since the one at the fixed point is not known.

Strict relaxation is gradient descent on the sum of the energies: with a step size below its limit it never rises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import gradients
from ..errors import ArgumentError
from ..gradients import parameters_of_layers, true_gradient, vector
from ..losses import LossLike
from ..problem.belief_optimizers import BeliefOptimizer
from ..problem.plan import canonical
from ..problem.settings import Settings
from ..problem.types import Wanted
from ..relaxation.solve import Run, solve
from ..support.replay import recorded_buffers, replaying

#: An energy has risen where it did so by more than this many units of rounding of itself: at rest its terms carry a
#: few units each, and torch sums pairwise, which adds about the logarithm of their number.
ROUNDING = 16


#: Those in which beliefs descend an energy.
METHODS = ("strict", "fixed_prediction")


@dataclass(frozen=True)
class Diagnosis:
    """Result of :func:`diagnose`: tensors on the model's device, n iterations, L layers.

    Attributes:
        energies: (n, L), as of :func:`pcfast.relax`.
        belief_gradients: (n, L-1): |g_l(t)|, Frobenius norm over the batch.
        convergence: (n,) float64, as above; 1 where there is nothing to relax.
        rising: (n,) bool: iteration t found a larger energy, summed over layers, than the one before: the step size
            is above its limit (or momentum overshoots). None where another energy than the reported one is descended:
            fixed prediction, weight decay.
        relative_error, angle_degrees: (L,) float64, of each layer's update against backpropagation's gradient
            (:mod:`pcfast.gradients`); NaN for layers without parameters that require gradients.
        whole_relative_error, whole_angle_degrees: 0-dim float64, of all parameters as one vector.
        run: which backend ran, and how.
    """

    energies: Tensor
    belief_gradients: Tensor
    convergence: Tensor
    rising: Tensor | None
    relative_error: Tensor
    angle_degrees: Tensor
    whole_relative_error: Tensor
    whole_angle_degrees: Tensor
    run: Run

    @property
    def relaxed(self) -> Tensor:
        """:attr:`convergence`, by the name that it had first."""
        return self.convergence


def diagnose(
    model: nn.Sequential,
    x: Tensor,
    y,
    *,
    loss: LossLike = "cross_entropy",
    method: str = "strict",
    step_size: float | Sequence[float] = 0.1,
    num_steps: int = 20,
    belief_optimizer: BeliefOptimizer | None = None,
    backend: str = "auto",
    check: str = "auto",
) -> Diagnosis:
    """Relax once and measure; parameters, ``.grad``, buffers and torch's random state stay as they are.

    On CUDA with ``check`` "auto", "deferred" or "off" nothing here waits for the device (``eager``; the reference
    backend always does).

    Args:
        model: in its mode; dropout draws the masks that :func:`pcfast.pc_loss` would draw next.
        method: "strict" or "fixed_prediction". The others: as for :func:`pcfast.relax`.

    Raises:
        ArgumentError and its kinds, BackendError, RelaxationDiverged.
    """
    method = canonical(method)
    if method not in METHODS:
        raise ArgumentError(
            "method", repr(method), "'strict' or 'fixed_prediction'", "In others beliefs do not descend an energy."
        )  # fmt: skip
    layers = parameters_of_layers(model)
    replay, buffers = replaying(x.device), recorded_buffers(model)
    gradient = true_gradient(model, x, y, loss=loss)
    with replay(), buffers():
        settings = Settings(
            loss, method, step_size, num_steps, belief_optimizer, backend=backend, check=check
        )
        outcome, run = solve(model, x, y, settings, Wanted(energies=True, belief_gradients=True))
    update = {p: outcome.gradients.get(p, torch.zeros_like(p)) for p in gradient}
    groups = [layers.get(l) for l in range(1, len(model) + 1)]
    pairs = [
        None if group is None else tuple(vector([values[p] for p in group]) for values in (update, gradient))
        for group in groups
    ]
    whole = vector(update.values()), vector(gradient.values())
    missing = torch.full((), math.nan, dtype=torch.float64, device=x.device)

    def by_layer(measure) -> Tensor:
        return torch.stack([missing if pair is None else measure(*pair) for pair in pairs])

    return Diagnosis(
        outcome.energies,
        outcome.belief_gradients,
        convergence(outcome.belief_gradients),
        rising(outcome.energies)
        if method == "strict" and not run.plan.belief_optimizer.weight_decay
        else None,
        by_layer(gradients.relative_error),
        by_layer(gradients.angle_degrees),
        gradients.relative_error(*whole),
        gradients.angle_degrees(*whole),
        run,
    )


def convergence(belief_gradients: Tensor) -> Tensor:
    """1 - |g(t)| / |g(1)| from (n, L-1) norms by layer: (n,) float64; 1 where both are zero."""
    sizes = torch.linalg.vector_norm(belief_gradients.to(torch.float64), dim=1)
    start = sizes[:1]
    return torch.where((sizes == 0) & (start == 0), 1.0, 1 - sizes / start)


relaxed_fraction = convergence  # the name that it had first


def rising(energies: Tensor) -> Tensor:
    """Where the energy summed over layers is larger than an iteration before, rounding aside: (n,) bool.

    Args:
        energies: (n, L). The first iteration has none before it: False.
    """
    total = energies.sum(1, dtype=torch.float64)
    allowed = ROUNDING * torch.finfo(energies.dtype).eps * total[:-1].abs()
    first = torch.zeros(min(len(total), 1), dtype=torch.bool, device=energies.device)
    return torch.cat([first, total.diff() > allowed])
