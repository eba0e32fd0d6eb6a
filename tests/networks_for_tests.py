"""Random architectures, losses, targets and belief optimisers for the property tests."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import nn

import pcfast
from pcfast import Adam, GradientDescent

IN_KERNELS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "identity": nn.Identity,
}
ACTIVATIONS = IN_KERNELS | {"hardtanh": lambda: nn.Hardtanh(-0.3, 0.8)}
#: Sizes that tiles do not divide: one, primes, one below and above powers of two.
WIDTHS = (1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 33)


@st.composite
def architectures(draw, activations=ACTIVATIONS):
    """``(model, x_shape without batch)``: a float64 Sequential of 1 to 5 PC layers."""
    return draw(st.one_of(mlps(activations), convs(activations)))


def _activation(draw, among=ACTIVATIONS):
    return among[draw(st.sampled_from(sorted(among)))]()


def _maybe_bare(draw, modules: list[nn.Module]) -> list[nn.Module]:
    """The modules as one PC layer, or each as a layer of its own (Torch2PC's bare layers)."""
    return modules if draw(st.booleans()) else [nn.Sequential(*modules)]


@st.composite
def mlps(draw, activations):
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=2, max_size=5))
    outputs = draw(st.sampled_from((2, 3, 10)))
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        group = [nn.Linear(fan_in, fan_out, bias=draw(st.booleans())), _activation(draw, activations)]
        if draw(st.integers(0, 5)) == 0:
            group += [nn.Linear(fan_out, fan_out), _activation(draw, activations)]
        layers += _maybe_bare(draw, group)
    layers.append(nn.Linear(widths[-1], outputs))
    return nn.Sequential(*layers).double(), (widths[0],)


@st.composite
def convs(draw, activations):
    channels = draw(st.sampled_from((1, 2, 3)))
    size = draw(st.sampled_from((7, 8, 9, 12)))
    shape = (channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        c, h, _ = shape
        kernel = draw(st.sampled_from((1, 2, 3)))
        stride, padding = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((0, 0, 1)))
        out = draw(st.sampled_from((1, 2, 5)))
        if (h + 2 * padding - kernel) // stride + 1 < 2:
            break
        group = [
            nn.Conv2d(c, out, kernel, stride, padding, bias=draw(st.booleans())),
            _activation(draw, activations),
        ]
        h = (h + 2 * padding - kernel) // stride + 1
        pool = draw(st.sampled_from(("none", "max", "max", "avg", "overlapping")))
        if h >= 4 and pool != "none":
            if pool == "overlapping":
                kernel, stride, ceil_mode = (
                    draw(st.integers(2, 3)),
                    draw(st.integers(1, 2)),
                    draw(st.booleans()),
                )
                padding, counts, divisor = (
                    draw(st.integers(0, 1)),
                    draw(st.booleans()),
                    draw(st.sampled_from((None, 3))),
                )
                group.append(
                    nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
                    if draw(st.booleans())
                    else nn.AvgPool2d(kernel, stride, padding, ceil_mode, counts, divisor)
                )
            else:
                kind = nn.MaxPool2d if pool == "max" else nn.AvgPool2d
                group.append(kind(2, ceil_mode=draw(st.booleans())))
            h = group[-1](torch.zeros(1, 1, h, h)).shape[-1]
        layers += _maybe_bare(draw, group)
        shape = (out, h, h)
    layers += _maybe_bare(
        draw, [nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], 9), _activation(draw, activations)]
    )
    layers.append(nn.Linear(9, 4))
    return nn.Sequential(*layers).double(), (channels, size, size)


@st.composite
def residual_networks(draw):
    """As :func:`architectures`, with residual blocks: layers of their own, or parts of a layer, or nested."""
    return draw(st.one_of(residual_mlps(), residual_convs()))


def _residual(draw, width: int, affine, normalisation, depth: int = 0) -> pcfast.Residual:
    """A block on ``width`` features or channels; affine(inputs, outputs) makes its maps."""
    inner = draw(st.sampled_from((1, 3, 8)))
    branch = [normalisation(width)] if draw(st.booleans()) else []
    branch += [_activation(draw)] if draw(st.booleans()) else []
    branch += [affine(width, inner)]
    branch += [normalisation(inner)] if draw(st.integers(0, 3)) == 0 else []
    branch += [_activation(draw)]
    if depth < 2 and draw(st.integers(0, 2)) == 0:
        branch.append(_residual(draw, inner, affine, normalisation, depth + 1))
    branch.append(affine(inner, width))
    branch += [_activation(draw)] if draw(st.booleans()) else []
    return pcfast.Residual(*branch)


def _with_blocks(draw, group: list[nn.Module], make_block) -> list[nn.Module]:
    """Layers: ``group`` with up to two blocks inside, then up to two that are layers of their own."""
    group = [*group, *(make_block() for _ in range(draw(st.integers(0, 2))))]
    return [*_maybe_bare(draw, group), *(make_block() for _ in range(draw(st.integers(0, 2))))]


@st.composite
def residual_mlps(draw):
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=2, max_size=4))

    def block(width):
        return lambda: _residual(draw, width, nn.Linear, nn.BatchNorm1d)

    layers = [block(widths[0])()] if draw(st.booleans()) else []
    for fan_in, fan_out in pairwise(widths):
        layers += _with_blocks(draw, [nn.Linear(fan_in, fan_out), _activation(draw)], block(fan_out))
    layers.append(nn.Linear(widths[-1], 3))
    return nn.Sequential(*layers).double(), (widths[0],)


@st.composite
def residual_convs(draw):
    channels, size = draw(st.sampled_from((1, 3))), draw(st.sampled_from((5, 8)))

    def conv(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    layers, c = [], channels
    for _ in range(draw(st.integers(1, 2))):
        out = draw(st.sampled_from((1, 2, 5)))
        stem = [conv(c, out), _activation(draw)]
        layers += _with_blocks(draw, stem, lambda out=out: _residual(draw, out, conv, nn.BatchNorm2d))
        c = out
    layers += _maybe_bare(draw, [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(c * (size // 2) ** 2, 7)])
    layers.append(nn.Linear(7, 4))
    return nn.Sequential(*layers).double(), (channels, size, size)


belief_optimizers = st.one_of(
    st.builds(GradientDescent, st.sampled_from((0.0, 0.5, 0.9)), st.sampled_from((0.0, 0.0, 0.01, 0.3))),
    st.builds(
        Adam, st.sampled_from(((0.9, 0.999), (0.0, 0.9), (0.5, 0.0))), st.sampled_from((1e-4, 1e-2, 1.0))
    ),
)

LOSSES = (
    "ce_mean",
    "ce_sum",
    "ce_smoothed",
    "ce_weighted",
    "ce_probabilities",
    "mse_mean",
    "mse_sum",
    "custom",
)


def loss_and_target(name: str, batch: int, outputs: int):
    """A loss callable and a target for an output (batch, outputs) in float64."""
    labels = torch.randint(0, outputs, (batch,))
    if name == "ce_mean":
        return nn.CrossEntropyLoss(), labels
    if name == "ce_sum":
        return nn.CrossEntropyLoss(reduction="sum"), labels
    if name == "ce_smoothed":
        return nn.CrossEntropyLoss(label_smoothing=0.1), labels
    if name == "ce_weighted":
        weight = torch.linspace(0.5, 2, outputs, dtype=torch.float64)
        return nn.CrossEntropyLoss(weight=weight), labels
    if name == "ce_probabilities":
        return nn.CrossEntropyLoss(), torch.rand(batch, outputs, dtype=torch.float64).softmax(1)
    target = torch.randn(batch, outputs, dtype=torch.float64)
    if name == "mse_mean":
        return nn.MSELoss(), target
    if name == "mse_sum":
        return nn.MSELoss(reduction="sum"), target
    return (lambda output, y: ((output - y).abs() ** 1.5).mean()), target
