"""Predict stage of linear layers: errors and deltas of many layers in one launch, as a grouped GEMM.

    s = d_{l-1} W_l^T                                            deviation of the pre-activation
    eps_l = [act(uhat_l + s) - act(uhat_l)] - d_l                the difference without cancellation
    delta_l = eps_l * act'(uhat_l + s)                           what the feedback stage multiplies

and at the top eps_L = dLoss/dmu_L at mu_L = vhat_L + act_diff. Strict predictive coding in deviation form: Rosenbaum,
PLOS ONE 17(3) e0266102 (2022); docs/method.md: active front (fact 3), two stages (fact 5), Gram form (fact 7) and
deviation form (fact 8).

    d_{l-1} (M, K)   --tiles of BLOCK_M x BLOCK_K-->  +--------------------+
                                                      | accumulator, fp32  | --epilogue--> error, delta
    W_l^T (K, N)     --tiles of BLOCK_K x BLOCK_N-->  | BLOCK_M x BLOCK_N  |     ^
                                                      +--------------------+     uhat, d (one read each)

Arguments of the kernel:

    state       arena, fp32                 uhat, d, s, vhat, target, target_sum read; error and s written
    operand     arena, fp32 or bf16         d_{l-1} and W read, both rounded where products are TF32; delta written so
    table       (problems, DESCRIPTOR_SIZE) int64: linear_problems.PredictProblem, highest layer first
    products    int32                       the first so many problems take part ...
    front       int32                       ... and this one, unless it is negative: active front (fact 3)
    loss_scale  fp32                        factor of (mu - y) for mean squared error

Scheduler and main loop are grouped_gemm.py's: a sample's result does not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pcfast.model.activations import Activation

from .activations import IDENTITY, act_diff_and_derivative
from .codes import LOSSES, activation_code
from .grouped_gemm import (
    EPILOGUE_SUBTILE,
    MATRIX_MULTIPLE,
    MAX_REGISTERS,
    Gemm,
    accumulate,
    epilogue_in_subtiles,
    grouped_gemm,
)
from .launching import launch
from .linear_problems import PREDICT, PRODUCT, TOP
from .output_error import output_error_tile
from .tf32 import store_operand

#: Constants of a launch without a problem of kind TOP.
NO_TOP = dict(TOP_ACT=IDENTITY.value, TOP_NEGATIVE_SLOPE=0.0, LOSS=-1)


@dataclass(frozen=True)
class Epilogue:
    """What follows the products of a launch; None is the identity, or no loss.

    Attributes:
        activation: of the hidden layers.
        top_activation, loss: of the output layer, where the launch evaluates the loss: "cross_entropy" or "mse".
    """

    activation: Activation | None
    top_activation: Activation | None = None
    loss: str | None = None

    def constants(self) -> dict:
        """The kernel's constexpr arguments that say so."""
        act, negative_slope = activation_code(self.activation)
        top = NO_TOP
        if self.loss is not None:
            top_act, top_negative_slope = activation_code(self.top_activation)
            top = dict(TOP_ACT=top_act, TOP_NEGATIVE_SLOPE=top_negative_slope, LOSS=LOSSES[self.loss])
        return dict(ACT=act, NEGATIVE_SLOPE=negative_slope, **top)


@triton.jit
def _epilogue(
    accumulator,
    start_m,
    start_n,
    state,
    operand,
    problem,
    loss_scale,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TOP_ACT: tl.constexpr,
    TOP_NEGATIVE_SLOPE: tl.constexpr,
    LOSS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """From s to error and delta, for a tile whose first element is (start_m, start_n)."""
    kind = tl.load(problem + PREDICT.KIND)
    M = tl.load(problem + PREDICT.M).to(tl.int32)
    ldc = tl.multiple_of(tl.load(problem + PREDICT.LDC), ALIGNED)
    base = ldc * start_m + start_n
    uhat = state + tl.multiple_of(tl.load(problem + PREDICT.UHAT), MATRIX_MULTIPLE) + base
    error = state + tl.multiple_of(tl.load(problem + PREDICT.ERROR), MATRIX_MULTIPLE) + base
    delta = operand + tl.multiple_of(tl.load(problem + PREDICT.DELTA), MATRIX_MULTIPLE) + base
    s = state + tl.multiple_of(tl.load(problem + PREDICT.S), MATRIX_MULTIPLE) + base
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offs = offs_m[:, None] * ldc.to(tl.int32) + offs_n[None, :]
    mask_m = offs_m < M - start_m
    # over the padding up to ldc, where everything is zero and stays zero
    mask = mask_m[:, None] & (offs_n < ldc.to(tl.int32) - start_n)[None, :]
    if tl.load(problem + PREDICT.S_GIVEN) != 0:
        accumulator = tl.load(s + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
    if kind == PRODUCT:
        tl.store(s + offs, accumulator, mask=mask)
    else:
        u = tl.load(uhat + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        if LOSS >= 0 and kind == TOP:
            vhat = state + tl.multiple_of(tl.load(problem + PREDICT.VHAT), MATRIX_MULTIPLE) + base
            target = state + tl.multiple_of(tl.load(problem + PREDICT.TARGET), MATRIX_MULTIPLE) + base
            target_sum = (
                state + tl.multiple_of(tl.load(problem + PREDICT.TARGET_SUM), MATRIX_MULTIPLE) + start_m
            )
            act_diff, derivative = act_diff_and_derivative(u, accumulator, TOP_ACT, TOP_NEGATIVE_SLOPE)
            mu = tl.load(vhat + offs, mask=mask, other=0.0) + act_diff  # [BLOCK_M, BLOCK_N]
            y = tl.load(target + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
            y_sum = tl.load(target_sum + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
            # the softmax runs over the classes alone, not over the padding
            mask_n = offs_n < tl.load(problem + PREDICT.N).to(tl.int32) - start_n
            eps = output_error_tile(mu, y, y_sum[:, None], loss_scale, mask_n[None, :], LOSS)
            tl.store(error + offs, eps, mask=mask)
            store_operand(delta + offs, eps * derivative, mask, INPUT_PRECISION)
        else:
            d = state + tl.multiple_of(tl.load(problem + PREDICT.D), MATRIX_MULTIPLE) + base
            act_diff, derivative = act_diff_and_derivative(u, accumulator, ACT, NEGATIVE_SLOPE)
            eps = act_diff - tl.load(d + offs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
            tl.store(error + offs, eps, mask=mask)
            store_operand(delta + offs, eps * derivative, mask, INPUT_PRECISION)


@triton.jit
def predict_tile(
    problem,
    pid_m,
    pid_n,
    state,
    operand,
    loss_scale,
    ACT: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    TOP_ACT: tl.constexpr,
    TOP_NEGATIVE_SLOPE: tl.constexpr,
    LOSS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one problem. LOSS is -1 where no problem is of kind TOP."""
    tl.static_assert(
        LOSS < 0 or BLOCK_M * BLOCK_N <= EPILOGUE_SUBTILE,
        "the loss needs whole rows of the output in one subtile",
    )
    start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    accumulator = accumulate(
        operand, problem, start_m, start_n, BLOCK_M, BLOCK_N, BLOCK_K, INPUT_PRECISION,
        MULTIPLE=ALIGNED, B_TRANSPOSED=True,
    )  # fmt: skip
    epilogue_in_subtiles(
        accumulator,
        start_m,
        start_n,
        _epilogue,
        (state, operand, problem, loss_scale),
        (ACT, NEGATIVE_SLOPE, TOP_ACT, TOP_NEGATIVE_SLOPE, LOSS, INPUT_PRECISION, ALIGNED),
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=["products", "front"])
def linear_predict(
    state,
    operand,
    table,
    products,
    front,
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
    grouped_gemm(
        table,
        products,
        front,
        predict_tile,
        (state, operand, loss_scale),
        (ACT, NEGATIVE_SLOPE, TOP_ACT, TOP_NEGATIVE_SLOPE, LOSS, INPUT_PRECISION, ALIGNED),
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


def launch_linear_predict(
    state: Tensor,
    operand: Tensor,
    table: Tensor,
    *,
    products: int,
    front: int,
    loss_scale: float,
    programs: int,
    gemm: Gemm,
    epilogue: Epilogue,
) -> None:
    """Launch on the current stream.

    Args:
        products, front: which problems of ``table`` take part: the first ``products``, and ``front`` unless negative.
        programs: size of the grid.
    """
    launch(
        linear_predict,
        (programs,),
        state,
        operand,
        table,
        products,
        front,
        loss_scale,
        **epilogue.constants(),
        **gemm.constants(),
        num_warps=gemm.tiles.warps,
        num_stages=gemm.tiles.stages,
        maxnreg=MAX_REGISTERS,
    )
