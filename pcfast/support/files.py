"""Files that are replaced whole or not at all, and the folders of runs that they lie in."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import itertools
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ..errors import ArgumentError, ArgumentTypeError

# Of taking a folder's lock, which others that end may remove with the folder; a few tens of milliseconds in all.
_TRIES = 1000


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], None]) -> None:
    """Replace ``path`` by what ``write(file)`` writes: readers find the old file or the whole new one.

    The bytes go to a temporary file in the same folder and reach the disk before the name changes. Whatever
    ``write`` raises passes on; then ``path`` is as it was and the temporary file is gone. Those that killed
    processes left of this path are removed.

    Raises:
        OSError: the file could not be written, e.g. on a full disk; it names ``path``.
    """
    path = Path(path)
    with _naming(path):
        _check_kind(path)
        temporary, descriptor = _new_temporary(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write_noting_failure(file, write)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        remove_leftovers(path.parent, path.name)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError, naming ``path``, where :func:`write_atomically` could not replace it; nothing stays behind."""
    path = Path(path)
    with _naming(path):
        _check_kind(path)
        temporary, descriptor = _new_temporary(path)
        os.close(descriptor)
        temporary.unlink()


def _check_kind(path: Path) -> None:
    """Raise OSError for a folder, a device or a pipe: nothing takes their place."""
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files that killed processes left in ``folder``, of ``name`` alone where it is given."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            parts = _TEMPORARY.fullmatch(entry.name)
            if parts and name in (None, parts["name"]) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_unless_locked(entry.path)


# .NAME.16 hexadecimal digits.tmp; earlier releases had the process's number there.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.([0-9a-f]{16}|[0-9]+)\.tmp", re.DOTALL)


def _new_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside ``path``, locked for as long as its descriptor is open: nobody takes it for a leftover."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        # No link and no file that somebody put there is opened.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666)
        if _lock(descriptor) and _is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)  # taken for a leftover before it was locked


def _remove_unless_locked(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if _lock(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock the open file; False where another process has. The lock ends with the process, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # File systems without locks, such as some network mounts, have no other process's either.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
    return True


def _is_at(descriptor: int, path: str | os.PathLike) -> bool:
    """Whether the open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """OSErrors name ``path``, whichever file they were about."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


def _write_noting_failure(file: IO[bytes], write: Callable[[IO[bytes]], None]) -> None:
    """``write(file)``; where the file could not be written, that error and not what ``write`` makes of it."""
    noted = _Noting(file)
    try:
        write(noted)
    except Exception:
        if noted.failure is None:
            raise
    if noted.failure is not None:
        raise noted.failure


class _Noting:
    """A file that keeps the first OSError of its ``write``: torch.save would replace it by its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.failure = file, None

    def write(self, content) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def write_json(path: str | os.PathLike, value, indent: int = 1) -> None:
    """Replace ``path`` by ``value`` as :func:`json_text` gives it."""
    write_text(path, json_text(value, indent))


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Replace ``path`` by a table as :func:`csv_text` gives it."""
    write_text(path, csv_text(columns, rows))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace ``path`` by ``text``, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def json_text(value, indent: int = 1) -> str:
    """``value`` (dicts, lists, numbers, strings, None) as JSON."""
    return json.dumps(value, indent=indent) + "\n"


def csv_text(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table as CSV: column names first, numbers in full precision, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(
        ["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def holds(path: Path, text: str) -> bool:
    """Whether ``path`` is a file that holds ``text`` and nothing else."""
    content = text.encode()
    try:
        return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def is_older(path: Path, than: Path) -> bool:
    """Whether ``path`` is missing or was written before ``than``, which is there."""
    try:
        return path.stat().st_mtime_ns < than.stat().st_mtime_ns
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def results_folder(path: str | os.PathLike) -> Iterator[Path]:
    """The folder ``path`` for results, created if missing and held against a second run for as long as the context.

    Whether it can be used is found out now, before any work. Folders that were created and stayed empty are removed.

    Raises:
        ArgumentError: it cannot be created or written, or another run is writing there.
    """
    path = checked_folder("out", path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = path / ".lock"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        try:
            stack.callback(os.close, _held(path, lock))
        except BlockingIOError as error:
            needed = "a folder that no other run is writing to"
            raise ArgumentError("out", str(path), needed, "Wait for it, or name another folder.") from error
        except OSError as error:
            needed = f"a folder in which files can be written ({error.strerror})"
            raise ArgumentError("out", str(path), needed) from error
        stack.callback(lock.unlink, missing_ok=True)
        remove_leftovers(path)
        yield path


def _held(folder: Path, lock: Path) -> int:
    """The descriptor of ``lock``, made and locked; BlockingIOError where another process has it."""
    for _ in range(_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(
                lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
            )
        except (FileNotFoundError, FileExistsError) as error:
            # Either a run that ended removed the empty folder or its parent just now, or it is so for good.
            refused = error
            continue
        try:
            if not _lock(descriptor):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if _is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it removed it before it was locked here: others make a new one
        refused = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    raise refused


def checked_folder(argument: str, path: str | os.PathLike) -> Path:
    """``path`` as a Path that can name a folder; it need not be there.

    Raises:
        ArgumentError, ArgumentTypeError: naming ``argument``.
    """
    needed = "the path of a folder"
    try:
        made = Path(path)
    except TypeError:
        raise ArgumentTypeError(
            argument, f"a {type(path).__name__}", f"{needed}: str or pathlib.Path"
        ) from None
    if "\0" in str(made):
        raise ArgumentError(argument, repr(str(made)), needed, "A zero byte is in no name.")
    try:
        os.lstat(made)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(argument, str(made), f"{needed} that can be opened ({reason})") from error
    return made


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


@contextlib.contextmanager
def exclusive(path: Path, seconds: float, poll_s: float = 0.05) -> Iterator[bool]:
    """Hold the lock file ``path``, created where it is missing: True, or False where others have it for ``seconds``.

    Raises:
        OSError: it cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + seconds
        while not (locked := _lock(descriptor)) and time.monotonic() < deadline:
            time.sleep(poll_s)
        yield locked
    finally:
        os.close(descriptor)  # which unlocks
