"""How far a fused stage may lie from float64: worst cases of rounding, element by element.

Everything is (batch, channels, height, width); features have one pixel. The truth is made with torch in float64, on
operands as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 2.0**-23  # of fp32: one rounding, or one truncation in a Tensor Core's sum
TF32 = 2.0**-10  # Tensor Cores cut the 13 lowest bits of fp32 operands off
STORED = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # rounding of what is stored in a dtype
# the same of operands that a kernel stores, by the precision of the product that reads them
OPERAND = {"bf16": STORED[torch.bfloat16], "tf32": 2.0**-11, "tf32x3": 0.0}
# Slopes and curvatures of the activations are below these.
SLOPE = 1.5


@dataclass(frozen=True)
class Judgement:
    """How far a result lies from float64.

    Attributes:
        error: relative, Frobenius norms; the worst of the results.
        excess: the largest |found - truth| / what rounding explains: right is at most 1.
    """

    error: float
    excess: float

    @property
    def right(self) -> bool:
        return self.excess <= 1  # False for NaN


def judged(*results: tuple[Tensor, Tensor, Tensor]) -> Judgement:
    """Of (found, truth, bound) each; elements whose bound is infinite are not judged."""
    error = excess = 0.0
    for result, truth, bound in results:
        decided = bound.isfinite()
        if not bool(decided.any()):
            return Judgement(float("nan"), float("nan"))
        distance = (result.double() - truth).abs()[decided]
        scale = float(truth[decided].norm())
        error = max(error, float(distance.norm()) / (scale or 1.0))
        tiny = torch.finfo(torch.float32).tiny
        # torch's maximum is NaN where one is, Python's is not
        excess = float(
            torch.stack([torch.tensor(excess), (distance / (bound[decided] + tiny)).max().cpu()]).max()
        )
    return Judgement(error, excess)


def product_bound(precision: str, terms: int, absolute: Tensor) -> Tensor:
    """Of a sum of ``terms`` products; ``absolute``: the sum of their magnitudes.

    A rounding a term, and sixteen for what three TF32 products in the place of one leave out.
    """
    share = EPS * (terms + 16) + (2 * TF32 if precision == "tf32" else 0.0)
    return share * absolute


def through_memory(bound: Tensor, absolute: Tensor, stored: torch.dtype) -> Tensor:
    """``bound`` of a product that is stored in a dtype, and whose parts may be (split-K) before they are added."""
    return bound + 2 * STORED[stored] * absolute


@dataclass(frozen=True)
class Truth:
    """Results of a predict stage and their bounds; delta on the map, infinite bounds where a winner is a toss."""

    error: Tensor
    error_bound: Tensor
    delta: Tensor
    delta_bound: Tensor


def predict_truth(
    s: Tensor,
    s_bound: Tensor,
    uhat: Tensor,
    d: Tensor,
    window: tuple[int, int],
    relu: bool,
    stored: float,
) -> Truth:
    """eps = [f(uhat + s) - f(uhat)] - d and delta, f = a max-pool over ``window``, then relu or nothing.

    Args:
        s, uhat: (batch, channels, height, width), cut to whole windows. d: pooled.
        s_bound: what s may have lost. stored: rounding of delta.
    """

    def f(u: Tensor) -> Tensor:
        pooled = F.max_pool2d(u, window)
        return pooled.relu() if relu else pooled

    u = (uhat + s).detach().requires_grad_()
    with torch.enable_grad():
        mu = f(u)
    error = mu.detach() - f(uhat) - d
    (delta,) = torch.autograd.grad(mu, u, error)
    u = u.detach()

    moved, size, base = (F.max_pool2d(t.abs(), window) for t in (s_bound, s, uhat))
    error_bound = SLOPE * moved + 32 * EPS * size + 4 * EPS * base * (window != (1, 1)) + 2 * EPS * d.abs()
    doubt = 2 * error_bound + 4 * EPS * base
    undecided = torch.zeros_like(error, dtype=torch.bool)
    if window != (1, 1):
        rows, columns = window
        of_window = u.unfold(2, rows, rows).unfold(3, columns, columns).flatten(-2)
        best = of_window.topk(2, -1).values
        undecided |= best[..., 0] - best[..., 1] <= doubt
    if relu:
        undecided |= F.max_pool2d(u, window).abs() <= doubt
    delta_bound = SLOPE * error_bound + 16 * EPS * error.abs()
    delta_bound = delta_bound + stored * (delta_bound + error.abs())
    delta_bound = delta_bound.masked_fill(undecided, float("inf"))
    spread = delta_bound.repeat_interleave(window[0], 2).repeat_interleave(window[1], 3)
    return Truth(error, error_bound, delta, spread)


def update_bound(old: Tensor, moved: Tensor, eta: float, r_bound: Tensor) -> Tensor:
    """Of d + eta (eps - r)."""
    return eta * r_bound + 4 * EPS * (old.abs() + moved.abs())


def copied(moved: Tensor, bound: Tensor, stored: float) -> Tensor:
    """Bound of a rounded copy of a result."""
    return bound + stored * (moved.abs() + bound)
