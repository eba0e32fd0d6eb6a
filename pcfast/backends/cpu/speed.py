"""Where products run: in lane groups, in rows by torch's BLAS, or in torch, by what was measured to be fastest."""

from __future__ import annotations

import functools

from ...kernels.codes import LOSSES
from ...problem.plan import Plan
from ...support import cpu_module
from .program import CONVOLUTION, LINEAR, Layer, layers_of

LANE_GROUPS, ROWS = "lane groups", "rows"

# Where torch's products are faster, measured on one core of a Xeon with AVX-512 and 2 MB of L2 (time of eager over
# time of this backend, relu, n = 5 to 20). Linear layers of one width, batch 64 to 512: 1.2 to 1.9 at 600, 1.5 at
# 800, 0.5 to 0.9 from 1024 on, where a layer's weights leave the cache. With 1 or 4 rows, which fill few lanes: 1.1
# and 2.8 at 384, 0.9 at 600; 1.2 with 8 rows. Convolutions of 3x3 in maps of 16x16 to 32x32: 1.1 and more up to 64
# channels in and out, 0.6 and 0.8 with 128. One forward and one backward pass: 1.1 and 1.2 with layers of 784x128
# and 128x128, 0.9 with 784x600.
_MAX_WEIGHT_BYTES = 3 << 20
_MAX_WEIGHT_BYTES_ONCE = 1 << 20
_FEW_ROWS = 8
_MAX_CONVOLUTION_WEIGHTS = 1 << 16


def slower_than_torch(plan: Plan, layers: tuple[Layer, ...]) -> str:
    """Why torch's products are faster; "" where they are not."""
    few = plan.x_shape[0] < _FEW_ROWS
    limit = _MAX_WEIGHT_BYTES_ONCE if few else _MAX_WEIGHT_BYTES
    for spec, layer in zip(plan.network.layers, layers, strict=True):
        if layer.kind == CONVOLUTION and layer.weights > _MAX_CONVOLUTION_WEIGHTS:
            return (
                f"{spec.label}: torch's convolutions are faster from {_MAX_CONVOLUTION_WEIGHTS:,} weights on, here "
                f"{layer.weights:,}: use eager"
            )
        size = layer.weights * plan.dtype.itemsize
        if layer.kind == LINEAR and spec.index > 1 and size > limit:
            rows = f" for fewer than {_FEW_ROWS} rows" if few else ""
            return (
                f"{spec.label}: torch's products are faster from {limit >> 20} MiB of weights on{rows}, here "
                f"{size / 2**20:.1f} MiB: use eager"
            )
    return ""


@functools.lru_cache(maxsize=256)
def natively(plan: Plan) -> str:
    """In what the kernels run a plan that :meth:`Cpu.supports` lets pass: LANE_GROUPS, or ROWS with torch's BLAS; ""
    where torch does, as in eager."""
    if plan.method == "strict" and plan.depth > 1:
        return LANE_GROUPS
    wanted = plan.wanted
    if wanted.states or wanted.activations or plan.loss not in LOSSES:
        return ""
    layers = layers_of(plan.network, plan.shapes)
    if isinstance(layers, str):
        return ""
    if all(
        layer.weights <= _MAX_CONVOLUTION_WEIGHTS
        if layer.kind == CONVOLUTION
        else layer.weights * plan.dtype.itemsize <= _MAX_WEIGHT_BYTES_ONCE
        for layer in layers
    ):
        return LANE_GROUPS
    in_rows = all(layer.kind == LINEAR and layer.product_alone for layer in layers)
    return ROWS if in_rows and cpu_module.gemm(plan.dtype) else ""
