"""Beliefs of a node in deviation form, which several nodes predict from."""

from __future__ import annotations

from torch import Tensor

from ..backends.eager.links import Link
from ..deviation.node import Pulls
from ..problem.belief_optimizers import BeliefOptimizer


class _Feedback:
    """The branches that begin at one node, in place of the chain above a layer."""

    def descend(self, d: Tensor, pulls: Pulls, rate: float) -> None:
        """d -= rate * (sum of J^T e over the branches) in place."""
        for chain, e in pulls:
            chain.descend(d, e, rate)


_FEEDBACK = _Feedback()


class Belief(Link):
    """v_k as d = v_k - its value at the start; errors from above are (branch, error) pairs.

    Attributes:
        base_error: mu - v at the start, where it is not zero.
    """

    def __init__(
        self, value: Tensor, start: Tensor | None, base_error: Tensor | None, optimizer: BeliefOptimizer
    ) -> None:
        super().__init__(_FEEDBACK, value, start, optimizer)
        self.base_error = base_error

    def rewind(self) -> None:
        self.d = None if self._start is None else self._start - self.vhat
        self._descent = self._optimizer.descent()

    def error(self, deviation: Tensor | None, *, owned: bool = False) -> Tensor | None:
        """eps_k = (mu_k - v_k at the start) + (what mu_k has moved) - d_k; its own tensor, which stays as it is."""
        if self.d is None and deviation is not None and not owned:
            deviation = deviation.clone()  # beliefs that move in place may lie there
        error = super().error(deviation, owned=owned)
        if self.base_error is None:
            return error
        return self.base_error.clone() if error is None else error + self.base_error

    def add_noise(self, noise: Tensor) -> None:
        self.d = noise if self.d is None else self.d.add_(noise)
