"""What commands print: tables for people on standard output, or one JSON object for machines."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

from rich.progress import Progress, ProgressColumn
from rich.table import Table

from ..errors import ArgumentError
from ..support.console import PlainConsole


def console(*, stderr: bool = False) -> PlainConsole:
    """A console that breaks no line that goes to a file or pipe."""
    made = PlainConsole(stderr=stderr)
    if not made.is_terminal:
        made.width = 200
    return made


@contextlib.contextmanager
def progress_bar(*columns: ProgressColumn) -> Iterator[Callable]:
    """A progress bar on standard error, in a terminal; gives rich's ``update`` of its one task."""
    to = console(stderr=True)
    if not to.is_terminal:  # some releases of rich end a bar that is off with an empty line
        yield lambda **values: None
        return
    with Progress(*columns, console=to, transient=True) as bar:
        yield partial(bar.update, bar.add_task(""))


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name starts with ">" hold numbers and are aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for column in columns:
        if column.startswith(">"):
            made.add_column(column.removeprefix(">"), justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    return made


def print_cells(title: str, cells: list[list[str]]) -> None:
    """Print a table: the heading, then its rows."""
    heading, *rows = cells
    shown = table(title, *heading)
    for row in rows:
        shown.add_row(*row)
    console().print(shown)


#: Another process of this command says how it ended (launch.py).
silenced = False
#: Which process an error is of.
prefix = ""
#: Standard output was closed when the program was started.
closed_output = False


def open_closed_streams() -> None:
    """Put the null device in the place of standard streams that are closed: files would get their numbers."""
    global closed_output
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) != number:  # a lower one is free: it is nobody's here
                continue
            closed_output = closed_output or number == 1
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def printable_whatever_it_is() -> None:
    """Let standard output and standard error stand in for letters that they cannot encode, as in names of files."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write what standard output still holds; where that fails, OSError, and the interpreter's end tries no more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        if isinstance(error, OSError):
            raise


_waiting: list[str] | None = None  # JSON to print once standard output is free again


@contextlib.contextmanager
def only_json() -> Iterator[None]:
    """Whatever prints to standard output, a user's model too, prints to standard error; JSON comes last, alone."""
    global _waiting
    if closed_output:
        raise ArgumentError("json", "a standard output that is closed", "one that can be written")
    sys.stdout.flush()
    kept, _waiting = os.dup(1), []
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        texts, _waiting = _waiting, None
        for text in texts:
            print(text)


def print_json(value) -> None:
    """``value`` (dicts, lists, numbers, strings, None) as one JSON object; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=1)
    if _waiting is None:
        print(text)
    else:
        _waiting.append(text)


def _finite(value):
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
