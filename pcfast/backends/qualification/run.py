"""Qualification of a device's kernels: child processes test them one kind after another, and this one records.

A kernel that hangs, crashes or breaks its CUDA context takes its child along and nothing else: the next child goes on
with the kinds that are left. This process starts no kernel.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ...errors import BackendError
from ...problem.validation import checked_device
from ...support.files import exclusive
from ...support.log import warn_once
from ..device_identity import identity_of
from ..kernel_kinds import KernelKind
from . import record
from .record import FAILED, UNTESTED, Qualification, Verdict

#: Seconds for all kinds, and for one.
LIMIT_S, KIND_LIMIT_S = 120.0, 45.0
#: Seconds that a process gets to die in, which one inside a driver may exceed.
_GRACE_S = 5.0
_ENDED = "the child process "

Progress = Callable[[int, int, str], None]


class NothingTested(BackendError):
    """No child got as far as a kernel: this says nothing about the kernels."""


def qualify(
    device: torch.device | str | None = None,
    *,
    limit_s: float = LIMIT_S,
    kind_limit_s: float = KIND_LIMIT_S,
    save: bool = True,
    progress: Progress | None = None,
) -> Qualification:
    """Test every kind of kernels of the backends triton and cuda on a device, and record which "auto" may use.

    Each kind relaxes small networks in each precision; beliefs, errors and updates are held to the bounds of
    :func:`pcfast.checking.check` against the float64 reference, and repeated runs to equal bits. All that runs in
    child processes: one that crashes, or does not end, disqualifies the kind that it was testing, and another tests
    the rest.

    Args:
        device: None means the GPU, or the CPU where there is none.
        limit_s: seconds in all; kinds that are not reached are not qualified. kind_limit_s: for one kind.
        save: write the record to the cache folder, where later processes read it. Where that fails, a warning says
            so, and the record holds for this process.
        progress: called as ``progress(done, total, what)``.

    Raises:
        BackendError: no child process could start testing; its own words are in the message.
    """
    from . import automatic  # here: it imports this module

    device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with held(device, limit_s) as alone:
        if not alone:
            warn_once(
                "another process qualifies kernels at the same time: this one shares the device with it"
            )
        result = tested(device, limit_s, kind_limit_s, save, progress)
    automatic.adopt(device, result)
    return result


def tested(
    device: torch.device,
    limit_s: float = LIMIT_S,
    kind_limit_s: float = KIND_LIMIT_S,
    save: bool = True,
    progress: Progress | None = None,
) -> Qualification:
    """As :func:`qualify`, for a caller that holds the lock (:func:`held`)."""
    result = _Run(device, limit_s, kind_limit_s, progress or (lambda done, total, what: None)).result()
    if save:
        try:
            record.save(device, result)
        except OSError as error:
            warn_once(
                f"the qualification of {result.identity.device} cannot be written ({error}), and holds for this "
                "process alone. Name a folder that can be written: PCFAST_CACHE."
            )
    return result


@contextlib.contextmanager
def held(device: torch.device, seconds: float) -> Iterator[bool]:
    """The lock under which one process at a time qualifies: True where it was had, or where no file can be locked."""
    with contextlib.ExitStack() as stack:
        try:
            alone = stack.enter_context(exclusive(record.path_of(device).with_suffix(".lock"), seconds))
        except OSError:
            alone = True
        yield alone


def command() -> list[str]:
    """What starts a child, which is given the device, a descriptor to write to, and the kinds to leave out."""
    root = str(Path(__file__).resolve().parents[3])
    code = f"import sys; sys.path.insert(0, {root!r}); from pcfast.checking.qualification import main; main()"
    return [sys.executable, "-c", code]


class _Child:
    """One child process, which writes a JSON object a line."""

    def __init__(self, device: torch.device, tested: Iterable[KernelKind]) -> None:
        self._reader, writer = os.pipe()
        self._buffer = b""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (until end)
        left_out = json.dumps([[kind.backend, kind.name, kind.precision] for kind in tested])
        # the child is of no process group of training, and qualifies nothing by itself
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        try:
            self._process = subprocess.Popen(
                [*command(), str(device), str(writer), left_out], pass_fds=[writer], stdin=subprocess.DEVNULL,
                stdout=self._said, stderr=subprocess.STDOUT, start_new_session=True,
                env={**kept, "PCFAST_QUALIFY": "0", "PYTHONFAULTHANDLER": "1"},
            )  # fmt: skip
        except OSError as error:
            os.close(self._reader)
            raise NothingTested(f"no child process could be started: {error}") from error
        finally:
            os.close(writer)

    def message(self, seconds: float) -> dict | None:
        """The next object; None where the child has ended. TimeoutError where neither comes in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            chunk = os.read(self._reader, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def ending(self) -> str:
        """How it ended, and the last that it printed."""
        try:
            status = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return _ENDED + "closed its pipe and went on"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:200]}" if lines and status > 0 else ""
        how = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"
        return _ENDED + how + last

    def end(self) -> None:
        """Kill it with whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        os.close(self._reader)
        self._said.close()


_NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "PCFAST_BACKEND",
)  # fmt: skip


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Run:
    """One qualification."""

    def __init__(self, device: torch.device, limit_s: float, kind_limit_s: float, progress: Progress) -> None:
        self._device, self._kind_limit_s, self._limit_s = device, kind_limit_s, limit_s
        self._deadline = time.monotonic() + limit_s
        self._progress = progress
        self._kinds: list[KernelKind] | None = None
        self._unavailable: dict[str, str] = {}
        self._verdicts: dict[KernelKind, Verdict] = {}

    def result(self) -> Qualification:
        """Run children until every kind has its verdict."""
        while self._kinds is None or len(self._verdicts) < len(self._kinds):
            before = len(self._verdicts)
            reason = self._one_child()
            if reason and len(self._verdicts) == before:
                if not self._verdicts:
                    raise NothingTested(
                        f"no kernel could be tested on {self._device}: {reason}. Kernels stay unused by "
                        'backend="auto"; look into that, then run: pcfast qualify'
                    )
                self._rest(reason)
        self._progress(len(self._kinds), len(self._kinds), "done")
        when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        verdicts = {kind: self._verdicts[kind] for kind in self._kinds}
        return Qualification(identity_of(self._device), when, verdicts, self._unavailable)

    def _rest(self, reason: str) -> None:
        """What is left stays untested."""
        for kind in self._kinds:
            self._verdicts.setdefault(kind, Verdict(UNTESTED, reason))

    def _one_child(self) -> str:
        """Take one child's verdicts; returns why it stopped before the end, or ""."""
        child, testing, since = _Child(self._device, self._verdicts), None, 0.0
        try:
            while True:
                left = self._deadline - time.monotonic()
                if testing is not None:
                    left = min(left, since + self._kind_limit_s - time.monotonic())
                message = child.message(left)
                if message is None:
                    reason = child.ending()
                    if testing is not None:
                        self._verdicts[testing] = Verdict(FAILED, reason)
                    return reason
                if "kinds" in message:
                    self._kinds = [KernelKind(*kind) for kind in message["kinds"]]
                    self._unavailable = message["unavailable"]
                elif "begin" in message:
                    testing, since = KernelKind(*message["begin"]), time.monotonic()
                    self._progress(len(self._verdicts), len(self._kinds), str(testing))
                elif "verdict" in message:
                    self._verdicts[testing], testing = Verdict(*message["verdict"]), None
                else:  # the end
                    return ""
        except TimeoutError:
            over = f"not reached within {self._limit_s:g} s"
            if time.monotonic() < self._deadline:
                self._verdicts[testing] = Verdict(FAILED, f"it did not end within {self._kind_limit_s:g} s")
                return ""
            if self._kinds is None:
                return over
            self._rest(over)
            return ""
        finally:
            child.end()
