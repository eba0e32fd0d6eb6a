"""Recipes of ePC: Goemaere et al., "ePC: Fast and deep predictive coding in digital simulation", arXiv 2505.20137.

Numbers: epc.csv, from github.com/cgoemaere/error_based_PC at 02baa80, configs_results; what they mean: pc_e.py,
pc_s.py, get_arch.py and datamodules beside. Left out: backpropagation, and ResNet18, whose skips
pass over a PC layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..presets import settings as presets
from ..problem.belief_optimizers import GradientDescent
from .recipe import Tuned, rows_of


@dataclass(frozen=True, kw_only=True)
class Epc(Tuned):
    """One recipe.

    Attributes:
        type: "Error" (ePC: errors descend the summed energy) or "State" (sPC: states do).
        iters: iterations.
        lr, momentum: of SGD on errors or states; errors have no momentum there.
    """

    type: str
    iters: int
    lr: float
    momentum: float

    @property
    def decoupled(self):
        return self.type == "State"

    def _activations(self):
        return {"gelu": nn.GELU, "tanh": nn.Tanh}

    def _warmup(self, steps):
        return int(0.1 * steps)

    def _relaxation(self):
        settings = {"step_size": self.lr, "num_steps": self.iters, "loss": self.loss}
        if self.type == "Error":
            return presets.epc(**settings)
        return presets.spc(
            **settings, belief_optimizer=GradientDescent(self.momentum) if self.momentum else None
        )


def recipes() -> list[Epc]:
    """In the order of the table."""
    return [_recipe(row) for row in rows_of("epc.csv")]


def _recipe(row: dict[str, str]) -> Epc:
    kind = {"Error": "epc", "State": "spc"}[row["type"]]
    return Epc(
        name=f"{kind}-{row['net']}-{row['data']}-{row['output_loss']}",
        type=row["type"],
        data=row["data"],
        net=row["net"],
        act_fn=row["act_fn"],
        batch_size=256,
        epochs=25,
        loss={"mse": "mse", "ce": "cross_entropy"}[row["output_loss"]],
        iters=int(row["iters"]),
        lr=float(row["lr"]),
        momentum=float(row["momentum"]),
        w_lr=float(row["w_lr"]),
        w_decay=float(row["w_decay"]),
    )
