"""What LoRA adapters add to a product, each row by an adapter of its own: Hu et al., "LoRA" (2021).

    out[t] += B[s] (A[s] x[t])                        s = slot of row t; rows without one are left as they are

Rows of all adapters go in two launches, whose grids depend on the number of rows alone, so that they can be recorded:
`x A^T` for a tile of rows, then its product with B. A program looks at the slots of its rows and reads matrices of
those only (after Chen et al., "Punica", 2023). Few rows are cut along K, in pieces that the second launch adds up in
order. Sums are float32; what is between the products is rounded to the weights' dtype.

Products that read the same rows are one here: P projections, whose matrices lie behind each other.

Shapes: T rows, K columns of them, S slots, P projections, R rank, N columns of all projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.kernels.blocks import dot, jit, launching_on, rounded, runs_on, tl

if TYPE_CHECKING:
    from torch import Tensor

MAX_PROJECTIONS = 3  # of the same rows: queries, keys and values
_MAX_PIECES, _MAX_PIECE_ROWS = 16, 1024  # along K; rows of all pieces, where there are several
_FEW_ROWS = 256  # up to which tiles have 16 rows, above them 64
_NO_SLOT = 1 << 30


@dataclass(frozen=True)
class LowRank:
    """One product's matrices of all slots, of one dtype; slot s is number s + 1 to a row."""

    a: Tensor  # (S, P R, K), dense but for the stride of slots
    b: Tensor  # (S, N, R), as dense
    sizes: tuple[int, ...]  # columns of each of the P projections

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.b.shape[2]


def workspace_numel(num_rows: int, num_columns: int) -> int:
    """Return the float32 elements that `add_low_rank` needs for up to so many rows, and P R columns."""
    return max(num_rows, min(_MAX_PIECES * num_rows, _MAX_PIECE_ROWS)) * num_columns


def add_low_rank(rows: Tensor, low_rank: LowRank, slots: Tensor, workspace: Tensor, out: Tensor) -> None:
    """Add to each row of `out` what its adapter makes of the same row of `rows`, on the current stream.

    Args:
        rows: `(T, K)`, rows dense.
        low_rank: matrices of all slots, in the dtype of `rows`.
        slots: `(T,)` int32: 0 for a row without an adapter, s + 1 for slot s.
        workspace: float32, `workspace_numel` elements or more; overwritten.
        out: `(T, N)`, rows dense, of the same dtype. No element of `rows`.

    Raises `ValueError` for shapes that do not fit.
    """
    _check(rows, low_rank, slots, workspace, out)
    if not runs_on(rows.device):
        add_low_rank_reference(rows, low_rank, slots, out)
    elif len(rows):
        with launching_on(rows.device):
            _launch(rows, low_rank, slots, workspace, out)


def add_low_rank_reference(rows: Tensor, low_rank: LowRank, slots: Tensor, out: Tensor) -> None:
    """What `add_low_rank` does, in plain torch, an adapter after the other; asks the device for the slots."""
    rank = low_rank.rank
    for slot in slots.unique().tolist():
        if slot == 0:
            continue
        found = (slots == slot).nonzero()[:, 0]
        low = (rows[found].float() @ low_rank.a[slot - 1].float().T).to(rows.dtype)
        first, parts = 0, []
        for number, size in enumerate(low_rank.sizes):
            b = low_rank.b[slot - 1, first : first + size]
            parts.append(low[:, number * rank : (number + 1) * rank].float() @ b.float().T)
            first += size
        out[found] = (out[found].float() + torch.cat(parts, 1)).to(out.dtype)


def _check(rows: Tensor, low_rank: LowRank, slots: Tensor, workspace: Tensor, out: Tensor) -> None:
    a, b, sizes = low_rank.a, low_rank.b, low_rank.sizes
    num_rows, rank = len(rows), low_rank.rank
    wanted = (len(b), len(sizes) * rank, rows.shape[1])
    if a.shape != wanted or out.shape != (num_rows, b.shape[1]) or slots.shape != (num_rows,):
        raise ValueError(
            f"expected A {wanted} and out {(num_rows, b.shape[1])} for rows {tuple(rows.shape)} and B "
            f"{tuple(b.shape)}, found {tuple(a.shape)}, {tuple(out.shape)} and slots {tuple(slots.shape)}"
        )
    if sum(sizes) != b.shape[1] or not 1 <= len(sizes) <= MAX_PROJECTIONS:
        raise ValueError(f"expected 1 to {MAX_PROJECTIONS} projections of {b.shape[1]} columns in all, found {sizes}")
    if workspace.dtype != torch.float32 or workspace.numel() < workspace_numel(num_rows, a.shape[1]):
        raise ValueError(
            f"expected a float32 workspace of {workspace_numel(num_rows, a.shape[1])} elements, found "
            f"{workspace.numel()} in {workspace.dtype}"
        )


def _launch(rows: Tensor, low_rank: LowRank, slots: Tensor, workspace: Tensor, out: Tensor) -> None:
    num_rows, num_cols = rows.shape
    rank, sizes = low_rank.rank, (*low_rank.sizes, 0, 0)[:MAX_PROJECTIONS]
    block_t = 16 if num_rows <= _FEW_ROWS else 64
    num_tiles = -(-num_rows // block_t)
    num_pieces = max(1, min(_MAX_PIECES, _MAX_PIECE_ROWS // (num_tiles * block_t)))
    block_r = max(16, 1 << (rank - 1).bit_length())
    block_k, block_n = (128, 128) if block_r <= 64 else (32, 64)
    piece_cols = -(-num_cols // (num_pieces * block_k)) * block_k
    num_pieces = -(-num_cols // piece_cols)
    shared = {"PROJECTIONS": len(low_rank.sizes), "R": rank, "BLOCK_T": block_t, "BLOCK_R": block_r, "NONE": _NO_SLOT}
    _shrink_kernel[(num_tiles, len(low_rank.sizes), num_pieces)](
        workspace,
        rows,
        low_rank.a,
        slots,
        num_rows,
        num_cols,
        piece_cols,
        rows.stride(0),
        low_rank.a.stride(0),
        WHOLE=num_cols % piece_cols == 0,
        BLOCK_K=block_k,
        **shared,
    )
    _expand_kernel[(num_tiles, sum(-(-size // block_n) for size in sizes))](
        out,
        workspace,
        low_rank.b,
        slots,
        num_rows,
        num_pieces,
        *sizes,
        out.stride(0),
        low_rank.b.stride(0),
        BLOCK_N=block_n,
        **shared,
    )


@jit()
def _next_slot(slots: tl.tensor, last: tl.tensor, NONE: tl.constexpr) -> tl.tensor:
    """The least slot of a tile's rows above `last`."""
    return tl.min(tl.where(slots > last, slots, NONE), 0)


@jit("num_rows")
def _shrink_kernel(
    shrunk: tl.tensor,  # (pieces, T, P, R) float32
    x: tl.tensor,  # (T, K)
    a: tl.tensor,  # (S, P R, K)
    slots: tl.tensor,  # (T,) int32
    num_rows: tl.tensor,  # T
    num_cols: tl.tensor,  # K
    piece_cols: tl.tensor,
    x_row: tl.tensor,  # strides
    a_slot: tl.tensor,
    PROJECTIONS: tl.constexpr,
    R: tl.constexpr,
    NONE: tl.constexpr,
    WHOLE: tl.constexpr,  # whether pieces end where the rows do
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    projection, piece = tl.program_id(1), tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    slot = tl.load(slots + t, mask=t < num_rows, other=0)
    first = piece * piece_cols
    last = first + piece_cols  # a multiple of 16, so that masks hold for whole vectors
    if not WHOLE:
        last = tl.minimum(last, num_cols)
    result = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    current = _next_slot(slot, 0, NONE)
    while current < NONE:
        mine = slot == current
        matrix = a + (current - 1).to(tl.int64) * a_slot + (projection * R + r)[None, :] * num_cols
        sums = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(first, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = k < last
            pointers = x + t.to(tl.int64)[:, None] * x_row + k[None, :]
            values = tl.load(pointers, mask=mine[:, None] & inside[None, :], other=0.0)
            weights = tl.load(matrix + k[:, None], mask=inside[:, None] & (r < R)[None, :], other=0.0)
            sums += dot(values, weights)
        result = tl.where(mine[:, None], sums, result)  # not a sum, since another adapter may give a NaN
        current = _next_slot(slot, current, NONE)
    row = (piece * num_rows + t).to(tl.int64) * PROJECTIONS + projection
    tl.store(shrunk + row[:, None] * R + r[None, :], result, mask=(slot > 0)[:, None] & (r < R)[None, :])


@jit("num_rows", "num_pieces")
def _expand_kernel(
    out: tl.tensor,  # (T, N)
    shrunk: tl.tensor,  # (pieces, T, P, R) float32
    b: tl.tensor,  # (S, N, R)
    slots: tl.tensor,  # (T,) int32
    num_rows: tl.tensor,  # T
    num_pieces: tl.tensor,
    size_0: tl.tensor,  # columns of each projection; 0: there is none
    size_1: tl.tensor,
    size_2: tl.tensor,
    out_row: tl.tensor,  # strides
    b_slot: tl.tensor,
    PROJECTIONS: tl.constexpr,
    R: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slots + t, mask=t < num_rows, other=0)
    current = _next_slot(slot, 0, NONE)
    if current < NONE:
        # A block's columns are those of one projection.
        block, projection, column, size = tl.program_id(1), 0, 0, size_0
        if PROJECTIONS > 1:
            blocks_0, blocks_1 = tl.cdiv(size_0, BLOCK_N), tl.cdiv(size_1, BLOCK_N)
            second, third = block >= blocks_0, block >= blocks_0 + blocks_1
            projection = second.to(tl.int32) + third.to(tl.int32)
            column = tl.where(third, size_0 + size_1, tl.where(second, size_0, 0))
            size = tl.where(third, size_2, tl.where(second, size_1, size_0))
            block = block - tl.where(third, blocks_0 + blocks_1, tl.where(second, blocks_0, 0))
        n, r = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        inside, n = n < size, column + n
        low = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for piece in range(num_pieces):
            row = (piece * num_rows + t).to(tl.int64) * PROJECTIONS + projection
            pointers = shrunk + row[:, None] * R + r[None, :]
            low += tl.load(pointers, mask=(slot > 0)[:, None] & (r < R)[None, :], other=0.0)
        values = rounded(low, b.dtype.element_ty)
        added = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        while current < NONE:
            matrix = b + (current - 1).to(tl.int64) * b_slot + n[None, :] * R + r[:, None]
            weights = tl.load(matrix, mask=inside[None, :] & (r < R)[:, None], other=0.0)
            product = dot(values, weights)
            added = tl.where((slot == current)[:, None], product, added)
            current = _next_slot(slot, current, NONE)
        pointers = out + t.to(tl.int64)[:, None] * out_row + n[None, :]
        stored = (slot > 0)[:, None] & inside[None, :]
        total = tl.load(pointers, mask=stored, other=0.0).to(tl.float32) + added
        tl.store(pointers, rounded(total, out.dtype.element_ty), mask=stored)
