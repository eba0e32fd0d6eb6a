"""Incremental predictive coding in deviation form (docs/methods.md; Salvatori et al., iPC).

Beliefs and parameters move in every iteration, so predictions move for two reasons. All are kept as deviations from
the forward pass with the parameters of then, theta(0):

    d_l = v_l - vhat_l      eps_l = [f_l(vhat_{l-1} + d_{l-1}; theta) - f_l(vhat_{l-1}; theta(0))] - d_l

The bracket is formed without subtracting nearly equal numbers: for an affine map it is W d + (W - W(0)) vhat
+ (b - b(0)), then as in strict relaxation (docs/method.md fact 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...deviation import Chain
from ...errors import RelaxationDiverged
from ...problem import status
from ...problem.belief_optimizers import PLAIN, BeliefOptimizer
from .links import Link


class Moving:
    """Beliefs over layers whose parameters move too.

    Attributes:
        errors: eps_l of the last :meth:`evaluate`, l = 1..L by index; None where zero.
    """

    def __init__(
        self,
        chains: list[Chain],
        vhat: list[Tensor],
        output_error: Tensor,
        optimizer: BeliefOptimizer = PLAIN,
    ) -> None:
        """``chains``: of layers 1..L by index, at the forward pass ``vhat``; ``output_error``: eps_L there."""
        self._chains, self._vhat, self._depth, self._optimizer = chains, vhat, len(vhat) - 1, optimizer
        # index l couples v_l to layer l+1
        self._links = [
            None,
            *(Link(c, v, None, optimizer) for c, v in zip(chains[2:], vhat[1:], strict=False)),
        ]
        self.errors: list[Tensor | None] = [None] * self._depth + [output_error]
        for chain in chains[1:]:
            chain.hold()

    def evaluate(self, gradient_at: Callable[[Tensor], Tensor]) -> None:
        """The errors at the beliefs and parameters of now; every chain is then at that point."""
        moved: list[Tensor | None] = [None]  # mu_l - vhat_l; None where zero
        for chain, below in zip(self._chains[1:], self._links, strict=True):
            chain.reload()
            moved.append(below.predict() if below is not None and below.moved else chain.drift())
        for l in range(1, self._depth):
            self.errors[l] = self._links[l].error(moved[l], owned=self._chains[l].owned)
        output = self._vhat[-1]
        self.errors[-1] = gradient_at(output if moved[-1] is None else output + moved[-1])

    def descend(self, eta: float, iteration: int) -> None:
        """Every belief moves down its gradient, all from the last :meth:`evaluate`; ``iteration`` = 1, 2, ..."""
        for l in range(1, self._depth):
            error, above = self.errors[l], self.errors[l + 1]
            if error is None and above is None and self._optimizer.rests:
                continue  # no error has come this far yet
            self._links[l].descend(error, above, eta, iteration)


def check_iteration(iteration: int, found: Sequence[tuple[int, Tensor | None]], step_size: float) -> None:
    """Before the parameters move: raise where an error or update is not finite. ``found``: (layer, tensor).

    Raises:
        RelaxationDiverged: of the lowest such layer.
    """
    found = [(layer, value) for layer, value in found if value is not None]
    if status.all_finite([value for _, value in found]):
        return
    bad = min(layer for layer, value in found if not status.all_finite([value]))
    raise RelaxationDiverged(
        iteration, bad, step_size, f"The parameters stay as iteration {iteration - 1} left them"
    )
