"""The digits that come with scikit-learn: nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from .data import Data, Shape, check_shape


def digits(*, test_fraction: float = 0.2, seed: int = 0, shape: Shape = "flat") -> Data:
    """The 1797 handwritten digits of 8 x 8 pixels from scikit-learn (UCI optical digits).

    Args:
        test_fraction: share of the samples in the test part, between 0 and 1, both excluded.
        seed: the split is a function of it and stratified: every digit has the same share in both parts.
        shape: "flat" gives inputs (N, 64), "image" (N, 1, 8, 8).

    Returns:
        Inputs float32 in [0, 1] (the 17 grey levels divided by 16), class indices int64.

    Raises:
        ArgumentError: an argument out of its range.
        ImportError: scikit-learn is missing; the message says how to install it.
    """
    if not 0 < test_fraction < 1:
        raise ArgumentError("test_fraction", str(test_fraction), "a share between 0 and 1, both excluded")
    check_shape(shape, (1, 8, 8))
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('digits needs scikit-learn: pip install "pcfast[train]"') from error

    x, y = load_digits(return_X_y=True)
    try:
        x_train, x_test, y_train, y_test = train_test_split(
            x, y, test_size=test_fraction, random_state=seed, stratify=y
        )
    except ValueError as error:  # a part with fewer samples than digits, or a seed out of range
        raise ArgumentError(
            "test_fraction, seed", f"{test_fraction}, {seed}", "a possible split", str(error)
        ) from error

    def inputs(array) -> Tensor:
        x = torch.from_numpy(array / 16).to(torch.float32)
        return x.reshape(-1, 1, 8, 8) if shape == "image" else x

    return Data(inputs(x_train), torch.from_numpy(y_train), inputs(x_test), torch.from_numpy(y_test))
