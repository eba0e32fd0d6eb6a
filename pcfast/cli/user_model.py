"""``--model FILE.py:FUNCTION``: the user's own network, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..datasets import Data
from ..errors import ArgumentError, ModelError
from ..model.describe import describe
from ..model.placement import common_placement
from ..support import modes

NEEDED = "FILE.py:FUNCTION, where FUNCTION() returns an nn.Sequential"


def user_model(spec: str) -> nn.Sequential:
    """What FUNCTION of ``FILE.py:FUNCTION`` returns.

    Raises:
        ArgumentError, ModelError: in one line, whatever goes wrong in that file.
    """
    file, colon, function = spec.rpartition(":")
    if not colon or not function.isidentifier():
        raise ArgumentError("model", repr(spec), NEEDED)
    path = Path(file)
    if not path.is_file():
        raise ArgumentError("model", f"{file}, which is no file", NEEDED)
    name = f"pcfast_user_model_{abs(hash(path.resolve()))}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None:
        raise ArgumentError("model", f"{file}, which is no Python file", NEEDED)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # as import does: pickling and dataclasses look modules up there
    try:
        with _process_kept(str(path.resolve().parent)):
            module_spec.loader.exec_module(module)
            make = getattr(module, function, None)
            model = make() if callable(make) and not isinstance(make, nn.Module) else None
    except (ArgumentError, KeyboardInterrupt):
        raise
    except BaseException as error:
        remedy = f"Try: python -c \"import runpy; runpy.run_path('{file}')['{function}']()\""
        raise ArgumentError("model", f"{spec}, which raised {_said(error, path)}", NEEDED, remedy) from error
    if isinstance(make, nn.Module):
        raise ArgumentError("model", f"{spec}, which is a network, not a function that returns one", NEEDED)
    if not callable(make):
        raise ArgumentError("model", f"{file} without a function {function}", NEEDED)
    try:
        describe(model)
        common_placement(model)
    except ModelError as error:
        raise ModelError(
            "model", f"{spec}, which returned {error.given}", error.needed, error.remedy
        ) from None
    if not any(p.requires_grad for p in model.parameters()):
        given = f"{spec}, which returned a network without parameters to train"
        raise ModelError("model", given, "at least one that requires grad")
    return model


def digest_of(spec: str) -> str | None:
    """SHA-256 of the file of ``FILE.py:FUNCTION``; None where it cannot be read."""
    path = Path(spec.rpartition(":")[0])
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return None


@contextlib.contextmanager
def _process_kept(folder: str) -> Iterator[None]:
    """``folder`` on the module path, as for ``python FILE.py``; what the file changes of the process is put back.

    Its own additions to the module path stay: the network may import when it runs.
    """
    path, streams, where = sys.path, (sys.stdout, sys.stderr), os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if not isinstance(sys.path, list):
            sys.path = path
        with contextlib.suppress(ValueError):  # the file has set it anew
            sys.path.remove(folder)
        sys.stdout, sys.stderr = streams
        os.chdir(where)


def checked_fit(spec: str, model: nn.Sequential, data: Data, classes: int) -> None:
    """Run the user's network once on a sample of the data.

    Raises:
        ModelError: it fails, or gives something else than one output a class.
    """
    x = data.x_train[:2]
    needed = f"a network from samples of shape {tuple(x.shape[1:])} to {classes} outputs"
    try:
        with modes.evaluating(model), torch.no_grad(), torch.random.fork_rng([]):
            output = model(x.clone())
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        said = _said(error, Path(spec.rpartition(":")[0]))
        remedy = "" if x.dim() == 2 else "Where it takes flat inputs: let it begin with nn.Flatten()."
        raise ModelError("model", f"{spec}, whose network fails on them: {said}", needed, remedy) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            "model", f"{spec}, whose network returns an object of type {type(output).__name__}", needed
        )
    if tuple(output.shape) != (len(x), classes):
        raise ModelError(
            "model", f"{spec}, whose output has shape {tuple(output.shape)} for 2 samples", needed
        )
    if output.is_complex():
        remedy = "Let it end with absolute values, e.g. |z|^2."
        raise ModelError("model", f"{spec}, whose outputs are complex", "real outputs for the loss", remedy)


def _said(error: BaseException, path: Path) -> str:
    """The exception in one line, and the line of the user's file that it came through last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name]
    where = f" (line {frames[-1].lineno})" if frames else ""
    try:
        text = " ".join(str(error).split())[:500]
    except Exception:  # its own __str__ fails
        text = "no words"
    return f"{type(error).__name__}: {text}{where}"
