"""Prefill attention: any number of queries a sequence, over keys and values in pages; one program a tile of queries.

Formulas, shapes and the reference: `paged_attention.py`. Hopper GPUs take the kernel of `prefill_hopper.py` where it
fits; the one here serves all else.
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
    check_equal_queries,
    choose_tile,
    empty_state,
    normalize,
    power_of_2,
)


def prefill_attention(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int | None = None) -> None:
    """Attend with any number of queries for each of B sequences, on the current stream.

    The arguments are those of `decode_attention`; `batch` may have `cu_seqlens_q`, whose last is at most T. Rows
    before its first and past its last are not written. Raises `ValueError` for shapes, dtypes or strides that do not
    fit.
    """
    check(q, pages, batch, out)
    if batch.cu_seqlens_q is None:
        check_equal_queries(q, batch)
    if not runs_on(q.device):
        attention_reference(q, pages, batch, out, window)
    elif len(q):
        with launching_on(q.device):
            if prefill_hopper.AVAILABLE and prefill_hopper.fits(q, pages, batch, _capability(q.device)):
                prefill_hopper.launch(q, pages, batch, out, window or 0)
            else:
                _launch(q, pages, batch, out, window or 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, (0, 0) of what is not a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _choose_tile(q: Tensor, pages: KVPages, capability: tuple[int, int]) -> Tile:
    """Choose 32 KiB of queries, or one token's.

    On Hopper, 128 registers let two programs share a multiprocessor, and one's softmax overlaps the other's products.
    That gains more time than the registers that then spill cost.
    """
    num_rows = min(128, 32_768 // (power_of_2(pages.head_dim) * q.element_size()))
    group = q.shape[1] // pages.num_kv_heads
    tile = choose_tile(max(num_rows, power_of_2(group)), 8 if num_rows == 128 else 4, q, pages)
    two_fit = capability[0] == 9 and tile.num_rows == 128 and q.element_size() == 2
    return replace(tile, max_registers=128) if two_fit else tile


def _launch(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int) -> None:
    group = q.shape[1] // pages.num_kv_heads
    tile = _choose_tile(q, pages, _capability(q.device))
    num_blocks = len(q) // (tile.num_rows // group) + batch.size  # see _sequence_of
    _prefill_kernel[(num_blocks, pages.num_kv_heads)](
        out,
        q,
        pages.keys,
        pages.values,
        batch.page_table,
        batch.seq_lens,
        batch.seq_lens if batch.cu_seqlens_q is None else batch.cu_seqlens_q,
        batch.size,
        *pages.scales,
        *q.stride()[:2],
        *out.stride()[:2],
        *pages.strides,
        batch.page_table.stride(0),
        GROUP=group,
        QUERIES=len(q) // batch.size if batch.cu_seqlens_q is None else 0,
        WINDOW=window,
        **pages.constants,
        **tile.options,
    )


@jit()
def _sequence_of(
    block: tl.tensor, cu_seqlens_q: tl.tensor, num_sequences: tl.tensor, BLOCK_Q: tl.constexpr
) -> tl.tensor:
    """Find (sequence, number within it) of a block of BLOCK_Q queries.

    Blocks are numbered so that this needs no table: sequence b has those from cu_seqlens_q[b] // BLOCK_Q + b on, which
    are enough for its queries, since rounding down loses less than the one block that `+ b` gives. Some are left over,
    and those before the first sequence's rows have a negative number.
    """
    low, high = num_sequences * 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= block
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low, block - (tl.load(cu_seqlens_q + low) // BLOCK_Q + low)


@jit()
def _queries_of(
    block: tl.tensor,
    cu_seqlens_q: tl.tensor,
    num_sequences: tl.tensor,
    QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> tl.tensor:
    """Find (sequence, number within it, its first row of queries, how many it has) of a block of BLOCK_Q queries."""
    if QUERIES > 0:
        per_sequence: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q
        b, number = block // per_sequence, block % per_sequence
        begin, num_queries = b * QUERIES, tl.where(b < num_sequences, QUERIES, 0)
        b = tl.minimum(b, num_sequences - 1)
    else:
        b, number = _sequence_of(block, cu_seqlens_q, num_sequences, BLOCK_Q)
        begin = tl.load(cu_seqlens_q + b)
        num_queries = tl.load(cu_seqlens_q + b + 1) - begin
    return b, number, begin, num_queries


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


@jit("num_sequences")
def _prefill_kernel(
    out: tl.tensor,  # (T, N, H)
    q: tl.tensor,  # (T, N, H)
    keys: tl.tensor,  # (P, PAGE_SIZE, K, H)
    values: tl.tensor,
    page_table: tl.tensor,  # (B, max_pages) int32
    seq_lens: tl.tensor,  # (B,) int32
    cu_seqlens_q: tl.tensor,  # (B + 1,) int32; unused if QUERIES is given
    num_sequences: tl.tensor,
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
    QUERIES: tl.constexpr,  # of every sequence; 0: see cu_seqlens_q
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most keys: begin with them
    kv_head = tl.program_id(1).to(tl.int64)
    b, number, begin, num_queries = _queries_of(block, cu_seqlens_q, num_sequences, QUERIES, BLOCK_Q)
    if (number >= 0) & (number * BLOCK_Q < num_queries):
        length = tl.load(seq_lens + b)
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)[None, :]
        token, head = number * BLOCK_Q + rows // GROUP, kv_head * GROUP + rows % GROUP
        inside = ((rows < BLOCK_Q * GROUP) & (token < num_queries))[:, None] & (dims < H)
        row = (begin + token).to(tl.int64)
        queries = tl.load(q + (row * q_row + head * q_head)[:, None] + dims, mask=inside, other=0.0)
        low, ends = _keys_of(length - num_queries + number * BLOCK_Q, length, WINDOW, BLOCK_Q, BLOCK_N)
        table, positions = page_table + b.to(tl.int64) * table_row, length - num_queries + token
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
