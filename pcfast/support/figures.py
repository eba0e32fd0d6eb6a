"""What the figures of comparisons and diagnoses have in common: bands of panels, legends beside them, axes.

A value of zero is drawn at the foot of a logarithmic axis, one that does not exist (NaN) not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

from .files import write_atomically
from .plotting import plain, require_matplotlib

_WIDTH = (
    9.6  # inches, at 150 dots each: letters keep a good size where a page shows the picture 900 pixels wide
)
_ROW = 2.9  # inches
_MAX_LAYERS = 8  # in one figure; more curves cannot be told apart


def new(rows: Sequence[int], title: str):
    """A figure of horizontal bands; a band is as many rows of panels high as ``rows`` says."""
    require_matplotlib()
    # Figure itself: no pyplot, no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _ROW * sum(rows) + (0.4 if title else 0)), dpi=150, layout="constrained")
    if title:
        figure.suptitle(plain(title), fontweight="bold", parse_math=False)
    bands = figure.subfigures(len(rows), 1, height_ratios=list(rows), squeeze=False, hspace=0.04)
    return figure, [band for (band,) in bands]


def write(figure, path: str | os.PathLike) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    write_atomically(path, FigureCanvasAgg(figure).print_png)


def panels(band, rows: int, columns: int):
    """``rows`` x ``columns`` axes, as a list of rows, and empty axes right of them for a legend."""
    # The legend has a column of its own, a fifth of the width, so that it covers no data.
    grid = band.add_gridspec(rows, columns + 1, width_ratios=[*[1] * columns, 0.25 * columns])
    panels = [[band.add_subplot(grid[row, column]) for column in range(columns)] for row in range(rows)]
    for axes in (axes for row in panels for axes in row):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend = band.add_subplot(grid[:, columns])
    legend.axis("off")
    return panels, legend


def legend(axes, keys: list, title: str = "") -> None:
    axes.legend(
        handles=keys, title=title or None, loc="center left", bbox_to_anchor=(0, 0.5), frameon=False, borderpad=0,
        borderaxespad=0, handlelength=2.4,
    )  # fmt: skip


def shown(layers: Iterable[int]) -> list[int]:
    """The layers that a figure shows: all, or some at even distances, the first and the last among them."""
    layers = sorted(set(layers))
    return [layers[index] for index in evenly(len(layers), _MAX_LAYERS)]


def evenly(count: int, most: int) -> Sequence[int]:
    """Indices of ``count`` things, or of ``most`` of them at even distances, the first and the last among them."""
    if count <= most:
        return range(count)
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def ramp(values: Iterable, name: str) -> dict:
    """One colour a value from matplotlib's map ``name`` (both used are made for colour-blind readers)."""
    from matplotlib import colormaps

    values = list(values)
    # The map's last part is too pale for lines on white.
    return {v: colormaps[name](0.88 * index / max(1, len(values) - 1)) for index, v in enumerate(values)}


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def angle_axis(axes) -> None:
    """Degrees from 0 on; not narrower than 1, so that rounding does not look like an angle."""
    axes.set_ylabel("Angle (degrees)")
    from_zero(axes, max(1.0, axes.get_ylim()[1]))


def from_zero(axes, top: float) -> None:
    """A y axis from 0 to ``top``, with room for a line at 0 above the edge."""
    axes.set_ylim(-0.02 * top, top)


def log_axis_with_zero(axes, values: Iterable[float]) -> None:
    """A logarithmic y axis; values of zero stand at its foot, labelled 0."""
    there = [value for value in values if math.isfinite(value)]
    positive = [value for value in there if value > 0]
    if len(positive) == len(there) and positive:
        axes.set_yscale("log")
    elif positive:
        foot = 10.0 ** math.floor(math.log10(min(positive)))
        axes.set_yscale("symlog", linthresh=foot)
        axes.set_ylim(bottom=-0.3 * foot)
