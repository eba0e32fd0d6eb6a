"""Figures of a comparison with backpropagation (comparison.py), after figures 1 to 7 of Rosenbaum (2022).

One look for all of them: methods differ in colour where they are compared and in line style where colour is the layer
or the step size; legends stand beside the panels. A value of zero is drawn at the foot of a logarithmic axis, one
that does not exist (NaN) not at all, a relaxation that diverged as a cross at the upper edge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from ..errors import ArgumentError
from ..support import figures
from .compare import BACKPROPAGATION, WHOLE, Iterations, LayerError, TrainingComparison, Update

# Okabe and Ito's palette, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color/).
_COLOURS = {
    BACKPROPAGATION: "#000000", "strict": "#D55E00", "fixed_prediction": "#0072B2", "exact": "#009E73",
    "error_based": "#CC79A7", "zero_divergence": "#E69F00",
}  # fmt: skip
_STYLES = {  # where colour is something else
    "strict": "-", "fixed_prediction": (0, (4, 1.5)), "exact": ":", "error_based": (0, (4, 1.5, 1, 1.5)),
    "zero_divergence": (0, (1, 3)),
}  # fmt: skip
_NAMES = {
    "fixed_prediction": "fixed prediction", "error_based": "error-based", "zero_divergence": "zero divergence",
}  # fmt: skip
_POINTS = 75  # of a smoothed curve, about


def training_figure(comparison: TrainingComparison, path: str | os.PathLike, *, title: str = "") -> None:
    """Learning curves; relative error and angle of every layer's update, one column a method. A PNG at ``path``."""
    methods = [method for method in comparison.methods if method != BACKPROPAGATION]
    figure, bands = figures.new([1, 2], title)
    _learning_band(bands[0], comparison)
    (errors, angles), legend = figures.panels(bands[1], 2, len(methods))
    for index, method in enumerate(methods):
        _updates(errors[index], angles[index], comparison, [method])
        errors[index].set_title(_name(method))
        errors[index].set_xlabel("")
        if index:
            errors[index].set_ylabel("")
            angles[index].set_ylabel("")
    _share_limits(errors)
    _share_limits(angles)
    _layer_legend(legend, comparison.updates, [])
    figures.write(figure, path)


def iterations_figure(rows: Sequence[Iterations], path: str | os.PathLike, *, title: str = "") -> None:
    """Relative error and angle against the number of iterations: one row a layer, and one for the whole update."""
    layers = [*figures.shown(row.layer for row in rows if row.layer != WHOLE), WHOLE]
    figure, bands = figures.new([len(layers)], title)
    panels, legend = figures.panels(bands[0], len(layers), 2)
    for layer, (errors, angles) in zip(layers, panels, strict=True):
        _against_iterations(errors, angles, [row for row in rows if row.layer == layer])
        errors.set_title("whole update" if layer == WHOLE else f"layer {layer}", loc="left")
        if layer != layers[-1]:
            errors.set_xlabel("")
            angles.set_xlabel("")
    _step_size_legend(legend, rows)
    figures.write(figure, path)


def errors_figure(rows: Sequence[LayerError], path: str | os.PathLike, *, title: str = "") -> None:
    """Norms of the errors, and their relative error, against the layer."""
    figure, bands = figures.new([1], title)
    _errors_band(bands[0], rows)
    figures.write(figure, path)


def overview(
    path: str | os.PathLike,
    *,
    training: TrainingComparison | None = None,
    iterations: Sequence[Iterations] | None = None,
    errors: Sequence[LayerError] | None = None,
    title: str = "",
    errors_of: str = "",
) -> None:
    """What is given, one band each: learning curves and updates; the whole update against iterations; errors.

    Args:
        errors_of: the network and the relaxation of ``errors``, in words.

    Raises:
        ArgumentError: nothing is given.
        ImportError: matplotlib is missing; the message says how to install it. All figures here raise it.
    """
    drawn: list[tuple[str, Callable]] = []
    if training is not None:
        drawn.append(("Learning curves", lambda band: _learning_band(band, training)))
        name = (
            f"Updates against the true gradient: step size {training.step_size:g}, n = {training.num_steps}"
        )
        drawn.append((name, lambda band: _updates_band(band, training)))
    if iterations:
        whole = [row for row in iterations if row.layer == WHOLE]
        name = "Whole update against the true gradient, by number of iterations: initial weights"
        drawn.append((name, lambda band: _whole_band(band, whole)))
    if errors:
        name = f"Errors by layer: {errors_of}" if errors_of else "Errors by layer"
        drawn.append((name, lambda band: _errors_band(band, errors)))
    if not drawn:
        raise ArgumentError("training, iterations, errors", "none of them", "at least one")
    figure, bands = figures.new([1] * len(drawn), title)
    for band, (name, draw) in zip(bands, drawn, strict=True):
        band.suptitle(name, x=0.01, ha="left", fontsize="large")
        draw(band)
    figures.write(figure, path)


def _learning_band(band, comparison: TrainingComparison) -> None:
    """Training and test loss and accuracy of every curve against the step."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    (panels,), legend = figures.panels(band, 1, 2)
    width = _smoothing(comparison)
    keys = []
    for method in comparison.methods:
        curve = comparison.curve(method)
        reference = method == BACKPROPAGATION
        # Methods may lie exactly on backpropagation: it is drawn wide and pale beneath them.
        look = {
            "color": _COLOURS[method],
            "linewidth": 3.5 if reference else 1.3,
            "alpha": 0.3 if reference else 1,
        }
        for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
            points = [
                (row.step, value)
                for row in curve
                if not math.isnan(value := getattr(row, f"train_{quantity}"))
            ]
            axes.plot(*_smoothed(points, width), **look)
            test = [(row.step, v) for row in curve if not math.isnan(v := getattr(row, f"test_{quantity}"))]
            axes.plot(
                *figures.columns(test), linestyle="none", marker="o", markersize=6 if reference else 3,
                markeredgewidth=0, color=look["color"], alpha=look["alpha"],
            )  # fmt: skip
            if curve[-1].note:
                axes.axvline(curve[-1].step, color=look["color"], linestyle=":")
        ended = " (diverged)" if curve[-1].note else ""
        keys.append(Line2D([], [], **look, label=_name(method) + ended))
    for axes, quantity in zip(panels, ("Loss", "Accuracy"), strict=True):
        axes.set(xlabel="Step", ylabel=quantity)
    _loss_axis(panels[0])
    panels[1].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    training = "training batches" + (f",\nmean of {width} steps" if width > 1 else "")
    keys.append(Line2D([], [], color="grey", linewidth=1.3, label=training))
    keys.append(Line2D([], [], color="grey", linestyle="none", marker="o", markersize=3, label="test part"))
    figures.legend(legend, keys)


def _updates_band(band, comparison: TrainingComparison) -> None:
    (panels,), legend = figures.panels(band, 1, 2)
    methods = [method for method in comparison.methods if method != BACKPROPAGATION]
    _updates(*panels, comparison, methods)
    _layer_legend(legend, comparison.updates, methods)


def _updates(errors, angles, comparison: TrainingComparison, methods: Sequence[str]) -> None:
    """Relative error and angle of updates against the step: colour is the layer, line style the method."""
    layers = figures.shown(row.layer for row in comparison.updates)
    width = _smoothing(comparison)
    for axes, quantity in ((errors, "relative_error"), (angles, "angle_degrees")):
        for method in methods:
            for layer, colour in figures.ramp(layers, "viridis").items():
                rows = [row for row in comparison.updates if (row.method, row.layer) == (method, layer)]
                points = [
                    (row.step, value) for row in rows if not math.isnan(value := getattr(row, quantity))
                ]
                style = _STYLES[method] if len(methods) > 1 else "-"
                axes.plot(*_smoothed(points, width), color=colour, linestyle=style, linewidth=1.5)
        axes.set_xlabel("Step")
    errors.set_ylabel("Relative error")
    values = [row.relative_error for row in comparison.updates if row.layer in layers]
    if max((value for value in values if not math.isnan(value)), default=0) > 10:
        figures.log_axis_with_zero(errors, values)
    else:
        figures.from_zero(errors, errors.get_ylim()[1])
    figures.angle_axis(angles)


def _whole_band(band, rows: Sequence[Iterations]) -> None:
    (panels,), legend = figures.panels(band, 1, 2)
    _against_iterations(*panels, rows)
    _step_size_legend(legend, rows)


def _against_iterations(errors, angles, rows: Sequence[Iterations]) -> None:
    """Relative error and angle against the number of iterations: colour is the step size, line style the method."""
    colours = figures.ramp(dict.fromkeys(row.step_size for row in rows), "plasma")
    for axes, quantity in ((errors, "relative_error"), (angles, "angle_degrees")):
        for method, step_size in dict.fromkeys((row.method, row.step_size) for row in rows):
            result = [row for row in rows if (row.method, row.step_size) == (method, step_size)]
            colour = colours[step_size]
            values = [(row.num_steps, getattr(row, quantity)) for row in result]  # NaN interrupts the line
            axes.plot(
                *figures.columns(values),
                color=colour,
                linestyle=_STYLES[method],
                linewidth=1.5,
                marker="o",
                markersize=2.5,
            )
            diverged = [row.num_steps for row in result if row.note]
            if diverged:
                top = [1.0] * len(diverged)
                axes.plot(
                    diverged, top, "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False
                )
        axes.set(
            xlabel="Number of iterations n", xscale="log", xlim=_x_limits([row.num_steps for row in rows])
        )
        axes.xaxis.set_major_formatter("{x:g}")
    errors.set_ylabel("Relative error")
    figures.log_axis_with_zero(errors, [row.relative_error for row in rows])
    figures.angle_axis(angles)


def _errors_band(band, rows: Sequence[LayerError]) -> None:
    """Norms of the errors and their relative error against the layer, one colour a method."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    (panels,), legend = figures.panels(band, 1, 2)
    norms, relative = panels
    methods = list(dict.fromkeys(row.method for row in rows))
    exact = {row.layer: row.exact_norm for row in rows}
    pale = {"color": _COLOURS[BACKPROPAGATION], "linewidth": 3.5, "alpha": 0.3}
    norms.plot(exact.keys(), exact.values(), **pale)
    keys = [Line2D([], [], **pale, label=_name(BACKPROPAGATION))]
    for method in methods:
        result = [row for row in rows if row.method == method]
        look = {"color": _COLOURS[method], "marker": "o", "markersize": 3, "linewidth": 1.3}
        norms.plot([row.layer for row in result], [row.error_norm for row in result], **look)
        relative.plot([row.layer for row in result], [row.relative_error for row in result], **look)
        ended = " (diverged)" if result[0].note else ""
        keys.append(Line2D([], [], **look, label=_name(method) + ended))
    norms.set(xlabel="PC layer", ylabel="Norm of the errors")
    relative.set(xlabel="PC layer", ylabel="Relative error")
    figures.log_axis_with_zero(norms, [*exact.values(), *(row.error_norm for row in rows)])
    figures.log_axis_with_zero(relative, [row.relative_error for row in rows])
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figures.legend(legend, keys)


def _layer_legend(axes, rows: Sequence[Update], methods: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    layers = figures.shown(row.layer for row in rows)
    count = len({row.layer for row in rows})
    keys = [
        Line2D([], [], color=colour, label=f"layer {layer}")
        for layer, colour in figures.ramp(layers, "viridis").items()
    ]
    figures.legend(
        axes, keys + _style_keys(methods), f"{len(layers)} of {count} layers" if len(layers) < count else ""
    )


def _step_size_legend(axes, rows: Sequence[Iterations]) -> None:
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], color=colour, label=f"step size {step_size:g}")
        for step_size, colour in figures.ramp(dict.fromkeys(row.step_size for row in rows), "plasma").items()
    ]
    keys += _style_keys(list(dict.fromkeys(row.method for row in rows)))
    if any(row.note for row in rows):
        keys.append(Line2D([], [], color="grey", linestyle="none", marker="x", label="diverged"))
    figures.legend(axes, keys)


def _style_keys(methods: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color="grey", linestyle=_STYLES[method], label=_name(method)) for method in methods
    ]


def _name(method: str) -> str:
    return _NAMES.get(method, method)


def _smoothing(comparison: TrainingComparison) -> int:
    """Steps in one point of a curve."""
    steps = max((row.step for row in comparison.steps), default=0)
    return max(1, steps // _POINTS)


def _smoothed(points: Sequence[tuple[float, float]], width: int) -> tuple[list[float], list[float]]:
    """Means over ``width`` neighbouring points each, of both coordinates."""
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return [fmean(x for x, _ in part) for part in parts], [fmean(y for _, y in part) for part in parts]


def _share_limits(panels: Sequence) -> None:
    bottoms, tops = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(bottoms), max(tops))


def _x_limits(counts: Iterable[int]) -> tuple[float, float]:
    """Limits of a logarithmic axis with a little room beside the least and the greatest of ``counts``."""
    positive = [count for count in counts if count > 0] or [1]
    return 0.85 * min(positive), max(positive) / 0.85


def _loss_axis(axes) -> None:
    """A logarithmic y axis, labelled 1, 2, 5, 10, ..., where what is drawn changes more than twofold."""
    from matplotlib.ticker import NullFormatter

    low, high = axes.dataLim.intervaly
    if not 0 < 2 * low < high:
        return
    axes.set_yscale("log")
    few = high / low < 1e3
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(
        (lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "") if few else NullFormatter()
    )
