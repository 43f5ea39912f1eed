"""SwiGLU without its matrix products: silu(gate) * up, in float32, rounded once.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yafsdp_like.kernels.blocks import jit, launching_on, rounded, runs_on, tl

BLOCK = 1024  # elements of one program
NUM_WARPS = 4


def swiglu_reference(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """What `swiglu` does, in plain torch."""
    out.copy_(F.silu(gate.float()) * up.float())


def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write `silu(gate) * up` on the current stream.

    Args:
        gate: `(T, F)`, rows dense; may be a half of a wider row, and `up` the other.
        up: `(T, F)`, rows dense.
        out: `(T, F)`, rows dense; may be gate or up.

    Raises `ValueError` for shapes or strides that do not fit.
    """
    for name, rows in (("gate", gate), ("up", up), ("out", out)):
        if rows.dim() != 2 or rows.shape != gate.shape or rows.stride(1) != 1:
            raise ValueError(
                f"{name}: expected dense rows {tuple(gate.shape)}, "
                f"found {tuple(rows.shape)} with strides {rows.stride()}"
            )
    if not runs_on(gate.device):
        swiglu_reference(gate, up, out)
    elif gate.numel():
        num_rows, num_cols = gate.shape
        with launching_on(gate.device):
            _swiglu_kernel[(num_rows, -(-num_cols // BLOCK))](
                out,
                gate,
                up,
                out.stride(0),
                gate.stride(0),
                up.stride(0),
                NUM_COLS=num_cols,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


@jit()
def _swiglu_kernel(
    out: tl.tensor,  # (T, NUM_COLS)
    gate: tl.tensor,  # (T, NUM_COLS)
    up: tl.tensor,  # (T, NUM_COLS)
    out_row: tl.tensor,  # strides
    gate_row: tl.tensor,
    up_row: tl.tensor,
    NUM_COLS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < NUM_COLS
    gates = tl.load(gate + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    result = gates / (1.0 + tl.exp(-gates)) * ups
    tl.store(out + row * out_row + cols, rounded(result, out.dtype.element_ty), mask=inside)
