"""Machine code for sm_90a: left operands of Hopper's asynchronous products that are overwritten in registers.

HGMMA (wgmma) returns before it has read its operands. `WARPGROUP.DEPBAR.LE gsb0, N` waits until all but the last N
groups of them have; each group ends with an HGMMA that names gsb0. Whatever writes a register before that, which a
pending HGMMA reads, may change the product. PTX cannot show it all: registers are ptxas's to choose.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton

_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_PRODUCT = re.compile(r"HGMMA\.\S+\s+R\d+, R(\d+), gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_BRANCH = re.compile(r"BRA.*`\((\.L\w+)\)")
# The result is the first operand; behind a predicate where lanes exchange values or memory is changed.
_RESULT = re.compile(r"(?:(?:SHFL|ATOMS?|ATOMG)\S*\s+U?P\w+,|\S+)\s+R(\d+)\b")
_LEFT_REGISTERS = 4  # of a thread: 64 x 32 bytes among 128
_WIDTHS = ((re.compile(r"\.128|\.M88\.4"), 4), (re.compile(r"\.64|\.WIDE|\.M88\.2|^CS2R|^D[A-Z]+ "), 2))


def disassembled(cubin: bytes) -> str:
    """By the nvdisasm that comes with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", Path(file.name)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def overwritten(code: str) -> list[str]:
    """ "HGMMA ... <- instruction" for every write to a register that a pending HGMMA may still read."""
    labels, instructions = {}, []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif result := _INSTRUCTION.match(line):
            instructions.append(result.group(1))
    problems = dict.fromkeys(_overwritten(instructions))
    for at, instruction in enumerate(instructions):
        branch = _BRANCH.match(instruction)
        if (
            branch and labels.get(branch.group(1), at + 1) <= at
        ):  # a loop: what it leaves pending meets its beginning
            body = instructions[labels[branch.group(1)] : at + 1]
            problems |= dict.fromkeys(_overwritten(body + body))
    return list(problems)


def _overwritten(instructions: list[str]) -> Iterator[str]:
    groups: list[list[tuple[str, range]]] = [
        []
    ]  # of pending products and what they read; the last one is open
    for instruction in instructions:
        if instruction.startswith("HGMMA"):
            if product := _PRODUCT.match(instruction):
                first = int(product.group(1))
                groups[-1].append((instruction, range(first, first + _LEFT_REGISTERS)))
            if "gsb0" in instruction:
                groups.append([])
        elif wait := _WAIT.match(instruction):
            pending = int(wait.group(1), 16)
            groups = groups[-1 - pending :]
        else:
            written = _written(instruction)
            for product, read in (entry for group in groups for entry in group):
                if written.start < read.stop and read.start < written.stop:
                    yield f"{product} <- {instruction}"


def _written(instruction: str) -> range:
    """Registers that an instruction writes."""
    result = None if instruction.startswith(("ST", "RED", "BAR")) else _RESULT.match(instruction)
    if result is None:
        return range(0)
    first = int(result.group(1))
    return range(first, first + next((n for words, n in _WIDTHS if words.search(instruction)), 1))
