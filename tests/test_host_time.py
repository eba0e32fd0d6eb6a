"""The benchmark of the host's time, and its table."""

import json

import torch
from click.testing import CliRunner

from pcfast.bench import host_time, measure, report


def record(tmp_path, monkeypatch, *arguments):
    monkeypatch.setattr(host_time, "CALLS", ("mlp_600",))
    monkeypatch.setattr(host_time, "STEPS", ("tiny_exact",))
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 1e-4)
    threads = torch.get_num_threads()
    try:
        path = tmp_path / f"{len(arguments)}.json"
        result = CliRunner().invoke(host_time.host_time, [*arguments, "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return path, result.output


def test_a_run_tells_calls_and_steps(tmp_path, monkeypatch):
    path, shown = record(tmp_path, monkeypatch)
    found = json.loads(path.read_text())
    calls, steps = found["host"]
    assert calls["layers"] == 3 and steps["layers"] == 4
    assert 0 < calls["seconds"]["prepare"] < calls["seconds"]["prepare and key"] < 0.1
    assert set(steps["seconds"]) == {"pcfast", "backpropagation"}
    assert "tiny_exact" in shown
    again, _ = record(tmp_path, monkeypatch, "--before", str(path))
    heading, first, *_ = host_time.cells(json.loads(again.read_text()))
    assert first[heading.index("before")] == f"{1e6 * calls['seconds']['prepare']:,.0f} us"


def test_the_page_has_the_newest_records_table():
    page = report.HOST.read_text()
    assert report.with_host_times(page, report.newest("host")) == page
    row = {"workload": "w", "layers": 2, "seconds": {"pcfast": 3e-6, "backpropagation": 2e-6}}
    machine = {"processor": "P", "threads": 1, "python": "3", "torch": "2"}
    fake = {"machine": machine, "recorded": "2026-11-30", "commit": "c", "sources": "s", "host": [row]}
    made = report.with_host_times(page, [fake])
    assert "| w: pc_loss and backward | 2 | 3 us |  | 2 us | 1.50x |" in made
    assert "commit c. **Older than the code.**" in made
    assert report.with_host_times(made, []) == report.with_host_times(page, [])
