"""What the C library does with memory that torch frees on a CPU."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), malloc.h


def keep_memory() -> bool:
    """Make this process keep the memory that it frees, for the tensors of its next training step on a CPU.

    Torch has no cache for tensors on CPUs: the C library gives their memory back to the system, and the next step
    gets it page by page, each filled with zeros first. That takes a few per cent of a step of a small network and up
    to a third of a large one's (docs/behaviour.md). After this call the process stays as large as it has once been.
    Numbers are the same. ``pcfast train`` and ``pcfast compare`` do it for themselves.

    It is glibc's setting for the whole process: mallopt(3) with M_MMAP_MAX = 0 and without an M_TRIM_THRESHOLD.
    Threads that Python starts keep no tensor above 64 MiB. An allocator that replaces glibc's, such as jemalloc, has
    settings of its own, and this changes nothing there.

    Returns:
        Whether glibc took the setting; False where the C library is another one (musl, macOS).
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    never = -1
    return bool(library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, never))
