"""What a recipe is, and what PCX and the ePC program share."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import networks
from ..datasets import SOURCES, Data, FlipAndCrop, normalized, one_hot
from ..errors import ArgumentError
from ..presets import settings as presets
from ..problem.validation import check_count
from .learning_rates import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A network, its data set and how it is trained, under the names that the program gives them.

    Attributes:
        name: as on the command line.
        data: name of the data set.
        batch_size, epochs: of training.
        loss: "mse" or "cross_entropy", with what the program means by it.
    """

    name: str
    data: str
    batch_size: int
    epochs: int
    loss: str

    @property
    def shape(self) -> str:
        """Of the inputs, as :func:`pcfast.datasets.load` takes it."""
        return "image"

    @abstractmethod
    def network(self) -> nn.Sequential:
        """A fresh network with PyTorch's initialisation, as the program has it; float32, on the CPU."""

    def prepared(self, data: Data) -> Data:
        """``data`` as :func:`pcfast.datasets.load` gives it, with the inputs and targets that are learned."""
        return one_hot(data, SOURCES[self.data].classes) if self.loss == "mse" else data

    def settings(self, epochs: int | None = None) -> dict:
        """Keyword arguments of :func:`pcfast.training.train`.

        Args:
            epochs: instead of the recipe's; schedules span them.

        Raises:
            ArgumentError and its kinds: no number of epochs, or one that the recipe says nothing of.
        """
        epochs = self.epochs if epochs is None else epochs
        check_count("epochs", epochs)
        if epochs > self.most_epochs:
            raise ArgumentError("epochs", f"{epochs} of {self.name}", f"at most {self.most_epochs}")
        return {"epochs": epochs, "batch_size": self.batch_size, **self._settings()}

    @property
    def most_epochs(self) -> float:
        """How many epochs the recipe covers."""
        return float("inf")

    @abstractmethod
    def _settings(self) -> dict:
        """The settings that are not this class's."""


#: Mean and standard deviation by channel.
_NORMALISATION = {
    "mnist": ((0.5,), (0.5,)),
    "fashion-mnist": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_PADDING = 4  # pixels, of the random crops


@dataclass(frozen=True, kw_only=True)
class Tuned(Recipe):
    """A recipe of PCX or of the ePC program: Adam under a warm-up and a cosine, on normalised inputs.

    Losses are summed over the batch, "mse" is 0.5 |mu - y|^2; the presets say over what weights' gradients are means.

    Attributes:
        net: "mlp", "vgg5", "vgg7" or "vgg9".
        act_fn: name of the activation.
        w_lr, w_decay: the parameters' learning rate and weight decay.
    """

    net: str
    act_fn: str
    w_lr: float
    w_decay: float

    @property
    def shape(self):
        return "flat" if self.net == "mlp" else "image"

    def network(self):
        source, activation = SOURCES[self.data], self._activations()[self.act_fn]
        if self.net == "mlp":
            return networks.mlp([source.pixels, 128, 128, 128, source.classes], activation)
        if self.net == "vgg5":
            return networks.vgg5(activation, source.classes, last_padding=1)
        return {"vgg7": networks.vgg7, "vgg9": networks.vgg9}[self.net](activation, source.classes)

    def prepared(self, data):
        return super().prepared(normalized(data, *_NORMALISATION[self.data]))

    def _settings(self):
        augment = None
        if self.net != "mlp":
            # the programs pad with black before they normalise
            black = tuple(-mean / std for mean, std in zip(*_NORMALISATION[self.data], strict=True))
            augment = FlipAndCrop(_PADDING, black)
        return {
            "drop_last": True,
            "augment": augment,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            **self._relaxation(),
        }

    @property
    def decoupled(self) -> bool:
        """Weight decay is AdamW's, not L2 regularisation."""
        return True

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        kind = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return kind(parameters, self.w_lr, weight_decay=self.w_decay)

    def _scheduler(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        return warmup_cosine(optimizer, steps, warmup=self._warmup(steps))

    @abstractmethod
    def _warmup(self, steps: int) -> float:
        """How many of ``steps`` steps the learning rate grows."""

    @abstractmethod
    def _activations(self) -> dict[str, Callable[[], nn.Module]]:
        """What makes an activation, by the program's name."""

    @abstractmethod
    def _relaxation(self) -> presets.Preset:
        """Loss, method and what belongs to it."""


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a table of this folder."""
    with open(Path(__file__).parent / name, newline="") as file:
        return list(csv.DictReader(file))
