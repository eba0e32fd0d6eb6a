"""How beliefs move down their gradients: gradient descent with momentum and weight decay, Adam (docs/method.md).

The gradient of beliefs v_l in iteration t = 1, 2, ... is

    g = J_{l+1}^T eps_{l+1} - eps_l + lambda v_l

that of the energy sum 0.5 |eps_l|^2 + loss and of 0.5 lambda |v_l|^2; lambda is the weight decay, 0 for Adam.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import checked_number
from ..errors import ArgumentError, ArgumentTypeError
from ..support.uploads import uploaded

StepSize = float | tuple[float, ...]  # one for all iterations, or one an iteration


def step_size_of(step_size: StepSize, iteration: int) -> float:
    """eta_t of iteration t = 1, 2, ..."""
    return step_size[iteration - 1] if isinstance(step_size, tuple) else step_size


@uploaded(capacity=16)
def schedule_on_device(step_sizes: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A schedule where kernels read it. Uploaded once: a CUDA graph cannot record a copy from the host."""
    return torch.tensor(step_sizes, dtype=dtype, device=device)


@dataclass(frozen=True)
class GradientDescent:
    """m <- momentum m + g,  v <- v - eta_t m, from m = 0: torch.optim.SGD without dampening, optax.sgd.

    With ``nesterov`` v <- v - eta_t (g + momentum m), m as it is after this iteration's update.

    Attributes:
        momentum: in [0, 1).
        weight_decay: lambda >= 0; pulls beliefs, not their distance from the forward pass, to 0.
        nesterov: look ahead along the momentum; with momentum > 0.

    Raises:
        ArgumentError and its kinds: a value outside.
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        momentum = checked_number(
            "momentum", self.momentum, lambda m: 0 <= m < 1, "a number in [0, 1)",
            "From 1 on the beliefs' velocity never decays; 0.9 is common.",
        )  # fmt: skip
        decay = checked_number(
            "weight_decay", self.weight_decay, lambda d: d >= 0, "a finite number >= 0",
            "A negative one drives beliefs away from 0; 0 switches it off.",
        )  # fmt: skip
        if not isinstance(self.nesterov, bool):
            raise ArgumentTypeError("nesterov", repr(self.nesterov), "True or False")
        if self.nesterov and not momentum:
            raise ArgumentError(
                "nesterov", "True with momentum 0", "momentum > 0", "Without one it changes nothing."
            )
        object.__setattr__(self, "momentum", momentum)
        object.__setattr__(self, "weight_decay", decay)

    def __repr__(self) -> str:  # checkpoints tell runs apart by it: without Nesterov it stays what it was
        nesterov = ", nesterov=True" if self.nesterov else ""
        return f"GradientDescent(momentum={self.momentum}, weight_decay={self.weight_decay}{nesterov})"

    @property
    def plain(self) -> bool:
        """v <- v - eta_t g with the energy's gradient alone."""
        return self.momentum == 0 and self.weight_decay == 0

    @property
    def linear(self) -> bool:
        """v's path is linear in the energy's gradients, with the same scalars for all beliefs."""
        return self.weight_decay == 0

    @property
    def rests(self) -> bool:
        """Beliefs whose energy gradients have been zero so far have not moved."""
        return self.weight_decay == 0

    def descent(self) -> _Momentum:
        """What moves one tensor of beliefs."""
        return _Momentum(self.momentum, self.nesterov)

    def on_mean(self, rows: int, step_size: StepSize) -> tuple[GradientDescent, StepSize]:
        """Optimiser and step size that move beliefs on an energy as these do on its mean over ``rows``."""
        sizes = tuple(size / rows for size in step_size) if isinstance(step_size, tuple) else step_size / rows
        return replace(self, weight_decay=self.weight_decay * rows), sizes


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba (2015), algorithm 1, as torch.optim.Adam; t counts the relaxation's iterations:

        m <- b1 m + (1 - b1) g    s <- b2 s + (1 - b2) g^2
        v <- v - eta_t (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    Beliefs move by about eta_t an iteration however small their gradients are; where all have been exactly zero
    they stay, 0 / (0 + eps).

    Attributes:
        betas: (b1, b2), each in [0, 1).
        eps: > 0.

    Raises:
        ArgumentError and its kinds: a value outside.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ArgumentTypeError("betas", repr(self.betas), "two numbers in [0, 1)", "E.g. (0.9, 0.999).")
        betas = tuple(
            checked_number("betas", beta, lambda b: 0 <= b < 1, "two numbers in [0, 1)", "E.g. (0.9, 0.999).")
            for beta in self.betas
        )
        eps = checked_number(
            "eps", self.eps, lambda e: e > 0, "a finite number > 0",
            "Without one beliefs at rest would move by 0 / 0.",
        )  # fmt: skip
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "eps", eps)

    weight_decay = 0.0
    momentum = 0.0
    nesterov = False
    plain = False
    linear = False
    rests = True

    def descent(self) -> _Adam:
        """What moves one tensor of beliefs."""
        return _Adam(self.betas, self.eps)

    def on_mean(self, rows: int, step_size: StepSize) -> tuple[Adam, StepSize]:
        """As for :class:`GradientDescent`: the scale of the energy cancels, but for eps."""
        return replace(self, eps=self.eps * rows), step_size


BeliefOptimizer = GradientDescent | Adam
PLAIN = GradientDescent()


class _Momentum:
    def __init__(self, momentum: float, nesterov: bool) -> None:
        self._momentum, self._nesterov, self._velocity = momentum, nesterov, None

    def move(self, gradient: Tensor, step_size: float, iteration: int) -> Tensor:
        """What iteration ``iteration`` adds to the beliefs at ``gradient``; call it once an iteration, in order.

        Iterations before the first call count as ones with zero gradients.
        """
        if self._momentum == 0:
            return gradient * -step_size
        if self._velocity is None:
            self._velocity = gradient.clone()
        else:
            self._velocity = self._velocity * self._momentum + gradient
        if self._nesterov:
            return (gradient + self._velocity * self._momentum) * -step_size
        return self._velocity * -step_size


class _Adam:
    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self._betas, self._eps = betas, eps
        self._first = self._second = None

    def move(self, gradient: Tensor, step_size: float, iteration: int) -> Tensor:
        """As for :meth:`_Momentum.move`."""
        if gradient.is_complex():  # as torch.optim.Adam has it: two real numbers
            return torch.view_as_complex(self.move(torch.view_as_real(gradient), step_size, iteration))
        b1, b2 = self._betas
        if self._first is None:
            self._first, self._second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self._first = b1 * self._first + (1 - b1) * gradient
        self._second = b2 * self._second + (1 - b2) * gradient.square()
        root = (self._second / (1 - b2**iteration)).sqrt()
        return self._first / (1 - b1**iteration) / (root + self._eps) * -step_size


#: Methods that take plain gradient descent alone, and why.
_WITHOUT = {
    "exact": "It computes beliefs at once",
    "zero_divergence": "Its schedule is that of plain steps of size 1",
    "error_based": "It moves errors, not beliefs",
}


def checked(optimizer, method: str) -> BeliefOptimizer:
    """``optimizer``, with plain gradient descent for None.

    Raises:
        ArgumentTypeError, ArgumentError: none of these classes, or one with a method that moves no beliefs.
    """
    if optimizer is None:
        return PLAIN
    if not isinstance(optimizer, BeliefOptimizer):
        given = repr(optimizer) if isinstance(optimizer, str | type) else f"a {type(optimizer).__name__}"
        raise ArgumentTypeError(
            "belief_optimizer", given, "pcfast.GradientDescent(...), pcfast.Adam(...) or None",
            "Optimisers of torch.optim are for parameters.",
        )  # fmt: skip
    if method in _WITHOUT and not optimizer.plain:
        raise ArgumentError(
            "belief_optimizer", f"{optimizer} with method {method!r}",
            "method strict, fixed_prediction or incremental, or no belief optimiser", f"{_WITHOUT[method]}.",
        )  # fmt: skip
    return optimizer
