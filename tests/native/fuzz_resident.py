"""Hands the resident kernel's entry, compiled for the CPU, launches with wrong numbers, until the time is over.

    python tests/native/fuzz_resident.py MODULE LAUNCHES SECONDS SEED

MODULE: a built _native_host. LAUNCHES: pickled by test_fuzzed.py. Every launch has to give a status: a crash ends the
process, after the seed on standard output says which launch it was.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import random
import struct
import sys
import time
from pathlib import Path

import numpy as np

from pcfast.backends.cuda.kernel_params import Program, RunParams, Tensors
from pcfast.backends.cuda.native import _load_file

# Numbers that were wrong before, the edges of 32 bits, and sizes like real ones.
EDGES = (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 255, 1 << 15, 1 << 16, 1 << 20, 2**31 - 1, -(2**31))
BYTES = 4 << 20  # of every tensor: a mutated program may ask for more than the launch's own


def mutated(content: bytes, generator: random.Random) -> bytes:
    """One to four of the 32-bit words, mostly to something near what is there."""
    words = list(struct.unpack(f"<{len(content) // 4}i", content))
    used = [i for i, word in enumerate(words) if word] or [0]
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        where = generator.choice(used) if generator.random() < 0.9 else generator.randrange(len(words))
        near = (
            words[where] + generator.choice((-4, -1, 1, 4)),
            words[where] * 2,
            -words[where],
            words[where] // 2,
        )
        value = generator.choice((*near, *EDGES, generator.randrange(1 << 17)))
        words[where] = max(min(value, 2**31 - 1), -(2**31))
    return struct.pack(f"<{len(words)}i", *words)


def main(path: str, launches: str, seconds: float, seed: int) -> None:
    module, counts = _load_file(path), {}
    given = pickle.loads(Path(launches).read_bytes())  # this test run's own
    memory = np.zeros(BYTES // 8)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seed += 1
        generator = random.Random(seed)
        program, tensors, run, scalar_bytes, threads = generator.choice(given)
        tensors = Tensors.from_buffer_copy(tensors)
        pointers = (ctypes.c_void_p * (ctypes.sizeof(Tensors) // 8)).from_buffer(tensors)
        for i, pointer in enumerate(pointers):
            pointers[i] = memory.ctypes.data if pointer else None
        if generator.random() < 0.1:
            pointers[generator.randrange(len(pointers))] = None
        what = generator.choice(("program", "program", "program", "run", "sizes"))
        arguments = [program, bytes(tensors), run]
        if what == "program":
            arguments[0] = mutated(program, generator)
        elif what == "run":
            arguments[2] = mutated(run, generator)
        else:
            i = generator.randrange(3)
            length = generator.choice((0, 1, len(arguments[i]) - 1, len(arguments[i]) + 1))
            arguments[i] = (arguments[i] + b"\0")[:length]
            scalar_bytes = generator.choice((scalar_bytes, 2, 0, -1, 8))
            threads = generator.choice((threads, 0, 33, -32))
        if len(arguments[2]) == ctypes.sizeof(
            RunParams
        ):  # how long tensors are is the caller's word, and time is short
            how = RunParams.from_buffer_copy(arguments[2])
            how.batch, how.iterations = min(how.batch, 3), min(how.iterations, 3)
            arguments[2] = bytes(how)
        print(seed, flush=True)
        status = module.resident(*arguments, scalar_bytes, threads, 0)
        counts[status] = counts.get(status, 0) + 1
    assert ctypes.sizeof(Program) == len(given[0][0])
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
