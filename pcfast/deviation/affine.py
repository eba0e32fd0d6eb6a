"""Linear layers and convolutions.

Where parameters move (:meth:`Step.refresh`), with a the base input and W', b' the parameters of now,

    f(a + d; W', b') - f(a; W, b) = W' d + (W' - W) a + (b' - b)

whose last two terms, the drift, do not depend on d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import host
from .step import Gradients, Step

_aten = torch.ops.aten


class _AffineStep(Step):
    """What linear layers and convolutions share: cast weights, remember the input."""

    owned = True

    def __init__(self, spec, module, precision):
        super().__init__(spec, module, precision)
        self.weight = precision.to_operand(self.module.weight.detach())
        bias = self.module.bias
        self.bias = None if bias is None else precision.to_state(bias.detach())
        self._input: Tensor | None = None
        self._deviation: Tensor | None = None
        self._change: tuple[Tensor, Tensor | None] | None = None  # of weight and bias since hold
        self._difference: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """The current input a + d."""
        return self._input if self._deviation is None else self._input + self._deviation

    def at_input(self, a: Tensor) -> None:
        """Make ``a`` the current input."""
        self._input, self._deviation = a, None

    def snapshot_params(self):
        if self.has_gradients:
            bias = self.module.bias
            self._held = self.module.weight.detach().clone(), None if bias is None else bias.detach().clone()

    def refresh(self):
        if not self.has_gradients:
            return
        held, bias = self._held
        weight = self.module.weight.detach()
        self.weight = self._as_operand(weight)
        # Before an error comes, and where the optimiser holds other parameters, the host can save a product.
        same = self._change is None and host.readable(weight.device) and torch.equal(weight, held)
        if same and (bias is None or torch.equal(self.module.bias, bias)):
            return
        # The change is as large as the weight: it keeps its place from iteration to iteration.
        self._difference = torch.sub(weight, held, out=self._difference)
        moved = None if bias is None else self.precision.to_state(self.module.bias.detach() - bias)
        self._change = self._as_operand(self._difference), moved

    def param_shift(self):
        return None if self._change is None else self._affine(self._input, *self._change)

    def _as_operand(self, tensor: Tensor) -> Tensor:
        return self.precision.to_operand(tensor)

    def _affine(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``a`` times ``weight``, which is cast already, plus ``bias``, in the state dtype."""
        raise NotImplementedError

    def _add_product(self, u: Tensor, d: Tensor) -> Tensor:
        """``u`` in place, plus ``d`` times the weight of now."""
        return u.add_(self._affine(d, self.weight, None))

    def deviate(self, d):
        self._deviation = d
        shift = self.param_shift()
        return self._affine(d, self.weight, None) if shift is None else self._add_product(shift, d)

    def at(self, d):
        self._deviation = d  # an affine Jacobian does not depend on the point: nothing to evaluate


class LinearStep(_AffineStep):
    """u = a W^T + b. Deviations: d W^T; errors: e W."""

    def forward(self, a):
        self._input, self._deviation = a, None
        return self._affine(a, self.weight, self.bias)

    def _affine(self, a, weight, bias):
        if self.precision.operand == self.precision.state:
            return F.linear(a, weight, bias)
        u = self.precision.to_state(F.linear(self.precision.to_operand(a), weight))
        return u if bias is None else u.add_(bias)

    def _add_product(self, u, d):
        if d.dim() == 2 and self.precision.operand == self.precision.state:
            return u.addmm_(d, self.weight.t())
        return super()._add_product(u, d)

    def pullback(self, e):
        return self.precision.to_state(torch.matmul(self.precision.to_operand(e), self.weight))

    def descend(self, d, e, rate):
        if e.dim() == 2 and self.precision.operand == self.precision.state:
            d.addmm_(e, self.weight, alpha=-rate)
        else:
            super().descend(d, e, rate)

    def gradients(self, e):
        result: Gradients = []
        rows, inputs = e, self.input
        if e.dim() != 2:
            rows, inputs = e.reshape(-1, e.shape[-1]), inputs.reshape(-1, self.spec.in_features)
        if self.module.weight.requires_grad:
            product = self.precision.to_operand(rows).t() @ self.precision.to_operand(inputs)
            result.append((self.module.weight, product))
        if self.bias is not None and self.module.bias.requires_grad:
            result.append((self.module.bias, rows.sum(0)))
        return result

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
        operand = self._as_operand(a)
        self._like_input = operand if operand is a else None  # a copy need not live on
        return self._affine(operand, self.weight, self.bias)

    def product(self, a: Tensor) -> Tensor:
        """a * K in the operand dtype."""
        return F.conv2d(self._as_operand(a), self.weight, None, *self._geometry, self.spec.groups)

    def _affine(self, a, weight, bias):
        operands = self._as_operand(a), weight, None
        u = self.precision.to_state(F.conv2d(*operands, *self._geometry, self.spec.groups))
        return u if bias is None else u.add_(bias.view(1, -1, 1, 1))

    def _backward(self, e: Tensor, inputs: Tensor, mask: list[bool]):
        return _aten.convolution_backward(
            e, inputs, self.weight, None, *self._geometry, False, [0, 0], self.spec.groups, mask
        )

    def product_pulled_back(self, e: Tensor, like: Tensor | None = None) -> Tensor:
        """The transposed convolution of e, in the operand dtype.

        Args:
            like: of the input's shape, in the operand dtype: only shape and layout count for its gradient.
        """
        if like is None:
            if self._like_input is None:
                layout = torch.channels_last if self._input.is_cuda else torch.preserve_format
                self._like_input = torch.empty_like(
                    self._input, dtype=self.precision.operand, memory_format=layout
                )
            like = self._like_input
        return self._backward(self._as_operand(e), like, [True, False, False])[0]

    def pullback(self, e):
        return self.precision.to_state(self.product_pulled_back(e))

    def gradients(self, e):
        result: Gradients = []
        if self.module.weight.requires_grad:
            operands = self._as_operand(e), self._as_operand(self.input)
            result.append((self.module.weight, self._backward(*operands, [False, True, False])[1]))
        if self.bias is not None and self.module.bias.requires_grad:
            result.append((self.module.bias, e.sum((0, 2, 3))))
        return result

    def gram(self) -> Tensor:
        """G = K correlated with itself, (out, out, 2k-1, 2k-1): stride 1, no padding, no dilation."""
        rows, columns = self.spec.kernel
        return F.conv2d(self.weight, self.weight, padding=(rows - 1, columns - 1))

    def gram_convolved(self, gram: Tensor, delta: Tensor) -> Tensor:
        """delta G in the operand dtype."""
        rows, columns = self.spec.kernel
        return F.conv2d(self._as_operand(delta), gram, padding=(rows - 1, columns - 1))

    def gram_product(self, gram: Tensor, delta: Tensor) -> Tensor:
        return self.precision.to_state(self.gram_convolved(gram, delta))

    def gram_descend(self, gram: Tensor, s: Tensor, delta: Tensor, rate: float) -> None:
        s.mul_(1 - rate).sub_(self.gram_product(gram, delta), alpha=rate)
