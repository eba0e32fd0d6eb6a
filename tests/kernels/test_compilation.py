"""Every kernel compiles within its recorded limits; and the harness reports each planted fault."""

from __future__ import annotations

import dataclasses

import kernel_cases
import pytest
from compilation import (
    RECORD,
    REGISTER_SLACK,
    Case,
    Result,
    check,
    check_in_use,
    check_recorded,
    compile_kernels,
    matrix_instruction,
    read_limits,
    record,
)

from pcfast.backends.triton.tiles import LinearTiles


def test_every_kernel_keeps_its_limits():
    # One test, not one a case: compile_kernels shares the cases out to processes itself.
    problems = check_recorded(compile_kernels(kernel_cases.QUICK), read_limits())
    problems += check_in_use(kernel_cases.CASES, read_limits())
    assert not problems, "\n".join(problems)


def test_every_kernel_is_compiled_in_every_run():
    def kernels(cases) -> set[str]:
        return {case.kernel for case in cases}

    assert kernels(kernel_cases.QUICK) == kernels(kernel_cases.CASES)
    assert kernels(c for c in kernel_cases.QUICK if c.capability == 90) == kernels(kernel_cases.CASES)


def test_shared_memory_of_a_launch_is_told_as_it_is_compiled():
    """:meth:`LinearTiles.shared_memory_bytes`, which `explain` says, against the recorded compiles."""
    limits, held = read_limits(), set()
    for case in kernel_cases.CASES:
        if case.name.startswith(("linear_", "mlp_")):
            sizes = (case.constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
            tiles = LinearTiles(*sizes, case.warps, case.stages, "")
            precision = next(word for word in ("bf16", "tf32x3", "tf32") if word in case.name)
            told = tiles.shared_memory_bytes(precision, divmod(case.capability, 10))
            compiled = limits[case.name][str(case.capability)]["shared"]
            assert 0 <= compiled - told <= 16, case.name  # tcgen05 also keeps a barrier or two
            held.add((case.kernel, case.capability))
    assert len(held) == 9


def test_distances_to_a_windows_maximum_are_not_fused():
    """As fused they keep the rounding error of a product: 1e-7 of the activations, not of the deviations."""
    cases = kernel_cases.before_max_pools(80)
    for (case, elements), result in zip(cases, compile_kernels([case for case, _ in cases]), strict=True):
        assert check(result, None) == []
        assert result.instructions["sub.rn"] == elements, (case.name, case.constexprs["BEFORE"])


# ---- the harness itself


def product(
    capability=90, dtype="bf16", rows=64, columns=64, reduction=32, precision="ieee", made=False, **fields
) -> Case:
    return Case(
        name="product",
        kernel="compilation_kernels:product",
        signature={"left": f"*{dtype}", "right": f"*{dtype}", "out": "*fp32", "K": "i32"},
        constexprs=dict(
            BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=reduction, PRECISION=precision, IN_REGISTERS=made
        ),
        capability=capability,
        divisible=("left", "right", "out", "K"),
        **fields,
    )


def only(case: Case) -> Result:
    return compile_kernels([case])[0]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_figures_and_instructions(capability, monkeypatch):
    monkeypatch.setenv(
        "TRITON_INTERPRET", "1"
    )  # as in the other tests; the compiling process must not see it
    wide, narrow = compile_kernels(
        [
            product(capability, instruction=matrix_instruction(capability, rows=64, warps=4)),
            product(capability, rows=16, instruction=matrix_instruction(capability, rows=16, warps=4)),
        ]
    )
    assert wide.case.instruction == {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}[capability]
    assert narrow.case.instruction == "mma.sync"
    for result in (wide, narrow):
        assert check(result, None) == []
        assert result.matrix == result.case.instruction
        assert 16 <= result.registers <= 255
        assert result.instructions["cp.async"] > 0
        assert result.seconds > 0
    assert wide.shared >= 2 * (64 * 32) * 2  # at the least one stage of both operands


def test_an_elementwise_kernel_needs_nothing():
    result = only(
        Case(
            name="scale_and_add",
            kernel="compilation_kernels:scale_and_add",
            signature={"x": "*fp32", "y": "*fp32", "factor": "fp32", "n": "i32"},
            constexprs={"SIZE": 256},
            capability=90,
        )
    )
    assert check(result, None) == []
    assert (result.shared, result.spills, result.matrix) == (0, 0, None)


def test_what_is_the_same_to_the_compiler_is_compiled_once():
    first = only(product(rows=32))
    again = only(dataclasses.replace(product(rows=32), name="another name", instruction="wgmma"))
    assert again.seconds == first.seconds
    assert again.case.name == "another name"


def test_float32_operands_are_converted_for_tf32x3_alone():
    # What the interpreter's dot rests on: for plain tf32 triton 3.6 leaves it to the tensor core, which truncates.
    plain, triple = compile_kernels([product(dtype="fp32", precision=p) for p in ("tf32", "tf32x3")])
    assert plain.instructions["cvt.rna.tf32"] == 0
    assert triple.instructions["cvt.rna.tf32"] > 0
    assert triple.instructions["wgmma"] == 3 * plain.instructions["wgmma"]


# ---- planted faults


def test_spills_are_reported():
    result = only(product(80, rows=128, columns=128, reduction=16, warps=2))  # 256 registers of accumulator
    assert result.spills > 0
    (problem,) = check(result, None)
    assert problem == f"product, sm_80: {result.spills} bytes spilled, at most 0"


def test_too_much_shared_memory_is_reported():
    result = only(product(80, reduction=128, stages=7))
    assert result.shared > 166912
    assert check(result, None) == [f"product, sm_80: {result.shared} bytes of shared memory, at most 166912"]


def test_a_missing_instruction_is_reported():
    tensor_core, none = compile_kernels(
        [
            product(rows=32, instruction="wgmma"),
            product(rows=16, columns=16, reduction=16, dtype="fp32", instruction="mma.sync"),
        ]
    )
    assert check(tensor_core, None) == ["product, sm_90: no wgmma, but mma.sync"]
    assert check(none, None) == ["product, sm_90: no mma.sync, but no matrix instruction"]


def test_errors_carry_the_message_of_the_compiler():
    untyped = Case("ill", "compilation_kernels:ill_typed", {"x": "*fp32"}, {}, 90)
    results = compile_kernels(
        [
            untyped,
            dataclasses.replace(untyped, signature={"y": "*fp32"}),
            dataclasses.replace(untyped, kernel="compilation_kernels:none"),
            product(precision="tf64"),
        ]
    )
    problems = ["\n".join(check(result, None)) for result in results]
    assert problems[0].startswith("ill, sm_90: CompilationError: at 2:16:")
    assert "incompatible dimensions at index 0: 4 and 8" in problems[0]
    assert "no type given for ['x'], no such arguments ['y']" in problems[1]
    assert "has no attribute 'none'" in problems[2]
    assert "tf64" in problems[3]


def test_a_crash_of_the_compiler_is_an_error_of_its_case_alone(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("compilation.PROCESSES", 1)
    crash = Case("crash", "crashing:kernel", {}, {}, 90)
    before, crashed, after = compile_kernels([product(rows=16), crash, product(rows=16, columns=16)])
    assert (before.error, after.error) == ("", "")
    assert crashed.error.startswith("the compiler ended with code 3")


# ---- limits


MEASURED = Result(
    product(instruction="wgmma"), seconds=1.0, registers=90, spills=0, shared=1000, instructions={"wgmma": 4}
)
LIMITS = {"registers": 90, "spills": 0, "shared": 1000, "instruction": "wgmma"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"registers": 90 + REGISTER_SLACK}, None),
        ({"registers": 91 + REGISTER_SLACK}, "99 registers, at most 98"),
        ({"shared": 999}, None),
        ({"shared": 1001}, "1001 bytes of shared memory, at most 1000"),
        ({"spills": 4}, "4 bytes spilled, at most 0"),
        ({"hazards": ["no fence"]}, "no fence"),
        ({"instructions": {"wgmma": 4, "tcgen05": 1}}, "runs on tcgen05, recorded is wgmma"),
    ],
)
def test_recorded_limits(change, problem):
    problems = check(dataclasses.replace(MEASURED, **change), LIMITS)
    assert problems == ([] if problem is None else [f"product, sm_90: {problem}"])


def test_recorded_limits_do_not_loosen_those_of_the_chip():
    loose = {**LIMITS, "registers": 255, "shared": 1 << 20}
    assert check(dataclasses.replace(MEASURED, registers=256), loose)
    assert check(dataclasses.replace(MEASURED, shared=232449), loose)
    assert not check(dataclasses.replace(MEASURED, registers=255, shared=232448), loose)


def test_record_and_read(tmp_path):
    path = tmp_path / "limits.json"
    record([MEASURED], path)
    assert read_limits(path) == {"product": {"90": LIMITS}}
    assert check_recorded([MEASURED], read_limits(path)) == []
    other = dataclasses.replace(MEASURED, case=product(80))
    assert check_recorded([MEASURED, other], read_limits(path)) == [
        f"product, sm_80: no recorded limits; {RECORD}"
    ]
    assert check_in_use([MEASURED.case], read_limits(path)) == []
    assert check_in_use([other.case], read_limits(path)) == [
        f"product, sm_90: recorded, but no case; {RECORD}"
    ]
    assert read_limits(tmp_path / "none.json") == {}


def test_what_breaks_the_limits_of_a_chip_or_is_ambiguous_is_not_recorded(tmp_path):
    with pytest.raises(ValueError, match=r"not recorded:\nproduct, sm_90: 8 bytes spilled"):
        record([dataclasses.replace(MEASURED, spills=8)], tmp_path / "limits.json")
    with pytest.raises(ValueError, match="two cases are named product, sm_90"):
        record([MEASURED, MEASURED], tmp_path / "limits.json")
    assert not (tmp_path / "limits.json").exists()
