"""Data sets: digits from scikit-learn; MNIST, Fashion-MNIST, CIFAR-10 from files or OpenML; CIFAR-100 from files."""

from __future__ import annotations

from .augmentation import FlipAndCrop
from .data import Data, checked_data, normalized, one_hot
from .idx import read_idx
from .loading import load
from .optical_digits import digits
from .sources import NAMES, SOURCES, Source

__all__ = [
    "NAMES",
    "SOURCES",
    "Data",
    "FlipAndCrop",
    "Source",
    "checked_data",
    "digits",
    "load",
    "normalized",
    "one_hot",
    "read_idx",
]
