"""Recipes of PCX: Pinchetti et al., "Benchmarking predictive coding networks - made simple", ICLR (2025).

Numbers: pcx.csv, from github.com/liukidar/pcx at c722834, examples/s4_1_discriminative_mode/hps (vgg7-cifar100-pn:
examples/discriminative_experiments at 5aa614d); what they mean: PC.py, iPC.py, models.py and datasets.py beside.
Left out: Tiny ImageNet, whose data set pcfast does not load, backpropagation, and vgg5-cifar10-cn, whose list of
signs is shorter than its epochs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from ..presets import settings as presets
from ..problem.belief_optimizers import GradientDescent
from ..problem.nudging import Nudging
from .recipe import Tuned, rows_of


@dataclass(frozen=True)
class Beta:
    """The programs' beta by epoch: the output is clamped to u - beta (u - y), updates are multiplied by 1 / beta.

    beta_factor (beta + beta_ir epoch); where that reaches 1 or -1 it is 1, plain predictive coding. With a factor
    of 0 it is beta + beta_ir epoch, 1 at most, with the sign that was drawn for the epoch.
    """

    beta: float
    beta_ir: float
    beta_factor: float
    signs: str = ""

    def __call__(self, epoch: int) -> Nudging | None:
        size = self.beta + self.beta_ir * epoch
        if self.beta_factor == 0:
            kind = "positive" if self.signs[epoch] == "+" else "negative"
            return Nudging(kind, min(size, 1.0))
        size *= abs(self.beta_factor)
        return None if size >= 1 else Nudging("positive" if self.beta_factor > 0 else "negative", size)


@dataclass(frozen=True, kw_only=True)
class Pcx(Tuned):
    """One recipe.

    Attributes:
        variant: "ce" (cross-entropy), "se" (squared error), "pn", "nn", "cn" (squared error, nudged positively,
            negatively, either way by epoch), "ipc" (squared error, incremental).
        T: iterations.
        x_lr, x_momentum: of SGD on the beliefs. Its gradients are the mean energy's times the batch size.
        beta: by epoch.
    """

    variant: str
    T: int
    x_lr: float
    x_momentum: float
    beta: Beta

    @property
    def most_epochs(self):
        return len(self.beta.signs) or super().most_epochs

    def _activations(self):
        # jax.nn's: gelu is the tanh form
        gelu = functools.partial(nn.GELU, approximate="tanh")
        return {"gelu": gelu, "leaky_relu": nn.LeakyReLU, "hard_tanh": nn.Hardtanh}

    def _warmup(self, steps):
        return 0.1 * steps

    def _relaxation(self):
        program = presets.pcx_ipc if self.variant == "ipc" else presets.pcx
        optimizer = GradientDescent(self.x_momentum) if self.x_momentum else None
        preset = program(step_size=self.x_lr, num_steps=self.T, loss=self.loss, belief_optimizer=optimizer)
        return {**preset, "nudging": self.beta} if self.variant in ("pn", "nn", "cn") else preset


def recipes() -> list[Pcx]:
    """In the order of the table."""
    return [_recipe(row) for row in rows_of("pcx.csv")]


def _recipe(row: dict[str, str]) -> Pcx:
    net, data, variant = row["net"], row["data"], row["variant"]
    return Pcx(
        name=f"pcx-{net}-{data}-{variant}",
        data=data,
        net=net,
        variant=variant,
        act_fn=row["act_fn"],
        batch_size=128,
        epochs=25 if net == "mlp" else 50,
        loss="cross_entropy" if variant == "ce" else "mse",
        T=int(row["T"]),
        w_lr=float(row["w_lr"]),
        w_decay=float(row["w_wd"]),
        x_lr=float(row["x_lr"]),
        x_momentum=float(row["x_momentum"]),
        beta=Beta(float(row["beta"]), float(row["beta_ir"]), float(row["beta_factor"]), row["signs"]),
    )
