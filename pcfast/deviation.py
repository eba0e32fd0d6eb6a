"""Operations in deviation form (docs/method.md fact 8).

A :class:`Step` evaluates one operation f at a base point a (:meth:`Step.forward`), then any number of times
the deviation f(a + d) - f(a) for small d without cancellation (:meth:`Step.deviate`), the product of its
transposed Jacobian with an error at the last point (:meth:`Step.pullback`), and its parameters' gradients
there (:meth:`Step.gradients`). A :class:`Chain` does the same for a whole PC layer.

State is kept in ``Precision.state``; matrix operands are cast to ``Precision.operand``. No autograd, except in
:class:`OpaqueStep` for modules that pcfast does not know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import network as specs
from .errors import ModelError, ShapeError
from .randomness import replaying

Gradients = list[tuple[nn.Parameter, Tensor]]
_aten = torch.ops.aten


@dataclass(frozen=True)
class Precision:
    """Dtypes of a relaxation.

    Attributes:
        state: beliefs, errors, pre-activations, losses, sums.
        operand: what matrix products and convolutions read.
        autocast: dtype of the ambient autocast under which opaque modules run; None without autocast.
        note: what the user should know about the choice; "" where there is nothing to say.
    """

    state: torch.dtype
    operand: torch.dtype
    autocast: torch.dtype | None = None
    note: str = ""

    def to_operand(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.operand else tensor.to(self.operand)

    def to_state(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == self.state else tensor.to(self.state)


class Step:
    """One operation at work in one relaxation. ``spec`` says what, ``precision`` in which dtypes."""

    def __init__(self, spec: specs.Op, module: nn.Module, precision: Precision) -> None:
        self.spec, self.module, self.precision = spec, module, precision

    def forward(self, a: Tensor) -> Tensor:
        """f(a); makes a the base point and the current one."""
        raise NotImplementedError

    def deviate(self, d: Tensor) -> Tensor:
        """f(a + d) - f(a); makes a + d the current point."""
        raise NotImplementedError

    def pullback(self, e: Tensor) -> Tensor:
        """J^T e at the current point."""
        raise NotImplementedError

    def descend(self, d: Tensor, e: Tensor, rate: float) -> None:
        """d -= rate * J^T e in place."""
        d.sub_(self.pullback(e), alpha=rate)

    def at(self, d: Tensor) -> None:
        """Make a + d the current point where nobody reads the deviation itself."""
        self.deviate(d)

    def gradients(self, e: Tensor) -> Gradients:
        """(parameter, (df/dtheta)^T e) at the current point, for parameters that require it."""
        return []

    def zero_gradients(self) -> Gradients:
        """What :meth:`gradients` gives for a zero error."""
        return [(p, torch.zeros_like(p)) for p in self.module.parameters() if p.requires_grad]

    @property
    def has_gradients(self) -> bool:
        """True where :meth:`gradients` would give any."""
        return any(p is not None and p.requires_grad for p in self.module._parameters.values())


class _AffineStep(Step):
    """What linear layers and convolutions share: cast weights, remember the input."""

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self.weight = precision.to_operand(self.module.weight.detach())
        bias = self.module.bias
        self.bias = None if bias is None else precision.to_state(bias.detach())
        self._input: Tensor | None = None
        self._deviation: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """The current input a + d."""
        return self._input if self._deviation is None else self._input + self._deviation

    def at(self, d):
        self._deviation = d  # an affine Jacobian does not depend on the point: nothing to evaluate


class LinearStep(_AffineStep):
    """u = a W^T + b. Deviations: d W^T; errors: e W."""

    def forward(self, a):
        self._input, self._deviation = a, None
        if self.precision.operand == self.precision.state:
            return F.linear(a, self.weight, self.bias)
        u = self.precision.to_state(F.linear(self.precision.to_operand(a), self.weight))
        return u if self.bias is None else u.add_(self.bias)

    def deviate(self, d):
        self._deviation = d
        return self.precision.to_state(F.linear(self.precision.to_operand(d), self.weight))

    def pullback(self, e):
        return self.precision.to_state(torch.matmul(self.precision.to_operand(e), self.weight))

    def descend(self, d, e, rate):
        if e.dim() == 2 and self.precision.operand == self.precision.state:
            d.addmm_(e, self.weight, alpha=-rate)
        else:
            super().descend(d, e, rate)

    def gradients(self, e):
        found: Gradients = []
        rows = e.reshape(-1, e.shape[-1])
        if self.module.weight.requires_grad:
            inputs = self.input.reshape(-1, self.spec.in_features)
            product = self.precision.to_operand(rows).t() @ self.precision.to_operand(inputs)
            found.append((self.module.weight, product))
        if self.bias is not None and self.module.bias.requires_grad:
            found.append((self.module.bias, rows.sum(0)))
        return found

    def gram(self) -> Tensor:
        """G = W W^T, (out, out)."""
        return self.weight @ self.weight.t()

    def gram_product(self, gram: Tensor, delta: Tensor) -> Tensor:
        """delta G: what deviating by the pullback of delta gives."""
        return self.precision.to_state(torch.matmul(self.precision.to_operand(delta), gram))

    def gram_descend(self, gram: Tensor, s: Tensor, delta: Tensor, rate: float) -> None:
        """s = (1 - rate) s - rate delta G in place."""
        if delta.dim() == 2 and self.precision.operand == self.precision.state:
            s.addmm_(delta, gram, beta=1 - rate, alpha=-rate)
        else:
            s.mul_(1 - rate).sub_(self.gram_product(gram, delta), alpha=rate)


class Conv2dStep(_AffineStep):
    """u = a * K + b (cross-correlation). Errors: the transposed convolution."""

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._geometry = (spec.stride, spec.padding, spec.dilation)

    def _as_operand(self, tensor: Tensor) -> Tensor:
        # cuDNN's fast kernels read channels_last; on CPU the layout given is kept.
        if tensor.is_cuda:
            return tensor.to(dtype=self.precision.operand, memory_format=torch.channels_last)
        return self.precision.to_operand(tensor)

    def forward(self, a):
        if a.is_cuda:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self._input, self._deviation = a, None
        u = self._convolve(a)
        return u if self.bias is None else u.add_(self.bias.view(1, -1, 1, 1))

    def _convolve(self, a: Tensor) -> Tensor:
        product = F.conv2d(self._as_operand(a), self.weight, None, *self._geometry, self.spec.groups)
        return self.precision.to_state(product)

    def deviate(self, d):
        self._deviation = d
        return self._convolve(d)

    def _backward(self, e: Tensor, inputs: Tensor, mask: list[bool]):
        return _aten.convolution_backward(
            e, inputs, self.weight, None, *self._geometry, False, [0, 0], self.spec.groups, mask
        )

    def pullback(self, e):
        e = self._as_operand(e)
        # Only the shape of the input counts for the input's gradient.
        shape_only = self._as_operand(self._input)
        return self.precision.to_state(self._backward(e, shape_only, [True, False, False])[0])

    def gradients(self, e):
        found: Gradients = []
        if self.module.weight.requires_grad:
            operands = self._as_operand(e), self._as_operand(self.input)
            found.append((self.module.weight, self._backward(*operands, [False, True, False])[1]))
        if self.bias is not None and self.module.bias.requires_grad:
            found.append((self.module.bias, e.sum((0, 2, 3))))
        return found

    def gram(self) -> Tensor:
        """G = K correlated with itself, (out, out, 2k-1, 2k-1): stride 1, no padding, no dilation."""
        rows, columns = self.spec.kernel
        return F.conv2d(self.weight, self.weight, padding=(rows - 1, columns - 1))

    def gram_product(self, gram: Tensor, delta: Tensor) -> Tensor:
        rows, columns = self.spec.kernel
        product = F.conv2d(self._as_operand(delta), gram, padding=(rows - 1, columns - 1))
        return self.precision.to_state(product)

    def gram_descend(self, gram: Tensor, s: Tensor, delta: Tensor, rate: float) -> None:
        s.mul_(1 - rate).sub_(self.gram_product(gram, delta), alpha=rate)


class ElementwiseStep(Step):
    """a = act(u): bracket and slope of activations.py."""

    def forward(self, a):
        out = self.spec.activation.forward(a)
        self._base, self._anchor, self._slope = (a, out), None, None
        return out

    def deviate(self, d):
        activation = self.spec.activation
        if self._anchor is None:
            self._anchor = activation.anchor(*self._base)
            self._base = None  # the anchor holds what is still needed
        bracket, self._slope = activation.deviate(self._anchor, d)
        return bracket

    def pullback(self, e):
        if self._slope is None:
            self._slope = self.spec.activation.slope(*self._base)
        return self.spec.activation.pullback(self._slope, e)


class MaxPool2dStep(Step):
    """max over windows; the arg-max at the current point routes errors (first wins ties, NaN wins).

    Where windows tile the input, max_k((a_k - a_k*) + d_k) is free of cancellation. Overlapping or padded
    windows choose their arg-max from a + d and then difference exactly: (a_k' - a_k*) + d_k'.
    """

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._geometry = (spec.kernel, spec.stride, spec.padding)

    def _pool(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return _aten.max_pool2d_with_indices(a, *self._geometry, (1, 1), self.spec.ceil_mode)

    def forward(self, a):
        out, self._winners = self._pool(a)
        self._input, self._pooled, self._below_winner = a, out, None
        return out

    def _relative_to_winner(self) -> Tensor:
        """a_k - a_k* for every element; elements outside all windows keep 0."""
        (rows, columns), (height, width) = self.spec.kernel, self._input.shape[2:]
        winner = self._pooled.repeat_interleave(rows, 2).repeat_interleave(columns, 3)[:, :, :height, :width]
        relative = torch.zeros_like(self._input)
        covered = (slice(None), slice(None), slice(winner.shape[2]), slice(winner.shape[3]))
        relative[covered] = self._input[covered] - winner
        return relative

    def deviate(self, d):
        if self.spec.tiles:
            if self._below_winner is None:
                self._below_winner = self._relative_to_winner()
            out, self._winners = self._pool(self._below_winner + d)
            return out
        self._winners = self._pool(self._input + d)[1]
        chosen = self._winners.flatten(2)
        base = self._input.flatten(2).gather(2, chosen).view_as(self._pooled)
        return (base - self._pooled) + d.flatten(2).gather(2, chosen).view_as(self._pooled)

    def pullback(self, e):
        return _aten.max_pool2d_with_indices_backward(
            e.contiguous(), self._input, *self._geometry, (1, 1), self.spec.ceil_mode, self._winners
        )


class _LinearMapStep(Step):
    """A linear map without parameters: deviations go through the map itself."""

    def _apply(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, a):
        self._shape = a.shape
        return self._apply(a)

    def deviate(self, d):
        return self._apply(d)


class AvgPool2dStep(_LinearMapStep):
    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._geometry = (
            spec.kernel,
            spec.stride,
            spec.padding,
            spec.ceil_mode,
            spec.count_include_pad,
            spec.divisor_override,
        )

    def _apply(self, a):
        return F.avg_pool2d(a, *self._geometry)

    def pullback(self, e):
        shape_only = e.new_zeros(()).expand(self._shape)
        return _aten.avg_pool2d_backward(e.contiguous(), shape_only, *self._geometry)


class AdaptiveAvgPool2dStep(_LinearMapStep):
    def _apply(self, a):
        return F.adaptive_avg_pool2d(a, self.spec.size)

    def pullback(self, e):
        shape_only = e.new_zeros(()).expand(self._shape)
        return _aten._adaptive_avg_pool2d_backward(e.contiguous(), shape_only)


class ReshapeStep(_LinearMapStep):
    """Flatten and Unflatten."""

    def _apply(self, a):
        return a.reshape(self.spec.output_shape(tuple(a.shape)))

    def pullback(self, e):
        return e.reshape(self._shape)


class DropoutStep(_LinearMapStep):
    """One mask a step, drawn in the forward pass as torch draws it, reused in every iteration."""

    def forward(self, a):
        draw = getattr(F, self.spec.kind)
        self._mask = draw(torch.ones_like(a), self.spec.p, training=True)
        return super().forward(a)

    def _apply(self, a):
        return a * self._mask

    def pullback(self, e):
        return e * self._mask


class BatchNormStep(Step):
    """y = gamma (a - m) / sigma + beta.

    In training mode m and sigma are those of the current beliefs and are differentiated through; the running
    statistics move in :meth:`forward` alone. In eval mode it is a fixed scale per channel.
    """

    def forward(self, a):
        module, spec = self.module, self.spec
        self._axes = (0, *range(2, a.dim()))
        self._view = (1, -1, *[1] * (a.dim() - 2))
        self._count = a.numel() // spec.features
        gamma = self.precision.to_state(module.weight.detach()) if spec.affine else None
        beta = self.precision.to_state(module.bias.detach()) if spec.affine else None
        self._gamma = 1.0 if gamma is None else gamma.view(self._view)
        self._beta = 0.0 if beta is None else beta.view(self._view)
        if spec.batch_statistics:
            self._check_count()
            variance, mean = torch.var_mean(a, self._axes, correction=0, keepdim=True)
            self._move_running_statistics(mean.flatten(), variance.flatten())
        else:
            mean = self.precision.to_state(module.running_mean).view(self._view)
            variance = self.precision.to_state(module.running_var).view(self._view)
        self._centred = a - mean
        self._variance = variance
        self._inverse = torch.rsqrt(variance + spec.eps)
        self._point(self._centred, self._inverse)
        return self._normalised * self._gamma + self._beta

    def _check_count(self) -> None:
        if self._count <= 1:
            raise ShapeError(
                "x",
                "a batch with one value per channel",
                "more than one value per channel for BatchNorm in training mode",
                "Use a larger batch or model.eval().",
            )

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        module = self.module
        if not module.training or module.running_mean is None:
            return
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        momentum = self.spec.momentum
        if momentum is None:  # cumulative average
            momentum = 1.0 / module.num_batches_tracked.to(mean.dtype)
        unbiased = variance * (self._count / (self._count - 1))
        for running, current in ((module.running_mean, mean), (module.running_var, unbiased)):
            running.add_((current - running) * momentum)

    def _point(self, centred: Tensor, inverse: Tensor) -> None:
        """The current point; x - m normalised is what gradients read."""
        self._normalised, self._current_inverse = centred * inverse, inverse

    def deviate(self, d):
        if not self.spec.batch_statistics:
            self._point(self._centred + d, self._inverse)
            return d * (self._gamma * self._inverse)
        shift = d - d.mean(self._axes, keepdim=True)
        # var(a + d) - var(a), and from it 1/sigma' - 1/sigma without cancellation
        spread = (shift * (2 * self._centred + shift)).mean(self._axes, keepdim=True)
        inverse = torch.rsqrt(self._variance + spread + self.spec.eps)
        sharpening = -spread * inverse * self._inverse * (inverse * self._inverse) / (inverse + self._inverse)
        self._point(self._centred + shift, inverse)
        return self._gamma * (shift * inverse + self._centred * sharpening)

    def pullback(self, e):
        scaled = e * (self._gamma * self._current_inverse)
        if not self.spec.batch_statistics:
            return scaled
        along = (scaled * self._normalised).mean(self._axes, keepdim=True)
        return scaled - scaled.mean(self._axes, keepdim=True) - self._normalised * along

    def gradients(self, e):
        found: Gradients = []
        if self.spec.affine and self.module.weight.requires_grad:
            found.append((self.module.weight, (e * self._normalised).sum(self._axes)))
        if self.spec.affine and self.module.bias.requires_grad:
            found.append((self.module.bias, e.sum(self._axes)))
        return found


class OpaqueStep(Step):
    """A module that pcfast does not know, by torch autograd; deviations by plain subtraction.

    Its random numbers and buffers are those of the forward pass in every evaluation.
    """

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        self._dtype = precision.state if precision.autocast else next(floating, precision.state)

    def _evaluate(self, a: Tensor) -> Tensor:
        dtype = self.precision.autocast
        ambient = torch.autocast(a.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with torch.enable_grad(), ambient:
            self._leaf = a.detach().to(self._dtype).requires_grad_(True)
            # a clone, so that modules that work in place never touch the beliefs
            self._out = self.module(self._leaf.clone())
        if not isinstance(self._out, Tensor):
            raise ModelError(
                "model",
                f"{self.spec.name}, which returns a {type(self._out).__name__}",
                "modules that map one tensor to one tensor",
            )
        return self.precision.to_state(self._out.detach())

    def forward(self, a):
        self._random, self._buffers = replaying(a.device), recorded_buffers(self.module)
        self._base = a
        self._base_out = self._evaluate(a)
        return self._base_out

    def deviate(self, d):
        with self._random(), self._buffers():
            return self._evaluate(self._base + d) - self._base_out

    def _grad(self, wanted: list[Tensor], e: Tensor) -> tuple[Tensor | None, ...]:
        if not self._out.requires_grad:
            return (None,) * len(wanted)
        return torch.autograd.grad(
            self._out, wanted, e.to(self._out.dtype), retain_graph=True, allow_unused=True
        )

    def pullback(self, e):
        (gradient,) = self._grad([self._leaf], e)
        return torch.zeros_like(self._base) if gradient is None else self.precision.to_state(gradient)

    def gradients(self, e):
        if not self._parameters:
            return []
        found = zip(self._parameters, self._grad(self._parameters, e), strict=True)
        return [(p, g) for p, g in found if g is not None]

    @property
    def has_gradients(self):
        return bool(self._parameters)

    def zero_gradients(self):
        return self.gradients(torch.zeros_like(self._base_out))  # unused parameters stay without


def recorded_buffers(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Remember the module's buffers as they are; the returned context manager lends it copies of those.

    Every evaluation of a step starts from the same statistics, which move once. The buffers themselves are
    never written, not even to put them back: autograd graphs may hold them.
    """
    found = {
        (owner, name): buffer
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    }
    values = {buffer: buffer.clone() for buffer in found.values()}

    @contextlib.contextmanager
    def lend():
        held = {(owner, name): owner._buffers[name] for owner, name in found}
        copies = {buffer: value.clone() for buffer, value in values.items()}  # one, however often registered
        try:
            for (owner, name), buffer in found.items():
                owner._buffers[name] = copies[buffer]
            yield
        finally:
            for (owner, name), buffer in held.items():
                owner._buffers[name] = buffer

    return lend


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
    specs.BatchNorm: BatchNormStep,
    specs.Opaque: OpaqueStep,
}


def _pool_first(ops: tuple[specs.Op, ...]) -> list[specs.Op]:
    """Max-pooling before a monotone activation gives the same numbers on a quarter of the elements."""
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


def settle(steps: list[Step], d: Tensor) -> None:
    """Make a + d the current point of a chain of steps; the last one need not be evaluated."""
    for step in steps[:-1]:
        d = step.deviate(d)
    for step in steps[-1:]:
        step.at(d)


class Chain:
    """One PC layer f_l at work: its steps in order, and the same verbs as a step."""

    def __init__(self, spec: specs.LayerSpec, model: nn.Module, precision: Precision) -> None:
        self.spec = spec
        self.steps = [
            _STEPS[type(op)](op, model.get_submodule(op.path), precision) for op in _pool_first(spec.ops)
        ]

    def forward(self, v: Tensor) -> Tensor:
        for step in self.steps:
            v = step.forward(v)
        return v

    def deviate(self, d: Tensor) -> Tensor:
        for step in self.steps:
            d = step.deviate(d)
        return d

    def pullback(self, e: Tensor) -> Tensor:
        for step in reversed(self.steps):
            e = step.pullback(e)
        return e

    def at(self, d: Tensor) -> None:
        """Make a + d the current point where nobody reads the deviation itself."""
        settle(self.steps, d)

    @property
    def has_gradients(self) -> bool:
        return any(step.has_gradients for step in self.steps)

    def zero_gradients(self) -> Gradients:
        """What :meth:`gradients` gives for a zero error."""
        return [entry for step in self.steps for entry in step.zero_gradients()]

    def descend(self, d: Tensor, e: Tensor, rate: float) -> None:
        """d -= rate * J^T e in place."""
        if not self.steps:
            d.sub_(e, alpha=rate)
            return
        for step in reversed(self.steps[1:]):
            e = step.pullback(e)
        self.steps[0].descend(d, e, rate)

    def gradients(self, e: Tensor) -> Gradients:
        """Gradients of the layer's parameters for the error ``e`` at the current point."""
        return self.differentiate(e, need_input=False)[0]

    def differentiate(self, e: Tensor, *, need_input: bool, need_gradients: bool = True, factor: float = 1.0):
        """``(gradients for factor * e, J^T e)``; the second is None unless ``need_input``."""
        found: Gradients = []
        lowest = 0  # the lowest step that the error has to reach
        if not need_input:
            owners = [i for i, step in enumerate(self.steps) if need_gradients and step.has_gradients]
            if not owners:
                return found, None
            lowest = owners[0]
        for i in range(len(self.steps) - 1, lowest - 1, -1):
            step = self.steps[i]
            if need_gradients and step.has_gradients:
                found += step.gradients(e if factor == 1.0 else e * factor)
            if i > lowest or need_input:
                e = step.pullback(e)
        return found, (e if need_input else None)
