"""The file that holds what tuning chose, and the choices that are in force.

One JSON file for each GPU, release of triton and state of the kernels' sources, in the folder that PCFAST_CACHE
names, else in pcfast/ below XDG_CACHE_HOME, else in ~/.cache/pcfast. Read at the first plan of the triton backend on
a device, once a process; importing pcfast reads nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ... import kernels
from ...errors import ArgumentError
from ...support.files import write_json
from ...support.log import info_once, warn_once
from .. import chips, generation
from . import configs as choices_module
from .configs import NONE, Choices

FOLDER_VARIABLE = "PCFAST_CACHE"
#: Of the file; another is not read.
FORMAT = 2

_loaded: dict[tuple[str, int | None], Choices] = {}
_overridden: ContextVar[Choices | None] = ContextVar("pcfast_choices", default=None)


@dataclass(frozen=True)
class Identity:
    """What choices are good for.

    Attributes:
        device: name of the GPU; "interpreter" on the CPU. capability: "9.0"; "" on the CPU.
        triton: its release. sources: digest of what is compiled and of the rules that choices replace.
    """

    device: str
    capability: str
    triton: str
    sources: str

    @property
    def prefix(self) -> str:
        """How names of this GPU's files begin."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", f"{self.device} {self.capability}").strip("-").lower() + "_"

    @property
    def file_name(self) -> str:
        return f"{self.prefix}triton-{self.triton}_{self.sources[:16]}.json"


def identity(device: torch.device) -> Identity:
    """Of ``device`` with this process's triton and pcfast."""
    import triton  # here: pcfast imports without it

    name, capability = "interpreter", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return Identity(name, capability, triton.__version__, sources_digest())


@functools.lru_cache(maxsize=1)
def sources_digest() -> str:
    """SHA-256 of the kernels' sources and of tiles.py."""
    files = [*sorted(Path(kernels.__file__).parent.glob("*.py")), Path(__file__).with_name("tiles.py")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def folder() -> Path:
    """Where the files lie."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pcfast"


def path_of(device: torch.device) -> Path:
    """The file of ``device``."""
    return folder() / identity(device).file_name


# in force


def active(device: torch.device) -> Choices:
    """The choices to design with on ``device``; reads the file the first time. Never raises for a bad file.

    For a chip that is named instead of a GPU that is here there are none.
    """
    override = _overridden.get()
    if override is not None:
        return override
    if chips.named():
        return NONE
    key = chips.device_key(device)
    if key not in _loaded:
        _loaded[key] = load(device)
    return _loaded[key]


@contextlib.contextmanager
def using(choices: Choices) -> Iterator[None]:
    """``choices`` instead of those in the file, in this thread. Recorded graphs keep the launches that they have."""
    token = _overridden.set(choices)
    try:
        yield
    finally:
        _overridden.reset(token)


def invalidate() -> None:
    """Read the files anew at the next plan. Recorded CUDA graphs hold the old launches: clear those, too."""
    _loaded.clear()
    generation.advance()


# the file


def load(device: torch.device) -> Choices:
    """What the file of ``device`` holds. Without a file that can be used, no choices: the log says why."""
    known = identity(device)
    path = folder() / known.file_name
    try:
        return _read(path, known)
    except FileNotFoundError:
        _say_if_stale(known)
    except (OSError, ValueError) as error:
        warn_once(
            f"{path} cannot be read as tuned choices ({error}); the triton backend runs untuned. Delete the file, or "
            "write it anew: pcfast tune."
        )
    return NONE


def _read(path: Path, known: Identity) -> Choices:
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if record.get("for") != asdict(known):
        raise ValueError(f"it was tuned for {record.get('for')}")
    return choices_module.from_json(record.get("choices"))


def _say_if_stale(known: Identity) -> None:
    with contextlib.suppress(OSError):
        others = sorted(file.name for file in folder().glob(f"{known.prefix}*.json"))
        if others:
            info_once(
                f"{folder()}: choices tuned for other kernels or another triton are not used "
                f"({', '.join(others)}); tune again: pcfast tune"
            )


def check_writable() -> None:
    """Create the folder, before any work.

    Raises:
        ArgumentError: it cannot be created or written.
    """
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with open(folder() / ".lock", "a"):
            pass
    except OSError as error:
        raise _unwritable(error) from error


def save(device: torch.device, chosen: Choices) -> Path:
    """Add ``chosen`` to the file of ``device``, and use it from now on.

    Whoever saves at the same time waits: nobody's entries are lost. A file that cannot be read is replaced.

    Raises:
        ArgumentError: the folder cannot be written.
    """
    known = identity(device)
    path = folder() / known.file_name
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with open(folder() / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            merged = load(device).with_entries(dict(chosen.items()))
            record = {"format": FORMAT, "for": asdict(known), "choices": choices_module.to_json(merged)}
            write_json(path, record)
    except OSError as error:
        raise _unwritable(error) from error
    invalidate()
    return path


def _unwritable(error: OSError) -> ArgumentError:
    needed = f"a folder in which files can be written ({error.strerror})"
    return ArgumentError(FOLDER_VARIABLE, str(folder()), needed, "Name another folder, or do not save.")
