"""A relaxation of linear layers in one launch, its loop fused: each program relaxes its own samples, all iterations.

For t = first..last: the predict stage of every live layer, then the feedback stage (linear_predict.py and
linear_feedback.py have the equations and compute the tiles). Samples never interact: independent rows
(docs/method.md, fact 4). So programs never wait for each other; within a program a barrier separates the stages. It
pays where one program streams the weights through its SM faster than the stages of all programs start and end.

    program p:   [ samples p*BLOCK_M ... p*BLOCK_M+BLOCK_M-1 ]  x  all layers  x  all iterations
    weights, state:  global memory, cached in L1 and L2

Arguments of the kernel, beside those of the two stages:

    predict_table   (2 * layers, DESCRIPTOR_SIZE) int64   problems with a product, highest layer first, then the same
                                                          layers without
    feedback_table  (layers, DESCRIPTOR_SIZE) int64       highest layer first
    layers          int32                       problems of one kind
    first, last     int32                       iterations to run, 1-based
    fresh           int32                       1: from the forward pass, so that only the active front works
    eta             fp32                        step size of all iterations; None where there is a schedule
    schedule        (last,) fp32                step size of each iteration, or None
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .grouped_gemm import MAX_REGISTERS, Gemm, num_pid
from .launching import launch
from .linear_feedback import feedback_tile
from .linear_predict import Epilogue, predict_tile
from .linear_problems import DESCRIPTOR_SIZE


@triton.jit(do_not_specialize=["layers", "first", "last", "fresh"])
def mlp_relaxation(
    state,
    operand,
    predict_table,
    feedback_table,
    first_bad,
    layers,
    first,
    last,
    fresh,
    eta,
    schedule,
    momentum,
    loss_scale,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TOP_ACT: tl.constexpr,
    TOP_NEGATIVE_SLOPE: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_m = tl.program_id(0)  # its samples, in every product
    for iteration in range(first, last + 1):
        # active front (docs/method.md, fact 3): iteration t multiplies through t-1 layers, and one more has an
        # error whose prediction has not moved yet
        products = tl.where(fresh != 0, tl.minimum(iteration - 1, layers), layers)
        front = tl.where(fresh != 0, tl.where(iteration <= layers, 1, 0), 0)
        for index in range(products + front):
            problem = (
                predict_table + tl.where(index < products, index, layers + iteration - 1) * DESCRIPTOR_SIZE
            )
            _, num_pid_n = num_pid(problem, BLOCK_M, BLOCK_N)
            for pid_n in range(num_pid_n):
                predict_tile(
                    problem, pid_m, pid_n, state, operand, loss_scale, ACT, NEGATIVE_SLOPE, TOP_ACT,
                    TOP_NEGATIVE_SLOPE, LOSS, INPUT_PRECISION, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        tl.debug_barrier()  # errors and deltas are written before other threads of the program read them
        if schedule is None:
            step_size = eta
        else:
            step_size = tl.load(schedule + iteration - 1)
        moving = tl.where(fresh != 0, tl.minimum(iteration, layers), layers)
        for index in range(moving):
            problem = feedback_table + index * DESCRIPTOR_SIZE
            _, num_pid_n = num_pid(problem, BLOCK_M, BLOCK_N)
            for pid_n in range(num_pid_n):
                feedback_tile(
                    problem, pid_m, pid_n, state, operand, first_bad, iteration, step_size, momentum,
                    INPUT_PRECISION, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
        tl.debug_barrier()  # beliefs are written before the next iteration reads them


def launch_mlp_relaxation(
    state: Tensor,
    operand: Tensor,
    predict_table: Tensor,
    feedback_table: Tensor,
    first_bad: Tensor,
    *,
    layers: int,
    first: int,
    last: int,
    fresh: bool,
    eta: float | Tensor,
    momentum: float = 0.0,
    loss_scale: float,
    programs: int,
    gemm: Gemm,
    epilogue: Epilogue,
) -> None:
    """Launch on the current stream: iterations ``first`` to ``last``; ``programs`` = batch / BLOCK_M, rounded up.

    Args:
        eta: of all iterations, or a tensor of one for each from the first of all on.
    """
    eta, schedule = (None, eta) if isinstance(eta, Tensor) else (eta, None)
    launch(
        mlp_relaxation, (programs,),
        state, operand, predict_table, feedback_table, first_bad, layers, first, last, int(fresh), eta, schedule,
        momentum or None, loss_scale,
        **epilogue.constants(), **gemm.constants(), num_warps=gemm.tiles.warps, num_stages=gemm.tiles.stages,
        maxnreg=MAX_REGISTERS,
    )  # fmt: skip
