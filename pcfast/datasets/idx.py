"""IDX files: the format of MNIST and Fashion-MNIST.

Layout: two zero bytes, one byte for the type of an element, one for the rank r, r sizes of 4 bytes (big-endian),
the elements (last dimension fastest). Described at http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import IO

import numpy as np

from .data import Part
from .reading import Unusable, checked_path, find_file, naming, opened, read_at_most, shown

UNSIGNED_BYTE = 0x08
MAX_RANK = 32  # of an array in NumPy before 2.0
PARTS = ("train", "t10k")
MAX_BYTES = (
    1 << 30
)  # of a file of a data set, unpacked: twenty times a real one, so that no header fills the memory


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array in an IDX file of unsigned bytes, gzipped or not: uint8, any rank from 1 on.

    Raises:
        ArgumentError: the file is missing, unreadable, no such IDX file, damaged, or shorter or longer than its
            header says. No more memory is used than the file has bytes, unpacked.
    """
    path = checked_path("path", path)
    with naming("path"):
        return _read(path)


def read_idx_folder(folder: Path, image_size: tuple[int, int], classes: int) -> tuple[Part, Part]:
    """Training and test part from the four files of MNIST: images (N, *image_size), N >= 1 each.

    Names are those of MNIST (train-images-idx3-ubyte, ...), with or without .gz, also with a dot before "idx".

    Raises:
        Unusable: a file is missing or unfit.
    """
    stems = [f"{part}-{kind}" for part in PARTS for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    result = {stem: find_file(folder, (stem, _dotted(stem))) for stem in stems}
    missing = [stem for stem, path in result.items() if path is None]
    if missing:
        raise Unusable(
            f"{shown(folder)} without {', '.join(missing)}",
            f"each of these files, also as .gz or spelled with a dot ({', '.join(map(_dotted, missing))})",
        )
    paths = iter(result.values())
    train, test = (_part(next(paths), next(paths), image_size, classes) for _ in PARTS)
    return train, test


def _dotted(stem: str) -> str:
    return stem.replace("-idx", ".idx")


def _part(images_path: Path, labels_path: Path, image_size: tuple[int, int], classes: int) -> Part:
    images, labels = _read(images_path, sample=image_size), _read(labels_path, sample=())
    if len(images) != len(labels):
        raise Unusable(
            f"{len(images)} images in {shown(images_path)} and {len(labels)} labels in {shown(labels_path)}",
            "as many labels as images",
            "Take both files from the same copy of the data set.",
        )
    (outside,) = np.nonzero(labels >= classes)
    if len(outside):
        row = outside[0]
        raise Unusable(
            f"{shown(labels_path)} with the label {labels[row]} (sample {row})", f"labels 0 to {classes - 1}"
        )
    return Part(images, labels)


def _read(path: Path, sample: tuple[int, ...] | None = None) -> np.ndarray:
    """As ``read_idx``; where ``sample`` is given the shape has to be (N, *sample), N >= 1."""
    with opened(path) as (file, size):
        sizes = _header(file, path)
        if sample is not None and (sizes[1:] != sample or sizes[0] == 0):
            raise Unusable(
                f"{shown(path)} with an array {sizes}",
                f"{'images' if sample else 'labels'} ({', '.join(['N', *map(str, sample)])}) with N >= 1",
                "Check that it is a file of this data set, and that images and labels are not exchanged.",
            )
        header, elements = 4 + 4 * len(sizes), math.prod(sizes)
        if size is not None and size != header + elements:  # before anything is allocated
            raise _wrong_length(path, size, header + elements)
        limit = elements if sample is None else min(elements, MAX_BYTES)
        content = read_at_most(file, limit + 1)
    if len(content) > limit < elements:
        raise Unusable(f"{shown(path)} with an array {sizes}", f"at most {MAX_BYTES} elements")
    if len(content) != elements:
        raise _wrong_length(path, header + len(content), header + elements)
    try:
        return np.frombuffer(content, np.uint8).reshape(sizes)
    except ValueError:  # one size is 0 and the product of the others is not a number of bytes
        raise Unusable(f"{shown(path)} with an array {sizes}", "sizes that NumPy can hold") from None


def _header(file: IO[bytes], path: Path) -> tuple[int, ...]:
    """The sizes of the array, from the beginning of ``file``."""
    magic = file.read(4)
    if len(magic) < 4:
        raise _short_header(path, len(magic))
    zeros, kind, rank = magic[:2], magic[2], magic[3]
    if zeros != b"\0\0":
        raise Unusable(
            f"{shown(path)}, which starts with the bytes {magic.hex(' ')}",
            "an IDX file, which starts with 00 00 08 and its rank",
            "It is something else; download it again.",
        )
    if kind != UNSIGNED_BYTE:
        raise Unusable(
            f"{shown(path)} with elements of type 0x{kind:02x}", f"unsigned bytes, type 0x{UNSIGNED_BYTE:02x}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise Unusable(f"{shown(path)} with {rank} dimensions", f"1 to {MAX_RANK} dimensions")
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise _short_header(path, 4 + len(sizes))
    return struct.unpack(f">{rank}I", sizes)


def _short_header(path: Path, length: int) -> Unusable:
    return Unusable(
        f"{shown(path)}, which ends after {length} bytes, within the header of an IDX file",
        "the whole file",
        "It is cut short; download or copy it again.",
    )


def _wrong_length(path: Path, length: int, announced: int) -> Unusable:
    if length < announced:
        return Unusable(
            f"{shown(path)}, which ends after {length} of the {announced} bytes that its header announces",
            "the whole file",
            "It is cut short; download or copy it again.",
        )
    return Unusable(
        f"{shown(path)}, which goes on after the {announced} bytes that its header announces",
        "a file of that length",
        "It is damaged; download or copy it again.",
    )
