"""Which kinds of code the resident CUDA kernel runs for a plan."""

from __future__ import annotations

from ...problem.plan import Plan
from ..kernel_forms import LinearForm, layer_form, maps

LINEAR, CONVOLUTION, POOLING, POINTWISE = "linear", "convolution", "pooling", "pointwise"
GRAM, MOMENTUM, START = "gram", "momentum", "start"
#: In the order in which they are tested.
NAMES = (LINEAR, CONVOLUTION, POOLING, POINTWISE, GRAM, MOMENTUM, START)


def names_of(plan: Plan) -> set[str]:
    """The kinds of one relaxation that the kernel runs."""
    names = {MOMENTUM} if plan.belief_optimizer.momentum > 0 else set()
    if not plan.fresh:
        names.add(START)
    if plan.gram:
        names.add(GRAM)
    around = maps(plan.network, plan.shapes)
    for layer in plan.network.layers[1:]:
        form = layer_form(layer, plan.shapes[layer.index - 1], around[layer.index - 1])
        if isinstance(form, LinearForm):
            names.add(LINEAR)
            continue
        names.add(POINTWISE if form.convolution is None else CONVOLUTION)
        if form.pool is not None:
            names.add(POOLING)
    return names
