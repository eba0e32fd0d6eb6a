"""Recorded benchmark results, and the README's table made from the newest of them.

    make bench && .venv/bin/python bench/report.py --record    # keep the last run under bench/results/
    .venv/bin/python bench/report.py                           # write README's table from the newest record

Records are append-only: one JSON a run. The table's numbers come from nowhere else; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS, README, LATEST = (
    HERE / "results",
    HERE.parent / "README.md",
    HERE.parent / ".benchmarks" / "latest.json",
)
BEGIN, END = "<!-- bench/report.py: begin -->", "<!-- bench/report.py: end -->"


def record(latest: Path = LATEST) -> Path:
    """Keep what matters of pytest-benchmark's last run as bench/results/<device>/<date>-<commit>.json."""
    run = json.loads(latest.read_text())
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=HERE).strip()
    changed = subprocess.check_output(
        ["git", "status", "--porcelain", "pcfast", "bench"], text=True, cwd=HERE.parent
    )
    if [line for line in changed.splitlines() if not line.endswith("results/")]:
        raise SystemExit(
            "uncommitted changes in pcfast/ or bench/: commit first, so that the record names its code"
        )
    cpu = run["machine_info"]["cpu"]
    kept = {
        "recorded": run["datetime"],
        "commit": commit,
        "device": f"{cpu.get('brand_raw', platform.processor())}, {cpu['count']} cores",
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "rows": {entry["name"]: entry["extra_info"] for entry in run["benchmarks"]},
    }
    path = RESULTS / "cpu" / f"{kept['recorded'][:10]}-{commit}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def newest() -> dict:
    """The newest CPU record."""
    records = [json.loads(path.read_text()) for path in (RESULTS / "cpu").glob("*.json")]
    return max(records, key=lambda kept: kept["recorded"])


def table(result: dict) -> str:
    """Markdown of one record."""
    rows, lines = result["rows"], []
    lines.append("| training step | against | time | theirs | pcfast is |\n|---|---|---|---|---|")
    for method in ("strict", "fixed_prediction", "exact"):
        row = rows[f"test_training_step[{method}]"]
        ratio = row["speed_up"]
        verdict = f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        lines.append(
            f"| {method} | {row['baseline']} | {row['ours_ms']:.1f} ms | {row['baseline_ms']:.1f} ms | {verdict} |"
        )
    memory, host = rows["test_peak_memory"], rows["test_host_overhead"]
    versions = result["versions"]
    lines.append(
        f"\n784-600-600-10 relu, batch 300, n = 20, float32, cross-entropy; medians of interleaved runs on "
        f"{result['device']}, Python {versions['python']}, torch {versions['torch']}, {result['recorded'][:10]}, "
        f"commit {result['commit']}. Peak memory of the process: {memory['mib_n20']} MiB with 20 iterations, "
        f"{memory['mib_n200']} MiB with 200. A step of a tiny network takes {host['ours_us']:.0f} us where "
        f"`model(x)` and `backward()` alone take {host['bare_us']:.0f} us. The literal loop (bench/literal.py) "
        "differentiates layer by layer with torch autograd, as the published program does."
    )
    return "\n".join(lines)


def with_table(readme: str, result: dict) -> str:
    """``readme`` with the text between the markers replaced."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + table(result) + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="first keep the last `make bench`")
    if parser.parse_args().record:
        print(record())
    README.write_text(with_table(README.read_text(), newest()))


if __name__ == "__main__":
    main()
