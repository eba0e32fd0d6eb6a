"""The data sets that can be loaded by name, and what is known of each before it is loaded.

Sources:
digits: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository
(1998); the copy in scikit-learn.
mnist: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-based learning applied to document recognition",
Proc. IEEE 86(11) 2278 (1998).
fashion-mnist: H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine
learning algorithms", arXiv:1708.07747 (2017).
cifar10, cifar100: A. Krizhevsky, "Learning multiple layers of features from tiny images", University of Toronto
(2009).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A data set that ``load`` knows.

    Attributes:
        image_shape: (channels, height, width) of one sample.
        classes: number of classes; labels are 0 to classes - 1.
        rows: samples of the training and of the test part as published (files in a folder may hold others).
        files: the files that a folder must hold, in words; empty where ``load`` takes no folder.
        openml: name on openml.org, where version 1 is taken, the training part first; None: not from there.
    """

    image_shape: tuple[int, int, int]
    classes: int
    rows: tuple[int, int]
    files: str = ""
    openml: str | None = None

    @property
    def pixels(self) -> int:
        """Numbers in one sample, all channels."""
        return math.prod(self.image_shape)


_IDX = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, "
    "each with or without .gz"
)
_BATCHES = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin, each with or without .gz, or "
    "cifar-10-binary.tar.gz"
)
_BATCHES_100 = "train.bin and test.bin, each with or without .gz, or cifar-100-binary.tar.gz"

#: By the name that ``load`` takes.
SOURCES: dict[str, Source] = {
    "digits": Source((1, 8, 8), 10, (1437, 360)),
    "mnist": Source((1, 28, 28), 10, (60000, 10000), _IDX, "mnist_784"),
    "fashion-mnist": Source((1, 28, 28), 10, (60000, 10000), _IDX, "Fashion-MNIST"),
    "cifar10": Source((3, 32, 32), 10, (50000, 10000), _BATCHES, "CIFAR_10"),
    "cifar100": Source((3, 32, 32), 100, (50000, 10000), _BATCHES_100),
}
NAMES = tuple(SOURCES)
