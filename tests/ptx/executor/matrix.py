"""Matrix instructions of a warp: fragments in registers, mma.sync, ldmatrix and stmatrix.

Where each element lies: PTX ISA, "Matrix Fragments for mma" of m16n8k8 (tf32) and m16n8k16 (bf16).
"""

from __future__ import annotations

import numpy as np

from .numbers import from_bf16

__all__ = ["GROUP", "PAIR", "a_fragment", "load_matrices", "mma", "store_matrices", "tf32_of"]

f4, f8, u4 = np.float32, np.float64, np.uint32
_LANE = np.arange(32)
#: Of each lane: its group, a row of a fragment, and its place in the group, which picks columns.
GROUP, PAIR = _LANE // 4, _LANE % 4


def tf32_of(bits):
    """What a Tensor Core reads of a float32: the 13 lowest bits do not count."""
    return (bits & u4(0xFFFFE000)).view(f4)


def _halves(bits):
    """(..., 2) of a register's two bfloat16, the lower first."""
    return np.stack([from_bf16(bits & u4(0xFFFF)), from_bf16(bits >> u4(16))], -1)


def a_fragment(registers, kind: str, depth: int):
    """Registers of warps -> A (warps, 16, depth)."""
    warps = registers[0].shape[0] // 32
    a = np.zeros((warps, 16, depth), f4)
    for j, register in enumerate(registers):
        bits, rows = register.reshape(warps, 32), GROUP + 8 * (j % 2)
        if kind == "tf32":
            a[:, rows, PAIR + 4 * (j // 2)] = tf32_of(bits)
        else:
            pair = _halves(bits)
            a[:, rows, 2 * PAIR + 8 * (j // 2)] = pair[..., 0]
            a[:, rows, 2 * PAIR + 8 * (j // 2) + 1] = pair[..., 1]
    return a


def _b_fragment(registers, kind: str, depth: int):
    """-> B (warps, depth, 8)."""
    warps = registers[0].shape[0] // 32
    b = np.zeros((warps, depth, 8), f4)
    for j, register in enumerate(registers):
        bits = register.reshape(warps, 32)
        if kind == "tf32":
            b[:, PAIR + 4 * j, GROUP] = tf32_of(bits)
        else:
            pair = _halves(bits)
            b[:, 2 * PAIR + 8 * j, GROUP] = pair[..., 0]
            b[:, 2 * PAIR + 8 * j + 1, GROUP] = pair[..., 1]
    return b


def mma(shape: str, kind: str, a, b, c) -> list[np.ndarray]:
    """mma.sync: a b + c, summed exactly and rounded once."""
    depth = int(shape.split("k")[1])
    product = np.matmul(a_fragment(a, kind, depth).astype(f8), _b_fragment(b, kind, depth).astype(f8))
    parts = [product[:, GROUP + 8 * (j // 2), 2 * PAIR + j % 2].reshape(-1) for j in range(4)]
    return [(part + added).astype(f4) for part, added in zip(parts, c, strict=True)]


def _addressing(warps: int, count: int):
    """Which lanes give the addresses of rows; None for all."""
    return np.tile(8 * count > _LANE, warps) if count < 4 else None


def load_matrices(M, address, count: int, transposed: bool, I, line: int) -> list[np.ndarray]:
    """ldmatrix: ``count`` matrices of 8 x 8 numbers of 16 bits, a row at each lane's address."""
    warps = address.shape[0] // 32
    words = M.shared.load(M, address, 4, 4, _addressing(warps, count), I, line)
    rows = np.stack(words, 1).reshape(warps, 4, 8, 4)[:, :count]  # warp, matrix, row, word
    if not transposed:
        return [np.ascontiguousarray(rows[:, j][:, GROUP, PAIR]).reshape(-1) for j in range(count)]
    numbers = np.ascontiguousarray(rows).view(np.uint16)  # warp, matrix, row, column
    result = []
    for j in range(count):
        low, high = numbers[:, j][:, 2 * PAIR, GROUP], numbers[:, j][:, 2 * PAIR + 1, GROUP]
        result.append((low.astype(u4) | (high.astype(u4) << u4(16))).reshape(-1))
    return result


def store_matrices(M, address, values, transposed: bool, I, line: int) -> None:
    """stmatrix: the reverse of :func:`load_matrices`."""
    warps, count = address.shape[0] // 32, len(values)
    numbers = np.zeros((warps, 4, 8, 8), np.uint16)
    for j, value in enumerate(values):
        bits = value.reshape(warps, 32)
        low, high = (bits & u4(0xFFFF)).astype(np.uint16), (bits >> u4(16)).astype(np.uint16)
        if transposed:
            numbers[:, j, 2 * PAIR, GROUP], numbers[:, j, 2 * PAIR + 1, GROUP] = low, high
        else:
            numbers[:, j, GROUP, 2 * PAIR], numbers[:, j, GROUP, 2 * PAIR + 1] = low, high
    words = numbers.reshape(warps * 32, 8).view(u4)
    columns = tuple(np.ascontiguousarray(words[:, k]) for k in range(4))
    M.shared.store(M, address, 4, columns, _addressing(warps, count), I, line)
