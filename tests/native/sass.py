"""What an iteration of the resident kernel issues, by its machine code for sm_90a, against its program's floor.

python tests/native/sass.py            # print the tables
python tests/native/sass.py --record   # and write sass_limits.json, which the tests hold it to, and docs/kernels.md

Inner loops of the products are found in the disassembly by the calls that their instructions are inlined from. How
often each runs, and what its loads need, follows from the program: of a block that has all of its samples, in an
iteration in which every layer is live. Of pointwise work, and of what goes to the scratch, only the bytes count;
instructions around the inner loops and of pointwise work come on top, as do barriers and latencies. So the clocks
here are predicted, and a lower bound: of two stages of products and two of pointwise work, one after the other.

Rates of a multiprocessor in a clock: an instruction of a warp from each of its four schedulers, a quarter of the
multiply-adds of floor.py from each one's units, and one line of 128 bytes of shared memory. A warp's scheduler is
taken to be its index modulo four.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from native_compilation import CSRC, OPTIONS, TESTS, release
from torch import nn

from pcfast import constants, networks
from pcfast.network import describe
from pcfast.planning import choose_gram
from pcfast.precision import Operands
from pcfast.resident import program as p
from pcfast.resident.floor import (
    DEPTHS,
    MULTIPLY_ADDS_A_CLOCK,
    TILE_COLUMNS,
    TILE_ROWS,
    Floor,
    floors,
    input_place,
    lanes_terms,
    live_products,
    multiply_adds,
    operand_of,
    place_tiles,
    pointwise_words,
    splits_of,
    terms_of,
    words_written,
)
from pcfast.resident.placement import Chip, Placement, place

LIMITS = TESTS / "sass_limits.json"
PAGE = TESTS.parents[1] / "docs" / "kernels.md"
BEGIN, END = (f"<!-- tests/native/sass.py: {where} -->" for where in ("begin", "end"))
RECORD = "python tests/native/sass.py --record"
SOURCE = CSRC / "resident" / "resident.cu"
CHIP = "90a"
# Another release of nvcc schedules otherwise.
SLACK = 0.1
TIMEOUT = 600.0  # seconds

SCHEDULERS = 4
BANKS = 32
LINE_WORDS = 32
WARP = 32
# csrc/resident/products.cuh
QUAD = 4
FEEDBACK_ROWS_A_LANE = 4
PIXELS_A_LANE = 4

# csrc/resident/matrix_products.cuh
HALF = 8

# Instruction -> multiply-adds of a warp.
MULTIPLY_ADD = {
    "FFMA": WARP,
    **{f"HMMA.{word.upper()}": TILE_ROWS * TILE_COLUMNS * depth for word, depth in DEPTHS.items()},
}
STAGES = ("predict", "feedback")


# ------------------------------------------------------------------------------------------------------- machine code


def find_nvdisasm() -> str | None:
    """On PATH, or of the wheel nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = [f"{root}/{name}/bin" for root in (spec.submodule_search_locations if spec else ()) for name in
               sorted(os.listdir(root))]  # fmt: skip
    return shutil.which("nvdisasm", path=os.pathsep.join(folders)) if folders else None


def why_not() -> str:
    """What is missing; "" where nothing is."""
    if shutil.which("nvcc") is None:
        return "no nvcc"
    return "" if find_nvdisasm() else "no nvdisasm: pip install nvidia-cuda-nvdisasm"


def disassemble(source: Path = SOURCE) -> str:
    """The code of all kernels, each instruction after the calls that it is inlined from."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/cubin"
        target = f"-gencode=arch=compute_{CHIP},code=sm_{CHIP}"
        command = ["nvcc", *OPTIONS, target, "-cubin", "-o", cubin, source]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        command = [find_nvdisasm(), "-c", "-gi", cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout


@dataclasses.dataclass(frozen=True)
class Loop:
    """An inner loop of a product.

    Attributes:
        stage: of :data:`STAGES`. product: as :func:`unit_trips` names them; "pixels<?>" where no parameters fit.
        unroll: trips that it does at once.
        instructions: name without modifiers -> how many; loads keep their width, "LDS.128".
    """

    stage: str
    product: str
    unroll: int
    instructions: Counter

    @property
    def size(self) -> int:
        return sum(self.instructions.values())

    @property
    def multiplying(self) -> int:
        """Instructions that multiply."""
        return sum(self.instructions[name] for name in MULTIPLY_ADD)

    @property
    def loads(self) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith("LDS"))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    text: str
    calls: tuple[tuple[str, int], ...]  # (file, line), innermost first


def _instructions(body: str) -> tuple[list[_Instruction], dict[str, int]]:
    """Of a kernel: its instructions, and label -> index of the one behind it."""
    found, labels, calls, fresh = [], {}, (), True
    for line in body.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(found)
        elif match := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            calls = (() if fresh else calls) + ((match[1], int(match[2])),)
            fresh = False
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.+?)\s*;", line):
            found.append(_Instruction(match[1], calls))
            fresh = True
    return found, labels


def _name(text: str) -> str:
    """ "FFMA", "LDS.128", "HMMA.BF16": the opcode without predicate and most modifiers."""
    opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    name, *modifiers = opcode.split(".")
    kept = {"LDS": ("64", "128"), "HMMA": ("BF16", "TF32")}.get(name, ())
    return ".".join([name, *(modifier for modifier in modifiers if modifier in kept)])


def _line(file: str, number: int, cache: dict[str, list[str]]) -> str:
    if file not in cache:
        cache[file] = Path(file).read_text().splitlines()
    return cache[file][number - 1]


def find_loops(code: str) -> list[Loop]:
    """Innermost loops of products that multiply; of several of the same product and stage the longest."""
    sources: dict[str, list[str]] = {}
    found: dict[tuple[str, str], Loop] = {}
    for body in re.split(r"^\.text\.\S+:$", code, flags=re.M)[1:]:
        instructions, labels = _instructions(body.split("//----")[0])
        edges = []
        for at, instruction in enumerate(instructions):
            match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction.text)
            if match and labels[match[1]] <= at:
                edges.append((labels[match[1]], at))
        for first, last in edges:
            inner = [edge for edge in edges if first <= edge[0] and edge[1] <= last and edge != (first, last)]
            own = instructions[first : last + 1]
            names = Counter(_name(i.text) for i in own)
            if inner or not any(names[name] for name in MULTIPLY_ADD):
                continue
            lines = [_line(*call, sources) for instruction in own for call in instruction.calls]
            family, stage = _most(_FAMILY, lines), _most(_STAGE, lines)
            if family is None or stage is None:  # pointwise
                continue
            loop = _named(STAGES[stage == "true"], family, names)
            known = found.get((loop.stage, loop.product))
            if known is None or loop.multiplying > known.multiplying:
                found[loop.stage, loop.product] = loop
    return list(found.values())


# A line of the kernel's body that runs the products of a stage, and one that calls a product. Template arguments are
# not read: of calls that compile alike some instructions keep one's line, others another's.
_STAGE = r"\bproducts<(true|false)>\("
_FAMILY = r"\b(linear_prediction|linear_feedback|pixels|linear_tiles|pixel_tiles)<.*>\(product, memory"


def _most(pattern: str, lines: Sequence[str]) -> str | None:
    found = Counter(match[1] for line in lines if (match := re.search(pattern, line)))
    return found.most_common(1)[0][0] if found else None


def _named(stage: str, family: str, names: Counter) -> Loop:
    """A loop by what it multiplies and loads: the trips of a product, a whole number of times."""
    found = Counter({n: count for n, count in names.items() if n in MULTIPLY_ADD or n.startswith("LDS")})
    for product, trip in trips_of_family(family, stage).items():
        unroll = found.total() // trip.total()
        if found == Counter({name: unroll * count for name, count in trip.items()}):
            return Loop(stage, product, unroll, names)
    return Loop(stage, f"{family}<?>", 1, names)


# ------------------------------------------------------------------------------------------------------------ program


def trips_of_family(family: str, stage: str) -> dict[str, Counter]:
    """Product -> instructions of a trip of its inner loop that multiply or load, whatever its parameters."""
    if family in ("linear_prediction", "linear_feedback"):
        return {
            f"{family}<{n}>": Counter({"FFMA": QUAD * QUAD * n, "LDS.128": QUAD + n}) for n in range(1, 5)
        }
    if family == "pixels":
        found = {}
        for rows in (1, 4, 5, 8):
            multiply = {"FFMA": rows * PIXELS_A_LANE}
            found[f"pixels<{rows}>"] = Counter(multiply, LDS=rows + PIXELS_A_LANE)
            if rows >= QUAD:  # of a quad of which one number is wanted, one is read
                loads = {"LDS.128": rows // QUAD, "LDS": rows % QUAD + PIXELS_A_LANE}
                found[f"pixels<{rows}, adjacent>"] = Counter(multiply | loads)
        return found
    found = {}
    for operand, depth in DEPTHS.items():
        multiply, a_lane = f"HMMA.{operand.upper()}", depth // 4
        if family == "pixel_tiles":
            for columns, places in ((1, 4), (2, 4), (4, 2)):
                loads = {"LDS.128": a_lane // 2, "LDS": a_lane * (columns + 2 * places)}
                found[f"{family}<{operand}, {columns}>"] = Counter({multiply: places * columns} | loads)
            continue
        for tiles in range(1, 5):
            if operand == "bf16":
                loads = {"LDSM": tiles, "LDS.64": 2}
            elif stage == "predict":
                loads = {"LDS": 4 * tiles, "LDS.64": 1}
            else:
                loads = {"LDS": 4 * tiles + 2}
            found[f"{family}<{operand}, {tiles}>"] = Counter({multiply: tiles} | loads)
    return found


def trip_of(product: str, stage: str) -> Counter:
    return trips_of_family(product.partition("<")[0], stage)[product]


def issued_by(trip: Counter) -> int:
    """Multiply-adds of a warp."""
    return sum(trip[name] * each for name, each in MULTIPLY_ADD.items())


def tiles_of(product: p.Product, operand: str, feedback: bool, samples: int) -> int:
    """Units of a split and a group, as units() of products.cuh has them."""
    if product.kind == p.PIXELS:
        places = samples * product.height * product.width
        if operand == "ieee":
            return -(-places // (WARP * PIXELS_A_LANE)) * -(-product.out // product.rows_a_thread)
        columns = product.tiles * TILE_COLUMNS
        return -(-places // (place_tiles(product) * TILE_ROWS)) * -(-product.out // columns)
    if operand != "ieee":
        return -(-product.out // (product.tiles * TILE_ROWS))
    rows = WARP * FEEDBACK_ROWS_A_LANE if feedback else product.lanes * QUAD
    return -(-product.out // rows)


def row_tiles(product: p.Product, tile: int) -> int:
    """Tiles of rows that a unit of a linear product on matrix units has."""
    return min(product.tiles, -(-product.out // TILE_ROWS) - tile * product.tiles)


def unit_trips(
    product: p.Product, operand: str, feedback: bool, samples: int, group: int
) -> list[tuple[str, int]]:
    """(inner loop, trips) of each unit, in the kernel's order: groups fastest, then splits, then tiles."""
    splits, groups = splits_of(product, operand != "ieee"), 1
    tiles = tiles_of(product, operand, feedback, samples)
    if product.kind == p.PIXELS:
        taps = product.taps_y * product.taps_x
        adjacent = ", adjacent" if product.weight_row == 1 and product.rows_a_thread > 1 else ""
        names = [f"pixels<{product.rows_a_thread}{adjacent}>"] * tiles
        trips = [len(part) * taps for part in splits]
        if operand != "ieee":
            names = [f"pixel_tiles<{operand}, {product.tiles}>"] * tiles
            trips = [-(-len(part) // DEPTHS[operand]) for part in splits]
    elif operand != "ieee":
        names = [f"linear_tiles<{operand}, {row_tiles(product, tile)}>" for tile in range(tiles)]
        trips = [-(-len(part) // DEPTHS[operand]) for part in splits]
        groups = -(-samples // TILE_COLUMNS)
    else:
        names = [f"linear_{'feedback' if feedback else 'prediction'}<{group}>"] * tiles
        sharing = 1 if feedback else WARP // product.lanes
        trips = [-(-len(part) // (QUAD * sharing)) for part in splits]
        groups = -(-samples // group)
    return [(name, t) for name in names for t in trips for _ in range(groups)]


class Load(NamedTuple):
    """One load of a warp.

    Attributes:
        words: of a lane's access. lanes: first word of each lane that takes part.
        turns: of as many lanes each, one after another.
    """

    words: int
    lanes: list[int]
    turns: int = 1


def loads_of(product: p.Product, operand: str, feedback: bool, samples: int, group: int) -> Iterator[Load]:
    """Every load of the inner loops of a product, as products.cuh and matrix_products.cuh have them."""
    matrix = operand != "ieee"
    for tile in range(tiles_of(product, operand, feedback, samples)):
        for part in splits_of(product, matrix):
            if matrix and product.kind == p.PIXELS:
                yield from _pixel_tile_loads(product, operand, tile, part, samples)
            elif matrix:
                yield from _linear_tile_loads(product, operand, feedback, tile, part, samples)
            else:
                linear = _feedback_loads if feedback else _prediction_loads
                read = _pixel_loads if product.kind == p.PIXELS else linear
                yield from read(product, tile, part.start, part.stop, samples, group)


def _prediction_loads(product, tile, begin, end, samples, group) -> Iterator[Load]:
    sharing = WARP // product.lanes
    for first in range(0, samples, group):
        inputs = product.input.first + first * product.input.samples
        for k in range(begin, end, sharing * QUAD):
            lanes = []
            for lane in range(WARP):
                row = (tile * product.lanes + lane % product.lanes) * QUAD
                own = k + lane // product.lanes * QUAD
                if row < product.out and own < end:
                    lanes.append((row, own))
            for n in range(group):
                yield Load(QUAD, [inputs + n * product.input.samples + own for _, own in lanes])
            for j in range(QUAD):
                yield Load(
                    QUAD, [product.weights + row + (own + j) * product.weight_channel for row, own in lanes]
                )


def _feedback_loads(product, tile, begin, end, samples, group) -> Iterator[Load]:
    for first in range(0, samples, group):
        inputs = product.input.first + first * product.input.samples
        for k in range(begin, end, QUAD):
            for n in range(group):
                yield Load(QUAD, [inputs + n * product.input.samples + k] * WARP)
            for i in range(FEEDBACK_ROWS_A_LANE):
                first_row = (tile * FEEDBACK_ROWS_A_LANE + i) * WARP
                rows = [min(first_row + lane, product.out - 1) for lane in range(WARP)]
                yield Load(QUAD, [product.weights + row * product.weight_row + k for row in rows])


def _pixel_loads(product, tile, begin, end, samples, group) -> Iterator[Load]:
    rows = product.rows_a_thread
    row_units = -(-product.out // rows)
    row, place = tile % row_units * rows, tile // row_units * WARP * PIXELS_A_LANE
    last = samples * product.height * product.width - 1
    inputs = [
        [input_place(product, min(place + j * WARP + lane, last)) for lane in range(WARP)]
        for j in range(PIXELS_A_LANE)
    ]
    if product.weight_row == 1 and rows > 1:
        whole = rows - rows % QUAD
        weights = [(QUAD, product.weights + row + i) for i in range(0, whole, QUAD)]
        weights += [(1, product.weights + row + i) for i in range(whole, rows)]
    else:
        weights = [
            (1, product.weights + min(row + i, product.out - 1) * product.weight_row) for i in range(rows)
        ]
    for channel in range(begin, end):
        for y in range(product.taps_y):
            for x in range(product.taps_x):
                a = channel * product.weight_channel + y * product.weight_tap_y + x * product.weight_tap_x
                b = channel * product.input.channels + y * product.input_tap_y + x * product.input_tap_x
                for words, weight in weights:
                    yield Load(words, [weight + a] * WARP)
                for own in inputs:
                    yield Load(1, [first + b for first in own])


# Of a lane: g, its row or column of a fragment, and t, its place along k.
FRAGMENT = [(lane // 4, lane % 4) for lane in range(WARP)]


def _linear_tile_loads(product, operand, feedback, tile, part, samples) -> Iterator[Load]:
    depth, first_row = DEPTHS[operand], tile * product.tiles * TILE_ROWS
    at, stride = product.input, product.weight_row if feedback else product.weight_channel
    for first in range(0, samples, TILE_COLUMNS):
        own = [at.first + min(first + g, samples - 1) * at.samples for g, _ in FRAGMENT]
        for k in range(part.start, part.stop, depth):
            if operand == "tf32" and feedback:
                inputs = [(1, 1, 0), (1, 1, 4)]
            else:
                inputs = [(2, 2, first) for first in range(0, depth, 8)]
            for words, step, deep in inputs:
                yield Load(
                    words, [row + k + deep + step * t for row, (_, t) in zip(own, FRAGMENT, strict=True)]
                )
            for i in range(row_tiles(product, tile)):
                row = first_row + i * TILE_ROWS
                if operand == "bf16":
                    yield _matrix_load(product, feedback, row, k, stride)
                    continue
                for half in (0, HALF):
                    rows = [min(row + half + g, product.out - 1) for g, _ in FRAGMENT]
                    for second in (0, 1):
                        ks = [k + (t + 4 * second if feedback else 2 * t + second) for _, t in FRAGMENT]
                        numbers = (r * stride + c if feedback else c * stride + r
                                   for r, c in zip(rows, ks, strict=True))  # fmt: skip
                        yield Load(1, [product.weights + number for number in numbers])


def _matrix_load(product, feedback, row, k, stride) -> Load:
    """Of four matrices, eight rows of eight numbers in bfloat16 each."""
    lanes = []
    for lane in range(WARP):
        half, deep, within = lane // HALF % 2 * HALF, lane // 16 * HALF, lane % HALF
        if feedback:
            number = min(row + half + within, product.out - 1) * stride + deep + k
        else:
            number = (deep + within + k) * stride + min(row + half, stride - HALF)
        lanes.append(product.weights + number // 2)
    return Load(QUAD, lanes, turns=4)


def _pixel_tile_loads(product, operand, tile, part, samples) -> Iterator[Load]:
    depth, terms = DEPTHS[operand], terms_of(product)
    column_units = -(-product.out // (product.tiles * TILE_COLUMNS))
    first_column = tile % column_units * product.tiles * TILE_COLUMNS
    first_place = tile // column_units * place_tiles(product) * TILE_ROWS
    last = samples * product.height * product.width - 1
    columns = [
        [min(first_column + c * TILE_COLUMNS + g, product.out - 1) * product.weight_row for g in range(8)]
        for c in range(product.tiles)
    ]
    places = [
        [input_place(product, min(first_place + i * HALF + g, last)) for g in range(8)]
        for i in range(2 * place_tiles(product))
    ]
    for k in range(part.start, part.stop, depth):
        for i in range(depth // 8):
            yield Load(QUAD, [product.terms + 2 * (k + t * depth // 4 + 2 * i) for _, t in FRAGMENT])
        for lanes in lanes_terms(operand, k):
            own = [terms[i] for i in lanes]
            for rows in columns:
                words = [product.weights + rows[g] + own[t][1] for g, t in FRAGMENT if own[t][1] is not None]
                yield Load(1, words)
            for rows in places:
                yield Load(1, [rows[g] + own[t][0] for g, t in FRAGMENT])


def words_needed(load: Load) -> set[int]:
    return {first + i for first in load.lanes for i in range(load.words)}


def wavefronts(load: Load) -> int:
    """Lines that a load takes at the least: words of the same bank, unless they are the same, take turns."""
    each = -(-len(load.lanes) // load.turns)
    found = 0
    for turn in range(load.turns):
        needed = words_needed(Load(load.words, load.lanes[turn * each : (turn + 1) * each]))
        found += max(Counter(word % BANKS for word in needed).values(), default=0)
    return found


# ----------------------------------------------------------------------------------------------------------- evidence


@dataclasses.dataclass(frozen=True)
class Row:
    """One product in an iteration of a block.

    Attributes:
        layer, stage: "predict" or "feedback". loop: its inner loops, as :attr:`Loop.product`.
        units: of warps. trips: of all of them.
        instructions: of the inner loops, of all warps. multiplying: those that multiply.
        useful, issued: multiply-adds that the mathematics asks for, and of all lanes and tiles.
        bytes, wavefronts: of the loads, see :func:`wavefronts`. written: words, to the scratch.
    """

    layer: int
    stage: str
    loop: str
    units: int
    trips: int
    instructions: int
    multiplying: int
    useful: int
    issued: int
    bytes: int
    wavefronts: int
    written: int


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A network's.

    Attributes:
        loops: that it runs.
        busiest: stage -> clocks of the scheduler that has the most to issue, or the most for its units to multiply.
    """

    name: str
    placement: Placement
    rows: tuple[Row, ...]
    loops: tuple[Loop, ...]
    busiest: dict[str, float]
    floor: Floor

    def total(self, name: str) -> int:
        return sum(getattr(row, name) for row in self.rows)

    @property
    def clocks(self) -> float:
        """Predicted, at the least."""
        program = p.Program.from_buffer_copy(self.placement.program)
        found = 0.0
        for stage, issue in self.busiest.items():
            memory = sum(row.wavefronts + row.written / LINE_WORDS for row in self.rows if row.stage == stage)
            pointwise = sum(
                pointwise_words(program, l)[stage == "feedback"] for l in range(2, program.depth + 1)
            )
            found += max(issue, memory) + pointwise / LINE_WORDS
        return found


def _chip() -> Chip:
    known = constants.load()
    return Chip(known.sm_count, known.shared_memory_per_block_bytes, known.shared_memory_per_sm_bytes)


def placed(model: nn.Sequential, x_shape: tuple[int, ...], operand: str) -> Placement:
    network = describe(model)
    shapes = network.shapes(x_shape)
    gram, _ = choose_gram(network, shapes, "strict", 20, True, False)
    found = place(network, shapes, gram, "cross_entropy", Operands(operand, operand), 4, _chip())
    assert isinstance(found, Placement), found
    return found


def evidence(name: str, placement: Placement, loops: Sequence[Loop]) -> Evidence:
    program = p.Program.from_buffer_copy(placement.program)
    samples, group = program.samples, program.group
    by_name = {(loop.stage, loop.product): loop for loop in loops}
    warps = placement.threads // WARP
    rows, used = [], {}
    issuing, multiplying = ({stage: [0.0] * SCHEDULERS for stage in STAGES} for _ in range(2))
    before = dict.fromkeys(STAGES, 0)
    for l, feedback, product in live_products(program):
        if product.kind == p.COPY:
            continue
        layer, stage = program.layers[l - 1], STAGES[feedback]
        how = product, operand_of(layer), feedback, samples, group
        units, instructions, multiply, issued = unit_trips(*how), 0.0, 0, 0
        for unit, (called, trips) in enumerate(units):
            loop = by_name.get((stage, called))
            if loop is None:
                raise LookupError(f"no inner loop of {called} in the {stage} stage")
            used[stage, called] = loop
            trip = trip_of(called, stage)
            # what is left over where trips do not divide by the unrolling is counted as a part of the loop
            cost = trips * loop.size / loop.unroll
            scheduler = (before[stage] + unit) % warps % SCHEDULERS
            issuing[stage][scheduler] += cost
            a_clock = MULTIPLY_ADDS_A_CLOCK[how[1]] / SCHEDULERS
            multiplying[stage][scheduler] += trips * issued_by(trip) / a_clock
            instructions += cost
            multiply += trips * sum(trip[instruction] for instruction in MULTIPLY_ADD)
            issued += trips * issued_by(trip)
        before[stage] += len(units)
        loads = list(loads_of(*how))
        rows.append(
            Row(
                l, stage, " and ".join(dict.fromkeys(called for called, _ in units)), len(units),
                sum(trips for _, trips in units), round(instructions), multiply,
                multiply_adds(layer, samples), issued,
                4 * sum(len(words_needed(load)) for load in loads), sum(map(wavefronts, loads)),
                words_written(product, samples),
            )
        )  # fmt: skip
    floor = floors(placement, constants.load())[0]
    busiest = {stage: max(*issuing[stage], *multiplying[stage]) for stage in STAGES}
    return Evidence(name, placement, tuple(rows), tuple(used.values()), busiest, floor)


NETWORKS = {
    "mnist_cnn, batch 300": (networks.mnist_cnn, (300, 1, 28, 28)),
    "784-128-128-10, batch 128": (lambda: networks.mlp([784, 128, 128, 10]), (128, 784)),
}
CASES = {
    f"{name}, {operand}": (make, shape, operand)
    for name, (make, shape) in NETWORKS.items()
    for operand in MULTIPLY_ADDS_A_CLOCK
}


def placed_case(name: str) -> Placement:
    make, shape, operand = CASES[name]
    return placed(make(), shape, operand)


def all_evidence(loops: Sequence[Loop]) -> list[Evidence]:
    return [evidence(name, placed_case(name), loops) for name in CASES]


# ------------------------------------------------------------------------------------------------------------- limits


def figures(loops: Sequence[Loop], found: Sequence[Evidence]) -> dict:
    """What is recorded: the instructions of each loop, and of each network's iteration."""
    return {
        "loops": {
            f"{loop.stage} {loop.product}": {
                "instructions": loop.size,
                "multiplying": loop.multiplying,
                "loads": loop.loads,
            }
            for loop in loops
        },
        "networks": {
            each.name: {
                "instructions": each.total("instructions"),
                "wavefronts": each.total("wavefronts"),
                "clocks": round(each.clocks),
            }
            for each in found
        },
    }


def check_recorded(found: dict, recorded: dict, nvcc: str) -> list[str]:
    """What is worse than recorded, one line each; a loop that multiplies more is unrolled further, not worse."""
    slack = 0.0 if nvcc == recorded["nvcc"] else SLACK
    problems = []
    for section in ("loops", "networks"):
        for name in sorted(found[section].keys() | recorded[section].keys()):
            new, old = found[section].get(name), recorded[section].get(name)
            if new is None or old is None:
                what = "not recorded" if old is None else "recorded, but not there"
                problems.append(f"{name}: {what}; {RECORD}")
                continue
            scale = new.get("multiplying", 1) / old.get("multiplying", 1)
            for figure, value in new.items():
                limit = old[figure] * scale * (1 + slack)
                if figure != "multiplying" and value > limit:
                    problems.append(f"{name}: {value} {figure}, at most {limit:g}")
    return problems


def read_limits(path: Path = LIMITS) -> dict:
    return json.loads(path.read_text())


def with_table(page: str, limits: dict) -> str:
    """``page`` with the networks' figures between its markers."""
    rows = [
        "| an iteration of a block | multiply-adds | floor, clocks | instructions in inner loops | lines of shared "
        "memory that they read | predicted at the least, clocks |",
        "|---|---|---|---|---|---|",
    ]
    for name in CASES:
        placement, found = placed_case(name), limits["networks"][name]
        floor = floors(placement, constants.load())[0]
        samples = f"{placement.samples} sample{'s' * (placement.samples > 1)}"
        rows.append(
            f"| {name}, {samples} | {floor.multiply_adds:,} | {floor.clocks:,.0f} ({floor.binding}) | "
            f"{found['instructions']:,} | {found['wavefronts']:,} | {found['clocks']:,} |"
        )
    before, rest = page.split(BEGIN)
    return "\n".join([before + BEGIN, *rows, END + rest.split(END)[1]])


def print_tables(found: Sequence[Evidence]) -> None:
    for each in found:
        placement = each.placement
        print(
            f"\n{each.name}: sm_{CHIP}, {placement.samples} samples a block, {placement.threads // WARP} warps"
        )
        head = f"{'':17}{'inner loop':46}{'units':>6}{'trips':>6}{'instr.':>8}{'of them multiply':>18}"
        print(f"{head}{'useful/issued multiply-adds':>29}{'bytes':>9}{'lines':>7}")
        for row in each.rows:
            print(
                f"layer {row.layer} {row.stage:9}{row.loop:46}{row.units:6}{row.trips:6}{row.instructions:8}"
                f"{row.multiplying:10} {row.multiplying / row.instructions:6.0%} "
                f"{row.useful:13,} / {row.issued:9,} {row.useful / row.issued:4.0%}{row.bytes:9,}{row.wavefronts:7,}"
            )
        for loop in each.loops:
            mix = ", ".join(f"{n} {name}" for name, n in loop.instructions.most_common(8))
            trips = f"{loop.unroll} trip{'s' * (loop.unroll > 1)}"
            print(f"  {loop.stage} {loop.product}: {loop.size} instructions for {trips} ({mix})")
        instructions, useful = each.total("instructions"), each.total("useful")
        print(
            f"an iteration: {instructions:,} instructions in inner loops, {instructions / SCHEDULERS:,.0f} clocks "
            f"if shared evenly, {sum(each.busiest.values()):,.0f} as they are; {each.total('wavefronts'):,} lines of "
            f"shared memory; {useful:,} useful multiply-adds"
        )
        print(
            f"predicted, at the least: {each.clocks:,.0f} clocks; floor of the program {each.floor.clocks:,.0f} "
            f"({each.floor.multiply_adds:,} multiply-adds, {each.floor.bytes:,} bytes with pointwise work: "
            f"{each.floor.binding})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {LIMITS.name} and {PAGE.name}")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    loops = find_loops(disassemble())
    found = all_evidence(loops)
    print_tables(found)
    if unknown := [loop.product for loop in loops if loop.product.endswith("<?>")]:
        print(f"loops that fit no product: {', '.join(unknown)}")
    if arguments.record:
        limits = {"nvcc": release(), **figures(loops, found)}
        LIMITS.write_text(json.dumps(limits, indent=2, sort_keys=True) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(), limits))
        return
    problems = check_recorded(figures(loops, found), read_limits(), release())
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
