"""The resident kernel's inner loops keep their recorded instructions; code is read, and loads counted, rightly."""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest
import sass
from native_compilation import release
from torch import nn

from pcfast import networks
from pcfast.resident import program as p
from pcfast.resident.floor import (
    DEPTHS,
    MULTIPLY_ADDS_A_CLOCK,
    bytes_read,
    live_products,
    multiply_adds,
    operand_of,
)
from pcfast.resident.placement import Placement

needs_tools = pytest.mark.skipif(bool(sass.why_not()), reason=sass.why_not())


EVERY_LOOP = [
    (stage, name)
    for stage in sass.STAGES
    for family in ("linear_prediction", "linear_feedback", "pixels", "linear_tiles", "pixel_tiles")
    for name in sass.trips_of_family(family, stage)
]


@needs_tools
def test_an_iteration_keeps_its_limits():
    # One test, not one a network: the source is compiled once.
    loops = sass.find_loops(sass.disassemble())
    found = sass.all_evidence(loops)
    problems = sass.check_recorded(sass.figures(loops, found), sass.read_limits(), release())
    assert not problems, "\n".join(problems)
    for each in found:
        # nothing is lost on the way: every multiply-add of the program is in some loop
        assert each.total("useful") == each.floor.multiply_adds
        assert all(row.useful <= row.issued for row in each.rows)
        assert each.clocks >= max(each.floor.clocks, each.total("multiplying") / sass.SCHEDULERS)
    assert {loop.product for loop in loops} >= {name for _, name in EVERY_LOOP}
    assert all("?" not in loop.product for loop in loops)


def test_the_page_has_the_recorded_figures():
    page = sass.PAGE.read_text()
    assert sass.with_table(page, sass.read_limits()) == page, sass.RECORD


# ---- counting


def padded_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 9, 3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(9, 7, (2, 1)), nn.ReLU(), nn.Flatten()),
        nn.Linear(7 * 5 * 6, 10),
    )


def wide_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(20, 17, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(17, 33, 3), nn.SiLU(), nn.Flatten()),
        nn.Linear(33 * 4, 10),
    )


PROGRAMS = {
    "mnist_cnn": (networks.mnist_cnn, (300, 1, 28, 28)),
    "one image": (lambda: networks.mnist_cnn((1, 11, 12)), (1, 1, 11, 12)),
    "padded_cnn": (padded_cnn, (500, 2, 24, 25)),
    "mlp": (lambda: networks.mlp([784, 128, 128, 10]), (128, 784)),
    "odd mlp": (lambda: networks.mlp([37, 61, 1, 133, 7]), (5000, 37)),
    "wide output": (lambda: networks.mlp([48, 32, 301]), (500, 48)),
    "many samples": (lambda: networks.mlp([16, 24, 40, 5]), (132 * 16, 16)),
    "wide_cnn": (wide_cnn, (3, 3, 8, 8)),
}


def made(name: str, operand: str) -> Placement:
    make, shape = PROGRAMS[name]
    return sass.placed(make(), shape, operand)


@pytest.mark.parametrize("operand", MULTIPLY_ADDS_A_CLOCK)
@pytest.mark.parametrize("name", PROGRAMS)
def test_loads_one_by_one_need_what_the_floor_counts(name, operand):
    program = p.Program.from_buffer_copy(made(name, operand).program)
    samples = program.samples
    for l, feedback, product in live_products(program):
        layer = program.layers[l - 1]
        how = product, operand_of(layer), feedback, samples, program.group
        loads = list(sass.loads_of(*how))
        needed = [sass.words_needed(load) for load in loads]
        assert 4 * sum(map(len, needed)) == bytes_read(*how)
        assert all(0 <= word < program.elements for words in needed for word in words)
        units = sass.unit_trips(*how)
        stage = sass.STAGES[feedback]
        trips = [(sass.trip_of(name, stage), trips) for name, trips in units]
        assert sum(sass.issued_by(trip) * n for trip, n in trips) >= multiply_adds(layer, samples)
        of_a_trip = [
            sum(count for name, count in trip.items() if name.startswith("LDS")) for trip, _ in trips
        ]
        assert len(loads) == sum(count * n for count, (_, n) in zip(of_a_trip, trips, strict=True))
        # every number of the weights is read
        numbers, a_word = layer.weight_inputs * layer.channels, 1
        if operand == "bf16" and product.kind == p.LINEAR:
            a_word = 2
        size = layer.weight_inputs * layer.weight_stride // a_word
        weights = {word for words in needed for word in words if 0 <= word - layer.weights < size}
        assert len(weights) >= numbers / a_word


@pytest.mark.parametrize("operand", DEPTHS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_term_is_dealt_out_once(name, operand):
    program = p.Program.from_buffer_copy(made(name, operand).program)
    for _, _, product in live_products(program):
        if product.kind != p.PIXELS:
            continue
        terms = sass.terms_of(product)
        assert len(terms) == product.term_count and product.term_count % DEPTHS[operand] == 0
        for first in range(0, len(terms), DEPTHS[operand]):
            dealt = sorted(k for lanes in sass.lanes_terms(operand, first) for k in lanes)
            assert dealt == list(range(first, first + DEPTHS[operand]))


def test_lines_of_a_load():
    assert sass.wavefronts(sass.Load(1, [7] * 32)) == 1  # the same number for all
    assert sass.wavefronts(sass.Load(1, list(range(100, 132)))) == 1
    assert sass.wavefronts(sass.Load(1, list(range(0, 64, 2)))) == 2
    assert sass.wavefronts(sass.Load(1, list(range(0, 32 * 32, 32)))) == 32
    assert sass.wavefronts(sass.Load(4, list(range(0, 128, 4)))) == 4
    assert sass.wavefronts(sass.Load(4, [0] * 16 + [4] * 16)) == 1
    assert sass.wavefronts(sass.Load(1, [])) == 0
    # four matrices of eight rows, in turn: a row of 16 bytes every 16, every 32, every 144
    assert sass.wavefronts(sass.Load(4, list(range(0, 128, 4)), turns=4)) == 4
    assert sass.wavefronts(sass.Load(4, list(range(0, 256, 8)), turns=4)) == 8
    assert sass.wavefronts(sass.Load(4, list(range(0, 32 * 36, 36)), turns=4)) == 4
    assert sass.wavefronts(sass.Load(4, [0] * 32, turns=4)) == 4


# ---- reading

SOURCE = """\
      return run_pixels_unit<Real, 5>(product, memory, unit, samples, lane);
    pixels<Real, ROWS, true>(product, memory, unit, samples, lane);
      return run_linear_unit<FEEDBACK, Real, 3>(product, memory, unit, groups, samples, lane);
    linear_feedback<Real, SAMPLES>(product, memory, unit / groups, first, samples - first, lane);
      linear_tiles<Operand, FEEDBACK, 4>(product, memory, split, row, group, samples - group, lane);
      pixel_tiles<Operand, 1>(product, memory, unit, samples, lane);
"""
BODY = """\
    products<false>(program, now.memory, highest, lowest, now.samples, warp);
    if (!finish) output_error(now, forward, !forward && depth >= moved, warp);
      products<true>(program, now.memory, depth, moving + 1, now.samples, warp);
"""
HEAD = ".text._ZN6pcfast8resident10relaxationIfEEvNS0_7ProgramENS0_7TensorsENS0_3RunE:\n"


def code(folder, *instructions: tuple[str, int, int]) -> str:
    """Disassembly of instructions, each with the lines of the product's call and of the body's call."""
    products, body = folder / "products.cuh", folder / "relaxation.cuh"
    products.write_text(SOURCE)
    body.write_text(BODY)
    text = HEAD
    for at, (instruction, product, stage) in enumerate(instructions):
        if instruction.startswith("."):
            text += f"{instruction}:\n"
            continue
        if product:
            text += (
                f'\t//## File "{products}", line 1 inlined at "{products}", line {product}\n'
                f'\t//## File "{products}", line {product} inlined at "{body}", line {stage}\n'
            )
        text += f'\t//## File "{body}", line {stage}\n        /*{16 * at:04x}*/                   {instruction} ;\n'
    return text


def times(count: int, *instruction) -> list[tuple]:
    return [instruction] * count


def test_loops_are_found_and_named(tmp_path):
    loops = sass.find_loops(
        code(
            tmp_path,
            (".L_x_1", 0, 0),
            ("IADD3 R1, R2, R3, RZ", 2, 1),
            (".L_x_2", 0, 0),
            *times(2, "LDS.U.128 R4, [R2+0x10]", 2, 1),
            *times(10, "LDS R1, [R2+0x10]", 2, 1),
            *times(20, "FFMA R1, R2.reuse, R3, R1", 2, 1),
            *times(20, "@!P0 FFMA R1, R2.reuse, R3, R1", 2, 1),
            ("@P1 BRA `(.L_x_2)", 2, 1),
            ("@P1 BRA `(.L_x_1)", 2, 1),  # around the other: not an inner one
            (".L_x_3", 0, 0),
            ("FFMA R1, R2.reuse, R3, R1", 0, 2),
            ("@P1 BRA `(.L_x_3)", 0, 2),  # pointwise
            (".L_x_4", 0, 0),
            ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 5, 3),
            ("LDSM.16.M88.4 R4, [R2]", 5, 3),
            *times(2, "LDS.64 R4, [R2]", 5, 3),
            ("IADD3 R1, R2, R3, RZ", 1, 3),  # another call's line
            ("@P1 BRA `(.L_x_4)", 5, 3),
            (".L_x_5", 0, 0),
            ("IADD3 R1, R2, R3, RZ", 4, 3),
            ("@P1 BRA `(.L_x_5)", 4, 3),  # multiplies nothing
            ("@P1 BRA `(.L_x_6)", 4, 3),  # forward
            (".L_x_6", 0, 0),
            *times(16, "FFMA R1, R2.reuse, R3, R1", 4, 3),
            *times(4, "LDS.128 R1, [R2]", 4, 3),  # one too few
            ("@P1 BRA `(.L_x_6)", 4, 3),
        )
    )
    first, second, third = loops
    assert (first.stage, first.product, first.unroll) == ("predict", "pixels<5, adjacent>", 2)
    assert first.instructions == Counter({"LDS": 10, "LDS.128": 2, "FFMA": 40, "BRA": 1})
    assert first.multiplying == 40 and first.loads == 12
    assert (second.stage, second.product, second.unroll) == ("feedback", "linear_tiles<bf16, 1>", 1)
    assert second.loads == 3 and second.multiplying == 1 and second.size == 6
    assert (third.stage, third.product) == ("feedback", "linear_feedback<?>")


def loop(stage: str, product: str, unroll: int = 1) -> sass.Loop:
    trip = sass.trip_of(product, stage)
    return sass.Loop(stage, product, unroll, Counter({n: unroll * count for n, count in trip.items()}))


def test_each_loop_is_known_by_what_it_multiplies_and_loads():
    for stage, name in EVERY_LOOP:
        for unroll in (1, 2, 4):
            names = loop(stage, name, unroll).instructions + Counter(IADD3=3, BRA=1)
            found = sass._named(stage, name.partition("<")[0], names)
            assert (found.product, found.unroll) == (name, unroll)


def test_of_a_products_loops_the_longest_counts(tmp_path):
    loops = sass.find_loops(
        code(
            tmp_path,
            (".L_x_1", 0, 0),
            *(4 * _pixel_tile()),
            ("@P1 BRA `(.L_x_1)", 6, 1),
            (".L_x_2", 0, 0),
            *_pixel_tile(),
            ("@P1 BRA `(.L_x_2)", 6, 1),
        )
    )
    assert [each.unroll for each in loops] == [4]


def _pixel_tile() -> list[tuple]:
    return [
        *times(4, "HMMA.1688.F32.TF32 R4, R8, R12, R4", 6, 1),
        *times(1, "LDS.128 R4, [R2]", 6, 1),
        *times(18, "LDS R4, [R2]", 6, 1),
    ]


@pytest.mark.parametrize(
    ("operand", "missing"),
    [
        ("ieee", "linear_prediction<1> in the predict stage"),
        ("tf32", "linear_tiles<tf32, 1> in the predict stage"),
        ("bf16", "linear_tiles<bf16, 1> in the predict stage"),
    ],
)
def test_a_loop_that_is_missing_is_named(operand, missing):
    with pytest.raises(LookupError, match=f"no inner loop of {missing}"):
        sass.evidence("mlp", made("mlp", operand), [])


def test_evidence_counted_by_hand():
    """784-128-128-10 in bfloat16, one sample a block: a trip is a step of one tile."""
    loops = [loop("predict", "linear_tiles<bf16, 1>", 2), loop("feedback", "linear_tiles<bf16, 1>")]
    found = sass.evidence("mlp", made("mlp", "bf16"), loops)
    output, hidden, feedback = found.rows
    assert (output.units, output.trips) == (2, 8) and (hidden.units, hidden.trips) == (16, 64)
    assert (feedback.units, feedback.trips) == (8, 8)
    # a trip loads and multiplies with four instructions
    assert [row.instructions for row in found.rows] == [4 * 8, 4 * 64, 4 * 8]
    assert [row.multiplying for row in found.rows] == [8, 64, 8]
    assert hidden.issued == 64 * 16 * 8 * 16 and hidden.useful == 128 * 128
    # 18 units for 16 warps: two warps have one of each layer; a step takes its matrix unit four clocks
    assert found.busiest == {"predict": 4 * 20, "feedback": 4 * 2}
    # each number of the weights once, in two bytes; of every tile the state once
    assert hidden.bytes == 2 * 128 * 128 + 4 * 8 * 128


RECORDED = {
    "nvcc": "13.0",
    "loops": {"a": {"instructions": 100, "multiplying": 40, "loads": 18}},
    "networks": {"n": {"instructions": 1000, "wavefronts": 500, "clocks": 700}},
}


@pytest.mark.parametrize(
    ("section", "name", "figures", "nvcc", "problem"),
    [
        ("loops", "a", {}, "13.0", None),
        ("loops", "a", {"instructions": 101}, "13.0", "a: 101 instructions, at most 100"),
        ("loops", "a", {"instructions": 110}, "13.1", None),
        ("loops", "a", {"loads": 20}, "13.1", "a: 20 loads, at most 19.8"),
        (
            "loops",
            "a",
            {"instructions": 190, "multiplying": 80, "loads": 36},
            "13.0",
            None,
        ),  # unrolled twice
        ("loops", "a", {"multiplying": 20}, "13.0", "a: 100 instructions, at most 50"),
        ("networks", "n", {"clocks": 701}, "13.0", "n: 701 clocks, at most 700"),
        ("networks", "n", {"wavefronts": 400}, "13.0", None),
    ],
)
def test_recorded_limits(section, name, figures, nvcc, problem):
    found = copy.deepcopy(RECORDED)
    found[section][name].update(figures)
    problems = sass.check_recorded(found, RECORDED, nvcc)
    assert (problem in problems) if problem else problems == []


def test_loops_without_limits_and_limits_without_loops():
    none = {"nvcc": "13.0", "loops": {}, "networks": {}}
    assert sass.check_recorded(RECORDED, none, "13.0")[0] == f"a: not recorded; {sass.RECORD}"
    assert sass.check_recorded(none, RECORDED, "13.0")[0] == f"a: recorded, but not there; {sass.RECORD}"


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert sass.why_not() == "no nvcc"
