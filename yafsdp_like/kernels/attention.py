"""Attention over keys and values that lie in pages: of few queries a sequence (decoding) and of many (prefill).

The query at position i of a sequence sees the keys at positions j with 0 <= i - j < window; the last query of a
sequence is at its last position, and the new tokens' keys are in their pages already. Query heads in groups of N / K
share a key and value head. Scores are scaled by H^-0.5.

This file knows pages and page tables, not who owns them. Nothing is allocated in a launch, and no grid depends on
lengths, which kernels read on the device: a captured graph serves all later lengths. Prefill has another kernel for
Hopper GPUs in `prefill_hopper.py`, and the one here for all else.

Shapes: B sequences, T rows of queries, N heads, K kv heads, H head dim, P pages.

[Note: softmax in pieces]
A program keeps, for each of its rows, the highest score seen, the sum of 2^(score - highest) and the sum of the values
so weighted; scores are in units of ln 2. Two pieces join by scaling both to the higher of their highest scores (Dao et
al., "FlashAttention", 2022, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from yafsdp_like.kernels import prefill_hopper
from yafsdp_like.kernels.blocks import INTERPRETED, jit, launching_on, rounded, runs_on, tl

_LOG2_E = math.log2(math.e)
_MIN_ROWS = 16  # of a matrix product's left side
_WAVES = 3  # programs per multiprocessor that keep its memory busy
_MIN_KEYS_PER_SPLIT = 128
_SPLITS_AT_ONCE = 16  # that are joined
_INTERPRETED = tl.constexpr(INTERPRETED) if tl else None


@dataclass(frozen=True)
class KVPages:
    """One layer's pages. What is stored, times a scale, are keys and values.

    Raises `ValueError` for shapes, strides, dtypes or scales that cannot be read.
    """

    keys: Tensor  # (P, page_size, K, H) in float32, bfloat16, float16 or float8_e4m3fn; dense in the last dim alone
    values: Tensor  # of the same shape and dtype
    key_scale: float = 1.0  # positive
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, pages in (("keys", self.keys), ("values", self.values)):
            if pages.dim() != 4 or pages.stride(3) != 1:
                raise ValueError(
                    f"{name}: expected pages (P, page_size, K, H) with dense heads, "
                    f"found shape {tuple(pages.shape)}, strides {pages.stride()}"
                )
        if self.keys.shape != self.values.shape or self.keys.dtype != self.values.dtype:
            raise ValueError(
                f"expected keys and values alike, found {tuple(self.keys.shape)} in {self.keys.dtype} "
                f"and {tuple(self.values.shape)} in {self.values.dtype}"
            )
        if not self.key_scale > 0:
            raise ValueError(f"expected a key_scale above 0, found {self.key_scale}")

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3]

    @cached_property
    def copyable(self) -> bool:
        """Whether Hopper's copies bring them."""
        return prefill_hopper.copyable(self.keys) and prefill_hopper.copyable(self.values)

    @cached_property
    def boxes(self) -> prefill_hopper.PageBoxes:
        """How they do, if they do."""
        return prefill_hopper.PageBoxes.of(self.keys, self.values)

    @property
    def constants(self) -> dict[str, int]:
        return {"PAGE_SIZE": self.page_size, "H": self.head_dim, "BLOCK_H": _block(self.head_dim)}


@dataclass(frozen=True)
class AttentionBatch:
    """Where the sequences of a batch are. A sequence of length 0, or without queries, is padding.

    Entries of the page table that only lead to keys which no query sees may hold anything: those past a length, and
    those that a window has left behind, whose pages a ring may have given to later positions. So may a last page behind
    the length; but before it, pages that some query sees hold finite numbers.
    """

    page_table: Tensor  # (B, max_pages) int32: the page of positions [i * page_size, (i + 1) * page_size)
    seq_lens: Tensor  # (B,) int32: tokens of each sequence in its pages, new ones included
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32: rows of queries before each sequence's; None: T / B each

    @property
    def size(self) -> int:
        return len(self.seq_lens)


def attention_reference(
    q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int | None = None
) -> None:
    """What `prefill_attention` and `decode_attention` do, in plain torch and float32."""
    num_rows = len(q) // batch.size
    cu_seqlens_q = (
        [num_rows * b for b in range(batch.size + 1)] if batch.cu_seqlens_q is None else batch.cu_seqlens_q.tolist()
    )
    for b, length in enumerate(batch.seq_lens.tolist()):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1])
        num_queries = cu_seqlens_q[b + 1] - cu_seqlens_q[b]
        first = 0 if window is None else max(length - num_queries - window + 1, 0)
        k, v = _gathered(pages, batch.page_table[b], first, length)
        positions = torch.arange(length - num_queries, length, device=q.device)
        distance = positions[:, None] - torch.arange(first, length, device=q.device)
        seen = (distance >= 0) & (distance < (window or length + 1))
        out[rows] = _attend_dense(q[rows].float(), k, v, seen).to(out.dtype)


def _gathered(pages: KVPages, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Keys and values (last - first, K, H) of positions [first, last) in float32."""
    positions = torch.arange(first, last, device=table.device)
    page, offset = table[positions // pages.page_size].long(), positions % pages.page_size
    return pages.keys[page, offset].float() * pages.key_scale, pages.values[page, offset].float() * pages.value_scale


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Queries (T, N, H) over keys and values (L, K, H), where `seen` (T, L); zeros where nothing is."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # (T, K, N / K, H)
    scores = torch.einsum("tkgh,lkh->kgtl", grouped, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("kgtl,lkh->tkgh", weights, v).flatten(1, 2)


def choose_num_splits(batch_size: int, num_kv_heads: int, max_length: int, num_multiprocessors: int) -> int:
    """Pieces into which to cut every sequence's keys, so that the programs keep all multiprocessors busy.

    A sequence's output depends in its last bits on this number, but not on the other sequences: with one number for
    all batches, a sequence gives the same bits in each of them.
    """
    wanted = _WAVES * num_multiprocessors // (batch_size * num_kv_heads)
    return max(1, min(wanted, -(-max_length // _MIN_KEYS_PER_SPLIT)))


def workspace_numel(num_rows: int, num_heads: int, head_dim: int, num_splits: int) -> int:
    """Elements of the float32 workspace of `decode_attention` for T = `num_rows` queries."""
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
    """Attention of T / B queries for each of B sequences, on the current stream: one program per piece of keys.

    Args:
        q: `(T, N, H)`, heads dense; the rows of a sequence are together.
        pages: K divides N.
        batch: without `cu_seqlens_q`.
        out: `(T, N, H)`, heads dense, in the dtype of q. A row that sees nothing becomes zeros.
        workspace: flat float32, at least `workspace_numel(T, N, H, num_splits)` elements; overwritten.
        num_splits: pieces of a sequence's keys; see `choose_num_splits`.
        window: keys that a query sees at most, its own included.

    Raises `ValueError` for shapes, dtypes or strides that do not fit.
    """
    _check(q, pages, batch, out)
    needed = workspace_numel(len(q), q.shape[1], q.shape[2], num_splits)
    if batch.cu_seqlens_q is not None or len(q) % batch.size:
        raise ValueError(f"expected equally many queries for each of {batch.size} sequences, found {len(q)} rows")
    if workspace.numel() < needed or workspace.dtype != torch.float32:
        raise ValueError(
            f"expected a float32 workspace of {needed} elements, found {workspace.numel()} in {workspace.dtype}"
        )
    if not runs_on(q.device):
        attention_reference(q, pages, batch, out, window)
    elif len(q):
        with launching_on(q.device):
            _launch_decode(q, pages, batch, out, workspace, num_splits, window or 0)


def prefill_attention(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int | None = None) -> None:
    """Attention of any number of queries for each of B sequences, on the current stream: one program per tile of them.

    The arguments are those of `decode_attention`; `batch` may have `cu_seqlens_q`, whose last is at most T. Rows
    past it are not written. Raises `ValueError` for shapes, dtypes or strides that do not fit.
    """
    _check(q, pages, batch, out)
    if batch.cu_seqlens_q is None and len(q) % batch.size:
        raise ValueError(f"expected equally many queries for each of {batch.size} sequences, found {len(q)} rows")
    if not runs_on(q.device):
        attention_reference(q, pages, batch, out, window)
    elif len(q):
        with launching_on(q.device):
            if prefill_hopper.AVAILABLE and prefill_hopper.fits(q, pages, batch, _capability(q.device)):
                prefill_hopper.launch(q, pages, batch, out, window or 0)
            else:
                _launch_prefill(q, pages, batch, out, window or 0)


def _check(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor) -> None:
    if q.dim() != 3 or q.shape[2] != pages.head_dim or q.shape[1] % pages.num_kv_heads or q.stride(2) != 1:
        raise ValueError(
            f"expected q (T, N, {pages.head_dim}) with dense heads, N a multiple of {pages.num_kv_heads}, "
            f"found shape {tuple(q.shape)}, strides {q.stride()}"
        )
    if out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(
            f"expected out {tuple(q.shape)} in {q.dtype} with dense heads, "
            f"found {tuple(out.shape)} in {out.dtype}, strides {out.stride()}"
        )
    tables = [
        batch.page_table,
        batch.seq_lens,
        *([] if batch.cu_seqlens_q is None else [batch.cu_seqlens_q]),
    ]
    for tensor in tables:
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"expected dense int32 tables, found {tensor.dtype} with strides {tensor.stride()}")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of what is not a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class _Tile:
    """What a program holds of the scores at a time, and how it is compiled."""

    num_rows: int
    num_cols: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread's; None: as many as it wants

    @property
    def options(self) -> dict[str, int | None]:
        return {
            "BLOCK_M": self.num_rows,
            "BLOCK_N": self.num_cols,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


def _tile(num_rows: int, num_warps: int, q: Tensor, pages: KVPages) -> _Tile:
    """Keys of 8 to 16 KiB at a time, so that two or three stages of them and of values fit beside the queries."""
    row_nbytes = _power_of_2(pages.head_dim) * q.element_size()
    num_cols = 64 if row_nbytes <= 256 else 32
    return _Tile(num_rows, num_cols, num_warps, 3 if row_nbytes <= 512 else 2)


def _prefill_tile(q: Tensor, pages: KVPages, capability: tuple[int, int]) -> _Tile:
    """32 KiB of queries, or one token's.

    On Hopper, 128 registers let two programs share a multiprocessor, one's softmax beside the other's products. That is
    worth more than what then goes to memory and back.
    """
    num_rows = min(128, 32_768 // (_power_of_2(pages.head_dim) * q.element_size()))
    group = q.shape[1] // pages.num_kv_heads
    tile = _tile(max(num_rows, _power_of_2(group)), 8 if num_rows == 128 else 4, q, pages)
    two_fit = capability[0] == 9 and tile.num_rows == 128 and q.element_size() == 2
    return replace(tile, max_registers=128) if two_fit else tile


def _scalars(pages: KVPages) -> tuple[float, float]:
    """What products of queries and stored keys are multiplied by, and what sums of stored values are."""
    return pages.key_scale * pages.head_dim**-0.5 * _LOG2_E, pages.value_scale


def _strides(pages: KVPages) -> tuple[int, ...]:
    """From a page, a token and a head to the next, of keys and of values."""
    return (*pages.keys.stride()[:3], *pages.values.stride()[:3])


def _launch_decode(
    q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, workspace: Tensor, num_splits: int, window: int
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_queries, group = len(q) // batch.size, num_heads // pages.num_kv_heads
    tile = _tile(max(_MIN_ROWS, _power_of_2(num_queries * group)), 4, q, pages)
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
        *_scalars(pages),
        *q.stride()[:2],
        *out.stride()[:2],
        *_strides(pages),
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
            BLOCK_H=_block(head_dim),
            **shared,
            BLOCK_S=_SPLITS_AT_ONCE,
            num_warps=2,
            enable_fp_fusion=True,
        )


def _launch_prefill(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int) -> None:
    group = q.shape[1] // pages.num_kv_heads
    tile = _prefill_tile(q, pages, _capability(q.device))
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
        *_scalars(pages),
        *q.stride()[:2],
        *out.stride()[:2],
        *_strides(pages),
        batch.page_table.stride(0),
        GROUP=group,
        QUERIES=len(q) // batch.size if batch.cu_seqlens_q is None else 0,
        WINDOW=window,
        **pages.constants,
        **tile.options,
    )


def _block(head_dim: int) -> int:
    """Elements of a head that a program holds, past its end too: products need 16 at least."""
    return max(16, _power_of_2(head_dim))


def _power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


@jit()
def _dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    if _INTERPRETED:  # where bfloat16 would be multiplied as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")  # of float32: nearly all its bits


@jit()
def _attend(
    state: tl.tensor,  # of each row: sum of weighted values (BLOCK_M, BLOCK_H), highest score, sum of weights
    q: tl.tensor,  # (BLOCK_M, BLOCK_H)
    positions: tl.tensor,  # (BLOCK_M,) of the queries
    keys: tl.tensor,  # at this head
    values: tl.tensor,
    table: tl.tensor,  # this sequence's row
    bounds: tl.tensor,  # first key of the loop, a multiple of BLOCK_N; end of the loop; first and end of what is seen
    strides: tl.tensor,
    score_scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,  # whether some query does not see some key of the loop
) -> tl.tensor:
    weighted, highest, total = state
    first, last, low, end = bounds
    key_page, key_token, value_page, value_token = strides
    dims = tl.arange(0, BLOCK_H)
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (cols >= low) & (cols < end)
        if PAGE_SIZE % BLOCK_N == 0:
            page = tl.load(table + start // PAGE_SIZE).to(tl.int64)
        elif MASKED:
            page = tl.load(table + cols // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        else:
            page = tl.load(table + cols // PAGE_SIZE).to(tl.int64)
        offset = (cols % PAGE_SIZE).to(tl.int64)
        key_pointers = keys + (page * key_page + offset * key_token)[:, None] + dims[None, :]
        value_pointers = values + (page * value_page + offset * value_token)[:, None] + dims[None, :]
        if MASKED:
            k = tl.load(key_pointers, mask=inside[:, None] & (dims[None, :] < H), other=0.0)
            v = tl.load(value_pointers, mask=inside[:, None] & (dims[None, :] < H), other=0.0)
        elif H == BLOCK_H:
            k, v = tl.load(key_pointers), tl.load(value_pointers)
        else:
            k = tl.load(key_pointers, mask=dims[None, :] < H, other=0.0)
            v = tl.load(value_pointers, mask=dims[None, :] < H, other=0.0)

        scores = _dot(q, tl.trans(k.to(q.dtype))) * score_scale
        if MASKED:
            seen = inside[None, :] & (cols[None, :] <= positions[:, None])
            if WINDOW > 0:
                seen = seen & (cols[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # of a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        scale = tl.exp2(highest - base)
        total = total * scale + tl.sum(weights, 1)
        weighted = weighted * scale[:, None] + _dot(rounded(weights, q.dtype), v.to(q.dtype))
        highest = higher
    return weighted, highest, total


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
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
        token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
        inside = (rows < QUERIES * GROUP)[:, None] & (dims[None, :] < H)
        row = b * QUERIES + token
        queries = tl.load(q + (row * q_row + head * q_head)[:, None] + dims[None, :], mask=inside, other=0.0)
        state = (
            tl.zeros((BLOCK_M, BLOCK_H), tl.float32),
            tl.full((BLOCK_M,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_M,), tl.float32),
        )
        weighted, highest, total = _attend(
            state,
            queries,
            length - QUERIES + token,
            keys + kv_head * key_head,
            values + kv_head * value_head,
            page_table + b * table_row,
            (start, end, low, end),
            (key_page, key_token, value_page, value_token),
            score_scale,
            WINDOW,
            PAGE_SIZE,
            H,
            BLOCK_H,
            BLOCK_N,
            MASKED=True,  # costs nothing beside the loads
        )
        result = weighted * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        if WHOLE:
            pointers = out + (row * out_row + head * out_head)[:, None] + dims[None, :]
            tl.store(pointers, rounded(result, out.dtype.element_ty), mask=inside)
        else:
            num_heads = tl.num_programs(1) * GROUP
            piece = (row * num_heads + head) * num_splits + split
            tl.store(partial + piece[:, None] * H + dims[None, :], result, mask=inside)
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


@jit()
def _sequence_of(
    block: tl.tensor, cu_seqlens_q: tl.tensor, num_sequences: tl.tensor, BLOCK_Q: tl.constexpr
) -> tl.tensor:
    """(sequence, number within it) of a block of BLOCK_Q queries.

    Blocks are numbered so that this needs no table: sequence b has those from cu_seqlens_q[b] // BLOCK_Q + b on, which
    are enough for its queries, since rounding down loses less than the one block that `+ b` gives. Some are left over.
    """
    low, high = num_sequences * 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= block
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low, block - (tl.load(cu_seqlens_q + low) // BLOCK_Q + low)


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
    if QUERIES > 0:
        per_sequence: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q
        b, number = block // per_sequence, block % per_sequence
        begin, num_queries = b * QUERIES, tl.where(b < num_sequences, QUERIES, 0)
        b = tl.minimum(b, num_sequences - 1)
    else:
        b, number = _sequence_of(block, cu_seqlens_q, num_sequences, BLOCK_Q)
        begin = tl.load(cu_seqlens_q + b)
        num_queries = tl.load(cu_seqlens_q + b + 1) - begin
    if number * BLOCK_Q < num_queries:
        length = tl.load(seq_lens + b)
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
        token, head = number * BLOCK_Q + rows // GROUP, kv_head * GROUP + rows % GROUP
        inside = ((rows < BLOCK_Q * GROUP) & (token < num_queries))[:, None] & (dims[None, :] < H)
        row = (begin + token).to(tl.int64)
        queries = tl.load(q + (row * q_row + head * q_head)[:, None] + dims[None, :], mask=inside, other=0.0)

        # Of the keys, those up to `bottom` and from `top` on are seen by some queries only.
        lowest = length - num_queries + number * BLOCK_Q  # position of the first query, then of the last
        end = tl.minimum(lowest + BLOCK_Q, length)
        low = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW > 0 else lowest * 0
        first = low // BLOCK_N * BLOCK_N
        bottom = tl.maximum(tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N, first) if WINDOW > 0 else first
        top = tl.maximum((lowest + 1) // BLOCK_N * BLOCK_N, bottom)
        state = (
            tl.zeros((BLOCK_M, BLOCK_H), tl.float32),
            tl.full((BLOCK_M,), float("-inf"), tl.float32),
            tl.zeros((BLOCK_M,), tl.float32),
        )
        ends = (first, bottom, top, end)
        for part in tl.static_range(0 if WINDOW > 0 else 1, 3):
            state = _attend(
                state,
                queries,
                length - num_queries + token,
                keys + kv_head * key_head,
                values + kv_head * value_head,
                page_table + b.to(tl.int64) * table_row,
                (ends[part], ends[part + 1], low, end),
                (key_page, key_token, value_page, value_token),
                score_scale,
                WINDOW,
                PAGE_SIZE,
                H,
                BLOCK_H,
                BLOCK_N,
                MASKED=part != 1,
            )
        weighted, _, total = state
        result = weighted * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        pointers = out + (row * out_row + head * out_head)[:, None] + dims[None, :]
        tl.store(pointers, rounded(result, out.dtype.element_ty), mask=inside)
