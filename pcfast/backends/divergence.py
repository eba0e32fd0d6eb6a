"""Checks of a relaxation in deviation form: what is not finite is raised at once, or noted on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ..errors import RelaxationDiverged
from ..problem import status
from ..problem.types import Outcome, Problem
from .forward import ForwardPass

Observe = Callable[[int, dict[int, Tensor]], None]


class Checks:
    """The checks of one relaxation.

    Attributes:
        observe: takes every iteration's states, ``(iteration, layer -> tensor)``; None where nobody looks at them:
            checks at once look at the results alone, and relax once more where those are not finite.
    """

    def __init__(self, problem: Problem, forward: ForwardPass) -> None:
        self._problem, self._forward = problem, forward
        self._builder = None
        self._summed: dict[int, tuple[Tensor, Tensor]] = {}  # results and their sums
        if problem.check and not problem.raise_now:
            self._builder = status.StatusBuilder()
            self._builder.begin(problem.x, forward.vhat[1:], forward.loss_values)

    @property
    def deferred(self) -> bool:
        """Whether the outcome's status tells what was found, instead of an exception."""
        return self._builder is not None

    @property
    def observe(self) -> Observe | None:
        return None if self._builder is None else self._builder.observe

    def observe_first(self, first_bad: Tensor, num_steps: int) -> None:
        """Take a kernel's own record: ``first_bad`` (L-1,), the iteration that left v_l NaN or infinite."""
        if self._builder is not None:
            self._builder.observe_first(first_bad, num_steps)

    def see(self, results: Iterable[Tensor]) -> None:
        """Look at results of :meth:`finish` while a cache still holds them."""
        if self._builder is None and self._problem.check:
            for result in results:
                if result.numel() > status.SMALL and not result.is_sparse:
                    self._summed[id(result)] = result, status.sum_of(result)

    def finish(
        self,
        out: Outcome,
        results: list[tuple[int, Tensor]],
        locate: Callable[[], None] = lambda: None,
    ) -> None:
        """Look at the results.

        Args:
            results: (layer, tensor) of what the relaxation gave, updates aside.
            locate: raises RelaxationDiverged where it finds the first iteration that was not finite.

        Raises:
            RelaxationDiverged, NonFiniteError: at once.
        """
        if self._builder is not None:
            self.defer(out, self._builder, [*results, *out.updates_by_layer()])
            return
        forward, problem = self._forward, self._problem
        if not problem.check:
            return
        values = [
            *forward.vhat[1:], *forward.loss_values, *(value for _, value in results), *out.gradients.values()
        ]  # fmt: skip
        if status.all_of_finite_sums(total for _, total in self._summed.values()):
            values = [value for value in values if id(value) not in self._summed]
        if status.all_finite(values):
            return
        bad = status.first_non_finite(forward.vhat[1:])
        if bad is not None:
            raise RelaxationDiverged(0, bad + 1, problem.step_size)
        if not status.all_finite(forward.loss_values):
            raise status.bad_loss()
        locate()
        results = [*results, *out.updates_by_layer()]
        raise RelaxationDiverged(None, lowest_bad(results), problem.step_size)

    def defer(
        self,
        out: Outcome,
        builder: status.StatusBuilder,
        results: list[tuple[int, Tensor]],
        iteration: int | None = None,
    ) -> None:
        """Leave word of what ``builder`` and ``results`` say, and zero the updates where it is bad."""
        out.status = builder.build(self._forward.invalid_labels, results, iteration)
        zeroed = status.zeroed_if_bad(out.status, list(out.gradients.values()))
        out.gradients = dict(zip(out.gradients, zeroed, strict=True))

    def raise_where_bad(self, iteration: int, states: dict[int, Tensor]) -> None:
        """As :attr:`observe`: raise for the first of an iteration's states that is not finite."""
        bad = status.first_non_finite(list(states.values()))
        if bad is not None:
            raise RelaxationDiverged(iteration, list(states)[bad], self._problem.step_size)


def lowest_bad(results: list[tuple[int, Tensor]]) -> int:
    """The lowest layer of a (layer, tensor) that is not finite."""
    return min(layer for layer, value in results if not status.all_finite([value]))


def check_iteration(iteration: int, results: Sequence[tuple[int, Tensor | None]], step_size: float) -> None:
    """Before the parameters move: raise where an error or update is not finite. ``results``: (layer, tensor).

    Raises:
        RelaxationDiverged: of the lowest such layer.
    """
    results = [(layer, value) for layer, value in results if value is not None]
    if status.all_finite([value for _, value in results]):
        return
    raise RelaxationDiverged(
        iteration,
        lowest_bad(results),
        step_size,
        f"The parameters stay as iteration {iteration - 1} left them",
    )
