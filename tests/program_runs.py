"""Recorded training steps of other programs (tests/data/programs), what a test needs of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "programs"


def load(name: str) -> tuple[dict, dict[str, Tensor]]:
    """(meta, arrays) of one run."""
    data = dict(np.load(FOLDER / f"{name}.npz", allow_pickle=False))
    meta = json.loads(str(data.pop("meta")))
    return meta, {key: torch.from_numpy(value) for key, value in data.items()}


def of_kind(kind: str, arrays: dict[str, Tensor]) -> list[Tensor]:
    """One array for each parameter: "param", "grad", "after1", "after5", "after20"."""
    return [value for key, value in arrays.items() if key.startswith(kind + ".")]


def set_parameters(parameters: Iterable[Tensor], values: list[Tensor]) -> None:
    """In the recorded network's order."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def worst(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error of an array; one under 1e-3 of the largest counts as that large."""
    floor = 1e-3 * max(float(t.norm()) for t in truth)
    pairs = zip(found, truth, strict=True)
    return max(float((f - t).norm()) / max(float(t.norm()), floor) for f, t in pairs)
