"""Random changes of training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from ..problem.validation import check_count
from .data import checked_channels


@dataclass(frozen=True)
class FlipAndCrop:
    """Mirrors and shifts every image of a batch at random: the usual augmentation of CIFAR.

    An image is mirrored left-right with probability 1/2, padded on every side, and cut out at a place that is uniform
    among the (2 padding + 1)^2 there are. Every image has draws of its own, from torch's global random state of the
    batch's device: a seeded run repeats, and a checkpoint that keeps that state resumes.

    A plain value, which prints as its settings.

    Attributes:
        padding: pixels on every side, >= 0.
        fill: what the padding holds, a finite number a channel; None for 0. In normalised images 0 is the mean,
            and black is -mean / std.

    Raises:
        ArgumentError, ArgumentTypeError: a value outside; in a call, a batch that does not fit.
    """

    padding: int = 4
    fill: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_count("padding", self.padding, least=0)
        if self.fill is not None:
            object.__setattr__(self, "fill", checked_channels("fill", self.fill))

    def __call__(self, batch: Tensor) -> Tensor:
        """``batch``, floating point (N, C, H, W), changed: a new tensor of the same shape, dtype and device."""
        needed = "floating point (N, C, H, W)"
        if not isinstance(batch, Tensor):
            raise ArgumentTypeError("batch", f"a {type(batch).__name__}", f"a tensor, {needed}")
        given = f"shape {tuple(batch.shape)} of {batch.dtype}"
        if batch.dim() != 4 or 0 in batch.shape[1:] or not batch.is_floating_point():
            raise ArgumentError("batch", given, needed)
        if self.fill is not None and len(self.fill) != batch.shape[1]:
            raise ArgumentError("batch", given, f"{len(self.fill)} channels, as many as fill has numbers")

        def drawn(below: int) -> Tensor:
            return torch.randint(below, (len(batch),), device=batch.device)

        places = 2 * self.padding + 1
        return self._cut(batch, mirrored=drawn(2).bool(), top=drawn(places), left=drawn(places))

    def _cut(self, batch: Tensor, mirrored: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """What the draws, (N,) each, make of the batch."""
        height, width = batch.shape[2:]
        images = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
        windows = self._padded(images).unfold(2, height, 1).unfold(3, width, 1)  # a view of every place
        return windows[torch.arange(len(batch), device=batch.device), :, top, left]

    def _padded(self, images: Tensor) -> Tensor:
        padding = self.padding
        count, channels, height, width = images.shape
        padded = images.new_zeros(count, channels, height + 2 * padding, width + 2 * padding)
        if self.fill is not None:
            padded += images.new_tensor(self.fill)[:, None, None]
        padded[:, :, padding : padding + height, padding : padding + width] = images
        return padded
