"""Constants of a GPU that planning needs: costs of synchronising, bandwidths, rates; a unit in every name.

bench/constants/measure.py measures them and writes a JSON file; :func:`load` reads it. What was not measured comes
from the table of defaults below, which describes an H100 or H200, and ``source`` says so field by field.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..support.log import info_once

#: Where :func:`load` looks when it is given no path.
PATH_VARIABLE = "PCFAST_CONSTANTS"
CLUSTER_SIZES = (2, 4, 8, 16)
#: Chips that the defaults describe, as a part of their names.
DEFAULT_DEVICES = ("H100", "H200")


class Table(Mapping):
    """A mapping that never changes, so that it can be hashed and stand in a frozen dataclass."""

    def __init__(self, entries: Mapping) -> None:
        self._entries = dict(entries)

    def __getitem__(self, key: Any) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"Table({self._entries!r})"


@dataclass(frozen=True)
class Constants:
    """One GPU. Tables are by cluster size; how each was measured: bench/constants/.

    Attributes:
        device: name of the GPU that the constants are used for.
        sm_count: SMs. sm_clock_max_mhz: as the driver says. sm_clock_mhz: seen under light work.
        l2_bytes, shared_memory_per_block_bytes, shared_memory_per_sm_bytes: sizes; a block's with the opt-in.
        graph_node_gap_us: one more dependent empty kernel in a replayed CUDA graph.
        stream_launch_us: host time of one kernel launch.
        grid_barrier_us: ``grid.sync()``, one block on every SM.
        cluster_barrier_us: with release and acquire. cluster_barrier_relaxed_us: without the release.
        neighbour_flag_hop_us: a flag from one SM to the next, through L2.
        dsmem_bandwidth_gbs: shared memory of other blocks, read by all resident clusters together.
        resident_clusters_200_kib, resident_clusters_1_kib: clusters that run at the same time, by their blocks'
            shared memory. A grid of more, whose clusters wait for each other, deadlocks; 0: none can be launched.
        shared_memory_bytes_per_clk_sm: read by a block from its own shared memory.
        l2_bandwidth_gbs: read by all SMs. l2_bandwidth_one_sm_gbs: by one alone.
        copy_bandwidth_gbs: device memory, bytes read plus bytes written.
        matmul_bf16_tflops, matmul_tf32_tflops, matmul_fp32_tflops: large matrix products through torch.
        source: field -> "measured <device> <date>", "published: <where>" or "estimate: <why>"; where the entries of
            a table differ, "2, 4: ... | 8, 16: ...".
    """

    device: str
    sm_count: int
    sm_clock_max_mhz: float
    sm_clock_mhz: float
    l2_bytes: int
    shared_memory_per_block_bytes: int
    shared_memory_per_sm_bytes: int
    graph_node_gap_us: float
    stream_launch_us: float
    grid_barrier_us: float
    cluster_barrier_us: Table
    cluster_barrier_relaxed_us: Table
    neighbour_flag_hop_us: float
    dsmem_bandwidth_gbs: Table
    resident_clusters_200_kib: Table
    resident_clusters_1_kib: Table
    shared_memory_bytes_per_clk_sm: float
    l2_bandwidth_gbs: float
    l2_bandwidth_one_sm_gbs: float
    copy_bandwidth_gbs: float
    matmul_bf16_tflops: float
    matmul_tf32_tflops: float
    matmul_fp32_tflops: float
    source: Table

    def is_measured(self, name: str) -> bool:
        """Whether all of field ``name`` was measured on this device."""
        return self.source[name].startswith("measured ")


NAMES = tuple(field.name for field in fields(Constants) if field.name not in ("device", "source"))
BY_CLUSTER_SIZE = frozenset(name for name in NAMES if Constants.__annotations__[name] == "Table")
WHOLE_NUMBERS = frozenset(name for name in NAMES if Constants.__annotations__[name] == "int") | {
    "resident_clusters_200_kib",
    "resident_clusters_1_kib",
}

_TUNING_GUIDE = "published: NVIDIA Hopper Tuning Guide"
_PROGRAMMING_GUIDE = "published: CUDA C++ Programming Guide, compute capability 9.0"
_LEAD = "estimate: said of H100-class chips, no source that could be checked"
_H200 = "estimate: one run on an H200, 2026-10-28, through torch"


def _for_every_size(value: float) -> Table:
    return Table(dict.fromkeys(CLUSTER_SIZES, value))


#: Field -> (value, source). Of an H100 or H200 (SXM).
DEFAULTS: dict[str, tuple[Any, str]] = {
    "sm_count": (132, "published: NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5"),
    "sm_clock_max_mhz": (1980, _H200),
    "sm_clock_mhz": (1980, _H200),
    "l2_bytes": (50 << 20, _TUNING_GUIDE),  # torch said 60 MB of an H200: the smaller one is safe
    "shared_memory_per_block_bytes": (227 << 10, _TUNING_GUIDE),
    "shared_memory_per_sm_bytes": (228 << 10, _TUNING_GUIDE),
    "graph_node_gap_us": (1.3, _LEAD + " (1.2 to 1.4)"),
    "stream_launch_us": (5.0, _LEAD + " (4 to 6)"),
    "grid_barrier_us": (1.1, _LEAD),
    "cluster_barrier_us": (
        _for_every_size(0.65),
        _LEAD + " (0.2 to 0.65: taken as with and without release)",
    ),
    "cluster_barrier_relaxed_us": (
        _for_every_size(0.2),
        _LEAD + " (0.2 to 0.65: taken as with and without release)",
    ),
    "neighbour_flag_hop_us": (0.6, _LEAD),
    "dsmem_bandwidth_gbs": (
        _for_every_size(3000.0),
        _LEAD + " (about 3 TB/s, larger clusters are not faster)",
    ),
    # 15 clusters of 8 is the lead; the other sizes: as much of 132 SMs, rounded down to be safe
    "resident_clusters_200_kib": (
        Table({2: 60, 4: 30, 8: 15, 16: 7}),
        _LEAD + " (15 of 8; others in proportion)",
    ),
    "resident_clusters_1_kib": (
        Table({2: 60, 4: 30, 8: 15, 16: 7}),
        "estimate: at least as many as with 200 KiB",
    ),
    "shared_memory_bytes_per_clk_sm": (128.0, _PROGRAMMING_GUIDE + ": 32 banks of 32 bits a clock"),
    "l2_bandwidth_gbs": (5000.0, _LEAD + " (5 to 10 TB/s)"),
    "l2_bandwidth_one_sm_gbs": (120.0, _LEAD + " (about 64 bytes a clock)"),
    "copy_bandwidth_gbs": (4300.0, _H200),
    "matmul_bf16_tflops": (780.0, _H200 + " (770 to 800)"),
    "matmul_tf32_tflops": (390.0, "estimate: half of bf16, as the datasheet has it"),
    "matmul_fp32_tflops": (50.0, "estimate: 3/4 of the datasheet's 67"),
}


def load(path: str | os.PathLike | None = None, *, device: str | None = None) -> Constants:
    """The constants that a planner should use.

    Args:
        path: JSON file that bench/constants/measure.py wrote; None: the file that the environment variable
            PCFAST_CONSTANTS names, and where it is not set, no file.
        device: name of the GPU to plan for (``torch.cuda.get_device_name()``); None: the one in the file. A file of
            another GPU is not used.

    Returns:
        Measured values where there are some, defaults for the rest. That the defaults are another chip's is logged.

    Raises:
        ArgumentError: the file cannot be read as measured constants.
    """
    if path is None:
        path = os.environ.get(PATH_VARIABLE) or None
    record = {} if path is None else read(path)
    if device is not None and record and record["device"] != device:
        info_once(f"constants: {path} was measured on {record['device']}, not on {device}; defaults are used")
        record = {}
    device = device or record.get("device", "H100 or H200")
    return _merge(record, device)


def read(path: str | os.PathLike) -> dict:
    """A measured file, checked: device, date, and values and reasons by name (and by cluster size, as int)."""

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

    def by_size(name: str, given: Any, entry: Callable[[str, Any], Any]) -> Any:
        """``given`` with each of its entries checked; cluster sizes as int."""
        if name not in BY_CLUSTER_SIZE:
            return entry(name, given)
        if not isinstance(given, dict) or not all(size.isdecimal() for size in given):
            raise refuse(f"{name} is not by cluster size")
        return {int(size): entry(f"{name} of {size}", one) for size, one in given.items()}

    def number(name: str, given: Any) -> float:
        result = given.get("median") if isinstance(given, dict) else given
        usable = isinstance(result, int | float) and not isinstance(result, bool) and math.isfinite(result)
        if not usable or result < 0 or (result == 0 and not name.startswith("resident_clusters")):
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
        checked[section] = {name: by_size(name, one, entry) for name, one in given.items()}
    return checked


def _merge(record: dict, device: str) -> Constants:
    """Measured values over defaults, with their sources."""
    measured, reasons = record.get("measured", {}), record.get("not_measured", {})
    label = f"measured {record['device']} {record['date']}" if record else ""
    known = any(name in device for name in DEFAULT_DEVICES)
    foreign = "" if known else f"; of an H100 or H200, not of {device}"
    fell_back = False

    def choose(name: str, result: float | None, default: float, why: str | None) -> tuple[float, str]:
        """One number and its source."""
        nonlocal fell_back
        if result is not None:
            return (round(result) if name in WHOLE_NUMBERS else float(result)), label
        fell_back = True
        if why is not None and name.startswith("resident_clusters"):
            # Too many would deadlock.
            return 0, f"estimate: none, as it was not measured: {why}"
        return default, DEFAULTS[name][1] + foreign + ("" if why is None else f"; not measured: {why}")

    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for name in NAMES:
        default, result, why = DEFAULTS[name][0], measured.get(name), reasons.get(name)
        if name not in BY_CLUSTER_SIZE:
            values[name], source[name] = choose(name, result, default, why)
            continue
        result, why = result or {}, why or {}
        chosen = {
            size: choose(name, result.get(size), default[size], why.get(size)) for size in CLUSTER_SIZES
        }
        values[name] = Table({size: number for size, (number, _) in chosen.items()})
        source[name] = _joined({size: origin for size, (_, origin) in chosen.items()})
    if fell_back and not known:
        info_once(f"constants: what was not measured on {device} is taken from an H100 or H200")
    return Constants(device=device, **values, source=Table(source))


def _joined(origins: dict[int, str]) -> str:
    """The sources of a table's entries as one text; cluster sizes are named where sources differ."""
    sizes: dict[str, list[str]] = {}
    for size, origin in origins.items():
        sizes.setdefault(origin, []).append(str(size))
    if len(sizes) == 1:
        return next(iter(sizes))
    return " | ".join(f"{', '.join(some)}: {origin}" for origin, some in sizes.items())
