"""The code that stands on a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks_of_code(text: str) -> list[str]:
    """Every python block of a page's text, in its order."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def names_of(page: str, heading: str) -> dict:
    """What the one block under a heading of docs/``page`` defines, after it ran."""
    section = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = blocks_of_code(section)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    return names
