"""What a caller asks of a relaxation, whatever the model and the batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from ..losses import Loss, LossLike, describe_loss
from . import belief_optimizers, early_exit, nudging, reductions, validation
from .belief_optimizers import BeliefOptimizer, StepSize
from .nudging import Nudging
from .per_layer import PerLayer
from .plan import canonical

#: Settings that only relaxations on graphs read.
BEYOND_CHAINS = ("precision", "noise", "generator")
#: One for all, one for each layer of a chain, by the names of a graph's nodes; a tensor has one for each unit.
Precisions = float | Sequence[float | Tensor] | Mapping[str, float | Tensor] | PerLayer
StepSizes = float | Sequence[float] | Mapping[str, float | Sequence[float]] | PerLayer


@dataclass(frozen=True)
class Relaxing:
    """The settings that an iteration reads, checked; attributes as in :class:`Settings`."""

    method: str
    step_size: StepSize
    num_steps: int
    belief_optimizer: BeliefOptimizer
    tolerance: float | None


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of :func:`pcfast.pc_loss` and :func:`pcfast.relax`, whose docstrings say what each is.

    They are as the caller gave them; :meth:`checked` and :meth:`described_loss` give what the rest of pcfast reads.
    ``loss`` is None where the gradient at the output is given instead, or where the loss is not decided yet.
    """

    loss: LossLike | None = "cross_entropy"
    method: str = "strict"
    step_size: StepSizes = 0.1
    num_steps: int = 20
    belief_optimizer: BeliefOptimizer | None = None
    nudging: Nudging | None = None
    backend: str = "auto"
    vinit: list[Tensor | None] | float | None = None
    reduction: str = "sum"
    update_scale: float = 1.0
    normalizer: int | None = None
    tolerance: float | None = None
    check: str = "auto"
    precision: Precisions | None = None
    noise: float | None = None
    generator: torch.Generator | None = None

    @property
    def beyond_chains(self) -> bool:
        """Whether they ask for what relaxations on graphs do alone."""
        if self.precision is None and self.noise is None and type(self.step_size) is float:
            return False
        return (
            self.precision is not None
            or self.noise is not None
            or isinstance(self.step_size, Mapping | PerLayer)
        )

    def checked(self, *, moves: bool = False) -> Relaxing:
        """The settings of the iterations, checked.

        Args:
            moves: something moves the parameters in every iteration, so that the method may be "incremental".

        Raises:
            ArgumentError and its kinds: naming the setting.
        """
        given = (
            self.method, self.check, self.num_steps, self.step_size, self.belief_optimizer, self.reduction,
            self.update_scale, self.tolerance, moves,
        )  # fmt: skip
        # others may be mutable, or hold a bool, which equals the number that a cache would take it for
        plain = all(type(value) in PLAIN for value in given)
        return _checked(*given) if plain else _checked.__wrapped__(*given)

    def checked_on_graphs(self, *, moves: bool = False) -> Relaxing:
        """As :meth:`checked`, without the step sizes, which a graph's nodes have their own of."""
        return replace(self, step_size=0.0).checked(moves=moves)

    def defers_checks(self, given: Tensor) -> bool:
        """Whether bad values of a call with the tensor ``given`` are reported by a later one."""
        return self.check == "deferred" or (self.check == "auto" and given.is_cuda)

    def described_loss(self, *, known: bool = True) -> Loss | None:
        """The loss, described; None where there is none.

        Args:
            known: there has to be a loss.

        Raises:
            ArgumentError and its kinds: a loss that pcfast cannot use, or one that ``reduction`` or ``nudging`` does
                not go with.
        """
        loss = None
        if known or self.loss is not None:
            # with another reduction than a sum the normalizer is that reduction's
            loss = describe_loss(self.loss, self.normalizer if self.reduction == "sum" else None)
        reductions.check_loss(self.reduction, loss)
        nudging.check(self.nudging, canonical(self.method), loss and loss.kind)
        return loss


#: Of settings: values that are equal where calls are, if their types are, too. Others may change inside.
PLAIN = frozenset((str, int, float, bool, type(None), Nudging, *get_args(BeliefOptimizer)))


@functools.lru_cache(maxsize=256, typed=True)
def _checked(
    method, check, num_steps, step_size, belief_optimizer, reduction, update_scale, tolerance, moves
) -> Relaxing:
    method = validation.checked_method(method, moves=moves)
    validation.check_choice(check)
    num_steps = validation.checked_steps(num_steps)
    step_size = validation.checked_step_sizes(step_size, num_steps)
    if isinstance(step_size, tuple) and len(set(step_size)) <= 1:
        step_size = step_size[0] if step_size else 0.0
    belief_optimizer = belief_optimizers.checked(belief_optimizer, method)
    reductions.checked(reduction, method)
    reductions.checked_scale(update_scale)
    return Relaxing(method, step_size, num_steps, belief_optimizer, early_exit.checked(tolerance, method))
