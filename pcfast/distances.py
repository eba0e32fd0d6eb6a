"""How far one tensor is from another: 0-dim float64 tensors on its device, without waiting for that."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


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
