"""The picture of a training run: loss, and accuracy or R^2, against the epoch."""

from __future__ import annotations

import os

from ..errors import ArgumentError
from ..support.files import write_atomically
from ..support.plotting import plain, require_matplotlib
from .history import History


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
