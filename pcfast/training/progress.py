"""What a person at the terminal sees of a run, and how signals ask it to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..support.console import PlainConsole
from .history import score_text

if TYPE_CHECKING:
    from .run import TrainingRun

SECONDS_BETWEEN_READINGS = 0.2  # reading the running loss waits for the device
STOPPING = "stopping after this batch; once more stops at once"
_log = logging.getLogger("pcfast")


def takes_over(number: int) -> bool:
    """Whether a signal may get a handler of pcfast's.

    SIGTERM and SIGHUP only where they would end the process: a program's own handler stays, and so does what nohup
    ignores. Of SIGINT every handler gives way, as Python's own is one.
    """
    handler = signal.getsignal(number)
    if number == signal.SIGINT:
        return callable(handler)
    return handler in (signal.SIG_DFL, signal.default_int_handler)


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP as a request: the first one is noted and answered, a second one raises at once.

    Does nothing outside the main thread, where handlers cannot be set.
    """

    def __init__(self, shown: bool = False) -> None:
        self._shown = shown  # what the run prints goes to standard output

    def __enter__(self) -> Interrupt:
        self.requested = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in filter(takes_over, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        _answer(STOPPING, self._shown)

    def __exit__(self, *exception) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def _answer(text: str, shown: bool) -> None:
    """Say at once, from a handler of signals, where a person looks: whatever was being printed may be half done.

    On standard error where that is a terminal, or where a run prints nothing; else among its lines.
    """
    with contextlib.suppress(Exception):  # closed, or a terminal that is gone
        terminal = sys.stderr is not None and sys.stderr.isatty()
        stream = sys.stdout if shown and not terminal else sys.stderr
        text = f"\n{text}\n" if stream.isatty() else f"{text}\n"
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):  # no file: a notebook's
            stream.write(text)
            stream.flush()
        else:
            os.write(descriptor, text.encode())


class Display:
    """The progress bar, and one line an epoch; nothing at all where not enabled.

    Training is not about its words: where they cannot be written (a full disk, a pipe whose reader has left, a
    terminal that is gone) a warning says so once, and nothing more is printed.
    """

    def __init__(self, enabled: bool, epochs: int, run: TrainingRun):
        self.run, self.epochs, self.bar, self.last_reading = run, epochs, None, 0.0
        self.enabled = enabled and sys.stdout is not None
        if not self.enabled:
            return
        console = PlainConsole(soft_wrap=True)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn("{task.fields[rate]:,.0f} samples/s  loss {task.fields[loss]:.4g}"),
            TextColumn("{task.fields[score]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # the epochs' lines stay
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=epochs * run.samples, epoch=1, rate=0.0, loss=0.0, score="")

    def __enter__(self) -> Display:
        if self.bar is not None and not self.bar.disable:
            self._written(self.bar.start)
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None and not self.bar.disable:
            self._written(self.bar.stop)

    def _written(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self.bar = None
            reason = getattr(error, "strerror", None) or str(error)
            _log.warning(f"standard output cannot be written ({reason}): the run continues without output")

    def say(self, message: str) -> None:
        """One line between the epochs'; nothing where there is nothing to say."""
        if self.bar is not None and message:
            console = self.bar.console
            encoding = getattr(console.file, "encoding", None) or "utf-8"
            errors = (
                "strict" if getattr(console.file, "errors", None) != "surrogateescape" else "surrogateescape"
            )
            try:
                message.encode(encoding, errors)
            except UnicodeEncodeError:
                message = message.encode(encoding, "backslashreplace").decode(encoding)
            self._written(lambda: console.print(message))

    def after_batch(self, samples: int) -> None:
        if self.bar is None or self.bar.disable:
            return
        now = time.monotonic()
        if now - self.last_reading < SECONDS_BETWEEN_READINGS:
            return
        self.last_reading, run = now, self.run
        values = dict(
            completed=len(run.history) * run.samples + run.position,
            epoch=len(run.history) + 1,
            rate=run.position / run.seconds,
            loss=run.loss_sum.item() / run.seen,
            score=score_text(run.of_classes, run.score()),
        )
        self._written(lambda: self.bar.update(self.task, **values))

    def after_epoch(self) -> None:
        history = self.run.history
        self.say(
            f"epoch {len(history):{len(str(self.epochs))}}/{self.epochs}"
            f"  training: loss {history.train_loss[-1]:.4g}, {history.score('train')}"
            f"  test: loss {history.test_loss[-1]:.4g}, {history.score('test')}"
            f"  {self.run.samples / history.seconds[-1]:,.0f} samples/s"
        )
