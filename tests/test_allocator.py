"""Freed memory that the process keeps: the system's own count of page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

import pcfast
from pcfast.support import allocator

STEPS = """
import resource, torch, pcfast
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(size << 18) for size in (12, 12, 12, 12, 48)]  # MiB; glibc has its own ways beyond 32
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
assert pcfast.keep_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_a_step_finds_the_memory_of_the_step_before():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 10_000 and kept < 100  # of the 24,576 pages that there are


def test_another_c_library_is_left_alone(monkeypatch):
    class Library:
        """One without glibc's names."""

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Library())
    assert pcfast.keep_memory() is False
