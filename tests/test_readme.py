"""README says what the records and the code say."""

import csv
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from pages import blocks_of_code

from pcfast.bench import report
from pcfast.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES_OF_CODE = ["README.md", "docs/guide.md", "docs/layers.md", "docs/examples.md", "docs/graphs.md"]


def test_the_tables_are_made_from_the_newest_records():
    assert report.with_tables(README, report.newest()) == README


def test_every_file_that_readme_names_exists():
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in PAGES_OF_CODE for block in blocks_of_code((ROOT / name).read_text())],
)
def test_code_on_a_page_runs(name, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, name, "exec"), {"__name__": "page"})


def test_the_numbers_of_the_mnist_page_are_those_of_its_runs():
    """Every row of the table, in the order of the file: five seeds, then their median."""
    with open(ROOT / "docs" / "mnist.csv") as file:
        runs = [row for row in csv.DictReader(file) if row["epoch"] == "2"]
    result: dict[tuple, list[float]] = {}
    for row in runs:
        key = (row["loss"], row["method"], row["step_size"])
        result.setdefault(key, []).append(100 * float(row["test_accuracy"]))
    page = (ROOT / "docs" / "mnist.md").read_text()
    table = re.findall(r"^\| (\w+) \| (\w+)[^|]*\| ([\d.]*) ?\|(.*)\|$", page, flags=re.M)
    assert [row[:3] for row in table if row[0] != "loss"] == list(result)
    for *key, cells in table[1:]:
        expected = [*result[tuple(key)], median(result[tuple(key)])]
        assert [float(cell) for cell in cells.split("|")] == [round(value, 2) for value in expected]
    assert min(result["mse", "strict", "0.1"]) >= 95


def test_the_accuracies_of_the_recipes_page_are_those_of_its_runs():
    with open(ROOT / "docs" / "recipes.csv") as file:
        runs: dict[str, list[float]] = {}
        for row in csv.DictReader(file):
            runs.setdefault(row["recipe"], []).append(100 * float(row["test_accuracy"]))
    assert all(len(runs[name]) == RECIPES[name].epochs for name in runs)
    page = (ROOT / "docs" / "recipes.md").read_text()
    table = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.M)
    expected = [(name, f"{result[-1]:.2f}", f"{max(result):.2f}") for name, result in runs.items()]
    assert table == expected
