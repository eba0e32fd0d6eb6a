"""Triton's grouped GEMM plus persistent matmul: the scheduler, the main loop and the subtiles of the epilogue.

All problems of a launch (linear_problems.py) are cut into tiles of BLOCK_M x BLOCK_N, numbered one problem after
another. Programs are persistent: program p of P computes tiles p, p + P, p + 2 P and so on, whatever problem they
belong to. What follows a product, the epilogue, belongs to the kernel that calls.

    table:   problem 0            problem 1      problem 2
    tiles:   0  1  2  3  4  5  |  6  7  8  9  |  10 ...         number i belongs to program i % P

    A (M, K)  --tiles of BLOCK_M x BLOCK_K-->  +----------------------------+
                                               | accumulator, fp32          | --epilogue, subtile by subtile-->
    B (K, N)  --tiles of BLOCK_K x BLOCK_N-->  | BLOCK_M x BLOCK_N          |
                                               +----------------------------+

No tile is split along K, so the order of sums depends on BLOCK_K alone and a sample's result does not depend on its
batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .limits import LOSS_COLUMNS, ROW_MULTIPLE
from .linear_problems import DESCRIPTOR_SIZE, GEMM
from .tiles import Tiles

# So many rows of tiles are computed together: their operands stay in L2 in between.
GROUP_SIZE_M = tl.constexpr(8)
# Elements of a subtile of the epilogue: 16 a thread of 8 warps.
EPILOGUE_SUBTILE = tl.constexpr(64 * LOSS_COLUMNS)
# Descriptors name matrices by multiples of so many elements.
MATRIX_MULTIPLE = tl.constexpr(ROW_MULTIPLE)
# A program has an SM to itself. Left alone, ptxas makes room for two, and spills.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Gemm:
    """How a launch multiplies.

    Attributes:
        tiles: how products are cut.
        precision: what operands are: "tf32x3" (float32, as three TF32 products), "tf32" or "bf16".
        aligned: all leading dimensions are multiples of 16.
    """

    tiles: Tiles
    precision: str
    aligned: bool

    def constants(self) -> dict:
        """The kernel's constexpr arguments that say so."""
        # bf16 operands have one way to be multiplied
        input_precision = "ieee" if self.precision == "bf16" else self.precision
        return dict(
            **self.tiles.constants(), INPUT_PRECISION=input_precision, ALIGNED=16 if self.aligned else 1
        )


@triton.jit
def _compute_pid(tile_id, num_pid_m, num_pid_n):
    """pid_m, pid_n of a tile, in an order in which neighbours share operands."""
    num_pid_in_group = GROUP_SIZE_M * num_pid_n
    group_id = tile_id // num_pid_in_group
    first_pid_m = group_id * GROUP_SIZE_M
    group_size_m = tl.minimum(num_pid_m - first_pid_m, GROUP_SIZE_M)
    pid_in_group = tile_id % num_pid_in_group
    return first_pid_m + pid_in_group % group_size_m, pid_in_group // group_size_m


@triton.jit
def num_pid(problem, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """num_pid_m, num_pid_n of a problem."""
    num_pid_m = tl.cdiv(tl.load(problem + GEMM.M).to(tl.int32), BLOCK_M)
    num_pid_n = tl.cdiv(tl.load(problem + GEMM.N).to(tl.int32), BLOCK_N)
    return num_pid_m, num_pid_n


@triton.jit
def grouped_gemm(
    table,
    count,
    last,
    tile: tl.constexpr,
    arguments,
    constants,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All tiles of this program, in the first ``count`` problems of the table and then in problem ``last``.

    last: negative for none. tile: ``tile(problem, pid_m, pid_n, *arguments, *constants, BLOCK_M, BLOCK_N, BLOCK_K)``.
    """
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    tiles_before = 0  # in the problems before
    for index in range(count + tl.where(last >= 0, 1, 0)):
        problem = table + tl.where(index < count, index, last) * DESCRIPTOR_SIZE
        num_pid_m, num_pid_n = num_pid(problem, BLOCK_M, BLOCK_N)
        num_tiles = num_pid_m * num_pid_n
        # the first tile of this problem whose number in the launch is pid modulo num_programs
        tile_id = (pid + num_programs - tiles_before % num_programs) % num_programs
        while tile_id < num_tiles:
            pid_m, pid_n = _compute_pid(tile_id, num_pid_m, num_pid_n)
            tile(problem, pid_m, pid_n, *arguments, *constants, BLOCK_M, BLOCK_N, BLOCK_K)
            tile_id += num_programs
        tiles_before += num_tiles


@triton.jit
def accumulate(
    operand,
    problem,
    start_m,
    start_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    MULTIPLE: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
):
    """The main loop: the tile of A B whose first element is (start_m, start_n).

    MULTIPLE: of k, lda and ldb. B_TRANSPOSED: B^T (N, K) lies in memory instead of B (K, N).
    """
    M = tl.load(problem + GEMM.M).to(tl.int32)
    K = tl.multiple_of(tl.load(problem + GEMM.K).to(tl.int32), MULTIPLE)
    a = operand + tl.multiple_of(tl.load(problem + GEMM.A), MATRIX_MULTIPLE)
    lda = tl.multiple_of(tl.load(problem + GEMM.LDA), MULTIPLE)
    b = operand + tl.multiple_of(tl.load(problem + GEMM.B), MATRIX_MULTIPLE)
    ldb = tl.multiple_of(tl.load(problem + GEMM.LDB), MULTIPLE)

    # Offsets inside a tile fit into 32 bits and cost half the registers; only the tile's base needs 64. Columns run
    # over the padding, which holds zeros and stays zero: a bound that is a multiple of 16 lets whole vectors through.
    a += lda * start_m
    lda_32, ldb_32 = lda.to(tl.int32), ldb.to(tl.int32)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m = offs_m < M - start_m
    if B_TRANSPOSED:
        b += ldb * start_n
        mask_n = offs_n < tl.load(problem + GEMM.LDC).to(tl.int32) - start_n
    else:
        mask_n = offs_n < ldb_32 - start_n
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        if B_TRANSPOSED:  # rows of both run along K: so do the offsets
            offs_k = start_k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            a_ptrs = a + (offs_m[:, None] * lda_32 + offs_k[None, :])
            b_ptrs = b + (offs_n[None, :] * ldb_32 + offs_k[:, None])
        else:  # B moves on by whole rows, 64 bits: the bases move
            offs_k = tl.arange(0, BLOCK_K)
            mask_k = offs_k < K - start_k
            a_ptrs = a + start_k + (offs_m[:, None] * lda_32 + offs_k[None, :])
            b_ptrs = b + (ldb * start_k + start_n) + (offs_k[:, None] * ldb_32 + offs_n[None, :])
        a_tile = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_tile = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        accumulator = tl.dot(a_tile, b_tile, accumulator, input_precision=INPUT_PRECISION)
    return accumulator


@triton.jit
def epilogue_in_subtiles(
    accumulator,
    start_m,
    start_n,
    epilogue: tl.constexpr,
    arguments,
    constants,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``epilogue(subtile, start_m, start_n, *arguments, *constants, BLOCK_M, BLOCK_N)``, one subtile after another.

    A tile of more than EPILOGUE_SUBTILE elements would not leave the registers that its epilogue needs.
    """
    if BLOCK_M * BLOCK_N > EPILOGUE_SUBTILE:
        HALF_N: tl.constexpr = BLOCK_N // 2
        halves = tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, HALF_N)), (0, 2, 1))
        left, right = tl.split(halves)  # [BLOCK_M, HALF_N] each
        epilogue_in_subtiles(left, start_m, start_n, epilogue, arguments, constants, BLOCK_M, HALF_N)
        epilogue_in_subtiles(
            right, start_m, start_n + HALF_N, epilogue, arguments, constants, BLOCK_M, HALF_N
        )
    else:
        epilogue(accumulator, start_m, start_n, *arguments, *constants, BLOCK_M, BLOCK_N)
