"""Networks of the predictive-coding papers, and the default network.

Each function returns a fresh ``nn.Sequential`` with PyTorch's default initialisation (vgg19: torchvision's;
float32, CPU); every element of the outer Sequential is one PC layer. Shapes are (batch, ...), B is the batch size.

Sources:
[R22] R. Rosenbaum, "On the relationship between predictive coding and backpropagation", PLOS ONE 17(3)
e0266102 (2022).
[P25] L. Pinchetti et al., "Benchmarking predictive coding networks - made simple", ICLR (2025).
[G26] C. Goemaere et al., "ePC: Fast and deep predictive coding in digital simulation", ICML (2026), arXiv 2505.20137.
[SZ15] K. Simonyan and A. Zisserman, "Very deep convolutional networks for large-scale image recognition",
ICLR (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from .errors import ArgumentError

Activation = Callable[[], nn.Module]


def mlp(widths: Sequence[int], activation: Activation = nn.ReLU) -> nn.Sequential:
    """Multilayer perceptron: len(widths) - 1 PC layers, each affine map + activation, the last affine only.

    Args:
        widths: features of the input, of every hidden layer and of the output; at least two, each >= 1.
        activation: makes the activation module of one layer, e.g. ``nn.ReLU``.

    Input (B, widths[0]), output (B, widths[-1]).

    Raises:
        ArgumentError: fewer than two widths, or one below 1.
    """
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ArgumentError(
            "widths",
            str(list(widths)),
            "at least an input and an output width, each >= 1",
            "E.g. [784, 600, 10].",
        )
    hidden = [
        nn.Sequential(nn.Linear(inputs, outputs), activation()) for inputs, outputs in pairwise(widths[:-1])
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-2], widths[-1]))


def digits_mlp() -> nn.Sequential:
    """The default network: 64-128-128-10 relu for flat 8x8 digits. Input (B, 64), output (B, 10) logits."""
    return mlp([64, 128, 128, 10])


def mlp_600() -> nn.Sequential:
    """784-600-600-10 relu, the usual MLP for MNIST. Input (B, 784), output (B, 10) logits."""
    return mlp([784, 600, 600, 10])


def deep_mlp(depth: int = 32) -> nn.Sequential:
    """784-128x``depth``-10 tanh: ``depth`` hidden layers, ``depth`` + 1 PC layers.

    Input (B, 784), output (B, 10) logits.

    Raises:
        ArgumentError: depth below 1.
    """
    if depth < 1:
        raise ArgumentError("depth", str(depth), "the number of hidden layers, >= 1")
    return mlp([784, *[128] * depth, 10], nn.Tanh)


def wide_mlp() -> nn.Sequential:
    """Four PC layers of 4096 relu units, the last one affine. Input (B, 4096), output (B, 4096)."""
    return mlp([4096] * 5)


def mnist_cnn(image_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10) -> nn.Sequential:
    """The MNIST network of [R22]: 5 PC layers, relu.

    Args:
        image_shape: (channels, height, width) of an image; the paper's by default. height, width >= 8.
        num_classes: >= 1.

    Input (B, *image_shape), output (B, num_classes) logits.

    Raises:
        ArgumentError: an image too small, or no class.
    """
    channels, height, width = _checked_image(image_shape, num_classes, smallest=8)
    rows, columns = ((size - 2) // 2 - 2 for size in (height, width))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 10, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(10, 5, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(5 * rows * columns, 50), nn.ReLU()),
        nn.Sequential(nn.Linear(50, 30), nn.ReLU()),
        nn.Linear(30, num_classes),
    )


def cifar_cnn(image_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10) -> nn.Sequential:
    """The CIFAR-10 network of [R22]: 6 PC layers, relu.

    Args:
        image_shape: (channels, height, width) of an image; the paper's by default. height, width >= 4.
        num_classes: >= 1.

    Input (B, *image_shape), output (B, num_classes) logits.

    Raises:
        ArgumentError: an image too small, or no class.
    """
    channels, height, width = _checked_image(image_shape, num_classes, smallest=4)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(256 * (height // 4) * (width // 4), 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, num_classes),
    )


def _checked_image(image_shape: Sequence[int], num_classes: int, smallest: int) -> tuple[int, int, int]:
    if len(image_shape) != 3 or image_shape[0] < 1 or min(image_shape[1:]) < smallest:
        raise ArgumentError(
            "image_shape",
            str(tuple(image_shape)),
            f"(channels, height, width), height and width >= {smallest}",
        )
    _check_classes(num_classes)
    return tuple(image_shape)


def vgg5(activation: Activation = nn.ReLU, num_classes: int = 10, *, last_padding: int = 0) -> nn.Sequential:
    """VGG-5 of [P25] for CIFAR: 5 PC layers.

    Args:
        activation: makes the activation module of one layer.
        num_classes: >= 1.
        last_padding: of the last convolution: 0 as in the paper, 1 as in the programs of [P25] and [G26].

    Input (B, 3, 32, 32), output (B, num_classes) logits.

    Raises:
        ArgumentError: an argument out of its range.
    """
    _check_classes(num_classes)
    if last_padding not in (0, 1):
        raise ArgumentError("last_padding", str(last_padding), "0 or 1")
    layers = [
        _block(3, 128, activation, pool=True),
        _block(128, 256, activation, pool=True),
        _block(256, 512, activation, pool=True),
        _block(512, 512, activation, pool=True, padding=last_padding),
    ]
    layers[-1].append(nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(512 * (1 + last_padding) ** 2, num_classes))


def vgg7(activation: Activation = nn.ReLU, num_classes: int = 10) -> nn.Sequential:
    """VGG-7 of the programs of [P25] and [G26] for CIFAR: 7 PC layers; convolutions 4 and 6 are unpadded.

    Args: as :func:`vgg9`.

    Input (B, 3, 32, 32), output (B, num_classes) logits.

    Raises:
        ArgumentError: no class.
    """
    _check_classes(num_classes)
    layers = [
        _block(3, 128, activation, pool=True),
        _block(128, 128, activation),
        _block(128, 256, activation, pool=True),
        _block(256, 256, activation, padding=0),
        _block(256, 512, activation, pool=True),
        _block(512, 512, activation, padding=0),
    ]
    layers[-1].append(nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(512, num_classes))


def vgg9(activation: Activation = nn.ReLU, num_classes: int = 10) -> nn.Sequential:
    """VGG-9 of the program of [G26] for CIFAR: 9 PC layers.

    Args:
        activation: makes the activation module of one layer.
        num_classes: >= 1.

    Input (B, 3, 32, 32), output (B, num_classes) logits.

    Raises:
        ArgumentError: no class.
    """
    _check_classes(num_classes)
    channels = (3, 128, 128, 256, 256, 512, 512, 512, 512)
    layers = [
        _block(inputs, outputs, activation, pool=place % 2 == 0)
        for place, (inputs, outputs) in enumerate(pairwise(channels))
    ]
    layers[-1].append(nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(2048, num_classes))


def _block(
    inputs: int, outputs: int, activation: Activation, *, pool: bool = False, padding: int = 1
) -> nn.Sequential:
    """3 x 3 convolution, activation and, where asked for, 2 x 2 max-pool."""
    rest = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=padding), activation(), *rest)


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ArgumentError("num_classes", str(num_classes), "the number of classes, >= 1")


def vgg19(num_classes: int = 1000, *, width: int = 64, image_size: int = 224) -> nn.Sequential:
    """VGG-19 [SZ15] in torchvision's layout: 19 PC layers (16 convolutions, 3 affine maps), relu.

    Torchvision's parameters in torchvision's order, initialised as there: convolutions N(0, 2 / fan_out), affine
    maps N(0, 0.01^2), biases 0. Left out of its module are the adaptive average pool, the identity at 224 x 224,
    and the dropout between the affine maps.

    Args:
        num_classes: >= 1.
        width: channels of the first stage, >= 1; the others are in proportion (``8 * width`` at the end, hidden
            affine maps of ``64 * width``). 64 is VGG-19.
        image_size: height and width of an image, a multiple of 32.

    Input (B, 3, image_size, image_size), output (B, num_classes) logits.

    Raises:
        ArgumentError: an argument out of its range.
    """
    for name, value, least in (("num_classes", num_classes, 1), ("width", width, 1)):
        if value < least:
            raise ArgumentError(name, str(value), f"a whole number >= {least}")
    if image_size < 32 or image_size % 32:
        raise ArgumentError("image_size", str(image_size), "a multiple of 32", "Five pools halve the image.")
    # Output channels of the convolutions; a tuple is a stage that ends with a 2 x 2 max-pool.
    stages = tuple((factor * width,) * count for factor, count in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)))
    layers, inputs = [], 3
    for stage in stages:
        for outputs in stage:
            layers.append(nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()))
            inputs = outputs
        layers[-1].append(nn.MaxPool2d(2))
    layers[-1].append(nn.Flatten())
    hidden = 64 * width
    model = nn.Sequential(
        *layers,
        nn.Sequential(nn.Linear(inputs * (image_size // 32) ** 2, hidden), nn.ReLU()),
        nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()),
        nn.Linear(hidden, num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return model
