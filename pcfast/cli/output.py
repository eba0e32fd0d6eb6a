"""What commands print: tables for people on standard output, or one JSON object for machines."""

from __future__ import annotations

import json
import math

from rich.console import Console
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is, and breaks no line that goes to a file or pipe."""
    made = Console(highlight=False, markup=False, stderr=stderr)
    if not made.is_terminal:
        made.width = 200
    return made


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name starts with ">" hold numbers and are aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return made


def print_json(value) -> None:
    """``value`` (dicts, lists, numbers, strings, None) as one JSON object; NaN and infinity become null."""
    print(json.dumps(_finite(value), indent=1))


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
