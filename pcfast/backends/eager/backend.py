"""The methods in deviation form with plain PyTorch operations, no autograd in the loop; one file a method.

exact, fixed_prediction and zero_divergence cost one forward and one backward pass for any number of iterations
(one_backward.py); strict, error_based and incremental iterate.
"""

from __future__ import annotations

from ...deviation import layer_chain
from ...precision import numerics
from ...problem.types import Outcome
from ...support.replay import recorded_buffers
from ..base import Backend, without_closed_form
from ..forward import layer_chains, undone_on_failure
from .error_based import error_based
from .incremental import incremental
from .one_backward import one_backward
from .strict import strict

_METHODS = {
    "exact": one_backward,
    "fixed_prediction": one_backward,
    "zero_divergence": one_backward,
    "strict": strict,
    "error_based": error_based,
    "incremental": incremental,
}


class Eager(Backend):
    name = "eager"

    def supports(self, plan):
        if not plan.dtype.is_floating_point:
            return False, f"eager relaxes real floating dtypes, not {plan.dtype}"
        reason = without_closed_form(plan)
        return not reason, reason

    def replays(self, problem, plan):
        return replays(problem, plan)

    def run(self, problem, plan):
        return run(problem, plan)

    def updates(self, model, network, precision, x, beliefs, errors):
        return updates(model, network, precision, x, beliefs, errors)


def replays(problem, plan) -> tuple[bool, str]:
    """As :meth:`Backend.replays`, of relaxations in deviation form."""
    if plan.network.opaque:
        op = plan.network.opaque[0]
        return False, f"{op.name} runs through autograd ({op.why})"
    if problem.loss is not None and not problem.loss.known:
        return False, "a loss that pcfast does not know may change between calls"
    return True, ""


def run(problem, plan) -> Outcome:
    """As :meth:`Backend.run`."""
    with numerics(problem.x.device, plan.precision):
        chains = layer_chains(problem, plan)
        with undone_on_failure(chains):
            return _METHODS[plan.method](problem, plan, chains)


def updates(model, network, precision, x, beliefs, errors):
    """As :meth:`Backend.updates`."""
    outcome = Outcome(None, None)
    with numerics(x.device, precision), recorded_buffers(model)():
        v = x
        for l, spec in enumerate(network.layers, start=1):
            chain = layer_chain(spec, model, precision)
            given = v if beliefs is None else beliefs[l - 1]
            v = chain.forward(precision.to_state(given) if given.is_floating_point() else given)
            outcome.add_gradients(chain.gradients(precision.to_state(errors[l])), l)
    return outcome.gradients
