"""Rotary positions and the way into pages: queries and keys turned, keys and values stored, in one pass.

For each head x of queries and keys, with c and s the cosines and sines of its token:

    x = x * rsqrt(mean(x**2) + eps) * weight          if heads are normed
    x = [x1 * c - x2 * s, x2 * c + x1 * s]            x1, x2 the halves of x

in float32, rounded once. Queries go back to where they were; keys and values are divided by their pages' scale and go
into pages in their dtype, those of float8 clamped to what it can hold. This file knows no positions, only their tables.

Shapes: T tokens, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import INTERPRETED, jit, launching_on, rounded, runs_on, tl

if TYPE_CHECKING:
    from yafsdp_like.kernels.paged_attention import KVPages

_FLOAT8_MAX = 448.0
_ROUND_BY_HAND = tl.constexpr(INTERPRETED) if tl else None


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of each head of queries and of keys, before they are turned."""

    q_weight: Tensor  # (H,)
    k_weight: Tensor  # (H,)
    eps: float


def rotate_and_store_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    pages: KVPages,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """What `rotate_and_store` does, in plain torch."""
    turned_q, turned_k = q.float(), k.float()
    if norms is not None:
        turned_q = _normed(turned_q, norms.q_weight, norms.eps)
        turned_k = _normed(turned_k, norms.k_weight, norms.eps)
    q.copy_(_turned(turned_q, tables))
    turned_k = _turned(turned_k, tables)
    kept = slot_mapping >= 0
    page, offset = slot_mapping[kept].long() // pages.page_size, slot_mapping[kept].long() % pages.page_size
    pages.keys[page, offset] = _as_stored(turned_k[kept] / pages.key_scale, pages.keys.dtype)
    pages.values[page, offset] = _as_stored(v[kept].float() / pages.value_scale, pages.values.dtype)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def _turned(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:  # (T, heads, H) -> (T, heads, H)
    cos, sin = (table[:, None, : x.shape[-1] // 2].float() for table in tables)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.clamp(-_FLOAT8_MAX, _FLOAT8_MAX) if dtype == torch.float8_e4m3fn else x).to(dtype)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    pages: KVPages,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Turns queries in place and puts turned keys, and values, into pages, on the current stream.

    Args:
        q: `(T, N, H)`, heads dense, a view of a wider row perhaps; becomes the turned queries.
        k: `(T, K, H)`, heads dense; keeps its values.
        v: `(T, K, H)`, heads dense.
        tables: cosines and sines `(T, H)` of the tokens' positions, as `Rope.tables` makes them; their first halves
            are read.
        pages: where keys and values go.
        slot_mapping: `(T,)` int32 or int64: page * page_size + offset of each token; below 0: it is not stored.
        norms: of the heads, if the model has them.

    Raises `ValueError` for shapes or strides that do not fit.
    """
    _check(q, k, v, tables, pages, slot_mapping)
    if not runs_on(q.device):
        rotate_and_store_reference(q, k, v, tables, pages, slot_mapping, norms)
    elif len(q):
        with launching_on(q.device):
            _launch(q, k, v, tables, pages, slot_mapping, norms)


def _check(
    q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], pages: KVPages, slot_mapping: Tensor
) -> None:
    num_tokens, num_kv_heads, head_dim = len(q), pages.num_kv_heads, pages.head_dim
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("q", q, (num_tokens, q.shape[1] // num_kv_heads * num_kv_heads, head_dim)),
        ("k", k, (num_tokens, num_kv_heads, head_dim)),
        ("v", v, (num_tokens, num_kv_heads, head_dim)),
        ("cosines", tables[0], (num_tokens, head_dim)),
        ("sines", tables[1], (num_tokens, head_dim)),
        ("slot_mapping", slot_mapping, (num_tokens,)),
    ]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected shape {shape}, dense in its last dim, "
                f"found {tuple(tensor.shape)} with strides {tensor.stride()}"
            )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, Tensor],
    pages: KVPages,
    slot_mapping: Tensor,
    norms: HeadNorms | None,
) -> None:
    cos, sin = tables
    group, half = q.shape[1] // pages.num_kv_heads, pages.head_dim // 2
    constants: dict[str, Any] = {"GROUP": group, "BLOCK_G": 1 << (group - 1).bit_length()}
    _rotary_kernel[(len(q), pages.num_kv_heads)](
        q,
        k,
        v,
        cos,
        sin,
        pages.keys,
        pages.values,
        slot_mapping,
        cos if norms is None else norms.q_weight,
        cos if norms is None else norms.k_weight,
        0.0 if norms is None else norms.eps,
        pages.key_scale,
        pages.value_scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        *pages.keys.stride()[:3],
        *pages.values.stride()[:3],
        NORMED=norms is not None,
        PAGE_SIZE=pages.page_size,
        HALF=half,
        BLOCK=1 << (half - 1).bit_length(),
        **constants,
        num_warps=1 if q.shape[2] * group <= 1024 else 4,
        enable_fp_fusion=True,
    )


@jit()
def _stored(values: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Round float32 ``values`` to nearest even in ``DTYPE``, clamped if that is float8.

    Triton's interpreter casts to float8 in another way, so there values are rounded by hand to numbers of float8: 3
    bits after the first, or multiples of 2**-9.
    """
    if tl.float8e4nv == DTYPE:
        values = tl.minimum(tl.maximum(values, -448.0), 448.0)
        if _ROUND_BY_HAND:
            bits = values.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
            small = (values + 24576.0) - 24576.0  # 1.5 * 2**14: the last bit of the sum is 2**-9
            values = tl.where(tl.abs(values) < 0.015625, small, bits.to(tl.float32, bitcast=True))
        stored = values.to(DTYPE)
    else:
        stored = rounded(values, DTYPE)
    return stored


@jit()
def _norm(
    first: tl.tensor, second: tl.tensor, weight: tl.tensor, eps: tl.tensor, HALF: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Halves (heads, BLOCK) of heads, zeros past HALF, over the root of their mean square, times the weight."""
    dims = tl.arange(0, BLOCK)
    square = tl.sum(first * first + second * second, 1) / (2 * HALF)
    scale = (1.0 / tl.sqrt_rn(square + eps))[:, None]
    weight1 = tl.load(weight + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    weight2 = tl.load(weight + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    return first * scale * weight1[None, :], second * scale * weight2[None, :]


@jit()
def _load_turned(
    pointers: tl.tensor,
    mask: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    NORMED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Load heads (heads, 2 * HALF), norm them if NORMED, and return their turned halves in float32."""
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        first, second = _norm(first, second, weight, eps, HALF, BLOCK)
    return first * cos - second * sin, second * cos + first * sin


@jit()
def _rotary_kernel(
    q: tl.tensor,  # (T, N, H)
    k: tl.tensor,  # (T, K, H)
    v: tl.tensor,  # (T, K, H)
    cos_table: tl.tensor,  # (T, H)
    sin_table: tl.tensor,  # (T, H)
    keys: tl.tensor,  # (P, PAGE_SIZE, K, H)
    values: tl.tensor,  # (P, PAGE_SIZE, K, H)
    slot_mapping: tl.tensor,  # (T,)
    q_weight: tl.tensor,  # (H,) if NORMED
    k_weight: tl.tensor,  # (H,) if NORMED
    eps: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    q_token: tl.tensor,  # strides
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    cos_token: tl.tensor,
    sin_token: tl.tensor,
    key_page: tl.tensor,
    key_slot: tl.tensor,
    key_head: tl.tensor,
    value_page: tl.tensor,
    value_slot: tl.tensor,
    value_head: tl.tensor,
    NORMED: tl.constexpr,
    GROUP: tl.constexpr,  # heads per kv head
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,  # H / 2
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    dims, heads = tl.arange(0, BLOCK), tl.arange(0, BLOCK_G)
    inside = dims[None, :] < HALF
    cos = tl.load(cos_table + token * cos_token + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_table + token * sin_token + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
    pointers = q + token * q_token + ((kv_head * GROUP + heads) * q_head)[:, None] + dims[None, :]
    in_group = (heads < GROUP)[:, None] & inside
    first, second = _load_turned(pointers, in_group, q_weight, eps, cos, sin, NORMED, HALF, BLOCK)
    tl.store(pointers, rounded(first, q.dtype.element_ty), mask=in_group)
    tl.store(pointers + HALF, rounded(second, q.dtype.element_ty), mask=in_group)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        key_pointers = k + token * k_token + kv_head * k_head + dims[None, :]
        key1, key2 = _load_turned(key_pointers, inside, k_weight, eps, cos, sin, NORMED, HALF, BLOCK)
        key_target = keys + page * key_page + offset * key_slot + kv_head * key_head + dims[None, :]
        tl.store(key_target, _stored(tl.div_rn(key1, key_scale), keys.dtype.element_ty), mask=inside)
        tl.store(key_target + HALF, _stored(tl.div_rn(key2, key_scale), keys.dtype.element_ty), mask=inside)
        value_pointers = v + token * v_token + kv_head * v_head + dims[None, :]
        value_target = values + page * value_page + offset * value_slot + kv_head * value_head + dims[None, :]
        for half in tl.static_range(2):
            value = tl.load(value_pointers + half * HALF, mask=inside, other=0.0).to(tl.float32)
            value = _stored(tl.div_rn(value, value_scale), values.dtype.element_ty)
            tl.store(value_target + half * HALF, value, mask=inside)
