"""CIFAR-10 and CIFAR-100 as their python versions: pickled batches, in a folder or in the archive as downloaded.

Described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .data import Part
from .pickles import AsksForCode, PickledArray, load_plain
from .reading import CHUNK, Unusable, damaged, find_file, one_line, opened, read_at_most, shown

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class PythonVersion:
    """How one of the two data sets lies on the disk.

    Attributes:
        title: its name in messages.
        subfolder, archive: the folder that the archive unpacks to, and the archive.
        train, test: names of the batches, each one pickle, in the order of their samples.
        labels: the entry of a batch that holds its class indices.
        max_bytes: of a batch, unpacked: several times a real one, so that no file fills the memory.
    """

    title: str
    subfolder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    max_bytes: int

    @property
    def batches(self) -> tuple[str, ...]:
        return self.train + self.test


#: By the name that ``load`` takes.
PYTHON_VERSIONS = {
    "cifar10": PythonVersion(
        "CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz",
        tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",), "labels", 256 << 20,
    ),
    "cifar100": PythonVersion(  # its training part is one batch of 154 MB; the 20 coarse labels are not read
        "CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "fine_labels", 512 << 20
    ),
}  # fmt: skip


def read_cifar_folder(folder: Path, version: PythonVersion, pixels: int, classes: int) -> tuple[Part, Part]:
    """Training and test part: images (N, pixels), N >= 1 a batch; training batches in the order of their names.

    The batches are looked for in ``folder``, then in its subfolder ``version.subfolder``, then in the archive
    ``version.archive`` in ``folder``, which is read where it lies.

    Raises:
        Unusable: a file is missing or unfit, or names anything but containers and arrays.
    """
    parts = {  # one at a time: a batch's pickle is dropped when it is read
        name: _part(content, where, version, pixels, classes)
        for name, where, content in _batches(folder, version)
    }

    def joined(names: tuple[str, ...]) -> Part:
        return Part(
            *(np.concatenate(arrays) for arrays in zip(*(parts[name] for name in names), strict=True))
        )

    return joined(version.train), joined(version.test)


def _batches(folder: Path, version: PythonVersion) -> Iterator[tuple[str, str, bytearray]]:
    """(name, where it lies in words, content) of all batches, in any order."""
    incomplete = None
    for place in (folder, folder / version.subfolder):
        found = {name: path for name in version.batches if (path := find_file(place, (name,))) is not None}
        if len(found) == len(version.batches):
            for name, path in found.items():
                with opened(path) as (file, _):
                    content = read_at_most(file, version.max_bytes + 1)
                yield name, shown(path), _checked_length(content, shown(path), version)
            return
        if found and incomplete is None:
            incomplete = _incomplete(place, set(found), version)
    archive = find_file(folder, (version.archive,))
    if archive is not None:
        yield from _archived(archive, version)
        return
    raise incomplete or Unusable(
        f"{shown(folder)} without {', '.join(version.batches)}",
        f"these files, each with or without .gz, there or in {version.subfolder}, or the archive {version.archive}",
    )


def _archived(path: Path, version: PythonVersion) -> Iterator[tuple[str, str, bytearray]]:
    """As ``_batches``, from the archive; nothing is written to the disk."""
    seen = set()
    try:
        with opened(path) as (file, _), tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                *folders, name = PurePosixPath(member.name).parts or ("",)
                if name in version.batches and folders in ([], [version.subfolder]) and member.isreg():
                    where = f"{name} in {shown(path)}"
                    content = read_at_most(archive.extractfile(member), version.max_bytes + 1)
                    seen.add(name)
                    yield name, where, _checked_length(content, where, version)
            while file.read(CHUNK):  # to the end: the checksum of the whole stands there
                pass
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter two: damaged headers
        raise damaged(shown(path), one_line(error)) from error
    if len(seen) < len(version.batches):
        raise _incomplete(path, seen, version)


def _incomplete(place: Path, names: set[str], version: PythonVersion) -> Unusable:
    missing = ", ".join(name for name in version.batches if name not in names)
    return Unusable(
        f"{shown(place)} without {missing}",
        f"all batches of {version.title}",
        "It is incomplete; download or unpack it again.",
    )


def _checked_length(content: bytearray, where: str, version: PythonVersion) -> bytearray:
    if len(content) > version.max_bytes:
        raise Unusable(
            f"{where}, which has more than {version.max_bytes} bytes", f"a batch of {version.title}"
        )
    return content


def _part(content: bytearray, where: str, version: PythonVersion, pixels: int, classes: int) -> Part:
    """The images and labels of one batch, checked."""
    try:
        batch = load_plain(content)
    except AsksForCode as error:
        raise Unusable(
            f"{where}, which asks for code ({str(error)!r}) and was not loaded",
            "a batch of numbers, strings, lists and arrays",
            f"Take it from {HOME}.",
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(where, one_line(error)) from error
    if not isinstance(batch, dict):
        raise Unusable(
            f"{where} with a {type(batch).__name__}", f"a dict with the entries data and {version.labels}"
        )
    images, labels = (_entry(batch, name, where, version) for name in ("data", version.labels))

    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (pixels,):
        raise Unusable(f"{where} with data of {_described(images)}", f"an array (N, {pixels}) of uint8")
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    if not isinstance(labels, list):
        raise Unusable(f"{where} with {version.labels} of {_described(labels)}", "a list of integers")
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


def _entry(batch: dict, name: str, where: str, version: PythonVersion):
    """The entry ``name``, which Python 2 wrote as bytes and Python 3 as str; arrays as such."""
    for key in (name.encode(), name):
        if key in batch:
            value = batch[key]
            return value.array if isinstance(value, PickledArray) else value
    names = [key.decode(errors="replace") if isinstance(key, bytes) else key for key in batch]
    present = ", ".join(repr(key[:30]) for key in names[:8] if isinstance(key, str))
    raise Unusable(
        f"{where} without the entry {name!r}, with {present or 'none'}", f"a batch of {version.title}"
    )


def _described(value) -> str:
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} and dtype {value.dtype}"
    return f"type {type(value).__name__}"
