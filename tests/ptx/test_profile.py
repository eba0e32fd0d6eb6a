"""What compiled kernels execute is what is recorded; and the check of it reports what is not."""

from __future__ import annotations

import dataclasses
import json

import kernel_cases
import kernel_profile
import pytest
from native_build import needs_gcc
from page_tables import PAGE, renewed

from pcfast.backends.cuda import native

RECORDED = json.loads(kernel_profile.RECORDED.read_text())


def a_row() -> kernel_profile.Row:
    return kernel_profile.Row(
        "kernel, net, ieee", "a program", {"integer": 30, "fma": 70}, {"load": 8}, {"load": 2}, {}
    )


def record_of(row: kernel_profile.Row, by: dict) -> dict:
    return {"compilers": by, "rows": {row.name: {"unit": row.unit, **row.figures()}}}


QUICK = kernel_profile.row_names(quick=True)


@needs_gcc
def test_kernels_execute_what_is_recorded(host_module, resident_ptx, monkeypatch):
    """Each kernel in one precision; ``make ptx`` counts all rows."""
    monkeypatch.setenv(native.ON_HOST, str(host_module))
    recorded = {**RECORDED, "rows": {n: figures for n, figures in RECORDED["rows"].items() if n in QUICK}}
    result = list(kernel_profile.rows(resident_ptx, quick=True))
    problems = kernel_profile.check(result, recorded, kernel_profile.compilers())
    assert not problems, "\n".join(problems)


def test_every_kernel_has_a_profile():
    compiled = {case.kernel.partition(":")[2] for case in kernel_cases.CASES} | {"resident"}
    assert {name.partition(",")[0] for name in QUICK} == compiled
    assert RECORDED["rows"].keys() == kernel_profile.row_names()


def test_the_page_shows_the_record():
    page = PAGE.read_text()
    assert renewed(page, "kernel_profile.py", kernel_profile.table(RECORDED)) == page


@pytest.mark.parametrize("by", [{"triton": "1"}, {"triton": "2"}])
def test_what_differs_is_reported(by):
    """Exactly with the same compilers; a tenth more or less with others."""
    row = a_row()
    recorded = record_of(row, {"triton": "1"})
    assert kernel_profile.check([row], recorded, by) == []
    slightly = dataclasses.replace(row, instructions={"integer": 31, "fma": 70})
    result = kernel_profile.check([slightly], recorded, by)
    assert (result == []) == (by == {"triton": "2"})
    more = dataclasses.replace(row, conflicts={"load": 3})
    (problem,) = kernel_profile.check([more], recorded, by)
    assert problem.startswith(
        "kernel, net, ieee: 3 conflicts, load, recorded 2; python tests/ptx/kernel_profile.py"
    )


def test_a_kernel_without_a_record_is_reported_by_name():
    row = a_row()
    recorded = record_of(row, {})
    new = dataclasses.replace(row, name="another kernel, net, ieee")
    problems = kernel_profile.check([new], recorded, {})
    assert [problem.partition(";")[0] for problem in problems] == [
        "another kernel, net, ieee: no recorded profile",
        "kernel, net, ieee: recorded, but no such row",
    ]
