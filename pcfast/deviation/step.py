"""One operation at work in one relaxation: the base classes of all steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model import spec as specs
from ..precision import Precision

Gradients = list[tuple[nn.Parameter, Tensor]]


def difference(a: Tensor | None, b: Tensor | None, *, owned: bool) -> Tensor | None:
    """a - b, None being zero; ``owned``: nobody else reads ``a``, and the difference takes its place."""
    if b is None:
        return a
    if a is None:
        return b.neg()
    return a.sub_(b) if owned else a - b


class Step:
    """One operation at work in one relaxation. ``spec`` says what, ``precision`` in which dtypes."""

    #: Whether nothing else holds what :meth:`deviate` gives, so that its reader may write into it.
    owned = False

    def __init__(self, spec: specs.Op, module: nn.Module, precision: Precision) -> None:
        self.spec, self.module, self.precision = spec, module, precision

    def forward(self, a: Tensor) -> Tensor:
        """f(a); makes a the base point and the current one."""
        raise NotImplementedError

    def deviate(self, d: Tensor) -> Tensor:
        """f(a + d) - f(a); makes a + d the current point."""
        raise NotImplementedError

    def consume(self, d: Tensor) -> Tensor:
        """As :meth:`deviate`, where nobody else reads ``d``: what it gives may take its place."""
        return self.deviate(d)

    def pullback(self, e: Tensor) -> Tensor:
        """J^T e at the current point."""
        raise NotImplementedError

    def snapshot_params(self) -> None:
        """The parameters will move: keep those of the base point, which deviations stay relative to.

        Raises:
            NotImplementedError: a step with parameters that does not say how it follows them.
        """
        if self.has_gradients:
            raise NotImplementedError(
                f"{type(self).__name__} does not follow parameters that move: it needs snapshot_params, refresh and "
                "param_shift"
            )

    def refresh(self) -> None:
        """The parameters have moved since :meth:`snapshot_params`: from now on f(a + d; theta') - f(a; theta)."""

    def param_shift(self) -> Tensor | None:
        """f(a; theta') - f(a; theta), after :meth:`refresh`, a the current point; None where no parameter moves."""
        return None

    def descend(self, d: Tensor, e: Tensor, rate: float) -> None:
        """d -= rate * J^T e in place."""
        d.sub_(self.pullback(e), alpha=rate)

    def at(self, d: Tensor) -> None:
        """Make a + d the current point where nobody reads the deviation itself."""
        self.deviate(d)

    def release(self) -> None:
        """Drop what a loop that runs elsewhere would leave unread: whoever needs it evaluates it again."""

    def update_statistics(self, failed: Tensor | None) -> None:
        """The step is over: move what moves once a step, statistics. Not where ``failed``, 0-dim bool, says so."""

    def undo(self) -> None:
        """The step is refused: take back what :meth:`forward` has moved."""

    def gradients(self, e: Tensor) -> Gradients:
        """(parameter, (df/dtheta)^T e) at the current point, for parameters that require it."""
        return []

    def differentiate(
        self, e: Tensor, *, need_input: bool, need_gradients: bool, factor: float
    ) -> tuple[Gradients, Tensor | None]:
        """``(gradients for factor * e, J^T e)``; what is not needed is empty, or None."""
        result: Gradients = []
        if need_gradients and self.has_gradients:
            result = self.gradients(e if factor == 1.0 else e * factor)
        return result, (self.pullback(e) if need_input else None)

    def zero_gradients(self) -> Gradients:
        """What :meth:`gradients` gives for a zero error."""
        return [(p, torch.zeros_like(p)) for p in self.module.parameters() if p.requires_grad]

    @property
    def has_gradients(self) -> bool:
        """True where :meth:`gradients` would give any."""
        return any(p is not None and p.requires_grad for p in self.module._parameters.values())


class LinearMapStep(Step):
    """A linear map without parameters: deviations go through the map itself."""

    def _apply(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, a):
        self._shape = a.shape
        return self._apply(a)

    def deviate(self, d):
        return self._apply(d)
