"""README says what the records and the code say."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def load_report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_made_from_the_newest_record():
    report = load_report()
    assert report.with_table(README, report.newest()) == README


def test_every_file_that_readme_names_exists():
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.S))
def test_code_in_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
