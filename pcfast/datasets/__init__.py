"""Data sets: the digits that come with scikit-learn, and MNIST, Fashion-MNIST and CIFAR-10 from files or OpenML."""

from __future__ import annotations

from .data import Data, checked_data, one_hot
from .idx import read_idx
from .loading import load
from .optical_digits import digits
from .sources import NAMES, SOURCES, Source

__all__ = ["NAMES", "SOURCES", "Data", "Source", "checked_data", "digits", "load", "one_hot", "read_idx"]
