"""Feedback stage of linear layers: beliefs of many layers move in one launch, as a grouped GEMM.

    r = delta_{l+1} W_{l+1}                                      the error above, pulled back to v_l
    d_l <- d_l + eta (eps_l - r)

Layer 1, whose prediction is constant, the clamped input (docs/method.md, fact 2), has eps_1 = -d_1. In Gram form
(fact 7) layer 1's beliefs leave the loop and, with G = W_2 W_2^T in the place of W,

    s <- (1 - eta) s - eta delta_2 G            sum <- (1 - eta) sum + eta delta_2

With momentum (momentum.py) d, s and sum move along velocities, whose steps are eps_l - r, -(s + delta_2 G) and
delta_2 - sum.

Strict predictive coding in deviation form: Rosenbaum, PLOS ONE 17(3) e0266102 (2022).

    delta_{l+1} (M, K)  --tiles of BLOCK_M x BLOCK_K-->  +--------------------+
                                                         | accumulator r      | --epilogue--> d, copy of d
    W_{l+1} (K, N)      --tiles of BLOCK_K x BLOCK_N-->  | BLOCK_M x BLOCK_N  |     ^
                                                         +--------------------+     d, error, velocity (read once)

Arguments of the kernel:

    state       arena, fp32                 error read; d (or s and sum) updated, with momentum their velocities too;
                                            error of layer 1 written
    operand     arena, fp32 or bf16         delta and W read; d is copied into it, rounded, unless products are
                                            tf32x3: these read float32, and ``operand`` is ``state``
    table       (problems, DESCRIPTOR_SIZE) int64: linear_problems.FeedbackProblem, highest layer first
    first_bad   (layers,) int32             lowered to ``iteration`` where a new state is NaN or infinite
    count       int32                       the first so many problems take part: active front (fact 3)
    iteration   int32                       for first_bad
    eta         fp32                        step size of this iteration
    momentum    fp32, or None for none

Scheduler and main loop are grouped_gemm.py's: a sample's result does not depend on its batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .first_bad import note_bad
from .grouped_gemm import MATRIX_MULTIPLE, MAX_REGISTERS, Gemm, accumulate, epilogue_in_subtiles, grouped_gemm
from .launching import launch
from .linear_problems import CLAMPED, FEEDBACK, GRAM_UPDATE
from .momentum import with_momentum
from .tf32 import store_operand


@triton.jit
def _epilogue(
    accumulator,
    start_m,
    start_n,
    state,
    operand,
    first_bad,
    problem,
    iteration,
    eta,
    momentum,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """From r to the moved beliefs, for a tile whose first element is (start_m, start_n)."""
    kind = tl.load(problem + FEEDBACK.KIND)
    M = tl.load(problem + FEEDBACK.M).to(tl.int32)
    ldc = tl.multiple_of(tl.load(problem + FEEDBACK.LDC), ALIGNED)
    base = ldc * start_m + start_n
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs = offs_m[:, None] * ldc.to(tl.int32) + offs_n[None, :]
    # over the padding up to ldc, where everything is zero and stays zero
    mask = (offs_m < M - start_m)[:, None] & (offs_n < ldc.to(tl.int32) - start_n)[None, :]
    if kind == GRAM_UPDATE:
        s = state + tl.multiple_of(tl.load(problem + FEEDBACK.S), MATRIX_MULTIPLE) + base
        total = state + tl.multiple_of(tl.load(problem + FEEDBACK.SUM), MATRIX_MULTIPLE) + base
        old = tl.load(s + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        if momentum is None:
            moved = (1 - eta) * old - eta * accumulator
        else:
            velocity = state + tl.multiple_of(tl.load(problem + FEEDBACK.VELOCITY), MATRIX_MULTIPLE) + base
            moved = old + eta * with_momentum(-old - accumulator, velocity + offs, momentum, mask)
        tl.store(s + offs, moved, mask=mask)
        # delta's tile at the same place: G is square, so delta lies as s does
        delta = operand + tl.multiple_of(tl.load(problem + FEEDBACK.A), MATRIX_MULTIPLE) + base
        delta_tile = tl.load(delta + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        total_old = tl.load(total + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        if momentum is None:
            total_new = (1 - eta) * total_old + eta * delta_tile
        else:
            velocity = (
                state + tl.multiple_of(tl.load(problem + FEEDBACK.SUM_VELOCITY), MATRIX_MULTIPLE) + base
            )
            step = with_momentum(delta_tile - total_old, velocity + offs, momentum, mask)
            total_new = total_old + eta * step
        tl.store(total + offs, total_new, mask=mask)
    else:
        d = state + tl.multiple_of(tl.load(problem + FEEDBACK.D), MATRIX_MULTIPLE) + base
        error = state + tl.multiple_of(tl.load(problem + FEEDBACK.ERROR), MATRIX_MULTIPLE) + base
        old = tl.load(d + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        if kind == CLAMPED:
            eps = -old  # at the old belief: its prediction is where it started
            tl.store(error + offs, eps, mask=mask)
        else:
            eps = tl.load(error + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        step = eps - accumulator
        if momentum is not None:
            velocity = state + tl.multiple_of(tl.load(problem + FEEDBACK.VELOCITY), MATRIX_MULTIPLE) + base
            step = with_momentum(step, velocity + offs, momentum, mask)
        moved = old + eta * step
        tl.store(d + offs, moved, mask=mask)
        if INPUT_PRECISION != "tf32x3":
            copy = operand + tl.multiple_of(tl.load(problem + FEEDBACK.D_OPERAND), MATRIX_MULTIPLE) + base
            store_operand(copy + offs, moved, mask, INPUT_PRECISION)
    note_bad(first_bad, tl.load(problem + FEEDBACK.LAYER), iteration, moved, mask)


@triton.jit
def feedback_tile(
    problem,
    pid_m,
    pid_n,
    state,
    operand,
    first_bad,
    iteration,
    eta,
    momentum,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one problem."""
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    # rows of delta and of weights are padded, whatever those of the beliefs are
    accumulator = accumulate(
        operand, problem, start_m, start_n, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
        MULTIPLE=MATRIX_MULTIPLE, B_TRANSPOSED=False,
    )  # fmt: skip
    epilogue_in_subtiles(
        accumulator,
        start_m,
        start_n,
        _epilogue,
        (state, operand, first_bad, problem, iteration, eta, momentum),
        (INPUT_PRECISION, ALIGNED),
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=["count", "iteration"])
def linear_feedback(
    state,
    operand,
    table,
    first_bad,
    count,
    iteration,
    eta,
    momentum,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    grouped_gemm(
        table,
        count,
        -1,
        feedback_tile,
        (state, operand, first_bad, iteration, eta, momentum),
        (INPUT_PRECISION, ALIGNED),
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


def launch_linear_feedback(
    state: Tensor,
    operand: Tensor,
    table: Tensor,
    first_bad: Tensor,
    *,
    count: int,
    iteration: int,
    eta: float,
    momentum: float = 0.0,
    programs: int,
    gemm: Gemm,
) -> None:
    """Launch on the current stream: the first ``count`` problems of ``table``, on a grid of ``programs``."""
    launch(
        linear_feedback,
        (programs,),
        state,
        operand,
        table,
        first_bad,
        count,
        iteration,
        eta,
        momentum or None,
        **gemm.constants(),
        num_warps=gemm.tiles.warps,
        num_stages=gemm.tiles.stages,
        maxnreg=MAX_REGISTERS,
    )
