"""The resident kernel under ThreadSanitizer and AddressSanitizer: silent as it is, and every planted bug is reported.

Its arguments are those of real relaxations, recorded at the launch; the programs that run them give the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from native_build import CSRC, build, needs_gcc, once, shared_folder
from torch import nn

import pcfast
from pcfast.backends.cuda import native
from pcfast.backends.cuda import shared_memory as placement
from pcfast.backends.cuda.geometry import MAX_LAYERS
from pcfast.backends.cuda.kernel_params import OPERANDS, Program, RunParams, Tensors
from pcfast.precision import switched
from pcfast.problem import plan as planning

pytestmark = needs_gcc
HERE = Path(__file__).parent / "host"
COMPILE = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{HERE}"]
SANITIZERS = {
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
RACE = 77  # ThreadSanitizer's own is 66, as is a deadlock's
THREADS = 96  # of a block: ThreadSanitizer's time grows with the square of them all
GAP = 64  # numbers between two arrays


# ---- recorded launches


@dataclasses.dataclass
class Launch:
    """One call of the kernel: its arguments, what its tensors held before it, and after.

    Attributes:
        gaps: (first byte, bytes) of shared memory between two arrays.
    """

    program: bytes
    run: bytes
    scalar_bytes: int
    gaps: list[tuple[int, int]]
    before: list[bytes | None]
    after: list[bytes | None]

    def write(self, path: Path) -> None:
        flat = [number for gap in self.gaps for number in gap]
        with path.open("wb") as file:
            file.write(struct.pack(f"<3i{len(flat)}i", self.scalar_bytes, THREADS, len(self.gaps), *flat))
            file.write(self.program + self.run)
            for tensor in self.before:
                file.write(struct.pack("<q", -1 if tensor is None else len(tensor)) + (tensor or b""))


def sizes(program: Program, run: RunParams, scalar_bytes: int) -> list[int]:
    """Bytes of every tensor of csrc/resident/program.h, where it is given."""
    layers = [program.layers[l] for l in range(MAX_LAYERS)]
    inner = [run.batch * layer.channels * layer.height * layer.width * scalar_bytes for layer in layers]
    out = [run.batch * layer.size * scalar_bytes for layer in layers]
    rows, classes = run.batch * scalar_bytes, program.classes * scalar_bytes
    result = dict(
        weight=[
            layer.channels * layer.weight_inputs * (2 if layer.operand == OPERANDS["bf16"] else scalar_bytes)
            for layer in layers
        ],
        bias=[layer.channels * scalar_bytes for layer in layers],
        start=out, vhat_1=out[0], uhat_2=inner[1], labels=8 * run.batch, target=run.batch * classes,
        class_weight=classes, step_sizes=run.iterations * scalar_bytes,
        vhat=out, belief=out, error=out, local_error=inner, loss_rows=rows,
        output_gradient=run.batch * classes, gram_sum=inner[1], gram_sum_before=inner[1], first_bad=4 * program.depth,
    )  # fmt: skip
    given = [result[name] for name, _ in Tensors._fields_]
    return [size for sizes in given for size in (sizes if isinstance(sizes, list) else [sizes])]


def recorded(host_module: Path, relax: Callable[[], object]) -> Launch:
    """The launch of ``relax``, with gaps between the arrays."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.ON_HOST, str(host_module))
        module = native.load()
        launch = module.resident
        add, gaps = placement._Memory.add, []

        def apart(memory, *arguments, **keywords):
            first = add(memory, *arguments, **keywords)
            gaps.append((memory.elements, memory.arrays))
            memory.elements += GAP
            return first

        def record(program, tensors, run, scalar_bytes, threads, stream):
            what = Program.from_buffer_copy(program)
            given = sizes(what, RunParams.from_buffer_copy(run), scalar_bytes)
            pointers = (ctypes.c_void_p * len(given)).from_buffer_copy(tensors)

            def read() -> list[bytes | None]:
                return [
                    None if pointer is None else ctypes.string_at(pointer, size)
                    for pointer, size in zip(pointers, given, strict=True)
                ]

            before = read()
            status = launch(program, tensors, run, scalar_bytes, threads, stream)
            placed = arrays_of(what.elements)
            between = [(scalar_bytes * (a.first + a.elements), scalar_bytes * GAP) for a in placed]
            seen.append(Launch(program, run, scalar_bytes, between, before, read()))
            return status

        def arrays_of(elements: int) -> list[placement.Array]:
            return next(arrays for at, arrays in reversed(gaps) if at + GAP == elements)

        patch.setattr(placement._Memory, "add", apart)
        patch.setattr(module, "resident", record)
        placement.place.cache_clear()
        planning.plan.cache_clear()
        relax()
        placement.place.cache_clear()
    (one,) = seen
    return one


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 9, 3), nn.Tanh()),
        nn.Sequential(nn.Conv2d(9, 5, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.Linear(20, 13), nn.GELU()),
        nn.Sequential(nn.Linear(13, 7), nn.SiLU()),
        nn.Linear(7, 3),
    )


def strided_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Conv2d(3, 7, (3, 2), stride=2, padding=1), nn.AvgPool2d(2), nn.Sigmoid()),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(28, 5), nn.LeakyReLU()),
        nn.Linear(5, 4),
    )


def mlp() -> nn.Sequential:
    widths = (6, 33, 17, 5, 3)
    hidden = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*hidden, nn.Linear(*widths[-2:]))


#: name -> (network, shape of a sample, iterations, whether from given beliefs on, precision, loss)
CASES = {
    "gram conv": (conv_net, (1, 7, 7), 7, False, "ieee", "cross_entropy"),
    "strides": (strided_net, (2, 8, 7), 6, False, "ieee", "mse"),
    "mlp from starts": (mlp, (6,), 3, True, "ieee", "cross_entropy"),
    "no iterations": (mlp, (6,), 0, True, "ieee", "mse"),
    "double": (conv_net, (1, 7, 7), 5, False, "fp64", "mse"),
    "gram conv in tf32": (conv_net, (1, 7, 7), 6, False, "tf32", "cross_entropy"),
    "strides in tf32": (strided_net, (2, 8, 7), 3, True, "tf32", "mse"),
    "gram conv in bf16": (conv_net, (1, 7, 7), 6, False, "bf16", "mse"),
    "strides in bf16": (strided_net, (2, 8, 7), 3, True, "bf16", "cross_entropy"),
    "mlp in bf16": (mlp, (6,), 5, True, "bf16", "cross_entropy"),
    "gram conv with momentum": (conv_net, (1, 7, 7), 6, False, "ieee", "mse"),
    "diverging": (mlp, (6,), 4, True, "ieee", "cross_entropy"),
}
SAMPLES, BATCH = 2, 5  # three blocks, the last with a sample too few


def launch_of(name: str, host_module: Path) -> Launch:
    make, shape, num_steps, starts, precision, loss = CASES[name]
    torch.manual_seed(8)
    model = make()
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model, x = model.to(dtype), torch.randn(BATCH, *shape, dtype=dtype)
    vhat = pcfast.relax(
        model, x, torch.zeros(BATCH, dtype=torch.long), num_steps=0, backend="eager"
    ).activations
    y = (
        torch.randint(0, vhat[-1].shape[1], (BATCH,))
        if loss == "cross_entropy"
        else torch.randn_like(vhat[-1])
    )
    vinit = [None, *(v + 0.3 * torch.randn_like(v) for v in vhat[1:])] if starts else None
    if name == "diverging":
        vinit[2].fill_(float("inf"))
    choose = planning.choose_gram
    switch = {
        "tf32": lambda: switched(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(precision, lambda: torch.no_grad())
    arguments = dict(loss=loss, num_steps=num_steps, vinit=vinit, backend="cuda", check="off")
    if name.endswith("with momentum"):
        arguments["belief_optimizer"] = pcfast.GradientDescent(momentum=0.6)
        arguments["step_size"] = tuple(0.3 * 0.9**t for t in range(num_steps))
    with pytest.MonkeyPatch.context() as patch, switch(), torch.enable_grad():
        patch.setattr(placement, "SAMPLES", (SAMPLES,))
        if name.startswith("gram"):
            patch.setattr(
                planning, "choose_gram", lambda *a: (choose(*a)[1].endswith("without"), "asked for")
            )
        result = recorded(host_module, lambda: pcfast.pc_loss(model, x, y, **arguments))
    planning.plan.cache_clear()
    what = Program.from_buffer_copy(result.program)
    assert bool(what.layers[1].gram) == name.startswith("gram")
    assert RunParams.from_buffer_copy(result.run).batch == BATCH and what.samples == SAMPLES
    return result


@pytest.fixture(scope="session")
def launches(host_module) -> Callable[[str], Launch]:
    result: dict[str, Launch] = {}

    def get(name: str) -> Launch:
        if name not in result:
            result[name] = launch_of(name, host_module)
        return result[name]

    return get


# ---- programs

#: Bugs that PLANTED switches on by name. name -> (file, what stands there, what takes its place)
BUGS = {
    "weights read past their end": (
        "resident/memory.cuh",
        "return static_cast<const Real*>(from)[i];",
        "return static_cast<const Real*>(from)[i + {planted}];",
    ),
    "a sum written past its end": (
        "resident/memory.cuh",
        "ctx.tensors.gram_sum, 0, inner, i)",
        "ctx.tensors.gram_sum, 0, inner, i + {planted})",
    ),
    "zeros past the end of shared memory": (
        "resident/memory.cuh",
        "i < program.elements;",
        "i < program.elements + {planted};",
    ),
    "a row of weights too many": (
        "resident/products.cuh",
        "memory + product.weights + min(row + i * kWarpSize, product.out - 1)",
        "memory + product.weights + min(row + i * kWarpSize, product.out - 1 + {planted})",
    ),
    "a row of the prediction too many": (
        "resident/products.cuh",
        "if (i < rows) out[i]",
        "if (i < rows + {planted}) out[i]",
    ),
    "a position of the map too many": (
        "resident/products.cuh",
        "if (p >= positions) continue;",
        "if (p >= positions + {planted}) continue;",
    ),
    "a sample too many": (
        "resident/matrix_products.cuh",
        "if (n >= samples) continue;",
        "if (n >= samples + {planted}) continue;",
    ),
    "iterations noted without an atomic": (
        "resident/tail.cuh",
        "atomicMin(ctx.tensors.first_bad + layer - 1, ctx.iteration);",
        "{planted} ? ctx.tensors.first_bad[layer - 1] = ctx.iteration\n: "
        "atomicMin(ctx.tensors.first_bad + layer - 1, ctx.iteration);",
    ),
    "halos that are not zeroed": (
        "resident/memory.cuh",
        "memory[i] = Real(0);",
        "if (!{planted}) memory[i] = Real(0);",
    ),
}
#: Makes them possible, and one more for every barrier, named by its file and line, which stays where it was.
CHOICE = """#pragma once
#include <cstdlib>
#include <cstring>
#include <string>
namespace pcfast::tile {
inline const char* const chosen_bug = std::getenv("PLANTED");
inline int planted(const char* bug) { return chosen_bug != nullptr && std::strcmp(chosen_bug, bug) == 0; }
}
"""
PREPARED = [
    ("host/cuda_intrinsics.h", "#pragma once\n", CHOICE),
    (
        "host/cuda_intrinsics.h",
        'pcfast::host::block_barrier({"__syncthreads", call_site});',
        "const std::string file = call_site.file_name(), name = file.substr(file.rfind('/') + 1);\n"
        'if (!pcfast::tile::planted((name + ":" + std::to_string(call_site.line())).c_str()))\n'
        'pcfast::host::block_barrier({"__syncthreads", call_site});',
    ),
    # once all of it is zero, what lies between two arrays is nobody's
    (
        "resident/memory.cuh",
        "namespace pcfast::resident {\n\n",
        "void poison_gaps(const void*); namespace pcfast::resident {\n\n",
    ),
    (
        "resident/memory.cuh",
        "__syncthreads();\n  for (int l = 2;",
        "__syncthreads(); if (thread == 0) poison_gaps(memory);\n  for (int l = 2;",
    ),
]  # fmt: skip


def edited(folder: Path) -> Path:
    """A copy of csrc/ with bugs to choose from."""
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    bugs = [
        (file, old, new.format(planted=f'tile::planted("{bug}")')) for bug, (file, old, new) in BUGS.items()
    ]
    for file, old, new in [*PREPARED, *bugs]:
        text = (folder / file).read_text()
        assert text.count(old) == 1, (file, old)
        (folder / file).write_text(text.replace(old, new))
    return folder


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Callable[..., Path]:
    """A function that compiles host/resident.cpp, with the library as CMake builds it or with bugs to choose from."""
    base = shared_folder(tmp_path_factory, "sanitized")

    def compiled(sanitizer: str, with_bugs: bool = False) -> Path:
        folder = base / f"{sanitizer}{'_bugs' * with_bugs}"
        folder.mkdir(exist_ok=True)

        def make() -> None:
            if with_bugs:
                flags, sources = f"-fsanitize={sanitizer}", edited(folder / "csrc")
                kernel = ["-x", "c++", sources / "resident" / "resident.cu"]
            else:
                kinds = {"address": "address,alignment"}.get(sanitizer, sanitizer)
                flags, sources, kernel = f"-fsanitize={kinds}", CSRC, [folder / "libpcfast_core.a"]
                options = "-O1 -fno-sanitize-recover=all"
                build(
                    folder,
                    "PCFAST_HOST=ON",
                    f"PCFAST_HOST_SANITIZE={kinds}",
                    f"CMAKE_CXX_FLAGS_RELEASE={options}",
                )
            command = [*COMPILE, flags, f"-I{sources}", HERE / "resident.cpp", *kernel, "-o", folder / "run"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        return once(folder / "run", make)

    return compiled


@dataclasses.dataclass
class Outcome:
    """after: what the tensors held; None where the program ended before."""

    status: int
    said: str
    after: list[bytes | None] | None


def run(path: Path, launch: Launch, folder: Path, bug: str = "") -> Outcome:
    launch.write(folder / "in")
    (folder / "out").unlink(missing_ok=True)
    environment = os.environ | {"TSAN_OPTIONS": f"exitcode={RACE} history_size=7", "PLANTED": bug}
    done = subprocess.run(
        [path, folder / "in", folder / "out"], capture_output=True, text=True, env=environment, timeout=120
    )
    after = None
    if (folder / "out").exists():
        data, after, at = (folder / "out").read_bytes(), [], 0
        for tensor in launch.before:
            after.append(None if tensor is None else data[at : at + len(tensor)])
            at += len(tensor or b"")
    return Outcome(done.returncode, done.stdout + done.stderr, after)


# ---- as it is


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_the_kernel_is_clean_and_gives_the_same_bits(sanitizer, name, program, launches, tmp_path):
    launch = launches(name)
    result = run(program(sanitizer), launch, tmp_path)
    assert (result.status, result.said) == (0, "")
    assert result.after == launch.after


@pytest.mark.parametrize("name", CASES)
def test_nothing_touches_what_lies_between_two_arrays(name, program, launches, tmp_path):
    launch = launches(name)
    result = run(program("address", with_bugs=True), launch, tmp_path)
    assert (result.status, result.said) == (0, "")
    assert result.after == launch.after


# ---- bugs


def barriers() -> list[str]:
    """Where the kernel has one of the block: "file:line"."""
    return [
        f"{file.name}:{number}"
        for file in sorted((CSRC / "resident").iterdir())
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "__syncthreads(" in line
    ]


@pytest.mark.parametrize("barrier", barriers())
def test_a_missing_barrier_is_a_race(barrier, program, launches, tmp_path):
    """In one of two launches: from the forward pass on, an iteration's first products are none."""
    path, said = program("thread", with_bugs=True), ""
    for name in ("gram conv", "mlp from starts"):
        assert run(path, launches(name), tmp_path).status == 0
        result = run(path, launches(name), tmp_path, bug=barrier)
        assert result.status in (0, RACE)
        said += result.said
    assert "WARNING: ThreadSanitizer: data race" in said
    assert re.search(r"csrc/resident/\w+\.cuh:\d+", said)


@pytest.mark.parametrize(
    ("bug", "name", "sanitizer", "words"),
    [
        ("weights read past their end", "gram conv", "address", "heap-buffer-overflow"),
        ("a sum written past its end", "gram conv", "address", "heap-buffer-overflow"),
        ("zeros past the end of shared memory", "strides", "address", "heap-buffer-overflow"),
        ("a row of weights too many", "gram conv", "address", "use-after-poison"),
        ("a row of the prediction too many", "mlp from starts", "thread", "data race"),
        ("a position of the map too many", "strides", "thread", "data race"),
        ("a sample too many", "mlp in bf16", "thread", "data race"),
        ("iterations noted without an atomic", "diverging", "thread", "data race"),
    ],
)
def test_a_planted_bug_is_reported(bug, name, sanitizer, words, program, launches, tmp_path):
    result = run(program(sanitizer, with_bugs=True), launches(name), tmp_path, bug)
    assert result.status != 0 and words in result.said
    assert re.search(rf"csrc/{BUGS[bug][0]}:\d+", result.said)


def test_shared_memory_that_nobody_wrote_is_nan(program, launches, tmp_path):
    launch = launches("strides")
    result = run(program("address", with_bugs=True), launch, tmp_path, "halos that are not zeroed")
    assert result.status == 0 and result.after != launch.after
    errors = result.after[4 * MAX_LAYERS : 5 * MAX_LAYERS]
    held = [
        torch.frombuffer(bytearray(tensor), dtype=torch.float32) for tensor in errors if tensor is not None
    ]
    assert any(tensor.isnan().any() for tensor in held)


def test_a_vector_that_is_not_aligned_is_refused(program, launches, tmp_path):
    """The GPU would end the kernel; a program with such a place is not launched."""
    launch = launches("mlp from starts")
    shifted = Program.from_buffer_copy(launch.program)
    shifted.layers[2].feedback.input.first += 1
    result = run(program("address"), dataclasses.replace(launch, program=bytes(shifted)), tmp_path)
    assert result.status != 0 and result.said.strip() == "status -1:" and result.after is None


def test_the_kernel_copies_nothing_asynchronously():
    """A missing wait is planted in host/example.cpp alone (test_host.py)."""
    assert not any("copy_async" in file.read_text() for file in (CSRC / "resident").iterdir())
