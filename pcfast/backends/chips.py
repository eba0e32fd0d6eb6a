"""NVIDIA chips: the published figures that planning and floors go by, and the chip that a device is.

:func:`chip_of` is the one place that asks what a GPU is like. For a GPU that is here torch answers; inside
:func:`planning_for` the answer is a chip of the table, and no GPU is asked.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch

from ..errors import ArgumentError


@dataclass(frozen=True)
class Rates:
    """One rate for each operand that products read, by the words of :class:`pcfast.precision.Operands`."""

    ieee: float
    tf32: float
    bf16: float


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: as torch says it, or in the table without the memory's size and the board.
        alias: what ``explain(device=...)`` takes.
        capability: compute capability.
        sm_count: SMs.
        shared_memory_per_block_bytes: with the opt-in.
        shared_memory_per_sm_bytes: of all blocks of an SM together, with what the driver reserves for each.
        l2_bytes: L2 cache.
        sm_clock_mhz: boost clock; where none is published, the one at which the peak rates are quoted.
        memory_gb: device memory, in 10^9 bytes as datasheets count it.
        memory_bandwidth_gbs: of device memory.
        multiply_adds_per_clock: per SM; ieee by its float32 units, tf32 and bf16 dense by its Tensor Cores, which
            sum in float32.
        peak_tflops: of the chip, likewise; a multiply-add is two operations.
        source: where the figures were published.
        figures_of: the chip of the table whose figures stand in for this one's; "" where they are its own.
        is_here: SMs and shared memory are what torch says of a GPU on this machine.
    """

    name: str
    alias: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory_per_block_bytes: int
    shared_memory_per_sm_bytes: int
    l2_bytes: int
    sm_clock_mhz: float
    memory_gb: float
    memory_bandwidth_gbs: float
    multiply_adds_per_clock: Rates
    peak_tflops: Rates
    source: str = field(compare=False)
    figures_of: str = ""
    is_here: bool = False

    @property
    def architecture(self) -> str:
        """nvcc's name of it without a suffix: sm_90."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


_KIB, _MIB = 1 << 10, 1 << 20
# Shared memory per block and per SM, by compute capability: CUDA C++ Programming Guide, technical specifications.
_SHARED_8_0 = 163 * _KIB, 164 * _KIB
_SHARED_8_6 = 99 * _KIB, 100 * _KIB  # 8.9 and 12.0 too
_SHARED_9_0 = 227 * _KIB, 228 * _KIB  # 10.0 too
# Multiply-adds per SM and clock. float32: CUDA C++ Programming Guide, throughput of arithmetic instructions. Tensor
# Cores: the published peak by SMs and the clock at which it is quoted, 1830 MHz for Hopper.
_AMPERE = Rates(64, 512, 1024)
_GEFORCE = Rates(128, 128, 256)
_HOPPER = Rates(128, 1024, 2048)
_BLACKWELL = Rates(128, 2048, 4096)

_H100_WHITEPAPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5"

#: What is known by name; of several chips of one compute capability the first represents it.
TABLE: tuple[Chip, ...] = (
    # The H200 is an H100 with another memory: SMs, L2 and rates are those of the whitepaper. torch says 60 MB of its
    # L2 on a device: the smaller figure is safe.
    Chip(
        "NVIDIA H200", "h200", (9, 0), 132, *_SHARED_9_0, 50 * _MIB, 1980, 141, 4800, _HOPPER,
        Rates(66.9, 494.7, 989.4), f"{_H100_WHITEPAPER}; memory: NVIDIA H200 datasheet, SXM",
    ),
    Chip(
        "NVIDIA H100", "h100", (9, 0), 132, *_SHARED_9_0, 50 * _MIB, 1980, 80, 3350, _HOPPER,
        Rates(66.9, 494.7, 989.4), f"{_H100_WHITEPAPER}; memory: NVIDIA H100 datasheet, SXM",
    ),
    Chip(
        "NVIDIA A100", "a100", (8, 0), 108, *_SHARED_8_0, 40 * _MIB, 1410, 80, 2039, _AMPERE,
        Rates(19.5, 156, 312),
        "NVIDIA A100 Tensor Core GPU Architecture whitepaper; memory: NVIDIA A100 80GB datasheet, SXM",
    ),
    # No clock is published: 2250 TFLOP/s are 1856 MHz. SMs: as its driver says.
    Chip(
        "NVIDIA B200", "b200", (10, 0), 148, *_SHARED_9_0, 126 * _MIB, 1856, 180, 7700, _BLACKWELL,
        Rates(75, 1100, 2250), "NVIDIA HGX B200 datasheet, one GPU of eight; L2: NVIDIA Blackwell Tuning Guide",
    ),
    Chip(
        "NVIDIA GeForce RTX 4090", "rtx4090", (8, 9), 128, *_SHARED_8_6, 72 * _MIB, 2520, 24, 1008, _GEFORCE,
        Rates(82.6, 82.6, 165.2), "NVIDIA Ada GPU Architecture whitepaper, appendix A",
    ),
    Chip(
        "NVIDIA GeForce RTX 3090", "rtx3090", (8, 6), 82, *_SHARED_8_6, 6 * _MIB, 1695, 24, 936, _GEFORCE,
        Rates(35.6, 35.6, 71), "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A",
    ),
    Chip(
        "NVIDIA GeForce RTX 5090", "rtx5090", (12, 0), 170, *_SHARED_8_6, 96 * _MIB, 2407, 32, 1792, _GEFORCE,
        Rates(104.8, 104.8, 209.5), "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A",
    ),
)  # fmt: skip
#: What stands in where nothing is known: what plans on a CPU are made for.
DEFAULT = TABLE[0]

# Boards of a name that differ in memory, clocks or SMs have figures of their own, which the table lacks.
_OTHER_BOARDS = re.compile(r"PCIe|NVL\b|40GB|Laptop| D\b|MIG", re.I)
_ARCHITECTURE = re.compile(r"sm_?(\d+)(\d)[af]?")

_named: ContextVar[Chip | None] = ContextVar("pcfast_chip", default=None)


def names() -> str:
    """What :func:`by_name` takes, for messages."""
    capabilities = dict.fromkeys(chip.architecture for chip in TABLE)
    return f"{', '.join(chip.alias for chip in TABLE)}; or an architecture: {', '.join(capabilities)}"


def by_name(name: str) -> Chip | None:
    """The chip that ``name`` means: an alias or a name of the table, or an architecture; None for any other word.

    Args:
        name: "h200", "H200", "NVIDIA H200", "rtx-4090", "sm_90a". An architecture has the figures of the first chip
            of the table that has it.

    Raises:
        ArgumentError: an architecture of which the table has no chip.
    """
    plain = re.sub(r"[^a-z0-9_]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")
    for chip in TABLE:
        if plain == chip.alias:
            return chip
    if architecture := _ARCHITECTURE.fullmatch(plain):
        capability = int(architecture[1]), int(architecture[2])
        for chip in TABLE:
            if chip.capability == capability:
                return replace(chip, name=name, figures_of=chip.name)
        raise ArgumentError("device", repr(name), f"a chip whose figures are known: {names()}")
    return None


def like(name: str, capability: tuple[int, int] | None = None) -> Chip:
    """The chip that torch calls ``name``, with figures of the table: its own, or those that stand in for them."""
    if not _OTHER_BOARDS.search(name):
        for chip in TABLE:
            if re.match(rf"{chip.name}(?![0-9A-Z])", name):
                return replace(chip, name=name)
    nearest = next((chip for chip in TABLE if chip.capability == capability), DEFAULT)
    return replace(nearest, name=name, figures_of=nearest.name, capability=capability or nearest.capability)


def named() -> Chip | None:
    """The chip that is planned for in this thread instead of the GPU that is here; None where there is none."""
    return _named.get()


@contextlib.contextmanager
def planning_for(chip: Chip) -> Iterator[None]:
    """Whatever is planned for a CUDA device in this thread is planned for ``chip``, which need not be here."""
    token = _named.set(chip)
    try:
        yield
    finally:
        _named.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that plans for ``device`` are made for.

    On a GPU that is here sizes are torch's. A CPU, where kernels are interpreted or compiled for it, has
    :data:`DEFAULT`'s.
    """
    chip = _named.get()
    if chip is not None:
        return chip
    if device.type != "cuda":
        return DEFAULT
    return _here(device_key(device)[1])


def device_key(device: torch.device) -> tuple[str, int | None]:
    """``device`` as a key, with its index: without one it is the current CUDA device."""
    unnamed = device.type == "cuda" and device.index is None
    return device.type, torch.cuda.current_device() if unnamed else device.index


@functools.lru_cache(maxsize=64)  # asked in every relaxation
def _here(index: int) -> Chip:
    told = torch.cuda.get_device_properties(index)
    return replace(
        like(told.name, (told.major, told.minor)),
        sm_count=told.multi_processor_count,
        shared_memory_per_block_bytes=told.shared_memory_per_block_optin,
        shared_memory_per_sm_bytes=told.shared_memory_per_multiprocessor,
        is_here=True,
    )
