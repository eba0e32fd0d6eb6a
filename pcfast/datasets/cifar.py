"""CIFAR-10 as its python version: six pickled batches, in a folder or in the archive as downloaded.

Described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from .data import Part
from .pickles import AsksForCode, PickledArray, load_plain
from .reading import CHUNK, Unusable, damaged, find_file, one_line, opened, read_at_most, shown

SUBFOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = ("test_batch",)
BATCHES = TRAIN + TEST
MAX_BYTES = 256 << 20  # of a batch, unpacked: eight times a real one, so that no file fills the memory


def read_cifar_folder(folder: Path, pixels: int, classes: int) -> tuple[Part, Part]:
    """Training and test part: images (N, pixels), N >= 1 a batch; training batches in the order of their names.

    The batches are looked for in ``folder``, then in its subfolder cifar-10-batches-py, then in the archive
    cifar-10-python.tar.gz in ``folder``, which is read where it lies.

    Raises:
        Unusable: a file is missing or unfit, or names anything but containers and arrays.
    """
    parts = {
        name: _part(content, where, pixels, classes)
        for name, where, content in _batches(folder)  # one at a time: a batch is dropped when it is read
    }

    def joined(names: tuple[str, ...]) -> Part:
        return Part(
            *(np.concatenate(arrays) for arrays in zip(*(parts[name] for name in names), strict=True))
        )

    return joined(TRAIN), joined(TEST)


def _batches(folder: Path) -> Iterator[tuple[str, str, bytearray]]:
    """(name, where it lies in words, content) of all six batches, in any order."""
    incomplete = None
    for place in (folder, folder / SUBFOLDER):
        found = {name: path for name in BATCHES if (path := find_file(place, (name,))) is not None}
        if len(found) == len(BATCHES):
            for name, path in found.items():
                with opened(path) as (file, _):
                    content = read_at_most(file, MAX_BYTES + 1)
                yield name, shown(path), _checked_length(content, shown(path))
            return
        if found and incomplete is None:
            incomplete = _incomplete(place, set(found))
    archive = find_file(folder, (ARCHIVE,))
    if archive is not None:
        yield from _archived(archive)
        return
    raise incomplete or Unusable(
        f"{shown(folder)} without {', '.join(BATCHES)}",
        f"these files, each with or without .gz, there or in {SUBFOLDER}, or the archive {ARCHIVE}",
    )


def _archived(path: Path) -> Iterator[tuple[str, str, bytearray]]:
    """As ``_batches``, from the archive; nothing is written to the disk."""
    seen = set()
    try:
        with opened(path) as (file, _), tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                *folders, name = PurePosixPath(member.name).parts or ("",)
                if name in BATCHES and folders in ([], [SUBFOLDER]) and member.isreg():
                    where = f"{name} in {shown(path)}"
                    content = read_at_most(archive.extractfile(member), MAX_BYTES + 1)
                    seen.add(name)
                    yield name, where, _checked_length(content, where)
            while file.read(CHUNK):  # to the end: the checksum of the whole stands there
                pass
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter two: damaged headers
        raise damaged(shown(path), one_line(error)) from error
    if len(seen) < len(BATCHES):
        raise _incomplete(path, seen)


def _incomplete(place: Path, names: set[str]) -> Unusable:
    missing = ", ".join(name for name in BATCHES if name not in names)
    return Unusable(
        f"{shown(place)} without {missing}",
        "all six batches",
        "It is incomplete; download or unpack it again.",
    )


def _checked_length(content: bytearray, where: str) -> bytearray:
    if len(content) > MAX_BYTES:
        raise Unusable(f"{where}, which has more than {MAX_BYTES} bytes", "a batch of CIFAR-10")
    return content


def _part(content: bytearray, where: str, pixels: int, classes: int) -> Part:
    """The images and labels of one batch, checked."""
    try:
        batch = load_plain(content)
    except AsksForCode as error:
        raise Unusable(
            f"{where}, which asks for code ({str(error)!r}) and was not loaded",
            "a batch of numbers, strings, lists and arrays",
            "Take it from https://www.cs.toronto.edu/~kriz/cifar.html.",
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(where, one_line(error)) from error
    if not isinstance(batch, dict):
        raise Unusable(f"{where} with a {type(batch).__name__}", "a dict with the entries data and labels")
    images, labels = _entry(batch, "data", where), _entry(batch, "labels", where)

    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (pixels,):
        raise Unusable(f"{where} with data of {_described(images)}", f"an array (N, {pixels}) of uint8")
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    if not isinstance(labels, list):
        raise Unusable(f"{where} with labels of {_described(labels)}", "a list of integers")
    if len(labels) != len(images) or not labels:
        raise Unusable(
            f"{where} with {len(images)} images and {len(labels)} labels", "as many labels as images, >= 1"
        )
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise Unusable(
                f"{where} with no valid label for sample {row}",
                f"integers from 0 to {classes - 1}",
            )
    return Part(images, np.array(labels, np.int64))


def _entry(batch: dict, name: str, where: str):
    """The entry ``name``, which Python 2 wrote as bytes and Python 3 as str; arrays as such."""
    for key in (name.encode(), name):
        if key in batch:
            value = batch[key]
            return value.array if isinstance(value, PickledArray) else value
    names = [key.decode(errors="replace") if isinstance(key, bytes) else key for key in batch]
    present = ", ".join(repr(key[:30]) for key in names[:8] if isinstance(key, str))
    raise Unusable(f"{where} without the entry {name!r}, with {present or 'none'}", "a batch of CIFAR-10")


def _described(value) -> str:
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} and dtype {value.dtype}"
    return f"type {type(value).__name__}"
