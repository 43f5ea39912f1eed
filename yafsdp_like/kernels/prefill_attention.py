"""Prefill attention: any number of queries a sequence, over keys and values in pages; one program a tile of queries.

Formulas, shapes and the reference: `paged_attention.py`; the list of tiles: `query_tiles.py`. Hopper GPUs take the
kernel of `prefill_hopper.py` where it fits; the one here serves all else.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from yafsdp_like.kernels import prefill_hopper
from yafsdp_like.kernels.blocks import jit, launching_on, rounded, runs_on, tl
from yafsdp_like.kernels.paged_attention import (
    AttentionBatch,
    KVPages,
    Tile,
    attend,
    attention_reference,
    check,
    choose_tile,
    empty_state,
    normalize,
)
from yafsdp_like.kernels.query_tiles import TILE_COLS, tile_rows


def prefill_attention(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int | None = None) -> None:
    """Attend with any number of queries for each of B sequences, on the current stream.

    The arguments are those of `decode_attention`, but `batch` has `tiles` of as many queries as `queries_per_tile`
    says, and lengths are not read. Rows of no tile are not written. Raises `ValueError` for shapes, dtypes or strides
    that do not fit.
    """
    check(q, pages, batch, out)
    if batch.tiles is None or batch.tiles.dim() != 2 or batch.tiles.shape[1] != TILE_COLS or len(batch.tiles) < 2:
        found = None if batch.tiles is None else tuple(batch.tiles.shape)
        raise ValueError(f"expected a batch with tiles (1 + n, {TILE_COLS}), n at least 1, found {found}")
    if not runs_on(q.device):
        attention_reference(q, pages, batch, out, window)
    elif len(q):
        with launching_on(q.device):
            if prefill_hopper.AVAILABLE and prefill_hopper.fits(q, pages, _capability(q.device)):
                prefill_hopper.launch(q, pages, batch, out, window or 0)
            else:
                _launch(q, pages, batch, out, window or 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, (0, 0) of what is not a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _choose_tile(q: Tensor, pages: KVPages, capability: tuple[int, int]) -> Tile:
    """Choose how the tile of `query_tiles.tile_rows` is computed.

    On Hopper, 128 registers let two programs share a multiprocessor, and one's softmax overlaps the other's products.
    That gains more time than the registers that then spill cost.
    """
    num_rows = tile_rows(q.shape[1], pages.num_kv_heads, pages.head_dim, q.element_size())
    tile = choose_tile(num_rows, 8 if num_rows >= 128 else 4, q, pages)
    two_fit = capability[0] == 9 and tile.num_rows == 128 and q.element_size() == 2
    return replace(tile, max_registers=128) if two_fit else tile


def _launch(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int) -> None:
    group = q.shape[1] // pages.num_kv_heads
    tile = _choose_tile(q, pages, _capability(q.device))
    assert batch.tiles is not None, "checked"
    _prefill_kernel[((len(batch.tiles) - 1) * pages.num_kv_heads,)](
        out,
        q,
        pages.keys,
        pages.values,
        batch.page_table,
        batch.tiles,
        pages.num_kv_heads,
        *pages.scales,
        *q.stride()[:2],
        *out.stride()[:2],
        *pages.strides,
        batch.page_table.stride(0),
        GROUP=group,
        WINDOW=window,
        **pages.constants,
        **tile.options,
    )


@jit()
def _keys_of(
    lowest: tl.tensor,  # position of the block's first query
    length: tl.tensor,  # of the sequence
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Return (first key that some query sees, ends of the loops: start, `bottom`, `top`, end of what is seen).

    Keys before `bottom` and from `top` on are seen by some queries only.
    """
    end = tl.minimum(lowest + BLOCK_Q, length)
    low = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW > 0 else lowest * 0
    first = low // BLOCK_N * BLOCK_N
    bottom = tl.maximum(tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N, first) if WINDOW > 0 else first
    top = tl.maximum((lowest + 1) // BLOCK_N * BLOCK_N, bottom)
    return low, (first, bottom, top, end)


@jit()
def _prefill_kernel(
    out: tl.tensor,  # (T, N, H)
    q: tl.tensor,  # (T, N, H)
    keys: tl.tensor,  # (P, PAGE_SIZE, K, H)
    values: tl.tensor,
    page_table: tl.tensor,  # (B, max_pages) int32
    tiles: tl.tensor,  # (1 + n, 4) int32
    num_kv_heads: tl.tensor,
    score_scale: tl.tensor,
    value_scale: tl.tensor,
    q_row: tl.tensor,  # strides
    q_head: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    key_page: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_page: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    table_row: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    number = tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    if number < tl.load(tiles):
        tile = tiles + 4 * (1 + number)
        begin, num_left, lowest, b = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        length = lowest + num_left
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)[None, :]
        token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
        inside = ((rows < BLOCK_Q * GROUP) & (token < num_left))[:, None] & (dims < H)
        row = (begin + token).to(tl.int64)
        queries = tl.load(q + (row * q_row + head * q_head)[:, None] + dims, mask=inside, other=0.0)
        low, ends = _keys_of(lowest, length, WINDOW, BLOCK_Q, BLOCK_N)
        table, positions = page_table + b.to(tl.int64) * table_row, lowest + token
        keys, values = keys + kv_head * key_head, values + kv_head * value_head
        kv = (keys, values, table, key_page, key_token, value_page, value_token)
        state = empty_state(BLOCK_M, BLOCK_H)
        for part in tl.static_range(0 if WINDOW > 0 else 1, 3):
            bounds = (ends[part], ends[part + 1], low, ends[3])
            state = attend(
                state, queries, positions, kv, bounds, score_scale, WINDOW, PAGE_SIZE, H, BLOCK_H, BLOCK_N, part != 1
            )
        weighted, _, total = state
        result = normalize(weighted, total, value_scale)
        pointers = out + (row * out_row + head * out_head)[:, None] + dims
        tl.store(pointers, rounded(result, out.dtype.element_ty), mask=inside)
