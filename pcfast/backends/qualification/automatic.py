"""When "auto" qualifies a device by itself, and what it knows of devices in this process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

import torch

from ...errors import ArgumentError
from ...support.log import info_once, warn_once
from .. import generation
from ..chips import device_key
from ..kernel_kinds import KernelKind
from ..triton import config_cache
from . import record, run
from .record import Qualification

#: "0": no qualification runs by itself.
VARIABLE = "PCFAST_QUALIFY"
#: Seconds beyond the limit of a qualification that other processes wait for its record.
_MARGIN_S = 20.0
_POLL_S = 0.2

# of this process: a record, or why there is none
_known: dict[tuple[str, int | None], Qualification | str] = {}
_lock = threading.RLock()


def adopt(device: torch.device, qualification: Qualification) -> None:
    """Have it hold in this process."""
    _known[device_key(device)] = qualification
    generation.advance()


def forget() -> None:
    """Look for records anew."""
    _known.clear()
    generation.advance()


def refusal(device: torch.device, needed: Iterable[KernelKind], *, may_run: bool) -> str:
    """Why kernels may not run on ``device`` by "auto"; "" where all that are needed are qualified.

    Args:
        may_run: qualify now, in child processes, where nothing is known of the device.
    """
    known = _known.get(device_key(device)) or _of_device(device, may_run)
    return known if isinstance(known, str) else known.refusal(needed)


def _of_device(device: torch.device, may_run: bool) -> Qualification | str:
    """What is known from now on; what is so for the moment alone is not kept."""
    generation.advance()
    found = record.load(device)
    if found is None:
        if reason := _not_now(device, may_run):
            return f"nothing is qualified on this device yet: {reason}"
        with _lock:
            known = _known.get(device_key(device))  # by another thread meanwhile
            found = known if known is not None else _obtained(device)
    _known[device_key(device)] = found
    return found


def _not_now(device: torch.device, may_run: bool) -> str:
    """Why no qualification starts at this place; "" where it may."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "none starts inside a capture"
    if torch.compiler.is_compiling():
        return "none starts while torch.compile traces"
    if may_run:
        return ""
    return "run pcfast qualify" if _switched_off() else "the first call does it, or pcfast qualify"


def _switched_off() -> bool:
    return os.environ.get(VARIABLE) == "0"


def local_rank() -> int:
    """Of this process among those on its machine that one launcher started; 0 without a launcher."""
    given = os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or "0"
    return int(given) if given.isdecimal() else 0


def _obtained(device: torch.device) -> Qualification | str:
    """A new record, this process's or that of another which qualifies now; or why there is none."""
    if _switched_off():
        info_once(
            f"nothing is qualified on {device} and {VARIABLE}=0: eager runs. pcfast qualify finds out which kernels "
            "may run."
        )
        return f"nothing is qualified on this device, and {VARIABLE}=0: run pcfast qualify"
    if local_rank():
        return _awaited(device)
    warn_once(
        f"pcfast tests its kernels on {device}, once for this machine, in at most {run.LIMIT_S:g} s ({VARIABLE}=0 "
        "leaves that out; pcfast qualify does it beforehand)"
    )
    with run.held(device, run.LIMIT_S + _MARGIN_S) as held:
        found = record.load(device)  # whoever had the lock has written it
        if found is None and not held:
            return "another process qualifies this device and does not end"
        try:
            found = found or run.tested(device, run.LIMIT_S, run.KIND_LIMIT_S)
        except run.NothingTested as failure:
            warn_once(str(failure))
            return str(failure)
    info_once(f"pcfast tested its kernels on {device}: {summary(found)}")
    return found


def _awaited(device: torch.device) -> Qualification | str:
    """The record that local rank 0 writes."""
    try:
        config_cache.check_writable()
    except ArgumentError as unwritable:
        warn_once(f"local rank 0 can write no qualification: eager runs on {device}. {unwritable}")
        return f"local rank 0 can write no qualification: {unwritable}"
    deadline = time.monotonic() + run.LIMIT_S + _MARGIN_S
    info_once(f"waiting for local rank 0, which tests pcfast's kernels on {device}")
    while (found := record.load(device)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if found is not None:
        return found
    reason = f"local rank 0 has written no qualification within {run.LIMIT_S + _MARGIN_S:g} s"
    warn_once(f"{reason}: eager runs on {device}")
    return reason


def summary(found: Qualification) -> str:
    """In a line."""
    bad = [f"{kind}: {verdict.reason}" for kind, verdict in found.verdicts.items() if verdict.reason]
    fine = len(found.verdicts) - len(bad)
    return f"{fine} of {len(found.verdicts)} kinds qualified" + "".join(f"; {words}" for words in bad)
