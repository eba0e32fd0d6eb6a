"""Which kinds of Triton kernels a design launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernel_forms import LinearForm, PointwiseForm

if TYPE_CHECKING:
    from .launch_plan import Design

LINEAR, FUSED_LOOP, LINEAR_GRAM, WIDE_OUTPUT = "linear", "mlp_relaxation", "linear_gram", "wide_output"
POINTWISE, POOLING, POINTWISE_GRAM = "pointwise", "pooling", "pointwise_gram"
CONVOLUTION, MOMENTUM, START = "convolution", "momentum", "start"
#: In the order in which they are tested.
NAMES = (
    LINEAR, FUSED_LOOP, LINEAR_GRAM, WIDE_OUTPUT, POINTWISE, POOLING, POINTWISE_GRAM, CONVOLUTION, MOMENTUM,
    START,
)  # fmt: skip


def names_of(design: Design) -> set[str]:
    """The kinds of kernels of one relaxation."""
    from .conv_form import ConvForm  # here: it imports triton

    names = {MOMENTUM} if design.momentum else set()
    if not design.fresh:
        names.add(START)
    if design.wide_top:
        names.add(WIDE_OUTPUT)
    for l in range(2, design.depth + 1):
        form, in_gram_form = design.forms[l], design.gram and l == 2
        if isinstance(form, LinearForm):
            names.add(FUSED_LOOP if design.fuse_loop else LINEAR)
            if in_gram_form:
                names.add(LINEAR_GRAM)
        elif isinstance(form, ConvForm):
            names.add(CONVOLUTION)
        elif isinstance(form, PointwiseForm):
            names.add(POINTWISE if form.pool is None else POOLING)
            if in_gram_form:
                names.add(POINTWISE_GRAM)
        elif not (in_gram_form and design.gram_by_torch):
            names.add(POINTWISE)  # torch's layer, whose beliefs below a kernel moves
    return names
