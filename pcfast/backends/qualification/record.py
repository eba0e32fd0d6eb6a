"""What a qualification found on a device, and the file that holds it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...support.files import write_json
from ...support.log import warn_once
from ..device_identity import DeviceIdentity, identity_of
from ..kernel_kinds import KernelKind
from ..triton.config_cache import folder

#: Of the file; another is not read.
FORMAT = 1
QUALIFIED, FAILED, UNTESTED = "qualified", "failed", "untested"


@dataclass(frozen=True)
class Verdict:
    """Of one kind of kernels. status: one of the three above. reason: why it is not qualified, else ""."""

    status: str
    reason: str = ""


@dataclass(frozen=True)
class Qualification:
    """What :func:`pcfast.qualify` found.

    Attributes:
        identity: what it holds for: the device, its driver, releases, digests of the kernels.
        when: date and time, in UTC.
        verdicts: of each kind of kernels.
        unavailable: backend -> why none of its kernels could be tested.
    """

    identity: DeviceIdentity
    when: str
    verdicts: Mapping[KernelKind, Verdict]
    unavailable: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every kind that there is to test is qualified."""
        return all(verdict.status == QUALIFIED for verdict in self.verdicts.values())

    def refusal(self, needed: Iterable[KernelKind]) -> str:
        """Which of the kinds are not qualified, and why; "" where all are."""
        words = []
        for kind in sorted(needed):
            verdict = self.verdicts.get(kind, Verdict(UNTESTED, "it is of no qualification"))
            if verdict.status == FAILED:
                words.append(f"{kind} is not qualified on this device: {verdict.reason}")
            elif verdict.status == UNTESTED:
                words.append(f"{kind} is not tested on this device: {verdict.reason}; run pcfast qualify")
        return "; ".join(words)

    def to_json(self) -> dict:
        """As dicts and lists."""
        return {
            "format": FORMAT,
            "for": asdict(self.identity),
            "when": self.when,
            "kinds": [asdict(kind) | asdict(verdict) for kind, verdict in self.verdicts.items()],
            "unavailable": dict(self.unavailable),
        }


def from_json(record, identity: DeviceIdentity) -> Qualification:
    """What :meth:`Qualification.to_json` gave.

    Raises:
        ValueError: anything else, or one for another device or other kernels.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    if record.get("for") != asdict(identity):
        raise ValueError(f"it holds for {record.get('for')}")
    verdicts, unavailable = {}, record.get("unavailable")
    try:
        for entry in record["kinds"]:
            kind = KernelKind(*(_text(entry[name]) for name in ("backend", "name", "precision")))
            verdicts[kind] = Verdict(_text(entry["status"]), _text(entry["reason"]))
            if verdicts[kind].status not in (QUALIFIED, FAILED, UNTESTED):
                raise ValueError(f"{entry['status']!r} is no verdict")
        return Qualification(
            identity, _text(record["when"]), verdicts, {_text(k): _text(v) for k, v in unavailable.items()}
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no qualification ({type(error).__name__}: {error})") from error


def _text(value) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def path_of(device: torch.device) -> Path:
    """The file of ``device``."""
    return folder() / identity_of(device).file_name("qualification")


def load(device: torch.device) -> Qualification | None:
    """What the file of ``device`` holds; None where there is none, or none that can be used: the log says why."""
    path = path_of(device)
    try:
        return from_json(json.loads(path.read_bytes()), identity_of(device))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn_once(
            f"{path} cannot be read as a qualification ({error}), and is taken as if it were not there."
        )
        return None


def save(device: torch.device, qualification: Qualification) -> Path:
    """Replace the file of ``device``; OSError where it cannot be written."""
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, qualification.to_json())
    return path
