"""The repaired interpreter computes what a GPU does: bit for bit where that is defined, else to stated rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3.4e38, 1.0, -1.0]


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the sign of zero; any NaN equals any other."""
    assert result.dtype == expected.dtype
    integers = {2: torch.int16, 4: torch.int32}[result.element_size()]
    same = result.view(integers) == expected.view(integers)
    assert bool((same | (result.isnan() & expected.isnan())).all())


def special_and_random(count: int) -> torch.Tensor:
    values = torch.randn(count) * torch.exp(4 * torch.randn(count))
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return values


# ---- casts


@triton.jit
def cast(x, out, n: tl.constexpr):
    r = tl.arange(0, n)
    tl.store(out + r, tl.load(x + r).to(out.dtype.element_ty))


def run_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    cast[(1,)](x, out, x.numel())
    return out


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_to_bfloat16_rounds_to_nearest_even(low):
    x = ((torch.arange(65536) - 32768).to(torch.int32) * 65536 + low).view(torch.float32)
    assert_same_bits(run_cast(x, torch.bfloat16), x.bfloat16())


def test_bfloat16_to_float32_is_exact():
    x = (torch.arange(65536) - 32768).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(run_cast(x, torch.float32), x.float())


@pytest.mark.parametrize("source", [torch.int32, torch.int64, torch.int8, torch.float16, torch.float64])
def test_other_types_to_bfloat16_and_back(source):
    x = (torch.randn(256) * 60).to(source)
    narrow = run_cast(x, torch.bfloat16)
    assert_same_bits(narrow, x.bfloat16())
    assert torch.equal(run_cast(narrow, source), narrow.to(source))


# ---- bfloat16 arithmetic


@triton.jit
def bf16_operations(x, y, sums, differences, products, smaller, chosen, negative, magnitude, n: tl.constexpr):
    r = tl.arange(0, n)
    a = tl.load(x + r)
    b = tl.load(y + r)
    tl.store(sums + r, a + b)
    tl.store(differences + r, a - b)
    tl.store(products + r, a * b)
    tl.store(smaller + r, (a < b).to(tl.bfloat16))
    tl.store(chosen + r, tl.where(a >= b, a, b))
    tl.store(negative + r, -a)
    tl.store(magnitude + r, tl.abs(a))


def test_bfloat16_arithmetic_is_that_of_torch():
    x, y = special_and_random(4096).bfloat16(), special_and_random(4096).bfloat16().roll(3)
    result = [torch.empty_like(x) for _ in range(7)]
    bf16_operations[(1,)](x, y, *result, 4096)
    # A negative zero's negation is 0 - x, here as on a GPU.
    expected = [x + y, x - y, x * y, (x < y).bfloat16(), torch.where(x >= y, x, y), 0 - x, x.abs()]
    for a, b in zip(result, expected, strict=True):
        assert_same_bits(a, b)


@triton.jit
def bf16_types(x, eta, out, n: tl.constexpr):
    a = tl.load(x + tl.arange(0, n))
    tl.static_assert((a * 0.1).dtype == tl.bfloat16)
    tl.static_assert((a * eta).dtype == tl.float32)
    tl.static_assert((a / a).dtype == tl.float32)
    half = tl.full((n,), 0.1, tl.bfloat16)
    tl.store(out + tl.arange(0, n), a * 0.1 + half * tl.zeros((n,), tl.bfloat16))
    tl.store(out + n + tl.arange(0, n), half)


def test_a_literal_keeps_bfloat16_and_an_argument_makes_it_float32():
    x, out = torch.randn(64).bfloat16(), torch.empty(128, dtype=torch.bfloat16)
    bf16_types[(1,)](x, 0.1, out, 64)
    assert_same_bits(out[:64], x * torch.tensor(0.1, dtype=torch.bfloat16) + 0)
    assert_same_bits(out[64:], torch.full((64,), 0.1, dtype=torch.bfloat16))


@triton.jit
def reductions(x, sums, most, least, where_most, where_least, m: tl.constexpr, n: tl.constexpr):
    r = tl.arange(0, m)
    a = tl.load(x + r[:, None] * n + tl.arange(0, n)[None, :])
    tl.store(sums + r, tl.sum(a, 1))
    tl.store(most + r, tl.max(a, axis=1))
    tl.store(least + r, tl.min(a, axis=1))
    tl.store(where_most + r, tl.argmax(a, 1, tie_break_left=True))
    tl.store(where_least + r, tl.argmin(a, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(dtype):
    x = torch.randint(-8, 8, (32, 16)).to(dtype)  # many ties, and sums that are exact
    sums, most, least = (torch.empty(32, dtype=dtype) for _ in range(3))
    where_most, where_least = torch.empty(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    reductions[(1,)](x, sums, most, least, where_most, where_least, 32, 16)
    assert torch.equal(sums, x.sum(1))
    assert torch.equal(most, x.amax(1))
    assert torch.equal(least, x.amin(1))
    first = torch.arange(16).expand(32, 16)
    for result, extreme in ((where_most, most), (where_least, least)):
        expected = torch.where(x == extreme[:, None], first, 16).amin(1)
        assert torch.equal(result.long(), expected)


def test_argmax_does_not_find_nan():
    # A comparison with NaN is false: which element comes out depends on the order, as on a GPU.
    x = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    index, unused = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    reductions[(1,)](x, *(torch.empty(1) for _ in range(3)), index, unused, 1, 4)
    assert index.item() == 2


@triton.jit
def whole_sum(x, out, n: tl.constexpr):
    a = tl.load(x + tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :])
    tl.store(out, tl.sum(a))
    tl.store(out + 1, tl.max(tl.sum(a, axis=0, keep_dims=True)))


def test_a_bfloat16_sum_rounds_at_every_addition():
    x = torch.zeros(4, 4)
    x[0, 0], x[2, 0], x[1, 0], x[3, 0] = 256.0, 1.0, 1.0, 1.0  # 256 + 1 is 256 in bfloat16
    out = torch.empty(2, dtype=torch.bfloat16)
    whole_sum[(1,)](x.bfloat16(), out, 4)
    assert out.tolist() == [258.0, 258.0]  # (256 + 1) + (1 + 1); exact: 259


# ---- NaN


@triton.jit
def extremes(x, y, out, n: tl.constexpr):
    r = tl.arange(0, n)
    a = tl.load(x + r)
    b = tl.load(y + r)
    keep: tl.constexpr = tl.PropagateNan.ALL
    tl.store(out + r, tl.maximum(a, b))
    tl.store(out + n + r, tl.maximum(a, b, propagate_nan=keep))
    tl.store(out + 2 * n + r, tl.minimum(a, b))
    tl.store(out + 3 * n + r, tl.minimum(a, b, propagate_nan=keep))
    tl.store(out + 4 * n + r, tl.clamp(a, -1.0, 1.0))
    tl.store(out + 5 * n + r, tl.clamp(a, -1.0, 1.0, propagate_nan=keep))
    tl.store(out + 6 * n + r, tl.max(a, 0) + r * 0)
    tl.store(out + 7 * n + r, tl.max(a * float("nan"), 0) + r * 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_dropped_or_kept_as_asked(dtype):
    nan = float("nan")
    x, y = torch.tensor([nan, 2.0, nan, -3.0], dtype=dtype), torch.tensor([1.0, nan, nan, 5.0], dtype=dtype)
    out = torch.empty(8, 4, dtype=dtype)
    extremes[(1,)](x, y, out, 4)
    expected = [
        [1, 2, nan, 5],
        [nan, nan, nan, 5],
        [1, 2, nan, -3],
        [nan, nan, nan, -3],
        [-1, 1, -1, -1],
        [nan, 1, nan, -1],
        [2, 2, 2, 2],
        [nan, nan, nan, nan],
    ]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=dtype), equal_nan=True, rtol=0, atol=0)


# ---- functions


@triton.jit
def tl_functions(x, out, n: tl.constexpr):
    r = tl.arange(0, n)
    a = tl.load(x + r)
    tl.store(out + r, tl.exp(a))
    tl.store(out + n + r, tl.log(a))
    tl.store(out + 2 * n + r, tl.sqrt(a))
    tl.store(out + 3 * n + r, tl.erf(a))
    tl.store(out + 4 * n + r, tl.sigmoid(a))
    tl.store(out + 5 * n + r, tl.abs(a))
    tl.store(out + 6 * n + r, tl.exp2(a))
    tl.store(out + 7 * n + r, tl.rsqrt(a))


@triton.jit
def libdevice_functions(x, out, n: tl.constexpr):
    r = tl.arange(0, n)
    a = tl.load(x + r)
    tl.store(out + r, libdevice.tanh(a))
    tl.store(out + n + r, libdevice.exp(a))
    tl.store(out + 2 * n + r, libdevice.expm1(a))
    tl.store(out + 3 * n + r, libdevice.log1p(a))
    tl.store(out + 4 * n + r, libdevice.erf(a))
    tl.store(out + 5 * n + r, libdevice.erfc(a))


TL = [torch.exp, torch.log, torch.sqrt, torch.erf, torch.sigmoid, torch.abs, torch.exp2, torch.rsqrt]
LIBDEVICE = [torch.tanh, torch.exp, torch.expm1, torch.log1p, torch.erf, torch.erfc]


@pytest.mark.parametrize(
    ("kernel", "functions"), [(tl_functions, TL), (libdevice_functions, LIBDEVICE)], ids=["tl", "libdevice"]
)
def test_functions_are_right_to_a_few_ulp(kernel, functions):
    # Arguments beyond float32's range of exp: infinite results are no error on a GPU.
    x = torch.cat([4 * torch.randn(250), torch.tensor([-200.0, 200.0, 0.0, 1e-6, -1e-6, float("nan")])])
    out = torch.empty(len(functions), 256)
    kernel[(1,)](x, out, 256)
    for result, function in zip(out, functions, strict=True):
        # 2^-21: a few ulp; and denormal results keep fewer bits.
        expected = function(x.double()).float()
        torch.testing.assert_close(result, expected, rtol=2**-21, atol=1e-44, equal_nan=True)


@triton.jit
def unknown_function(x):
    tl.store(x, libdevice.acos(tl.load(x)))


def test_an_unknown_libdevice_function_is_an_error():
    with pytest.raises(NotImplementedError, match="__nv_acosf: add it"):
        unknown_function[(1,)](torch.ones(1))


@triton.jit
def product_error(x, y, out):
    a = tl.load(x)
    b = tl.load(y)
    tl.store(out, tl.fma(a, b, -(a * b)))


def test_fma_rounds_once():
    x, y, out = torch.rand(1), torch.rand(1), torch.empty(1)
    product_error[(1,)](x, y, out)
    assert float(out) == float(x.double() * y.double() - (x * y).double()) != 0


# ---- dot


@triton.jit
def dot(x, y, out, PRECISION: tl.constexpr, n: tl.constexpr):
    tile = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    acc = tl.full((n, n), 0, tl.float32)
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile), acc, input_precision=PRECISION))


@triton.jit
def dot_default(x, y, out, n: tl.constexpr):
    tile = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.trans(tl.load(y + tile))))


def run_dot(x: torch.Tensor, y: torch.Tensor, precision: str) -> torch.Tensor:
    out = torch.empty(x.shape)
    dot[(1,)](x, y, out, precision, len(x))
    return out


def truncated(x: torch.Tensor, bits: int = 11) -> torch.Tensor:
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.trunc(mantissa * 2**bits) / 2**bits, exponent).float()


def rounded(x: torch.Tensor, bits: int = 11) -> torch.Tensor:
    """To nearest, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.trunc(mantissa * 2**bits + 0.5 * mantissa.sign()) / 2**bits, exponent).float()


def test_dot_operands_have_the_precision_asked_for():
    x, one = torch.randn(64, 64) * torch.exp(3 * torch.randn(64, 64)), torch.eye(64)
    x[0] = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11, 1 - 2.0**-24] * 16)  # ties
    high = rounded(x)
    for a, b in ((x, one), (one, x)):
        assert_same_bits(run_dot(a, b, "ieee"), x)
        assert_same_bits(run_dot(a, b, "tf32"), truncated(x))
        assert_same_bits(run_dot(a, b, "tf32x3"), truncated(x - high) + high)
    out = torch.empty(64, 64)
    dot_default[(1,)](x, one, out, 64)
    assert_same_bits(out, truncated(x))  # tf32 is the default on a GPU too
    assert torch.equal(run_dot(x.bfloat16(), one.bfloat16(), "ieee"), x.bfloat16().float())


@pytest.mark.parametrize(
    ("precision", "dtype", "least", "most"),
    [
        ("ieee", torch.float32, 0, 5e-7),
        ("tf32x3", torch.float32, 0, 1e-6),
        ("tf32", torch.float32, 1e-4, 1e-3),
        ("ieee", torch.bfloat16, 0, 5e-7),  # of bfloat16 operands: products are exact
    ],
)
def test_the_error_of_a_dot(precision, dtype, least, most):
    x, y = torch.randn(128, 128).to(dtype), torch.randn(128, 128).to(dtype)
    exact = x.double() @ y.double()
    error = float((run_dot(x, y, precision) - exact).norm() / exact.norm())
    assert least <= error <= most


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_a_dot_of_infinities_and_nan(precision):
    x, y = torch.randn(16, 16), torch.randn(16, 16)
    x[3, 2] = float("inf")
    x[5, :2] = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN, all bits set
    torch.testing.assert_close(run_dot(x, y, precision), x @ y, equal_nan=True, rtol=1e-2, atol=1e-2)


def test_a_dot_that_a_gpu_would_not_compile():
    with pytest.raises(AssertionError, match="K >= 16"):
        run_dot(torch.ones(8, 8), torch.ones(8, 8), "ieee")


# ---- control flow, shapes, assertions


@triton.jit
def doubled(x, times):
    for _ in range(times):
        x = x + x
    return x


@triton.jit
def loops(x, counts, times, out):
    a = tl.load(x)
    for i in range(times):
        for _ in tl.range(0, i + 1, num_stages=2):
            a = a + 1
    tl.store(out, doubled(a, tl.load(counts)))


def test_loops_over_run_time_counts():
    out = torch.empty(1)
    loops[(1,)](torch.ones(1), torch.tensor([3]), 4, out)
    assert float(out) == (1 + 1 + 2 + 3 + 4) * 8


FACTOR = tl.constexpr(3)


@triton.jit
def constants(x, out):
    a = tl.load(x)
    tl.store(
        out,
        (FACTOR - a).to(tl.float32) * (FACTOR / a) + (FACTOR * a if a < FACTOR else FACTOR),
    )


def test_a_global_constant_may_stand_before_a_tensor():
    out = torch.empty(1)
    constants[(1,)](torch.full((1,), 2.0), out)
    assert float(out) == 7.5


@triton.jit
def hints(offset, FACTOR_: tl.constexpr, RUN: tl.constexpr, n: tl.constexpr, SPREAD: tl.constexpr):
    first = tl.multiple_of(offset, FACTOR_)
    r = first + (tl.arange(0, n) // RUN) * SPREAD + tl.arange(0, n) % RUN
    tl.max_contiguous(tl.multiple_of(r, RUN), RUN)
    tl.max_contiguous(tl.multiple_of(r[:, None] + r[None, :] * 0, (RUN, 1)), (RUN, 1))


def test_wrong_hints_are_errors():
    hints[(1,)](48, 16, 4, 16, 8)
    with pytest.raises(interpreter.WrongHint, match=r"hints, program \(0, 0, 0\): multiple_of 16: 40"):
        hints[(1,)](40, 16, 4, 16, 8)
    with pytest.raises(interpreter.WrongHint, match="multiple_of 4, of every run of 4"):
        hints[(1,)](48, 16, 4, 16, 6)
    with pytest.raises(interpreter.WrongHint, match="max_contiguous 4 along axis 0"):
        not_contiguous[(1,)]()


@triton.jit
def not_contiguous():
    tl.max_contiguous(tl.arange(0, 16) * 2, 4)


@triton.jit
def shapes(x, out, m: tl.constexpr, n: tl.constexpr):
    a = tl.load(x + tl.arange(0, m * n))
    turned = tl.trans(tl.reshape(a, (m, n)))
    tl.store(out + tl.arange(0, n)[:, None] * m + tl.arange(0, m)[None, :], turned)


def test_reshape_and_trans():
    x, out = torch.randn(8, 16).bfloat16(), torch.empty(16, 8, dtype=torch.bfloat16)
    shapes[(1,)](x, out, 8, 16)
    assert torch.equal(out, x.T)


@triton.jit
def asserting(x, limit):
    tl.device_assert(tl.load(x + tl.program_id(0)) < limit, "too large")


@triton.jit
def overflowing(x, stride, OPERATION: tl.constexpr):
    offset = tl.load(x + tl.program_id(0) * 0).to(tl.int32) + stride
    if OPERATION == "add":
        tl.store(x, offset + offset)
    elif OPERATION == "sub":
        tl.store(x, -offset - offset)
    elif OPERATION == "mul":
        tl.store(x, offset * 2)
    else:
        tl.store(x, offset.to(tl.int64) * 2)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "int64"])
def test_integer_overflow_is_an_error(operation):
    x = torch.ones(1, dtype=torch.int64)
    overflowing[(1,)](x, 2**30 - 2, operation)
    assert x.abs().item() == 2**31 - 2
    x.fill_(3)
    if operation == "int64":
        overflowing[(1,)](x, 2**30, operation)
        assert x.item() == 2**31 + 6
    else:
        with pytest.raises(
            interpreter.DeviceAssertion, match=rf"overflowing, program .*: int32 overflow in {operation}"
        ):
            overflowing[(1,)](x, 2**30, operation)


def test_grids_and_arguments():
    out = torch.zeros(2)
    copy_flags[lambda meta: (meta["n"],)](out, (True, None), flag=True, n=2, num_warps=4)
    assert out.tolist() == [1.0, 1.0]


@triton.jit
def copy_flags(out, pair, flag, n: tl.constexpr):
    if flag and pair[0] and pair[1] is None:
        tl.store(out + tl.program_id(0), 1.0)


# ---- a whole kernel


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def predict(
    x,
    w,
    b,
    v,
    error,
    M,
    K,
    N,
    eta,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """error = v - (tanh(x) w + b), and v <- v - eta error."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        left = tl.load(
            x + rm[:, None] * K + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0
        )
        right = tl.load(
            w + rk[:, None] * N + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0
        )
        acc = tl.dot(tanh(left.to(tl.float32)).to(right.dtype), right, acc, input_precision=PRECISION)
    acc += tl.load(b + rn, mask=rn < N, other=0.0)[None, :]
    inside = (rm[:, None] < M) & (rn[None, :] < N)
    at = rm[:, None] * N + rn[None, :]
    belief = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
    eps = belief - acc
    tl.store(error + at, eps, mask=inside)
    tl.store(v + at, belief - eta * eps, mask=inside)


@pytest.mark.parametrize(
    ("precision", "dtype", "least", "most"),
    [
        ("ieee", torch.float32, 0, 2e-6),
        ("tf32x3", torch.float32, 0, 2e-6),
        ("tf32", torch.float32, 5e-5, 1e-3),
        ("ieee", torch.bfloat16, 5e-4, 6e-3),
    ],
)
def test_a_fused_kernel(precision, dtype, least, most):
    m, k, n, eta = 45, 70, 33, 0.25
    x, w, v = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    x, w, b, v = (t.to(dtype) for t in (x, w, torch.randn(n), v))
    expected = v.double() - (torch.tanh(x.double()) @ w.double() + b.double())
    moved = v.double() - eta * expected
    error = torch.empty(m, n, dtype=dtype)
    predict[(triton.cdiv(m, 32), triton.cdiv(n, 16))](
        x, w, b, v, error, m, k, n, eta, precision, BM=32, BK=32, BN=16, num_warps=4, num_stages=2
    )
    for result, truth in ((error, expected), (v, moved)):
        assert least <= float((result - truth).norm() / truth.norm()) <= most


def test_without_the_variable_the_error_says_what_to_set():
    program = """if True:
        import interpreter, os
        for value in ("0", "1"):
            os.environ["TRITON_INTERPRET"] = value
            try:
                interpreter.repair()
            except RuntimeError as error:
                print(error)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    unset, late = run.stdout.splitlines()
    assert unset.startswith("set TRITON_INTERPRET=1 in the environment before triton is imported")
    assert late.startswith("triton was imported before TRITON_INTERPRET=1 was set")
