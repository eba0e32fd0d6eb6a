"""What is different while the command line is being imported, which takes seconds.

Ctrl-C ends it without a traceback. Until torch and pcfast are there, no garbage is collected: imports leave none, and
to search for it takes a seventh of their time. Needs nothing but the standard library: it comes before torch.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading

INTERRUPTED = 130


_paused = False


def begin() -> None:
    """Where this process is the command ``pcfast``, import so until :func:`imported` and :func:`end`."""
    global _paused
    if not _is_command():
        return
    _paused = gc.isenabled()
    gc.disable()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def imported() -> None:
    """Garbage is collected again, and not searched for in what is there now."""
    global _paused
    if _paused:
        gc.freeze()
        gc.enable()
    _paused = False


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
