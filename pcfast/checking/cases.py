"""The relaxations that a qualification tests each kind of kernels with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..backends.cuda import kinds as resident
from ..backends.triton import kinds as streamed
from ..backends.triton.configs import COMPOSED, FUSED, IMPLICIT, STAGED
from ..networks import mlp


@dataclass(frozen=True)
class Case:
    """One small problem.

    Attributes:
        model: makes the network. sample: shape of one sample. batch: of them.
        loss, momentum, vinit: settings of the relaxation; vinit is a number for all units.
        loop, convolutions: FUSED or STAGED, IMPLICIT or COMPOSED, whatever the triton backend's rules say.
        large: for a GPU alone, so that it takes the tiles of large layers.
    """

    model: Callable[[], nn.Sequential]
    sample: tuple[int, ...]
    batch: int = 9
    loss: str = "cross_entropy"
    momentum: float = 0.0
    vinit: float | None = None
    loop: str = STAGED
    convolutions: str = COMPOSED
    large: bool = False


def _mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> Callable[[], nn.Sequential]:
    return lambda: mlp(widths, activation)


def _between(features: int, *ops: Callable[[], nn.Module], channels: int = 3) -> Callable[[], nn.Sequential]:
    """Layer 2 of 4 is made of ``ops`` and gives so many features; it reads maps of some channels, 6 x 6 pixels."""
    return lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(2, channels, 3, padding=1), nn.Tanh()),
        nn.Sequential(*(make() for make in ops), nn.Flatten()),
        nn.Sequential(nn.Linear(features, 9), nn.Sigmoid()),
        nn.Linear(9, 4),
    )


def _conv(*sizes: int, **settings: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*sizes, **settings)


def _max_pool() -> nn.Module:
    return nn.MaxPool2d(2)


def _avg_pool() -> nn.Module:
    return nn.AvgPool2d(2)


def _bare() -> nn.Sequential:
    """A PC layer for each activation."""
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 24), nn.GELU(), nn.Linear(24, 5))


_MAP = (2, 6, 6)
_WIDENING, _NARROWING = _mlp(12, 20, 33, 17, 10), _mlp(12, 33, 9, 10)  # without and with the Gram form
_WIDE, _DEEP = _mlp(256, 2048, 2048, 2048, 10, activation=nn.ReLU), _mlp(64, 128, 256, 10, activation=nn.GELU)
_PLAIN_CONV = _between(144, _conv(3, 4, 3, padding=1), nn.Tanh)
_STRIDED_CONV = _between(36, _conv(3, 4, 3, stride=2, padding=1), nn.SiLU)
_MAX_CONV = _between(45, _conv(3, 5, 3, padding=1), nn.Tanh, _max_pool)
_AVG_CONV = _between(36, _conv(3, 4, 3, padding=1), _avg_pool, nn.SiLU)
_GRAM_CONV = _between(60, _conv(12, 3, (3, 2)), nn.Tanh, channels=12)

#: (backend, kind) -> what it is tested with.
CASES: dict[tuple[str, str], tuple[Case, ...]] = {
    ("triton", streamed.LINEAR): (
        Case(_WIDENING, (12,)),
        Case(_WIDENING, (12,), loss="mse"),
        Case(_WIDE, (256,), 1024, large=True),  # 64 x 128 in predictions
        Case(_WIDE, (256,), 2048, large=True),  # 128 x 128
        Case(_DEEP, (64,), 200, large=True),
    ),
    ("triton", streamed.FUSED_LOOP): (
        Case(_WIDENING, (12,), loop=FUSED),
        Case(_WIDENING, (12,), loss="mse", loop=FUSED),
        Case(_DEEP, (64,), 200, loop=FUSED, large=True),
    ),
    ("triton", streamed.LINEAR_GRAM): (Case(_NARROWING, (12,)), Case(_NARROWING, (12,), loop=FUSED)),
    ("triton", streamed.WIDE_OUTPUT): (Case(_mlp(12, 20, 100), (12,)),),
    ("triton", streamed.POINTWISE): (Case(_bare, (12,)), Case(_PLAIN_CONV, _MAP)),
    ("triton", streamed.POOLING): (Case(_MAX_CONV, _MAP), Case(_AVG_CONV, _MAP)),
    ("triton", streamed.POINTWISE_GRAM): (Case(_GRAM_CONV, _MAP),),
    ("triton", streamed.CONVOLUTION): (
        Case(_MAX_CONV, _MAP, convolutions=IMPLICIT),
        Case(_AVG_CONV, _MAP, convolutions=IMPLICIT),
        Case(_STRIDED_CONV, _MAP, convolutions=IMPLICIT),
    ),
    ("triton", streamed.MOMENTUM): (
        Case(_NARROWING, (12,), momentum=0.5),
        Case(_WIDENING, (12,), momentum=0.5, loop=FUSED),
        Case(_GRAM_CONV, _MAP, momentum=0.5),
        Case(_MAX_CONV, _MAP, momentum=0.5, convolutions=IMPLICIT),
    ),
    ("triton", streamed.START): (
        Case(_WIDENING, (12,), vinit=0.1),
        Case(_WIDENING, (12,), vinit=0.1, loop=FUSED),
        Case(_MAX_CONV, _MAP, vinit=0.1),
    ),
    ("cuda", resident.LINEAR): (
        Case(_WIDENING, (12,)),
        Case(_WIDENING, (12,), loss="mse"),
        Case(_mlp(64, 100, 120, 10, activation=nn.GELU), (64,), 200, large=True),
    ),
    ("cuda", resident.CONVOLUTION): (Case(_PLAIN_CONV, _MAP), Case(_STRIDED_CONV, _MAP)),
    ("cuda", resident.POOLING): (Case(_MAX_CONV, _MAP), Case(_AVG_CONV, _MAP)),
    ("cuda", resident.POINTWISE): (Case(_bare, (12,)),),
    ("cuda", resident.GRAM): (Case(_NARROWING, (12,)), Case(_GRAM_CONV, _MAP)),
    ("cuda", resident.MOMENTUM): (
        Case(_WIDENING, (12,), momentum=0.5),
        Case(_NARROWING, (12,), momentum=0.5),
        Case(_MAX_CONV, _MAP, momentum=0.5),
    ),
    ("cuda", resident.START): (Case(_WIDENING, (12,), vinit=0.1), Case(_MAX_CONV, _MAP, vinit=0.1)),
}
