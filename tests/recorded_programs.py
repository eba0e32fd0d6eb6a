"""What other programs for predictive coding computed (tests/data/programs), and pcfast's settings for the same.

Recorded runs of seven programs: weights and one batch, the first update, weights after 1, 5 and 20 training steps,
beliefs and errors where a program shows them. ``python tests/recorded_programs.py`` writes
the table of docs/ports.md anew. The folder's own folder, graphs, has networks that are no chains
(tests/test_graph_programs.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pages import DOCS, blocks_of_code
from torch import Tensor, nn

import pcfast
from pcfast.presets import settings as presets
from pcfast.presets.identification import difference

TESTS = Path(__file__).parent
FOLDER = TESTS / "data" / "programs"
FILES = sorted(FOLDER.glob("*.npz"))
PAGE = DOCS / "ports.md"
STEPS = (1, 5, 20)
LOSSES = {
    "half squared error": "mse",
    "cross-entropy on one-hot rows": "cross_entropy",
    "cross-entropy on class numbers": "cross_entropy",
}
_KINDS = {"pcx_two_moons": "pcx", "spc_master": "spc", "pctrainer_generative": "pctrainer"}


class Scale(nn.Module):
    """Times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


class Bias(nn.Linear):
    """Predicts its bias for every row, of an input of one column of zeros: a prior at the root."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)
        self.weight.requires_grad_(False).zero_()


MODULES = {
    "linear": nn.Linear,
    "linear_without_bias": functools.partial(nn.Linear, bias=False),
    "conv": nn.Conv2d,
    "maxpool": nn.MaxPool2d,
    "avgpool": nn.AvgPool2d,
    "flatten": nn.Flatten,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "leaky": nn.LeakyReLU,
    "scale": Scale,
    "bias": Bias,
}


def _module(name: str, *arguments) -> nn.Module:
    if name == "residual":
        return pcfast.Residual(*(_module(*member) for member in arguments))
    return MODULES[name](*arguments)


@dataclass
class Recorded:
    """One file."""

    name: str
    meta: dict
    arrays: dict[str, Tensor]

    @property
    def parts(self) -> tuple[dict, dict[str, Tensor]]:
        return self.meta, self.arrays

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays PREFIX.NAME by NAME."""
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def model(self, part: str | None = None) -> nn.Sequential:
        """The network, or that part of it where ``arch`` has several, with the weights before, float64."""
        arch, prefix = self.meta["arch"], "param."
        if part is not None:
            arch, prefix = arch[part], f"param.{part}."
        layers = (nn.Sequential(*(_module(*op) for op in layer)) for layer in arch)
        model = nn.Sequential(*layers).double()
        missing = model.load_state_dict(self.under(prefix), strict=False).missing_keys
        assert all(isinstance(model.get_submodule(name.rpartition(".")[0]), Bias) for name in missing)
        return model

    @property
    def belief_optimizer(self) -> pcfast.GradientDescent | pcfast.Adam | None:
        said = dict(self.meta["belief_optimizer"])
        if said.pop("name") == "adam":
            return pcfast.Adam(**said)
        return pcfast.GradientDescent(**said) if said["momentum"] else None

    @property
    def preset(self) -> str:
        """The name of the preset."""
        kind = self.meta["method"]
        return _KINDS.get(kind, kind)

    def settings(self) -> dict:
        """Keyword arguments of pc_loss or incremental_step: the preset, and what the program was given beside it."""
        meta, beside, after = self.meta, {}, {}
        if self.belief_optimizer is not None:
            beside["belief_optimizer"] = self.belief_optimizer
        if "beta" in meta:
            beside["nudging"] = pcfast.Nudging("positive", meta["beta"])
        if self.preset == "deepity" and meta["belief_start"] == "forward pass":
            beside["start"] = "projection"
        if any(key.startswith("start.") for key in self.arrays):
            after["vinit"] = [None, *(self.arrays[f"start.{l}"] for l in range(1, len(meta["arch"]))), None]
        size = meta["step_size"]
        if "precision" in meta:
            beside["precision"] = meta["precision"]
        preset = presets.PRESETS[self.preset](
            step_size=size, num_steps=meta["iterations"], loss=LOSSES[meta["loss"]], **beside
        )
        return {**preset, **after}

    def optimizer(self, parameters) -> tuple[torch.optim.Optimizer, list[float] | None]:
        """The program's weight optimiser, and its learning rates where each step has its own."""
        said = dict(self.meta["weight_optimizer"])
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[
            said.pop("name")
        ]
        rates = said["lr"] if isinstance(said["lr"], list) else None
        if rates:
            said["lr"] = rates[0]
        return kind(parameters, **said), rates

    def steps(self, count: int, **settings) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """The first update, and weights after 1, 5, ... steps up to ``count``, each by name."""
        model, x, y = self.model(), self.arrays["x"].double(), self.arrays["y"]
        y = y.double() if y.is_floating_point() else y
        settings = {**self.settings(), **settings}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer, rates = self.optimizer(trained.values())
        first, after = {}, {}
        for step in range(1, count + 1):
            if rates:
                optimizer.param_groups[0]["lr"] = rates[step - 1]
            if settings["method"] == "incremental":
                updates = []  # of every iteration
                hook = optimizer.register_step_pre_hook(
                    lambda *_, updates=updates: updates.append(
                        {n: p.grad.clone() for n, p in trained.items()}
                    )
                )
                pcfast.incremental_step(model, x, y, optimizer, **settings)
                hook.remove()
                first = first or updates[0]
            else:
                optimizer.zero_grad()
                pcfast.pc_loss(model, x, y, **settings).backward()
                first = first or {name: p.grad.clone() for name, p in trained.items()}
                optimizer.step()
            if step in STEPS:
                after[step] = {name: p.detach().clone() for name, p in trained.items()}
        return first, after

    def difference(self, result: dict[str, Tensor], prefix: str) -> float:
        """The worst relative difference of arrays; one under 1e-3 of the largest of its kind counts as that large."""
        return difference(result, self.under(prefix))


def load(name: str | Path) -> Recorded:
    """The run of a file, or of its name."""
    path = FOLDER / f"{name}.npz" if isinstance(name, str) else name
    data = dict(np.load(path, allow_pickle=False))
    meta = json.loads(str(data.pop("meta")))
    arrays = {k: torch.from_numpy(v) for k, v in data.items()}
    return Recorded(
        path.stem, meta, {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}
    )


def of_kind(kind: str, arrays: dict[str, Tensor]) -> list[Tensor]:
    """One array for each parameter: "param", "grad", "after1", "after5", "after20"."""
    return [value for key, value in arrays.items() if key.startswith(kind + ".")]


def set_parameters(parameters: Iterable[Tensor], values: list[Tensor]) -> None:
    """In the recorded network's order."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def worst(result: list[Tensor], truth: list[Tensor]) -> float:
    """As :func:`pcfast.presets.identification.difference`, of lists."""
    return difference(dict(enumerate(result)), dict(enumerate(truth)))


# The table -----------------------------------------------------------------------------------------------------


def rows() -> list[tuple]:
    """(program, revision, preset, runs, worst difference of the first update, of weights after 1 and 20 steps)."""
    worst: dict[tuple, list] = {}
    for path in FILES:
        recorded = load(path)
        first, after = recorded.steps(20)
        key = (recorded.meta["program"], recorded.meta["revision"], recorded.preset)
        entry = worst.setdefault(key, [0, 0.0, 0.0, 0.0])
        entry[0] += 1
        for index, (result, kind) in enumerate(
            ((first, "grad."), (after[1], "after1."), (after[20], "after20."))
        ):
            entry[index + 1] = max(entry[index + 1], recorded.difference(result, kind))
    return [(*key, *entry) for key, entry in sorted(worst.items())]


def port(preset: str) -> str:
    """The code of a program's training step on the page."""
    section = PAGE.read_text().split(f"\n### {preset}\n")[1].split("\n### ")[0]
    (block,) = blocks_of_code(section)
    return block


def table() -> str:
    lines = [
        "| program | revision | preset | recorded runs | first update | weights after 1 step | after 20 steps | "
        "lines of the port |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for program, revision, preset, runs, *differences in rows():
        count = sum(bool(line.strip()) for line in port(preset).splitlines())
        cells = (program, revision, f"`{preset}`", runs, *(f"{d:.0e}" for d in differences), count)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


BEGIN, END = "<!-- tests/recorded_programs.py: begin -->\n", "<!-- tests/recorded_programs.py: end -->"

if __name__ == "__main__":
    page = PAGE.read_text()
    above, below = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{above}{BEGIN}{table()}\n{END}{below}")
