"""CIFAR-10 and CIFAR-100 as their binary versions, in a folder or in the archive as downloaded.

Layout of a batch: one record a sample, of the label (CIFAR-100: the coarse one, then the fine one), a byte each, and
3 x 32 x 32 bytes of pixels, channel planes of rows. Described at https://www.cs.toronto.edu/~kriz/cifar.html.

The python versions hold the same as pickles, which are programs: they are not opened.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from .data import Part
from .reading import CHUNK, Unusable, damaged, find_file, one_line, opened, read_at_most, shown

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
COARSE_CLASSES = 20  # of CIFAR-100; its label is the fine one
_MAX_AT_ONCE = 16 << 20  # bytes of an archive's headers: a name or an attribute has a few


@dataclass(frozen=True)
class BinaryVersion:
    """How one of the two data sets lies on the disk.

    Attributes:
        title: its name in messages.
        subfolder, archive: the folder that the archive unpacks to, and the archive.
        train, test: names of the batches in the order of their samples.
        label_bytes: labels of a record; the last one counts.
        max_bytes: of a batch, unpacked: several times a real one, so that no file fills the memory.
        pickled: names by which the python version is known.
    """

    title: str
    subfolder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    max_bytes: int
    pickled: tuple[str, ...]

    @property
    def batches(self) -> tuple[str, ...]:
        return self.train + self.test


#: By the name that ``load`` takes.
BINARY_VERSIONS = {
    "cifar10": BinaryVersion(
        "CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)), ("test_batch.bin",), 1, 256 << 20,
        ("data_batch_1", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": BinaryVersion(  # its training part is one batch of 154 MB
        "CIFAR-100", "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), 2, 512 << 20,
        ("train", "cifar-100-python", "cifar-100-python.tar.gz"),
    ),
}  # fmt: skip


def read_cifar_folder(folder: Path, version: BinaryVersion, pixels: int, classes: int) -> tuple[Part, Part]:
    """Training and test part: images (N, pixels), N >= 1 a batch; training batches in the order of their names.

    The batches are looked for in ``folder``, then in its subfolder ``version.subfolder``, then in the archive
    ``version.archive`` in ``folder``, which is read where it lies.

    Raises:
        Unusable: a file is missing or unfit.
    """
    parts = {
        name: _part(content, where, version, pixels, classes)
        for name, where, content in _batches(folder, version)
    }

    def joined(names: tuple[str, ...]) -> Part:
        return Part(
            *(np.concatenate(arrays) for arrays in zip(*(parts[name] for name in names), strict=True))
        )

    return joined(version.train), joined(version.test)


def _batches(folder: Path, version: BinaryVersion) -> Iterator[tuple[str, str, bytearray]]:
    """(name, where it lies in words, content) of all batches, in any order."""
    incomplete = None
    for place in (folder, folder / version.subfolder):
        result = {name: path for name in version.batches if (path := find_file(place, (name,))) is not None}
        if len(result) == len(version.batches):
            for name, path in result.items():
                with opened(path) as (file, _):
                    content = read_at_most(file, version.max_bytes + 1)
                yield name, shown(path), _checked_length(content, shown(path), version)
            return
        if result and incomplete is None:
            incomplete = _incomplete(place, set(result), version)
    archive = find_file(folder, (version.archive,))
    if archive is not None:
        yield from _archived(archive, version)
        return
    raise incomplete or Unusable(
        f"{shown(folder)} without {', '.join(version.batches)}",
        f"these files, each with or without .gz, there or in {version.subfolder}, or the archive {version.archive}",
        _about_pickles(folder, version),
    )


def _about_pickles(folder: Path, version: BinaryVersion) -> str:
    """What to do where the python version lies there; "" where it does not."""
    if not any((folder / f"{name}{end}").exists() for name in version.pickled for end in ("", ".gz")):
        return ""
    return f"The python version is pickled and is not opened: take the binary version from {HOME}."


def _archived(path: Path, version: BinaryVersion) -> Iterator[tuple[str, str, bytearray]]:
    """As ``_batches``, from the archive; nothing is written to the disk."""
    seen = set()
    try:
        with opened(path) as (file, _), tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:
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


def _incomplete(place: Path, names: set[str], version: BinaryVersion) -> Unusable:
    missing = ", ".join(name for name in version.batches if name not in names)
    return Unusable(
        f"{shown(place)} without {missing}",
        f"all batches of {version.title}",
        "It is incomplete; download or unpack it again.",
    )


def _checked_length(content: bytearray, where: str, version: BinaryVersion) -> bytearray:
    if len(content) > version.max_bytes:
        raise Unusable(
            f"{where}, which has more than {version.max_bytes} bytes", f"a batch of {version.title}"
        )
    return content


class _Bounded:
    """A file of which tarfile reads only as much at once as headers of real archives need."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_AT_ONCE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _part(content: bytearray, where: str, version: BinaryVersion, pixels: int, classes: int) -> Part:
    """The images and labels of one batch, checked."""
    record = version.label_bytes + pixels
    if not content or len(content) % record:
        raise Unusable(
            f"{where} with {len(content)} bytes",
            f"records of {record} bytes, a batch of {version.title}",
            "It is cut short, damaged or of another data set; download or copy it again.",
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    limits = (COARSE_CLASSES, classes)[-version.label_bytes :]
    for column, limit in enumerate(limits):
        (outside,) = np.nonzero(records[:, column] >= limit)
        if len(outside):
            row = outside[0]
            raise Unusable(
                f"{where} with the label {records[row, column]} (sample {row})",
                f"labels 0 to {limit - 1} in a batch of {version.title}",
            )
    return Part(records[:, version.label_bytes :], records[:, version.label_bytes - 1])
