"""Ctrl-C while the command line is being imported, which takes seconds: it ends without a traceback.

Needs nothing but the standard library: it comes before torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

INTERRUPTED = 130


def begin() -> None:
    """Where this process is the command ``pcfast``, end at once at Ctrl-C, until :func:`end`."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if _is_command() and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def end() -> None:
    """Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    """Whether this is ``pcfast ...``, or ``python -m pcfast ...``, whose argv[0] is "-m" during the import."""
    if sys.argv[:1] == ["-m"]:
        return "pcfast" in sys.orig_argv
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "pcfast"


def _leave(number, frame) -> None:
    """There is nothing to clean up, and an exception would run through whatever is being imported."""
    try:
        if sys.stderr is not None:
            os.write(2, b"stopped\n")
    finally:
        os._exit(INTERRUPTED)
