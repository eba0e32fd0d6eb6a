"""Problem descriptors of the grouped GEMMs: how the linear kernels learn which products belong to a launch.

A launch works on many layers at once, each a problem of its own, as in Triton's grouped GEMM. Their descriptors lie
in a table in device memory, ``DESCRIPTOR_SIZE`` int64 numbers each, in the order of the fields below. Matrices lie in
two arenas, ``state`` (fp32) and ``operand`` (what Tensor Cores read; the same memory as ``state`` where products read
fp32), and a descriptor names them by their first element's index in the arena: nothing in a table depends on an
address, so it can be cached and uploaded before a CUDA graph is recorded.

Every matrix is row-major with a stride between rows of its own, and zeros between its columns and that stride, so
that products may run over the padding.

Kernels read a field as ``tl.load(problem + PREDICT.UHAT)``.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, fields

import triton.language as tl

DESCRIPTOR_SIZE = tl.constexpr(20)

# what the epilogue of a predict problem does
HIDDEN = tl.constexpr(0)  # error and delta of a hidden layer
TOP = tl.constexpr(1)  # error and delta at the output, from the loss
PRODUCT = tl.constexpr(2)  # s is stored, nothing else

# what the epilogue of a feedback problem does
UPDATE = tl.constexpr(0)  # d += eta (error - r)
CLAMPED = tl.constexpr(1)  # layer 1, whose prediction is constant: error = -d, d += eta (error - r)
GRAM_UPDATE = tl.constexpr(2)  # Gram form (fact 7): s and its running sum instead of layer 1's beliefs


@dataclass(frozen=True)
class Problem:
    """One product C = A B of a launch; what main loop and scheduler read.

    Attributes:
        kind: what the epilogue does.
        m, n: rows and columns of C; m is the batch.
        k: terms of a sum, padding included.
        a, lda: A (m, k), operand, and its stride between rows.
        b, ldb: the weight, operand, and its stride between rows.
        ldc: stride between rows of all (m, n) matrices of the epilogue.
    """

    kind: int
    m: int
    n: int
    k: int
    a: int
    lda: int
    b: int
    ldb: int
    ldc: int


@dataclass(frozen=True)
class PredictProblem(Problem):
    """One layer f_l of a predict launch: s = d W^T, then its epilogue.

    A is d of the layer below; k is 0 where it is still zero, or s is given. B^T is W (n, k).

    Attributes:
        kind: HIDDEN, TOP or PRODUCT.
        uhat, d, error, delta, s: (m, n); delta is an operand, the others are state.
        vhat, target, target_sum: of TOP: output of the forward pass, target (m, n), its row sums (m).
        s_given: 1 where s is state and is read instead of multiplied, in Gram form (fact 7), else 0.
    """

    uhat: int
    d: int
    error: int
    delta: int
    s: int
    vhat: int
    target: int
    target_sum: int
    s_given: int


@dataclass(frozen=True)
class FeedbackProblem(Problem):
    """One coupling of a feedback launch: r = delta W through layer f_{l+1}, then the update of v_l.

    A is delta, B is W (k, n), or the Gram matrix for GRAM_UPDATE.

    Attributes:
        kind: UPDATE, CLAMPED or GRAM_UPDATE.
        d, error: (m, n) state; d_operand: copy of d for products.
        s, sum: of GRAM_UPDATE, (m, n) state.
        layer: index l of the belief, for reports of divergence.
        velocity, sum_velocity: with momentum, of d, or of s and sum, (m, n) state.
    """

    d: int
    d_operand: int
    error: int
    s: int
    sum: int
    layer: int
    velocity: int
    sum_velocity: int


class FieldOffsets(tl.constexpr):
    """Where each field of a descriptor stands, by its name in capitals; a constant of compiled kernels.

    The compiler looks names up in ``value``, the interpreter on this object. Triton's cache key holds ``value``, so
    kernels are compiled anew where fields move.
    """

    def __init__(self, problem: type[Problem]) -> None:
        names = [field.name.upper() for field in fields(problem)]
        super().__init__(namedtuple(f"{problem.__name__}Offsets", names)(*range(len(names))))
        vars(self).update(self.value._asdict())


GEMM = FieldOffsets(Problem)
PREDICT = FieldOffsets(PredictProblem)
FEEDBACK = FieldOffsets(FeedbackProblem)


def as_numbers(problem: PredictProblem | FeedbackProblem) -> list[int]:
    """The descriptor as the kernels read it."""
    numbers = [int(getattr(problem, field.name)) for field in fields(problem)]
    return numbers + [0] * (DESCRIPTOR_SIZE.value - len(numbers))
