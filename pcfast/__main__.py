"""The program ``pcfast``, also started as ``python -m pcfast``: the command line in a process of its own."""

import gc
import sys

from .cli import main
from .support.allocator import keep_memory

#: Commands whose steps take the memory of the step before. bench is none: it times what a user's process sees.
_KEEPING = ("train", "compare")


def program() -> int:
    """Run this process's command line; returns the exit status.

    What was imported lives as long as the process, and at the end everything does: frozen, it is not searched for
    garbage, which takes half a second of the imports and the training, and as much again when the interpreter ends.
    """
    if sys.argv[1:] and sys.argv[1] in _KEEPING:
        keep_memory()
    gc.freeze()
    try:
        return main()
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(program())
