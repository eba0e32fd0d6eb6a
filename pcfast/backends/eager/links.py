"""Beliefs of one layer in deviation form, coupled to the layer above them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...deviation import Chain, difference
from ...problem.belief_optimizers import PLAIN, BeliefOptimizer


class Link:
    """Beliefs v_l, kept as d = v_l - vhat_l, and layer l+1 above them."""

    def __init__(
        self, chain: Chain, vhat: Tensor, start: Tensor | None, optimizer: BeliefOptimizer = PLAIN
    ) -> None:
        self.chain, self.vhat, self._start, self._optimizer = chain, vhat, start, optimizer
        self.d: Tensor | None = None if start is None else start - vhat
        self._descent = optimizer.descent()

    @property
    def moved(self) -> bool:
        """True once d may differ from zero."""
        return self.d is not None

    @property
    def state(self) -> Tensor:
        """What is non-finite when the relaxation diverged here."""
        return self.d

    def rewind(self) -> None:
        """Back to the start, the chain's current point too."""
        self.d = None if self._start is None else self._start - self.vhat
        self._descent = self._optimizer.descent()
        self.chain.deviate(torch.zeros_like(self.vhat))

    @property
    def owned(self) -> bool:
        """Whether nothing else holds what :meth:`predict` gives."""
        return self.chain.owned

    def predict(self) -> Tensor:
        """mu_{l+1}(v_l) - vhat_{l+1}."""
        return self.chain.deviate(self.d)

    def error(self, deviation: Tensor | None, *, owned: bool = False) -> Tensor | None:
        """eps_l = (mu_l - vhat_l) - d_l; ``deviation`` is None where mu_l has not moved.

        ``owned``: nobody else reads the deviation, and the error takes its place.
        """
        return difference(deviation, self.d, owned=owned)

    def descend(
        self,
        error: Tensor | None,
        error_above: Tensor | None,
        eta: float,
        iteration: int = 1,
        *,
        apart: bool = False,
    ) -> Tensor | None:
        """d_l += eta (eps_l - J_{l+1}^T eps_{l+1}), or what the optimiser makes of that gradient in ``iteration``.

        An error that is None is zero. With ``apart`` the energy's gradient is computed by itself, and returned.
        """
        if self.d is None:
            self.d = torch.zeros_like(self.vhat)
        if self._optimizer.plain and not apart:
            if error is not None:
                self.d.add_(error, alpha=eta)
            if error_above is not None:
                self.chain.descend(self.d, error_above, eta)
            return None
        gradient = torch.zeros_like(self.vhat) if error is None else error.neg()
        if error_above is not None:
            self.chain.descend(gradient, error_above, -1.0)
        if self._optimizer.weight_decay:
            gradient.add_(self.vhat + self.d, alpha=self._optimizer.weight_decay)
        self.d.add_(self._descent.move(gradient, eta, iteration))
        return gradient

    def linearize_at_final(self) -> None:
        """Evaluate layer l+1's masks and arg-maxima at the last beliefs, for the weight gradient."""
        if self.moved:
            self.chain.at(self.d)

    def beliefs(self) -> Tensor:
        return self.vhat.clone() if self.d is None else self.vhat + self.d


class GramLink(Link):
    """Layer 1's beliefs out of the loop (docs/method.md fact 7): with mu_1 constant and u_2's deviation s = d_1 W^T

        s <- (1 - eta) s - eta delta_2 G        S <- (1 - eta) S + eta delta_2        d_1 = -S W

    where delta_2 is eps_2 pulled back to u_2, and the last eps_1 = S W before the last update. With momentum s and S
    descend along s + delta_2 G and S - delta_2, as d_1 does along d_1 + delta_2 W.
    """

    def __init__(self, chain, vhat, start, optimizer=PLAIN):
        super().__init__(chain, vhat, start, optimizer)
        self._head, self._tail = chain.steps[0], chain.tail
        self._s: Tensor | None = None
        self._sum: Tensor | None = None
        self._sum_before: Tensor | None = None
        self._sum_descent = optimizer.descent()

    @functools.cached_property
    def gram(self) -> Tensor:
        """G."""
        return self._head.gram()

    @property
    def moved(self):
        return self._s is not None

    @property
    def state(self):
        return self._s

    def rewind(self):
        super().rewind()
        self._s = self._sum = self._sum_before = None
        self._sum_descent = self._optimizer.descent()

    def set_state(self, s: Tensor, sum: Tensor, sum_before: Tensor) -> None:
        """Take s and the sum from a loop that ran elsewhere; ``sum_before``: before the last iteration."""
        self._s, self._sum, self._sum_before = s, sum, sum_before

    @property
    def owned(self):
        return self._tail.owned

    def predict(self):
        return self._tail.deviate(self._s)

    def error(self, deviation, *, owned=False):
        return None

    def descend(
        self, error, error_above, eta, iteration=1, *, apart=False
    ):  # never apart: plans with energies have no G
        delta = self._tail.pullback(error_above)
        if not self._optimizer.plain:
            self._descend_by_optimizer(delta, eta, iteration)
            return
        if self._s is None:
            self._s = self._head.gram_product(self.gram, delta).mul_(-eta)
            self._sum = delta * eta
            return
        self._head.gram_descend(self.gram, self._s, delta, eta)
        # the sum before this update gives eps_1 should this iteration be the last
        self._sum_before = self._sum
        self._sum = torch.add(self._sum * (1 - eta), delta, alpha=eta)

    def _descend_by_optimizer(self, delta: Tensor, eta: float, iteration: int) -> None:
        step, sum_step = self._head.gram_product(self.gram, delta), -delta
        if self._s is None:
            self._s = self._descent.move(step, eta, iteration)
            self._sum = self._sum_descent.move(sum_step, eta, iteration)
            return
        self._s = self._s + self._descent.move(self._s + step, eta, iteration)
        self._sum_before = self._sum
        self._sum = self._sum + self._sum_descent.move(self._sum + sum_step, eta, iteration)

    def last_error(self) -> Tensor | None:
        return None if self._sum_before is None else self._head.pullback(self._sum_before)

    def linearize_at_final(self):
        if not self.moved:
            return
        self.d = self._head.pullback(self._sum).neg_()
        self._head.at(self.d)
        self._tail.at(self._s)
