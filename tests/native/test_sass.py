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
from pcfast.resident.floor import live_products, multiply_adds, words_read

needs_tools = pytest.mark.skipif(bool(sass.why_not()), reason=sass.why_not())


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


PROGRAMS = {
    "mnist_cnn": (networks.mnist_cnn, (300, 1, 28, 28)),
    "one image": (lambda: networks.mnist_cnn((1, 11, 12)), (1, 1, 11, 12)),
    "padded_cnn": (padded_cnn, (500, 2, 24, 25)),
    "mlp": (lambda: networks.mlp([784, 128, 128, 10]), (128, 784)),
    "odd mlp": (lambda: networks.mlp([37, 61, 1, 133, 7]), (5000, 37)),
    "wide output": (lambda: networks.mlp([48, 32, 301]), (500, 48)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_loads_one_by_one_need_what_the_floor_counts(name):
    make, shape = PROGRAMS[name]
    program = p.Program.from_buffer_copy(sass.placed(make(), shape).program)
    samples, group = program.samples, program.group
    for l, feedback, product in live_products(program):
        loads = list(sass.loads_of(product, feedback, samples, group))
        needed = [sass.words_needed(load) for load in loads]
        assert sum(map(len, needed)) == words_read(product, feedback, samples, group)
        assert all(min(words) >= 0 and max(words) < program.elements for words in needed)
        trips = sum(sass.unit_trips(product, feedback, samples, group))
        issued = trips * sass.multiply_adds_of_a_trip(product, group) * sass.WARP
        assert issued >= multiply_adds(program.layers[l - 1], samples)
        # every number of the weights is read
        weights = {word for words in needed for word in words if word >= product.weights}
        assert len(weights) >= product.out * product.channels * product.taps_y * product.taps_x


def test_lines_of_a_load():
    assert sass.wavefronts((1, [7] * 32)) == 1  # the same number for all
    assert sass.wavefronts((1, list(range(100, 132)))) == 1
    assert sass.wavefronts((1, list(range(0, 64, 2)))) == 2
    assert sass.wavefronts((1, list(range(0, 32 * 32, 32)))) == 32
    assert sass.wavefronts((4, list(range(0, 128, 4)))) == 4
    assert sass.wavefronts((4, [0] * 16 + [4] * 16)) == 1


# ---- reading

SOURCE = """\
  switch (product.kind) {
      pixels<Real, 5>(product, memory, unit, samples, lane);
      linear_prediction<Real, GROUP>(product, memory, unit / groups, first, samples - first, lane);
"""
BODY = """\
    products<false, Real, GROUP>(program, now.memory, moved, now.samples, warp);
    output_error(now, depth >= moved, warp);
    products<true, Real, GROUP>(program, now.memory, lowest + 1, now.samples, warp);
"""
HEAD = ".text._ZN6pcfast8resident10relaxationIfLi3EEEvNS0_7ProgramENS0_7TensorsENS0_3RunE:\n"


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


def test_loops_are_found_and_named(tmp_path):
    loops = sass.find_loops(
        code(
            tmp_path,
            (".L_x_1", 0, 0),
            ("IADD3 R1, R2, R3, RZ", 2, 1),
            (".L_x_2", 0, 0),
            ("LDS R1, [R2+0x10]", 2, 1),
            ("FFMA R1, R2.reuse, R3, R1", 2, 1),
            ("@!P0 FFMA R1, R2.reuse, R3, R1", 2, 1),
            ("@P1 BRA `(.L_x_2)", 2, 1),
            ("@P1 BRA `(.L_x_1)", 2, 1),  # around the other: not an inner one
            (".L_x_3", 0, 0),
            ("FFMA R1, R2.reuse, R3, R1", 0, 2),
            ("@P1 BRA `(.L_x_3)", 0, 2),  # pointwise
            (".L_x_4", 0, 0),
            ("LDS.U.128 R4, [R2]", 3, 3),
            ("HMMA.16816.F32.BF16 R4, R8, R12, R4", 3, 3),
            ("@P1 BRA `(.L_x_4)", 3, 3),
            (".L_x_5", 0, 0),
            ("IADD3 R1, R2, R3, RZ", 3, 3),
            ("@P1 BRA `(.L_x_5)", 3, 3),  # multiplies nothing
            ("@P1 BRA `(.L_x_6)", 3, 3),  # forward
            (".L_x_6", 0, 0),
        )
    )
    first, second = loops
    assert (first.kernel, first.stage, first.product) == ("relaxation<float, 3>", 0, "pixels<5>")
    assert first.instructions == Counter(LDS=1, FFMA=2, BRA=1) and first.multiply_adds == 2
    assert (second.stage, second.product) == (1, "linear_prediction<3>")
    assert second.loads == {"LDS.128": 1} and second.multiply_adds == 1


def test_a_loop_that_does_not_fit_the_program_is_named(tmp_path):
    placement = sass.placed(*_made("mlp"))
    with pytest.raises(LookupError, match=r"no inner loop of linear_prediction<1> in the predict stage"):
        sass.evidence("mlp", placement, [])
    loops = [
        sass.Loop("relaxation<float, 1>", stage, product, Counter({"FFMA": 16, "LDS.128": 4}))
        for stage, product in enumerate(("linear_prediction<1>", "linear_feedback<1>"))
    ]
    with pytest.raises(LookupError, match=r"20 loads in 4 trips"):
        sass.evidence("mlp", placement, loops)


def _made(name: str):
    make, shape = PROGRAMS[name]
    return make(), shape


RECORDED = {
    "nvcc": "13.0",
    "loops": {"a": {"instructions": 100, "multiply-adds": 40, "loads": 18}},
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
            {"instructions": 190, "multiply-adds": 80, "loads": 36},
            "13.0",
            None,
        ),  # unrolled twice
        ("loops", "a", {"multiply-adds": 20}, "13.0", "a: 100 instructions, at most 50"),
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
