"""Data sets by name."""

from __future__ import annotations

import os

from ..errors import ArgumentError
from . import openml
from .cifar import BINARY_VERSIONS, HOME, read_cifar_folder
from .data import Data, Part, Shape, check_shape, data_of_bytes
from .idx import read_idx_folder
from .optical_digits import digits
from .reading import check_folder, checked_path, naming, shown
from .sources import NAMES, SOURCES, Source


def load(
    name: str, *, folder: str | os.PathLike | None = None, shape: Shape = "image", seed: int = 0
) -> Data:
    """The data set ``name``, one of ``NAMES``, split into training and test part.

    Args:
        name: "digits" (8 x 8 pixels, see :func:`digits`), "mnist", "fashion-mnist" (28 x 28), "cifar10" or
            "cifar100" (3 channels of 32 x 32).
        folder: holds the data set's standard files, ``SOURCES[name].files``, with any number of samples from 1
            on. None: scikit-learn fetches it from OpenML and keeps it. Not for digits; required for cifar100.
        shape: "image" gives inputs (N, channels, height, width), "flat" (N, channels * height * width).
        seed: of the split of digits; the others are split as published.

    Returns:
        Inputs float32 in [0, 1] (bytes divided by 255; digits: 17 grey levels by 16), class indices int64.

    Raises:
        ArgumentError: an argument does not fit; a file in the folder is missing, damaged or of another data set
            ("folder"); the download failed ("data"). The message is one line: which file, why, what to do.
        ImportError: scikit-learn is missing where it is needed; the message says how to install it.
    """
    if name not in NAMES:
        raise ArgumentError("name", repr(name), f"one of {NAMES}")
    source = SOURCES[name]
    check_shape(shape, source.image_shape)
    if name == "digits":
        if folder is not None:
            raise ArgumentError(
                "folder",
                shown(checked_path("folder", folder)),
                "None for digits, which come with scikit-learn",
                "Leave it out.",
            )
        return digits(seed=seed, shape=shape)
    if folder is None and source.openml is None:
        raise ArgumentError(
            "folder",
            f"none for {name}, which is not fetched",
            f"the folder that holds {source.files}",
            f"Download the binary version from {HOME}.",
        )
    parts = openml.fetch(source) if folder is None else _from_folder(name, source, folder)
    return data_of_bytes(*parts, source.image_shape, shape)


def _from_folder(name: str, source: Source, folder: str | os.PathLike) -> tuple[Part, Part]:
    folder = checked_path("folder", folder)
    with naming("folder"):
        check_folder(folder)
        if name in BINARY_VERSIONS:
            return read_cifar_folder(folder, BINARY_VERSIONS[name], source.pixels, source.classes)
        return read_idx_folder(folder, source.image_shape[1:], source.classes)
