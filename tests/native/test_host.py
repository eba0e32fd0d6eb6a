"""The tile operations on the CPU: each against numpy, and a planted fault for everything a host build must report."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from native_build import CSRC, needs_gcc, once, shared_folder

HERE = Path(__file__).parent / "host"

STRICT = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
LIBRARY = ["-O1", "-fPIC", "-shared"]
MODES = {
    "plain": ["-O1"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}

DEADLOCK, MISALIGNED, NOT_SHARED, EARLY_CHANGE, TOO_LARGE = range(66, 71)
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # CUDA's
RACE = 77  # ThreadSanitizer's own is 66

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4  # of a lane, as the PTX manual names them

pytestmark = needs_gcc


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A function that compiles a program once, for all of the workers."""
    folder = shared_folder(tmp_path_factory, "host_builds")

    def compiled(source, flags, name):
        target = folder / name

        def compile_it():
            command = ["g++", *STRICT, *flags, str(HERE / source), "-o", str(target)]
            outcome = subprocess.run(command, capture_output=True, text=True)
            assert outcome.returncode == 0, outcome.stderr

        return once(target, compile_it)

    return compiled


def load(path):
    library = ctypes.CDLL(str(path))
    library.message.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def operations(build):
    return load(build("operations.cpp", LIBRARY, "operations.so"))


@pytest.fixture(scope="session")
def faults(build):
    return load(build("faults.cpp", LIBRARY, "faults.so"))


def at(array):
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def bf16_bits(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint32)


def random_numbers(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cut(values, bits):
    """Without the last bits of the fraction."""
    return (values.view(np.uint32) >> bits << bits).view(np.float32)


# ---- matrix products


def accumulator_places():
    """(lane, element) -> row and column of d; the PTX manual's formula."""
    element = np.arange(4)
    rows = GROUP[:, None] + np.where(element < 2, 0, 8)
    columns = MEMBER[:, None] * 2 + (element & 1)
    return rows, columns


def product_in_order(a, b, d):
    """Added from first to last in float32, and then to d."""
    total = np.zeros_like(d)
    for k in range(a.shape[1]):
        total = total + a[:, k, None] * b[k]
    return d + total


def matrices(seed, depth, bits, integers):
    if integers:  # everything is exact, and no two elements agree by chance
        generator = np.random.default_rng(seed)
        draw = [generator.integers(-100, 100, s) for s in ((16, depth), (depth, 8), (16, 8))]
        return [m.astype(np.float32) for m in draw]
    return [
        cut(random_numbers(seed, (16, depth)), bits),
        cut(random_numbers(seed + 1, (depth, 8)), bits),
        random_numbers(seed + 2, (16, 8)),
    ]


@pytest.mark.parametrize("integers", [True, False])
def test_mma_bf16(operations, integers):
    a, b, d = matrices(10, depth=16, bits=16, integers=integers)
    # The manual counts eight elements a0 .. a7 of a lane. Two share a register, the first in its lower half.
    i = np.arange(8)
    a_rows = GROUP[:, None] + np.where((i // 2) % 2 == 0, 0, 8)
    a_columns = MEMBER[:, None] * 2 + (i & 1) + np.where(i < 4, 0, 8)
    i = np.arange(4)
    b_rows = MEMBER[:, None] * 2 + (i & 1) + np.where(i < 2, 0, 8)
    b_columns = np.broadcast_to(GROUP[:, None], b_rows.shape)

    def pairs(elements):
        return np.ascontiguousarray(elements[:, 0::2] | elements[:, 1::2] << 16)

    a_registers = pairs(bf16_bits(a[a_rows, a_columns]))
    b_registers = pairs(bf16_bits(b[b_rows, b_columns]))
    registers = np.ascontiguousarray(d[accumulator_places()])
    assert operations.multiply_bf16(at(registers), at(a_registers), at(b_registers)) == 0
    result = np.empty_like(d)
    result[accumulator_places()] = registers
    np.testing.assert_array_equal(result, product_in_order(a, b, d))
    np.testing.assert_allclose(result, d.astype(float) + a.astype(float) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("integers", [True, False])
def test_mma_tf32(operations, integers):
    a, b, d = matrices(20, depth=8, bits=13, integers=integers)
    i = np.arange(4)
    a_rows = GROUP[:, None] + np.where(i % 2 == 0, 0, 8)
    a_columns = MEMBER[:, None] + np.where(i < 2, 0, 4)
    b_rows = MEMBER[:, None] + 4 * np.arange(2)
    b_columns = np.broadcast_to(GROUP[:, None], b_rows.shape)
    ignored = np.uint32(0x1ABC)
    a_registers = np.ascontiguousarray(a[a_rows, a_columns].view(np.uint32) | ignored)
    b_registers = np.ascontiguousarray(b[b_rows, b_columns].view(np.uint32) | ignored)
    registers = np.ascontiguousarray(d[accumulator_places()])
    assert operations.multiply_tf32(at(registers), at(a_registers), at(b_registers)) == 0
    result = np.empty_like(d)
    result[accumulator_places()] = registers
    np.testing.assert_array_equal(result, product_in_order(a, b, d))
    np.testing.assert_allclose(result, d.astype(float) + a.astype(float) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrix(operations, count, transposed):
    generator = np.random.default_rng(count)
    rows = generator.permutation(32 * 8).astype(np.uint16).reshape(32, 8)
    order = generator.permutation(32).astype(np.int32)
    tiles = rows[order].reshape(4, 8, 8)
    order[8 * count :] = 1 << 20  # nobody reads through the other lanes' addresses
    registers = np.zeros((32, count), np.uint32)
    assert operations.load_matrix(count, int(transposed), at(registers), at(rows), at(order)) == 0
    for lane in range(32):
        for m in range(count):
            tile = tiles[m].T if transposed else tiles[m]
            low, high = (int(e) for e in tile[lane // 4, 2 * (lane % 4) :][:2])
            assert registers[lane, m] == low + (high << 16)


# ---- lanes


@pytest.mark.parametrize("kind", ["float", "double", "int"])
@pytest.mark.parametrize("mask", [1, 5, 16, 31])
def test_shuffles(operations, kind, mask):
    dtype = {"float": np.float32, "double": np.float64, "int": np.int32}[kind]
    generator = np.random.default_rng(mask)
    values = (1000 * generator.standard_normal(32)).astype(dtype)
    sources = generator.integers(0, 64, 32).astype(np.int32)  # counted modulo 32
    results = np.zeros((32, 4), dtype)
    assert getattr(operations, f"shuffle_{kind}")(at(results), at(values), at(sources), mask) == 0
    total = values
    for apart in (16, 8, 4, 2, 1):
        total = total + total[LANES ^ apart]
    np.testing.assert_array_equal(results[:, 0], values[sources % 32])
    np.testing.assert_array_equal(results[:, 1], values[LANES ^ mask])
    np.testing.assert_array_equal(results[:, 2], total)
    np.testing.assert_array_equal(results[:, 3], values.max())


def test_atomics(operations):
    results = np.zeros(2, np.int32)
    assert operations.accumulate(at(results), 3, 70, 5) == 0
    assert results.tolist() == [70 * (1 + 2 + 3), -5]


@pytest.mark.parametrize(
    "grid, block", [((2, 3, 4), (5, 3, 2)), ((7, 1, 1), (33, 1, 1)), ((1, 1, 1), (1024, 1, 1))]
)
def test_every_thread_runs_in_its_place(operations, grid, block):
    blocks, threads = np.prod(grid), np.prod(block)
    places = np.full((blocks, threads, 6), 99, np.uint32)
    shape = np.array(grid, np.uint32), np.array(block, np.uint32)
    assert operations.locate(at(places), at(shape[0]), at(shape[1]), ctypes.c_size_t(0)) == 0
    for i, extent in enumerate(shape):
        x, y, z = (int(e) for e in extent)
        part = places[:, :, 3 * i : 3 * i + 3]
        number = part[..., 0] + x * (part[..., 1] + y * part[..., 2])
        expected = np.arange(x * y * z).reshape((-1, 1) if i == 0 else (1, -1))
        np.testing.assert_array_equal(number, np.broadcast_to(expected, number.shape))
        assert (part < extent).all()


@pytest.mark.parametrize(
    "block, shared_bytes, status",
    [
        (1025, 0, INVALID_CONFIGURATION),
        (0, 0, INVALID_CONFIGURATION),
        (32, 2 * 227 * 1024, 0),  # twice the GPU's: for doubles
        (32, 2 * 227 * 1024 + 1, INVALID_VALUE),
    ],
)
def test_impossible_shapes_are_refused(operations, block, shared_bytes, status):
    places = np.zeros((32, 6), np.uint32)
    shape = np.array([1, 1, 1], np.uint32), np.array([block, 1, 1], np.uint32)
    assert operations.locate(at(places), at(shape[0]), at(shape[1]), ctypes.c_size_t(shared_bytes)) == status


def test_two_threads_launch_at_a_time(operations):
    def count(results):
        for _ in range(20):
            assert operations.accumulate(at(results), 3, 64, 0) == 0

    results = [np.zeros(2, np.int32) for _ in range(2)]
    workers = [threading.Thread(target=count, args=(r,)) for r in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [r[0] for r in results] == [20 * 64 * 6] * 2


# ---- copies


@pytest.mark.parametrize("width", [4, 8, 16])
def test_copies_arrive_at_the_wait(operations, width):
    generator = np.random.default_rng(width)
    source = generator.integers(0, 200, (2, 32, width)).astype(np.uint8)
    valid = generator.integers(0, 2, 32).astype(np.int32)
    seen = np.zeros((3, 2, 32, width), np.uint8)
    assert operations.copy(width, at(seen), at(source), at(valid)) == 0
    nothing = 0xFF
    second = np.where(valid[:, None] == 1, source[1], 0)
    assert (seen[0] == nothing).all()
    np.testing.assert_array_equal(seen[1, 0], source[0])
    assert (seen[1, 1] == nothing).all()
    np.testing.assert_array_equal(seen[2, 0], source[0])
    np.testing.assert_array_equal(seen[2, 1], second)


# ---- conversions


def converted(operations, bits):
    values = np.asarray(bits, np.uint32)
    bf16, tf32, packed = (np.zeros(len(values), t) for t in (np.uint16, np.uint32, np.uint32))
    assert operations.convert(at(bf16), at(tf32), at(packed), at(values), len(values)) == 0
    np.testing.assert_array_equal(packed, bf16.astype(np.uint32) | bf16[::-1].astype(np.uint32) << 16)
    return bf16, tf32


BF16_PATTERNS = {
    0x3F808000: 0x3F80,  # ties go to even
    0x3F818000: 0x3F82,
    0x3F807FFF: 0x3F80,
    0x3F808001: 0x3F81,
    0xBF818000: 0xBF82,
    0x7F7F7FFF: 0x7F7F,
    0x7F7F8000: 0x7F80,  # past the largest
    0x7F800000: 0x7F80,
    0xFF800000: 0xFF80,
    0x7FC00000: 0x7FFF,
    0x7F800001: 0x7FFF,
    0xFFFFFFFF: 0x7FFF,
    0x00000000: 0x0000,
    0x80000000: 0x8000,
    0x00000001: 0x0000,  # denormal numbers
    0x00008000: 0x0000,
    0x00008001: 0x0001,
    0x00018000: 0x0002,
    0x007FFFFF: 0x0080,
}

TF32_PATTERNS = {
    0x3F801000: 0x3F802000,  # ties go away from zero
    0xBF801000: 0xBF802000,
    0x3F803000: 0x3F804000,
    0x3F800FFF: 0x3F800000,
    0x3FFFF000: 0x40000000,
    0x7F7FEFFF: 0x7F7FE000,
    0x7F7FF000: 0x7F800000,  # past the largest
    0x7F800000: 0x7F800000,
    0xFF800000: 0xFF800000,
    0x7FC01234: 0x7FC00000,
    0xFFFFFFFF: 0xFFFFE000,
    0x7F800001: 0x7F800000,  # what the instruction makes of such a NaN
    0x80000000: 0x80000000,
    0x00000FFF: 0x00000000,  # denormal numbers
    0x00001000: 0x00002000,
    0x007FF000: 0x00800000,
}


def test_bf16_patterns(operations):
    bf16, _ = converted(operations, list(BF16_PATTERNS))
    assert [hex(b) for b in bf16] == [hex(b) for b in BF16_PATTERNS.values()]


def test_tf32_patterns(operations):
    _, tf32 = converted(operations, list(TF32_PATTERNS))
    assert [hex(b) for b in tf32] == [hex(b) for b in TF32_PATTERNS.values()]


def test_conversions_of_many_numbers(operations):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 5000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    bits, values = bits[np.isfinite(values)], values[np.isfinite(values)]
    bf16, tf32 = converted(operations, bits)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bf16, expected)
    # In double, rounding to steps of 2**-10 of the leading bit; denormal numbers share the smallest one's.
    exact = np.abs(values.astype(np.float64))
    leading = np.maximum(np.frexp(exact)[1] - 1, -126)
    step = np.ldexp(1.0, leading - 10)
    rounded = np.copysign(np.floor(exact / step + 0.5) * step, values)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(tf32, rounded.astype(np.float32).view(np.uint32))


# ---- faults that a launch reports


@pytest.fixture
def arrays():
    """Output and input of 64 numbers, the latter at a multiple of 16 bytes."""
    start = np.zeros(64 + 3, np.float32)
    first = -start.ctypes.data % 16 // 4
    source = start[first : first + 64]
    source[:] = np.arange(64) + 1
    return np.zeros(64, np.float32), source


FAULTS = [
    ("barrier_in_a_branch", DEADLOCK, r"^block \(0, 0, 0\): deadlock: 40 of 64 threads wait at __syncthreads "
     r"\(.*faults\.cpp:\d+\), thread 0 first; returned: 24$"),
    ("two_barriers", DEADLOCK, r"thread 32: __syncthreads \(.*\): deadlock: thread 0 waits at another, __syncthr"),
    ("returned_early", DEADLOCK, "63 of 64 threads wait at __syncthreads .*, thread 0 first; returned: 1$"),
    ("more_barriers_in_one_warp", DEADLOCK, "32 of 64 threads wait at .*, thread 32 first; returned: 32$"),
    ("shuffle_in_a_branch", DEADLOCK, r"32 of 64 threads wait at __shfl_xor_sync "
     r"\(.*faults\.cpp:\d+\), thread 0 first; returned: 32$"),
    ("shuffle_in_a_broken_warp", DEADLOCK, "thread 32: __shfl_xor_sync .*: the warp has fewer than 32 threads"),
    ("wait_for_different_things", DEADLOCK, "32 of 64 .* __syncthreads .*; returned: 31, waiting elsewhere: 1$"),
    ("misaligned_source", MISALIGNED, "thread 0: copy_async .* not a multiple of 16 bytes"),
    ("misaligned_target", MISALIGNED, "copy_async .* not a multiple of 8 bytes"),
    ("misaligned_row", MISALIGNED, "load_matrix .* not a multiple of 16 bytes"),
    ("copy_past_the_end", NOT_SHARED, "thread 63: copy_async .* outside the block's shared memory"),
    ("row_outside", NOT_SHARED, "thread 0: load_matrix .* outside the block's shared memory"),
    ("source_changes", EARLY_CHANGE, "source of an asynchronous copy changed before its copy_wait"),
]  # fmt: skip


@pytest.mark.parametrize("name, status, message", FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_ends_the_launch_with_a_reason(faults, arrays, name, status, message):
    out, source = arrays
    assert faults.run(name.encode(), at(out), at(source)) == status
    assert re.search(message, faults.message().decode())
    # and the next launch is none the worse
    assert faults.run(b"none", at(out), at(source)) == 0
    np.testing.assert_array_equal(out, np.arange(64)[::-1])


@pytest.mark.parametrize("name", ["no_wait", "no_commit", "never_written"])
def test_shared_memory_without_a_value_is_nan(faults, arrays, name):
    out, source = arrays
    assert faults.run(name.encode(), at(out), at(source)) == 0
    assert np.isnan(out).all()


# ---- a whole kernel


@pytest.fixture(scope="session")
def example(build):
    def run(mode, fault):
        path = build("example.cpp", MODES[mode], f"example_{mode}")
        environment = os.environ | {"TSAN_OPTIONS": f"exitcode={RACE} history_size=7"}
        return subprocess.run([path, fault], capture_output=True, text=True, env=environment, timeout=60)

    return run


def line_of(comment):
    """The number of the only line of the example that ends in this comment."""
    lines = (HERE / "example.cpp").read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.endswith(f"  // {comment}")]
    return number


def own_lines(report):
    """The innermost line of the example in each stack of a ThreadSanitizer report."""
    stacks = re.split(r"\n\s*\n", report)
    result = [re.search(r"relax.*example\.cpp:(\d+)", stack) for stack in stacks]
    return {int(match[1]) for match in result if match}


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_is_right_and_clean(example, mode):
    outcome = example(mode, "none")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert re.fullmatch(r"error \S+e-0\d, handled 1184\n", outcome.stdout)


def test_many_blocks(example):
    assert example("plain", "many_blocks").returncode == 0
    outcome = example("thread", "many_blocks")
    assert outcome.returncode == TOO_LARGE
    assert "launch fewer blocks" in outcome.stderr


@pytest.mark.parametrize(
    "fault, lines",
    [
        ("no_barrier", {"writes activities", "reads activities"}),
        ("no_last_barrier", {"writes activities", "reads activities"}),
        ("shuffle_barrier", {"hands over a count", "takes over a count"}),
        ("not_atomic", {"adds up"}),
    ],
)
def test_a_race_is_reported_with_both_lines(example, fault, lines):
    outcome = example("thread", fault)
    assert outcome.returncode == RACE
    races = [r for r in outcome.stderr.split("==================") if "data race" in r]
    assert {line_of(comment) for comment in lines} in [own_lines(race) for race in races]


@pytest.mark.parametrize(
    "fault, kind, comment",
    [
        ("no_bounds_check", "heap-buffer-overflow", "writes x"),
        ("past_shared", "heap-buffer-overflow", "past the end"),
        ("into_gap", "use-after-poison", "in the gap"),
    ],
)
def test_an_access_out_of_bounds_is_reported_with_its_line(example, fault, kind, comment):
    outcome = example("address", fault)
    assert outcome.returncode != 0
    assert f"AddressSanitizer: {kind}" in outcome.stderr
    assert re.search(rf"#0 .* in relax .*example\.cpp:{line_of(comment)}\n", outcome.stderr)


@pytest.mark.parametrize("mode", ["plain", "address"])
@pytest.mark.parametrize("fault, status", [("branch", DEADLOCK), ("misaligned", MISALIGNED)])
def test_an_error_passes_through_the_fibers(example, mode, fault, status):
    outcome = example(mode, fault)
    assert outcome.returncode == status
    assert "example.cpp:" in outcome.stderr
    assert "Sanitizer" not in outcome.stderr


def test_a_missing_wait_shows(example):
    outcome = example("plain", "no_wait")
    assert outcome.returncode == 1
    assert outcome.stdout.startswith("error nan")


# ---- the same source on the device

INSTRUCTIONS = [
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    *[f"ldmatrix.sync.aligned.m8n8.x{n}{t}.shared.b16" for n in (1, 2, 4) for t in ("", ".trans")],
    "cp.async.cg.shared.global",
    "cp.async.ca.shared.global",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "cvt.rna.tf32.f32",
    "cvt.rn.bf16x2.f32",
    "cvt.rn.bf16.f32",
    "shfl.sync.idx",
    "shfl.sync.bfly",
    "bar.warp.sync",
]
# An instruction set spells them in one way or another.
EITHER = [
    ("bar.sync", "barrier.sync"),
    ("atom.global.add", "red.global.add"),
    ("atom.global.min", "red.global.min"),
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("chip", ["80", "90a", "100a", "120a"])
def test_nvcc_compiles_every_operation(chip, tmp_path):
    command = [
        "nvcc", "-std=c++17", f"-gencode=arch=compute_{chip},code=sm_{chip}", "-Werror", "all-warnings",
        "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v", "--keep", "--keep-dir", str(tmp_path),
        f"-I{CSRC}", "-c", str(HERE / "every_operation.cu"), "-o", str(tmp_path / "every_operation.o"),
    ]  # fmt: skip
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert f"for 'sm_{chip}'" in outcome.stderr
    assert "bytes spill" in outcome.stderr
    assert re.findall(r"[1-9]\d* bytes spill", outcome.stderr) == []
    assert list(tmp_path.glob("*.cubin"))
    (ptx,) = tmp_path.glob("*.ptx")
    text = ptx.read_text()
    assert [name for name in INSTRUCTIONS if name not in text] == []
    assert [names for names in EITHER if not any(name in text for name in names)] == []
