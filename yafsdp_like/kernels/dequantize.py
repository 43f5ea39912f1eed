"""Rows of a quantized matrix as numbers in memory, for products of so many rows that a library is faster by far.

Shapes: N rows of the matrix, K columns, R columns of a run, see `quantized_matrix.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.kernels.blocks import jit, launching_on, rounded, tl
from yafsdp_like.kernels.codes import SYMMETRIC_ZERO, numbers_of_eight_bits, numbers_of_four_bits

if TYPE_CHECKING:
    from torch import Tensor

    from yafsdp_like.kernels.quantized_matrix import QuantizedMatrix

_BLOCK_ROWS = 16
if tl is not None:
    _ZERO = tl.constexpr(SYMMETRIC_ZERO)


def dequantize(matrix: QuantizedMatrix, first: int, out: Tensor) -> None:
    """Write rows of a matrix into `out` on the current stream, rounded once, in the order of what multiplies columns.

    Args:
        matrix: `(N, K)`, on a device that kernels run on.
        first: the first of the rows.
        out: `(rows, K)`, contiguous.
    """
    num_columns = matrix.shape[1]
    columns = matrix.tile_columns
    with launching_on(out.device):
        _dequantize_kernel[(-(-len(out) // _BLOCK_ROWS), -(-num_columns // columns))](
            out,
            *matrix.tensors,
            first,
            first + len(out),
            NUM_COLS=num_columns,
            FORMAT=matrix.format,
            BLOCK_N=_BLOCK_ROWS,
            BLOCK_K=columns,
        )


@jit()
def _store_columns(
    rows: tl.tensor,  # (BLOCK_N,) pointers
    order: tl.tensor,  # (K,) int32
    k: tl.tensor,  # columns of a tile
    values: tl.tensor,  # (BLOCK_N, columns) float32
    mask: tl.tensor,
    NUM_COLS: tl.constexpr,
    ORDERED: tl.constexpr,
) -> None:
    if ORDERED:
        k = tl.load(order + k, mask=k < NUM_COLS, other=0)
    tl.store(rows[:, None] + k[None, :], rounded(values, rows.dtype.element_ty), mask=mask)


@jit("first", "end")
def _dequantize_kernel(
    out: tl.tensor,  # (end - first, K)
    codes: tl.tensor,  # (N, K) float8, or (N, K / 2) uint8
    scales: tl.tensor,  # (groups of rows, groups of columns)
    zeros: tl.tensor,  # as scales, uint8
    order: tl.tensor,  # (K,) int32
    first: tl.tensor,  # of N
    end: tl.tensor,
    NUM_COLS: tl.constexpr,  # K
    FORMAT: tl.constexpr,  # `QuantizedMatrix.format`
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    NUM_GROUPS: tl.constexpr = FORMAT[0]
    GROUP_ROWS: tl.constexpr = FORMAT[1]
    GROUP_COLS: tl.constexpr = FORMAT[2]
    BITS: tl.constexpr = FORMAT[3]
    HAS_ZEROS: tl.constexpr = FORMAT[4]
    ORDERED: tl.constexpr = FORMAT[5]
    RUN: tl.constexpr = BLOCK_K // 2
    DTYPE: tl.constexpr = out.dtype.element_ty
    n = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    known = n < end
    groups = n // GROUP_ROWS * NUM_GROUPS + start // GROUP_COLS
    scale = tl.load(scales + groups, mask=known, other=0.0).to(tl.float32)[:, None]
    places = out + (n - first).to(tl.int64) * NUM_COLS
    if BITS == 8:
        k = start + tl.arange(0, BLOCK_K)
        inside = known[:, None] & (k < NUM_COLS)[None, :]
        tile = tl.load(codes + n.to(tl.int64)[:, None] * NUM_COLS + k[None, :], mask=inside, other=0.0)
        values = numbers_of_eight_bits(tile, tl.float32) * scale
        _store_columns(places, order, k, values, inside, NUM_COLS, ORDERED)
    else:
        k = start + tl.arange(0, RUN)
        inside = known[:, None] & (k < NUM_COLS)[None, :]
        pointers = codes + n.to(tl.int64)[:, None] * (NUM_COLS // 2) + (start // 2 + tl.arange(0, RUN))[None, :]
        zero = tl.full((BLOCK_N,), _ZERO, tl.uint8)
        if HAS_ZEROS:
            zero = tl.load(zeros + groups, mask=known, other=0)
        low, high = numbers_of_four_bits(tl.load(pointers, mask=inside, other=0), zero[:, None], DTYPE)
        _store_columns(places, order, k, low.to(tl.float32) * scale, inside, NUM_COLS, ORDERED)
        _store_columns(places, order, k + RUN, high.to(tl.float32) * scale, inside, NUM_COLS, ORDERED)
