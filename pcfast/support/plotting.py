"""What all pictures have in common: matplotlib if it is there, and a picture is no reason to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

_log = logging.getLogger("pcfast")
_failed: set[str] = set()


def require_matplotlib() -> None:
    """Raise ImportError, with the remedy, where matplotlib is missing."""
    # Its import refuses a backend that is not installed here; no window is opened, so none is needed.
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the training curves need matplotlib: pip install "pcfast[train]"') from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def drawn(path: Path, draw: Callable[[Path], None]) -> bool:
    """Whether ``draw(path)`` made its picture; where it could not a warning says so, once for each file."""
    try:
        with _own_settings():
            draw(path)
    except Exception as error:  # of matplotlib, its fonts, LaTeX, the disk
        if str(path) not in _failed:
            _failed.add(str(path))
            text = " ".join(str(error).split())[:200]
            _log.warning(
                f"{ascii(str(path))[1:-1]} could not be drawn, the rest continues: {type(error).__name__}: {text}"
            )
        return False
    return True


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Text is drawn by matplotlib itself, not by LaTeX; letters that its font lacks are boxes, without a word."""
    import matplotlib

    with matplotlib.rc_context({"text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def plain(text: str) -> str:
    """``text``, which may be a file's name, as letters that can be drawn."""
    with contextlib.suppress(UnicodeEncodeError):
        text = text.encode("utf-8", "surrogateescape").decode(
            "utf-8", "replace"
        )  # a name in no letters of the locale
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text
    )
