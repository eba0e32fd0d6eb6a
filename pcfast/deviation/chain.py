"""A whole PC layer in deviation form, residual blocks inside it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..model import spec as specs
from ..model.residual import check_kept
from ..precision import Precision
from .affine import Conv2dStep, LinearStep
from .normalisation import BatchNormStep
from .opaque import OpaqueStep
from .pointwise import DropoutStep, ElementwiseStep, ReshapeStep, ScaleStep
from .pooling import AdaptiveAvgPool2dStep, AvgPool2dStep, MaxPool2dStep
from .step import Gradients, Step

_STEPS: dict[type[specs.Op], type[Step]] = {
    specs.Linear: LinearStep,
    specs.Conv2d: Conv2dStep,
    specs.Elementwise: ElementwiseStep,
    specs.MaxPool2d: MaxPool2dStep,
    specs.AvgPool2d: AvgPool2dStep,
    specs.AdaptiveAvgPool2d: AdaptiveAvgPool2dStep,
    specs.Flatten: ReshapeStep,
    specs.Unflatten: ReshapeStep,
    specs.Dropout: DropoutStep,
    specs.Scale: ScaleStep,
    specs.BatchNorm: BatchNormStep,
    specs.Opaque: OpaqueStep,
}


def pool_first(ops: tuple[specs.Op, ...]) -> list[specs.Op]:
    """Max-pooling before a monotone activation gives the same numbers on fewer elements."""
    ordered = list(ops)
    for i in range(len(ordered) - 1):
        activation, pool = ordered[i], ordered[i + 1]
        if (
            isinstance(activation, specs.Elementwise)
            and activation.activation.monotone
            and isinstance(pool, specs.MaxPool2d)
        ):
            ordered[i], ordered[i + 1] = pool, activation
    return ordered


def layer_chain(spec: specs.LayerSpec, model: nn.Module, precision: Precision) -> Chain:
    """The chain that one PC layer f_l of ``model`` is."""
    return chain_of(spec.ops, model, precision)


def chain_of(ops: tuple[specs.Op, ...], model: nn.Module, precision: Precision) -> Chain:
    """The chain of operations of ``model``."""
    return Chain([_step(op, model, precision) for op in pool_first(ops)])


def _step(op: specs.Op, model: nn.Module, precision: Precision) -> Step:
    module = model
    for name in op.path.split("."):  # get_submodule takes several times as long, in every step
        module = module._modules[name]
    if isinstance(op, specs.Residual):
        return ResidualStep(op, module, precision, chain_of(op.ops, model, precision))
    return _STEPS[type(op)](op, module, precision)


class Composite:
    """What is made of parts, steps or other composites, that keep their state for themselves.

    Attributes:
        parts: in their order.
    """

    def __init__(self, parts: Sequence[Step | Composite]) -> None:
        self.parts = parts

    def snapshot_params(self) -> None:
        """As :meth:`Step.snapshot_params`, for every part."""
        for part in self.parts:
            part.snapshot_params()

    def refresh(self) -> None:
        """As :meth:`Step.refresh`, for every part."""
        for part in self.parts:
            part.refresh()

    def release(self) -> None:
        """As :meth:`Step.release`, for every part."""
        for part in self.parts:
            part.release()

    def update_statistics(self, failed: Tensor | None) -> None:
        """As :meth:`Step.update_statistics`, for every part."""
        for part in self.parts:
            part.update_statistics(failed)

    def undo(self) -> None:
        """As :meth:`Step.undo`, for every part."""
        for part in self.parts:
            part.undo()

    @property
    def has_gradients(self) -> bool:
        """As :attr:`Step.has_gradients`."""
        return any(part.has_gradients for part in self.parts)

    def zero_gradients(self) -> Gradients:
        """What ``gradients`` gives for a zero error."""
        return [entry for part in self.parts for entry in part.zero_gradients()]


class Chain(Composite):
    """Steps in order, at work, with the same verbs as a step: a PC layer, or a part of one."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__(steps)
        self.steps = steps

    @property
    def tail(self) -> Chain:
        """All steps but the first."""
        return Chain(self.steps[1:])

    @property
    def owned(self) -> bool:
        """As :attr:`Step.owned`."""
        return bool(self.steps) and self.steps[-1].owned

    def forward(self, v: Tensor) -> Tensor:
        for step in self.steps:
            v = step.forward(v)
        return v

    def deviate(self, d: Tensor, *, owned: bool = False) -> Tensor:
        """As :meth:`Step.deviate`; ``owned``: nobody else reads ``d``."""
        for step in self.steps:
            d = step.consume(d) if owned else step.deviate(d)
            owned = step.owned
        return d

    def param_shift(self) -> Tensor | None:
        """f(a; theta') - f(a; theta), after :meth:`refresh`, of a chain whose input never moves; None where zero."""
        d = None
        for step in self.steps:
            d = step.param_shift() if d is None else step.deviate(d)
        return d

    def pullback(self, e: Tensor) -> Tensor:
        for step in reversed(self.steps):
            e = step.pullback(e)
        return e

    def at(self, d: Tensor) -> None:
        """Make a + d the current point where nobody reads the deviation itself: the last step need not give it."""
        for step in self.steps[:-1]:
            d = step.deviate(d)
        for step in self.steps[-1:]:
            step.at(d)

    def descend(self, d: Tensor, e: Tensor, rate: float) -> None:
        """d -= rate * J^T e in place."""
        if not self.steps:
            d.sub_(e, alpha=rate)
            return
        self.steps[0].descend(d, self.tail.pullback(e), rate)

    def gradients(self, e: Tensor) -> Gradients:
        """Gradients of the layer's parameters for the error ``e`` at the current point."""
        return self.differentiate(e, need_input=False)[0]

    def differentiate(self, e: Tensor, *, need_input: bool, need_gradients: bool = True, factor: float = 1.0):
        """``(gradients for factor * e, J^T e)``; the second is None unless ``need_input``."""
        result: Gradients = []
        lowest = 0  # the lowest step that the error has to reach
        if not need_input:
            owners = [i for i, step in enumerate(self.steps) if need_gradients and step.has_gradients]
            if not owners:
                return result, None
            lowest = owners[0]
        for i in range(len(self.steps) - 1, lowest - 1, -1):
            inner, e = self.steps[i].differentiate(
                e, need_input=i > lowest or need_input, need_gradients=need_gradients, factor=factor
            )
            result += inner
        return result, e


class ResidualStep(Step):
    """y = a + f(a), ``branch`` being f. Deviations: d + (f(a + d) - f(a)); errors: e + J_f^T e.

    Both are sums of what is small already, so that nothing cancels.
    """

    owned = True

    def __init__(self, spec, module, precision, branch: Chain):
        super().__init__(spec, module, precision)
        self.branch = branch

    def forward(self, a):
        out = self.branch.forward(a)
        check_kept(tuple(a.shape), tuple(out.shape))
        return a + out

    def deviate(self, d):
        moved = self.branch.deviate(d)
        return moved.add_(d) if self.branch.owned else d + moved

    def pullback(self, e):
        return e + self.branch.pullback(e)

    def snapshot_params(self):
        self.branch.snapshot_params()

    def refresh(self):
        self.branch.refresh()

    def param_shift(self):
        return self.branch.param_shift()

    def descend(self, d, e, rate):
        self.branch.descend(d, e, rate)
        d.sub_(e, alpha=rate)

    def at(self, d):
        self.branch.at(d)

    def release(self):
        self.branch.release()

    def update_statistics(self, failed):
        self.branch.update_statistics(failed)

    def undo(self):
        self.branch.undo()

    def differentiate(self, e, **wanted):
        result, below = self.branch.differentiate(e, **wanted)
        return result, (None if below is None else e + below)

    def gradients(self, e):
        return self.branch.gradients(e)

    def zero_gradients(self):
        return self.branch.zero_gradients()

    @property
    def has_gradients(self):
        return self.branch.has_gradients
