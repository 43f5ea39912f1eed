"""Products with matrices of 8 or 4 bits an element, which are multiplied as they are stored: nothing else is written.

Owns what a quantized matrix consists of, its value in plain torch, and one kernel for any number of rows: programs turn
tiles of codes into numbers in registers. A code is exact in bfloat16, and sums are scaled in float32, so that a product
is rounded once; in plain torch a value is ``(code - zero) * scale`` in float32. Stacks of matrices are multiplied in
`experts.py`, by the same ``product`` of tiles.

[Note: two codes a byte]
Codes of 4 bits lie in pairs that are a run of columns apart: of each 2 R columns, byte ``j`` of R holds column ``j`` in
its low half and column ``R + j`` in its high half. So both halves of a tile of bytes are tiles of columns side by side,
and meet their columns of the rows without being shuffled. A group of columns is whole runs.

Shapes: T rows, K columns of them, N rows of the matrix, R columns of a run, E matrices of a stack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import INTERPRETED, dot, jit, launching_on, rounded, runs_on, tl

SYMMETRIC_ZERO = 8  # the code of 0 where a matrix of 4 bits has no zeros of its own
_MOST_COLUMNS = 128  # of a tile
_LEAST_RUN = 16  # columns that a product of tiles takes at least
if tl is not None:
    _INTERPRETED, _ZERO = tl.constexpr(INTERPRETED), tl.constexpr(SYMMETRIC_ZERO)


def run_of(group_columns: int) -> int:
    """Return R for groups of so many columns, see [Note: two codes a byte].

    Raises ValueError for groups that no runs of 16 columns or more make up.
    """
    run = math.gcd(_MOST_COLUMNS, group_columns) // 2
    if run < _LEAST_RUN:
        raise ValueError(f"groups of 4 bits have a multiple of {2 * _LEAST_RUN} columns, found {group_columns}")
    return run


def packed_codes(codes: Tensor, run: int) -> Tensor:
    """Return codes below 16 of any integers, (N, K), as (N, K / 2) uint8, see [Note: two codes a byte]."""
    low, high = codes.to(torch.uint8).unflatten(1, (-1, 2, run)).unbind(2)  # (N, K / 2 R, R) each
    return (low | high << 4).flatten(1)


def unpacked_codes(packed: Tensor, run: int) -> Tensor:
    """Return what ``packed_codes`` was given, as (N, K) uint8."""
    halves = packed.unflatten(1, (-1, run))  # (N, K / 2 R, R)
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix (N, K) of codes, with a scale for each group of ``group_rows`` by ``group_columns`` of them.

    Or a stack of E such matrices: all tensors, and ``shape``, have E before the sizes that are named here.
    """

    codes: Tensor  # (N, K) float8_e4m3fn, or (N, K / 2) uint8
    scales: Tensor  # (ceil(N / group_rows), ceil(K / group_columns)) of any floating point
    group_rows: int
    group_columns: int
    zeros: Tensor | None = None  # as many uint8: the codes of 0; of 4 bits only
    order: Tensor | None = None  # (K,) int32: the column of rows that each column is multiplied with

    def __post_init__(self) -> None:
        *stacked, num_rows, num_columns = self.shape
        groups = (*stacked, -(-num_rows // self.group_rows), -(-num_columns // self.group_columns))
        assert self.scales.shape == groups, f"scales {tuple(self.scales.shape)}, expected {groups}"
        assert self.zeros is None or self.zeros.shape == groups, f"zeros {self.zeros}, expected {groups}"

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """N and K."""
        return *self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits

    def __len__(self) -> int:
        """Return N, or E of a stack."""
        return len(self.codes)

    def __getitem__(self, index: int) -> QuantizedMatrix:
        """Return one matrix of a stack."""
        tensors = (None if tensor is None else tensor[index] for tensor in (self.zeros, self.order))
        return QuantizedMatrix(self.codes[index], self.scales[index], self.group_rows, self.group_columns, *tensors)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and order, as kernels take them: scales stand for those that there are not."""
        return (
            self.codes,
            self.scales,
            self.scales if self.zeros is None else self.zeros,
            self.scales if self.order is None else self.order,
        )

    @property
    def format(self) -> tuple[int, int, int, int, bool, bool]:
        """What every kernel that multiplies it is compiled with: groups of a row, their sizes, bits, zeros, order."""
        num_groups, has_zeros, is_ordered = self.scales.shape[-1], self.zeros is not None, self.order is not None
        return num_groups, self.group_rows, self.group_columns, self.bits, has_zeros, is_ordered

    @property
    def tile_columns(self) -> int:
        """Columns of a tile, which are of one group, so that each row has one scale; if rows have one, any number."""
        if self.bits == 8 and self.scales.shape[-1] == 1:
            return _MOST_COLUMNS
        return math.gcd(_MOST_COLUMNS, self.group_columns)

    def dequantized(self) -> Tensor:
        """Return one matrix (N, K) in float32, columns in the order of those that they are multiplied with."""
        num_rows, num_columns = self.shape
        rows, columns = (
            torch.arange(size, device=self.codes.device) // group
            for size, group in ((num_rows, self.group_rows), (num_columns, self.group_columns))
        )
        values = self.codes if self.bits == 8 else unpacked_codes(self.codes, run_of(self.group_columns))
        values = values.float()
        if self.bits == 4:
            values -= SYMMETRIC_ZERO if self.zeros is None else self.zeros.float()[rows][:, columns]
        values *= self.scales.float()[rows][:, columns]
        if self.order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.order.long(), values)


def multiply_quantized(rows: Tensor, matrix: QuantizedMatrix, out: Tensor) -> None:
    """Write `rows @ matrix.T` into `out` on the current stream, summed in float32 and rounded once.

    Args:
        rows: `(T, K)`, dense in the last dim.
        matrix: `(N, K)`.
        out: `(T, N)` of the dtype of rows, dense in the last dim.

    Raises `RuntimeError` for shapes that do not fit.
    """
    if rows.shape[1:] != matrix.shape[1:] or out.shape != (len(rows), len(matrix)):
        raise RuntimeError(
            f"rows {tuple(rows.shape)} and a matrix {matrix.shape} cannot be multiplied into {tuple(out.shape)}"
        )
    if not len(rows):
        return
    if runs_on(rows.device):
        with launching_on(rows.device):
            _launch(rows, matrix, out, blocks_for(len(rows), matrix))
    else:
        out.copy_(rows.float() @ matrix.dequantized().T)


Matrix = Tensor | QuantizedMatrix  # or a stack of such


class Blocks(NamedTuple):
    """What one program computes, and by how many warps; see ``_product_kernel``."""

    rows: int  # of T
    matrix_rows: int  # of N
    num_warps: int
    num_stages: int


def blocks_for(num_rows: int, matrix: QuantizedMatrix) -> Blocks:
    """Return the blocks of a product: few rows have many small programs, so that enough bytes are on their way."""
    if num_rows <= 16:
        return Blocks(16, 16 if len(matrix) <= 8192 else 32, 4, 5)
    if num_rows <= 32:
        return Blocks(32, 32, 4, 4)
    if num_rows <= 64:
        return Blocks(64, 64, 4, 4)
    return Blocks(128, 128, 8, 3)


def _launch(rows: Tensor, matrix: QuantizedMatrix, out: Tensor, blocks: Blocks) -> None:
    num_rows, num_columns = matrix.shape
    grid = (-(-len(rows) // blocks.rows), -(-num_rows // blocks.matrix_rows))
    _product_kernel[grid](
        out,
        rows,
        *matrix.tensors,
        len(rows),
        num_rows,
        rows.stride(0),
        out.stride(0),
        NUM_COLS=num_columns,
        FORMAT=matrix.format,
        WHOLE=num_rows % blocks.matrix_rows == 0 and num_columns % matrix.tile_columns == 0,
        BLOCK_T=blocks.rows,
        BLOCK_N=blocks.matrix_rows,
        BLOCK_K=matrix.tile_columns,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
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
def _numbers(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Codes as numbers in the dtype of rows, which holds them exactly; products of the interpreter are in float32."""
    return values.to(tl.float32 if _INTERPRETED else DTYPE)


@jit()
def product(
    rows: tl.tensor,  # pointers to rows, (BLOCK_T,)
    inside: tl.tensor,  # (BLOCK_T,): which rows are there
    matrix: tl.tensor,  # pointers to codes, scales, zeros and order, as in ``QuantizedMatrix.tensors``
    n: tl.tensor,  # (BLOCK_N,) rows of the matrix
    num_rows: tl.tensor,  # N
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
    for start in range(0, NUM_COLS, BLOCK_K):
        group = start // GROUP_COLS
        if BITS == 8:
            k = start + tl.arange(0, BLOCK_K)
            pointers = codes + n.to(tl.int64)[:, None] * NUM_COLS + k[None, :]
            if WHOLE:
                tile = tl.load(pointers)
            else:
                tile = tl.load(pointers, mask=known[:, None] & (k < NUM_COLS)[None, :], other=0.0)
            x = _columns_of(rows, inside, order, k, NUM_COLS, ORDERED)
            part = dot(_numbers(tile, DTYPE), x)
        else:
            j = tl.arange(0, RUN)
            pointers = codes + n.to(tl.int64)[:, None] * (NUM_COLS // 2) + (start // 2 + j)[None, :]
            tile = tl.load(pointers) if WHOLE else tl.load(pointers, mask=known[:, None], other=0)
            zero = tl.full((BLOCK_N,), _ZERO, tl.int16)
            if HAS_ZEROS:
                zero = tl.load(zeros + groups + group, mask=known, other=0).to(tl.int16)
            low, high = (tile & 15).to(tl.int16) - zero[:, None], (tile >> 4).to(tl.int16) - zero[:, None]
            x = _columns_of(rows, inside, order, start + j, NUM_COLS, ORDERED)
            part = dot(_numbers(low, DTYPE), x)
            x = _columns_of(rows, inside, order, start + RUN + j, NUM_COLS, ORDERED)
            part += dot(_numbers(high, DTYPE), x)
        if NUM_GROUPS > 1:
            part *= tl.load(scales + groups + group, mask=known, other=0.0).to(tl.float32)[:, None]
        sums += part
    if NUM_GROUPS == 1:
        sums *= tl.load(scales + groups, mask=known, other=0.0).to(tl.float32)[:, None]
    return sums


@jit("num_tokens", "num_rows")
def _product_kernel(
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
    NUM_COLS: tl.constexpr,  # and all others as ``product`` takes them
    FORMAT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    DTYPE: tl.constexpr = rows.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = t < num_tokens
    x, matrix = rows + t.to(tl.int64) * rows_row, (codes, scales, zeros, order)
    sums = product(x, inside, matrix, n, num_rows, DTYPE, NUM_COLS, FORMAT, WHOLE, BLOCK_T, BLOCK_N, BLOCK_K)
    pointers = out + t.to(tl.int64)[None, :] * out_row + n[:, None]
    tl.store(pointers, rounded(sums, out.dtype.element_ty), mask=(n < num_rows)[:, None] & inside[None, :])
