"""Files that are replaced whole or not at all, and the folders of runs that they lie in."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def write_json(path: str | os.PathLike, value, indent: int = 1) -> None:
    """Replace ``path`` by ``value`` (dicts, lists, numbers, strings, None) as JSON."""
    text = json.dumps(value, indent=indent) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table atomically as CSV: column names first, numbers in full precision, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        ["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows
    )
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


@contextlib.contextmanager
def results_folder(path: str | os.PathLike) -> Iterator[Path]:
    """The folder ``path`` for results, created if missing and held against a second run for as long as the context.

    Whether it can be used is found out now, before any work. Folders that were created and stayed empty are removed.

    Raises:
        ArgumentError: it cannot be created or written, or another run is writing there.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = path / ".lock"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(open(lock, "a"))
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            needed = "a folder that no other run is writing to"
            raise ArgumentError("out", str(path), needed, "Wait for it, or name another folder.") from error
        except OSError as error:
            needed = f"a folder in which files can be written ({error.strerror})"
            raise ArgumentError("out", str(path), needed) from error
        stack.callback(lock.unlink, missing_ok=True)
        yield path


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # something was written, or it was never created
            return


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
