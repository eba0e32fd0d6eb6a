"""Freed memory that the process keeps: the system's own count of page faults."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

import pcfast
from pcfast.support import allocator

STEPS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would be few faults
import torch, pcfast
MIB = 1 << 18  # float32 numbers
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(size * MIB) for size in (12, 12, 12, 12, 48)]  # glibc has its own ways beyond 32
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // (4 * MIB)
faults()
print(faults())
assert pcfast.keep_memory()
faults()
print(faults())
"""
#: What sets up the C library's allocator, or torch's.
ALLOCATORS = ("MALLOC_", "GLIBC_TUNABLES", "THP_", "LD_PRELOAD")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_a_step_finds_the_memory_of_the_step_before():
    """Mebibytes of 96 that a step gets from the system."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(ALLOCATORS)}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=120, env=plain
    )
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 40 and kept == 0


def test_another_c_library_is_left_alone(monkeypatch):
    class Library:
        """One without glibc's names."""

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library())
    assert pcfast.keep_memory() is False
