"""The text of a PTX module -> kernels of instructions: the subset that triton and nvcc emit for pcfast."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "Address",
    "Immediate",
    "Instruction",
    "Kernel",
    "Pair",
    "Parameter",
    "Register",
    "Symbol",
    "Vector",
    "parse",
]


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bit pattern of a float of ``float_bytes``."""

    value: int
    float_bytes: int = 0


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, an array in shared memory, or the sink ``_``."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Register | Symbol | None
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """d|p: a result and the predicate beside it."""

    first: Register | Symbol
    second: Register


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        op: its parts between dots: ("ld", "shared", "v4", "b32").
        guard: predicate register under which it runs, or None; negated: it runs where that is false.
        line: of the PTX. source: file, line and column of the last .loc, as numbers.
    """

    op: tuple[str, ...]
    operands: list[Operand]
    guard: str | None = None
    negated: bool = False
    line: int = 0
    source: str = ""

    @property
    def root(self) -> str:
        return self.op[0]

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.op)}"


@dataclass
class Parameter:
    name: str
    size: int
    offset: int


@dataclass
class Kernel:
    """One .entry.

    Attributes:
        registers: type by prefix ("%r" -> "b32"), or by name for those declared alone.
        labels: index of the instruction behind each.
        shared: offset of each array in shared memory; the external one, whose size the launch gives, is the last.
        static_shared: bytes of shared memory in front of the external array.
    """

    name: str
    target: str
    parameters: list[Parameter]
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0

    def type_of(self, register: str) -> str:
        """The type that a register is declared with; "" for special registers."""
        return self.registers.get(register) or self.registers.get(register.rstrip("0123456789"), "")


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)[^,]*?\s([\w$]+)(?:\[(\d+)\])?\s*$")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by name.

    Raises:
        ValueError: a line that is outside the subset.
    """
    target = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE).group(1)
    clean = _COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)
    kernels = {}
    for match in _ENTRY.finditer(clean):
        name, parameters, _ = match.groups()
        kernel = Kernel(name, target, list(_parameters(parameters)))
        _place_shared(kernel, _SHARED.findall(clean))
        body = clean[match.end() : _closing_brace(clean, match.end())]
        _read_body(kernel, body, clean.count("\n", 0, match.end()))
        kernels[name] = kernel
    return kernels


def _place_shared(kernel: Kernel, arrays: list[tuple[str, str, str]]) -> None:
    """Arrays of known size come first, the external one, of no size, begins behind them."""
    for align, symbol, size in sorted(arrays, key=lambda array: not array[2]):
        start = -(-kernel.static_shared // int(align)) * int(align)
        kernel.shared[symbol] = start
        if size:
            kernel.static_shared = start + int(size)


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("a kernel without a closing brace")


def _parameters(text: str) -> Iterator[Parameter]:
    end = 0
    for part in filter(str.strip, text.split(",")):
        align, kind, name, count = _PARAMETER.search(part.strip()).groups()
        scalar = int(re.search(r"\d+$", kind).group()) // 8
        alignment = int(align) if align and count else scalar
        offset = -(-end // alignment) * alignment
        end = offset + scalar * int(count or 1)
        yield Parameter(name, end - offset, offset)


_STATEMENT = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)"
    r"|\.reg\s+\.(?P<type>\w+)\s+(?P<register>%?\w+)(?:<\d+>)?;"
    r"|\.loc\s+(?P<source>[^\n]*)"
    r"|\.pragma[^;]*;|[{}]"
    r"|(?P<instruction>(?:@!?%?\w+\s+)?[a-z][^;]*);"
    r"|\.[^\n;]*;?)"
)


def _read_body(kernel: Kernel, text: str, line: int) -> None:
    text, position, source = text.rstrip(), 0, ""
    while position < len(text):
        match = _STATEMENT.match(text, position)
        if match is None:
            raise ValueError(f"line {line}: no statement of PTX: {text[position : position + 80]!r}")
        if match["label"]:
            kernel.labels[match["label"]] = len(kernel.instructions)
        elif match["register"]:
            kernel.registers[match["register"]] = match["type"]
        elif match["source"] is not None:
            source = match["source"].strip()
        elif match["instruction"]:
            at = line + text.count("\n", position, match.start("instruction")) + 1
            kernel.instructions.append(_instruction(match["instruction"], at, source))
        line += text.count("\n", position, match.end())
        position = match.end()


_GUARDED = re.compile(r"@(!?)(%?\w+)\s+")


def _instruction(text: str, line: int, source: str) -> Instruction:
    guard = _GUARDED.match(text)
    if guard:
        text = text[guard.end() :]
    op, *rest = text.split(None, 1)
    operands = [_operand(part) for part in _at_commas(rest[0] if rest else "")]
    name, negated = (guard[2], bool(guard[1])) if guard else (None, False)
    return Instruction(tuple(op.split(".")), operands, name, negated, line, source)


def _at_commas(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


_ADDRESS = re.compile(r"\[\s*([%\w$.]+)?\s*(?:\+?\s*(-?\w+))?\s*\]")


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part) for part in _at_commas(text[1:-1])))
    if text.startswith("["):
        base, offset = _ADDRESS.fullmatch(text).groups()
        if base and re.fullmatch(r"-?\d+", base):
            return Address(None, int(base))
        return Address(_operand(base), int(offset, 0) if offset else 0)
    if "|" in text:
        return Pair(*(_operand(part.strip()) for part in text.split("|")))
    if text.startswith("%"):
        return Register(text)
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}", text):
        return Immediate(int(text[2:], 16), (len(text) - 2) // 2)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
