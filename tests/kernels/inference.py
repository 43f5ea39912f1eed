"""What tests of kernels for serving share: numbers, tolerances, and launches of attention over pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.kernels.test_kernels import DEVICE
from yafsdp_like.kernels.decode_attention import decode_attention, workspace_numel
from yafsdp_like.kernels.paged_attention import AttentionBatch, KVPages, attention_reference
from yafsdp_like.kernels.prefill_attention import prefill_attention
from yafsdp_like.kernels.query_tiles import TILE_COLS, max_num_tiles, queries_per_tile, write_tiles

F32, BF16, F16, F8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
TOLERANCES = {F32: 1e-5, BF16: 2**-7, F16: 2**-9}  # of what is rounded to the dtype on the way, too
ROUNDED_ONCE = {F32: 2e-6, BF16: 2**-8, F16: 2**-11}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def int32(values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_near(found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]) -> None:
    tolerance = tolerances[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@dataclass(frozen=True)
class Shape:
    """Of one launch; `num_new[b]` queries end a sequence of `seq_lens[b]` tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    seq_lens: tuple[int, ...]
    num_new: tuple[int, ...]
    window: int | None = None
    dtype: torch.dtype = F32
    page_dtype: torch.dtype = F32
    heads_first: bool = False  # in a page's memory: (K, page_size, H)


def paged(shape: Shape) -> tuple[KVPages, AttentionBatch]:
    """Make random pages in random order, with space between them.

    Page 0 is poisoned, and table entries that no query needs lead there. What follows a sequence's last token is
    poisoned too.
    """
    counts = [-(-length // shape.page_size) for length in shape.seq_lens]
    num_pages = 1 + sum(counts)
    region = random(num_pages, 2, shape.page_size, shape.num_kv_heads, shape.head_dim)
    region[0] = math.nan
    order = iter((1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(1))).tolist())
    table = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
    for b, (count, length, num_new) in enumerate(zip(counts, shape.seq_lens, shape.num_new, strict=True)):
        behind = 0 if shape.window is None else max(length - num_new - shape.window + 1, 0) // shape.page_size
        for i in range(count):
            page = next(order)
            table[b, i] = page * (i >= behind)
            region[page, :, length - i * shape.page_size :] = math.nan
    region = region.to(shape.page_dtype)
    if shape.heads_first:
        region = region.transpose(2, 3).contiguous().transpose(2, 3)
    pages = KVPages(region[:, 0], region[:, 1], key_scale=0.75, value_scale=1.5)
    return pages, AttentionBatch(table.to(DEVICE), int32(shape.seq_lens), tiles_of(shape))


def tiles_of(shape: Shape, num_before: int = 0, spare: int = 3) -> Tensor:
    """The work list of a launch whose first sequence's rows begin at `num_before`, and places that it does not need."""
    per_tile = queries_per_tile(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype.itemsize)
    chunks = [
        (num_before + sum(shape.num_new[:b]), num_new, length - num_new, b)
        for b, (length, num_new) in enumerate(zip(shape.seq_lens, shape.num_new, strict=True))
    ]
    most = max_num_tiles(sum(shape.num_new), len(chunks), per_tile) + spare
    tiles = np.full((1 + most, TILE_COLS), -7, dtype=np.int32)
    write_tiles(tiles, np.array(chunks), per_tile)
    return torch.from_numpy(tiles).to(DEVICE)


def queries(shape: Shape) -> tuple[Tensor, Tensor]:
    """Queries that are part of wider rows, and room for the output, with wider rows too."""
    num_rows, num_heads, head_dim = sum(shape.num_new), shape.num_heads, shape.head_dim
    q = random(num_rows, num_heads + 3, head_dim, seed=2, dtype=shape.dtype)[:, 1 : num_heads + 1]
    return q, torch.full((num_rows, num_heads + 1, head_dim), 7.0, dtype=shape.dtype, device=DEVICE)[:, :num_heads]


def expected_attention(shape: Shape) -> Tensor:
    (pages, batch), (q, out) = paged(shape), queries(shape)
    attention_reference(q, pages, batch, out, shape.window)
    return out


def decoded(shape: Shape, num_splits: int) -> Tensor:
    (pages, batch), (q, out) = paged(shape), queries(shape)
    numel = workspace_numel(len(q), shape.num_heads, shape.head_dim, num_splits)
    workspace = torch.full((numel,), math.nan, device=DEVICE)
    decode_attention(
        q, pages, AttentionBatch(batch.page_table, batch.seq_lens), out, workspace, num_splits, shape.window
    )
    return out


def prefilled(shape: Shape) -> Tensor:
    (pages, batch), (q, out) = paged(shape), queries(shape)
    prefill_attention(q, pages, batch, out, shape.window)
    return out
