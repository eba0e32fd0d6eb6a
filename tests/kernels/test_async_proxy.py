"""Fences for asynchronous Tensor Cores, what is unsafe in PTX and in machine code, and that launches look for it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import machine_code
import pytest
import triton
from compilation import compile_kernels
from test_compilation import product
from test_streamed import drawn

import pcfast
from pcfast import kernels
from pcfast.backends.triton import loop as loops
from pcfast.kernels import async_proxy
from pcfast.kernels.launching import UnsafeKernel, launch

WAIT, FENCE = "\tcp.async.wait_group \t2;\n", "\tfence.proxy.async.shared::cta;\n"
STORE, BARRIER = "\t@%p3 st.shared.v4.b32 \t[%r1], {%r2, %r3, %r4, %r5};\n", "\tbar.sync \t0;\n"
WGMMA = "\twgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {%r8,%r9}, %rd1, %rd2, %p1, 1, 1;\n"
FROM_REGISTERS = WGMMA.replace("%rd1,", "{%r4,%r5,%r6,%r7},")
TCGEN05 = "\t@%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;\n"
SYNC = "\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};\n"


def loop(*body: str) -> str:
    lines = "".join(body)
    head, branch = (
        ".visible .entry k(\n)\n{\n\t@%p1 bra \t$L__2;\n$L__1:   // loop\n",
        "\t@%p1 bra \t$L__1;\n",
    )
    return f"{head}{lines}{branch}$L__2:\n\tret;\n}}\n"


@pytest.mark.parametrize("product", [WGMMA, TCGEN05])
@pytest.mark.parametrize(
    "body",
    [
        (WAIT, BARRIER, "{product}", BARRIER),
        (BARRIER, "{product}", WAIT),  # the wait is for the next round
        (WAIT, "\t@%p2 bra \t$L__3;\n", "{product}", "$L__3:\n", BARRIER),
        (WAIT, "\tbra.uni \t$L__3;\n", FENCE, "$L__3:\n", "{product}"),
    ],
)
def test_a_fence_stands_behind_each_wait_that_leads_to_a_product(body, product):
    code = loop(*(line.format(product=product) if "{product}" in line else line for line in body))
    code = code.replace("\tret;", WAIT + "\tret;")  # the last wait leads to none
    assert async_proxy.hazards(code) == [
        "no fence.proxy.async between the wait for cp.async and a matrix instruction"
    ]
    fenced = async_proxy.with_fences(code)
    assert fenced.replace(WAIT + FENCE, WAIT) == code and fenced.count(WAIT + FENCE) == 1
    assert async_proxy.hazards(fenced) == [] and async_proxy.with_fences(fenced) == fenced


@pytest.mark.parametrize(
    "code",
    [
        loop(WAIT, BARRIER, SYNC),  # reads shared memory as any load does
        loop(WAIT, BARRIER, FENCE, WGMMA),  # as triton 3.9 has it
        loop(WAIT, WAIT, FENCE, WGMMA),
        loop(WGMMA, "\twgmma.wait_group.sync.aligned 1;\n"),
        loop(FROM_REGISTERS, "\twgmma.wait_group.sync.aligned 0;\n"),
    ],
)
def test_what_is_safe_stays_as_it_is(code):
    assert async_proxy.hazards(code) == [] and async_proxy.with_fences(code) == code


ORDER, ZERO = "\twgmma.fence.sync.aligned;\n", "\tmov.b32 \t%r1, %r9;\n"
SUM = "\twgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r1,%r2,%r3,%r4}, %rd1, %rd2, %p1, 1, 1;\n"


@pytest.mark.parametrize(
    "write", [ZERO, "\tld.global.v2.b32 \t{%r8, %r2}, [ %rd4 + 0 ];\n", "\t@%p3 add.f32 \t%r4, %r5, %r6;\n"]
)
def test_registers_are_ordered_before_the_product_that_uses_them(write):
    """Where a loop is unrolled, sums start behind the fence; one more orders all products that follow it."""
    code = loop(ORDER, write, SUM, "\tadd.s64 \t%rd1, %rd1, 2;\n", SUM)
    assert async_proxy.hazards(code) == [
        "no wgmma.fence between a write to a register and the wgmma that uses it"
    ]
    fenced = async_proxy.with_fences(code)
    assert fenced == code.replace(write + SUM, write + ORDER + SUM)
    assert async_proxy.hazards(fenced) == [] and async_proxy.with_fences(fenced) == fenced
    for safe in (
        loop(write, ORDER, SUM, SUM),
        loop(ORDER, "\tst.global.b32 \t[ %rd4 + 0 ], {%r1};\n", SUM),
        loop(ORDER, "\tmov.b32 \t%r7, %r1;\n", SUM),
    ):
        assert async_proxy.hazards(safe) == [] and async_proxy.with_fences(safe) == safe


def test_what_no_fence_behind_a_wait_mends():
    registers = loop(FROM_REGISTERS, "\twgmma.wait_group.sync.aligned 3;\n")
    (hazard,) = async_proxy.hazards(async_proxy.with_fences(registers))
    assert hazard.startswith("wgmma reads registers and is waited for with wgmma.wait_group 3")
    (hazard,) = async_proxy.hazards(async_proxy.with_fences(loop(STORE, BARRIER, WGMMA)))
    assert hazard.startswith("no fence.proxy.async between a store to shared memory")
    assert async_proxy.hazards(loop(STORE, FENCE, BARRIER, WGMMA)) == []


def test_the_compilers_code_is_fenced_and_left_operands_in_registers_are_found(tmp_path):
    """A planted fault: the loop makes its left operand itself, and triton 3.6 pipelines it."""
    settings = dict(reduction=64, stages=3, warps=8)
    loaded, made, unpipelined = compile_kernels(
        [product(**settings), product(**settings, made=True), product(**{**settings, "stages": 1}, made=True)]
    )
    assert loaded.hazards == unpipelined.hazards == []
    assert loaded.instructions["wgmma"] and loaded.instructions["cp.async"]
    in_ptx, in_machine_code = made.hazards
    assert in_ptx.startswith("wgmma reads registers")
    assert in_machine_code.startswith(
        "a pending product's left operand is overwritten: HGMMA.64x32x16.F32.BF16"
    )


PRODUCT = "        /*0010*/   HGMMA.64x32x8.F32.TF32 R24, R40, gdesc[UR16], R24, gsb0 ;\n"
PENDING = "        /*0020*/   WARPGROUP.DEPBAR.LE gsb0, 0x{} ;\n"


@pytest.mark.parametrize(
    ("between", "written", "count"),
    [
        (PENDING.format(0), "LDSM.16.M88.4 R40, [R11]", 0),
        (PENDING.format(1), "LDSM.16.M88.4 R40, [R11]", 1),
        (PRODUCT.replace("R40", "R44") + PENDING.format(1), "LDSM.16.M88.4 R40, [R11]", 0),
        (PRODUCT.replace(", gsb0", "") + PRODUCT + PENDING.format(1), "MOV R43, R1", 2),  # one group of two
        ("", "IMAD.WIDE R38, R1, R2, R4", 0),
        ("", "LDS.128 R37, [R11]", 1),
        ("", "@!P0 SHFL.BFLY PT, R42, R5, 0x1, 0x1f", 1),
        ("", "ISETP.GT.AND P0, PT, R40, R41, PT", 0),
        ("", "STS.128 [R40], R40", 0),
        ("", "STG.E desc[UR4][R40.64], R41", 0),
        ("", "CS2R R42, SRZ", 1),
    ],
)
def test_registers_of_pending_products(between, written, count):
    code = PRODUCT + between + f"        /*0030*/   {written} ;\n"
    assert len(machine_code.overwritten(code)) == count
    # the write stands before the product, in the next round of a loop
    rotated = (
        f".L_x_1:\n        /*0030*/   {written} ;\n{PRODUCT}{between}        /*0040*/   @P0 BRA `(.L_x_1) ;\n"
    )
    assert len(machine_code.overwritten(rotated)) == count


# what triton calls while it compiles


@pytest.fixture
def knobs(monkeypatch):
    monkeypatch.setattr(async_proxy, "_hook", None)
    monkeypatch.setattr(async_proxy, "_NEEDED", True)
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", None)
    return triton.knobs.runtime


def made_by(hook) -> str:
    stages = {"ptx": lambda source, metadata: loop(WAIT, WGMMA)}
    hook(None, stages, None, None, 90)
    return stages["ptx"](None, {})


def test_the_hook_joins_others_and_comes_back(knobs):
    seen = []
    knobs.add_stages_inspection_hook = lambda *arguments: seen.append(arguments[-1])
    async_proxy.install()
    mine = knobs.add_stages_inspection_hook
    async_proxy.install()
    assert knobs.add_stages_inspection_hook is mine
    assert made_by(mine) == loop(WAIT, FENCE, WGMMA) and seen == [90]
    knobs.add_stages_inspection_hook = lambda *arguments: mine(
        *arguments
    )  # another joins, and another replaces
    for _ in range(2):
        async_proxy.install()
        assert made_by(knobs.add_stages_inspection_hook) == loop(WAIT, FENCE, WGMMA)
        knobs.add_stages_inspection_hook = None


def test_releases_that_fence_themselves_are_left_alone(knobs, monkeypatch):
    monkeypatch.setattr(async_proxy, "_NEEDED", False)
    async_proxy.install()
    assert knobs.add_stages_inspection_hook is None
    versions = ("3.6.0", "3.7.0", "3.7.1", "3.10.0", "4.0.0+git1")
    assert [async_proxy._fences_itself(v) for v in versions] == [False, False, True, True, True]


def test_keys_of_caches_tell_kernels_with_fences(knobs):
    async_proxy.install()
    alone = knobs.add_stages_inspection_hook()
    async_proxy._hook, knobs.add_stages_inspection_hook = None, lambda *arguments: ("theirs", "hash")
    async_proxy.install()
    assert knobs.add_stages_inspection_hook() == ("theirs" + alone[0], "hash" + alone[1]) and all(alone)


# launches


def kernel(ptx: str | None, capability: int = 90, hash_: str = "a"):
    """What ``kernel[grid](...)`` needs, and gives back."""
    metadata = SimpleNamespace(target=SimpleNamespace(arch=capability), name="some_kernel")
    compiled = SimpleNamespace(hash=hash_, metadata=metadata, asm={} if ptx is None else {"ptx": ptx})
    return {(1,): lambda *arguments, **keywords: compiled}


def test_each_compiled_kernel_is_judged_once(monkeypatch):
    monkeypatch.setattr("pcfast.kernels.launching._safe", set())
    judged = []
    result = async_proxy.hazards
    monkeypatch.setattr(async_proxy, "hazards", lambda ptx: judged.append(ptx) or result(ptx))
    for _ in range(2):
        launch(kernel(loop(WAIT, FENCE, WGMMA), hash_="safe"), (1,))
        with pytest.raises(
            UnsafeKernel, match=r"some_kernel, compiled by triton .* 9\.0, .*no fence.*Delete"
        ):
            launch(kernel(loop(WAIT, WGMMA), hash_="stale"), (1,))
        launch(kernel(loop(WAIT, WGMMA), capability=80, hash_="older chip"), (1,))
    assert len(judged) == 3
    with pytest.raises(UnsafeKernel, match=r"PTX was not kept.*TRITON_STORE_BINARY_ONLY"):
        launch(kernel(None), (1,))


def test_an_unsafe_kernel_is_an_error_of_the_backend(monkeypatch):
    def unsafe(*_, **__):
        launch(kernel(loop(WAIT, WGMMA)), (1,))

    monkeypatch.setattr(loops, "launch_mlp_relaxation", unsafe)
    with pytest.raises(pcfast.BackendError, match=r"^layer 2 .*: some_kernel, compiled by triton"):
        pcfast.relax(*drawn("mlp"), backend="triton")


def test_nothing_else_launches_kernels():
    for file in Path(kernels.__file__).parent.glob("*.py"):
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        launched = [call.lineno for call in calls if isinstance(call.func, ast.Subscript)]
        assert len(launched) == (file.name == "launching.py"), (file.name, launched)
