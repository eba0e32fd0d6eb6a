"""Residual blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..residual import check_kept
from .step import Step

if TYPE_CHECKING:
    from .chain import Chain


class ResidualStep(Step):
    """y = a + f(a), ``branch`` being f. Deviations: d + (f(a + d) - f(a)); errors: e + J_f^T e.

    Both are sums of what is small already, so that nothing cancels.
    """

    def __init__(self, spec, module, precision, branch: Chain):
        super().__init__(spec, module, precision)
        self.branch = branch

    def forward(self, a):
        out = self.branch.forward(a)
        check_kept(tuple(a.shape), tuple(out.shape))
        return a + out

    def deviate(self, d):
        return d + self.branch.deviate(d)

    def pullback(self, e):
        return e + self.branch.pullback(e)

    def hold(self):
        self.branch.hold()

    def reload(self):
        self.branch.reload()

    def drift(self):
        return self.branch.drift()

    def descend(self, d, e, rate):
        self.branch.descend(d, e, rate)
        d.sub_(e, alpha=rate)

    def at(self, d):
        self.branch.at(d)

    def release(self):
        self.branch.release()

    def settle(self, failed):
        self.branch.settle(failed)

    def undo(self):
        self.branch.undo()

    def differentiate(self, e, **wanted):
        found, below = self.branch.differentiate(e, **wanted)
        return found, (None if below is None else e + below)

    def gradients(self, e):
        return self.branch.gradients(e)

    def zero_gradients(self):
        return self.branch.zero_gradients()

    @property
    def has_gradients(self):
        return self.branch.has_gradients
