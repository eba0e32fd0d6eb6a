"""What becomes of each layer: which kernels run it."""

from __future__ import annotations

from dataclasses import dataclass

from ...deviation.chain import pool_first
from ...kernels.conv_geometry import ConvGeometry
from ...model import spec as specs
from ...model.activations import Activation
from ..kernel_forms import LinearForm, PointwiseForm, TorchForm
from .tensor_layout import Boundary


@dataclass(frozen=True)
class ConvForm:
    """A convolution and its tail as implicit GEMMs: conv_predict and conv_feedback.

    Attributes:
        convolution: index of the layer's Conv2d among its steps.
        geometry: sizes, the pool's included.
        before, after: activations in front of and behind the pool, or None; without a pool the one is ``after``.
    """

    convolution: int
    geometry: ConvGeometry
    before: Activation | None
    after: Activation | None


Form = LinearForm | PointwiseForm | ConvForm | TorchForm


def conv_form(form: Form, layer: specs.LayerSpec, below: Boundary) -> ConvForm | None:
    """``form`` of a layer as one implicit GEMM a stage; None where the kernels cannot do that."""
    if not isinstance(form, PointwiseForm) or form.convolution is None:
        return None
    convolution = pool_first(layer.ops)[form.convolution]
    if convolution.groups != 1 or convolution.dilation != (1, 1):
        return None
    channels, height, width = below.map
    kind, window, before, after = None, (1, 1), form.before, form.after
    if form.pool is not None:
        kind = "max" if isinstance(form.pool, specs.MaxPool2d) else "avg"
        window = form.pool.kernel
    else:
        before, after = None, form.before
    geometry = ConvGeometry(
        height, width, channels, convolution.out_channels, convolution.kernel, convolution.stride,
        convolution.padding, kind, window,
    )  # fmt: skip
    return None if geometry.refusal(before) else ConvForm(form.convolution, geometry, before, after)
