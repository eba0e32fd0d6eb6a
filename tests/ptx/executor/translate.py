"""Basic blocks of a kernel -> Python functions over numpy arrays, one element a thread.

A block's function gets R, the registers of all threads; I, the indices of the threads that run it, or None for all;
n, how many they are; and M, the :class:`~executor.machine.Launch`. A register that lives in one block only is a local
variable. Immediates are scalars, and so is what is computed from them alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from .numbers import DTYPES, KINDS, NAMESPACE, size_of
from .parser import Address, Immediate, Instruction, Kernel, Operand, Pair, Register, Symbol, Vector
from .profile import instruction_class

__all__ = ["EMITTERS", "Block", "Emitter", "Translation", "UnknownInstruction", "emitter", "translate"]

#: How many threads, side by side, must run an instruction together: a warp's or a warpgroup's.
_TOGETHER = {"shfl": 32, "mma": 32, "ldmatrix": 32, "stmatrix": 32, "redux": 32, "warp": 32, "wgmma": 128}
_JUMPS = ("bra", "ret", "exit")
_WITHOUT_RESULT = {"st", "red", "bra", "ret", "exit", "bar", "barrier", "cp", "stmatrix", "fence"}
_SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]$")


class UnknownInstruction(NotImplementedError):
    """An instruction, or a modifier of one, that the executor does not model."""

    def __init__(self, instruction: Instruction, what: str) -> None:
        super().__init__(f"line {instruction.line}: {instruction}: {what}")


@dataclass(frozen=True)
class Known:
    """What an emitter models.

    Attributes:
        emit: writes the instruction. types: parts of an opcode that name a type, of which one or more must be there
            unless there are none. modifiers: other parts that may be there.
    """

    emit: Callable[[Emitter, Instruction], None]
    types: frozenset[str]
    modifiers: frozenset[str]


EMITTERS: dict[str, Known] = {}


def emitter(*roots: str, types: str = "", modifiers: str = ""):
    """Register an emitter for the instructions of some names."""

    def register(function):
        for root in roots:
            EMITTERS[root] = Known(function, frozenset(types.split()), frozenset(modifiers.split()))
        return function

    return register


@dataclass(frozen=True)
class Value:
    """A variable of a block's function. Variables of one ``root`` may share memory."""

    name: str
    kind: str
    scalar: bool
    root: str


@dataclass
class Block:
    """Instructions first..last-1, of which only the last can branch, end or wait at a barrier.

    Attributes:
        together: threads that must run the block together: 1, a warp's 32 or a warpgroup's 128.
        counts: instructions by class.
    """

    number: int
    first: int
    last: int
    end: str  # "next", "branch", "barrier" or "return"
    target: int | None = None
    conditional: bool = False
    together: int = 1
    counts: Counter = field(default_factory=Counter)
    run: Callable | None = None


@dataclass
class Translation:
    """A kernel that can be launched.

    Attributes:
        registers: index in R of those that outlive a block. kinds: of them, in the same order.
        shared_granule, global_granule: bytes of the smallest access, by which shadows count.
        contract: products and sums that name no rounding are fused wherever ptxas may fuse them.
    """

    kernel: Kernel
    blocks: list[Block]
    registers: dict[str, int]
    kinds: list[str]
    shared_granule: int
    global_granule: int
    contract: bool
    namespace: dict = field(default_factory=lambda: dict(NAMESPACE))


class Emitter:
    """Writes the function of one block.

    Attributes:
        pending: registers that some wgmma of the kernel sums in or reads; their use by anything else is checked.
        products: (a, b) of variables that hold a product which a sum may absorb.
    """

    def __init__(self, owner: Translation, block: Block, pending: set[str]) -> None:
        self.owner, self.kernel, self.block, self.pending = owner, owner.kernel, block, pending
        self.lines: list[str] = []
        self.products: dict[str, tuple[str, str]] = {}
        self.instruction: Instruction | None = None
        self._variables: dict[str, Value] = {}
        self._read_from_registers: set[str] = set()
        self._changed: set[str] = set()
        self._views: dict[tuple[str, str], str] = {}
        self._count = 0

    # reading

    def fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def put(self, line: str) -> None:
        self.lines.append(line)

    def constant(self, immediate: Immediate, kind: str) -> str:
        """Name of an immediate as ``kind``."""
        size = size_of(kind)
        if kind == "b1":
            scalar = np.bool_(immediate.value != 0)
        elif immediate.float_bytes not in (0, size):  # 0d... where a float32 is wanted
            wide = np.array([immediate.value], f"u{immediate.float_bytes}").view(f"f{immediate.float_bytes}")
            scalar = wide.astype(DTYPES[kind])[0]
        else:
            scalar = np.array([immediate.value & (1 << 8 * size) - 1], f"u{size}").view(DTYPES[kind])[0]
        name = f"K{kind}_{scalar.tobytes()[::-1].hex()}"
        self.owner.namespace[name] = scalar
        return name

    def register(self, name: str) -> Value:
        """The variable that holds a register."""
        if _SPECIAL.match(name):
            variable, scalar = self.fresh(), name.startswith("%n")
            whole = f"M.special[{name!r}]"
            self.put(f"{variable} = {whole}" + ("" if scalar else f" if I is None else {whole}[I]"))
            return Value(variable, "u4", scalar, name)
        if not self.kernel.type_of(name):
            raise self.unknown(f"the executor does not know the register {name}")
        if name in self.pending:
            self.put(f"M.warpgroups.touch(M, {name!r}, I, {self.line})")
        if name not in self._variables:
            kind, index = KINDS[self.kernel.type_of(name)], self.owner.registers.get(name)
            if index is None:  # first written here, under a guard
                constant = self.constant(Immediate(0), kind)
                self._variables[name] = Value(constant, kind, True, constant)
            else:
                variable = f"r{index}"
                self.put(f"{variable} = R[{index}] if I is None else R[{index}][I]")
                self._variables[name] = Value(variable, kind, False, variable)
                self._read_from_registers.add(variable)
        return self._variables[name]

    def use(self, operand: Operand, kind: str) -> str:
        """Name of a variable that holds the low bits of an operand as ``kind``, zeros above them."""
        if isinstance(operand, Immediate):
            return self.constant(operand, kind)
        if isinstance(operand, Symbol):
            if operand.name in self.kernel.shared:
                return self.constant(Immediate(self.kernel.shared[operand.name]), kind)
            return self._parameter(operand.name)
        value = self.register(operand.name)
        if value.kind == kind:
            return value.name
        if (value.name, kind) not in self._views:
            variable, size = self.fresh(), size_of(value.kind)
            if size == size_of(kind):
                self.put(f"{variable} = {value.name}.view({kind})")
            else:
                same = value.name if value.kind == f"u{size}" else f"{value.name}.view(u{size})"
                wide = f"u{size_of(kind)}"
                self.put(f"{variable} = {same}.astype({wide})" + (f".view({kind})" if kind != wide else ""))
            self._views[value.name, kind] = variable
        return self._views[value.name, kind]

    def _parameter(self, name: str) -> str:
        if name not in (parameter.name for parameter in self.kernel.parameters):
            raise self.unknown(f"{name} is neither a parameter nor an array in shared memory")
        return f"M.parameter_address({name!r})"

    def scalar(self, *operands: Operand) -> bool:
        """Whether the operands are the same for all threads, held once."""
        return all(isinstance(o, Immediate | Symbol) or self.register(o.name).scalar for o in operands)

    def array(self, operand: Operand, kind: str) -> str:
        """As :meth:`use`, one element a thread."""
        name = self.use(operand, kind)
        return f"np.full(n, {name}, {kind})" if self.scalar(operand) else name

    def unchecked(self, operand: Operand, kind: str) -> str:
        """As :meth:`array`, without the check for products under way: several may add to the same registers."""
        pending, self.pending = self.pending, set()
        name = self.array(operand, kind)
        self.pending = pending
        return name

    def guard(self) -> str | None:
        """The instruction's guard as a variable; None without one."""
        if self.instruction.guard is None:
            return None
        value = self.register(self.instruction.guard)
        name = f"np.full(n, {value.name})" if value.scalar else value.name
        if not self.instruction.negated:
            return name
        variable = self.fresh()
        self.put(f"{variable} = ~{name}")
        return variable

    def address(self, operand: Address, kind: str) -> str:
        if operand.base is None:
            return f"np.full(n, {operand.offset}, {kind})"
        if isinstance(operand.base, Symbol) and operand.base.name not in self.kernel.shared:
            return f"np.full(n, {self._parameter(operand.base.name)} + {kind}({operand.offset}), {kind})"
        base = self.array(operand.base, kind)
        return f"({base} + {self.constant(Immediate(operand.offset), kind)})" if operand.offset else base

    @property
    def line(self) -> int:
        return self.instruction.line

    def unknown(self, what: str) -> UnknownInstruction:
        return UnknownInstruction(self.instruction, what)

    # writing

    def set(
        self, operand: Operand, expression: str, kind: str, scalar: bool = False, checked: bool = True
    ) -> None:
        """Give a register a value of ``kind``, under the instruction's guard.

        Args:
            checked: the register may be one of a product under way, which is reported.
        """
        if isinstance(operand, Symbol) and operand.name == "_":
            return
        name = operand.name
        held = KINDS[self.kernel.type_of(name)]
        if checked and name in self.pending:
            self.put(f"M.warpgroups.touch(M, {name!r}, I, {self.line}, True)")
        if size_of(kind) == size_of(held):
            if kind != held:
                expression = f"({expression}).view({held})"
        else:
            wide = f"{'i' if kind[0] == 'i' else 'u'}{size_of(held)}"
            expression = f"({expression}).astype({wide})" + (f".view({held})" if wide != held else "")
        if self.instruction.guard is not None:
            guard, old = self.guard(), self.register(name).name
            expression, scalar = f"np.where({guard}, {expression}, {old})", False
        variable = self.fresh()
        self.put(f"{variable} = {expression}")
        self._variables[name] = Value(variable, held, scalar, variable)
        self._changed.add(name)

    def alias(self, to: Register, of: Register) -> None:
        """``to`` is ``of`` from here on: no copy is made."""
        value = self.register(of.name)
        if to.name in self.pending:
            self.put(f"M.warpgroups.touch(M, {to.name!r}, I, {self.line}, True)")
        self._variables[to.name] = value
        self._changed.add(to.name)

    # a block

    def emit(self, instruction: Instruction) -> None:
        self.instruction = instruction
        known = EMITTERS.get(instruction.root)
        if known is None:
            raise self.unknown("an instruction that the executor does not know")
        parts = set(instruction.op[1:])
        strange = parts - known.types - known.modifiers
        if strange:
            raise self.unknown(
                f"the executor does not know .{', .'.join(sorted(strange))} of {instruction.root}"
            )
        if known.types and not parts & known.types:
            raise self.unknown("the executor finds no type that it knows")
        known.emit(self, instruction)

    def function(self, condition: str | None) -> str:
        """The text of the block's function, which returns the branch's condition."""
        stored: set[str] = set()
        for name in sorted(self._changed):
            index = self.owner.registers.get(name)
            if index is None:
                continue
            value = self._variables[name]
            if value.scalar:
                whole = f"np.full(n, {value.name}, {value.kind})"
            elif (
                value.root in stored or value.root in self._read_from_registers or value.root.startswith("%")
            ):
                whole = f"{value.name}.copy()"  # two registers never share memory
            else:
                whole = value.name
                stored.add(value.root)
            self.put(f"if I is None: R[{index}] = {whole}")
            self.put(f"else: R[{index}][I] = {value.name}")
        self.put(f"return {condition}")
        body = "\n".join("    " + line for line in self.lines)
        return f"def block{self.block.number}(R, I, n, M):\n{body}"


def _is_barrier(i: Instruction) -> bool:
    """Of all threads of a block."""
    return i.root in ("bar", "barrier") and "warp" not in i.op


def _split(kernel: Kernel) -> list[Block]:
    instructions = kernel.instructions
    targets = {operand.name for i in instructions if i.root == "bra" for operand in i.operands}
    firsts = {0, *(index for label, index in kernel.labels.items() if label in targets)}
    firsts |= {index + 1 for index, i in enumerate(instructions) if i.root in _JUMPS or _is_barrier(i)}
    ordered = sorted(first for first in firsts if first < len(instructions))
    numbers = {first: number for number, first in enumerate(ordered)}
    blocks = []
    for number, (first, last) in enumerate(zip(ordered, [*ordered[1:], len(instructions)], strict=True)):
        final, within = instructions[last - 1], instructions[first:last]
        block = Block(number, first, last, "next", conditional=final.guard is not None)
        if final.root == "bra":
            block.end, block.target = "branch", numbers[kernel.labels[final.operands[-1].name]]
        elif final.root in ("ret", "exit"):
            block.end = "return"
        elif _is_barrier(final):
            block.end = "barrier"
        block.together = max(_TOGETHER.get("warp" if "warp" in i.op else i.root, 1) for i in within)
        block.counts = Counter(map(instruction_class, within))
        blocks.append(block)
    return blocks


def registers_in(operand: Operand) -> Iterable[str]:
    """Names of the registers that an operand consists of."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Address) and operand.base is not None:
        yield from registers_in(operand.base)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_in(item)
    elif isinstance(operand, Pair):
        yield from registers_in(operand.first)
        yield from registers_in(operand.second)


def _outliving(kernel: Kernel, blocks: list[Block]) -> dict[str, int]:
    """Registers that more than one block touches, or that a block reads before it writes them."""
    blocks_of: dict[str, set[int]] = {}
    outliving: set[str] = set()
    for block in blocks:
        written: set[str] = set()
        for i in kernel.instructions[block.first : block.last]:
            first_read = 0 if i.root in _WITHOUT_RESULT else 1
            results = [name for operand in i.operands[:first_read] for name in registers_in(operand)]
            sources = [name for operand in i.operands[first_read:] for name in registers_in(operand)]
            sources += [i.guard] if i.guard else []
            sources += results if i.root == "wgmma" else []
            outliving |= set(sources) - written
            if i.guard is None:
                written.update(results)
            for name in (*results, *sources):
                blocks_of.setdefault(name, set()).add(block.number)
    outliving |= {name for name, numbers in blocks_of.items() if len(numbers) > 1}
    names = sorted(name for name in outliving if kernel.type_of(name))
    return {name: index for index, name in enumerate(names)}


def _granule(kernel: Kernel, space: str) -> int:
    accesses = (i for i in kernel.instructions if i.root in ("ld", "st") and space in i.op)
    return min([4, *(size_of(KINDS[i.op[-1]]) for i in accesses)])


def _registers_of_wgmma(kernel: Kernel) -> set[str]:
    """Sums and left operands: the operands in front, where they are registers."""
    products = (i for i in kernel.instructions if i.op[:2] == ("wgmma", "mma_async"))
    vectors = (o for i in products for o in i.operands[:2] if isinstance(o, Vector))
    return {name for vector in vectors for name in registers_in(vector)}


def _without(kernel: Kernel, line: int) -> Kernel:
    (index,) = (n for n, instruction in enumerate(kernel.instructions) if instruction.line == line)
    labels = {name: at - (at > index) for name, at in kernel.labels.items()}
    return replace(
        kernel, instructions=kernel.instructions[:index] + kernel.instructions[index + 1 :], labels=labels
    )


def translate(kernel: Kernel, contract: bool = False, without: int | None = None) -> Translation:
    """Translate a kernel.

    Args:
        contract: see :class:`Translation`. without: line of an instruction to leave out, for planted faults.

    Raises:
        UnknownInstruction: it has an instruction that is not modelled.
    """
    from . import opcodes  # noqa: F401 - registers the emitters

    if without is not None:
        kernel = _without(kernel, without)
    blocks = _split(kernel)
    registers = _outliving(kernel, blocks)
    kinds = [KINDS[kernel.type_of(name)] for name in registers]
    granules = _granule(kernel, "shared"), _granule(kernel, "global")
    translation = Translation(kernel, blocks, registers, kinds, *granules, contract)
    pending = _registers_of_wgmma(kernel)
    texts = []
    for block in blocks:
        writer, condition = Emitter(translation, block, pending), None
        for instruction in kernel.instructions[block.first : block.last]:
            if instruction.root in _JUMPS:
                writer.instruction = instruction
                condition = writer.guard()
            else:
                writer.emit(instruction)
        texts.append(writer.function(condition))
    exec(compile("\n\n".join(texts), f"<PTX of {kernel.name}>", "exec"), translation.namespace)
    for block in blocks:
        block.run = translation.namespace[f"block{block.number}"]
    return translation
