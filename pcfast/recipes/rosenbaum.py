"""Recipes of R. Rosenbaum, "On the relationship between predictive coding and backpropagation", PLOS ONE (2022).

From the notebooks of github.com/RobertRosenbaum/PredictiveCodingVsBackProp at 8100c1c. They relax with Torch2PC:
means as losses, updates from the last iteration's errors. Inputs are in [0, 1], the learning rate is constant.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import networks
from ..presets import settings as presets
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Rosenbaum(Recipe):
    """One recipe. Losses are torch's means.

    Attributes:
        method: "strict" or "fixed_prediction".
        eta, n: step size and iterations.
        lr: of Adam.
        drop_last: incomplete batches are left out.
    """

    method: str
    lr: float
    eta: float = 0.1
    n: int = 20
    drop_last: bool = False

    def network(self):
        return {"mnist": networks.mnist_cnn, "cifar10": networks.cifar_cnn}[self.data]()

    def _settings(self):
        preset = presets.torch2pc(loss=self.loss, method=self.method, step_size=self.eta, num_steps=self.n)
        optimizer = functools.partial(torch.optim.Adam, lr=self.lr)
        return {"drop_last": self.drop_last, "optimizer": optimizer, **preset}


_mnist = functools.partial(Rosenbaum, data="mnist", batch_size=300, epochs=2, lr=0.002)
_cifar = functools.partial(Rosenbaum, data="cifar10", batch_size=256, epochs=5, lr=0.01, drop_last=True)
_fixed = {"method": "fixed_prediction", "loss": "cross_entropy"}

RECIPES = (
    _mnist(name="rosenbaum-mnist-strict", method="strict", loss="mse"),  # Figures1and2
    _mnist(name="rosenbaum-mnist-fixed", **_fixed),  # Figures3and4MNIST
    _mnist(name="rosenbaum-mnist-fixed-eta1", eta=1.0, n=5, **_fixed),  # Figure5MNIST
    _cifar(name="rosenbaum-cifar10-fixed", **_fixed),  # Figure3CIFAR
    _cifar(name="rosenbaum-cifar10-fixed-eta1", eta=1.0, n=6, **_fixed),  # Figure5CIFAR
)
