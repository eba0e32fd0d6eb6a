"""Unpickling what others wrote without running it.

A pickle is a program: it may import any function and call it. Here it gets plain containers, strings, numbers and
NumPy arrays of integers, and nothing of NumPy itself: its arrays are built by the few functions below.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

INTEGERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")


class AsksForCode(pickle.UnpicklingError):
    """The pickle names something that is neither a plain container nor an array; the text says what."""


def load_plain(content: bytes | bytearray) -> Any:
    """What the pickle ``content`` holds, of any protocol; strings of Python 2 as bytes.

    An array comes as :class:`PickledArray` where a container holds it.

    Raises:
        AsksForCode: it names anything else; nothing was imported and nothing called.
        Exception: it is damaged; of any type, as pickle says of itself.
    """
    _check_opcodes(content)
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


class PickledArray:
    """An array in a pickle; ``array`` is None where the pickle left it without content."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        order = "F" if fortran else "C"
        self.array = np.frombuffer(content, dtype.numpy).reshape(shape, order=order)


class PickledDtype:
    """A dtype in a pickle, of integers only."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        code = code.decode() if isinstance(code, bytes) else code
        if code not in INTEGERS:
            raise pickle.UnpicklingError(f"an array of dtype {code!r}"[:100])
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.numpy = self.numpy.newbyteorder(order)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        super().__init__(file, **options)
        self.known = _constructors()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise AsksForCode(f"{module}.{name}"[:100]) from None


def _constructors() -> dict[tuple[str, str], Callable | object]:
    """What a pickle of arrays names, by (module, name).

    Made anew for each pickle: a pickle can set attributes of what it is given.
    """

    def reconstruct(*_: Any) -> PickledArray:
        return PickledArray()

    def from_buffer(content, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
        made = PickledArray()
        made.__setstate__((1, shape, dtype, order == "F", content))
        return made

    def dtype(*arguments: Any) -> PickledDtype:
        return PickledDtype(*arguments)

    def encode(text: str, encoding: str) -> bytes:  # how Python 3 writes bytes for Python 2
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("bytes that are not encoded as latin1")
        return text.encode("latin1")

    def empty() -> bytes:
        return b""

    known: dict[tuple[str, str], Callable | object] = {
        ("numpy", "ndarray"): object(),  # only ever an argument of reconstruct
        ("numpy", "dtype"): dtype,
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): empty,
        ("builtins", "bytes"): empty,
    }
    for core in ("numpy.core", "numpy._core"):  # before NumPy 2.0 and since
        known[f"{core}.multiarray", "_reconstruct"] = reconstruct
        known[f"{core}.numeric", "_frombuffer"] = from_buffer
    return known


def _check_opcodes(content: bytes | bytearray) -> None:
    """Raises what ``load_plain`` does where unpickling would do harm before ``find_class`` is asked."""
    stream = io.BytesIO(content)
    opcodes = pickletools.genops(stream)  # raises ValueError: a length beyond the end, no end, ...
    for count, (opcode, argument, _) in enumerate(opcodes, start=1):
        if opcode.name.startswith("EXT"):  # may be found in a table of the process, without find_class
            raise AsksForCode(f"extension {argument}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            # Unpickling would allocate a table with that many entries: up to 64 GiB for one damaged byte.
            raise pickle.UnpicklingError(f"entry {argument} of a table of at most {count}")
    if stream.read(1):
        raise pickle.UnpicklingError("bytes after its end")
