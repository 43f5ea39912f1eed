"""RMSNorm of rows, with the sum before it if there is one: Zhang and Sennrich, "Root Mean Square Layer Normalization".

    residual = residual + x, rounded                  if there is a residual; x is then what it became
    out = x * rsqrt(mean(x**2) + eps) * weight

in float32, rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.kernels.blocks import jit, launching_on, rounded, runs_on, tl

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """What `rms_norm` does, in plain torch."""
    if residual is not None:
        residual.copy_(residual.float() + x.float())
        x = residual
    wide = x.float()
    out.copy_(wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float())


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None = None) -> None:
    """Norms each row on the current stream.

    Args:
        x: `(T, D)`, rows dense.
        weight: `(D,)`.
        eps: is added to the mean square.
        out: `(T, D)`, rows dense; may be x.
        residual: `(T, D)`, rows dense; x is added to it first, and the sum is what is normed.

    Raises `ValueError` for shapes or strides that do not fit.
    """
    for name, rows in (("x", x), ("out", out), *(() if residual is None else (("residual", residual),))):
        if rows.dim() != 2 or rows.shape != x.shape or rows.stride(1) != 1 or weight.shape != rows.shape[1:]:
            raise ValueError(
                f"{name}: expected dense rows {tuple(x.shape)} and a weight of as many columns, found "
                f"{tuple(rows.shape)} with strides {rows.stride()}, weight {tuple(weight.shape)}"
            )
    if not runs_on(x.device):
        rms_norm_reference(x, weight, eps, out, residual)
    elif x.numel():
        with launching_on(x.device):
            _launch(x, weight, eps, out, residual)


def _launch(x: Tensor, weight: Tensor, eps: float, out: Tensor, residual: Tensor | None) -> None:
    num_rows, dim = x.shape
    block = 1 << (dim - 1).bit_length()
    added = x if residual is None else residual
    _rms_norm_kernel[(num_rows,)](
        out,
        added,
        x,
        weight,
        eps,
        out.stride(0),
        added.stride(0),
        x.stride(0),
        DIM=dim,
        ADDED=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),  # 16 elements a thread, up to a dim of 8192
        enable_fp_fusion=True,
    )


@jit()
def _rms_norm_kernel(
    out: tl.tensor,  # (T, DIM)
    residual: tl.tensor,  # (T, DIM) if ADDED
    x: tl.tensor,  # (T, DIM)
    weight: tl.tensor,  # (DIM,)
    eps: tl.tensor,
    out_row: tl.tensor,  # strides
    residual_row: tl.tensor,
    x_row: tl.tensor,
    DIM: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < DIM
    gain = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(x + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        pointers = residual + row * residual_row + cols
        total = rounded(tl.load(pointers, mask=inside, other=0.0).to(tl.float32) + wide, residual.dtype.element_ty)
        tl.store(pointers, total, mask=inside)
        wide = total.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / DIM + eps)
    tl.store(out + row * out_row + cols, rounded(wide * scale * gain, out.dtype.element_ty), mask=inside)
