"""Checkpoints: what identifies a run, and reading one back with a clear word when it does not fit."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .datasets import Data
from .errors import ArgumentError
from .losses import LossLike

FORMAT = 1


def load_checkpoint(path: Path, settings: dict) -> dict:
    """The checkpoint at ``path``; ArgumentError where it is missing, unreadable or of other settings."""
    if not path.is_file():
        raise ArgumentError(
            "out", f"no checkpoint at {path}", "the folder of a run", "Start it without resume."
        )
    checkpoint = _read(path, "out")
    there, here = flat(checkpoint["config"]["settings"]), flat(settings)
    differences = [
        f"{key} is {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if differences[5:] else "")
        raise ArgumentError(
            "resume",
            f"a checkpoint ({path}) of another run: {shown}",
            "the settings of that run",
            "Use them, or start anew in another folder.",
        )
    return checkpoint


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy the parameters and buffers of the checkpoint at ``path`` into ``model``.

    Raises:
        ArgumentError: named "checkpoint"; the file is missing, unreadable or of another network.
    """
    if not path.is_file():
        raise ArgumentError("checkpoint", f"{path}, which is no file", "checkpoint.pt of a run of train")
    state = _read(path, "checkpoint")["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ArgumentError("checkpoint", f"{path} of another network", "one of this network") from error


def _read(path: Path, argument: str) -> dict:
    """The checkpoint in the file ``path``; ArgumentError, named ``argument``, where it is unreadable."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        readable = checkpoint["format"] == FORMAT
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        raise ArgumentError(
            argument, f"{path}, which cannot be read", "a checkpoint of train", str(error)
        ) from error
    if not readable:
        raise ArgumentError(argument, f"{path} of format {checkpoint['format']}", f"format {FORMAT}")
    return checkpoint


def flat(value, key: str = "") -> dict:
    """Nested dicts and lists as one dict with dotted keys."""
    if not isinstance(value, dict | list):
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        k: v for name, part in items for k, v in flat(part, f"{key}.{name}" if key else str(name)).items()
    }


def run_settings(model: nn.Sequential, data: Data, optimizer: Optimizer, **values) -> dict:
    """What two runs must have in common for one to go on from the other's checkpoint.

    Plain JSON values: they compare equal after a round trip, and weights_only loading accepts them.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {**group, "params": ", ".join(names[id(p)] for p in group["params"])}
        for group in optimizer.param_groups
    ]
    settings = {
        **values,
        "network": [" ".join(str(layer).split()) for layer in model],
        "optimizer": {"name": type(optimizer).__qualname__, "groups": groups},
        "parameters": {name: _signature(p) for name, p in model.named_parameters()},
        "data": {name: f"{_signature(t)} sha256 {_digest(t)}" for name, t in data._asdict().items()},
    }
    return json.loads(json.dumps(settings, default=str))


def loss_name(loss: LossLike) -> str:
    """A name of ``loss`` without memory addresses, so that two runs can be compared."""
    if isinstance(loss, functools.partial):
        keywords = ", ".join(f"{key}={value}" for key, value in sorted(loss.keywords.items()))
        return f"{loss_name(loss.func)}({keywords})"
    if isinstance(loss, nn.Module):
        values = "".join(f" {name} {_digest(value)}" for name, value in loss.state_dict().items())
        return f"{loss!r}{values}"
    return getattr(loss, "__qualname__", str(loss) if isinstance(loss, str) else type(loss).__qualname__)


def callable_name(function: Callable) -> str:
    """A name of ``function`` without memory addresses: two runs are compared by it.

    A function's or a class's own name, a partial's with its keywords, what other callables print as.
    """
    if isinstance(function, functools.partial):
        values = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in sorted(function.keywords.items()))]
        return f"{callable_name(function.func)}({', '.join(values)})"
    if hasattr(function, "__qualname__"):
        return function.__qualname__
    printed_by = type(function).__repr__
    return type(function).__qualname__ if printed_by is object.__repr__ else repr(function)


def _signature(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _digest(tensor: Tensor) -> str:
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()[:16]
