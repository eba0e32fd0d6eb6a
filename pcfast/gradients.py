"""The true gradient, parameters by PC layer, and how far one tensor is from another.

Distances are 0-dim float64 tensors on the tensors' device, without waiting for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import ModelError
from .losses import LossLike, describe_loss
from .model.describe import describe
from .support.replay import recorded_buffers, replaying


def vector(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors as one float64 vector; a complex entry counts as two."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([t.detach().to(torch.float64).reshape(-1) for t in real])


def relative_error(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b|. Where b is zero: 0 if a is zero too, else NaN."""
    a, b = vector([a]), vector([b])
    size, distance = torch.linalg.vector_norm(b), torch.linalg.vector_norm(a - b)
    no_error = torch.where(distance == 0, 0.0, math.nan)
    return torch.where(size == 0, no_error, distance / size)


def angle_degrees(a: Tensor, b: Tensor) -> Tensor:
    """Angle between a and b in degrees, 0..180; NaN where one of them is zero or not finite.

    2 atan2(|a/|a| - b/|b||, |a/|a| + b/|b||), which keeps its digits near 0 and 180 where acos loses them
    (W. Kahan, "How futile are mindless assessments of roundoff in floating-point computation?", 2006, section 12).
    """
    a, b = vector([a]), vector([b])
    sizes = torch.linalg.vector_norm(a), torch.linalg.vector_norm(b)
    a, b = (
        v / size.masked_fill(size.isinf(), math.nan) for v, size in zip((a, b), sizes, strict=True)
    )  # 0 / 0: NaN
    return torch.rad2deg(2 * torch.atan2(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b)))


def true_gradient(
    model: nn.Sequential, x: Tensor, y, *, loss: LossLike = "cross_entropy"
) -> dict[nn.Parameter, Tensor]:
    """dLoss/dtheta of every parameter that requires it, by torch autograd through ``model(x)``.

    ``.grad``, the buffers (BatchNorm's statistics) and torch's random state (dropout) stay as they are: a
    relaxation that follows draws the same masks.

    Args: as for :func:`pcfast.pc_loss`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad(), replaying(x.device)(), recorded_buffers(model)():
        value = describe_loss(loss).value(model(x.clone()), y)  # a clone: the first module may work in place
        result = torch.autograd.grad(value, parameters, allow_unused=True)
    return in_full(parameters, result)


def parameters_of_layers(model: nn.Sequential) -> dict[int, list[nn.Parameter]]:
    """The parameters that require gradients by PC layer 1..L; layers without any are left out."""
    describe(model)
    result = {l: [p for p in layer.parameters() if p.requires_grad] for l, layer in enumerate(model, start=1)}
    result = {l: parameters for l, parameters in result.items() if parameters}
    if not result:
        raise ModelError("model", "no parameter that requires a gradient", "at least one")
    return result


def in_full(parameters: list[nn.Parameter], result) -> dict[nn.Parameter, Tensor]:
    """The gradients by parameter, zeros where there is none."""
    return {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, result, strict=True)}
