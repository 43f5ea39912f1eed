"""What a GPU's kernels allocate and save, where tensors without memory would take another way.

Owns the list of functions for which PyTorch has one kernel on a GPU and several operations elsewhere, and for each what
the GPU's allocates. ``substitutes.py`` puts them in place.

Attention saves queries, keys, values, its output and one fp32 number a row; never scores. Which kernel it is depends
on dtypes and masks as in PyTorch's own choice (``sdp_utils.cpp``); the backward takes an fp32 copy of the queries'
gradient and, where heads share keys, gradients of keys and values for every query head (as in ``flash_attn``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from yafsdp_like.shard.forecast.storages import StorageMode
    from yafsdp_like.shard.forecast.substitutes import Substitutes

HALF = (torch.float16, torch.bfloat16)
ROWS = 128  # to which attention kernels round the number of queries in what they keep beside a row


# --- attention ---


def _attention(
    step: Substitutes,
    func: Any,
    query: Tensor,  # (B, N, T, H)
    key: Tensor,  # (B, K, S, H)
    value: Tensor,  # (B, K, S, H)
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` by the kernel that a GPU takes."""
    fused = query.dim() == 4 and query.dtype in HALF and query.shape[-1] <= 256 and _fused_is_allowed()
    if not fused:  # fp32 without groups has a kernel of its own, which saves as much
        fused = query.dim() == 4 and query.shape[1] == key.shape[1] and torch.backends.cuda.mem_efficient_sdp_enabled()
    if not fused:
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return out
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    return _FusedAttention.apply(step.storages, query, key, value, attn_mask, is_causal)


def _fused_is_allowed() -> bool:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled() or cuda.cudnn_sdp_enabled() or cuda.mem_efficient_sdp_enabled()


class _FusedAttention(torch.autograd.Function):
    """Saves q, k, v, the output, and the logarithm of each row's sum."""

    @staticmethod
    def forward(
        ctx: Any, mode: StorageMode, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        out = torch.ops.aten.empty_like(q)
        if v.shape[-1] != q.shape[-1]:
            out = torch.ops.aten.empty_like(out[..., : v.shape[-1]])
        rows = torch.ops.aten.empty_like(q[..., 0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, rows, mask)
        ctx.mode, ctx.flops = mode, _attention_flops(q, k, v, is_causal)
        mode.add_work("attention", ctx.flops, q.nbytes + k.nbytes + v.nbytes, out.nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, rows, _ = ctx.saved_tensors
        wide = torch.ops.aten.empty_like(q, dtype=torch.float32)
        sums = torch.ops.aten.empty_like(rows)
        gradients = [torch.ops.aten.empty_like(t) for t in (q, k, v)]
        if k.shape[1] != q.shape[1]:
            full = [torch.ops.aten.expand(t[:, :1], (-1, q.shape[1], -1, -1)).clone() for t in (k, v)]
            del full
        del wide, sums
        moved = 2 * (q.nbytes + k.nbytes + v.nbytes) + out.nbytes + grad.nbytes
        ctx.mode.add_work("attention", ctx.flops * 5 // 2, moved, q.nbytes + k.nbytes + v.nbytes)
        return None, *gradients, None, None


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> int:
    """Return operations of both products of a forward: of the pairs that a causal mask leaves, half for equal lengths.

    A backward computes five products where a forward computes two (Dao, "FlashAttention-2", 2023, section 3.1).
    """
    num_pairs = q.shape[2] * k.shape[2]
    if is_causal:
        num_pairs = num_pairs // 2 if q.shape[2] <= k.shape[2] else num_pairs
    return 2 * q.shape[0] * q.shape[1] * num_pairs * (q.shape[3] + v.shape[3])


# --- one kernel instead of several ---


def _rms_norm(
    step: Substitutes, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None
) -> Tensor:
    """One kernel that saves its input and a number a row, unless input and weight differ in dtype."""
    if weight is not None and weight.dtype != input.dtype:
        return func(input, normalized_shape, weight, eps)
    return _FusedRmsNorm.apply(input, len(normalized_shape), weight)


class _FusedRmsNorm(torch.autograd.Function):
    """``_fused_rms_norm`` and its backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, num_dims: int, weight: Tensor | None) -> Tensor:
        out = torch.ops.aten.empty_like(input, memory_format=torch.contiguous_format)
        rows = input.flatten(-num_dims)[..., :1]
        scales = torch.ops.aten.empty_like(rows, dtype=torch.float32)
        ctx.save_for_backward(input, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        grad_input = torch.ops.aten.empty_like(input) if ctx.needs_input_grad[0] else None
        grad_weight = torch.ops.aten.empty_like(weight) if weight is not None and ctx.needs_input_grad[2] else None
        return grad_input, None, grad_weight


def _dropout(
    step: Substitutes, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """One kernel that saves one byte an element."""
    if not training or inplace or not 0 < p < 1:
        return func(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _softmax(
    step: Substitutes, func: Any, input: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    """Of float16 into fp32: one kernel that reads the halves as they are; bfloat16 is cast first."""
    if dim is None or dtype is not torch.float32 or input.dtype is not torch.float16:
        return func(input, dim, dtype=dtype)
    return _SoftmaxInFp32.apply(input)


class _SoftmaxInFp32(torch.autograd.Function):
    """Saves its result."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        out = torch.ops.aten.empty_like(input, dtype=torch.float32)
        ctx.save_for_backward(out)
        ctx.dtype = input.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.empty_like(ctx.saved_tensors[0], dtype=ctx.dtype)


GPU: dict[Any, Any] = {
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.dropout: _dropout,
    F.softmax: _softmax,
    F.log_softmax: _softmax,
}
