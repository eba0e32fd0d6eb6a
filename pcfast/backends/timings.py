"""What the backends that can run a plan took for it on a device: measured once, kept in memory and in a file."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..precision import kernel_operands
from ..problem.plan import Plan, undecided
from ..support.files import exclusive, json_text, write_json
from ..support.log import warn_once
from . import generation
from .chips import device_key
from .device_identity import identity_of
from .triton import config_cache
from .triton import configs as tuned

#: Of the file; another is not read.
FORMAT = 1
#: What takes over from eager has to be faster by so much: less is noise.
MARGIN = 1.05
#: The backend that runs where nothing is known of the others.
FALLBACK = "eager"
_MAX_ENTRIES = 1000
_LOCK_S = 10.0

_known: dict[tuple[str, int | None], dict[str, Timings]] = {}


@dataclass(frozen=True)
class Timings:
    """Of one plan.

    Attributes:
        what: the plan in words. when: date and time, in UTC.
        seconds: backend -> median seconds of a relaxation with its updates, measured in turns.
        out: backend -> why it could not be measured.
    """

    what: str
    when: str
    seconds: Mapping[str, float]
    out: Mapping[str, str]

    def covers(self, backends: Iterable[str]) -> bool:
        """Whether all of them were measured, or failed at it."""
        return set(backends) <= {*self.seconds, *self.out}

    def fastest(self, backends: Iterable[str]) -> str:
        """The one to run: eager, unless another is faster by more than :data:`MARGIN`; "" where all failed."""
        seconds = {name: self.seconds[name] for name in backends if name in self.seconds}
        if not seconds:
            return ""
        best = min(seconds, key=seconds.get)
        eager = seconds.get(FALLBACK)
        return FALLBACK if eager is not None and MARGIN * seconds[best] >= eager else best


def timings(plan: Plan, seconds: Mapping[str, float], out: Mapping[str, str]) -> Timings:
    """Of ``plan``, now."""
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    widths = " - ".join("x".join(map(str, inner[-1][1:])) for inner in plan.shapes)
    operand = str(plan.precision.operand).removeprefix("torch.")
    what = (
        f"{plan.method}, x {plan.x_shape}, layers {widths}, {plan.num_steps} iterations, operands {operand}"
    )
    return Timings(what, when, dict(seconds), dict(out))


def key_of(plan: Plan, graphs: bool) -> str:
    """A digest of all that times depend on beside the device.

    Args:
        graphs: CUDA graphs may be used.
    """
    asked = replace(undecided(plan), device=torch.device(plan.device.type))
    operands = kernel_operands(plan.device, plan.precision)
    return hashlib.sha256(f"{asked!r} {operands} {graphs} {_tiles(plan.device)}".encode()).hexdigest()[:32]


def _tiles(device: torch.device) -> str:
    """The tuned choices in force on ``device``."""
    return "" if not identity_of(device).triton else _digest(config_cache.active(device))


@functools.lru_cache(maxsize=16)
def _digest(choices: tuned.Choices) -> str:
    entries = sorted(json_text(entry) for entry in tuned.to_json(choices))
    return hashlib.sha256("".join(entries).encode()).hexdigest()


def path_of(device: torch.device) -> Path:
    """The file of ``device``."""
    return config_cache.folder() / identity_of(device).file_name("timings")


def of_device(device: torch.device) -> dict[str, Timings]:
    """Digest -> timings of all plans that were measured on ``device``; reads the file the first time."""
    key = device_key(device)
    if key not in _known:
        _known[key] = _read(device)
    return _known[key]


def _read(device: torch.device) -> dict[str, Timings]:
    path = path_of(device)
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if record.get("for") != asdict(identity_of(device)):
            raise ValueError(f"it holds for {record.get('for')}")
        return {key: _timings(entry) for key, entry in record["plans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn_once(
            f"{path} cannot be read as timings ({type(error).__name__}: {error}), and is taken as if it were not "
            "there."
        )
        return {}


def _timings(entry: dict) -> Timings:
    seconds = {str(name): float(value) for name, value in entry["seconds"].items()}
    out = {str(name): str(reason) for name, reason in entry["out"].items()}
    if not all(value > 0 for value in seconds.values()):  # neither is NaN
        raise ValueError(f"{seconds} are no seconds")
    return Timings(str(entry["what"]), str(entry["when"]), seconds, out)


def keep(device: torch.device, key: str, measured: Timings) -> None:
    """Add the timings of a plan, unless another process has added that plan's before: then its timings hold here.

    Where the file cannot be written a warning says so once, and the timings hold for this process.
    """
    path, names = path_of(device), {*measured.seconds, *measured.out}
    known = of_device(device)
    try:
        with exclusive(path.with_suffix(".lock"), _LOCK_S) as held:
            if not held:  # what others write meanwhile would be lost
                raise TimeoutError(f"{path} has been locked for {_LOCK_S:g} s")
            everything = _read(device)
            if key not in everything or not everything[key].covers(names):
                everything[key] = measured
                everything = dict(list(everything.items())[-_MAX_ENTRIES:])
                plans = {key: asdict(entry) for key, entry in everything.items()}
                write_json(path, {"format": FORMAT, "for": asdict(identity_of(device)), "plans": plans})
            known.update(everything)
    except OSError as error:
        warn_once(
            f"timings of backends cannot be written ({error}), and hold for this process alone. Name a folder that "
            "can be written: PCFAST_CACHE."
        )
        known[key] = measured
    generation.advance()


def forget() -> None:
    """Read the files anew."""
    _known.clear()
    generation.advance()
