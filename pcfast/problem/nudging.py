"""Nudging: the output is pulled towards the target by part of the way, or pushed away from it (docs/method.md).

Pinchetti et al., "Benchmarking predictive coding networks made simple" (ICLR 2025); Scellier et al., "Energy-based
learning algorithms for analog computing: a comparative study" (NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..arguments import checked_number
from ..errors import ArgumentError, ArgumentTypeError

KINDS = ("positive", "negative", "centred")


@dataclass(frozen=True)
class Nudging:
    """The squared error to vhat_L - beta (vhat_L - y) instead of y, set once from the forward pass.

    With U(beta) the updates of strict relaxation towards that target:

        positive    U(beta) / beta
        negative    U(-beta) / (-beta)
        centred     (U(beta) - U(-beta)) / (2 beta): the mean of the two

    Attributes:
        kind: "positive", "negative" or "centred".
        beta: > 0; positive with 1 is the relaxation towards y.

    Raises:
        ArgumentError and its kinds: a value outside.
    """

    kind: str = "positive"
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError("kind", repr(self.kind), f"one of {KINDS}", "It is the first of Nudging.")
        beta = checked_number(
            "beta", self.beta, lambda b: b > 0, "a finite number > 0",
            'Updates are divided by it; kind="negative" turns the sign.',
        )  # fmt: skip
        object.__setattr__(self, "beta", beta)

    @property
    def pushes(self) -> tuple[tuple[float, float], ...]:
        """``(push, share)`` of each relaxation: its target is vhat_L - push (vhat_L - y), its updates count share."""
        beta = self.beta
        if self.kind == "positive":
            return ((beta, 1 / beta),)
        if self.kind == "negative":
            return ((-beta, -1 / beta),)
        return ((beta, 0.5 / beta), (-beta, -0.5 / beta))

    def grown(self, growth: float, epoch: int) -> Nudging:
        """For epoch 0, 1, ...: beta + growth * epoch, but not beyond 1 (nor beyond a beta above 1)."""
        return replace(self, beta=min(self.beta + growth * epoch, max(self.beta, 1.0)))


def target_of(push: float, vhat: Tensor, y: Tensor) -> Tensor:
    """vhat_L - push (vhat_L - y), as vhat_L."""
    return vhat - push * (vhat - y.to(vhat.dtype))


def check(nudging, method: str, loss: str | None) -> None:
    """Raise where ``nudging`` does not go with ``method`` and a loss of kind ``loss`` (None: not known yet).

    Raises:
        ArgumentTypeError, ArgumentError: naming nudging, with the reason.
    """
    if nudging is None:
        return
    if not isinstance(nudging, Nudging):
        raise ArgumentTypeError(
            "nudging", f"{nudging!r} ({type(nudging).__name__})", "pcfast.Nudging(...) or None",
            'E.g. pcfast.Nudging("centred", beta=0.1).',
        )  # fmt: skip
    if method != "strict":
        loops = method in ("error_based", "incremental")
        raise ArgumentError(
            "nudging", f"{nudging} with method {method!r}", "method strict",
            "It is strict's." if loops else
            "Its updates are linear in the output's error: nudged by beta and divided by beta they are the same.",
        )  # fmt: skip
    if loss not in (None, "mse"):
        raise ArgumentError(
            "nudging", f"{nudging} with a loss that is not mse", 'loss="mse", with y of the output\'s shape',
            "The nudged target is a value for the output, which other losses do not take.",
        )  # fmt: skip


def by_epoch(nudging, growth: float, epochs: int, method: str) -> Callable[[int], Nudging | None]:
    """The nudging of epoch 0, 1, ..., from one that grows, or from a function of the epoch, called for all now.

    Raises:
        ArgumentTypeError, ArgumentError: as :func:`check`, and for a class.
    """
    if callable(nudging) and not isinstance(nudging, type | Nudging):
        result = [nudging(epoch) for epoch in range(epochs)]
        for one in result:
            check(one, method, None)
        return result.__getitem__
    check(nudging, method, None)
    return (lambda epoch: nudging.grown(growth, epoch)) if growth else lambda epoch: nudging


def checked_growth(growth: float, nudging) -> float:
    """``growth`` as a finite float >= 0, 0 without a :class:`Nudging` that can grow.

    Raises:
        ArgumentTypeError, ArgumentError: naming nudging_growth.
    """
    growth = checked_number(
        "nudging_growth", growth, lambda g: g >= 0, "a finite number >= 0", "What beta gains an epoch."
    )
    if growth and not isinstance(nudging, Nudging):
        without = "without nudging" if nudging is None else "with nudging by epoch"
        raise ArgumentError("nudging_growth", f"{growth} {without}", "pcfast.Nudging(...), or 0")
    return growth
