"""What the executor reports: each fault planted in a small kernel, beside the same kernel without it."""

from __future__ import annotations

import numpy as np
import pytest
from executor import Deadlock, DeviceMemory, Launch, parse, translate
from programs import THREADS, kernel, run

# 16 bytes a thread: where they lie in global memory (%d11 to write, %d12 to read) and in shared memory (%r3)
_PLACES = """
    mad.wide.u32 %d11, %r1, 16, %d1; mad.wide.u32 %d12, %r1, 16, %d2; shl.b32 %r3, %r1, 4; mov.b32 %r10, 0;
    xor.b32 %r4, %r1, 64; shl.b32 %r4, %r4, 4; setp.lt.s32 %p1, %r1, 64; mov.b64 %d20, {descriptor};
"""
_STORE = "st.shared.v4.b32 [%r3], {%r1, %r1, %r1, %r1};"
_LOAD_OTHER = "ld.shared.b32 %r5, [%r4]; st.global.b32 [%d11], %r5;"
_COPY = "cp.async.cg.shared.global [%r3], [%d12], 16;"
_COMMIT, _WAIT, _BARRIER = "cp.async.commit_group;", "cp.async.wait_group 0;", "bar.sync 0;"
_FENCE_PROXY = "fence.proxy.async.shared::cta;"
_SUMS = ", ".join(f"%f{n}" for n in range(1, 5))
_CLEAR = " ".join(f"mov.f32 %f{n}, 0f00000000;" for n in range(1, 5))
_A = " ".join(f"mov.b32 %r{n}, 0;" for n in range(20, 24))
_GROUP_FENCE, _GROUP_COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
_GROUP_WAIT = "wgmma.wait_group.sync.aligned 0;"


_SHAPE = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
_PRODUCT = f"{_SHAPE} {{{_SUMS}}}, {{%r20, %r21, %r22, %r23}}, %d20, 1, 1, 1, 0;"
_KEEP = "st.global.f32 [%d11], %f1;"
_BEGIN_PRODUCT = [
    _CLEAR,
    _A,
    _STORE,
    _FENCE_PROXY,
    _BARRIER,
    _GROUP_FENCE,
    _PRODUCT,
    _GROUP_COMMIT,
]

#: name -> (statements, which of them to leave out or what to put in its place, what is reported then)
FAULTS = {
    "a barrier before a load": ([_STORE, _BARRIER, _LOAD_OTHER], {1: ""}, "shared load races with a store"),
    "a barrier before a store": (
        [_STORE, _BARRIER, _LOAD_OTHER, _BARRIER, _STORE],
        {3: ""},
        "shared store races with an earlier load",
    ),
    "a barrier between stores": (
        [_STORE, _BARRIER, "st.shared.b32 [%r4], %r1;"],
        {1: ""},
        "shared store races with an earlier store",
    ),
    "a barrier of the warp before a load": (
        [_STORE, "bar.warp.sync -1;", "xor.b32 %r4, %r3, 16; ld.shared.b32 %r5, [%r4];"],
        {1: ""},
        "shared load races with a store",
    ),
    "a barrier of the block between warps": (
        [_STORE, _BARRIER, _LOAD_OTHER],
        {1: "bar.warp.sync -1;"},
        "shared load races with a store",
    ),
    "a barrier of the warp before a store": (
        [_STORE, _BARRIER, "xor.b32 %r4, %r3, 16; ld.shared.b32 %r5, [%r4];", "bar.warp.sync -1;", _STORE],
        {3: ""},
        "shared store races with an earlier load",
    ),
    "one value": (["st.shared.b32 [0], %r10;"], {0: "st.shared.b32 [0], %r1;"}, "different values"),
    "something written": ([_STORE, _BARRIER, _LOAD_OTHER], {0: ""}, "shared load of what nobody wrote"),
    "a copy's wait": ([_COPY, _COMMIT, _WAIT, _BARRIER, _LOAD_OTHER], {2: ""}, "what cp.async has not brought yet"),
    "a copy's commit": ([_COPY, _COMMIT, _WAIT, _BARRIER, _LOAD_OTHER], {1: ""}, "what cp.async has not brought yet"),
    "a copy's barrier": ([_COPY, _COMMIT, _WAIT, _BARRIER, _LOAD_OTHER], {3: ""}, "shared load races with a store"),
    "a copy to a free place": (
        [_STORE, _BARRIER, _LOAD_OTHER, _BARRIER, _COPY, _COMMIT, _WAIT],
        {3: ""},
        "cp.async races with an earlier load",
    ),
    "a place of its own": (
        [_COPY, _STORE.replace("%r3", "%r3+2048"), _COMMIT, _WAIT],
        {1: _STORE},
        "where cp.async writes",
    ),
    "a wait at the end": ([_COPY, _COMMIT, _WAIT], {2: ""}, "a cp.async that no thread waits for"),
    "bounds of global memory": (
        ["st.global.b32 [%d11], %r1;"],
        {0: "st.global.b32 [%d11+16], %r1;"},
        "global store out of bounds",
    ),
    "bounds of shared memory": ([_STORE], {0: "st.shared.b32 [%r3+16376], %r1;"}, "shared store out of bounds"),
    "a vector's alignment in global memory": (
        ["ld.global.v2.b32 {%r5, %r6}, [%d12];"],
        {0: "ld.global.v2.b32 {%r5, %r6}, [%d12+4];"},
        "global load of 8 bytes misaligned",
    ),
    "a vector's alignment in shared memory": (
        [_STORE],
        {0: "st.shared.v2.b32 [%r3+4], {%r1, %r1};"},
        "shared store of 8 bytes misaligned",
    ),
    "one barrier for all": (
        ["@%p1 bra ONE;", "bra TWO;", "ONE: mov.b32 %r5, 1;", "TWO: bar.sync 0;"],
        {1: "bar.sync 0; bra END;", 3: "bar.sync 0; END:"},
        "at different barriers",
    ),
    "all threads at a barrier": (["mov.b32 %r5, 0;", _BARRIER], {0: "@%p1 ret;"}, "have left behind"),
    "sums after the wait": (
        [*_BEGIN_PRODUCT, _GROUP_WAIT, _KEEP],
        {8: _KEEP, 9: _GROUP_WAIT},
        "%f1 is used before the wait for its wgmma",
    ),
    "a left operand in registers until the wait": (
        [*_BEGIN_PRODUCT, _GROUP_WAIT, "mov.b32 %r21, %r1;", _KEEP],
        {8: "mov.b32 %r21, %r1;", 9: _GROUP_WAIT},
        "%r21 is used before the wait for its wgmma",
    ),
    "an operand in shared memory until the wait": (
        [*_BEGIN_PRODUCT, _GROUP_WAIT, _BARRIER, "st.shared.v4.b32 [%r3], {%r10, %r10, %r10, %r10};", _KEEP],
        {8: "", 10: "st.shared.v4.b32 [%r3], {%r10, %r10, %r10, %r10}; " + _GROUP_WAIT},
        "shared store to what a wgmma still reads",
    ),
    "a copy after the wait": (
        [*_BEGIN_PRODUCT, _GROUP_WAIT, _BARRIER, _COPY, _COMMIT, _WAIT, _KEEP],
        {8: "", 11: _COMMIT + _GROUP_WAIT},
        "cp.async to what a wgmma still reads",
    ),
    "a product's wait": ([*_BEGIN_PRODUCT, _GROUP_WAIT], {8: ""}, "a wgmma that no thread waits for"),
    "a product's commit": ([*_BEGIN_PRODUCT, _GROUP_WAIT, _KEEP], {7: ""}, "before the wait for its wgmma"),
    "a proxy fence behind stores": (
        [*_BEGIN_PRODUCT, _GROUP_WAIT, _KEEP],
        {3: ""},
        "wgmma reads what st.shared stored without fence.proxy.async",
    ),
    "a proxy fence behind copies": (
        [_CLEAR, _A, _COPY, _COMMIT, _WAIT, _FENCE_PROXY, _BARRIER, *_BEGIN_PRODUCT[5:], _GROUP_WAIT],
        {5: ""},
        "wgmma reads what cp.async brought without fence.proxy.async",
    ),
    "a proxy fence behind the wait": (
        [_CLEAR, _A, _COPY, _COMMIT, _WAIT, _FENCE_PROXY, _BARRIER, *_BEGIN_PRODUCT[5:], _GROUP_WAIT],
        {4: _FENCE_PROXY, 5: _WAIT},
        "wgmma reads what cp.async brought without fence.proxy.async",
    ),
    "a fence of the registers": (
        [*_BEGIN_PRODUCT, _GROUP_WAIT, _KEEP],
        {5: ""},
        "written since the last wgmma.fence",
    ),
    "one descriptor": (
        [*_BEGIN_PRODUCT[:6], "mov.b64 %d21, 0;", _PRODUCT, _GROUP_COMMIT, _GROUP_WAIT],
        {6: "cvt.u64.u32 %d21, %r1; and.b64 %d21, %d21, 7; add.s64 %d20, %d20, %d21;"},
        "give different descriptors",
    ),
}  # fmt: skip


def reports(statements: list[str], changes: dict[int, str] | None = None) -> list[str]:
    parts = [(changes or {}).get(n, part) for n, part in enumerate(statements)]
    body = _PLACES.format(descriptor=(128 >> 4) << 16 | (256 >> 4) << 32) + "\n".join(parts)
    arrays = [np.zeros((THREADS, 4), "u4"), np.ones((THREADS, 4), "u4")]
    _, launch = run(kernel(body, 2, shared=16384), arrays)
    return [report.what for report in launch.reports]


@pytest.mark.parametrize("needed", FAULTS)
def test_what_is_missing_is_reported(needed):
    statements, changes, expected = FAULTS[needed]
    assert reports(statements) == []
    result = reports(statements, changes)
    assert any(expected in what for what in result), result


def test_blocks_of_a_grid_never_wait_for_each_other():
    body = "mad.wide.u32 %d11, %r1, 4, %d1; {load}\n st.global.b32 [%d11], %r1;"
    out = [np.zeros(THREADS, "u4")]
    _, alone = run(kernel(body.format(load="ld.global.b32 %r2, [%d11];"), 1), out)
    _, two = run(kernel(body.format(load=""), 1), out, blocks=2)
    _, reads = run(kernel(body.format(load="ld.global.b32 %r2, [%d11]; bar.sync 0;"), 1), out, blocks=2)
    assert not alone.reports
    assert [report.what for report in two.reports] == ["global store races with an earlier store"]
    assert "global store races with an earlier load" in [report.what for report in reads.reports]
    assert two.reports[0].thread is not None and "st.global.b32" in str(two.reports[0])


def test_extents_of_a_buffer():
    """Matrices in one arena, with gaps that belong to none."""
    (parsed,) = parse(kernel("mad.wide.u32 %d11, %r1, 4, %d1; st.global.b32 [%d11], %r1;", 1)).values()
    for extents, wanted in (([(0, 512)], 0), ([(0, 256), (260, 252)], 1)):
        device = DeviceMemory()
        address = device.add(np.zeros(THREADS, "u4"), "arena", extents)
        device.build()
        launch = Launch(translate(parsed), device, address.to_bytes(8, "little"), (1,), THREADS, 0).run()
        assert len(launch.reports) == wanted
    assert "byte 256 of arena, 512 bytes" in str(launch.reports[0]) and launch.reports[0].thread == (0, 64)


@pytest.mark.parametrize(
    "statements",
    [
        [
            "@%p1 bra END;",
            "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
            "END:",
        ],  # warps 0 and 1 are past it: no fault
        ["setp.lt.s32 %p3, %r1, 16; @%p3 ret;", "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;"],
    ],
)
def test_a_warp_of_which_a_part_never_comes(statements):
    if "ret" not in statements[0]:
        assert reports(statements) == []
        return
    with pytest.raises(Deadlock, match="wait for others"):
        reports(statements)


def test_a_shuffle_of_some_lanes():
    assert reports(["shfl.sync.bfly.b32 %r5, %r1, 1, 31, 65535;"]) == [
        "an instruction of a warp whose mask is not full"
    ]


def test_fused_sums_are_what_contraction_makes():
    """u p - h, h being the rounded product: 0 by the source, the rounding error where the product is fused."""
    body = """mad.wide.u32 %d11, %r1, 4, %d1; ld.global.f32 %f1, [%d11]; mul.f32 %f2, %f1, %f1; mov.f32 %f3, %f2;
    sub{}.f32 %f4, %f2, %f3; st.global.f32 [%d11], %f4;"""
    x = np.random.default_rng(0).standard_normal(THREADS).astype("f4")
    (plain,), _ = run(kernel(body.format(""), 1), [x])
    (fused,), _ = run(kernel(body.format(""), 1), [x], contract=True)
    (named,), _ = run(kernel(body.format(".rn"), 1), [x], contract=True)
    exact = x.astype("f8") ** 2
    assert not plain.any() and not named.any()
    assert (fused == (exact - exact.astype("f4")).astype("f4")).all() and fused.any()
