"""Small PTX kernels for the tests of the executor, and their runs."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from executor import DeviceMemory, Launch, parse, translate

__all__ = ["THREADS", "execute", "kernel", "run"]

THREADS = 128  # a warpgroup

_REGISTERS = """
    .reg .pred %p<9>; .reg .b16 %h<17>; .reg .b32 %r<99>; .reg .b64 %d<33>; .reg .f32 %f<133>; .reg .f64 %g<9>;
    .shared .align 128 .b8 tile[{shared}];
"""


def kernel(body: str, pointers: int, shared: int = 1024) -> str:
    """A module of one kernel; %d1, %d2, ... hold its pointers and %r1 the thread's number."""
    parameters = ", ".join(f".param .u64 p{n}" for n in range(1, pointers + 1))
    loads = "\n".join(f"    ld.param.u64 %d{n}, [p{n}];" for n in range(1, pointers + 1))
    registers = _REGISTERS.format(shared=shared)
    return (
        f".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry test({parameters})\n{{{registers}\n"
        f"{loads}\n    mov.u32 %r1, %tid.x;\n{body}\n    ret;\n}}\n"
    )


def run(
    text: str, arrays: Sequence[np.ndarray], blocks: int = 1, threads: int = THREADS, **settings
) -> tuple[list[np.ndarray], Launch]:
    """The arrays after a launch on them, and the launch. settings: of translate and Launch."""
    (parsed,) = parse(text).values()
    translation = translate(parsed, settings.pop("contract", False))
    device = DeviceMemory()
    addresses = [device.add(array, f"array {n}") for n, array in enumerate(arrays)]
    device.build()
    parameters = struct.pack(f"<{len(addresses)}Q", *addresses)
    launch = Launch(
        translation, device, parameters, (blocks,), threads, parsed.static_shared, **settings
    ).run()
    result = [
        device.read(address, array.nbytes).view(array.dtype).reshape(array.shape)
        for address, array in zip(addresses, arrays, strict=True)
    ]
    return result, launch


def execute(text: str, arrays: Sequence[np.ndarray], **settings) -> list[np.ndarray]:
    """As :func:`run`, where nothing may be reported."""
    result, launch = run(text, arrays, **settings)
    assert not launch.reports, launch.reports
    return result
