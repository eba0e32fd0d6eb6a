"""The table of docs/architecture.md: packages from top to bottom, and imports that only go down."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pcfast._moved import MOVED

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pcfast"
#: torch.compile: what the compiler traces takes the place of the function that was called.
UPWARD = {("pcfast.autograd", "pcfast.compiled"), ("pcfast.incremental", "pcfast.compiled")}
#: Parts of a package that stand lower than it: what lies below the package imports them.
LOWER = {"presets.settings": "networks"}
NOWHERE = {"__main__", "_version", "_checkout", "_moved", "kernels", "bench"}
LOOSE_FILES = 16


def ranks() -> dict[str, int]:
    """Name in the table -> row."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = page.split("packages: begin -->")[1].split("<!-- packages: end")[0].strip().splitlines()[2:]
    return {name: row for row, line in enumerate(rows) for name in re.findall(r"`(\w+)`", line.split("|")[1])}


def modules() -> dict[str, Path]:
    result = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(("pcfast", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        result[name] = file
    return result


def imports(tree: ast.AST, name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of pcfast that import statements in ``tree`` name."""
    result = set()
    here = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            full = {f"{target}.{alias.name}" for alias in node.names}
            result |= {module if module in known else target for module in full}
        elif isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
    return {module for module in result if module.startswith("pcfast.") and module != name}


def test_every_module_has_its_place():
    tops = {name.split(".")[1] for name in modules() if name != "pcfast"} - NOWHERE
    assert tops == set(ranks())
    assert len(list(PACKAGE.glob("*.py"))) <= LOOSE_FILES


def test_imports_go_down():
    rank, known = ranks(), modules()

    def place(name: str) -> tuple[str, int] | None:
        """What a module belongs to, and its row."""
        inner = name.removeprefix("pcfast.")
        top = inner.split(".")[0]
        if top in NOWHERE:
            return None
        return (inner, rank[LOWER[inner]]) if inner in LOWER else (top, rank[top])

    upward = set()
    for name, file in known.items():
        if name == "pcfast" or place(name) is None:
            continue
        for target in imports(ast.parse(file.read_text()), name, file, known):
            above, below = place(name), place(target)
            if below is not None and above[0] != below[0] and below[1] <= above[1]:
                upward.add((name, target))
    assert upward == UPWARD


def test_no_module_imports_itself_by_a_detour():
    """By statements at the top: what a function imports is loaded when it runs, what TYPE_CHECKING guards never."""
    known = {name: file for name, file in modules().items() if name != "pcfast"}
    edges = {}
    for name, file in known.items():
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.If):
                node.body = [ast.Pass()]
        targets = imports(tree, name, file, known) & set(known)
        edges[name] = {target for target in targets if not name.startswith(f"{target}.")}
    with pytest.raises(CycleError):
        tuple(TopologicalSorter({**edges, "pcfast.errors": {"pcfast.autograd"}}).static_order())
    tuple(TopologicalSorter(edges).static_order())  # CycleError names the modules


def test_modules_are_found_by_the_names_they_had():
    for old, new in MOVED.items():
        if "triton.loop" not in new:  # which needs triton
            assert importlib.import_module(f"pcfast.{old}") is importlib.import_module(f"pcfast.{new}"), old
    code = "from pcfast import files, native, graphs; from pcfast.plots import training_curves"
    code += "; import pcfast.network as n"
    code += "; assert n.__name__ == 'pcfast.model.spec' and n.__spec__.name == n.__name__"
    code += "; from pcfast.training import CHECKPOINT, seeded, evaluate; from pcfast.problem import Problem"
    code += "; from pcfast.backends import eager; assert eager.Eager and not hasattr(eager, 'Walk')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(ImportError):
        importlib.import_module("pcfast.never")
