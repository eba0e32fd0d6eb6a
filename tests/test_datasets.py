"""Data sets: files of every spelling and damage, and OpenML behind a fake.

The files are built here byte by byte from their published formats; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import gzip
import http.client
import io
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import tracemalloc
import types
import urllib.error
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcfast import datasets
from pcfast.datasets import SOURCES, load, read_idx
from pcfast.datasets import idx as idx_module
from pcfast.datasets import openml as openml_module
from pcfast.datasets import reading as reading_module
from pcfast.datasets.cifar import BINARY_VERSIONS
from pcfast.errors import ArgumentError, ArgumentTypeError

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def refused(call: Callable, *said: str, argument: str = "folder") -> ArgumentError:
    """``call`` raises an ArgumentError of ``argument`` whose message is one line and holds each of ``said``."""
    with pytest.raises(ArgumentError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert caught.value.argument == argument, message
    for part in said:
        assert part in message, (part, message)
    return caught.value


def as_float32(byte: int) -> float:
    """byte / 255, rounded once to float32."""
    return struct.unpack("f", struct.pack("f", byte / 255))[0]


# ----------------------------------------------------------------------------------------- names and digits


def test_the_table_says_what_each_data_set_holds():
    assert datasets.NAMES == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100") == tuple(SOURCES)
    assert {name: source.image_shape for name, source in SOURCES.items()} == {
        "digits": (1, 8, 8),
        "mnist": (1, 28, 28),
        "fashion-mnist": (1, 28, 28),
        "cifar10": (3, 32, 32),
        "cifar100": (3, 32, 32),
    }
    assert [source.classes for source in SOURCES.values()] == [10, 10, 10, 10, 100]
    assert [source.pixels for source in SOURCES.values()] == [64, 784, 784, 3072, 3072]
    assert [source.rows for source in SOURCES.values()][1:] == [(60000, 10000)] * 2 + [(50000, 10000)] * 2
    data = datasets.digits()
    assert SOURCES["digits"].rows == (len(data.x_train), len(data.x_test))


def test_digits_split_is_fixed_and_stratified():
    data = datasets.digits(seed=5)
    assert data.x_train.shape == (1437, 64) and data.x_test.shape == (360, 64)
    assert data.x_train.dtype == torch.float32 and data.y_train.dtype == torch.int64
    assert data.x_train.min() == 0 and data.x_train.max() == 1
    counts = torch.bincount(data.y_train) / 4, torch.bincount(data.y_test)
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert all(torch.equal(a, b) for a, b in zip(data, datasets.digits(seed=5), strict=True))
    images = datasets.digits(seed=5, shape="image")
    assert images.x_test.shape == (360, 1, 8, 8) and torch.equal(images.x_test.flatten(1), data.x_test)
    for change in ({"test_fraction": 0.0}, {"test_fraction": 0.001}, {"shape": "cube"}):
        with pytest.raises(ArgumentError, match=next(iter(change))):
            datasets.digits(**change)


@pytest.mark.parametrize("shape", ["flat", "image"])
def test_digits_by_name(shape):
    for a, b in zip(load("digits", seed=3, shape=shape), datasets.digits(seed=3, shape=shape), strict=True):
        assert torch.equal(a, b)
    assert load("digits").x_train.shape[1:] == (1, 8, 8)
    assert not torch.equal(load("digits", seed=3).y_test, load("digits", seed=4).y_test)


def test_arguments_that_do_not_fit(tmp_path):
    refused(lambda: load("mnst"), "got 'mnst'", "'mnist'", "'cifar10'", argument="name")
    refused(lambda: load(["mnist"]), "got ['mnist']", argument="name")
    refused(lambda: load("mnist", shape="cube"), "(N, 784)", "(N, 1, 28, 28)", argument="shape")
    refused(lambda: load("cifar10", shape=None), "(N, 3072)", "(N, 3, 32, 32)", argument="shape")
    refused(lambda: load("digits", folder=tmp_path), repr(str(tmp_path)), "None for digits")
    refused(lambda: load("digits", seed=-1), "-1", argument="test_fraction, seed")
    for wrong in (3, b"folder", ["folder"]):
        with pytest.raises(ArgumentTypeError, match=r"^folder: got a "):
            load("mnist", folder=wrong)
        with pytest.raises(ArgumentTypeError, match=r"^path: got a "):
            read_idx(wrong)


# -------------------------------------------------------------------------------------------------- IDX files


def idx_bytes(sizes: tuple[int, ...], content: bytes, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(sizes)]) + b"".join(struct.pack(">I", size) for size in sizes) + content


def pixel(part: int, sample: int, row: int, column: int) -> int:
    return (101 * part + 31 * sample + 7 * row + 3 * column) % 256


def idx_files(train: int = 5, test: int = 3, size: tuple[int, int] = (28, 28)) -> dict[str, bytes]:
    """The four files by name; the label of sample s is (s + part) % 10."""
    files = {}
    for part, (prefix, count) in enumerate((("train", train), ("t10k", test))):
        images = bytes(
            pixel(part, s, r, c) for s in range(count) for r in range(size[0]) for c in range(size[1])
        )
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes((count, *size), images)
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(
            (count,), bytes((s + part) % 10 for s in range(count))
        )
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def dotted(name: str) -> str:
    return name.replace("-idx", ".idx")


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


SPELLINGS: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
    "plain": lambda name, content: (name, content),
    "gzip": lambda name, content: (f"{name}.gz", zipped(content)),
    "dotted": lambda name, content: (dotted(name), content),
    "dotted gzip": lambda name, content: (f"{dotted(name)}.gz", zipped(content)),
    "gzip by content only": lambda name, content: (name, zipped(content)),
    "gzip by name only": lambda name, content: (f"{name}.gz", content),
    "mixed": lambda name, content: (dotted(name), content) if "t10k" in name else (f"{name}.gz", zipped(content)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_idx_files_pixel_by_pixel(tmp_path, name, spelling):
    files = dict(SPELLINGS[spelling](*item) for item in idx_files().items())
    data = load(name, folder=str(write(tmp_path / "data", files)))
    for part, (x, y, count) in enumerate(((data.x_train, data.y_train, 5), (data.x_test, data.y_test, 3))):
        assert x.shape == (count, 1, 28, 28) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.dtype == torch.int64 and y.tolist() == [(s + part) % 10 for s in range(count)]
        assert x.tolist() == [
            [[[as_float32(pixel(part, s, r, c)) for c in range(28)] for r in range(28)]] for s in range(count)
        ]
    flat = load(name, folder=tmp_path / "data", shape="flat")
    assert flat.x_train.shape == (5, 784) and torch.equal(flat.x_train, data.x_train.flatten(1))
    assert flat.x_test.shape == (3, 784) and torch.equal(flat.x_test, data.x_test.flatten(1))


def test_a_folder_with_a_files_name_is_passed_over(tmp_path):
    """Archives on Kaggle hold such folders next to the dotted files."""
    write(tmp_path, {dotted(name): content for name, content in idx_files().items()})
    for name in IDX_FILES:
        (tmp_path / name).mkdir()
    assert len(load("mnist", folder=tmp_path).x_train) == 5


def test_files_need_no_scikit_learn(tmp_path, monkeypatch):
    write(tmp_path, idx_files())
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(load("mnist", folder=tmp_path).x_test) == 3


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    compressed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_read_idx_returns_what_was_written(sizes, seed, compressed):
    array = np.random.default_rng(seed).integers(0, 256, sizes, dtype=np.uint8)
    content = idx_bytes(tuple(sizes), array.tobytes())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(zipped(content) if compressed else content)
        read = read_idx(path)
    assert read.dtype == np.uint8 and read.shape == array.shape and read.flags.writeable
    assert np.array_equal(read, array)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("length", range(4 + 3 * 4 + 2 * 3 * 4))
def test_a_file_that_ends_anywhere_is_refused(tmp_path, length, compressed):
    content = idx_bytes((2, 3, 4), bytes(24))[:length]
    path = tmp_path / "file"
    path.write_bytes(zipped(content) if compressed else content)
    where = "within the header" if length < 16 else "of the 40 bytes"
    refused(lambda: read_idx(path), repr(str(path)), f"ends after {length} ", where, argument="path")


@pytest.mark.parametrize("name", IDX_FILES)
@pytest.mark.parametrize("length", [0, 3, 7, 9])
def test_a_short_file_of_a_folder_is_named(tmp_path, name, length):
    files = idx_files()
    write(tmp_path, {**files, name: files[name][:length]})
    refused(lambda: load("mnist", folder=tmp_path), repr(str(tmp_path / name)), f"ends after {length} ")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("extra", [1, 1000])
def test_bytes_after_the_end_are_refused(tmp_path, compressed, extra):
    content = idx_bytes((2, 3), bytes(6 + extra))
    path = tmp_path / "file"
    path.write_bytes(zipped(content) if compressed else content)
    refused(lambda: read_idx(path), "goes on after the 18 bytes", argument="path")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>", "starts with the bytes 3c 21 44 4f"),
        (b"\0\1\x08\1\0\0\0\1a", "starts with the bytes 00 01 08 01"),
        (idx_bytes((1,), b"a", kind=9), "elements of type 0x09"),
        (idx_bytes((1,), b"abcd", kind=0x0D), "elements of type 0x0d"),
        (idx_bytes((1,), b"a", kind=0), "elements of type 0x00"),
        (idx_bytes((), b"a"), "0 dimensions"),
        (idx_bytes((1,) * 33, b"a"), "33 dimensions"),
        (idx_bytes((0, *[2**32 - 1] * 3), b""), "sizes that NumPy can hold"),
    ],
    ids=["html", "zeros", "int8", "float", "no type", "rank 0", "rank 33", "sizes"],
)
def test_other_files_are_refused(tmp_path, content, said):
    for number, written in enumerate((content, zipped(content))):
        path = tmp_path / str(number)
        path.write_bytes(written)
        refused(lambda path=path: read_idx(path), said, argument="path")


def test_a_header_that_lies_allocates_nothing(tmp_path):
    files = idx_files()
    for sizes in ((2**32 - 1, 28, 28), (2**24, 28, 28)):
        content = idx_bytes(sizes, bytes(784))
        for written in (content, zipped(content)):
            write(tmp_path, {**files, IDX_FILES[0]: written})
            tracemalloc.start()
            try:
                refused(lambda: load("mnist", folder=tmp_path), "ends after 800 of the")
                refused(lambda: read_idx(tmp_path / IDX_FILES[0]), "ends after 800 of the", argument="path")
                assert tracemalloc.get_traced_memory()[1] < 8 << 20
            finally:
                tracemalloc.stop()


def test_a_file_of_another_length_than_announced_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(idx_bytes((2**27,), b""))
    os.truncate(path, 64 << 20)
    tracemalloc.start()
    try:
        refused(lambda: read_idx(path), f"ends after {64 << 20} of the {2**27 + 8} bytes", argument="path")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_small_gzip_file_of_a_large_one_is_not_unpacked_further_than_announced(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(zipped(idx_bytes((10,), bytes(64 << 20))))
    tracemalloc.start()
    try:
        refused(lambda: read_idx(path), "goes on after the 18 bytes", argument="path")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_data_sets_file_has_a_limit_of_its_own(tmp_path, monkeypatch):
    """A header may announce terabytes, and a small gzip file hold them."""
    monkeypatch.setattr(idx_module, "MAX_BYTES", 1 << 20)
    write(tmp_path, idx_files() | {IDX_FILES[0]: zipped(idx_bytes((10**6, 28, 28), bytes(64 << 20)))})
    tracemalloc.start()
    try:
        said = ("(1000000, 28, 28)", "at most 1048576 elements")
        refused(lambda: load("mnist", folder=tmp_path), *said)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_damaged_gzip_files_are_refused(tmp_path):
    content = zipped(idx_bytes((3, 28, 28), np.random.default_rng(0).bytes(3 * 784)))
    path = tmp_path / "file.gz"
    damages = {f"cut at {length}": content[:length] for length in range(2, len(content), 61)}
    damages |= {f"cut by {count}": content[:-count] for count in range(1, 9)}
    damages["checksum"] = content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
    damages["length"] = content[:-1] + bytes([content[-1] ^ 1])
    damages["deflate"] = content[:10] + b"\xff" * 8 + content[18:]
    damages["method"] = content[:2] + b"\x07" + content[3:]
    damages["something after it"] = content + b"something"
    for damage, written in damages.items():
        path.write_bytes(written)
        error = refused(lambda: read_idx(path), repr(str(path)), "which is damaged (", argument="path")
        assert isinstance(error.__cause__, EOFError | zlib.error | gzip.BadGzipFile), damage
    write(tmp_path, {**idx_files(), IDX_FILES[2]: damages["checksum"]})
    refused(lambda: load("mnist", folder=tmp_path), IDX_FILES[2], "CRC check failed")


def test_damaged_gzip_headers_do_not_escape(tmp_path):
    """Any byte may be wrong: an array or an ArgumentError, nothing else."""
    content = zipped(idx_bytes((2, 3), bytes(6)))
    path = tmp_path / "file"
    for position in range(len(content)):
        for mask in (1, 0x80, 0xFF):
            path.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
            try:
                assert np.array_equal(read_idx(path), np.zeros((2, 3)))  # the header's time and system
            except ArgumentError as error:
                assert len(str(error).splitlines()) == 1


# ------------------------------------------------------------------------------------- folders and their files


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_folders_that_are_none(tmp_path, name):
    refused(lambda: load(name, folder=tmp_path / "none"), repr(str(tmp_path / "none")), "does not exist")
    (tmp_path / "file").touch()
    said = (repr(str(tmp_path / "file")), "is a file", f"Give the file's folder, {str(tmp_path)!r}")
    refused(lambda: load(name, folder=tmp_path / "file"), *said)
    refused(lambda: load(name, folder=tmp_path / "file" / "below"), "does not exist")
    refused(lambda: load(name, folder="zero\0byte"), "does not exist")
    refused(lambda: load(name, folder=tmp_path / ("x" * 300)), "cannot be read (File name too long)")
    refused(lambda: load(name, folder=str(tmp_path / "two\nlines")), "two\\nlines")


@pytest.mark.parametrize("missing", [IDX_FILES[:1], IDX_FILES[3:], IDX_FILES[1:3], IDX_FILES])
def test_missing_files_are_listed(tmp_path, missing):
    write(tmp_path, {name: content for name, content in idx_files().items() if name not in missing})
    error = refused(lambda: load("mnist", folder=tmp_path), repr(str(tmp_path)), ".gz", *missing)
    for name in IDX_FILES:
        assert (name in str(error)) == (dotted(name) in str(error)) == (name in missing)


def test_paths_that_are_no_files(tmp_path):
    refused(lambda: read_idx(tmp_path), "no regular file", argument="path")
    refused(lambda: read_idx(tmp_path / "none"), "does not exist", argument="path")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: read_idx(tmp_path / "pipe"), "no regular file", argument="path")


@pytest.mark.parametrize("failing", ["open", "stat", "read"])
def test_unreadable_files_are_named(tmp_path, monkeypatch, failing):
    """Faked: root may read everything."""
    write(tmp_path, idx_files())
    path, stat = tmp_path / IDX_FILES[0], os.stat

    def no_open(name, mode):
        raise PermissionError(13, "Permission denied", str(name))

    def no_stat(name, **options):
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(name))
        return stat(name, **options)

    class BadDisk(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if failing == "stat":
            patch.setattr(os, "stat", no_stat)
        else:
            fake = no_open if failing == "open" else lambda name, mode: BadDisk()
            patch.setattr(reading_module, "open", fake, raising=False)
        reason = "Input/output error" if failing == "read" else "Permission denied"
        error = refused(lambda: load("mnist", folder=tmp_path), repr(str(path)), f"cannot be read ({reason})")
    assert ("permissions" in error.remedy) == (failing != "read")


def test_files_that_do_not_fit_together(tmp_path):
    files = idx_files()
    images, labels = IDX_FILES[:2]

    def with_files(**changed: bytes) -> Callable:
        write(tmp_path, files | changed)
        return lambda: load("mnist", folder=tmp_path)

    def with_file(name: str, content: bytes) -> Callable:
        return with_files(**{name: content})

    refused(with_file(labels, idx_bytes((4,), bytes(4))), "5 images", "4 labels", images, labels)
    refused(
        with_file(labels, idx_bytes((5,), bytes([0, 1, 9, 10, 255]))), labels, "label 10 (sample 3)", "0 to 9"
    )
    refused(with_file(images, files[labels]), images, "array (5,)", "images (N, 28, 28)", "exchanged")
    refused(with_file(labels, files[images]), labels, "array (5, 28, 28)", "labels (N)", "exchanged")
    for size in ((27, 28), (28, 27), (8, 8)):
        refused(with_files(**idx_files(size=size)), images, f"array {(5, *size)}", "images (N, 28, 28)")
    refused(with_file(images, idx_bytes((5, 784), bytes(5 * 784))), "array (5, 784)")
    refused(with_file(images, idx_bytes((5, 28, 28, 1), bytes(5 * 784))), "array (5, 28, 28, 1)")
    for name, sizes in ((images, (0, 28, 28)), (labels, (0,)), (IDX_FILES[2], (0, 28, 28))):
        refused(with_file(name, idx_bytes(sizes, b"")), name, "N >= 1")
    with_files()()  # undamaged again


# --------------------------------------------------------------------------------------- CIFAR-10 and CIFAR-100


@dataclasses.dataclass(frozen=True)
class Cifar:
    """As published; the last batch is the test part."""

    name: str
    batches: tuple[str, ...]
    subfolder: str
    archive: str
    coarse: bytes  # in front of a label
    classes: int
    biggest_bytes: int  # of a published batch

    @property
    def title(self) -> str:
        return BINARY_VERSIONS[self.name].title

    def label(self, batch: int, sample: int) -> int:
        return (37 * sample + 2 * batch + 7) % self.classes


CIFAR10 = Cifar(
    "cifar10",
    (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
    "cifar-10-batches-bin",
    "cifar-10-binary.tar.gz",
    b"",
    10,
    10000 * 3073,
)
CIFAR100 = Cifar(
    "cifar100",
    ("train.bin", "test.bin"),
    "cifar-100-binary",
    "cifar-100-binary.tar.gz",
    b"\x13",
    100,
    50000 * 3074,
)
both_cifars = pytest.mark.parametrize("cifar", [CIFAR10, CIFAR100], ids=lambda cifar: cifar.name)


def colour(batch: int, sample: int, channel: int, row: int, column: int) -> int:
    return (59 * batch + 31 * sample + 83 * channel + 7 * row + 3 * column) % 256


def batch_bytes(batch: int, samples: int) -> bytes:
    """Rows of a batch: channel planes of rows of pixels."""
    return bytes(
        colour(batch, s, channel, r, c)
        for s in range(samples)
        for channel in range(3)
        for r in range(32)
        for c in range(32)
    )


def cifar_files(cifar: Cifar = CIFAR10) -> dict[str, bytes]:
    """Batch b, the test batch too, has b + 3 samples."""
    return {
        name: b"".join(
            record(batch_bytes(b, b + 3)[3072 * n :], cifar.label(b, n), cifar) for n in range(b + 3)
        )
        for b, name in enumerate(cifar.batches)
    }


def record(pixels: bytes, label: int, cifar: Cifar = CIFAR10) -> bytes:
    return cifar.coarse + bytes([label]) + pixels[:3072]


def tar(files: dict[str, bytes], prefix: str = f"{CIFAR10.subfolder}/") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def assert_is_cifar(data: datasets.Data, cifar: Cifar = CIFAR10) -> None:
    last = len(cifar.batches) - 1
    expected = {
        "train": [(b, s) for b in range(last) for s in range(b + 3)],
        "test": [(last, s) for s in range(last + 3)],
    }
    for part, samples in expected.items():
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert x.shape == (len(samples), 3, 32, 32) and x.dtype == torch.float32 and x.is_contiguous()
        assert y.dtype == torch.int64 and y.tolist() == [cifar.label(b, s) for b, s in samples]
        bytes_ = [
            [[[colour(b, s, channel, r, c) for c in range(32)] for r in range(32)] for channel in range(3)]
            for b, s in samples
        ]
        assert torch.equal(x, torch.tensor(bytes_, dtype=torch.float32) / 255)
        assert x[0, 2, 3, 4].item() == as_float32(bytes_[0][2][3][4])


OTHER_MEMBERS = {"readme.html": b"<html>", "batches.meta": b"not read", "meta": b"not read"}
OTHER_MEMBERS |= {"deeper/test_batch.bin": b"not read", "deeper/test.bin": b"not read"}
PLACES: dict[str, Callable[[Cifar, dict[str, bytes]], dict[str, bytes]]] = {
    "folder": lambda cifar, files: files,
    "gzip": lambda cifar, files: {f"{name}.gz": zipped(content) for name, content in files.items()},
    "subfolder": lambda cifar, files: {
        f"{cifar.subfolder}/{name}": content for name, content in files.items()
    },
    "archive": lambda cifar, files: {
        cifar.archive: zipped(tar(dict(shuffled(files)) | OTHER_MEMBERS, f"{cifar.subfolder}/"))
    },
    "archive, no folder in it": lambda cifar, files: {cifar.archive: zipped(tar(files, ""))},
    "archive, dot in it": lambda cifar, files: {cifar.archive: zipped(tar(files, f"./{cifar.subfolder}/"))},
    "archive, unpacked by the browser": lambda cifar, files: {
        cifar.archive: tar(files, f"{cifar.subfolder}/")
    },
    "archive beside a part of it": lambda cifar, files: {
        cifar.archive: zipped(tar(files, f"{cifar.subfolder}/")),
        f"{cifar.subfolder}/{cifar.batches[0]}": b"cut short",
    },
    "subfolder beside a stray file": lambda cifar, files: {
        cifar.batches[-1]: b"another",
        **{f"{cifar.subfolder}/{name}": content for name, content in files.items()},
    },
}


def shuffled(files: dict[str, bytes]) -> list[tuple[str, bytes]]:
    items = list(files.items())
    return items[1::2][::-1] + items[::2]


@both_cifars
@pytest.mark.parametrize("place", PLACES)
def test_cifar_pixel_by_pixel(tmp_path, place, cifar):
    (tmp_path / cifar.subfolder).mkdir()
    write(tmp_path, PLACES[place](cifar, cifar_files(cifar)))
    before = sorted(tmp_path.rglob("*"))
    data = load(cifar.name, folder=tmp_path)
    assert_is_cifar(data, cifar)
    assert sorted(tmp_path.rglob("*")) == before
    flat = load(cifar.name, folder=tmp_path, shape="flat")
    assert flat.x_train.shape == (len(data.x_train), 3072)
    assert torch.equal(flat.x_train, data.x_train.flatten(1))


def test_both_cifars_in_one_folder(tmp_path):
    """Neither's files are taken for the other's."""
    for cifar in (CIFAR10, CIFAR100):
        write(tmp_path, PLACES["archive"](cifar, cifar_files(cifar)))
        write(tmp_path, PLACES["folder"](cifar, cifar_files(cifar)))
    for cifar in (CIFAR10, CIFAR100):
        assert_is_cifar(load(cifar.name, folder=tmp_path), cifar)


def test_cifar100_is_not_fetched(monkeypatch):
    def fetch_openml(*arguments, **options):
        raise AssertionError("something is fetched")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    said = (
        "cifar100",
        "train.bin and test.bin",
        "cifar-100-binary.tar.gz",
        "www.cs.toronto.edu/~kriz/cifar.html",
    )
    refused(lambda: load("cifar100"), *said)


def with_test_batch(folder: Path, content: bytes, cifar: Cifar = CIFAR10) -> Callable:
    write(folder, cifar_files(cifar) | {cifar.batches[-1]: content})
    return lambda: load(cifar.name, folder=folder)


@both_cifars
def test_batches_that_are_none(tmp_path, cifar):
    """Of any other length, or with a label that the data set does not have: named with sample and limit."""
    whole, size = cifar_files(cifar)[cifar.batches[-1]], len(record(bytes(3072), 0, cifar))
    named = repr(str(tmp_path / cifar.batches[-1]))
    for length in (0, 1, size - 1, size + 1, *range(5, len(whole), 997)):
        said = (
            named,
            f"with {length} bytes",
            f"records of {size} bytes, a batch of {cifar.title}",
            "download",
        )
        refused(with_test_batch(tmp_path, whole[:length], cifar), *said)
    most = record(bytes(3072), cifar.classes - 1, cifar)
    assert with_test_batch(tmp_path, most, cifar)().y_test.tolist() == [cifar.classes - 1]
    for label in (cifar.classes, 255):
        content = most + record(bytes(3072), label, cifar)
        said = (named, f"label {label} (sample 1)", f"labels 0 to {cifar.classes - 1}")
        refused(with_test_batch(tmp_path, content, cifar), *said)
    if cifar is CIFAR100:
        refused(with_test_batch(tmp_path, b"\x14" + most[1:], cifar), "label 20 (sample 0)", "labels 0 to 19")


def test_batches_of_the_other_cifar(tmp_path):
    batch = cifar_files(CIFAR10)["test_batch.bin"]
    refused(with_test_batch(tmp_path, batch, CIFAR100), "records of 3074 bytes, a batch of CIFAR-100")


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@both_cifars
def test_no_pickle_is_opened(tmp_path, cifar, monkeypatch):
    """The python version, under its own names and the binary one's, in folder and archive; the remedy is named."""
    marker = tmp_path / "marker"
    attack = pickle.dumps(Call(os.system, f"touch {marker}"))
    python = BINARY_VERSIONS[cifar.name].pickled
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, name)
    for number, files in enumerate((
        {python[0]: attack},
        {f"{python[0]}.gz": zipped(attack)},
        {f"{python[1]}/{python[0]}": attack},
        {python[2]: zipped(tar({python[0]: attack}, f"{python[1]}/"))},
    )):  # fmt: skip
        folder = tmp_path / str(number)
        (folder / python[1]).mkdir(parents=True)
        write(folder, files)
        said = ("is not opened", "take the binary version from https://www.cs.toronto.edu/~kriz/cifar.html")
        refused(lambda folder=folder: load(cifar.name, folder=folder), *said)
    refused(with_test_batch(tmp_path / "renamed", attack, cifar), f"with {len(attack)} bytes")
    assert not marker.exists()
    monkeypatch.undo()
    pickle.loads(attack)  # it works where it can
    assert marker.exists()


def test_a_header_of_an_archive_allocates_nothing(tmp_path):
    """An attribute of 64 MiB before a member, which tarfile would read whole."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 64 << 20
    write(tmp_path, {CIFAR10.archive: zipped(member.tobuf(tarfile.USTAR_FORMAT) + bytes(64 << 20))})
    tracemalloc.start()
    try:
        refused(lambda: load("cifar10", folder=tmp_path), CIFAR10.archive, "a header of 67108864 bytes")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@both_cifars
@pytest.mark.parametrize("place", ["folder", "gzip", "archive"])
def test_a_batch_far_too_large_is_not_read_whole(tmp_path, place, monkeypatch, cifar):
    version, largest = BINARY_VERSIONS[cifar.name], cifar.batches[-2]
    assert 3 * cifar.biggest_bytes < version.max_bytes < 600 << 20
    monkeypatch.setitem(BINARY_VERSIONS, cifar.name, dataclasses.replace(version, max_bytes=1 << 16))
    write(tmp_path, PLACES[place](cifar, cifar_files(cifar) | {largest: bytes(64 << 20)}))
    tracemalloc.start()
    try:
        refused(lambda: load(cifar.name, folder=tmp_path), largest, "more than 65536 bytes")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@both_cifars
def test_all_batches_missing_are_listed(tmp_path, cifar):
    names = (*cifar.batches, cifar.subfolder, cifar.archive, ".gz")
    refused(lambda: load(cifar.name, folder=tmp_path), repr(str(tmp_path)), *names)
    first = cifar.batches[0]
    write(tmp_path, {first: cifar_files(cifar)[first]})
    missing = ", ".join(cifar.batches[1:])
    refused(lambda: load(cifar.name, folder=tmp_path), f"{str(tmp_path)!r} without {missing}; needed")


def test_some_batches_missing_are_listed(tmp_path):
    files = cifar_files()
    del files["data_batch_3.bin"], files["test_batch.bin"]
    write(tmp_path, files)
    error = refused(
        lambda: load("cifar10", folder=tmp_path), "without data_batch_3.bin, test_batch.bin; needed"
    )
    assert "data_batch_1" not in str(error)
    write(tmp_path / "archived", PLACES["archive, no folder in it"](CIFAR10, files))
    said = (
        "cifar-10-binary.tar.gz' without data_batch_3.bin, test_batch.bin; needed",
        "download or unpack it again",
    )
    refused(lambda: load("cifar10", folder=tmp_path / "archived"), *said)


def test_archives_that_are_damaged_or_something_else(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    unpacked = tar(cifar_files())
    whole = zipped(unpacked)
    for length in [0, 1, 2, 5, 20, *range(100, len(whole), len(whole) // 40), len(whole) - 5, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(lambda: load("cifar10", folder=tmp_path), repr(str(path)), "damaged")
    for length in range(100, len(unpacked) - 12000, len(unpacked) // 40):
        path.write_bytes(unpacked[:length])
        refused(lambda: load("cifar10", folder=tmp_path), repr(str(path)))
    for content in (b"<!DOCTYPE html>", zipped(b"<!DOCTYPE html>" * 100), zipped(b""), zipped(whole)):
        path.write_bytes(content)
        refused(lambda: load("cifar10", folder=tmp_path), repr(str(path)))


def test_a_wrong_checksum_of_the_archive_is_noticed(tmp_path):
    """A changed pixel leaves the archive readable: only gzip's checksum, at the very end, knows."""
    content = gzip.compress(tar(cifar_files()), compresslevel=0, mtime=0)
    position = content.index(batch_bytes(2, 1)) + 100
    content = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    write(tmp_path, {"cifar-10-binary.tar.gz": content})
    refused(lambda: load("cifar10", folder=tmp_path), "CRC check failed")


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(cifar_files()["test_batch.bin"])
    files = cifar_files()
    del files["test_batch.bin"]
    buffer = io.BytesIO(tar(files))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        archive.addfile(member)
    write(tmp_path, {"cifar-10-binary.tar.gz": zipped(buffer.getvalue())})
    refused(lambda: load("cifar10", folder=tmp_path), "without test_batch.bin")


# ------------------------------------------------------------------------------------------------------ OpenML

ON_OPENML = {"mnist": "mnist_784", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR_10"}


@pytest.fixture
def openml(monkeypatch, tmp_path):
    """What fetch_openml is to return or raise, and the calls it got; data sets of 7 and 2 samples."""
    state = types.SimpleNamespace(answer=None, calls=[], home=tmp_path / "home")

    def fetch_openml(*arguments, **options):
        state.calls.append((arguments, options))
        if isinstance(state.answer, BaseException):
            raise state.answer
        return state.answer

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(state.home))
    for name in ON_OPENML:
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], rows=(7, 2)))
    return state


def table(pixels: int) -> np.ndarray:
    """float64 (9, pixels) of bytes, as scikit-learn hands it out without pandas."""
    return ((np.arange(9)[:, None] * 31 + np.arange(pixels) * 7) % 256).astype(np.float64)


LABELS = np.array(list("908172635"), dtype=object)


def test_openml_names_and_sizes():
    assert {name: SOURCES[name].openml for name in ON_OPENML} == ON_OPENML
    assert {name for name, source in SOURCES.items() if source.openml is None} == {"digits", "cifar100"}


@pytest.mark.parametrize("name", ON_OPENML)
@pytest.mark.parametrize(
    ("x_type", "labels"),
    [(np.float64, LABELS), (np.int64, LABELS.astype(str)), (np.uint8, LABELS.astype(np.int64))],
    ids=["liac-arff", "pandas", "numbers"],
)
def test_openml_value_by_value(openml, name, x_type, labels):
    channels, height, width = SOURCES[name].image_shape
    x = table(channels * height * width)
    openml.answer = x.astype(x_type), labels
    data = load(name)
    ((arguments, options),) = openml.calls
    assert arguments == (ON_OPENML[name],) and options["version"] == 1 and options["as_frame"] is False
    assert data.x_train.shape == (7, channels, height, width) and data.x_test.shape[0] == 2
    assert data.y_train.tolist() == [9, 0, 8, 1, 7, 2, 6] and data.y_test.tolist() == [3, 5]
    assert {t.dtype for t in data} == {torch.float32, torch.int64}
    for part, rows in ((data.x_train, range(7)), (data.x_test, range(7, 9))):
        for image, row in zip(part.tolist(), rows, strict=True):
            values = [value for channel in image for line in channel for value in line]
            assert values == [as_float32(int(byte)) for byte in x[row]]
    flat = load(name, shape="flat")
    assert torch.equal(flat.x_train, data.x_train.flatten(1))
    assert not openml.home.exists()


def test_openml_tables_of_many_rows_are_converted_in_pieces(openml, monkeypatch):
    rows = 2 * openml_module.ROWS_AT_ONCE + 5
    monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(SOURCES["mnist"], rows=(rows - 3, 3)))
    x = np.random.default_rng(0).integers(0, 256, (rows, 784), dtype=np.uint8)
    openml.answer = x, np.arange(rows) % 10
    data = load("mnist", shape="flat")
    assert np.array_equal(torch.cat([data.x_train, data.x_test]).mul(255).round().numpy(), x)
    assert torch.equal(torch.cat([data.y_train, data.y_test]), torch.arange(rows) % 10)
    late = x.astype(np.int16)
    late[-1, -1] = 256
    openml.answer = late, np.arange(rows) % 10
    refused(lambda: load("mnist"), "pixels are not whole numbers from 0 to 255", argument="data")


@pytest.mark.parametrize(("pandas", "parser"), [(types.ModuleType("pandas"), "auto"), (None, "liac-arff")])
def test_openml_needs_no_pandas(openml, monkeypatch, pandas, parser):
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    openml.answer = table(784), LABELS
    load("mnist")
    assert openml.calls[0][1]["parser"] == parser


class ArffException(Exception):
    """liac-arff's errors derive from nothing more specific."""


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "Name or service not known"),
        (
            urllib.error.HTTPError("https://openml.org", 503, "Service Unavailable", {}, io.BytesIO()),
            "HTTPError: HTTP Error 503: Service Unavailable",
        ),
        (http.client.IncompleteRead(b"x" * 10, 90), "IncompleteRead(10 bytes read, 90 more expected)"),
        (http.client.RemoteDisconnected("closed without response"), "closed without response"),
        (TimeoutError("timed out"), "TimeoutError: timed out"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (EOFError("Compressed file ended before the end-of-stream marker was reached"), "EOFError: Compressed"),
        (zlib.error("Error -3 while decompressing data"), "Error -3 while decompressing data"),
        (gzip.BadGzipFile("CRC check failed"), "BadGzipFile: CRC check failed"),
        (ValueError("md5 checksum of local file\nis wrong:\r\n  re-download"), "of local file is wrong: re-download"),
        (ArffException("Bad @DATA instance format in line 9"), "Bad @DATA"),
        (KeyError("data"), "KeyError: 'data'"),
        (MemoryError(), "(MemoryError)"),
        (ValueError("x" * 5000), "xxx..."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_openml_failures_are_one_line(openml, failure, said):
    openml.answer = failure
    remedies = ("Try again", repr(str(openml.home)), "folder that holds", "t10k-labels-idx1-ubyte")
    error = refused(lambda: load("mnist"), '"mnist_784" version 1', said, *remedies, argument="data")
    assert error.__cause__ is failure and len(str(error)) < 1000
    refused(lambda: load("cifar10"), '"CIFAR_10"', "cifar-10-binary.tar.gz", argument="data")


def test_ctrl_c_passes_through_a_download(openml):
    openml.answer = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load("mnist")


def test_a_data_home_that_cannot_be_made_is_no_second_error(openml):
    openml.home.write_text("a file where the folder should be")
    openml.answer = FileExistsError(17, "File exists", str(openml.home))
    refused(lambda: load("mnist"), "File exists", "scikit-learn's data home", argument="data")


def test_what_openml_sends_is_checked(openml):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    good = table(784)

    def with_value(value: float) -> np.ndarray:
        changed = good.copy()
        changed[8, 783] = value
        return changed

    def with_label(label) -> np.ndarray:
        changed = LABELS.copy()
        changed[8] = label
        return changed

    not_whole = "pixels are not whole numbers from 0 to 255"
    for x, said in [
        (good[:8], "an array (8, 784) where an array (9, 784) was expected"),
        (good[:, 1:], "an array (9, 783)"),
        (good.reshape(9, 28, 28), "an array (9, 28, 28)"),
        (None, "a NoneType"),
        (scipy_sparse.csr_array(good), "a csr_array"),
        (good.astype(str).astype(object) + "x", "pixels are not numbers"),
        *((with_value(value), not_whole) for value in (-1, 256, 0.5, 1e300, np.nan, np.inf, -np.inf)),
    ]:
        openml.answer = x, LABELS
        refused(lambda: load("mnist"), said, "folder that holds", argument="data")
    for y, said in [
        (LABELS[:8], "its labels came as an array (8,)"),
        (LABELS[:, None], "its labels came as an array (9, 1)"),
        (None, "its labels came as a NoneType"),
        *((with_label(label), "labels are not whole numbers from 0 to 9") for label in ("10", "-1", "1.5", "nan")),
        *((with_label(label), "labels are not numbers") for label in ("cat", "", [3])),
        (with_label(None), "labels are not"),
    ]:  # fmt: skip
        openml.answer = good, y
        refused(lambda: load("mnist"), said, argument="data")
    openml.answer = good, LABELS
    assert load("mnist").y_test.tolist() == [3, 5]


def test_openml_without_scikit_learn_names_the_remedies(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "pcfast\[train\]".*folder'):
        load("mnist")
