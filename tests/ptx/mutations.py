"""Deletes the synchronisation of compiled kernels one instruction at a time: what is missed is reported.

python tests/ptx/mutations.py            # delete everywhere and compare with mutations.json; a quarter of an hour
python tests/ptx/mutations.py --record   # and write mutations.json and the table of docs/kernels.md

A launch is recorded and run again without the instruction. A deletion that is not reported is redundant: where a
kernel touches memory depends on its threads, on the trips of its loops and on its arguments, never on data, and the
launches run every pipelined loop for more trips than it has stages. What no two threads touch out of order there they
never do with such arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
RECORDED = TESTS / "mutations.json"
RECORD = "python tests/ptx/mutations.py --record"
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:0] = [str(TESTS.parent / name) for name in ("", "native", "kernels")]

import cases  # noqa: E402
import torch  # noqa: E402
from cases import Case  # noqa: E402
from executor import Deadlock, translate  # noqa: E402
from executor.launching import Recorded  # noqa: E402
from executor.parser import Instruction, Kernel  # noqa: E402
from page_tables import PAGE, renewed  # noqa: E402

#: What is deleted -> why one that is not reported is redundant.
KINDS = {
    "bar.sync": "what a thread stores on one side no other thread touches on the other",
    "bar.warp.sync": "what a thread stores on one side no other thread of its warp touches on the other",
    "cp.async.commit_group": "its copies join the next group, which every wait that covers them covers",
    "cp.async.wait_group": "the waits beside it cover its copies before they are read",
    "fence.proxy.async": "no wgmma before the next fence reads what its threads wrote since the fence before",
    "wgmma.fence": "no register of the product was written since the fence before",
    "wgmma.commit_group": "the products behind it add to the same sums, and the wait behind those covers all",
    "wgmma.wait_group": "the products behind it add to the same sums, and the wait behind those covers all",
}
#: Of a barrier where it says more.
_COPIES_ALONE = (
    "since the barrier in front copies are only started, to other places than those started behind it"
)


@dataclass(frozen=True)
class Subject:
    """A kernel of a case, the launch of it that executes most."""

    case: Case
    kernel: str

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.case.id}"


@dataclass
class Outcome:
    """Of one kind of instruction: how many were deleted and how many reported; of the others the reasons."""

    deleted: int = 0
    reported: int = 0
    redundant: list[str] | None = None


def _subjects() -> list[Subject]:
    by_name = {scenario.name: scenario for scenario in cases.SCENARIOS}
    everywhere = [("long sums", kernel) for kernel in cases.STAGES]
    everywhere += [("maps wider than a tile, implicit", kernel) for kernel in cases.IMPLICIT_KERNELS]
    in_bf16 = [
        ("long sums, one launch", "mlp_relaxation"), ("wide mse", "output_error_kernel"),
        ("wide cross-entropy", "wide_cross_entropy_kernel"), ("conv", "pointwise_update_kernel"),
        ("Gram form, tanh", "pointwise_gram_kernel"), ("resident mlp, given beliefs", "resident"),
        ("resident conv, given beliefs", "resident"),
    ]  # fmt: skip
    result = []
    for chip in cases.CHIPS:
        for name, kernel in everywhere:
            result += [
                Subject(Case(by_name[name], chip, precision), kernel) for precision in cases.PRECISIONS
            ]
        result += [Subject(Case(by_name[name], chip, "bf16"), kernel) for name, kernel in in_bf16]
    return result


SUBJECTS = _subjects()


def _kind(instruction: Instruction) -> str | None:
    op = ".".join(instruction.op)
    return next((kind for kind in KINDS if op.startswith(kind)), None)


def launch_of(subject: Subject, resident_ptx: Callable | None = None) -> Recorded:
    """The launch of its kernel that executes most. resident_ptx: see cases.device_of."""
    launches: list[Recorded] = []
    cases.run(subject.case, resident_ptx, record=launches)
    mine = [launch for launch in launches if subject.kernel in ("resident", launch.translation.kernel.name)]
    return max(mine, key=lambda launch: launch.run().executed)


def _reason(kernel: Kernel, index: int) -> str:
    kind = _kind(kernel.instructions[index])
    if kind == "bar.sync":
        for before in reversed(kernel.instructions[:index]):
            if before.root == "bar":
                return _COPIES_ALONE
            if before.root in ("ld", "st", "ldmatrix", "stmatrix", "bra") and "global" not in before.op:
                break
    return KINDS[kind]


def delete_each(launch: Recorded) -> dict[str, Outcome]:
    """Every kind's outcome over the instructions that the launch runs."""
    kernel, whole = launch.translation.kernel, launch.run()
    known = {report.what for report in whole.reports}
    ran = [b for b in launch.translation.blocks if whole.visited[b.number]]
    result: dict[str, Outcome] = {}
    for index in sorted(i for block in ran for i in range(block.first, block.last)):
        instruction = kernel.instructions[index]
        kind = _kind(instruction)
        if kind is None:
            continue
        outcome = result.setdefault(kind, Outcome(redundant=[]))
        outcome.deleted += 1
        if _reported(launch, translate(kernel, without=instruction.line), known):
            outcome.reported += 1
        else:
            outcome.redundant.append(_reason(kernel, index))
    return result


def _reported(launch: Recorded, translation, known: set[str]) -> bool:
    try:
        return any(report.what not in known for report in launch.run(translation).reports)
    except Deadlock:
        return True


def figures(outcomes: dict[str, Outcome]) -> dict[str, dict]:
    """As JSON has them: of each kind the numbers, and how often each reason holds."""
    return {
        kind: {
            "deleted": outcome.deleted,
            "reported": outcome.reported,
            "redundant": {
                reason: outcome.redundant.count(reason) for reason in sorted(set(outcome.redundant))
            },
        }
        for kind, outcome in sorted(outcomes.items())
    }


def check(subject: Subject, outcomes: dict[str, Outcome], recorded: dict) -> list[str]:
    """What differs from the record, one line each."""
    expected, result = recorded.get(subject.name), figures(outcomes)
    if expected is None:
        return [f"{subject.name}: no recorded mutations; {RECORD}"]
    return [
        f"{subject.name}: {kind}: {result.get(kind)}, recorded {expected.get(kind)}; {RECORD}"
        for kind in sorted(result.keys() | expected.keys())
        if result.get(kind) != expected.get(kind)
    ]


def table(recorded: dict) -> str:
    """In Markdown: reported of deleted, by kernel and chip, then the reasons of the others."""
    totals: dict[tuple[str, str], dict[str, list[int]]] = {}
    reasons: dict[tuple[str, str], int] = {}
    for name, kinds in recorded.items():
        kernel, chip = (
            name.partition(",")[0],
            next(part for part in name.split(", ") if part.startswith("sm_")),
        )
        for kind, outcome in kinds.items():
            total = totals.setdefault((kernel, chip), {}).setdefault(kind, [0, 0])
            total[0] += outcome["reported"]
            total[1] += outcome["deleted"]
            for reason, count in outcome["redundant"].items():
                reasons[kind, reason] = reasons.get((kind, reason), 0) + count
    lines = ["| kernel, chip | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    for (kernel, chip), kinds in sorted(totals.items()):
        cells = [" of ".join(map(str, kinds[kind])) if kind in kinds else "" for kind in KINDS]
        lines.append(f"| {kernel}, {chip} | " + " | ".join(cells) + " |")
    lines += ["", "| not reported | why it is redundant | how many |", "|---|---|---|"]
    lines += [f"| {kind} | {reason} | {count} |" for (kind, reason), count in sorted(reasons.items())]
    return "\n".join(lines)


def main() -> None:
    from resident_files import resident_files

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} and {PAGE.name}")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="subjects whose names match; others stay recorded"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    problems, result = [], {}
    with tempfile.TemporaryDirectory() as folder, resident_files(Path(folder)) as resident_ptx:
        for subject in SUBJECTS:
            if not re.search(arguments.only, subject.name):
                if subject.name in recorded:
                    result[subject.name] = recorded[subject.name]
                continue
            outcomes = delete_each(launch_of(subject, resident_ptx))
            result[subject.name] = figures(outcomes)
            problems += check(subject, outcomes, recorded)
            said = ", ".join(f"{k} {o.reported} of {o.deleted}" for k, o in outcomes.items())
            print(f"{subject.name}: {said}", flush=True)
    if arguments.record:
        RECORDED.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(renewed(PAGE.read_text(), Path(__file__).name, table(result)))
    elif problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
