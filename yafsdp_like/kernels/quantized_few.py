"""The product of a few rows with a quantized matrix: a program's warps each sum columns of their own.

What takes time is reading codes, and waiting for them where programs are few. So programs are as many as rows of the
matrix allow, 16 for each, and K is cut among the warps of a program, which add up their sums at its end: there is
nothing between programs, and one launch. A product of 3 dimensions does this: each warp computes one of the first.

Shapes: T rows, K columns of them, N rows of the matrix, W slices of K, which lie between each other tile by tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.kernels.blocks import dot, jit, rounded, tl
from yafsdp_like.kernels.codes import SYMMETRIC_ZERO, numbers_of_eight_bits, numbers_of_four_bits

if TYPE_CHECKING:
    from torch import Tensor

    from yafsdp_like.kernels.quantized_matrix import QuantizedMatrix

MAX_ROWS = 16  # above which reading rows, for each program anew, takes longer than reading codes
_SLICES = 4  # warps
if tl is not None:
    _ZERO = tl.constexpr(SYMMETRIC_ZERO)


def launch(rows: Tensor, matrix: QuantizedMatrix, out: Tensor) -> None:
    """Write the product of up to `MAX_ROWS` rows as `multiply_quantized` does, with blocks measured on an H200."""
    num_rows, num_columns = matrix.shape
    block_n, columns = 16 if num_rows <= 8192 else 32, matrix.tile_columns
    _few_rows_kernel[(-(-num_rows // block_n),)](
        out,
        rows,
        *matrix.tensors,
        len(rows),
        num_rows,
        rows.stride(0),
        out.stride(0),
        NUM_COLS=num_columns,
        FORMAT=matrix.format,
        WHOLE=num_rows % block_n == 0 and num_columns % (_SLICES * columns) == 0,
        SLICES=_SLICES,
        BLOCK_T=8 if len(rows) <= 8 else 16,
        BLOCK_N=block_n,
        BLOCK_K=columns,
        num_warps=_SLICES,
        num_stages=4 if len(rows) <= 8 else 3,
        enable_fp_fusion=True,
    )


@jit()
def _columns_of(
    rows: tl.tensor,  # pointers, (BLOCK_T,)
    inside: tl.tensor,  # (BLOCK_T,)
    order: tl.tensor,  # (K,)
    k: tl.tensor,  # (W, columns)
    NUM_COLS: tl.constexpr,
    ORDERED: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Columns ``k`` of rows, one below the other: (W, columns, BLOCK_T)."""
    mask = inside[None, None, :]
    if not WHOLE:
        mask = mask & (k < NUM_COLS)[:, :, None]
    if ORDERED:
        k = tl.load(order + k, mask=k < NUM_COLS, other=0)
    return tl.load(rows[None, None, :] + k[:, :, None], mask=mask, other=0.0)


@jit("num_tokens", "num_rows")
def _few_rows_kernel(
    out: tl.tensor,  # (T, N)
    rows: tl.tensor,  # (T, K)
    codes: tl.tensor,  # (N, K) float8, or (N, K / 2) uint8
    scales: tl.tensor,  # (groups of rows, groups of columns)
    zeros: tl.tensor,  # as scales, uint8
    order: tl.tensor,  # (K,) int32
    num_tokens: tl.tensor,  # T
    num_rows: tl.tensor,  # N
    rows_row: tl.tensor,  # strides
    out_row: tl.tensor,
    NUM_COLS: tl.constexpr,  # K
    FORMAT: tl.constexpr,  # `QuantizedMatrix.format`: groups of a row, their rows and columns, bits, zeros, order
    WHOLE: tl.constexpr,  # whether tiles of all slices end where the matrix does
    SLICES: tl.constexpr,  # W
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    NUM_GROUPS: tl.constexpr = FORMAT[0]
    BITS: tl.constexpr = FORMAT[3]
    ORDERED: tl.constexpr = FORMAT[5]
    RUN: tl.constexpr = BLOCK_K // 2
    DTYPE: tl.constexpr = rows.dtype.element_ty
    t, n = tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known, inside = n < num_rows, t < num_tokens
    groups = n // FORMAT[1] * NUM_GROUPS
    x_rows = rows + t.to(tl.int64) * rows_row
    n_codes = (codes + n.to(tl.int64) * (NUM_COLS * BITS // 8))[None, :, None]
    sums = tl.zeros((SLICES, BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, NUM_COLS, SLICES * BLOCK_K):
        first = start + tl.arange(0, SLICES) * BLOCK_K  # (W,)
        there = known[None, :] & (first < NUM_COLS)[:, None]  # (W, BLOCK_N)
        places = groups[None, :] + (first // FORMAT[2])[:, None]
        if BITS == 8:
            k = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
            pointers = n_codes + k[:, None, :]
            mask = known[None, :, None] & (k < NUM_COLS)[:, None, :]
            tile = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)
            x = _columns_of(x_rows, inside, order, k, NUM_COLS, ORDERED, WHOLE)
            part = dot(numbers_of_eight_bits(tile, DTYPE), x)
        else:
            j = tl.arange(0, RUN)[None, :]
            pointers = n_codes + ((first // 2)[:, None] + j)[:, None, :]
            tile = tl.load(pointers) if WHOLE else tl.load(pointers, mask=there[:, :, None], other=0)
            zero = tl.full((SLICES, BLOCK_N), _ZERO, tl.uint8)
            if FORMAT[4]:
                zero = tl.load(zeros + places, mask=there, other=0)
            low, high = numbers_of_four_bits(tile, zero[:, :, None], DTYPE)
            k = first[:, None] + j
            part = dot(low, _columns_of(x_rows, inside, order, k, NUM_COLS, ORDERED, WHOLE))
            part += dot(high, _columns_of(x_rows, inside, order, k + RUN, NUM_COLS, ORDERED, WHOLE))
        if NUM_GROUPS > 1:
            part *= tl.load(scales + places, mask=there, other=0.0).to(tl.float32)[:, :, None]
        sums += part
    total = tl.sum(sums, 0)
    if NUM_GROUPS == 1:
        total *= tl.load(scales + groups, mask=known, other=0.0).to(tl.float32)[:, None]
    pointers = out + t.to(tl.int64)[None, :] * out_row + n[:, None]
    tl.store(pointers, rounded(total, out.dtype.element_ty), mask=known[:, None] & inside[None, :])
