"""Constants of a GPU that floors need: sizes, clock, bandwidths, rates; a unit in every name.

bench/constants/measure.py measures them and writes a JSON file; :func:`load` reads it. What was not measured comes
from the table of :mod:`pcfast.backends.chips`, and ``source`` says so field by field.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..support.log import info_once
from . import chips
from .chips import Chip

#: Where :func:`load` looks when it is given no path.
PATH_VARIABLE = "PCFAST_CONSTANTS"


@dataclass(frozen=True)
class Constants:
    """One GPU. How each was measured: bench/constants/.

    Attributes:
        device: name of the GPU that the constants are used for.
        chip: the published figures.
        sm_count: SMs.
        sm_clock_mhz: as seen under light work.
        l2_bytes, shared_memory_per_block_bytes, shared_memory_per_sm_bytes: sizes; a block's with the opt-in.
        shared_memory_bytes_per_clk_sm: read by a block from its own shared memory.
        copy_bandwidth_gbs: device memory, bytes read plus bytes written.
        matmul_bf16_tflops, matmul_tf32_tflops: large matrix products through torch.
        source: field -> "measured <device> <date>", "published: <where>", "estimate: <why>" or "torch".
    """

    device: str
    chip: Chip
    sm_count: int
    sm_clock_mhz: float
    l2_bytes: int
    shared_memory_per_block_bytes: int
    shared_memory_per_sm_bytes: int
    shared_memory_bytes_per_clk_sm: float
    copy_bandwidth_gbs: float
    matmul_bf16_tflops: float
    matmul_tf32_tflops: float
    source: Mapping[str, str] = field(hash=False)

    def is_measured(self, name: str) -> bool:
        """Whether all of field ``name`` was measured on this device."""
        return self.source[name].startswith("measured ")


NAMES = tuple(known.name for known in fields(Constants) if known.name not in ("device", "chip", "source"))
WHOLE_NUMBERS = frozenset(name for name in NAMES if Constants.__annotations__[name] == "int")

_PROGRAMMING_GUIDE = "published: CUDA C++ Programming Guide"
_H200 = "estimate: one run on an H200, 2026-10-28, through torch"
# What was seen on a chip, by alias, and is nearer to what a kernel can reach than the published peak.
_SEEN: dict[str, dict[str, tuple[float, str]]] = {
    "h200": {
        "sm_clock_mhz": (1980, _H200),
        "copy_bandwidth_gbs": (4300.0, _H200),
        "matmul_bf16_tflops": (780.0, _H200 + " (770 to 800)"),
        "matmul_tf32_tflops": (390.0, "estimate: half of bf16, as the datasheet has it"),
    }
}


def defaults(chip: Chip) -> dict[str, tuple[float, str]]:
    """Field -> (value, source) of what was not measured."""
    published = f"published: {chip.source}"
    foreign = f"; of an {chip.figures_of}, not of {chip.name}" if chip.figures_of else ""
    rates = {
        "sm_clock_mhz": (chip.sm_clock_mhz, published),
        "l2_bytes": (chip.l2_bytes, published),
        "shared_memory_bytes_per_clk_sm": (128.0, _PROGRAMMING_GUIDE + ": 32 banks of 32 bits a clock"),
        "copy_bandwidth_gbs": (chip.memory_bandwidth_gbs, published),
        "matmul_bf16_tflops": (chip.peak_tflops.bf16, published),
        "matmul_tf32_tflops": (chip.peak_tflops.tf32, published),
    } | _SEEN.get(chip.alias, {})
    result = {name: (value, source + foreign) for name, (value, source) in rates.items()}
    for name, source in (
        ("sm_count", published), ("shared_memory_per_block_bytes", _PROGRAMMING_GUIDE),
        ("shared_memory_per_sm_bytes", _PROGRAMMING_GUIDE),
    ):  # fmt: skip
        result[name] = (getattr(chip, name), "torch" if chip.is_here else source + foreign)
    return {name: result[name] for name in NAMES}


def load(path: str | os.PathLike | None = None, *, chip: Chip | None = None) -> Constants:
    """The constants that floors should use.

    Args:
        path: JSON file that bench/constants/measure.py wrote; None: the file that the environment variable
            PCFAST_CONSTANTS names, and where it is not set, no file.
        chip: whose (:func:`pcfast.backends.chips.chip_of`); None: that of the GPU in the file, or without a file
            :data:`pcfast.backends.chips.DEFAULT`. A file of another GPU is not used.

    Returns:
        Measured values where there are some, defaults for the rest. That the defaults are another chip's is logged.

    Raises:
        ArgumentError: the file cannot be read as measured constants.
    """
    if path is None:
        path = os.environ.get(PATH_VARIABLE) or None
    record = {} if path is None else read(path)
    if chip is None:
        chip = chips.like(record["device"]) if record else chips.DEFAULT
    elif record and record["device"] != chip.name:
        info_once(
            f"constants: {path} was measured on {record['device']}, not on {chip.name}; defaults are used"
        )
        record = {}
    return _merge(record, chip)


def read(path: str | os.PathLike) -> dict:
    """A measured file, checked: device, date, and values and reasons by name."""

    def refuse(what: str) -> ArgumentError:
        remedy = "Write the file anew: python -m pcfast.bench.constants.measure."
        return ArgumentError("path", f"{path}: {what}", "measured constants as JSON", remedy)

    try:
        record = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise refuse(error.strerror or str(error)) from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise refuse(str(error)) from error
    if not isinstance(record, dict) or "error" in record:
        raise refuse(f"it says {record['error']!r}" if isinstance(record, dict) else "it is no JSON object")
    for key in ("device", "date"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise refuse(f"it has no {key}")
    for section in ("measured", "not_measured"):
        if not isinstance(record.get(section), dict):
            raise refuse(f"it has no {section}")

    def number(name: str, given: Any) -> float:
        result = given.get("median") if isinstance(given, dict) else given
        usable = isinstance(result, int | float) and not isinstance(result, bool) and math.isfinite(result)
        if not usable or result <= 0:
            raise refuse(f"{name} is {given!r}")
        return result

    def reason(name: str, given: Any) -> str:
        if not isinstance(given, str):
            raise refuse(f"the reason for not measuring {name} is {given!r}")
        return given

    checked = dict(record)
    for section, entry in (("measured", number), ("not_measured", reason)):
        # names of another release are passed over
        given = {name: one for name, one in record[section].items() if name in NAMES}
        checked[section] = {name: entry(name, one) for name, one in given.items()}
    return checked


def _merge(record: dict, chip: Chip) -> Constants:
    """Measured values over defaults, with their sources."""
    measured, reasons = record.get("measured", {}), record.get("not_measured", {})
    label = f"measured {record['device']} {record['date']}" if record else ""
    values: dict[str, float] = {}
    source: dict[str, str] = {}
    for name, (default, origin) in defaults(chip).items():
        if name in measured:
            values[name] = round(measured[name]) if name in WHOLE_NUMBERS else float(measured[name])
            source[name] = label
        else:
            values[name] = default
            why = f"; not measured: {reasons[name]}" if name in reasons else ""
            source[name] = origin + why
    if len(measured) < len(NAMES) and chip.figures_of:
        info_once(f"constants: what was not measured on {chip.name} is taken from an {chip.figures_of}")
    return Constants(device=chip.name, chip=chip, **values, source=source)
