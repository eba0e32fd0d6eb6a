"""Every CUDA kernel compiles for two chips within its recorded limits; the harness reports planted faults."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from native_compilation import (
    QUICK_CHIPS,
    RECORD,
    REGISTER_SLACK,
    Case,
    Kernel,
    Result,
    cases,
    check,
    check_recorded,
    compile_sources,
    read_limits,
    record,
    release,
)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_nvcc
def test_every_kernel_keeps_its_limits():
    # One test, not one a case: compile_sources runs two compilers side by side itself.
    problems = check_recorded(compile_sources(cases(QUICK_CHIPS)), read_limits(), release())
    assert not problems, "\n".join(problems)


# ---- the harness itself

SOURCE = """
namespace {
template <int ROWS>
__global__ void reversed(float* at) {
  __shared__ float row[ROWS * 32];
  row[threadIdx.x] = at[threadIdx.x];
  __syncthreads();
  at[threadIdx.x] = row[ROWS * 32 - 1 - threadIdx.x];
}
template __global__ void reversed<2>(float*);
}  // namespace
__global__ void nothing() {}

// 128 numbers wait for each other, in 32 registers.
__global__ void __launch_bounds__(1024, 2) hoarding(float* at) {
  float kept[128];
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
    for (int i = 0; i < 128; ++i) kept[i] = pass ? kept[i] * kept[(i + 17) % 128] : at[threadIdx.x * 128 + i];
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) at[threadIdx.x * 128 + i] = kept[i];
}
"""


@pytest.fixture
def planted(tmp_path):
    def plant(source: str) -> Case:
        path = tmp_path / "planted.cu"
        path.write_text(source)
        return Case(path, "80")

    return plant


@needs_nvcc
def test_figures_names_and_spills(planted):
    (result,) = compile_sources([planted(SOURCE)])
    assert result.error == "" and result.seconds > 0
    found = {kernel.name: kernel for kernel in result.kernels}
    assert list(found) == [
        f"planted.cu: {name}" for name in ("(anonymous namespace)::reversed<2>", "hoarding", "nothing")
    ]
    plain = found["planted.cu: (anonymous namespace)::reversed<2>"]
    assert 4 <= plain.registers <= 32
    assert (plain.shared, plain.spills, plain.stack) == (2 * 32 * 4, 0, 0)
    assert check(plain, None) == []
    spilling = found["planted.cu: hoarding"]
    assert spilling.registers == 32 and spilling.stack > 0
    assert check(spilling, None) == [
        f"planted.cu: hoarding, sm_80: {spilling.spills} bytes spilled, at most 0"
    ]


@needs_nvcc
def test_an_error_carries_the_message_of_the_compiler(planted, tmp_path):
    results = compile_sources([planted("__global__ void wrong() { undeclared(); }\n")])
    (problem,) = check_recorded(
        results, {"nvcc": "", "kernels": {"planted.cu: wrong": {"80": {}}}}, release()
    )
    assert problem.startswith("planted.cu, sm_80: ") and 'identifier "undeclared" is undefined' in problem
    with pytest.raises(ValueError, match=r"not recorded:\nplanted.cu, sm_80: "):
        record(results, release(), tmp_path / "limits.json")
    assert not (tmp_path / "limits.json").exists()


@needs_nvcc
def test_a_warning_is_an_error(planted):
    (result,) = compile_sources([planted("__global__ void idle(int* at) { int unused; *at = 1; }\n")])
    assert "was declared but never referenced" in result.error


def measured(case: Case, **figures) -> Result:
    kernel = Kernel(
        "planted.cu: product", case.chip, **{**dict(registers=90, stack=16, shared=1024), **figures}
    )
    return Result(case, 1.0, kernels=(kernel,))


LIMITS = {
    "nvcc": "13.0",
    "kernels": {"planted.cu: product": {"80": {"registers": 90, "stack": 16, "shared": 1024}}},
}
AT = "planted.cu: product, sm_80"


@pytest.mark.parametrize(
    ("figures", "nvcc", "problem"),
    [
        ({}, "13.0", None),
        ({"registers": 91}, "13.0", "91 registers, at most 90"),
        ({"registers": 90 + REGISTER_SLACK}, "13.1", None),
        ({"registers": 91 + REGISTER_SLACK}, "13.1", "99 registers, at most 98"),
        ({"stack": 24}, "13.0", "24 bytes of stack, at most 16"),
        ({"shared": 1028}, "13.1", "1028 bytes of shared memory, at most 1024"),
        ({"spills": 4}, "13.0", "4 bytes spilled, at most 0"),
        ({"registers": 1, "stack": 0, "shared": 0}, "13.0", None),
    ],
)
def test_recorded_limits(figures, nvcc, problem, planted):
    problems = check_recorded([measured(planted(""), **figures)], LIMITS, nvcc)
    assert problems == ([] if problem is None else [f"{AT}: {problem}"])


def test_a_kernel_without_limits_and_limits_without_a_kernel(planted):
    result = measured(planted(""))
    assert check_recorded([result], {"nvcc": "", "kernels": {}}, "13.0") == [
        f"{AT}: no recorded limits; {RECORD}"
    ]
    stale = dataclasses.replace(result, kernels=())
    assert check_recorded([stale], LIMITS, "13.0") == [f"{AT}: recorded, but no such kernel; {RECORD}"]
    assert check_recorded([], LIMITS, "13.0") == [f"{AT}: recorded, but no such kernel; {RECORD}"]


def test_record_and_read(planted, tmp_path):
    path = tmp_path / "limits.json"
    record([measured(planted(""))], "13.0", path)
    assert read_limits(path) == LIMITS
    assert read_limits(tmp_path / "none.json") == {"nvcc": "", "kernels": {}}


def test_what_spills_or_is_ambiguous_is_not_recorded(planted, tmp_path):
    path = tmp_path / "limits.json"
    result = measured(planted(""))
    with pytest.raises(ValueError, match=rf"not recorded:\n{AT}: 8 bytes spilled"):
        record([measured(planted(""), spills=8)], "13.0", path)
    with pytest.raises(ValueError, match="two kernels have this name"):
        record([result, result], "13.0", path)
    assert not path.exists()
