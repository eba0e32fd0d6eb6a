"""Compiles triton kernels for `compilation`: one case a line on stdin, one answer a line on stdout, as JSON.

A process of its own because a kernel decorated under TRITON_INTERPRET=1, as in the tests, cannot be compiled.
Neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time

import machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pcfast.kernels import async_proxy

# What is counted in the PTX.
INSTRUCTIONS = {
    "tcgen05": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "mma.sync": r"\bmma\.sync\b",
    "cp.async": r"\bcp\.async\.c[ag]\b",
    "cvt.rna.tf32": r"\bcvt\.rna\.tf32\b",
    "sub.rn": r"\bsub\.rn(\.ftz)?\.f32\b",
}


def source(case: dict) -> ASTSource:
    """The kernel of a case with its arguments' types, constants and alignments."""
    module, _, name = case["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    types = {**case["signature"], **dict.fromkeys(case["constexprs"], "constexpr")}
    if set(types) != set(kernel.arg_names):
        missing = sorted(set(kernel.arg_names) - set(types))
        unknown = sorted(set(types) - set(kernel.arg_names))
        raise ValueError(f"{case['kernel']}: no type given for {missing}, no such arguments {unknown}")
    position = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    return ASTSource(
        kernel,
        signature={argument: types[argument] for argument in kernel.arg_names},
        # JSON has no tuples, constants no lists.
        constexprs={
            position[argument]: tuple(value) if isinstance(value, list) else value
            for argument, value in case["constexprs"].items()
        },
        attrs={position[argument]: [["tt.divisibility", 16]] for argument in case["divisible"]},
    )


@contextlib.contextmanager
def diagnostics():
    """What is written to the process's stderr meanwhile, as by the compiler's C++ parts."""
    messages: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            messages.append(file.read().strip())


def answer(case: dict) -> dict:
    """Compile one case: its figures, or the compiler's error."""
    began = time.perf_counter()
    with diagnostics() as messages, contextlib.redirect_stdout(io.StringIO()) as log:
        try:
            compiled = triton.compile(
                source(case),
                target=GPUTarget("cuda", case["capability"], 32),
                options={
                    "num_warps": case["warps"],
                    "num_stages": case["stages"],
                    "maxnreg": case["max_registers"],
                    "enable_fp_fusion": True,  # as in pcfast.kernels.launching
                },
            )
            error = ""
        except Exception as exception:  # whatever it is, it belongs to this case and not to the next
            error = f"{type(exception).__name__}: {exception}"
    seconds = time.perf_counter() - began
    if error:
        return {"error": "\n".join(filter(None, (error, *messages))), "seconds": seconds}
    # ptxas -v has a line for every function; a launch allots the registers of the hungriest.
    ptxas, ptx = log.getvalue(), compiled.asm["ptx"]
    return {
        "registers": max(int(count) for count in re.findall(r"Used (\d+) registers", ptxas)),
        "spills": sum(int(count) for count in re.findall(r"(\d+) bytes spill", ptxas)),
        "shared": compiled.metadata.shared,
        "instructions": {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        "hazards": async_proxy.hazards(ptx) + _overwritten(case, compiled),
        "seconds": seconds,
    }


def _overwritten(case: dict, compiled) -> list[str]:
    if case["capability"] != 90:
        return []
    result = machine_code.overwritten(machine_code.disassembled(compiled.asm["cubin"]))
    return [f"a pending product's left operand is overwritten: {line}" for line in result[:1]]


def main() -> None:
    # Whatever else is printed goes to stderr, not between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    async_proxy.install()  # as before each launch
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # a kernel taken from the cache has no log
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
