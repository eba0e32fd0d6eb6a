"""What relaxations share whose loop runs in kernels."""

from __future__ import annotations

from torch import Tensor

from ..deviation import Chain
from ..deviation.affine import Conv2dStep, LinearStep
from ..errors import RelaxationDiverged
from .eager import Run


def first_product(chain: Chain) -> int | None:
    """Index of the first linear layer or convolution among the chain's steps, or None."""
    return next((i for i, step in enumerate(chain.steps) if isinstance(step, LinearStep | Conv2dStep)), None)


class KernelRun(Run):
    """One strict relaxation.

    Attributes:
        first_bad: (L-1,) or longer, int32: the iteration whose update left v_l NaN or infinite.
    """

    first_bad: Tensor

    def _locate(self):
        found = min((t, l) for l, t in enumerate(self.first_bad.tolist(), start=1))
        if found[0] <= self.problem.num_steps:
            raise RelaxationDiverged(found[0], found[1], self.problem.step_size)
