"""What an iteration of the resident kernel issues, by its machine code for sm_90a, against its program's floor.

python tests/native/sass.py            # print the tables
python tests/native/sass.py --record   # and write sass_limits.json, which the tests hold it to, and docs/kernels.md

Inner loops of the products are found in the disassembly by the calls that their instructions are inlined from. How
often each runs, and what its loads need, follows from the program: of a block that has all of its samples, in an
iteration in which every layer is live. Of pointwise work, and of what goes to the scratch, only the bytes count;
instructions around the inner loops and of pointwise work come on top, as do barriers and latencies. So the clocks
here are predicted, and a lower bound: of two stages of products and two of pointwise work, one after the other.

Rates of a multiprocessor in a clock: an instruction of a warp from each of its four schedulers, and one line of 128
bytes of shared memory. A warp's scheduler is taken to be its index modulo four.
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

from native_compilation import CSRC, OPTIONS, TESTS, release
from torch import nn

from pcfast import constants, networks
from pcfast.network import describe
from pcfast.planning import choose_gram
from pcfast.resident import program as p
from pcfast.resident.floor import (
    MULTIPLY_ADDS_A_CLOCK,
    Floor,
    channels_of_splits,
    floors,
    live_products,
    multiply_adds,
    pointwise_words,
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

# Each does a multiply-add a lane, or those of a matrix product a warp.
MULTIPLY_ADD = ("FFMA", "HMMA")


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
        kernel: "relaxation<float, 3>".
        stage: which call of products() in the kernel's body: 0 predict, 1 feedback, 2 after the last iteration.
        product: as called, "pixels<5>".
        instructions: name without modifiers -> how many; loads keep their width, "LDS.128".
    """

    kernel: str
    stage: int
    product: str
    instructions: Counter

    @property
    def size(self) -> int:
        return sum(self.instructions.values())

    @property
    def multiply_adds(self) -> int:
        """Instructions that multiply."""
        return sum(self.instructions[name] for name in MULTIPLY_ADD)

    @property
    def loads(self) -> dict[str, int]:
        return {name: n for name, n in self.instructions.items() if name.startswith("LDS")}


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
    """ "FFMA", "LDS.128": the opcode without predicate and modifiers, loads with their width."""
    opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    name, *modifiers = opcode.split(".")
    width = [modifier for modifier in modifiers if modifier in ("64", "128", "M88", "MT88")]
    return ".".join([name, *width]) if name in ("LDS", "LDSM", "STS") else name


def _line(file: str, number: int, cache: dict[str, list[str]]) -> str:
    if file not in cache:
        cache[file] = Path(file).read_text().splitlines()
    return cache[file][number - 1]


def find_loops(code: str) -> list[Loop]:
    """Innermost loops of products that multiply."""
    sources: dict[str, list[str]] = {}
    found = []
    parts = re.split(r"^\.text\.(\S+):$", code, flags=re.M)
    for kernel, body in zip(parts[1::2], parts[2::2], strict=True):
        name = _readable(kernel)
        instructions, labels = _instructions(body.split("//----")[0])
        edges = []
        for at, instruction in enumerate(instructions):
            match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", instruction.text)
            if match and labels[match[1]] <= at:
                edges.append((labels[match[1]], at))
        stages: list[tuple[str, int]] = sorted(
            {i.calls[-1] for i in instructions if i.calls and _stage(_line(*i.calls[-1], sources))}
        )
        for first, last in edges:
            inner = [edge for edge in edges if first <= edge[0] and edge[1] <= last and edge != (first, last)]
            names = Counter(_name(i.text) for i in instructions[first : last + 1])
            if inner or not any(names[name] for name in MULTIPLY_ADD):
                continue
            middle = instructions[(first + last) // 2]
            product = next(filter(None, (_product(_line(*call, sources)) for call in middle.calls)), None)
            if product is None:  # pointwise
                continue
            group = re.search(r"<float, (\d+)", name)
            product = product.replace("Real, ", "").replace("GROUP", group[1] if group else "GROUP")
            found.append(Loop(name, stages.index(middle.calls[-1]), product, names))
    return found


def _stage(line: str) -> bool:
    """Whether a line of the kernel's body runs the products of a stage."""
    return re.search(r"\bproducts<(true|false), ", line) is not None


def _product(line: str) -> str | None:
    """ "pixels<Real, 5>", where a line of run_unit calls a product."""
    match = re.search(r"\b(\w+<Real, \w+>)\(product, memory", line)
    return match[1] if match else None


def _readable(mangled: str) -> str:
    """ "relaxation<float, 3>", of template arguments as the kernel has them; else the name as it is."""
    match = re.search(r"\d+(relaxation)If((?:Li\d+E)+)EEv", mangled)
    return f"{match[1]}<float, {', '.join(re.findall(r'[0-9]+', match[2]))}>" if match else mangled


def kernel_of(group: int) -> str:
    """The one that computes in float32 throughout."""
    return f"relaxation<float, {group}>"


# ------------------------------------------------------------------------------------------------------------ program


def name_of(product: p.Product, feedback: bool, group: int) -> str:
    """As :attr:`Loop.product`."""
    if product.kind == p.PIXELS:
        return f"pixels<{product.rows_a_thread}>"
    return f"linear_feedback<{group}>" if feedback else f"linear_prediction<{group}>"


def multiply_adds_of_a_trip(product: p.Product, group: int) -> int:
    """Of a lane."""
    if product.kind == p.PIXELS:
        return product.rows_a_thread * PIXELS_A_LANE
    return QUAD * QUAD * group


def tiles_of(product: p.Product, feedback: bool, samples: int) -> int:
    """Units of a split and a group, as units() of products.cuh has them."""
    if product.kind == p.PIXELS:
        places = samples * product.height * product.width
        return -(-places // (WARP * PIXELS_A_LANE)) * -(-product.out // product.rows_a_thread)
    rows = WARP * FEEDBACK_ROWS_A_LANE if feedback else product.lanes * QUAD
    return -(-product.out // rows)


def unit_trips(product: p.Product, feedback: bool, samples: int, group: int) -> list[int]:
    """Trips of each unit, in the kernel's order: groups fastest, then splits, then tiles."""
    if product.kind == p.PIXELS:
        taps = product.taps_y * product.taps_x
        trips, groups = [channels * taps for channels in channels_of_splits(product)], 1
    else:
        sharing = 1 if feedback else WARP // product.lanes
        trips = [-(-channels // (QUAD * sharing)) for channels in channels_of_splits(product)]
        groups = -(-samples // group)
    return [t for _ in range(tiles_of(product, feedback, samples)) for t in trips for _ in range(groups)]


Load = tuple[int, list[int]]  # words of a lane's access, first word of each lane that takes part


def loads_of(product: p.Product, feedback: bool, samples: int, group: int) -> Iterator[Load]:
    """Every load of the inner loops of a product, as products.cuh has them."""
    splits = [
        (i * product.split, i * product.split + channels)
        for i, channels in enumerate(channels_of_splits(product))
    ]
    read = _pixel_loads if product.kind == p.PIXELS else _feedback_loads if feedback else _prediction_loads
    for tile in range(tiles_of(product, feedback, samples)):
        for begin, end in splits:
            yield from read(product, tile, begin, end, samples, group)


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
                yield QUAD, [inputs + n * product.input.samples + own for _, own in lanes]
            for j in range(QUAD):
                yield QUAD, [product.weights + row + (own + j) * product.weight_channel for row, own in lanes]


def _feedback_loads(product, tile, begin, end, samples, group) -> Iterator[Load]:
    for first in range(0, samples, group):
        inputs = product.input.first + first * product.input.samples
        for k in range(begin, end, QUAD):
            for n in range(group):
                yield QUAD, [inputs + n * product.input.samples + k] * WARP
            for i in range(FEEDBACK_ROWS_A_LANE):
                first_row = (tile * FEEDBACK_ROWS_A_LANE + i) * WARP
                rows = [min(first_row + lane, product.out - 1) for lane in range(WARP)]
                yield QUAD, [product.weights + row * product.weight_row + k for row in rows]


def _pixel_loads(product, tile, begin, end, samples, group) -> Iterator[Load]:
    row_tiles = -(-product.out // product.rows_a_thread)
    row, place = tile % row_tiles * product.rows_a_thread, tile // row_tiles * WARP * PIXELS_A_LANE
    area = product.height * product.width
    at = product.input
    inputs = []
    for j in range(PIXELS_A_LANE):
        places = [min(place + j * WARP + lane, samples * area - 1) for lane in range(WARP)]
        inputs.append(
            [at.first + q // area * at.samples + q % area // product.width * at.rows + q % product.width * at.columns
             for q in places]
        )  # fmt: skip
    weights = [
        product.weights + min(row + i, product.out - 1) * product.weight_row
        for i in range(product.rows_a_thread)
    ]
    for channel in range(begin, end):
        for y in range(product.taps_y):
            for x in range(product.taps_x):
                a = channel * product.weight_channel + y * product.weight_tap_y + x * product.weight_tap_x
                b = channel * at.channels + y * product.input_tap_y + x * product.input_tap_x
                for weight in weights:
                    yield 1, [weight + a] * WARP
                for own in inputs:
                    yield 1, [first + b for first in own]


def words_needed(load: Load) -> set[int]:
    width, lanes = load
    return {first + i for first in lanes for i in range(width)}


def wavefronts(load: Load) -> int:
    """Lines that a load takes at the least: words of the same bank, unless they are the same, take turns."""
    return max(Counter(word % BANKS for word in words_needed(load)).values())


# ----------------------------------------------------------------------------------------------------------- evidence


@dataclasses.dataclass(frozen=True)
class Row:
    """One product in an iteration of a block.

    Attributes:
        layer, stage: "predict" or "feedback". loop: its inner loop, as :attr:`Loop.product`.
        units: of warps. trips: of all of them.
        unroll: trips that the compiled loop does at once. size: its instructions; mix: the most frequent.
        instructions: of the inner loops, of all warps. multiplying: those that multiply.
        useful, issued: multiply-adds that the mathematics asks for, and of all lanes.
        bytes, wavefronts: of the loads, see :func:`wavefronts`. written: words, to the scratch.
    """

    layer: int
    stage: str
    loop: str
    units: int
    trips: int
    unroll: int
    size: int
    mix: str
    instructions: int
    multiplying: int
    useful: int
    issued: int
    bytes: int
    wavefronts: int
    written: int


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A network's. busiest: instructions of the scheduler that has the most, of both stages."""

    name: str
    placement: Placement
    rows: tuple[Row, ...]
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


def placed(model: nn.Sequential, x_shape: tuple[int, ...]) -> Placement:
    network = describe(model)
    shapes = network.shapes(x_shape)
    gram, _ = choose_gram(network, shapes, "strict", 20, True, False)
    found = place(network, shapes, gram, "cross_entropy", 4, _chip())
    assert isinstance(found, Placement), found
    return found


def evidence(name: str, placement: Placement, loops: Sequence[Loop]) -> Evidence:
    program = p.Program.from_buffer_copy(placement.program)
    samples, group = program.samples, program.group
    by_name = {(loop.stage, loop.product): loop for loop in loops if loop.kernel == kernel_of(group)}
    warps = placement.threads // WARP
    rows, busiest, before = [], {}, {}
    for l, feedback, product in live_products(program):
        if product.kind == p.COPY:
            continue
        stage, called = ("feedback" if feedback else "predict"), name_of(product, feedback, group)
        loop = by_name.get((int(feedback), called))
        if loop is None:
            raise LookupError(f"no inner loop of {called} in the {stage} stage of {kernel_of(group)}")
        a_trip = multiply_adds_of_a_trip(product, group)
        if loop.multiply_adds % a_trip:
            raise LookupError(
                f"{called}: {loop.multiply_adds} multiply-adds are no multiple of a trip's {a_trip}"
            )
        unroll = loop.multiply_adds // a_trip
        units = unit_trips(product, feedback, samples, group)
        # what is left over where trips do not divide by the unrolling is counted as a part of the loop
        cost = loop.size / unroll
        schedulers = busiest.setdefault(stage, [0.0] * SCHEDULERS)
        first = before.setdefault(stage, 0)
        for unit, trips in enumerate(units):
            schedulers[(first + unit) % warps % SCHEDULERS] += trips * cost
        before[stage] += len(units)
        trips = sum(units)
        loads = list(loads_of(product, feedback, samples, group))
        if len(loads) * unroll != sum(loop.loads.values()) * trips:
            raise LookupError(
                f"{called}: {loop.loads} in its loop, {len(loads)} loads in {trips} trips expected"
            )
        mix = ", ".join(f"{n} {name}" for name, n in loop.instructions.most_common(6))
        rows.append(
            Row(
                l, stage, called, len(units), trips, unroll, loop.size, mix, round(trips * cost), trips * a_trip,
                multiply_adds(program.layers[l - 1], samples), trips * a_trip * WARP,
                4 * sum(len(words_needed(load)) for load in loads), sum(map(wavefronts, loads)),
                words_written(product, samples),
            )
        )  # fmt: skip
    floor = floors(placement, constants.load())[0]
    return Evidence(name, placement, tuple(rows), {s: max(all) for s, all in busiest.items()}, floor)


NETWORKS = {
    "mnist_cnn, batch 300": (networks.mnist_cnn, (300, 1, 28, 28)),
    "784-128-128-10, batch 128": (lambda: networks.mlp([784, 128, 128, 10]), (128, 784)),
}


def all_evidence(loops: Sequence[Loop]) -> list[Evidence]:
    return [evidence(name, placed(make(), shape), loops) for name, (make, shape) in NETWORKS.items()]


# ------------------------------------------------------------------------------------------------------------- limits


def figures(loops: Sequence[Loop], found: Sequence[Evidence]) -> dict:
    """What is recorded: the instructions of each loop that an iteration runs, and of each network's iteration."""
    return {
        "loops": {
            f"{loop.kernel} {('predict', 'feedback')[loop.stage]} {loop.product}": {
                "instructions": loop.size,
                "multiply-adds": loop.multiply_adds,
                "loads": sum(loop.loads.values()),
            }
            for loop in loops
            if loop.stage < 2  # the last one runs once
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
    """What is worse than recorded, one line each; a loop with more multiply-adds is unrolled further, not worse."""
    slack = 0.0 if nvcc == recorded["nvcc"] else SLACK
    problems = []
    for section in ("loops", "networks"):
        for name in sorted(found[section].keys() | recorded[section].keys()):
            new, old = found[section].get(name), recorded[section].get(name)
            if new is None or old is None:
                what = "not recorded" if old is None else "recorded, but not there"
                problems.append(f"{name}: {what}; {RECORD}")
                continue
            scale = new.get("multiply-adds", 1) / old.get("multiply-adds", 1)
            for figure, value in new.items():
                limit = old[figure] * scale * (1 + slack)
                if figure != "multiply-adds" and value > limit:
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
    for name, (make, shape) in NETWORKS.items():
        placement, found = placed(make(), shape), limits["networks"][name]
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
        head = f"{'':17}{'inner loop':22}{'units':>6}{'trips':>6}{'instr.':>8}{'of them multiply':>18}"
        print(f"{head}{'useful/issued multiply-adds':>29}{'bytes':>9}{'lines':>7}")
        for row in each.rows:
            print(
                f"layer {row.layer} {row.stage:9}{row.loop:22}{row.units:6}{row.trips:6}{row.instructions:8}"
                f"{row.multiplying:10} {row.multiplying / row.instructions:6.0%} "
                f"{row.useful:13,} / {row.issued:7,} {row.useful / row.issued:4.0%}{row.bytes:9,}{row.wavefronts:7,}"
            )
        print("loops: " + "; ".join(dict.fromkeys(
            f"{row.loop} {row.size} instructions for {row.unroll} trip{'s' * (row.unroll > 1)} ({row.mix})"
            for row in each.rows)))  # fmt: skip
        instructions, useful = each.total("instructions"), each.total("useful")
        print(
            f"an iteration: {instructions:,} instructions in inner loops, {instructions / SCHEDULERS:,.0f} clocks "
            f"if shared evenly, {sum(each.busiest.values()):,.0f} as they are; {each.total('wavefronts'):,} lines of "
            f"shared memory; {useful:,} useful multiply-adds, {useful / MULTIPLY_ADDS_A_CLOCK:,.0f} clocks"
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
