"""Checkpoints: what identifies a run, and reading one back with a clear word when it does not fit."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..datasets import Data
from ..errors import ArgumentError
from ..losses import LossLike
from ..support.log import warn_once
from ..support.naming import module_text, without_address
from .history import History

FORMAT = 2
#: Format 1 had no checksum, and R^2 was not measured. It is read as the current format.
WITHOUT_CHECKSUM = 1
PARTS = (
    "format", "config", "model", "optimizer", "scheduler", "epoch", "position", "loss_sum", "correct", "residual",
    "seconds", "rng", "history", "checksum",
)  # fmt: skip
REMEDY = "Take it from a backup, or start anew in another folder."
#: Of an optimiser's settings those that say how it computes, and not what: a run may go on otherwise.
_FORMS = ("capturable", "foreach", "fused")
_HOW = re.compile(rf"optimizer\.groups\.\d+\.({'|'.join(_FORMS)})")
_MAX_COPIED = 1 << 30  # bytes of a tensor that repeats what its storage holds once


def load_checkpoint(path: Path, settings: dict) -> dict:
    """The checkpoint at ``path``; ArgumentError where it is missing, damaged or of other settings."""
    checkpoint = read_run(path)
    there, here = _without_forms(checkpoint["config"]["settings"]), flat(settings)
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


def read_run(path: Path) -> dict:
    """The checkpoint of a run to go on with; ArgumentError, named "out", where it is missing or damaged."""
    if not path.is_file():
        raise ArgumentError(
            "out", f"no checkpoint at {path}", "the folder of a run", "Start it without resume."
        )
    return _read(path, "out")


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy the parameters and buffers of the checkpoint at ``path`` into ``model``.

    Raises:
        ArgumentError: named "checkpoint"; the file is missing, damaged or of another network.
    """
    if not path.is_file():
        raise ArgumentError("checkpoint", f"{path}, which is no file", "checkpoint.pt of a run of train")
    state = _read(path, "checkpoint")["model"]
    check_state(path, "checkpoint", model, state)
    with unfit_where_refused(path, "checkpoint", "model"):
        model.load_state_dict(state)


def check_state(path: Path, argument: str, model: nn.Module, state: dict) -> None:
    """Raise ArgumentError, before anything is copied, unless the tensors of ``state`` are those of ``model``."""
    there, here = (
        {k: v.shape for k, v in s.items() if isinstance(v, Tensor)} for s in (state, model.state_dict())
    )
    if there != here:
        name = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        shapes = [f"{tuple(shapes[name])}" if name in shapes else "absent" for shapes in (there, here)]
        given = f"{path} of another network: {name} is {shapes[0]} there, {shapes[1]} here"
        raise ArgumentError(argument, given, "one of this network")


def unfit(path: Path, argument: str, what: str) -> ArgumentError:
    """The error for a checkpoint of which ``what`` cannot be."""
    return ArgumentError(argument, f"{path} with {what}", "an undamaged checkpoint of train", REMEDY)


@contextlib.contextmanager
def unfit_where_refused(path: Path, argument: str, part: str) -> Iterator[None]:
    """Whatever taking over a part of a checkpoint raises becomes the error for that part."""
    try:
        yield
    except Exception as error:  # torch and its optimisers raise anything for what is not theirs
        raise unfit(path, argument, f"a part {part!r} that does not fit") from error


def _read(path: Path, argument: str) -> dict:
    """The checkpoint in the file ``path``; ArgumentError, named ``argument``, where it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on forms that only others write
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
        # Its own words advise to load with weights_only=False, which runs what the file says.
        reason = getattr(error, "strerror", None) or type(error).__name__
        given = f"{path}, which cannot be read ({reason})"
        raise ArgumentError(argument, given, "an undamaged checkpoint of train", REMEDY) from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ArgumentError(argument, f"{path}, which is no checkpoint of train", "one", REMEDY)
    if _equal(checkpoint["format"], WITHOUT_CHECKSUM) and "checksum" not in checkpoint:
        with unfit_where_refused(path, argument, "history"):
            checkpoint = _in_current_format(checkpoint)
        warn_once(f"{path} is of format 1, which has no checksum: damage to it cannot be seen.")
    if not _equal(checkpoint["format"], FORMAT):
        remedy = "Go on with the release that wrote it, or start anew in another folder."
        raise ArgumentError(argument, f"{path} of another format", f"format {FORMAT} or 1", remedy)
    for part in PARTS:
        if part not in checkpoint:
            raise unfit(path, argument, f"no part {part!r}")
    parts = {name: part for name, part in checkpoint.items() if name != "checksum"}
    with unfit_where_refused(path, argument, "checksum"):
        right = _equal(checkpoint["checksum"], checksum(parts))
    if not right:
        raise unfit(path, argument, "a checksum that is not its content's: it was damaged or changed")
    with unfit_where_refused(path, argument, "history"):
        wrong = _impossible(checkpoint)
    if wrong:
        raise unfit(path, argument, f"a part {wrong!r} that cannot be")
    return checkpoint


def _in_current_format(checkpoint: dict) -> dict:
    """A checkpoint of format 1 as one of the current format: what was not measured is missing, or NaN."""
    history = {"train_r2": [], "test_r2": [], **checkpoint["history"]}
    residual = (
        math.nan if checkpoint["position"] else 0.0
    )  # of the samples of the running epoch that are done
    parts = {
        "residual": residual, **checkpoint, "format": FORMAT,
        "history": {entry.name: history[entry.name] for entry in fields(History)},
    }  # fmt: skip
    return {**parts, "checksum": checksum(parts)}


def _equal(value, expected: int | str) -> bool:
    return type(value) is type(expected) and value == expected


def _impossible(checkpoint: dict) -> str:
    """The first part of a form or with numbers that no run has; "" where there is none."""
    config, rng, history = (checkpoint[name] for name in ("config", "rng", "history"))

    def count(value) -> bool:
        return type(value) is int and value >= 0

    def number(value) -> bool:
        return type(value) is float and math.isfinite(value) and value >= 0

    def state(value) -> bool:
        return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1

    names = [entry.name for entry in fields(History)]

    def column(name: str) -> bool:
        values, optional = history[name], name.endswith("r2")
        lengths = (0, checkpoint["epoch"]) if optional else (checkpoint["epoch"],)
        return isinstance(values, list) and len(values) in lengths and all(type(v) is float for v in values)

    possible = {
        "config": isinstance(config, dict) and all(isinstance(config.get(k), dict) for k in ("settings", "kept")),
        "model": isinstance(checkpoint["model"], dict),
        "optimizer": isinstance(checkpoint["optimizer"], dict),
        "scheduler": isinstance(checkpoint["scheduler"], dict | None),
        "epoch": count(checkpoint["epoch"]),
        "position": count(checkpoint["position"]),
        "loss_sum": type(checkpoint["loss_sum"]) is float and math.isfinite(checkpoint["loss_sum"]),
        "correct": count(checkpoint["correct"]) and checkpoint["correct"] <= checkpoint["position"],
        "residual": number(checkpoint["residual"]) or repr(checkpoint["residual"]) == "nan",
        "seconds": number(checkpoint["seconds"]),
        "rng": isinstance(rng, dict) and state(rng.get("cpu")) and isinstance(rng.get("cuda"), list)
        and all(map(state, rng["cuda"])),
        "history": isinstance(history, dict) and list(history) == names and all(map(column, names)),
    }  # fmt: skip
    return next((name for name, fine in possible.items() if not fine), "")


def checksum(parts: dict) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values: of their content, not of a file's bytes.

    It is the same for what is read back from the file, whichever way that was written.
    """
    return _digest_of(parts, {}).hex()


def _digest_of(value, known: dict[int, bytes]) -> bytes:
    """``known``: the digests of the containers that were met, so that one that stands in many places is read once."""
    if id(value) in known:
        return known[id(value)]
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        size = value.numel() * value.element_size()
        if value.layout == torch.strided and size > max(value.untyped_storage().nbytes(), _MAX_COPIED):
            raise ValueError(f"a tensor of {size} bytes in a storage of fewer")
        digest.update(f"tensor {_signature(value)} ".encode())
        digest.update(_bytes_of(value))
    elif isinstance(value, dict):
        digest.update(b"dict ")
        for entry in value.items():
            for part in entry:
                digest.update(_digest_of(part, known))
    elif isinstance(value, list | tuple):
        digest.update(b"tuple " if isinstance(value, tuple) else b"list ")
        for part in value:
            digest.update(_digest_of(part, known))
    elif isinstance(value, set | frozenset):
        digest.update(b"set " + b"".join(sorted(_digest_of(part, known) for part in value)))
    elif isinstance(value, str):
        digest.update(b"str " + value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes | bytearray):
        digest.update(b"bytes " + value)
    elif value is None or isinstance(value, bool | int | float | complex | torch.dtype | torch.device):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    else:  # a module's own state: its type, since its text may hold an address
        digest.update(f"other {type(value).__qualname__}".encode())
    if isinstance(value, dict | list | tuple):
        known[id(value)] = digest.digest()
    return digest.digest()


def _bytes_of(tensor: Tensor):
    tensor = tensor.detach()
    tensor = (tensor if tensor.layout == torch.strided else tensor.to_dense()).resolve_conj().resolve_neg()
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _without_forms(settings: dict) -> dict:
    """A checkpoint's settings, flat, without those that earlier releases kept of how an optimiser computes."""
    return {key: value for key, value in flat(settings).items() if not _HOW.fullmatch(key)}


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
        {key: value for key, value in group.items() if key not in ("params", *_FORMS)}
        | {"params": ", ".join(names[id(p)] for p in group["params"])}
        for group in optimizer.param_groups
    ]
    settings = {
        **values,
        "network": [module_text(layer) for layer in model]
        if isinstance(model, nn.Sequential)
        else repr(model),
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
        return f"{module_text(loss)}{values}"
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
    name = type(function).__qualname__
    if type(function).__repr__ is object.__repr__:
        return name
    return module_text(function) if isinstance(function, nn.Module) else without_address(repr(function))


def _signature(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()[:16]
