"""Plots of a training run, and what all pictures have in common: they are no reason to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import ArgumentError
from .files import write_atomically
from .history import History

_log = logging.getLogger("pcfast")
_failed: set[str] = set()


def require_matplotlib() -> None:
    """Raise ImportError, with the remedy, where matplotlib is missing."""
    # Its import refuses a backend that is not installed here; no window is opened, so none is needed.
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the training curves need matplotlib: pip install "pcfast[train]"') from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def drawn(path: Path, draw: Callable[[Path], None]) -> bool:
    """Whether ``draw(path)`` made its picture; where it could not a warning says so, once for each file."""
    try:
        with _own_settings():
            draw(path)
    except Exception as error:  # of matplotlib, its fonts, LaTeX, the disk
        if str(path) not in _failed:
            _failed.add(str(path))
            text = " ".join(str(error).split())[:200]
            _log.warning(
                f"{ascii(str(path))[1:-1]} could not be drawn, all else goes on: {type(error).__name__}: {text}"
            )
        return False
    return True


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Text is drawn by matplotlib itself, not by LaTeX; letters that its font lacks are boxes, without a word."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def plain(text: str) -> str:
    """``text``, which may be a file's name, as letters that can be drawn."""
    with contextlib.suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"
        )  # a name in no letters of the locale
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text
    )


def training_curves(history: History, path: str | os.PathLike, *, title: str = "") -> None:
    """Draw loss and accuracy, or R^2, against the epoch, training and test, as a PNG at ``path``, atomically.

    Args:
        history: at least one epoch.
        path: the PNG; its folder exists.
        title: a line above the two panels.

    Raises:
        ArgumentError: the history is empty.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    if len(history) == 0:
        raise ArgumentError("history", "no epoch", "at least one finished epoch")
    require_matplotlib()
    # Figure and the Agg canvas directly: no pyplot, no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, score = figure.subplots(1, 2)
    panels = (
        (loss, "Loss", history.train_loss, history.test_loss),
        (score, "Accuracy", history.train_accuracy, history.test_accuracy)
        if history.of_classes
        else (score, "$R^2$", history.train_r2, history.test_r2),
    )
    for axes, name, train, test in panels:
        axes.plot(epochs, train, marker="o", markersize=3, label="training (during the epoch)")
        axes.plot(epochs, test, marker="s", markersize=3, label="test (after the epoch)")
        axes.set(xlabel="Epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_yscale("log")
    if history.of_classes:
        score.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.suptitle(plain(title), parse_math=False)
    write_atomically(path, canvas.print_png)
