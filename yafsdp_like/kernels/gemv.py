"""Matrix products for serving: of one row (GEMV) by a kernel that runs at the rate of memory, else by torch.mm.

cuBLAS reaches about nine tenths of the memory bandwidth for one row, since it computes tiles of many rows; a kernel
that sums on ordinary lanes reaches all of it. For more rows cuBLAS is as fast.

Shapes: T rows, K columns of them, N rows of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import jit, launching_on, rounded, runs_on, tl

_DTYPES = (torch.bfloat16, torch.float16)


def matmul(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write `rows @ weight.T` into `out` on the current stream, summed in float32 and rounded once.

    Args:
        rows: `(T, K)`.
        weight: `(N, K)`.
        out: `(T, N)`. All three of one dtype.

    Raises `RuntimeError` as `torch.mm` does.
    """
    dense = all(tensor.stride(-1) == 1 for tensor in (rows, weight, out))
    fits = rows.shape[1:] == weight.shape[1:] and out.shape == (1, len(weight))
    if len(rows) == 1 and fits and dense and weight.dtype in _DTYPES and runs_on(rows.device):
        with launching_on(rows.device):
            _launch(rows, weight, out)
    else:
        torch.mm(rows, weight.t(), out=out)


def _launch(row: Tensor, weight: Tensor, out: Tensor) -> None:
    """Launch with blocks measured on an H200: for long rows, fewer programs of more rows each."""
    num_rows, num_cols = weight.shape
    block_n, block_k = (4, 1024) if num_cols <= 8192 else (8, 512)
    _gemv_kernel[(-(-num_rows // block_n),)](
        out,
        row,
        weight,
        num_rows,
        weight.stride(0),
        NUM_COLS=num_cols,
        WHOLE=num_rows % block_n == 0 and num_cols % block_k == 0,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )


@jit()
def _gemv_kernel(
    out: tl.tensor,  # (N,)
    row: tl.tensor,  # (K,)
    weight: tl.tensor,  # (N, K)
    num_rows: tl.tensor,  # N
    weight_row: tl.tensor,  # stride
    NUM_COLS: tl.constexpr,  # K
    WHOLE: tl.constexpr,  # whether blocks end where the weight does
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weights = weight + n.to(tl.int64)[:, None] * weight_row
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, NUM_COLS, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if WHOLE:
            w = tl.load(weights + k[None, :], eviction_policy="evict_first")  # it is not read again
            x = tl.load(row + k)
        else:
            inside = (n < num_rows)[:, None] & (k < NUM_COLS)[None, :]
            w = tl.load(weights + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(row + k, mask=k < NUM_COLS, other=0.0)
        sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
    tl.store(out + n, rounded(tl.sum(sums, 1), out.dtype.element_ty), mask=n < num_rows)
