"""Networks of the predictive-coding papers, and the default network.

Each function returns a fresh ``nn.Sequential``, or a :class:`pcfast.Graph`, with PyTorch's default initialisation
(vgg19: torchvision's; float32, CPU); every element of an outer Sequential, and every node of a graph, is one PC
layer. Shapes are (batch, ...), B is the batch size.

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
from .model.graph import Graph, Prior, Root
from .model.merging import Sum
from .model.scaling import Scale

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


def resnet18(
    num_classes: int = 10,
    *,
    channels: int = 3,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    activation: Activation = nn.ReLU,
    projection: int = 3,
    mupc: bool = False,
    pooled_beliefs: bool = False,
) -> Graph:
    """ResNet-18 for images of 32 x 32 and the like, with skips over beliefs: a :class:`pcfast.Graph`.

    A stem, and in each stage blocks of two PC layers, "b11a" and "b11b" for block 1 of stage 1: the first
    reads the block's input, the second the first, and adds the block's input to what it makes of that. Where a stage
    halves the image, a strided convolution stands in the skip. The last layer averages over the image, unless the
    last block does (``pooled_beliefs``).

    ``blocks=(1, 1, 1, 1)`` with ``pooled_beliefs`` is "ResNet18" of the program of [G26], with one block a stage; two
    are those of He et al. (2016), as FabricPC builds it, whose projections have a kernel of 1.

    Args:
        num_classes: >= 1.
        channels: of the images.
        width: channels of the first stage; every stage has twice as many.
        blocks: of each stage.
        activation: makes an activation; in a block it follows the sum.
        projection: kernel of the skips that halve the image, 1 or 3.
        mupc: muPC (Innocenti et al., 2025) in place of BatchNorm: no biases, weights from N(0, 1), and behind them
            factors fan_in^-1/2, in the second layer of each block (fan_in * blocks)^-1/2, in the last one 1 / fan_in;
            the activation stands before the sum, as in FabricPC.
        pooled_beliefs: the last beliefs are averages over the image.

    Input (B, channels, height, width), output (B, num_classes) logits.

    Raises:
        ArgumentError: an argument out of its range.
    """
    _check_classes(num_classes)
    blocks = tuple(blocks)
    for name, value in (("channels", channels), ("width", width), ("blocks", min(blocks, default=0))):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(name, str(value), "whole numbers >= 1")
    if projection not in (1, 3):
        raise ArgumentError("projection", str(projection), "1 or 3")
    depth = sum(blocks)

    def convolution(inputs, outputs, *, stride=1, kernel=3, share=1, bias=True) -> list[nn.Module]:
        made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias and not mupc)
        if not mupc:
            return [made, nn.BatchNorm2d(outputs)]
        nn.init.normal_(made.weight)
        return [made, Scale((inputs * kernel**2 * share) ** -0.5)]

    nodes: dict = {
        "x": Root(),
        "stem": (nn.Sequential(*convolution(channels, width, bias=False), activation()), "x"),
    }
    below, inputs = "stem", width
    for stage, count in enumerate(blocks):
        outputs = width * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            name = f"b{stage + 1}{block + 1}"
            first = [*convolution(inputs, outputs, stride=stride), activation()]
            second = convolution(outputs, outputs, share=depth)
            skip = None
            if stride > 1:
                skip = nn.Sequential(*convolution(inputs, outputs, stride=2, kernel=projection))
            if mupc:
                merged = Sum(nn.Sequential(*second, activation()), skip)
            else:
                merged = nn.Sequential(Sum(nn.Sequential(*second), skip), activation())
            nodes[f"{name}a"] = (nn.Sequential(*first), below)
            nodes[f"{name}b"] = (merged, f"{name}a", below)
            below, inputs = f"{name}b", outputs
    last, pool = [nn.Linear(inputs, num_classes, bias=not mupc)], nn.AdaptiveAvgPool2d(1)
    if mupc:
        nn.init.normal_(last[0].weight)
        last.append(Scale(1 / inputs))
    if pooled_beliefs:
        merged, *read = nodes[below]
        nodes[below] = (
            nn.Sequential(*(merged if isinstance(merged, nn.Sequential) else [merged]), pool),
            *read,
        )
        nodes["y"] = (nn.Sequential(nn.Flatten(), *last), below)
    else:
        nodes["y"] = (nn.Sequential(pool, nn.Flatten(), *last), below)
    return Graph(nodes)


def residual_mlp(widths: Sequence[int], activation: Activation = nn.Tanh) -> Graph:
    """A classifier with skips over beliefs: hidden layers but the first add what the layer below reads.

    h_k = activation(W_k h_{k-1} + b_k) + h_{k-2}, with a linear map in the skip where widths differ.

    Args:
        widths: features of the input "x", of the hidden layers "h1", "h2", ... and of the output "y"; at least four.
        activation: makes the activation of a layer.

    Input (B, widths[0]), output (B, widths[-1]).

    Raises:
        ArgumentError: fewer than four widths, or one below 1.
    """
    if len(widths) < 4 or any(width < 1 for width in widths):
        raise ArgumentError(
            "widths", str(list(widths)), "an input, at least two hidden and an output width, each >= 1"
        )
    nodes: dict = {"x": Root(widths[0])}
    names = ["x", *(f"h{k}" for k in range(1, len(widths) - 1))]
    for k, (inputs, outputs) in enumerate(pairwise(widths[:-1]), start=1):
        layer = nn.Sequential(nn.Linear(inputs, outputs), activation())
        if k == 1:
            nodes[names[k]] = (layer, "x")
        else:
            skip = None if widths[k - 2] == outputs else nn.Linear(widths[k - 2], outputs, bias=False)
            nodes[names[k]] = (Sum(layer, skip), names[k - 1], names[k - 2])
    return Graph({**nodes, "y": (nn.Linear(widths[-2], widths[-1]), names[-1])})


def decoder(
    latent: int, widths: Sequence[int], activation: Activation = nn.Tanh, *, classes: int = 0
) -> Graph:
    """A generative network: a latent root "z" with a standard Gaussian prior, hidden layers, and the data "x" below.

    Args:
        latent: units of "z".
        widths: features of the hidden layers "h1", "h2", ... and of "x".
        activation: makes the activation of a hidden layer.
        classes: 0, or the units of a second root "label", one-hot, that the first layer reads, too.

    Raises:
        ArgumentError: a width below 1.
    """
    if not widths or any(width < 1 for width in (latent, *widths)) or classes < 0:
        raise ArgumentError("widths", str([latent, *widths, classes]), "widths >= 1, and at least one")
    nodes: dict = {"z": Prior(latent)}
    inputs: tuple[str, ...] = ("z",)
    if classes:
        nodes["label"] = Root(classes)
        inputs = ("z", "label")
    below = latent
    for k, width in enumerate(widths, start=1):
        name = "x" if k == len(widths) else f"h{k}"
        layer: nn.Module = nn.Linear(below, width)
        if len(inputs) > 1:
            layer = Sum(layer, nn.Linear(classes, width, bias=False))
        nodes[name] = (layer if name == "x" else nn.Sequential(layer, activation()), *inputs)
        below, inputs = width, (name,)
    return Graph(nodes)
