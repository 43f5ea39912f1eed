"""What LoRA adapters add to a product, each row by an adapter of its own: Hu et al., "LoRA" (2021).

    out[t] += B[s] (A[s] x[t])                        s = slot of row t; rows without one are left as they are

Rows are sorted by slots, on the host (`tiles_of`), and cut into tiles of one adapter each (after Chen et al., "Punica",
2023). Rows of all adapters go in two launches, whose grids depend on the numbers of rows and slots alone, so that they
can be recorded: `x A^T` for a tile, then its product with B. What takes time for few rows is waiting for memory, so K
is cut into pieces, whose sums the second launch adds up in order, and on a GPU that can the second launch reads B while
the first still runs. Sums are float32; what is between the products is rounded to the weights' dtype. Only the number
of rows decides how a row is computed, not which others there are.

Products that read the same rows are one here: P projections, whose matrices lie behind each other.

Shapes: T rows, K columns of them, S slots, P projections, R rank, N columns of all projections, M tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from yafsdp_like.kernels.blocks import dot, jit, launching_on, rounded, runs_on, tl

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton, or one that cannot launch a kernel before the one that it waits for has ended
    gdc_launch_dependents = gdc_wait = None

MAX_PROJECTIONS = 3  # of the same rows: queries, keys and values
TILE_COLUMNS = 3  # of the table of tiles: slot, first and last row
_MAX_PIECES, _MAX_PIECE_ROWS = 32, 4096  # along K; rows of all pieces, where there are several
_PIECE_COLUMNS = 512  # of a piece, where as many pieces may be
_FEW_ROWS = 256  # up to which tiles have 16 rows, above them 64


def max_num_tiles(num_rows: int, num_slots: int) -> int:
    """Return the most lines of the tables of up to so many rows."""
    return max(num_lines(min(num_rows, _FEW_ROWS), num_slots), num_lines(num_rows, num_slots))


def num_lines(num_rows: int, num_slots: int) -> int:
    """Return M, the most tiles that so many rows can be."""
    return min(num_rows, -(-num_rows // _rows_of_tile(num_rows)) + num_slots)


def _rows_of_tile(num_rows: int) -> int:
    return 16 if num_rows <= _FEW_ROWS else 64


def tiles_of(slots: NDArray[np.int32], num_slots: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return rows in order of their slots, (T,), and the table of their tiles, (M, 3).

    Args:
        slots: (T,), 0 for a row without an adapter, s + 1 for slot s.
        num_slots: S.

    A line of the table is a slot's number, and the first and last (exclusive) of a tile's rows in that order; slot 0:
    there is no such tile.
    """
    size = _rows_of_tile(len(slots))
    order = np.argsort(slots, kind="stable").astype(np.int32)
    table = np.zeros((num_lines(len(slots), num_slots), TILE_COLUMNS), np.int32)
    numbers, starts = np.unique(slots[order], return_index=True)
    ends = [*starts[1:], len(slots)]
    lines = [
        (number, first, min(first + size, end))
        for number, start, end in zip(numbers, starts, ends, strict=True)
        if number
        for first in range(start, end, size)
    ]
    if lines:
        table[: len(lines)] = lines
    return order, table


@dataclass(frozen=True)
class AdapterRows:
    """Which rows have which adapters: what `tiles_of` returns of their slots, on the device."""

    order: Tensor  # (T,) int32
    tiles: Tensor  # (M, 3) int32


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


def add_low_rank(rows: Tensor, low_rank: LowRank, adapted: AdapterRows, workspace: Tensor, out: Tensor) -> None:
    """Add to each row of `out` what its adapter makes of the same row of `rows`, on the current stream.

    Args:
        rows: `(T, K)`, rows dense.
        low_rank: matrices of all slots, in the dtype of `rows`.
        adapted: which rows have which adapters.
        workspace: float32, `workspace_numel` elements or more; overwritten.
        out: `(T, N)`, rows dense, of the same dtype. No element of `rows`.

    Raises `ValueError` for shapes that do not fit.
    """
    _check(rows, low_rank, adapted, workspace, out)
    if not runs_on(rows.device):
        add_low_rank_reference(rows, low_rank, adapted, out)
    elif len(rows):
        with launching_on(rows.device):
            _launch(rows, low_rank, adapted, workspace, out)


def add_low_rank_reference(rows: Tensor, low_rank: LowRank, adapted: AdapterRows, out: Tensor) -> None:
    """What `add_low_rank` does, in plain torch, a tile after the other; asks the device for the tiles."""
    rank = low_rank.rank
    for slot, start, end in adapted.tiles.tolist():
        if slot == 0:
            continue
        found = adapted.order[start:end].long()
        low = (rows[found].float() @ low_rank.a[slot - 1].float().T).to(rows.dtype)
        first, parts = 0, []
        for number, size in enumerate(low_rank.sizes):
            b = low_rank.b[slot - 1, first : first + size]
            parts.append(low[:, number * rank : (number + 1) * rank].float() @ b.float().T)
            first += size
        out[found] = (out[found].float() + torch.cat(parts, 1)).to(out.dtype)


def _check(rows: Tensor, low_rank: LowRank, adapted: AdapterRows, workspace: Tensor, out: Tensor) -> None:
    a, b, sizes = low_rank.a, low_rank.b, low_rank.sizes
    num_rows, rank = len(rows), low_rank.rank
    wanted = (len(b), len(sizes) * rank, rows.shape[1])
    if a.shape != wanted or out.shape != (num_rows, b.shape[1]):
        raise ValueError(
            f"expected A {wanted} and out {(num_rows, b.shape[1])} for rows {tuple(rows.shape)} and B "
            f"{tuple(b.shape)}, found {tuple(a.shape)} and {tuple(out.shape)}"
        )
    tables = (num_rows,), (num_lines(num_rows, len(b)), TILE_COLUMNS)
    if (adapted.order.shape, adapted.tiles.shape) != tables:
        raise ValueError(
            f"expected order and tiles {tables} of {num_rows} rows and {len(b)} slots, found "
            f"{tuple(adapted.order.shape)} and {tuple(adapted.tiles.shape)}"
        )
    if sum(sizes) != b.shape[1] or not 1 <= len(sizes) <= MAX_PROJECTIONS:
        raise ValueError(f"expected 1 to {MAX_PROJECTIONS} projections of {b.shape[1]} columns in all, found {sizes}")
    if workspace.dtype != torch.float32 or workspace.numel() < workspace_numel(num_rows, a.shape[1]):
        raise ValueError(
            f"expected a float32 workspace of {workspace_numel(num_rows, a.shape[1])} elements, found "
            f"{workspace.numel()} in {workspace.dtype}"
        )


def _num_pieces(num_rows: int, num_cols: int) -> int:
    """Return into how many pieces K is cut: a power of two, of which the last may be empty."""
    wanted = min(_MAX_PIECES, max(1, _MAX_PIECE_ROWS // num_rows), -(-num_cols // _PIECE_COLUMNS))
    return 1 << (wanted - 1).bit_length() if wanted * num_rows <= _MAX_PIECE_ROWS // 2 else 1 << wanted.bit_length() - 1


def _launch(rows: Tensor, low_rank: LowRank, adapted: AdapterRows, workspace: Tensor, out: Tensor) -> None:
    (num_rows, num_cols), num_tiles = rows.shape, len(adapted.tiles)
    rank, sizes = low_rank.rank, (*low_rank.sizes, 0, 0)[:MAX_PROJECTIONS]
    num_pieces, block_r = _num_pieces(num_rows, num_cols), max(16, 1 << (rank - 1).bit_length())
    block_k, block_n = (256 if num_rows <= _FEW_ROWS else 128, 256) if block_r <= 32 else (32, 64)
    piece_cols = -(-num_cols // (num_pieces * block_k)) * block_k
    is_early = _can_be_early(rows.device)
    shared = {
        "PROJECTIONS": len(low_rank.sizes),
        "R": rank,
        "PIECES": num_pieces,
        "EARLY": is_early,
        "BLOCK_T": _rows_of_tile(num_rows),
        "BLOCK_R": block_r,
    }
    _shrink_kernel[(num_tiles, len(low_rank.sizes), num_pieces)](
        workspace,
        rows,
        low_rank.a,
        adapted.order,
        adapted.tiles,
        num_cols,
        piece_cols,
        rows.stride(0),
        low_rank.a.stride(0),
        WHOLE=num_pieces * piece_cols == num_cols,
        BLOCK_K=block_k,
        **shared,
    )
    _expand_kernel[(num_tiles, sum(-(-size // block_n) for size in sizes))](
        out,
        workspace,
        low_rank.b,
        adapted.order,
        adapted.tiles,
        *sizes,
        out.stride(0),
        low_rank.b.stride(0),
        BLOCK_N=block_n,
        **shared,
        **({"launch_pdl": True} if is_early else {}),
    )


def _can_be_early(device: torch.device) -> bool:
    """Return whether a kernel can be launched while the one before it runs, and wait for it where it must."""
    return gdc_wait is not None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@jit()
def _shrink_kernel(
    shrunk: tl.tensor,  # (T, P, R, pieces) float32
    x: tl.tensor,  # (T, K)
    a: tl.tensor,  # (S, P R, K)
    order: tl.tensor,  # (T,) int32
    tiles: tl.tensor,  # (M, 3) int32
    num_cols: tl.tensor,  # K
    piece_cols: tl.tensor,
    x_row: tl.tensor,  # strides
    a_slot: tl.tensor,
    PROJECTIONS: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    EARLY: tl.constexpr,  # whether the next kernel may begin, which waits for this one's end
    WHOLE: tl.constexpr,  # whether pieces end where the rows do
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    if EARLY:
        gdc_launch_dependents()
    tile, projection, piece = tiles + tl.program_id(0) * 3, tl.program_id(1), tl.program_id(2)
    slot, place = tl.load(tile), tl.load(tile + 1) + tl.arange(0, BLOCK_T)
    if slot > 0:
        inside, r = place < tl.load(tile + 2), tl.arange(0, BLOCK_R)
        t = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        first = piece * piece_cols
        last = first + piece_cols  # a multiple of 16, so that masks hold for whole vectors
        if not WHOLE:
            last = tl.minimum(last, num_cols)
        matrix = a + (slot - 1).to(tl.int64) * a_slot + (projection * R + r)[None, :] * num_cols
        sums = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for start in range(first, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            pointers = x + t[:, None] * x_row + k[None, :]
            values = tl.load(pointers, mask=inside[:, None] & (k < last)[None, :], other=0.0)
            weights = tl.load(matrix + k[:, None], mask=(k < last)[:, None] & (r < R)[None, :], other=0.0)
            sums += dot(values, weights)
        pointers = shrunk + ((t * PROJECTIONS + projection)[:, None] * R + r[None, :]) * PIECES + piece
        tl.store(pointers, sums, mask=inside[:, None] & (r < R)[None, :])


@jit()
def _expand_kernel(
    out: tl.tensor,  # (T, N)
    shrunk: tl.tensor,  # (T, P, R, pieces) float32
    b: tl.tensor,  # (S, N, R)
    order: tl.tensor,  # (T,) int32
    tiles: tl.tensor,  # (M, 3) int32
    size_0: tl.tensor,  # columns of each projection; 0: there is none
    size_1: tl.tensor,
    size_2: tl.tensor,
    out_row: tl.tensor,  # strides
    b_slot: tl.tensor,
    PROJECTIONS: tl.constexpr,
    R: tl.constexpr,
    PIECES: tl.constexpr,
    EARLY: tl.constexpr,  # whether the kernel before may not have ended
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0) * 3
    slot, place = tl.load(tile), tl.load(tile + 1) + tl.arange(0, BLOCK_T)
    if slot > 0:
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
        stored, n = n < size, column + n
        inside = place < tl.load(tile + 2)
        t = tl.load(order + place, mask=inside, other=0).to(tl.int64)
        matrix = b + (slot - 1).to(tl.int64) * b_slot + n[None, :] * R + r[:, None]
        weights = tl.load(matrix, mask=stored[None, :] & (r < R)[:, None], other=0.0)
        pointers, mask = out + t[:, None] * out_row + n[None, :], inside[:, None] & stored[None, :]
        total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if EARLY:
            gdc_wait()
        places = ((t * PROJECTIONS + projection)[:, None] * R + r[None, :])[:, :, None] * PIECES
        low_mask = (inside[:, None] & (r < R)[None, :])[:, :, None]
        low = tl.sum(tl.load(shrunk + places + tl.arange(0, PIECES)[None, None, :], mask=low_mask, other=0.0), 2)
        total += dot(rounded(low, b.dtype.element_ty), weights)
        tl.store(pointers, rounded(total, out.dtype.element_ty), mask=mask)
