"""Data sets from openml.org, downloaded and kept by scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .data import Part
from .reading import one_line, shown
from .sources import Source

VERSION = 1  # of each data set there
ROWS_AT_ONCE = 4096  # when converting: the table comes as float64, up to 1.5 GB


def fetch(source: Source) -> tuple[Part, Part]:
    """Training and test part: images (N, pixels).

    scikit-learn downloads a data set once and then reads it from ``sklearn.datasets.get_data_home()``. It comes
    as text: without pandas reading MNIST takes about a minute and 1.3 GB each time, CIFAR-10 three times as much.

    Raises:
        ArgumentError: the download failed or is not that data set; "data" is the argument.
        ImportError: scikit-learn is missing; the message says how to install it.
    """
    try:
        from sklearn.datasets import fetch_openml
    except ImportError as error:
        raise ImportError(
            f'{source.openml} from OpenML needs scikit-learn: pip install "pcfast[train]"; '
            "or name the folder that holds its files"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of retries: what matters is whether the last one works
            x, y = fetch_openml(
                source.openml, version=VERSION, as_frame=False, return_X_y=True, parser=_parser()
            )
    except Exception as error:  # of the network, http, gzip, json, the checksum, ARFF, the disk
        raise _unusable(source, f"it could not be fetched ({one_line(error)})") from error
    images, labels = _images(source, x), _labels(source, y)
    rows = source.rows[0]
    return Part(images[:rows], labels[:rows]), Part(images[rows:], labels[rows:])


def _parser() -> str:
    try:
        import pandas  # noqa: F401
    except ImportError:
        return "liac-arff"  # slower, but part of scikit-learn
    return "auto"


def _images(source: Source, x: Any) -> np.ndarray:
    """uint8 (N, pixels)."""
    shape = (sum(source.rows), source.pixels)
    if not isinstance(x, np.ndarray) or x.shape != shape:
        raise _unusable(source, f"it came as {_described(x)} where an array {shape} was expected")
    return _whole_numbers(source, x, 255, "pixels")


def _labels(source: Source, y: Any) -> np.ndarray:
    """uint8 (N,); class names are digits."""
    shape = (sum(source.rows),)
    if not isinstance(y, np.ndarray) or y.shape != shape:
        raise _unusable(source, f"its labels came as {_described(y)} where an array {shape} was expected")
    return _whole_numbers(source, y, source.classes - 1, "labels")


def _whole_numbers(source: Source, values: np.ndarray, largest: int, what: str) -> np.ndarray:
    """``values``, numbers or strings of them, as uint8."""
    whole = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        try:
            exact = values[rows].astype(np.float64)
        except (TypeError, ValueError):
            raise _unusable(source, f"some of its {what} are not numbers") from None
        if not np.all(
            (exact >= 0) & (exact <= largest) & (exact == np.floor(exact))
        ):  # NaN compares as False
            raise _unusable(source, f"some of its {what} are not whole numbers from 0 to {largest}")
        whole[rows] = exact
    return whole


def _described(value: Any) -> str:
    return f"an array {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _unusable(source: Source, reason: str) -> ArgumentError:
    return ArgumentError(
        "data",
        f'"{source.openml}" version {VERSION} from OpenML: {reason}',
        "an undamaged download, or the files in a folder",
        f"Try again, and remove a damaged download from {_data_home()}; or name the folder that holds "
        f"{source.files}.",
    )


def _data_home() -> str:
    from sklearn.datasets import get_data_home

    try:
        return shown(get_data_home())
    except OSError:  # it is made when asked for
        return "scikit-learn's data home"
