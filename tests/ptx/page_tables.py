"""Tables of a page that a script of this folder writes: they stand between two comments that name the script."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PAGE", "renewed"]

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def renewed(page: str, script: str, table: str) -> str:
    """The page's text with the table of tests/ptx/``script`` in its place."""
    begin, end = (f"<!-- tests/ptx/{script}: {where} -->" for where in ("begin", "end"))
    before, _, rest = page.partition(begin)
    _, result, after = rest.partition(end)
    if not result:
        raise ValueError(
            f"{PAGE.name} has no place for a table of tests/ptx/{script}: {begin} and {end} are needed"
        )
    return f"{before}{begin}\n{table}\n{end}{after}"
