"""What every data set is loaded as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import checked_number
from ..errors import ArgumentError, ArgumentTypeError

Shape = Literal["flat", "image"]


class Data(NamedTuple):
    """A data set split into a training and a test part; rows are samples.

    x_train, x_test: inputs, floating point, (N, ...). y_train, y_test: class indices, int64, (N,), or class
    probabilities (one-hot targets too), floating point, (N, C).
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class Part(NamedTuple):
    """Training or test part of a data set as it is stored.

    images: uint8, (N, ...), channel planes of rows of pixels. labels: class indices, integers, (N,).
    """

    images: np.ndarray
    labels: np.ndarray


def check_shape(shape: str, image_shape: tuple[int, int, int]) -> None:
    """Raises ArgumentError unless ``shape`` is "flat" or "image"."""
    if shape not in ("flat", "image"):
        channels, height, width = image_shape
        flat, image = f"(N, {channels * height * width})", f"(N, {channels}, {height}, {width})"
        raise ArgumentError("shape", repr(shape), f'"flat" for {flat} or "image" for {image}')


def data_of_bytes(train: Part, test: Part, image_shape: tuple[int, int, int], shape: Shape) -> Data:
    """``Data`` with inputs float32 in [0, 1], the bytes divided by 255, and labels int64.

    Inputs are (N, *image_shape) where ``shape`` is "image", (N, pixels) where it is "flat".
    """

    def inputs(images: np.ndarray) -> Tensor:
        images = np.ascontiguousarray(images)  # those of CIFAR are cut out of its records
        x = torch.from_numpy(images).reshape(len(images), *image_shape)
        return (x if shape == "image" else x.flatten(1)).to(torch.float32).div_(255)

    def targets(labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels.astype(np.int64))

    return Data(inputs(train.images), targets(train.labels), inputs(test.images), targets(test.labels))


def one_hot(data: Data, classes: int) -> Data:
    """``data`` with one-hot targets (N, classes), in the inputs' dtype, instead of class indices (N,)."""
    return data._replace(
        y_train=F.one_hot(data.y_train, classes).to(data.x_train.dtype),
        y_test=F.one_hot(data.y_test, classes).to(data.x_test.dtype),
    )


def normalized(data: Data, mean: Sequence[float], std: Sequence[float]) -> Data:
    """``data`` with inputs (x - mean) / std, channel by channel; targets as they are.

    Args:
        data: inputs floating point, images (N, C, H, W) or flat (N, C * H * W), one channel after the other.
        mean, std: C finite numbers each, every std > 0.

    Returns:
        New inputs of the same shapes, dtypes and devices.

    Raises:
        ArgumentError, ArgumentTypeError: mean and std are no such numbers, or the inputs ("data") do not have as
            many channels.
    """
    mean, std = checked_channels("mean", mean), checked_channels("std", std, positive=True)
    if len(mean) != len(std):
        raise ArgumentError("mean, std", f"{len(mean)} and {len(std)} numbers", "one of each a channel")

    def inputs(name: str) -> Tensor:
        x = getattr(data, name)
        given = f"{name} {tuple(x.shape)} of {x.dtype}"
        if not x.is_floating_point() or x.dim() not in (2, 4):
            raise ArgumentError("data", given, "floating point (N, C, H, W) or (N, C * H * W)")
        if x.shape[1] != len(mean) if x.dim() == 4 else x.shape[1] % len(mean):
            raise ArgumentError("data", given, f"{len(mean)} channels, as many as mean and std have numbers")
        shift, scale = (x.new_tensor(values)[:, None] for values in (mean, std))
        channels = x.reshape(len(x), len(mean), x.shape[1:].numel() // len(mean))
        return (channels - shift).div_(scale).reshape(x.shape)

    return data._replace(x_train=inputs("x_train"), x_test=inputs("x_test"))


def checked_channels(argument: str, values: Sequence[float], *, positive: bool = False) -> tuple[float, ...]:
    """``values``, a finite number a channel, > 0 where ``positive``, as floats; a tensor (C,) or an array will do.

    Raises:
        ArgumentError, ArgumentTypeError: naming ``argument``.
    """
    needed = f"a sequence of finite numbers{' > 0' if positive else ''}, one a channel"
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise ArgumentTypeError(argument, f"{values!r} ({type(values).__name__})", needed)
    if not values:
        raise ArgumentError(argument, "none", needed)
    return tuple(
        checked_number(argument, value, lambda v: v > 0 or not positive, needed, "") for value in values
    )


def checked_data(data: Data | Sequence[Tensor], dtype: torch.dtype) -> Data:
    """``data`` detached, and fit for a model of ``dtype``.

    Raises:
        ArgumentError, ArgumentTypeError: naming the part, what it is and what is needed.
    """
    names = ", ".join(Data._fields)
    if not isinstance(data, Sequence) or len(data) != 4 or not all(isinstance(t, Tensor) for t in data):
        raise ArgumentTypeError("data", f"a {type(data).__name__}", f"four tensors ({names})")
    data = Data(*(tensor.detach() for tensor in data))
    for part in ("train", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        if x.dim() < 2 or len(x) == 0 or y.dim() < 1 or len(x) != len(y):
            raise ArgumentError(
                "data",
                f"x_{part} {tuple(x.shape)} and y_{part} {tuple(y.shape)}",
                "x (N, ...) and y (N,) or (N, C) with the same N >= 1",
            )
        if x.dtype != dtype:
            remedy = f"Use x_{part}.to({dtype}) or model.to({x.dtype})."
            raise ArgumentError("data", f"x_{part} of {x.dtype}", f"the model's {dtype}", remedy)
        if not (y.dim() == 1 and y.dtype == torch.int64) and not (y.dim() == 2 and y.is_floating_point()):
            raise ArgumentError(
                "data",
                f"y_{part} {tuple(y.shape)} of {y.dtype}",
                "class indices, int64, (N,), or class probabilities, floating point, (N, C)",
            )
    if data.x_train.shape[1:] != data.x_test.shape[1:] or data.y_train.shape[1:] != data.y_test.shape[1:]:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in data._asdict().items())
        raise ArgumentError("data", shapes, "the same shape of a sample in both parts")
    return data
