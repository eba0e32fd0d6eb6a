"""Recorded benchmark results, and the tables and the pictures made from the newest of them.

    pcfast bench --json .benchmarks/latest.json
    python -m pcfast.bench.report --record .benchmarks/latest.json    # keep it under bench/results/
    python -m pcfast.bench.report            # tables in README and docs/, the pictures there

Records are append-only: bench/results/<device>/<date>-<commit>.json, with -kernels in the name where they are of
`pcfast bench --kernels`, -methods, -host and -distributed of `python -m pcfast.bench.methods`, `host_time` and
`distributed`. The tables' numbers come from nowhere else; tests compare them. A record whose sources differ from
today's is marked so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import click

from pcfast.support.files import write_atomically
from pcfast.support.plotting import require_matplotlib

from . import distributed, host_time, methods, scaling, sources, tables
from .runner import FORMAT

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
METHODS, HOST = HERE.parent / "docs" / "methods.md", HERE.parent / "docs" / "architecture.md"
SCALING = HERE.parent / "docs" / "scaling.md"
PICTURE, DEPTH_PICTURE = HERE.parent / "docs" / "speed.png", HERE.parent / "docs" / "depth.png"
BEGIN, END = "<!-- bench/report.py: begin -->", "<!-- bench/report.py: end -->"
#: Backends whose kernels are interpreted on a CPU, or compiled for it, for tests alone.
GPU_BACKENDS = {"cuda", "triton"}
ONE_THREAD = "cpu-one-thread"
NOT_MEASURED = "Not yet measured on a GPU."
NOT_RECORDED = "Not yet recorded."


def record(path: Path) -> Path:
    """Keep a run that ``pcfast bench`` or ``pcfast.bench.methods`` wrote with ``--json``.

    Raises:
        click.ClickException: a quick run, one that did not end, or one of changed sources, which its
            commit does not name.
    """
    result = json.loads(path.read_text())
    if result.get("format") != FORMAT or result["quick"]:
        raise click.ClickException(f"{path} is no full run of this version's benchmarks")
    if not result.get("complete", True):  # older records say nothing of it
        raise click.ClickException(f"{path} is of a run that did not end: it holds what was found until then")
    if result["commit"] is None or result["commit"].endswith("+"):
        raise click.ClickException("the run's sources were not committed: commit, then run again")
    if result.get("kernels") and result["device"] == "cpu":
        raise click.ClickException("the run's kernels ran on a CPU: their times say nothing")
    on_cpu = {
        row["contender"] for row in result["rows"] if row["status"] == "timed" and result["device"] == "cpu"
    }
    if on_cpu & GPU_BACKENDS:
        raise click.ClickException("the run's kernels ran on a CPU: leave their backends out")
    kind = "".join(
        f"-{kind}" for kind in ("kernels", "methods", "host", "distributed", "workers") if result.get(kind)
    )
    target = RESULTS / folder_of(result) / f"{result['recorded'][:10]}-{result['commit']}{kind}.json"
    if target.exists():
        raise click.ClickException(f"{target} is there already: records are never replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return target


def folder_of(result: dict) -> str:
    """cpu, cpu-one-thread for training steps in one thread, or the GPU's name in lower case: nvidia-h200."""
    if result["device"] == "cpu":
        return ONE_THREAD if result["rows"] and result["machine"]["threads"] == 1 else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", result["machine"]["processor"].lower()).strip("-")


def newest(of: str = "rows") -> list[dict]:
    """The newest record of every device, GPUs first; records of older formats are kept but not shown.

    Args:
        of: what a record has to have: "rows" of training steps, "kernels", "methods", "host" or "distributed".
    """
    by_device: dict[str, dict] = {}
    for path in RESULTS.glob("*/*.json"):
        result = json.loads(path.read_text())
        if result.get("format") == FORMAT and result.get(of):
            known = by_device.get(path.parent.name)
            if known is None or result["recorded"] > known["recorded"]:
                by_device[path.parent.name] = result
    return [by_device[name] for name in sorted(by_device, key=lambda name: (name.startswith("cpu"), name))]


def cases(result: dict) -> dict[tuple[str, str], list[dict]]:
    """(workload, precision) -> its rows, those where one of ours was timed."""
    everything = tables.by_case(result["rows"])
    return {case: rows for case, rows in everything.items() if tables.best_of_ours(rows) is not None}


def text(records: Iterable[dict], of_kernels: Iterable[dict] = ()) -> str:
    """Markdown of all records, of training steps and of kernels."""
    records = list(records)
    parts = [_table(result) for result in records]
    if all(result["device"] == "cpu" for result in records):
        parts.insert(0, NOT_MEASURED)
    shown = "As pictures: [speed, roofline, errors](docs/speed.png)"
    if any(depth_lines(result) for result in records):
        shown += ", [time of an iteration against depth](docs/depth.png)"
    return "\n\n".join([*parts, f"{shown}.", *map(_kernel_table, of_kernels)])


def _table(result: dict) -> str:
    lines = [
        "| training step | pcfast | literal loop | best other | against literal | against best other | of floor "
        "| error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, precision), rows in cases(result).items():
        ours, other = tables.best_of_ours(rows), tables.best_other(rows)
        literal = tables.seconds_of("literal", rows)
        cells = [
            f"{name}, {ours['method']}, {precision}",
            f"{tables.time(ours['seconds'])} ({ours['contender']})",
            "" if literal is None else tables.time(literal),
            "" if other is None else f"{tables.time(other['seconds'])} ({other['contender']})",
            "" if literal is None else f"{literal / ours['seconds']:.2f}x",
            "" if other is None else f"{other['seconds'] / ours['seconds']:.2f}x",
            f"{ours['floor_seconds'] / ours['seconds']:.0%}",
            f"{ours['error']:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\n{_where_and_when(result)}")
    return "\n".join(lines)


def _where_and_when(result: dict, current: bool = True) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, Python "
        f"{machine['python']}, torch {machine['torch']}, {_when(result, current)}"
    )


def _when(result: dict, current: bool = True) -> str:
    """``current``: what the digest of sources does not see is still so."""
    stale = "" if current and result["sources"] == sources.digest() else " **Older than the code.**"
    return f"{result['recorded'][:10]}, commit {result['commit']}.{stale}"


def _kernel_table(result: dict) -> str:
    """Per kernel and precision its most important size: the fastest way, and what else does the same."""
    machine = result["machine"]
    lines = [
        "| kernel, alone | fastest | time | of floor | next | against next | error |",
        "|---|---|---|---|---|---|---|",
    ]
    shown: set[tuple[str, str]] = set()
    for (kernel, size, precision), (best, *others) in tables.fastest_ways(result["kernels"]).items():
        if (kernel, precision) in shown:
            continue
        shown.add((kernel, precision))
        cells = [
            f"{kernel}, {size}, {precision}",
            best["way"],
            tables.time(best["seconds"]),
            f"{best['floor_seconds'] / best['seconds']:.0%}",
            others[0]["way"] if others else "",
            f"{others[0]['seconds'] / best['seconds']:.2f}x" if others else "",
            f"{best['error']:.0e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"\n{machine['processor']}, torch {machine['torch']}, {_when(result)}")
    return "\n".join(lines)


def methods_text(records: Iterable[dict]) -> str:
    """Markdown of all records of methods: a table a data set."""
    parts = []
    for result in records:
        for rows in tables.by_data(result["methods"]).values():
            headings = tables.method_headings()
            lines = [
                f"| {' | '.join(heading.removeprefix('>') for heading in headings)} |",
                "|" + "---|" * len(headings),
                *(f"| {' | '.join(tables.method_cells(row, rows))} |" for row in rows),
            ]
            parts += [f"**{tables.data_heading(rows)}**", "\n".join(lines), *tables.method_notes(rows)]
        parts.append(_where_and_when(result, methods.is_current(result)))
    return "\n\n".join(parts) or NOT_RECORDED


def host_text(records: Iterable[dict]) -> str:
    """Markdown of all records of host times: a table a device."""
    parts = []
    for result in records:
        before = f" Before: commit {result['before']['commit']}." if "before" in result else ""
        parts += [_markdown(host_time.cells(result)), _where_and_when(result) + before]
    return "\n\n".join(parts) or NOT_RECORDED


def scaling_text(records: Iterable[dict]) -> str:
    """Markdown of all records of several processes, and of what many devices cost on paper."""
    parts = []
    for result in records:
        made = (distributed.difference_cells(result), distributed.collective_cells(result))
        parts += [*map(_markdown, made), _where_and_when(result)]
    return "\n\n".join([*(parts or [NOT_RECORDED]), "## On paper", scaling.text()])


def _markdown(cells: list[list[str]]) -> str:
    """A table; its first row is the heading."""
    heading, *rows = cells
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *rows))


def with_tables(readme: str, records: Iterable[dict], of_kernels: Iterable[dict] = ()) -> str:
    """README with the text between the markers replaced."""
    return _between_markers(readme, text(records, of_kernels))


def with_methods(page: str, records: Iterable[dict]) -> str:
    """docs/methods.md with the text between the markers replaced."""
    return _between_markers(page, methods_text(records))


def with_host_times(page: str, records: Iterable[dict]) -> str:
    """docs/architecture.md with the text between the markers replaced."""
    return _between_markers(page, host_text(records))


def with_scaling(page: str, records: Iterable[dict]) -> str:
    """docs/scaling.md with the text between the markers replaced."""
    return _between_markers(page, scaling_text(records))


def _between_markers(page: str, made: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def depth_lines(result: dict) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Precision -> contender -> (hidden layers, seconds an iteration) of the deep_mlp workloads, by depth.

    Whole training steps, divided by their iterations. Only precisions with two depths and more.
    """
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for (name, precision), rows in cases(result).items():
        depth = re.fullmatch(r"deep_mlp_(\d+)", name)
        for contender in _COLOURS if depth else ():
            seconds = _seconds(contender, rows)
            if seconds is not None:
                points = lines.setdefault(precision, {}).setdefault(contender, [])
                points.append((int(depth[1]), seconds / rows[0]["num_steps"]))
    return {
        precision: {contender: sorted(points) for contender, points in contenders.items()}
        for precision, contenders in lines.items()
        if len(contenders["pcfast"]) >= 2
    }


def picture(records: list[dict], path: Path = PICTURE) -> None:
    """Per record: times against the literal loop, errors of belief and deviation form, and a roofline. A PNG.

    Sized for a page 900 pixels wide; the background is white on a dark page, too.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(len(cases(result)) for result in records)
    heights = (1.6 + 0.5 * rows, 1.4 + 0.27 * rows)
    figure = Figure(figsize=(9.6, sum(heights) * len(records)), dpi=160, layout="constrained")
    for part, result in zip(figure.subfigures(len(records), 1, squeeze=False)[:, 0], records, strict=True):
        part.suptitle(_processor(result), fontsize="large")
        upper, lower = part.subfigures(2, 1, height_ratios=heights)
        bars, errors = upper.subplots(1, 2, width_ratios=(3, 2))
        _bars(bars, result)
        _errors(errors, result)
        _roofline(lower.subplots(), result)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def _processor(result: dict) -> str:
    machine = result["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads"
        if result["device"] == "cpu"
        else machine["processor"]
    )


def _labels(chosen: Iterable[tuple[str, str]], result: dict) -> list[str]:
    """Workloads as a figure names them; with the precision where the record has several."""
    several = len({row["precision"] for row in result["rows"]}) > 1
    return [f"{name} ({precision})" if several else name for name, precision in chosen]


def depth_picture(records: list[dict], path: Path = DEPTH_PICTURE) -> None:
    """Time of an iteration against depth, a panel a precision, as a PNG; none where no record has two depths."""
    panels = [(result, *panel) for result in records for panel in depth_lines(result).items()]
    if not panels:
        return
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4), dpi=130, layout="constrained")
    for axes, (result, precision, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _depth(axes, lines)
        axes.set_title(f"{result['machine']['processor']}, {precision}", fontsize="medium")
    write_atomically(path, FigureCanvasAgg(figure).print_png)


_COLOURS = {
    "pcfast": "#0072B2",
    "literal": "#000000",
    "autograd": "#CC79A7",
    "plain": "#999999",
    "plain_graph": "#666666",
    "plain_compiled": "#E69F00",
    "jax": "#009E73",
}  # Okabe and Ito


def _seconds(name: str, rows: list[dict]) -> float | None:
    """The median of a contender, of the fastest of ours for "pcfast"; None where it was not timed."""
    return tables.best_of_ours(rows)["seconds"] if name == "pcfast" else tables.seconds_of(name, rows)


def _bars(axes, result: dict) -> None:
    """Bars: how many times as fast as the literal loop, ours and the others'."""
    chosen = {
        case: rows for case, rows in cases(result).items() if tables.seconds_of("literal", rows) is not None
    }
    ratios = {
        name: {
            place: tables.seconds_of("literal", rows) / seconds
            for place, rows in enumerate(chosen.values())
            if (seconds := _seconds(name, rows)) is not None
        }
        for name in _COLOURS
        if name != "literal"
    }
    timed = [name for name, found_there in ratios.items() if found_there]
    height = 0.84 / max(1, len(timed))
    for index, name in enumerate(timed):
        offset = (index - (len(timed) - 1) / 2) * height
        places = [place + offset for place in ratios[name]]
        axes.barh(places, list(ratios[name].values()), height, color=_COLOURS[name], label=name)
    axes.set_yticks(range(len(chosen)), _labels(chosen, result))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title("Times as fast as the literal loop", fontsize="medium")
    axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)


def _roofline(axes, result: dict) -> None:
    """Multiply-adds a second against multiply-adds a byte: ours, under the measured ceilings.

    Points lie close together: their names stand in a column beside the panel, in the points' order from the top.
    """
    for precision, limits in result["ceilings"].items():
        intensity = [10.0**k for k in range(-1, 6)]
        roof = [min(limits["multiply_adds_per_s"], i * limits["copy_bytes_per_s"]) for i in intensity]
        axes.plot(intensity, roof, color="grey", linewidth=1)
        axes.annotate(
            f"ceiling, {precision}", (intensity[-1], roof[-1]), fontsize="small", ha="right", va="bottom"
        )
    chosen = cases(result)
    points = []
    for label, rows in zip(_labels(chosen, result), chosen.values(), strict=True):
        ours = tables.best_of_ours(rows)
        points.append((ours["multiply_adds"] / ours["seconds"], ours["multiply_adds"] / ours["bytes"], label))
    points.sort(reverse=True)
    line = {"arrowstyle": "-", "color": "silver", "linewidth": 0.8, "relpos": (0, 0.5)}
    for index, (rate, intensity, label) in enumerate(points):
        axes.plot(intensity, rate, "o", color=_COLOURS["pcfast"], markersize=5)
        axes.annotate(
            label, (intensity, rate), xytext=(1.04, 1 - (index + 0.5) / len(points)), textcoords="axes fraction",
            fontsize="small", va="center", arrowprops=line,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds a byte", ylabel="multiply-adds a second")
    axes.set_title("Roofline: products that the algorithm leaves", fontsize="medium")


def _errors(axes, result: dict) -> None:
    """Largest error of an update against float64: ours in deviation form, the plain loop in belief form."""
    chosen = {case: rows for case, rows in cases(result).items() if rows[0]["method"] == "strict"}
    for place, rows in enumerate(chosen.values()):
        plain = next((r for r in rows if r["contender"] == "plain" and r.get("error") is not None), None)
        axes.plot(tables.best_of_ours(rows)["error"], place, "o", color=_COLOURS["pcfast"])
        if plain is not None:
            axes.plot(plain["error"], place, "s", color=_COLOURS["plain_compiled"])
    axes.plot([], [], "o", color=_COLOURS["pcfast"], label="pcfast: deviations")
    axes.plot([], [], "s", color=_COLOURS["plain_compiled"], label="plain loop: beliefs")
    axes.set_yticks(range(len(chosen)), _labels(chosen, result))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(axis="y", alpha=0.3)
    axes.set_title("Largest error of an update (strict)", fontsize="medium")
    axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07))


def _depth(axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Lines: seconds an iteration against hidden layers, by contender; a point where there is one depth."""
    from matplotlib.ticker import LogLocator

    markers = dict(zip(_COLOURS, "osXD^vP", strict=True))
    for name, points in lines.items():
        look = {"marker": markers[name], "fillstyle": "none", "color": _COLOURS[name]}
        axes.plot(*zip(*points, strict=True), label=name, **look)
    depths = sorted({depth for points in lines.values() for depth, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="hidden layers of 128 tanh units")
    axes.set_ylabel("time of a training step / iterations")
    axes.set_xticks(depths, map(str, depths))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda seconds, _: tables.time(seconds))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", frameon=False)


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--record", "path", type=click.Path(exists=True, path_type=Path), help="First keep this run's record."
)
def main(path: Path | None) -> None:
    if path is not None:
        click.echo(record(path))
    records = newest()
    readme = with_tables(README.read_text(), records, newest("kernels"))
    write_atomically(README, lambda file: file.write(readme.encode()))
    page = with_methods(METHODS.read_text(), newest("methods"))
    write_atomically(METHODS, lambda file: file.write(page.encode()))
    host_page = with_host_times(HOST.read_text(), newest("host"))
    write_atomically(HOST, lambda file: file.write(host_page.encode()))
    scaling_page = with_scaling(SCALING.read_text(), newest("distributed"))
    write_atomically(SCALING, lambda file: file.write(scaling_page.encode()))
    pictured = [result for result in records if folder_of(result) != ONE_THREAD]
    picture(pictured)
    depth_picture(pictured)


if __name__ == "__main__":
    main()
