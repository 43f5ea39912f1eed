"""What decode and prefill attention share: paged keys and values, their checks, the reference, and the inner loop.

The query at position i of a sequence sees the keys at positions j with 0 <= i - j < window; the last query of a
sequence is at its last position, and the new tokens' keys are in the pages already. Query heads in groups of N / K
share a key and value head. Scores are scaled by H^-0.5.

The kernels know pages and page tables, not who owns them. A launch allocates nothing, and no grid depends on lengths,
which kernels read on the device: a captured graph serves all later lengths.

Shapes: B sequences, T rows of queries, N heads, K kv heads, H head dim, P pages.

[Note: online softmax]
A program keeps, for each of its rows, the highest score so far, the sum of 2^(score - highest) and the sum of the
values with these weights; scores are in units of ln 2. Two partial results are combined by rescaling both to the
higher of their highest scores (Dao et al., "FlashAttention", 2022, section 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import dot, jit, rounded, tl

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)  # as keys of dicts: by identity
class KVPages:
    """One layer's pages of the KV cache; keys and values are what is stored times a scale.

    Raises `ValueError` for shapes, strides, dtypes or scales that kernels cannot read.
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
        """Number of tokens in a page."""
        return self.keys.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.keys.shape[2]

    @property
    def head_dim(self) -> int:
        """H."""
        return self.keys.shape[3]

    @property
    def constants(self) -> dict[str, int]:
        """Constants that every attention kernel is compiled with."""
        return {"PAGE_SIZE": self.page_size, "H": self.head_dim, "BLOCK_H": block_of(self.head_dim)}

    @property
    def scales(self) -> tuple[float, float]:
        """Factors of products of queries with stored keys (in units of ln 2), and of sums of stored values."""
        return self.key_scale * self.head_dim**-0.5 * LOG2_E, self.value_scale

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of page, token and head, of keys and then of values."""
        return (*self.keys.stride()[:3], *self.values.stride()[:3])


@dataclass(frozen=True)
class AttentionBatch:
    """Page tables and lengths of the sequences of a batch; one of length 0, or without tiles, is padding.

    Entries of the page table whose keys no query sees may hold anything: those past the length, and those before the
    window, whose pages may hold later positions of a ring. So may the rest of a last page past the length; all other
    positions of pages that some query sees hold finite numbers.
    """

    page_table: Tensor  # (B, max_pages) int32: the page of positions [i * page_size, (i + 1) * page_size)
    seq_lens: Tensor  # (B,) int32: tokens of each sequence in its pages, new ones included
    tiles: Tensor | None = None  # (1 + n, 4) int32: whose queries there are, see `query_tiles.py`; None: T / B each

    @property
    def size(self) -> int:
        """B."""
        return len(self.seq_lens)


def attention_reference(
    q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int | None = None
) -> None:
    """Compute what `prefill_attention` and `decode_attention` do, in plain torch and float32."""
    for b, (begin, num_queries, length) in _queries_of(batch, len(q)).items():
        rows = slice(begin, begin + num_queries)
        first = 0 if window is None else max(length - num_queries - window + 1, 0)
        k, v = _read_pages(pages, batch.page_table[b], first, length)
        positions = torch.arange(length - num_queries, length, device=q.device)
        distance = positions[:, None] - torch.arange(first, length, device=q.device)
        seen = (distance >= 0) & (distance < (window or length + 1))
        out[rows] = _attend_dense(q[rows].float(), k, v, seen).to(out.dtype)


def _queries_of(batch: AttentionBatch, num_rows: int) -> dict[int, tuple[int, int, int]]:
    """Return, by row of the page table, the first row of queries, how many there are, and the sequence's length."""
    if batch.tiles is None:
        each = num_rows // batch.size
        return {b: (b * each, each, length) for b, length in enumerate(batch.seq_lens.tolist())}
    chunks: dict[int, tuple[int, int, int]] = {}
    for begin, num_left, position, b in sorted(batch.tiles[1 : 1 + int(batch.tiles[0, 0])].tolist()):
        chunks.setdefault(b, (begin, num_left, position + num_left))  # of a chunk's first tile
    return chunks


def _read_pages(pages: KVPages, table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return keys and values (last - first, K, H) of positions [first, last) in float32."""
    positions = torch.arange(first, last, device=table.device)
    page, offset = table[positions // pages.page_size].long(), positions % pages.page_size
    return pages.keys[page, offset].float() * pages.key_scale, pages.values[page, offset].float() * pages.value_scale


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attend with queries (T, N, H) to keys and values (L, K, H) under the mask `seen` (T, L); all False: zeros."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # (T, K, N / K, H)
    scores = torch.einsum("tkgh,lkh->kgtl", grouped, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("kgtl,lkh->tkgh", weights, v).flatten(1, 2)


def check(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor) -> None:
    """Raise `ValueError` for shapes, dtypes or strides that do not fit."""
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
        *([] if batch.tiles is None else [batch.tiles]),
    ]
    for tensor in tables:
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"expected dense int32 tables, found {tensor.dtype} with strides {tensor.stride()}")


def check_equal_queries(q: Tensor, batch: AttentionBatch) -> None:
    """Raise `ValueError` unless every sequence can have equally many rows of queries."""
    if len(q) % batch.size:
        raise ValueError(f"expected equally many queries for each of {batch.size} sequences, found {len(q)} rows")


@dataclass(frozen=True)
class Tile:
    """The block of scores that a program computes at a time, and how it is compiled."""

    num_rows: int
    num_cols: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread's; None: as many as it wants

    @property
    def options(self) -> dict[str, int | None]:
        """Arguments of a launch."""
        return {
            "BLOCK_M": self.num_rows,
            "BLOCK_N": self.num_cols,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


def choose_tile(num_rows: int, num_warps: int, q: Tensor, pages: KVPages) -> Tile:
    """Choose 8 to 16 KiB of keys at a time, so that two or three stages of keys and values fit beside the queries."""
    row_nbytes = power_of_2(pages.head_dim) * q.element_size()
    num_cols = 64 if row_nbytes <= 256 else 32
    return Tile(num_rows, num_cols, num_warps, 3 if row_nbytes <= 512 else 2)


def block_of(head_dim: int) -> int:
    """Round a head dim up to the number of elements that a program holds: matrix products need at least 16."""
    return max(16, power_of_2(head_dim))


def power_of_2(n: int) -> int:
    """Round up to a power of 2."""
    return 1 << (n - 1).bit_length()


@jit()
def empty_state(BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr) -> tl.tensor:
    """(sum of weighted values, highest score, sum of weights) of rows that have seen no key."""
    return (
        tl.zeros((BLOCK_M, BLOCK_H), tl.float32),
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
    )


@jit()
def _load_keys_and_values(
    kv: tl.tensor,  # as `attend` takes it
    start: tl.tensor,
    cols: tl.tensor,  # (BLOCK_N,) positions from start on
    inside: tl.tensor,  # (BLOCK_N,): which of them some query sees
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Keys and values (BLOCK_N, BLOCK_H) as stored."""
    keys, values, table, key_page, key_token, value_page, value_token = kv
    dims = tl.arange(0, BLOCK_H)
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
    return k, v


@jit()
def attend(
    state: tl.tensor,  # of each row: sum of weighted values (BLOCK_M, BLOCK_H), highest score, sum of weights
    q: tl.tensor,  # (BLOCK_M, BLOCK_H)
    positions: tl.tensor,  # (BLOCK_M,) of the queries
    kv: tl.tensor,  # keys and values at this head; this sequence's page table; strides of page and token of both
    bounds: tl.tensor,  # first key of the loop, a multiple of BLOCK_N; end of the loop; first and end of what is seen
    score_scale: tl.tensor,
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,  # whether some query does not see some key of the loop
) -> tl.tensor:
    """Add the keys of a loop to `state`. See [Note: online softmax]."""
    weighted, highest, total = state
    first, last, low, end = bounds
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (cols >= low) & (cols < end)
        k, v = _load_keys_and_values(kv, start, cols, inside, PAGE_SIZE, H, BLOCK_H, BLOCK_N, MASKED)
        scores = dot(q, tl.trans(k.to(q.dtype))) * score_scale
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
        weighted = weighted * scale[:, None] + dot(rounded(weights, q.dtype), v.to(q.dtype))
        highest = higher
    return weighted, highest, total


@jit()
def normalize(weighted: tl.tensor, total: tl.tensor, value_scale: tl.tensor) -> tl.tensor:
    """Outputs of rows, zeros where a row has seen nothing."""
    return weighted * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
