"""Exceptions of pcfast. Every message says what was given, what is needed and what to do."""

from __future__ import annotations


class PcfastError(Exception):
    """Base class of every exception that pcfast raises itself."""


class ArgumentError(PcfastError, ValueError):
    """An argument has a value that pcfast cannot use.

    Attributes:
        argument: the argument's name as the caller wrote it.
        given: what was given, in words.
        needed: what is needed, in words.
    """

    def __init__(self, argument: str, given: str, needed: str, remedy: str = "") -> None:
        self.argument, self.given, self.needed, self.remedy = argument, given, needed, remedy
        message = f"{argument}: got {given}; needed: {needed}."
        super().__init__(f"{message} {remedy}" if remedy else message)

    def __reduce__(self):  # ValueError would rebuild from the message alone
        return type(self), (self.argument, self.given, self.needed, self.remedy)


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a type that pcfast cannot use."""


class ModelError(ArgumentError):
    """The model cannot be read as a chain of predictive-coding layers."""


class ShapeError(ArgumentError):
    """A tensor's shape does not fit the model, the target or another tensor."""


class NonFiniteError(ArgumentError):
    """A tensor given by the caller holds NaN or infinity."""


class BackendError(PcfastError, RuntimeError):
    """A backend asked for by name cannot run this problem."""


class TransformError(PcfastError, RuntimeError):
    """pcfast is called inside a function transformation that it does not take part in."""


class RelaxationDiverged(PcfastError, ArithmeticError):
    """Beliefs or errors became NaN or infinite.

    Attributes:
        iteration: relaxation iteration, 1-based; 0 means the forward pass before the relaxation;
            None means that no belief was non-finite in any iteration, but an error, an update or the loss is.
        layer: PC layer, 1-based, lowest of those that were non-finite in that iteration; of a graph the node's name.
        step_size: eta of the run, a tuple for a schedule.
    """

    def __init__(
        self,
        iteration: int | None,
        layer: int | str | None,
        step_size: float | tuple[float, ...],
        detail: str = "",
    ) -> None:
        self.iteration, self.layer, self.step_size, self.detail = iteration, layer, step_size, detail
        if isinstance(step_size, tuple):
            step_size = step_size[iteration - 1] if iteration else max(step_size, default=0.0)
        what = f"node {layer!r}" if isinstance(layer, str) else f"layer {layer}"
        if iteration == 0:
            where = f"the forward pass of {what} is not finite, before any relaxation"
            remedy = "Check the parameters and the scale of x; lower the optimiser's learning rate."
        elif iteration is None:
            where = f"the errors, updates or loss of {what} are not finite (step size {step_size:g})"
            remedy = "Try a smaller step_size; check the scale of x and of the loss, and the parameters."
        else:
            where = f"relaxation diverged in iteration {iteration} at {what} with step size {step_size:g}"
            remedy = (
                f"Try a smaller step_size (e.g. {step_size / 2:g}), fewer num_steps, a mean instead of a sum "
                'loss, smaller weights, or method="fixed_prediction" with step_size <= 1.'
            )
        super().__init__(". ".join(part for part in (where, detail, remedy) if part))

    def __reduce__(self):
        return type(self), (self.iteration, self.layer, self.step_size, self.detail)
