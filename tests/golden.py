"""Recorded float64 outputs of the published Torch2PC program (tests/data/torch2pc), and what meets them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accuracy import assert_gradients_agree, assert_states_agree
from torch import nn

import pcfast
from pcfast.torch2pc import PCInfer

FILES = sorted((Path(__file__).parent / "data" / "torch2pc").glob("*.npz"))
MODULES = {
    "linear": nn.Linear,
    "conv": nn.Conv2d,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "maxpool": nn.MaxPool2d,
    "flatten": nn.Flatten,
}
LOSSES = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss}


def load(path: Path):
    """What was asked for, the model and the arrays."""
    data = {key: value for key, value in np.load(path).items()}
    meta = json.loads(str(data.pop("meta")))
    model = nn.Sequential(
        *(nn.Sequential(*(MODULES[name](*args) for name, *args in layer)) for layer in meta["arch"])
    ).double()
    arrays = {key: torch.from_numpy(value) for key, value in data.items()}
    model.load_state_dict({k.removeprefix("param."): v for k, v in arrays.items() if k.startswith("param.")})
    return meta, model, arrays


def states(arrays: dict, depth: int) -> SimpleNamespace:
    """The recorded beliefs and errors, l = 0..L."""
    first = arrays.get("v.0", arrays["x"])
    return SimpleNamespace(
        beliefs=[first] + [arrays[f"v.{l}"] for l in range(1, depth + 1)],
        errors=[arrays.get("epsilon.0")] + [arrays[f"epsilon.{l}"] for l in range(1, depth + 1)],
    )


def assert_matches(path: Path, backend: str) -> None:
    """PCInfer on `backend` against the recorded outputs: states, updates, which of them are there."""
    meta, model, golden = load(path)
    depth, n = len(model), meta["n"]
    vhat, loss, dLdy, v, epsilon = PCInfer(
        model,
        LOSSES[meta["loss"]](),
        golden["x"],
        golden["y"],
        meta["method"],
        eta=meta["eta"],
        n=n,
        backend=backend,
    )
    assert pcfast.last_run().plan.backend == backend
    for name, result in (("vhat", vhat), ("v", v), ("epsilon", epsilon)):
        present = [f"{name}.{l}" in golden for l in range(depth + 1)]
        assert [value is not None for value in result] == present, name

    tight = dict(rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(loss, golden["Loss"], **tight)
    torch.testing.assert_close(dLdy, golden["dLdy"], **tight)
    for l in range(depth + 1):
        torch.testing.assert_close(vhat[l], golden[f"vhat.{l}"], **tight)

    truth = states(golden, depth)
    result = SimpleNamespace(beliefs=[golden["x"] if v[0] is None else v[0], *v[1:]], errors=epsilon)
    assert_states_agree(result, truth, n)
    parameters = dict(model.named_parameters())
    assert_gradients_agree(
        {p: p.grad for p in parameters.values()},
        {p: golden[f"grad.{name}"] for name, p in parameters.items()},
        model,
        truth,
        n,
    )
