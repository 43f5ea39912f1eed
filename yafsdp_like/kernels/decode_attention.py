"""Decode attention: few queries a sequence, over keys and values in pages, with the keys cut into splits.

One program attends to one split of a sequence's keys for one kv head; where there are several splits, a second kernel
combines them. Formulas, shapes and the reference: `paged_attention.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import jit, launching_on, rounded, runs_on, tl
from yafsdp_like.kernels.paged_attention import (
    AttentionBatch,
    KVPages,
    attend,
    attention_reference,
    block_of,
    check,
    check_equal_queries,
    choose_tile,
    empty_state,
    normalize,
    power_of_2,
)

_MIN_ROWS = 16  # of a matrix product's left side
_WAVES = 3  # programs per multiprocessor that keep its memory busy
_MIN_KEYS_PER_SPLIT = 128
_SPLITS_AT_ONCE = 16  # that a program combines at a time


def choose_num_splits(batch_size: int, num_kv_heads: int, max_length: int, num_multiprocessors: int) -> int:
    """Choose into how many splits to cut every sequence's keys, so that programs keep all multiprocessors busy.

    A sequence's output depends in its last bits on this number, but not on the other sequences: with one number for
    all batches, a sequence has the same bits in each of them.
    """
    wanted = _WAVES * num_multiprocessors // (batch_size * num_kv_heads)
    return max(1, min(wanted, -(-max_length // _MIN_KEYS_PER_SPLIT)))


def workspace_numel(num_rows: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Return the elements of the float32 workspace of `decode_attention` for T = `num_rows` queries."""
    return 0 if num_splits == 1 else num_rows * num_heads * num_splits * (head_dim + 1)


def decode_attention(
    q: Tensor,
    pages: KVPages,
    batch: AttentionBatch,
    out: Tensor,
    workspace: Tensor,
    num_splits: int,
    window: int | None = None,
) -> None:
    """Attend with T / B queries for each of B sequences, on the current stream.

    Args:
        q: `(T, N, H)`, heads dense; the rows of a sequence are together.
        pages: K divides N.
        batch: without `tiles`.
        out: `(T, N, H)`, heads dense, in the dtype of q. A row that sees nothing becomes zeros.
        workspace: flat float32, at least `workspace_numel(T, N, H, num_splits)` elements; overwritten.
        num_splits: splits of each sequence's keys; see `choose_num_splits`.
        window: keys that a query sees at most, its own included.

    Raises `ValueError` for shapes, dtypes or strides that do not fit.
    """
    check(q, pages, batch, out)
    needed = workspace_numel(len(q), q.shape[1], q.shape[2], num_splits)
    if batch.tiles is not None:
        raise ValueError("expected a batch without tiles: every sequence has equally many queries")
    check_equal_queries(q, batch)
    if workspace.numel() < needed or workspace.dtype != torch.float32:
        raise ValueError(
            f"expected a float32 workspace of {needed} elements, found {workspace.numel()} in {workspace.dtype}"
        )
    if not runs_on(q.device):
        attention_reference(q, pages, batch, out, window)
    elif len(q):
        with launching_on(q.device):
            _launch(q, pages, batch, out, workspace, num_splits, window or 0)


def _launch(
    q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, workspace: Tensor, num_splits: int, window: int
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_queries, group = len(q) // batch.size, num_heads // pages.num_kv_heads
    tile = choose_tile(max(_MIN_ROWS, power_of_2(num_queries * group)), 4, q, pages)
    sums = workspace[len(q) * num_heads * num_splits * head_dim :] if num_splits > 1 else workspace
    shared: dict[str, Any] = {"WINDOW": window, "BLOCK_N": tile.num_cols, "QUERIES": num_queries}
    _decode_kernel[(num_splits, pages.num_kv_heads, batch.size)](
        out,
        workspace,
        sums,
        q,
        pages.keys,
        pages.values,
        batch.page_table,
        batch.seq_lens,
        num_splits,
        *pages.scales,
        *q.stride()[:2],
        *out.stride()[:2],
        *pages.strides,
        batch.page_table.stride(0),
        GROUP=group,
        WHOLE=num_splits == 1,
        **pages.constants,
        **(shared | tile.options),
    )
    if num_splits > 1:
        _combine_kernel[(len(q), num_heads)](
            out,
            workspace,
            sums,
            batch.seq_lens,
            num_splits,
            num_heads,
            *out.stride()[:2],
            H=head_dim,
            BLOCK_H=block_of(head_dim),
            **shared,
            BLOCK_S=_SPLITS_AT_ONCE,
            num_warps=2,
            enable_fp_fusion=True,
        )


@jit()
def _split_of(
    length: tl.tensor, num_splits: tl.tensor, QUERIES: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """(first key that any query sees, first key of the first split, keys of a split) of a sequence."""
    low = tl.maximum(length - (QUERIES + WINDOW - 1), 0) if WINDOW > 0 else length * 0
    first = low // BLOCK_N * BLOCK_N
    return low, first, tl.cdiv(tl.cdiv(length - first, BLOCK_N), num_splits) * BLOCK_N


@jit("num_splits")
def _decode_kernel(
    out: tl.tensor,  # (T, N, H)
    partial: tl.tensor,  # (T, N, num_splits, H) float32
    sums: tl.tensor,  # (T, N, num_splits) float32: log2 of the sum of 2^score
    q: tl.tensor,  # (T, N, H)
    keys: tl.tensor,  # (P, PAGE_SIZE, K, H)
    values: tl.tensor,
    page_table: tl.tensor,  # (B, max_pages) int32
    seq_lens: tl.tensor,  # (B,) int32
    num_splits: tl.tensor,
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
    GROUP: tl.constexpr,  # heads per kv head
    QUERIES: tl.constexpr,  # per sequence
    WINDOW: tl.constexpr,  # 0: none
    WHOLE: tl.constexpr,  # whether there is but one split
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    split, kv_head, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(seq_lens + b)
    low, first, split_keys = _split_of(length, num_splits, QUERIES, WINDOW, BLOCK_N)
    start = first + split * split_keys
    end = tl.minimum(start + split_keys, length)
    if (start < length) | WHOLE:
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)[None, :]
        token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
        inside = (rows < QUERIES * GROUP)[:, None] & (dims < H)
        row = b * QUERIES + token
        queries = tl.load(q + (row * q_row + head * q_head)[:, None] + dims, mask=inside, other=0.0)
        keys, values = keys + kv_head * key_head, values + kv_head * value_head
        kv = (keys, values, page_table + b * table_row, key_page, key_token, value_page, value_token)
        state, positions, bounds = empty_state(BLOCK_M, BLOCK_H), length - QUERIES + token, (start, end, low, end)
        # A mask costs nothing beside the loads.
        weighted, highest, total = attend(
            state, queries, positions, kv, bounds, score_scale, WINDOW, PAGE_SIZE, H, BLOCK_H, BLOCK_N, MASKED=True
        )
        result = normalize(weighted, total, value_scale)
        if WHOLE:
            pointers = out + (row * out_row + head * out_head)[:, None] + dims
            tl.store(pointers, rounded(result, out.dtype.element_ty), mask=inside)
        else:
            piece = (row * (tl.num_programs(1) * GROUP) + head) * num_splits + split
            tl.store(partial + piece[:, None] * H + dims, result, mask=inside)
            tl.store(sums + piece, highest + tl.log2(total), mask=rows < QUERIES * GROUP)


@jit("num_splits")
def _combine_kernel(
    out: tl.tensor,  # (T, N, H)
    partial: tl.tensor,  # (T, N, num_splits, H) float32
    sums: tl.tensor,  # (T, N, num_splits) float32
    seq_lens: tl.tensor,  # (B,) int32
    num_splits: tl.tensor,
    num_heads: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    QUERIES: tl.constexpr,
    WINDOW: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens + row // QUERIES)
    _, first, split_keys = _split_of(length, num_splits, QUERIES, WINDOW, BLOCK_N)
    num_used = tl.where(length > 0, tl.cdiv(length - first, tl.maximum(split_keys, 1)), 0)  # the others wrote nothing
    dims = tl.arange(0, BLOCK_H)
    weighted = tl.zeros((BLOCK_H,), tl.float32)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    piece = (row * num_heads + head) * num_splits
    for begin in range(0, num_used, BLOCK_S):
        splits = begin + tl.arange(0, BLOCK_S)
        used = splits < num_used
        sum_log = tl.load(sums + piece + splits, mask=used, other=float("-inf"))
        inside = used[:, None] & (dims[None, :] < H)
        part = tl.load(partial + (piece + splits)[:, None] * H + dims[None, :], mask=inside, other=0.0)
        higher = tl.maximum(highest, tl.max(sum_log, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, scale = tl.exp2(sum_log - base), tl.exp2(highest - base)
        total = total * scale + tl.sum(weights, 0)
        weighted = weighted * scale + tl.sum(part * weights[:, None], 0)
        highest = higher
    result = weighted / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * out_row + head * out_head + dims, rounded(result, out.dtype.element_ty), mask=dims < H)
