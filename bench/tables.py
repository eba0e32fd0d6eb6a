"""Rows of a record in words: the columns that the command line and the README share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import pairwise
from statistics import median


def headings() -> tuple[str, ...]:
    """Column names; ">" means numbers, aligned right."""
    return ("contender", ">time", ">p20 - p80", ">against literal", ">against best other", ">of floor", ">error",
            ">memory", ">host", "")  # fmt: skip


def cells(row: dict, rows: list[dict]) -> list[str]:
    """One contender among the ``rows`` of its workload and precision."""
    if row["status"] != "timed":
        return [row["contender"], *[""] * 8, row["reason"]]
    literal, other = seconds_of("literal", rows), best_other(rows)
    return [
        row["contender"] + (" (pcfast)" if row["ours"] else ""),
        time(row["seconds"]),
        f"{time(row['p20'])} - {time(row['p80'])}",
        "" if literal is None else f"{literal / row['seconds']:.2f}x",
        "" if other is None or not row["ours"] else f"{other['seconds'] / row['seconds']:.2f}x",
        f"{row['floor_seconds'] / row['seconds']:.0%}",
        f"{row['error']:.1e}",
        "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.1f} MiB",
        "" if row.get("host_seconds") is None else time(row["host_seconds"]),
        "the gradient, not predictive coding" if row["exact"] and row["method"] != "exact" else "",
    ]


def kernel_headings() -> tuple[str, ...]:
    """As :func:`headings`, of the kernels' rows."""
    return ("size", "precision", "way", ">time", ">p20 - p80", ">TFLOP/s", ">GB/s", ">of floor", ">error", "tiles",
            "")  # fmt: skip


def kernel_cells(row: dict) -> list[str]:
    """One way of one kernel's case."""
    first = [row["size"], row["precision"], row["way"]]
    if row["status"] != "timed":
        return [*first, *[""] * 6, row["tiles"], row["reason"]]
    return [
        *first,
        time(row["seconds"]),
        f"{time(row['p20'])} - {time(row['p80'])}",
        f"{row['tflops']:.3g}" if row["multiply_adds"] else "",
        f"{row['gbs']:.3g}",
        f"{row['floor_seconds'] / row['seconds']:.0%} ({row['binding']})",
        f"{row['error']:.1e}",
        row["tiles"],
        "",
    ]


def by_kernel(rows: list[dict]) -> dict[str, list[dict]]:
    """Kernel -> its rows, in order."""
    return _grouped(rows, lambda row: row["kernel"])


def fastest_ways(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """(kernel, size, precision) -> its timed ways, fastest first; cases without one are left out."""
    result: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["status"] == "timed":
            result.setdefault((row["kernel"], row["size"], row["precision"]), []).append(row)
    return {case: sorted(ways, key=lambda way: way["seconds"]) for case, ways in result.items()}


def growth(rows: list[dict]) -> list[tuple[str, list[float]]]:
    """Of the resident kernel: (network and precision, seconds of one more iteration from each length to the next)."""
    launches: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["kernel"] == "resident" and row["status"] == "timed":
            name, _, number = row["size"].rpartition(", n = ")
            launch = int(number), int(number) * row["seconds"]
            launches.setdefault(f"{name}, {row['precision']}", []).append(launch)
    return [
        (
            name,
            [
                (later - sooner) / (more - fewer)
                for (fewer, sooner), (more, later) in pairwise(sorted(result))
            ],
        )
        for name, result in launches.items()
        if len(result) > 1
    ]


def growth_lines(rows: list[dict]) -> list[str]:
    """:func:`growth` in words."""
    lines = []
    for name, seconds in growth(rows):
        least, most = min(seconds), max(seconds)
        spread = f"{most / least - 1:.1%} apart" if least > 0 else "lost in noise"
        lines.append(f"resident, {name}: one more iteration takes {', '.join(map(time, seconds))}, {spread}")
    return lines


def method_headings() -> tuple[str, ...]:
    """As :func:`headings`, of the methods' rows."""
    return (
        "method",
        ">step size",
        ">learning rate",
        ">test accuracy",
        ">training step",
        ">of backpropagation's time",
    )


def method_cells(row: dict, rows: list[dict]) -> list[str]:
    """One method among the ``rows`` of its data set; the learning rate where it is not backpropagation's."""
    settings, gradient = row["settings"], backpropagation(rows)
    lr = settings["lr"]
    step = other = ""
    if row["seconds"] is not None:
        step = f"{time(row['seconds'])} ({time(row['p20'])} - {time(row['p80'])})"
        if gradient["seconds"] is not None:
            other = f"{row['seconds'] / gradient['seconds']:.2f}x"
    return [
        settings["name"],
        _step_size(settings["step_size"]),
        "" if lr == gradient["settings"]["lr"] else f"{lr:g}",
        _accuracy(row["runs"]),
        step,
        other,
    ]


def _step_size(value: float | list[float] | None) -> str:
    if isinstance(value, list):
        return f"{value[0]:g} to {value[-1]:.2g}"
    return "" if value is None else f"{value:g}"


def _accuracy(runs: list[dict]) -> str:
    """Median, lowest and highest of the runs that came to their end, and how many did not."""
    result = [run["test_accuracy"] for run in runs if "test_accuracy" in run]
    diverged = len(runs) - len(result)
    if not result:
        return "diverged"
    low, middle, high = (f"{100 * value:.2f}" for value in (min(result), median(result), max(result)))
    return f"{middle} % ({low} - {high})" + (f", {diverged} of {len(runs)} diverged" if diverged else "")


def method_notes(rows: list[dict]) -> list[str]:
    """Where the runs of one data set that diverged did so."""
    return [
        f"{row['settings']['name']} diverged with seed {run['seed']} in {_place(run['diverged'])}."
        for row in rows
        for run in row["runs"]
        if "diverged" in run
    ]


def _place(diverged: dict) -> str:
    layer, iteration = diverged["layer"], diverged["iteration"]
    if iteration is None:
        return f"the errors or updates of layer {layer}"
    return f"iteration {iteration}, layer {layer}" if iteration else f"the forward pass, layer {layer}"


def backpropagation(rows: list[dict]) -> dict:
    """The row of method "exact"."""
    return next(row for row in rows if row["settings"]["method"] == "exact")


def data_heading(rows: list[dict]) -> str:
    """What the rows of one data set share."""
    settings = backpropagation(rows)["settings"]
    iterations = next(n for row in rows if (n := row["settings"]["num_steps"]) is not None)
    decay = f", weight decay {settings['weight_decay']:g}" if settings["weight_decay"] else ""
    seeds = len(rows[0]["runs"])
    return (
        f"{settings['data']}: {settings['network']}, loss {settings['loss']}, n = {iterations}, "
        f"{settings['optimizer']} with learning rate {settings['lr']:g}{decay}, batches of {settings['batch_size']}, "
        f"epochs: {settings['epochs']}, seeds: {seeds}"
    )


def by_data(rows: list[dict]) -> dict[str, list[dict]]:
    """Data set -> its methods' rows, in order."""
    return _grouped(rows, lambda row: row["settings"]["data"])


def by_case(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(workload, precision) -> its rows, in order."""
    return _grouped(rows, lambda row: (row["workload"], row["precision"]))


def _grouped(rows: list[dict], key: Callable[[dict], Hashable]) -> dict:
    """Key -> its rows, both in order."""
    result: dict = {}
    for row in rows:
        result.setdefault(key(row), []).append(row)
    return result


def seconds_of(contender: str, rows: list[dict]) -> float | None:
    """The median of ``contender``; None where it was not timed."""
    return next((r["seconds"] for r in rows if r["contender"] == contender and r["status"] == "timed"), None)


def best_other(rows: list[dict]) -> dict | None:
    """The fastest contender that is not ours and computes the same; None where none was timed.

    None too where the gate kept a rival out: the best may be among those.
    """
    exact = rows[0]["method"] == "exact"
    if any(not r["ours"] and r["reason"].startswith("gate closed") for r in rows):
        return None
    others = [r for r in rows if r["status"] == "timed" and not r["ours"] and (exact or not r["exact"])]
    return min(others, key=lambda r: r["seconds"], default=None)


def best_of_ours(rows: list[dict]) -> dict | None:
    """The fastest of pcfast's backends; None where none was timed."""
    return min(
        (r for r in rows if r["ours"] and r["status"] == "timed"), key=lambda r: r["seconds"], default=None
    )


def time(seconds: float) -> str:
    """Three digits in a unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
