"""The program ``pcfast``, also started as ``python -m pcfast``: the command line in a process of its own."""

import gc
import sys

from .cli import main
from .support.allocator import keep_memory

#: Commands whose steps take the memory of the step before. bench is none: it times what a user's process sees.
_KEEPING = ("train", "compare")


def program() -> int:
    """Run this process's command line; returns the exit status.

    Garbage collections do not search what is frozen. What the command line has imported lives as long as the process,
    and searching it takes half a second of a short run. At its end the interpreter would search everything again.
    """
    if sys.argv[1:] and sys.argv[1].lower() in _KEEPING:
        keep_memory()
    gc.freeze()
    try:
        return main()
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(program())
