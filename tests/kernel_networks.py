"""The networks that the tests of the kernels run, interpreted, compiled for the CPU, or as PTX."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn

import pcfast

__all__ = [
    "GRAM_TAILS",
    "IMPLICIT",
    "ON_CPUS",
    "RESIDENT",
    "STREAMED",
    "clamped",
    "conv_net",
    "drawn",
    "mlp",
    "narrowing_conv_net",
]

BATCH = 9


def mlp(*widths: int, activation=nn.Tanh, dtype=torch.float32) -> nn.Sequential:
    hidden = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*hidden, nn.Linear(*widths[-2:])).to(dtype)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(45, 13), nn.Sigmoid()),
        nn.Linear(13, 5),
    )


#: name -> (network, shape of a sample, form of each layer from the second on)
STREAMED = {
    "mlp": (lambda: mlp(12, 20, 33, 17, 10), (12,), "lll"),
    "wide output": (lambda: mlp(12, 20, 33), (12,), "l"),
    "one unit": (lambda: mlp(3, 1, 1, 2), (3,), "ll"),
    "two activations": (
        lambda: nn.Sequential(
            *mlp(12, 20, 18), nn.Tanh(), nn.Sequential(nn.Linear(18, 6), nn.SiLU()), nn.Linear(6, 4)
        ),
        (12,),
        "lpll",
    ),
    "bare": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.GELU(), nn.Linear(8, 5)),
        (12,),
        "plpl",
    ),
    "conv": (conv_net, (2, 8, 8), "pll"),
    "bare conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Sigmoid(),
            nn.Linear(16, 5),
        ),
        (2, 8, 8),
        "pppppl",
    ),
    "torch's layers": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh()),
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.MaxPool2d(3, 2, 1)),
            nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh()),
            nn.Linear(7, 4),
        ),
        (1, 8, 8),
        "ttl",
    ),
    "conv on top": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh()), nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
        ),
        (1, 6, 6),
        "t",
    ),
}  # fmt: skip


#: Tails of a convolution whose Gram form costs less than its two products.
GRAM_TAILS = {
    "nothing": [],
    "tanh": [nn.Tanh()],
    "relu, max": [nn.ReLU(), nn.MaxPool2d(2)],
    "gelu, max, rows that fill no window": [nn.GELU(), nn.MaxPool2d(3)],
    "avg, silu": [nn.AvgPool2d((1, 2)), nn.SiLU()],
    "torch's batch norm": [nn.BatchNorm2d(3), nn.Tanh()],
}


def narrowing_conv_net(tail: str) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Layer 2 has far fewer channels than layer 1."""
    torch.manual_seed(2)
    second = nn.Sequential(nn.Conv2d(12, 3, (3, 2)), *copy.deepcopy(GRAM_TAILS[tail]), nn.Flatten())
    below = nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.Tanh())
    x = torch.randn(BATCH, 2, 6, 7)
    features = second(below(x)).shape[1]
    above = [nn.Sequential(nn.Linear(features, 7), nn.Sigmoid()), nn.Linear(7, 4)]
    return nn.Sequential(below, second, *above), x, torch.randint(0, 4, (BATCH,))


def first(out_channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, out_channels, 3, padding=1), nn.Tanh())


def head(features: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(features, 9), nn.Sigmoid()), nn.Linear(9, 4)]


def with_layer(features: int, *ops: nn.Module) -> nn.Sequential:
    """``ops`` as layer 2 of 4."""
    return nn.Sequential(first(), nn.Sequential(*ops, nn.Flatten()), *head(features))


#: The same for convolutions that run as implicit products; forms while they do.
IMPLICIT = {
    "3x3 relu max": (
        lambda: with_layer(45, nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (2, 6, 6), "cll",
    ),
    "3x3 tanh max": (
        lambda: with_layer(45, nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)), (2, 6, 6), "cll",
    ),
    "max first": (
        lambda: with_layer(30, nn.Conv2d(3, 5, 3, padding=1), nn.MaxPool2d((2, 3)), nn.SiLU()), (2, 6, 6), "cll",
    ),
    "stride": (lambda: with_layer(36, nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh()), (2, 5, 6), "cll"),
    "no pool": (lambda: with_layer(80, nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU()), (2, 5, 4), "cll"),
    "nothing behind it": (lambda: with_layer(80, nn.Conv2d(3, 4, 3, padding=1)), (2, 5, 4), "cll"),
    "no bias": (
        lambda: with_layer(80, nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Tanh()), (2, 5, 4), "cll",
    ),
    "5x5": (
        lambda: with_layer(16, nn.Conv2d(3, 4, 5, padding=2), nn.Sigmoid(), nn.MaxPool2d(3)), (2, 6, 6), "cll",
    ),
    "1x1": (lambda: with_layer(36, nn.Conv2d(3, 4, 1, stride=2), nn.Tanh()), (2, 6, 6), "cll"),
    "avg": (
        lambda: with_layer(36, nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2), nn.Tanh()), (2, 6, 6), "cll",
    ),
    "gelu before max": (
        lambda: with_layer(36, nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)), (2, 6, 6), "cll",
    ),
    "rows that fill no window": (
        lambda: with_layer(24, nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)), (2, 5, 7), "cll",
    ),
    "convolutions one after another": (
        lambda: nn.Sequential(
            first(4),
            nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(3, 5, 1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(5, 6, (2, 3)), nn.GELU(), nn.Flatten()),
            *head(24),
        ),
        (2, 7, 8), "cccll",
    ),
    "bare": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 2), nn.Flatten(), nn.Linear(10, 4),
        ),
        (2, 8, 7), "pcppcpl",
    ),
    "features below": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(7, 48), nn.Tanh(), nn.Unflatten(1, (3, 4, 4))),
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten()),
            nn.Linear(64, 4),
        ),
        (7,), "cl",
    ),
    "torch's layers round it": (
        lambda: nn.Sequential(
            first(),
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
            nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            nn.Linear(12, 4),
        ),
        (2, 6, 6), "tctl",
    ),
    "a window too large": (
        lambda: with_layer(4, nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.MaxPool2d(5)), (2, 6, 6), "tll",
    ),
    "what the kernels do not take": (
        lambda: nn.Sequential(
            first(4),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Tanh()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Tanh()),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            nn.Linear(36, 4),
        ),
        (2, 6, 6), "pppl",
    ),
}  # fmt: skip


def resident_head(features: int, classes: int = 5) -> list[nn.Module]:
    return [nn.Sequential(nn.Flatten(), nn.Linear(features, 13), nn.Sigmoid()), nn.Linear(13, classes)]


#: name -> (network, shape of a sample), for the resident kernel
RESIDENT = {
    "mlp": (lambda: mlp(12, 20, 33, 17, 10), (12,)),
    "one unit": (lambda: mlp(3, 1, 1, 2), (3,)),
    "one class": (lambda: mlp(3, 5, 1), (3,)),
    "primes": (lambda: mlp(7, 13, 31, 127, 11), (7,)),
    "around tiles": (lambda: mlp(5, 127, 129, 4), (5,)),
    "whole tiles": (lambda: mlp(5, 32, 128, 32, 4), (5,)),
    "around quads": (lambda: mlp(5, 3, 4, 5, 31, 32, 33), (5,)),
    "classes beyond a warp": (lambda: mlp(12, 20, 70), (12,)),
    "long sums": (lambda: mlp(6, 200, 9, 150, 3), (6,)),
    "most layers": (lambda: mlp(4, *[6] * 15, 3), (4,)),
    "activated output": (lambda: nn.Sequential(*mlp(6, 9, 7), nn.Sequential(nn.Linear(7, 4), nn.Tanh())), (6,)),
    "bare": (
        lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8), nn.GELU(), nn.Linear(8, 5)),
        (12,),
    ),
    "nothing but a copy": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Sequential(), nn.Linear(8, 3), nn.Sigmoid()),
        (6,),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()),
            nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
            *resident_head(45),
        ),
        (2, 8, 8),
    ),
    "pools before activations": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 2), nn.MaxPool2d(2), nn.Tanh()),
            nn.Sequential(nn.Conv2d(4, 6, 2), nn.SiLU(), nn.AvgPool2d((2, 1)), nn.Sigmoid()),
            nn.Sequential(nn.Conv2d(6, 1, 1), nn.AvgPool2d((1, 2)), nn.Tanh()),
            *resident_head(2),
        ),
        (1, 11, 10),
    ),
    "strides and paddings": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(7, 9, (3, 2), stride=(2, 3), padding=(2, 1)), nn.Tanh()),
            nn.Sequential(nn.Conv2d(9, 8, 1, stride=2, padding=1), nn.Sigmoid()),
            *resident_head(8 * 4 * 2),
        ),
        (3, 7, 5),
    ),
    "bare conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Sigmoid(),
            nn.Linear(16, 5),
        ),
        (2, 8, 8),
    ),
    "conv on top": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh()), nn.Sequential(nn.Conv2d(3, 6, 4), nn.Flatten())
        ),
        (1, 6, 6),
    ),
}  # fmt: skip


def _same_size(channels: int, *before: nn.Module) -> list[nn.Module]:
    return [*before, nn.Conv2d(channels, channels, 3, padding=1)]


#: What the CPU kernels run besides RESIDENT.
ON_CPUS = {
    "activations first": (
        lambda: nn.Sequential(
            nn.Sequential(nn.SiLU(), nn.Linear(7, 20)),
            nn.Sequential(nn.Tanh(), nn.Linear(20, 33)),
            nn.Sequential(nn.ReLU(), nn.Linear(33, 9), nn.Sigmoid()),
            nn.Sequential(nn.GELU(), nn.Linear(9, 5)),
        ),
        (7,),
    ),
    "activations before convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.Sequential(*_same_size(3, nn.Tanh()), nn.MaxPool2d(2)),
            nn.Sequential(nn.GELU(approximate="tanh"), nn.Flatten(), nn.Linear(27, 6)),
        ),
        (2, 8, 8),
    ),
    "pools before products": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), *_same_size(4)),
            nn.Sequential(*_same_size(4, nn.GELU(), nn.MaxPool2d(3, 1, 1)), nn.Tanh()),
            nn.Sequential(nn.Tanh(), nn.AvgPool2d(2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(16, 6)),
            nn.Sequential(nn.ReLU(), nn.Linear(6, 4)),
        ),
        (2, 8, 9),
    ),
    "windows that overlap": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            nn.Sequential(*_same_size(3), nn.MaxPool2d((5, 2), 1, (2, 0)), nn.Tanh()),
            nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh(), nn.AvgPool2d(2, 1)),
            *resident_head(4),
        ),
        (2, 8, 9),
    ),
    "windows that are cut": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.MaxPool2d(3, ceil_mode=True)),
            nn.Sequential(
                *_same_size(3), nn.SiLU(), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
            ),
            nn.Sequential(*_same_size(3), nn.AvgPool2d(2, 1, 1, ceil_mode=True), nn.Tanh()),
            nn.Sequential(*_same_size(3), nn.Tanh(), nn.AvgPool2d(2, 1, divisor_override=3)),
            nn.Sequential(nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten()),
            nn.Linear(9, 4),
        ),
        (2, 10, 11),
    ),
    "residual": (
        lambda: nn.Sequential(
            pcfast.Residual(nn.Linear(6, 6), nn.Tanh()),
            pcfast.Residual(nn.ReLU(), nn.Linear(6, 6, bias=False)),
            pcfast.Residual(nn.SiLU(), nn.Linear(6, 6), nn.Sigmoid()),
        ),
        (6,),
    ),
    "residual with factors": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(6, 14), pcfast.Scale(0.4)),
            *(pcfast.Residual(nn.Tanh(), nn.Linear(14, 14), pcfast.Scale(scale)) for scale in (0.3, -0.7)),
            nn.Sequential(nn.ReLU(), nn.Linear(14, 5), pcfast.Scale(1.5)),
        ),
        (6,),
    ),
    "residual convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            pcfast.Residual(*_same_size(4, nn.Tanh()), pcfast.Scale(0.5)),
            pcfast.Residual(*_same_size(4), nn.GELU()),
            nn.Sequential(nn.AvgPool2d(3), nn.Tanh()),
            *resident_head(4 * 4),
        ),
        (2, 8, 9),
    ),
    "factors in Gram form": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 12, 3), nn.Tanh()),
            nn.Sequential(nn.Conv2d(12, 2, 2), pcfast.Scale(0.4), nn.Tanh()),
            pcfast.Residual(*_same_size(2)),
            *resident_head(2 * 5 * 6),
        ),
        (2, 8, 9),
    ),
    "factors in linear Gram form": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(6, 64), nn.Tanh()),
            nn.Sequential(nn.Linear(64, 5), pcfast.Scale(0.4), nn.Tanh()),
            nn.Linear(5, 3),
        ),
        (6,),
    ),
}  # fmt: skip


def clamped(name: str):
    """A network that the planner has in Gram form, input and target."""
    y = torch.randint(0, 4, (BATCH,))
    if name == "mlp":
        return mlp(12, 60, 7, 5, 4), torch.randn(BATCH, 12), y
    # unpadded, pooled in front of the activation, with a rest that no window covers
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 40, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(40, 3, 2), nn.MaxPool2d(2), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh()),
        nn.Linear(7, 4),
    )
    return model, torch.randn(BATCH, 1, 8, 8), y


def drawn(networks: dict, name: str, batch: int = BATCH) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network of a table above, input and labels."""
    torch.manual_seed(1)
    make, shape = networks[name][:2]
    model = make()
    classes = model(torch.zeros(2, *shape)).shape[1]
    return model, torch.randn(batch, *shape), torch.randint(0, classes, (batch,))
