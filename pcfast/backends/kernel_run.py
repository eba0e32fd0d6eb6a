"""What relaxations share whose loop runs in kernels."""

from __future__ import annotations

from torch import Tensor

from ..deviation.affine import Conv2dStep, LinearStep
from ..errors import RelaxationDiverged
from ..problem import check_start
from .eager import Run


class KernelRun(Run):
    """One strict relaxation.

    Attributes:
        heads: per layer the index of its first product among the chain's steps, or None.
        pre_activations: what came out of it, or None.
        first_bad: (L-1,) or longer, int32: the iteration whose update left v_l NaN or infinite.
    """

    heads: list[int | None]
    pre_activations: list[Tensor | None]
    first_bad: Tensor

    def _forward(self):
        vhat = [self.precision.to_state(self.problem.x)]
        self.heads, self.pre_activations = [None], [None]
        for l, chain in enumerate(self.chains[1:], start=1):
            value, head, pre_activation = vhat[-1], None, None
            for i, step in enumerate(chain.steps):
                value = step.forward(value)
                if head is None and isinstance(step, LinearStep | Conv2dStep):
                    value = pre_activation = self._placed(l, value)
                    head = i
            if l > 1:  # kernels find the loop's arg-maxima, and the last beliefs have others
                chain.release()
            vhat.append(value)
            self.heads.append(head)
            self.pre_activations.append(pre_activation)
        return vhat

    def _placed(self, l: int, uhat: Tensor) -> Tensor:
        """Layer l's uhat where the loop wants it."""
        return uhat

    def _starts(self) -> list[Tensor] | None:
        """Beliefs to start from, as deviations; None from the forward pass."""
        if self.problem.start is None:
            return None
        found = check_start(self.problem.start, self.vhat)
        return [self.precision.to_state(v) - vhat for v, vhat in zip(found, self.vhat, strict=True)]

    def _locate(self):
        found = min((t, l) for l, t in enumerate(self.first_bad.tolist(), start=1))
        if found[0] <= self.problem.num_steps:
            raise RelaxationDiverged(found[0], found[1], self.problem.step_size)
