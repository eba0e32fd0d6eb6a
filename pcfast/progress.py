"""What a person at the terminal sees of a run, and how Ctrl-C asks it to stop."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .training import Run

SECONDS_BETWEEN_READINGS = 0.2  # reading the running loss waits for the device


class Interrupt:
    """Ctrl-C as a request: the first one is noted, a second one raises at once.

    Does nothing outside the main thread, where handlers cannot be set, and where SIGINT is ignored (nohup).
    """

    def __enter__(self) -> Interrupt:
        self.requested = False
        self._previous = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exception) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)


class Display:
    """The progress bar, and one line an epoch; nothing at all where not enabled."""

    def __init__(self, enabled: bool, epochs: int, run: Run):
        self.run, self.epochs, self.bar, self.last_reading = run, epochs, None, 0.0
        if not enabled:
            return
        console = Console(highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn("{task.fields[rate]:,.0f} samples/s  loss {task.fields[loss]:.4g}"),
            TextColumn("accuracy {task.fields[accuracy]:.2%}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,  # the epochs' lines stay
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(
            "", total=epochs * run.samples, epoch=1, rate=0.0, loss=0.0, accuracy=0.0
        )

    def __enter__(self) -> Display:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, message: str) -> None:
        """One line between the epochs'; nothing where there is nothing to say."""
        if self.bar is not None and message:
            self.bar.console.print(message)

    def after_batch(self, samples: int) -> None:
        if self.bar is None or self.bar.disable:
            return
        now = time.monotonic()
        if now - self.last_reading < SECONDS_BETWEEN_READINGS:
            return
        self.last_reading, run = now, self.run
        self.bar.update(
            self.task,
            completed=len(run.history) * run.samples + run.position,
            epoch=len(run.history) + 1,
            rate=run.position / run.seconds,
            loss=run.loss_sum.item() / run.position,
            accuracy=run.correct.item() / run.position,
        )

    def after_epoch(self) -> None:
        if self.bar is None:
            return
        history = self.run.history
        self.bar.console.print(
            f"epoch {len(history):{len(str(self.epochs))}}/{self.epochs}"
            f"  training: loss {history.train_loss[-1]:.4g}, accuracy {history.train_accuracy[-1]:.2%}"
            f"  test: loss {history.test_loss[-1]:.4g}, accuracy {history.test_accuracy[-1]:.2%}"
            f"  {self.run.samples / history.seconds[-1]:,.0f} samples/s"
        )
