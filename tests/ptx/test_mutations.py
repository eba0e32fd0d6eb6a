"""Synchronisation deleted from compiled kernels, one instruction at a time, is reported or proven redundant."""

from __future__ import annotations

import dataclasses
import json

import mutations
import pytest
from page_tables import PAGE, renewed

RECORDED = json.loads(mutations.RECORDED.read_text())
#: Those that do not take long; the others by ``make ptx``.
QUICK = (
    "conv_feedback, maps wider than a tile, implicit, sm_80, tf32",
    "conv_predict, maps wider than a tile, implicit, sm_90, bf16",
)


def subject(name: str) -> mutations.Subject:
    return next(subject for subject in mutations.SUBJECTS if subject.name == name)


@pytest.mark.parametrize("name", QUICK)
def test_deletions_are_reported_as_recorded(name):
    outcomes = mutations.delete_each(mutations.launch_of(subject(name)))
    assert not mutations.check(subject(name), outcomes, RECORDED)
    for kind in ("bar.sync", "cp.async.wait_group"):
        assert outcomes[kind].reported > 0, kind


def test_all_subjects_are_recorded_and_no_others():
    assert RECORDED.keys() == {subject.name for subject in mutations.SUBJECTS}


def test_a_change_is_reported():
    name = QUICK[0]
    outcome = mutations.Outcome(3, 2, [mutations.KINDS["bar.sync"]])
    recorded = {name: mutations.figures({"bar.sync": outcome})}
    assert mutations.check(subject(name), {"bar.sync": outcome}, recorded) == []
    (problem,) = mutations.check(
        subject(name), {"bar.sync": dataclasses.replace(outcome, reported=1)}, recorded
    )
    assert problem.startswith(f"{name}: bar.sync: ") and problem.endswith(mutations.RECORD)
    (problem,) = mutations.check(subject(name), {"bar.sync": outcome}, {})
    assert problem == f"{name}: no recorded mutations; {mutations.RECORD}"


def test_the_page_shows_the_record():
    page = PAGE.read_text()
    assert renewed(page, "mutations.py", mutations.table(RECORDED)) == page
