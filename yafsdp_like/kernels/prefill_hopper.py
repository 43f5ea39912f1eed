"""Prefill attention on Hopper GPUs, where copies and matrix products run beside the warps that issue them.

The kernel computes what that of `prefill_attention.py` does; it is written in Gluon, since Triton cannot express warps
with different work. `fits` says which launches it takes. Shapes and formulas: `paged_attention.py`. The work of its
warps: `hopper_warps.py`, [Note: the warps of a program] and [Note: boxes of pages].
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from yafsdp_like.kernels.blocks import INTERPRETED
from yafsdp_like.kernels.hopper_warps import allocate_barriers, allocate_blocks, consume, gl, gluon, jit, produce

if TYPE_CHECKING:
    from torch import Tensor

    from yafsdp_like.kernels.paged_attention import AttentionBatch, KVPages

if gluon:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

AVAILABLE = gluon is not None and torch.version.cuda is not None and not INTERPRETED

_ROWS = 128  # of a tile: 64 of each consumer
_BLOCK_N = 128
_STAGES = 2
_BOX_COLS = 64
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24  # a thread's: of 64 Ki, twice 128 threads and one warp get theirs


def fits(q: Tensor, pages: KVPages, capability: tuple[int, int]) -> bool:
    """Return whether `launch` takes what `prefill_attention` accepts, on a GPU of this compute capability.

    It does on 9.x if queries and pages have one dtype, bfloat16 or float16; at most 128 heads share a kv head; and
    pages are copyable (`_is_copyable`). Windows, scales, and strides of queries and output may be any.
    """
    return (
        capability[0] == 9
        and q.dtype == pages.keys.dtype
        and q.shape[1] // pages.num_kv_heads <= _ROWS
        and _boxes_of(pages).copyable
    )


def _is_copyable(pages: Tensor) -> bool:
    """Return whether TMA copies can read pages (P, page_size, K, H), with whole boxes in a block.

    They do if the dtype is bfloat16 or float16, H is 64 or 128, page_size is 16, 32, 64 or a multiple of 128, and the
    address and all strides but the last are multiples of 16 bytes.
    """
    return (
        pages.dtype in (torch.bfloat16, torch.float16)
        and pages.shape[3] in (64, 128)
        and (pages.shape[1] in (16, 32, 64) or pages.shape[1] % _BLOCK_N == 0)
        and pages.numel() > 0
        and pages.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in pages.stride()[:3])
    )


class _PageBoxes:
    """One layer's pages as tensor maps, which each launch passes by value."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.copyable = _is_copyable(keys) and _is_copyable(values)

    @cached_property
    def descriptors(self) -> tuple[Any, Any]:
        """Tensor maps of keys and of values, if they are copyable."""
        box = [1, min(self._keys.shape[1], _BLOCK_N), 1, _BOX_COLS]
        layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        keys, values = (TensorDescriptor.from_tensor(pages, box, layout) for pages in (self._keys, self._values))
        return keys, values


_boxes: WeakKeyDictionary[KVPages, _PageBoxes] = WeakKeyDictionary()  # they cost more than a launch


def _boxes_of(pages: KVPages) -> _PageBoxes:
    found = _boxes.get(pages)
    if found is None:
        found = _boxes[pages] = _PageBoxes(pages.keys, pages.values)
    return found


def launch(q: Tensor, pages: KVPages, batch: AttentionBatch, out: Tensor, window: int) -> None:
    """Launch the kernel with the arguments of `prefill_attention`, if it `fits`; `window` 0: none."""
    group = q.shape[1] // pages.num_kv_heads
    assert batch.tiles is not None, "checked"
    max_items = (len(batch.tiles) - 1) * pages.num_kv_heads
    _prefill_kernel[(min(max_items, _num_multiprocessors(q.device)),)](
        out,
        q,
        *_boxes_of(pages).descriptors,
        batch.page_table,
        batch.tiles,
        pages.num_kv_heads,
        *pages.scales,
        *q.stride()[:2],
        *out.stride()[:2],
        batch.page_table.stride(0),
        **constants(group, window, pages.page_size, pages.head_dim),
        num_warps=4,  # of the first consumer; the others' are named in the kernel
        enable_fp_fusion=True,
    )


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def constants(group: int, window: int, page_size: int, head_dim: int) -> dict[str, int]:
    """Return the constants that the kernel is compiled with, besides a dtype."""
    return {
        "GROUP": group,
        "WINDOW": window,
        "PAGE_SIZE": page_size,
        "H": head_dim,
        "BLOCK_M": _ROWS,
        "BLOCK_N": _BLOCK_N,
        "STAGES": _STAGES,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }


@jit("num_kv_heads")
def _prefill_kernel(
    out: gl.tensor,  # (T, N, H)
    q: gl.tensor,  # (T, N, H)
    key_boxes: gl.tensor,  # (P, PAGE_SIZE, K, H), by tensor maps
    value_boxes: gl.tensor,
    page_table: gl.tensor,  # (B, max_pages) int32
    query_tiles: gl.tensor,  # (1 + n, 4) int32
    num_kv_heads: gl.tensor,
    score_scale: gl.tensor,
    value_scale: gl.tensor,
    q_row: gl.tensor,  # strides
    q_head: gl.tensor,
    out_row: gl.tensor,
    out_head: gl.tensor,
    table_row: gl.tensor,
    GROUP: gl.constexpr,  # heads per kv head
    WINDOW: gl.constexpr,  # 0: none
    PAGE_SIZE: gl.constexpr,
    H: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
) -> None:
    BLOCK_Q: gl.constexpr = BLOCK_M // GROUP
    BOX: gl.constexpr = PAGE_SIZE if PAGE_SIZE < BLOCK_N else BLOCK_N
    dtype: gl.constexpr = q.dtype.element_ty
    k_slots, k_tiles = allocate_blocks(dtype, H, BOX, BLOCK_N, STAGES)
    v_slots, v_tiles = allocate_blocks(dtype, H, BOX, BLOCK_N, STAGES)
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, H], gl.NVMMASharedLayout(128, 16, rank=2))
    tiles, slots, boxes = (k_tiles, v_tiles), (k_slots, v_slots), (key_boxes, value_boxes)
    k_full, k_empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    v_full, v_empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    barriers = (k_full, k_empty, v_full, v_empty)
    landed = allocate_barriers(1, 1).index(0)
    work, pages = (query_tiles, num_kv_heads), (page_table, table_row)
    rows = (q, out, q_row, q_head, out_row, out_head, score_scale, value_scale)
    gl.warp_specialize(
        [  # tuples as they are: in a variable, constants become tensors
            (
                consume,
                (gl.constexpr(0), rows, q_tiles, tiles, barriers, work, GROUP, WINDOW, H, BLOCK_Q, BLOCK_N, STAGES),
            ),
            (
                consume,
                (gl.constexpr(64), rows, q_tiles, tiles, barriers, work, GROUP, WINDOW, H, BLOCK_Q, BLOCK_N, STAGES),
            ),
            (
                produce,
                (boxes, slots, barriers, landed, pages, work, WINDOW, PAGE_SIZE, H, BLOCK_Q, BLOCK_N, BOX, STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
