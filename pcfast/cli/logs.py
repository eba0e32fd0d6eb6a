"""``--log``: what is written of every epoch besides the run folder's own files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from ..datasets import Data
from ..diagnostics import scalars
from ..problem.settings import Settings
from ..training.history import History
from ..training.writers import WRITERS

AfterEpoch = Callable[[nn.Sequential, History], None]


@contextlib.contextmanager
def logged(
    kinds: Sequence[str], folder: Path, resumed: bool, data: Data, settings: dict, device: torch.device
) -> Iterator[AfterEpoch | None]:
    """What ``train`` calls after every epoch; None where nothing is logged.

    One relaxation of a batch of test samples is measured with the run's settings.

    Raises:
        ImportError: a library is missing; before anything is trained.
    """
    if not kinds:
        yield None
        return
    rows = slice(settings["batch_size"])
    x, y = data.x_test[rows].to(device), data.y_test[rows].to(device)
    known = {field.name for field in fields(Settings)}
    relaxation = Settings(**{name: value for name, value in settings.items() if name in known})
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(contextlib.closing(WRITERS[kind](folder, resumed)))
            for kind in dict.fromkeys(kinds)
        ]

        def after_epoch(model: nn.Sequential, history: History) -> None:
            values = {**scalars.of_history(history), **scalars.of_relaxation(model, x, y, relaxation)}
            for writer in writers:
                writer.write(len(history), values)

        yield after_epoch
