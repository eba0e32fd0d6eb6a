"""The figure of a diagnosis (diagnostics.py): energies, convergence, updates against backpropagation."""

from __future__ import annotations

import os

from ..support import figures
from .diagnosis import Diagnosis

_RISING = "#D55E00"


def diagnosis_figure(result: Diagnosis, path: str | os.PathLike, *, title: str = "") -> None:
    """Energies by layer and convergence against the iteration; errors and angles of updates. A PNG at ``path``.

    Waits for the device.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    figure, bands = figures.new([1, 1], title)
    _iterations_band(bands[0], result)
    _updates_band(bands[1], result)
    figures.write(figure, path)


def _iterations_band(band, result: Diagnosis) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    ((energies, convergence),), legend = figures.panels(band, 1, 2)
    steps = range(1, len(result.energies) + 1)
    depth = result.energies.shape[1]
    layers = figures.shown(range(1, depth + 1))
    keys = []
    for layer, colour in figures.ramp(layers, "viridis").items():
        top = layer == depth
        look = {"color": colour, "linestyle": (0, (4, 1.5)) if top else "-", "linewidth": 1.5}
        energies.plot(steps, result.energies[:, layer - 1].tolist(), **look)
        keys.append(Line2D([], [], **look, label=f"layer {layer}" + (": the loss" if top else "")))
    energies.set(xlabel="Iteration", ylabel="Energy")
    figures.log_axis_with_zero(energies, result.energies[:, [l - 1 for l in layers]].flatten().tolist())
    values = result.convergence.tolist()
    convergence.plot(steps, values, color="black", linewidth=1.5)
    convergence.set(xlabel="Iteration", ylabel="Convergence")
    for axes in (energies, convergence):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lowest = min((value for value in values if value > -1), default=0)  # what diverges leaves the panel
    convergence.set_ylim(min(0, lowest) - 0.02, 1.02)
    rises = [] if result.rising is None else result.rising.nonzero().flatten().tolist()
    if rises:
        look = {"color": _RISING, "linestyle": "none", "marker": "x"}
        # at the upper edge, where no curve hides them
        convergence.plot(
            [t + 1 for t in rises], [1.0] * len(rises), **look, clip_on=False,
            transform=convergence.get_xaxis_transform(),
        )  # fmt: skip
        keys.append(Line2D([], [], **look, label="energy rises"))
    figures.legend(legend, keys, f"{len(layers)} of {depth} layers" if len(layers) < depth else "")


def _updates_band(band, result: Diagnosis) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    ((errors, angles),), legend = figures.panels(band, 1, 2)
    layers = range(1, len(result.angle_degrees) + 1)
    look = {"color": "black", "linestyle": "none", "marker": "o", "markersize": 4}
    whole = {"color": "grey", "linewidth": 1.3}
    for axes, values, of_all in (
        (errors, result.relative_error, result.whole_relative_error),
        (angles, result.angle_degrees, result.whole_angle_degrees),
    ):
        axes.plot(layers, values.tolist(), **look)
        axes.axhline(float(of_all), **whole)
        axes.set(xlabel="PC layer", xlim=(0.5, len(layers) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    errors.set_ylabel("Relative error")
    figures.log_axis_with_zero(errors, [*result.relative_error.tolist(), float(result.whole_relative_error)])
    figures.angle_axis(angles)
    keys = [Line2D([], [], **look, label="update of a layer"), Line2D([], [], **whole, label="whole update")]
    figures.legend(legend, keys, "against backpropagation")
