"""Products with matrices of 8 or 4 bits an element, which are multiplied as they are stored, but for many rows.

Owns how many rows are multiplied in which way, and the kernel for more rows than a few: programs turn tiles of codes
into numbers in registers. A code is exact in bfloat16, and sums are scaled in float32, so that a product is rounded
once. For many rows the matrix is written as values first, since a library multiplies them faster by far. Stacks of
matrices are multiplied in `experts.py`, by the same ``product`` of tiles.

Shapes: T rows, K columns of them, N rows of the matrix, R columns of a run, see `quantized_matrix.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from yafsdp_like.kernels import quantized_few
from yafsdp_like.kernels.blocks import dot, jit, launching_on, rounded, runs_on, tl
from yafsdp_like.kernels.codes import SYMMETRIC_ZERO, numbers_of_eight_bits, numbers_of_four_bits
from yafsdp_like.kernels.dequantize import dequantize
from yafsdp_like.kernels.quantized_matrix import MAX_COLUMNS, QuantizedMatrix

_MATRIX_ROWS = 64  # of a tile
_MAX_DIRECT_ROWS = 128  # of which more are multiplied with a matrix that is dequantized before
_MAX_NUMEL = 1 << 25  # of what is dequantized at once
if tl is not None:
    _ZERO = tl.constexpr(SYMMETRIC_ZERO)


def workspace_nbytes(num_rows: int, shape: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes that `multiply_quantized` needs for up to T rows of so many bytes an element, and (N, K)."""
    num_matrix_rows, num_columns = shape
    nbytes = 0
    for count in (min(num_rows, 32), min(num_rows, _MAX_DIRECT_ROWS)):
        num_pieces = _num_pieces(count, shape)
        if num_pieces > 1:
            nbytes = max(nbytes, num_pieces * count * num_matrix_rows * torch.float32.itemsize)
    if num_rows > _MAX_DIRECT_ROWS:
        nbytes = max(nbytes, _rows_at_once(num_matrix_rows, num_columns) * num_columns * itemsize)
    return nbytes


def multiply_quantized(rows: Tensor, matrix: QuantizedMatrix, out: Tensor, workspace: Tensor) -> None:
    """Write `rows @ matrix.T` into `out` on the current stream, summed in float32 and rounded once.

    Where kernels run, more than 128 rows are multiplied with values of the matrix that are rounded to their dtype.

    Args:
        rows: `(T, K)`, dense in the last dim.
        matrix: `(N, K)`.
        out: `(T, N)` of the dtype of rows, dense in the last dim.
        workspace: flat uint8, `workspace_nbytes` or more; overwritten.

    Raises `RuntimeError` for shapes that do not fit, and a workspace that is too small.
    """
    if rows.shape[1:] != matrix.shape[1:] or out.shape != (len(rows), len(matrix)):
        raise RuntimeError(
            f"rows {tuple(rows.shape)} and a matrix {matrix.shape} cannot be multiplied into {tuple(out.shape)}"
        )
    needed = workspace_nbytes(len(rows), matrix.shape, rows.itemsize)
    if len(workspace) < needed:
        raise RuntimeError(f"expected a workspace of {needed} bytes, found {len(workspace)}")
    if not len(rows):
        return
    if not runs_on(rows.device):
        out.copy_(rows.float() @ matrix.dequantized().T)
    elif len(rows) > _MAX_DIRECT_ROWS:
        _multiply_dequantized(rows, matrix, out, workspace)
    else:
        with launching_on(rows.device):
            if len(rows) <= quantized_few.MAX_ROWS:
                quantized_few.launch(rows, matrix, out)
            else:
                _launch(rows, matrix, out, workspace)


def _rows_at_once(num_rows: int, num_columns: int) -> int:
    """Return how many rows of a matrix are dequantized before they are multiplied: so many stay in a GPU's cache."""
    return min(num_rows, 4096, 1 << max(7, (_MAX_NUMEL // num_columns).bit_length() - 1))


def _multiply_dequantized(rows: Tensor, matrix: QuantizedMatrix, out: Tensor, workspace: Tensor) -> None:
    num_rows, num_columns = matrix.shape
    at_once = _rows_at_once(num_rows, num_columns)
    values = workspace[: at_once * num_columns * rows.itemsize].view(rows.dtype).view(at_once, num_columns)
    for first in range(0, num_rows, at_once):
        weight = values[: num_rows - first]
        dequantize(matrix, first, weight)
        torch.mm(rows, weight.t(), out=out[:, first : first + at_once])


class Blocks(NamedTuple):
    """What one program computes, of how many pieces of K; see ``_product_kernel``."""

    rows: int  # of T
    num_pieces: int
    num_stages: int


def blocks_for(num_rows: int, matrix: QuantizedMatrix) -> Blocks:
    """Return the blocks of a product of more than a few rows, as measured on an H200."""
    num_pieces = _num_pieces(num_rows, matrix.shape)
    if num_rows <= 32:
        return Blocks(32, num_pieces, 4)
    return Blocks(64 if num_rows <= 64 else 128, num_pieces, 3)


def _num_pieces(num_rows: int, shape: tuple[int, ...]) -> int:
    """Return into how many pieces K is cut, so that there are programs enough where the matrix has few rows."""
    if num_rows <= quantized_few.MAX_ROWS:
        return 1
    num_matrix_rows, num_columns = shape
    wanted = (512 if num_rows <= 32 else 256) * _MATRIX_ROWS // num_matrix_rows
    return min(8, 1 << max(wanted, 1).bit_length() - 1, -(-num_columns // MAX_COLUMNS))


def _launch(rows: Tensor, matrix: QuantizedMatrix, out: Tensor, workspace: Tensor) -> None:
    (num_rows, num_columns), blocks = matrix.shape, blocks_for(len(rows), matrix)
    piece_columns = -(-num_columns // (blocks.num_pieces * MAX_COLUMNS)) * MAX_COLUMNS
    num_pieces = -(-num_columns // piece_columns)
    parts = out if num_pieces == 1 else workspace[: num_pieces * len(rows) * num_rows * 4].view(torch.float32)
    grid = (-(-len(rows) // blocks.rows), -(-num_rows // _MATRIX_ROWS), num_pieces)
    _product_kernel[grid](
        parts,
        rows,
        *matrix.tensors,
        len(rows),
        num_rows,
        rows.stride(0),
        out.stride(0) if num_pieces == 1 else num_rows,
        NUM_COLS=num_columns,
        FORMAT=matrix.format,
        WHOLE=num_rows % _MATRIX_ROWS == 0 and num_columns % matrix.tile_columns == 0,
        PIECE_COLS=piece_columns,
        BLOCK_T=blocks.rows,
        BLOCK_N=_MATRIX_ROWS,
        BLOCK_K=matrix.tile_columns,
        num_warps=4,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
    )
    if num_pieces > 1:
        block = 512
        _add_pieces_kernel[(len(rows), -(-num_rows // block))](
            out, parts, len(rows), num_rows, out.stride(0), PIECES=num_pieces, BLOCK=block
        )


@jit()
def _columns_of(
    rows: tl.tensor,  # pointers, (BLOCK_T,)
    inside: tl.tensor,  # (BLOCK_T,)
    order: tl.tensor,  # (K,)
    k: tl.tensor,  # columns of a tile
    NUM_COLS: tl.constexpr,
    ORDERED: tl.constexpr,
) -> tl.tensor:
    """Columns ``k`` of rows, one below the other: (columns, BLOCK_T)."""
    mask = (k < NUM_COLS)[:, None] & inside[None, :]
    if ORDERED:
        k = tl.load(order + k, mask=k < NUM_COLS, other=0)
    return tl.load(rows[None, :] + k[:, None], mask=mask, other=0.0)


@jit()
def product(
    rows: tl.tensor,  # pointers to rows, (BLOCK_T,)
    inside: tl.tensor,  # (BLOCK_T,): which rows are there
    matrix: tl.tensor,  # pointers to codes, scales, zeros and order, as in ``QuantizedMatrix.tensors``
    n: tl.tensor,  # (BLOCK_N,) rows of the matrix
    num_rows: tl.tensor,  # N
    first: tl.tensor,  # of the columns that are multiplied, a tile's first
    last: tl.tensor,
    DTYPE: tl.constexpr,  # of rows
    NUM_COLS: tl.constexpr,  # K
    FORMAT: tl.constexpr,  # ``QuantizedMatrix.format``
    WHOLE: tl.constexpr,  # whether tiles end where the matrix does
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The product of rows of a matrix with rows, (BLOCK_N, BLOCK_T) float32: so codes need not leave registers."""
    NUM_GROUPS: tl.constexpr = FORMAT[0]
    GROUP_ROWS: tl.constexpr = FORMAT[1]
    GROUP_COLS: tl.constexpr = FORMAT[2]
    BITS: tl.constexpr = FORMAT[3]
    HAS_ZEROS: tl.constexpr = FORMAT[4]
    ORDERED: tl.constexpr = FORMAT[5]
    RUN: tl.constexpr = BLOCK_K // 2
    codes, scales, zeros, order = matrix
    groups = n // GROUP_ROWS * NUM_GROUPS
    known = n < num_rows
    sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(first, last, BLOCK_K):
        group = start // GROUP_COLS
        if BITS == 8:
            k = start + tl.arange(0, BLOCK_K)
            pointers = codes + n.to(tl.int64)[:, None] * NUM_COLS + k[None, :]
            if WHOLE:
                tile = tl.load(pointers)
            else:
                tile = tl.load(pointers, mask=known[:, None] & (k < NUM_COLS)[None, :], other=0.0)
            x = _columns_of(rows, inside, order, k, NUM_COLS, ORDERED)
            part = dot(numbers_of_eight_bits(tile, DTYPE), x)
        else:
            j = tl.arange(0, RUN)
            pointers = codes + n.to(tl.int64)[:, None] * (NUM_COLS // 2) + (start // 2 + j)[None, :]
            tile = tl.load(pointers) if WHOLE else tl.load(pointers, mask=known[:, None], other=0)
            zero = tl.full((BLOCK_N,), _ZERO, tl.uint8)
            if HAS_ZEROS:
                zero = tl.load(zeros + groups + group, mask=known, other=0)
            low, high = numbers_of_four_bits(tile, zero[:, None], DTYPE)
            x = _columns_of(rows, inside, order, start + j, NUM_COLS, ORDERED)
            part = dot(low, x)
            x = _columns_of(rows, inside, order, start + RUN + j, NUM_COLS, ORDERED)
            part += dot(high, x)
        if NUM_GROUPS > 1:
            part *= tl.load(scales + groups + group, mask=known, other=0.0).to(tl.float32)[:, None]
        sums += part
    if NUM_GROUPS == 1:
        sums *= tl.load(scales + groups, mask=known, other=0.0).to(tl.float32)[:, None]
    return sums


@jit("num_tokens", "num_rows")
def _product_kernel(
    out: tl.tensor,  # (T, N), or (pieces, T, N) float32
    rows: tl.tensor,  # (T, K)
    codes: tl.tensor,  # (N, K) float8, or (N, K / 2) uint8
    scales: tl.tensor,  # (groups of rows, groups of columns)
    zeros: tl.tensor,  # as scales, uint8
    order: tl.tensor,  # (K,) int32
    num_tokens: tl.tensor,  # T
    num_rows: tl.tensor,  # N
    rows_row: tl.tensor,  # strides
    out_row: tl.tensor,
    NUM_COLS: tl.constexpr,  # K, and all others as ``product`` takes them
    FORMAT: tl.constexpr,
    WHOLE: tl.constexpr,
    PIECE_COLS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    DTYPE: tl.constexpr = rows.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    piece = tl.program_id(2)
    first, last = piece * PIECE_COLS, tl.minimum(NUM_COLS, (piece + 1) * PIECE_COLS)
    inside = t < num_tokens
    x, matrix = rows + t.to(tl.int64) * rows_row, (codes, scales, zeros, order)
    sums = product(
        x, inside, matrix, n, num_rows, first, last, DTYPE, NUM_COLS, FORMAT, WHOLE, BLOCK_T, BLOCK_N, BLOCK_K
    )
    pointers = out + (piece * num_tokens + t).to(tl.int64)[None, :] * out_row + n[:, None]
    tl.store(pointers, rounded(sums, out.dtype.element_ty), mask=(n < num_rows)[:, None] & inside[None, :])


@jit("num_tokens", "num_rows")
def _add_pieces_kernel(
    out: tl.tensor,  # (T, N)
    parts: tl.tensor,  # (pieces, T, N) float32
    num_tokens: tl.tensor,  # T
    num_rows: tl.tensor,  # N
    out_row: tl.tensor,  # stride
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for piece in tl.static_range(PIECES):
        total += tl.load(parts + (piece * num_tokens + t) * num_rows + n, mask=n < num_rows, other=0.0)
    tl.store(out + t * out_row + n, rounded(total, out.dtype.element_ty), mask=n < num_rows)
