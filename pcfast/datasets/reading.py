"""Reading files that may be missing, damaged or something else: one exception that says which and why."""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import ArgumentError, ArgumentTypeError

GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20


class Unusable(Exception):
    """A file or folder cannot be used; public functions turn it into an ArgumentError of their argument.

    given, needed, remedy: in words, as for ArgumentError.
    """

    def __init__(self, given: str, needed: str, remedy: str = "") -> None:
        self.given, self.needed, self.remedy = given, needed, remedy
        super().__init__(given, needed, remedy)


@contextlib.contextmanager
def naming(argument: str) -> Iterator[None]:
    """Turns Unusable into an ArgumentError of ``argument``, with the same cause."""
    try:
        yield
    except Unusable as error:
        raise ArgumentError(argument, error.given, error.needed, error.remedy) from error.__cause__


def shown(path: str | os.PathLike) -> str:
    """A path for a message: quoted, and one line whatever its name holds."""
    return repr(os.fspath(path))


def one_line(error: BaseException) -> str:
    """An exception for a message: its type and its text in one line, not too long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else text[:200] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def checked_path(argument: str, path: str | os.PathLike) -> Path:
    """``path`` as a Path; ArgumentTypeError names ``argument``."""
    try:
        return Path(path)
    except TypeError:
        raise ArgumentTypeError(argument, f"a {type(path).__name__}", "a path: str or pathlib.Path") from None


def check_folder(folder: Path) -> None:
    """Raises Unusable unless ``folder`` is a folder."""
    mode = _mode(folder)
    if mode is None:
        raise Unusable(f"{shown(folder)}, which does not exist", "a folder")
    if not stat.S_ISDIR(mode):
        raise Unusable(
            f"{shown(folder)}, which is a file",
            "a folder",
            f"Give the file's folder, {shown(folder.parent)}.",
        )


def find_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of ``names``, each without and with .gz, that is a file in ``folder``; None: there is none."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            mode = _mode(path)
            if mode is not None and stat.S_ISREG(mode):
                return path
    return None


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], int | None]]:
    """``path`` opened for reading, decompressed where it is gzipped, and its size, None where it is gzipped.

    Gzip is known by its first bytes, not by the name: browsers unpack files and leave ".gz" where it is.

    Raises:
        Unusable: it is missing or no regular file, or opening or reading it in the with block failed.
    """
    mode = _mode(path)
    if mode is None:
        raise Unusable(f"{shown(path)}, which does not exist", "a file")
    if not stat.S_ISREG(mode):  # opening a named pipe would wait for ever
        raise Unusable(f"{shown(path)}, which is no regular file", "a file")
    with _failures_of(path), open(path, "rb") as file:
        start = file.read(len(GZIP_MAGIC))
        file.seek(0)
        if start == GZIP_MAGIC:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked, None
        else:
            yield file, os.fstat(file.fileno()).st_size


def read_at_most(file: IO[bytes], limit: int) -> bytearray:
    """The next bytes of ``file``, ``limit`` of them or up to its end.

    Grows with what is there: file.read(limit) would first allocate ``limit`` bytes, which a header may have
    invented.
    """
    content = bytearray()
    while chunk := file.read(min(CHUNK, limit - len(content))):
        content += chunk
    return content


def damaged(name: str, reason: str) -> Unusable:
    """``name``: the file in words."""
    return Unusable(f"{name}, which is damaged ({reason})", "the whole file", "Download or copy it again.")


def _mode(path: Path) -> int | None:
    """The mode of the file that ``path`` names, None where there is none."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


@contextlib.contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """Turns what opening and reading ``path`` may raise into Unusable."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(shown(path), one_line(error)) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> Unusable:
    reason = error.strerror or one_line(error)
    forbidden = isinstance(error, PermissionError)
    remedy = "Check its permissions and those of the folders above it." if forbidden else ""
    return Unusable(f"{shown(path)}, which cannot be read ({reason})", "a readable file or folder", remedy)
