"""Which implementation runs a relaxation on a graph, and its failures by the nodes' names."""

from __future__ import annotations

from dataclasses import replace

from ..errors import BackendError, PcfastError, RelaxationDiverged
from ..precision import numerics
from . import reference
from .error_based import error_based
from .forward import nodes_at_work, undone_on_failure
from .incremental import incremental
from .one_backward import closed_form, one_backward, path_keys
from .problem import GraphOutcome, GraphPlan, GraphProblem
from .strict import strict

#: In the order of "auto".
BACKENDS = ("eager", "reference")
#: What other backends say.
ONLY_CHAINS = (
    "its kernels run chains; on graphs, and with precision=, noise= or a step size a layer, eager runs"
)


def _fixed_prediction(problem: GraphProblem, plan: GraphPlan, nodes) -> GraphOutcome:
    loop = isinstance(path_keys(problem), str)
    return strict(problem, plan, nodes) if loop else closed_form(problem, plan, nodes)


_METHODS = {
    "exact": one_backward,
    "zero_divergence": one_backward,
    "fixed_prediction": _fixed_prediction,
    "strict": strict,
    "error_based": error_based,
    "incremental": incremental,
}


def eager_supports(plan: GraphPlan) -> tuple[bool, str]:
    """``(ok, reason)``, as :meth:`pcfast.backends.base.Backend.supports`."""
    if not plan.dtype.is_floating_point:
        return False, f"eager relaxes real floating dtypes, not {plan.dtype}"
    if plan.spec.foreign:
        node = plan.spec.foreign[0]
        return False, (
            f"node {node.name!r} has {len(node.inputs)} inputs and a module that does not begin with a plain "
            "pcfast.Sum or pcfast.Concatenate"
        )
    return True, ""


def choose(asked: str, plan: GraphPlan) -> GraphPlan:
    """``plan`` with its backend.

    Raises:
        BackendError: the one asked for by name cannot run it.
    """
    ok, reason = eager_supports(plan)
    if asked == "auto":
        return replace(
            plan, backend="eager" if ok else "reference", refusals=() if ok else (("eager", reason),)
        )
    if asked not in BACKENDS:
        ok, reason = False, ONLY_CHAINS
    if asked != "reference" and not ok:
        raise BackendError(f"backend {asked!r} cannot run this: {reason}. Use backend='auto'.")
    return replace(plan, backend=asked)


def run(problem: GraphProblem, plan: GraphPlan) -> GraphOutcome:
    """Run it on ``plan.backend``.

    Raises:
        RelaxationDiverged: naming the node.
    """
    try:
        if plan.backend == "reference":
            return reference.run(problem, plan)
        with numerics(plan.device, plan.precision):
            nodes = nodes_at_work(problem, plan)
            with undone_on_failure(nodes):
                outcome = _METHODS[problem.method](problem, plan, nodes)
    except RelaxationDiverged as error:
        raise _by_name(error, problem) from None
    if outcome.status is not None:
        causes = tuple(_Named(cause, problem) for cause in outcome.status.causes)
        outcome.status = replace(outcome.status, causes=causes)
    return outcome


class _Named:
    """The cause of a failure that is told later, by name."""

    def __init__(self, cause, problem: GraphProblem) -> None:
        self._cause, self._names, self._step_sizes = cause, problem.spec.names, problem.step_sizes

    def __call__(self, step_size) -> PcfastError:
        error = self._cause(step_size)
        return (
            _renamed(error, self._names, self._step_sizes) if isinstance(error, RelaxationDiverged) else error
        )


def _by_name(error: RelaxationDiverged, problem: GraphProblem) -> RelaxationDiverged:
    return _renamed(error, problem.spec.names, problem.step_sizes)


def _renamed(error: RelaxationDiverged, names: tuple[str, ...], step_sizes: list) -> RelaxationDiverged:
    index = min(error.layer, len(names)) - 1
    return RelaxationDiverged(error.iteration, names[index], step_sizes[index], error.detail)
