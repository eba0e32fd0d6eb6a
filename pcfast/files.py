"""Files that are replaced whole or not at all, and the folders of runs that they lie in."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from .errors import ArgumentError


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], None]) -> None:
    """Replace ``path`` by what ``write(file)`` writes: readers find the old file or the whole new one.

    The bytes go to a temporary file in the same folder and reach the disk before the name changes. Whatever
    ``write`` raises passes on; then ``path`` is as it was and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table atomically as CSV: column names first, numbers in full precision, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        ["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows
    )
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def make_folder(path: str | os.PathLike) -> Path:
    """The folder ``path`` for results, created if missing; found out now, before any work, whether it can be used.

    Raises:
        ArgumentError: it cannot be created, or no file can be written in it; nothing is left behind.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()
        raise ArgumentError("out", str(path), "a folder in which files can be written", str(error)) from error
    return path


def set_aside(folder: Path, names: Sequence[str]) -> Path | None:
    """Move the files of an earlier run into a folder of their own, ``earlier-N``: nothing is lost.

    Args:
        folder: the run's folder. names: of the files in it that a run writes.

    Returns:
        The new folder; None where there was nothing to move.
    """
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        return None
    number = next(n for n in itertools.count(1) if not (folder / f"earlier-{n}").exists())
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for file in files:
        file.rename(aside / file.name)
    return aside
