"""What compiled kernels execute for sm_90a, counted by the executor: held to profile.json, shown in docs/kernels.md.

python tests/ptx/kernel_profile.py            # print the table and compare with profile.json
python tests/ptx/kernel_profile.py --record   # and write profile.json and the table of docs/kernels.md

A row is an iteration of one thread block, as the difference of two relaxations, where one launch runs all iterations;
else it is one program of the last launch, in which every layer is live. PTX is counted, not machine code: ptxas drops
most moves and reads of parameters, and some address arithmetic. A warp whose threads part counts once for each part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
RECORDED = TESTS / "profile.json"
RECORD = "python tests/ptx/kernel_profile.py --record"
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:0] = [str(TESTS.parent / name) for name in ("", "native", "kernels")]

import cases  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from cases import Case, Scenario  # noqa: E402
from executor import Profile  # noqa: E402
from page_tables import PAGE, renewed  # noqa: E402

import pcfast  # noqa: E402
from pcfast import networks  # noqa: E402

#: Another release of nvcc or triton compiles otherwise.
SLACK = 0.1
_CHIP, _SM_COUNT = 90, 132
#: Iterations of the two relaxations: all layers are live in each of the difference, and the Gram form pays in both.
_FEW, _MANY = 10, 14


def _drawn(make: Callable, sample: tuple[int, ...], batch: int) -> Callable:
    def draw():
        torch.manual_seed(0)
        model = make()
        return model, torch.randn(batch, *sample), torch.randint(0, 10, (batch,))

    return draw


_MLP_128 = _drawn(lambda: networks.mlp([784, 128, 128, 10]), (784,), 128)
_MLP_600 = _drawn(networks.mlp_600, (784,), 300)
_MNIST_CNN = _drawn(networks.mnist_cnn, (1, 28, 28), 300)
_VGG5 = _drawn(networks.vgg5, (3, 32, 32), 8)
_LABELS_1000 = _drawn(lambda: networks.mlp([784, 128, 1000]), (784,), 128)
_LABELS_2000 = _drawn(lambda: networks.mlp([784, 128, 2000]), (784,), 16)


@dataclass(frozen=True)
class Workload:
    """Kernels to count in a scenario, in some precisions.

    Attributes:
        block: the thread block that is counted. quick: of the precisions those that ``make test`` counts it in.
    """

    scenario: Scenario
    block: int
    precisions: tuple[str, ...]
    quick: tuple[str, ...]

    def counted_in(self, quick: bool) -> tuple[str, ...]:
        return self.quick if quick else self.precisions

    def names(self, precision: str) -> list[str]:
        """Of the rows, a kernel each."""
        return [f"{kernel}, {self.scenario.name}, {precision}" for kernel in self.scenario.kernels]


def _workload(
    name: str, make: Callable, *kernels: str, num_steps: int = 4, close: bool = False, block: int = 0,
    precisions: tuple[str, ...] = cases.PRECISIONS, quick: tuple[str, ...] = ("bf16",), **settings,
) -> Workload:  # fmt: skip
    scenario = Scenario(name, make, kernels, num_steps, close, sm_count=_SM_COUNT, **settings)
    return Workload(scenario, block, precisions, quick)


_WITHOUT_PRODUCTS = ("ieee", "bf16")
WORKLOADS = (
    _workload("mnist_cnn, batch 300", _MNIST_CNN, "resident"),
    _workload("784-128-128-10, batch 128", _MLP_128, "resident", quick=()),
    _workload("784-128-128-10, batch 128", _MLP_128, "mlp_relaxation", close=True),
    _workload("mlp_600, batch 300", _MLP_600, "linear_predict", quick=("tf32",)),
    # behind the 50 tiles of the output layer's feedback lie those of 600 x 600
    _workload("mlp_600, batch 300", _MLP_600, "linear_feedback", block=60),
    _workload("mnist_cnn, batch 300", _MNIST_CNN, *cases.IMPLICIT_KERNELS, num_steps=6, implicit=True),
    _workload("vgg5, batch 8", _VGG5, *cases.POINTWISE_KERNELS, precisions=_WITHOUT_PRODUCTS),
    # the Gram form pays from 7 iterations on
    _workload(
        "mnist_cnn, batch 300", _MNIST_CNN, "pointwise_gram_kernel", num_steps=8, precisions=_WITHOUT_PRODUCTS
    ),
    _workload(
        "784-128-1000, batch 128", _LABELS_1000, "output_error_kernel", loss="mse_mean", precisions=("bf16",)
    ),
    _workload("784-128-2000, batch 16", _LABELS_2000, "wide_cross_entropy_kernel", precisions=("bf16",)),
)


@dataclass(frozen=True)
class Row:
    """Counts of one kernel in one workload and precision.

    Attributes:
        unit: what was counted. instructions: by class, in instructions of warps.
        wavefronts: of shared memory, by kind of access; conflicts: of them those that conflicts of banks cost.
        sectors: of global memory, by kind of access.
    """

    name: str
    unit: str
    instructions: dict[str, int]
    wavefronts: dict[str, int]
    conflicts: dict[str, int]
    sectors: dict[str, int]

    def figures(self) -> dict[str, int]:
        """All counts, flat."""
        result = {"instructions": sum(self.instructions.values())}
        for title in ("instructions", "wavefronts", "conflicts", "sectors"):
            result |= {f"{title}, {kind}": count for kind, count in sorted(getattr(self, title).items())}
        return result


def _counted(name: str, unit: str, of: Profile, without: Profile | None = None, per: int = 1) -> Row:
    def difference(get: Callable[[Profile], Counter]) -> dict[str, int]:
        result = Counter(get(of))
        if without is not None:
            result.subtract(get(without))
        return {kind: round(count / per) for kind, count in result.items() if count}

    return Row(
        name, unit,
        difference(lambda profile: profile.instructions),
        difference(lambda profile: profile.wavefronts),
        difference(lambda profile: Counter(profile.wavefronts) - Counter(profile.ideal)),
        difference(lambda profile: profile.sectors),
    )  # fmt: skip


def _profiles(
    workload: Workload, precision: str, num_steps: int, resident_ptx: Callable
) -> dict[str, list[Profile]]:
    """Of each kernel the profiles of its launches, of one block."""
    model, x, y = workload.scenario.make()
    if workload.scenario.loss:
        y = torch.randn(len(x), model(x).shape[1])
    case = Case(workload.scenario, _CHIP, precision)
    settings = dict(cases.settings_of(workload.scenario), num_steps=num_steps, check="off")
    result: dict[str, list[Profile]] = {}
    with (
        cases.in_precision(precision),
        cases.device_of(case, resident_ptx, profiled=True, only=[workload.block]) as device,
    ):
        pcfast.relax(model, x, y, backend="cuda" if case.resident else "triton", **settings)
        assert not device.reports, device.reports
        for ran in device.launches:
            result.setdefault(getattr(ran, "name", "resident"), []).append(ran.profile)
    return result


def row_names(quick: bool = False) -> set[str]:
    """Names of the rows that `rows` counts."""
    return {
        name
        for workload in WORKLOADS
        for precision in workload.counted_in(quick)
        for name in workload.names(precision)
    }


def rows(resident_ptx: Callable, quick: bool = False) -> Iterator[Row]:
    """All rows, or what ``make test`` counts of them. resident_ptx: of an architecture the resident kernel's PTX."""
    for workload in WORKLOADS:
        kernels = workload.scenario.kernels
        for precision in workload.counted_in(quick):
            names = workload.names(precision)
            if kernels[0] in ("resident", "mlp_relaxation"):
                few, many = (
                    _profiles(workload, precision, n, resident_ptx)[kernels[0]] for n in (_FEW, _MANY)
                )
                counted = sum(many, Profile()), sum(few, Profile()), _MANY - _FEW
                yield _counted(names[0], "an iteration of a block", *counted)
            else:
                result = _profiles(workload, precision, workload.scenario.num_steps, resident_ptx)
                for kernel, name in zip(kernels, names, strict=True):
                    yield _counted(name, "a program", result[kernel][-1])


def compilers() -> dict[str, str]:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return {"triton": triton.__version__, "nvcc": re.search(r"release ([\d.]+)", said).group(1)}


def check(result: list[Row], recorded: dict, by: dict[str, str]) -> list[str]:
    """What differs from the record, one line each. by: releases of the compilers."""
    slack = 0.0 if by == recorded["compilers"] else SLACK
    problems = [
        f"{name}: recorded, but no such row; {RECORD}"
        for name in recorded["rows"].keys() - {r.name for r in result}
    ]
    for row in result:
        limits = recorded["rows"].get(row.name)
        if limits is None:
            problems.append(f"{row.name}: no recorded profile; {RECORD}")
            continue
        figures = row.figures()
        if row.unit != limits["unit"]:
            problems.append(f"{row.name}: counts {row.unit}, recorded is {limits['unit']}; {RECORD}")
        for kind in figures.keys() | (limits.keys() - {"unit"}):
            now, then = figures.get(kind, 0), limits.get(kind, 0)
            if abs(now - then) > slack * then:
                problems.append(f"{row.name}: {now} {kind}, recorded {then}; {RECORD}")
    return sorted(problems)


def table(recorded: dict) -> str:
    """In Markdown."""
    lines = [
        "| kernel, workload | counted | instructions | integer | products | shared loads | shared stores | sectors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in recorded["rows"].items():

        def count(*kinds: str, figures=figures) -> int:
            return sum(figures.get(kind, 0) for kind in kinds)

        products = [
            f"{figures[key]:,} {kind}"
            for kind in ("fma", "mma", "wgmma")
            if (key := f"instructions, {kind}") in figures
        ]
        loads, lost = count("wavefronts, load"), count("conflicts, load")
        cells = [
            name, figures["unit"], f"{figures['instructions']:,}", f"{count('instructions, integer'):,}",
            ", ".join(products), f"{loads:,}" + (f" ({lost:,})" if lost else ""),
            f"{count('wavefronts, store', 'wavefronts, cp.async'):,}",
            f"{count('sectors, load', 'sectors, store'):,}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    from resident_files import resident_files

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} and {PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, resident_files(Path(folder)) as resident_ptx:
        result = list(rows(resident_ptx))
    recorded = {
        "compilers": compilers(),
        "rows": {row.name: {"unit": row.unit, **row.figures()} for row in result},
    }
    print(table(recorded))
    if arguments.record:
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
        PAGE.write_text(renewed(PAGE.read_text(), Path(__file__).name, table(recorded)))
    elif problems := check(result, json.loads(RECORDED.read_text()), recorded["compilers"]):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
