"""Grouped products of a mixture of experts: each visit of a token by the weights of the expert that it visits.

    out[t] = sum over t's visits v of weight[v] * down[e] (silu(gate[e] x[t]) * up[e] x[t])          e = expert of v

Three launches: gate, up and SwiGLU of all visits in order of experts; down, times the router's weight; and the sum over
a token's visits, in their order. A program has a tile of one expert's columns, and goes over this expert's visits, a
tile of rows at a time. Where visits begin and end it reads on the device (`routing.py`), so the grids depend on shapes
alone, and programs of experts that nobody visits end at once: their weights are not read. Sums are float32; what is
between the launches is rounded to the rows' dtype. Quantized matrices are multiplied as they are stored
(`quantized.py`).

Shapes: T tokens, R visits, D model, F feed-forward, E experts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from yafsdp_like.kernels.blocks import dot, jit, launching_on, rounded, runs_on, tl
from yafsdp_like.kernels.quantized import product
from yafsdp_like.kernels.routing import Visits, visits_of_experts

if TYPE_CHECKING:
    import torch

    from yafsdp_like.kernels.quantized_matrix import Matrix

_BLOCK_SUM = 1024  # columns of a program that adds up visits
_MANY_ROWS = 128  # of a tile
_SHARED_NBYTES = 200 << 10  # of a multiprocessor's memory, that the tiles of a product may take


@dataclass(frozen=True)
class ExpertWeights:
    """All experts' matrices: dense in memory and of the dtype of rows, or quantized, each stack on its own."""

    gate_up: Matrix  # (2 E, F, D): every expert's gate, then every expert's up
    down: Matrix  # (E, D, F)


def feed_experts(
    rows: Tensor, weights: ExpertWeights, visits: Visits, hidden: Tensor, parts: Tensor, out: Tensor
) -> None:
    """Write what its experts make of each row, on the current stream.

    Args:
        rows: `(T, D)`, rows dense.
        weights: of all experts.
        visits: of R = T S visits, token after token, as `route` writes them.
        hidden: `(R, F)`, dense; overwritten.
        parts: `(R, D)`, dense; overwritten.
        out: `(T, D)`, rows dense; 0 for tokens that visit nobody. May be `rows`.

    Raises `ValueError` for shapes that do not fit.
    """
    num_tokens, dim = rows.shape
    num_experts, ffn_dim, num_visits = visits.num_experts, weights.down.shape[2], len(visits.order)
    wanted = ((2 * num_experts, ffn_dim, dim), (num_experts, dim, ffn_dim), (num_visits, ffn_dim), (num_visits, dim))
    found = tuple(tuple(tensor.shape) for tensor in (weights.gate_up, weights.down, hidden, parts))
    if found != wanted or out.shape != rows.shape or num_visits % max(num_tokens, 1):
        raise ValueError(
            f"expected gate_up, down, hidden and parts {wanted} and out {tuple(rows.shape)}, found {found} and "
            f"{tuple(out.shape)}"
        )
    if not num_tokens:
        return
    if not runs_on(rows.device):
        feed_experts_reference(rows, weights, visits, hidden, parts, out)
    else:
        with launching_on(rows.device):
            _launch(rows, weights, visits, hidden, parts, out)


def feed_experts_reference(
    rows: Tensor, weights: ExpertWeights, visits: Visits, hidden: Tensor, parts: Tensor, out: Tensor
) -> None:
    """What `feed_experts` does, in plain torch, an expert after the other; asks the device for their visits."""
    num_per_token = len(visits.order) // len(rows)
    parts.zero_()
    first = 0
    for expert, numbers in visits_of_experts(visits):
        chosen = rows[numbers // num_per_token].float()
        gate, up = (F.linear(chosen, _float32(weights.gate_up[i])) for i in (expert, visits.num_experts + expert))
        mine = hidden[first : first + len(numbers)]
        mine.copy_(F.silu(gate) * up)
        fed = F.linear(mine.float(), _float32(weights.down[expert]))
        parts[numbers] = (fed * visits.weights[numbers, None]).to(parts.dtype)
        first += len(numbers)
    out.copy_(parts.unflatten(0, (len(rows), -1)).float().sum(1))


def _float32(matrix: Matrix) -> Tensor:
    return matrix.float() if isinstance(matrix, Tensor) else matrix.dequantized()


def _launch(rows: Tensor, weights: ExpertWeights, visits: Visits, hidden: Tensor, parts: Tensor, out: Tensor) -> None:
    (num_tokens, dim), num_experts, ffn_dim = rows.shape, visits.num_experts, hidden.shape[1]
    num_per_token = len(visits.order) // num_tokens
    up, down = _tiles(len(visits.order), weights)
    shared = {"E": num_experts, "D": dim, "F": ffn_dim, "enable_fp_fusion": True}
    _gate_up_kernel[(-(-ffn_dim // up.columns), num_experts, up.num_shares)](
        hidden,
        rows,
        *_tensors(weights.gate_up),
        visits.order,
        visits.starts,
        rows.stride(0),
        S=num_per_token,
        **shared,
        **_constants(weights.gate_up, up, 2 * up.columns, rows.dtype),
    )
    _down_kernel[(-(-dim // down.columns), num_experts, down.num_shares)](
        parts,
        hidden,
        *_tensors(weights.down),
        visits.order,
        visits.starts,
        visits.weights,
        **shared,
        **_constants(weights.down, down, down.columns, rows.dtype),
    )
    _sum_kernel[(num_tokens, -(-dim // _BLOCK_SUM))](
        out, parts, visits.experts, out.stride(0), S=num_per_token, D=dim, E=num_experts, BLOCK=_BLOCK_SUM
    )


@dataclass(frozen=True)
class _Tile:
    """What one program computes at a time."""

    rows: int  # visits
    columns: int  # of the product, rows of the weight
    depth: int  # of what is summed
    num_shares: int  # programs that share the visits of one expert
    num_warps: int
    num_stages: int


# Of gate and up together, and of down, for at most so many visits of an expert, were they even. Measured on an H200
# at the shapes of Mixtral-8x7B and Qwen3-30B-A3B, 1 to 2,048 tokens (scripts/results/LOG.md). Rows have room for
# more visits than even ones: an expert with more of them than a tile has rows reads its weights twice.
_TILES = (
    (1, _Tile(16, 32, 128, 1, 2, 4), _Tile(16, 32, 128, 1, 2, 4)),
    (8, _Tile(16, 64, 128, 1, 4, 3), _Tile(16, 64, 128, 1, 4, 3)),
    (64, _Tile(64, 64, 64, 1, 4, 4), _Tile(64, 128, 64, 1, 8, 3)),
    (sys.maxsize, _Tile(128, 128, 64, 2, 8, 4), _Tile(128, 256, 64, 2, 8, 3)),
)


def _tiles(num_visits: int, weights: ExpertWeights) -> tuple[_Tile, _Tile]:
    """Return what programs of the two products compute at a time.

    A tile of many rows has half as many columns where the matrix is quantized: the sum of a group is apart from that of
    all until it is scaled, and both together have no room in registers.
    """
    even = -(-num_visits // len(weights.down))
    found = next((up, down) for most, up, down in _TILES if even <= most)
    up, down = (
        tile if isinstance(stack, Tensor) or tile.rows < _MANY_ROWS else replace(tile, columns=tile.columns // 2)
        for tile, stack in zip(found, (weights.gate_up, weights.down), strict=True)
    )
    return up, down


def _tensors(stack: Matrix) -> tuple[Tensor, ...]:
    """What kernels take of a stack of matrices: `QuantizedMatrix.tensors`; four times the same, where it is dense."""
    return (stack,) * 4 if isinstance(stack, Tensor) else stack.tensors


def _constants(stack: Matrix, tile: _Tile, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What kernels that multiply a stack of matrices (n, N, K) are compiled with.

    ``width`` is how many of its rows a program reads at a time: there are as many stages as fit shared memory.
    """
    _, num_rows, num_columns = stack.shape
    form, depth = (None, tile.depth) if isinstance(stack, Tensor) else (stack.format, stack.tile_columns)
    is_whole = num_rows % tile.columns == 0 and num_columns % depth == 0
    num_stages = min(tile.num_stages, max(1, _SHARED_NBYTES // ((tile.rows + width) * depth * dtype.itemsize)))
    blocks = {"BLOCK_T": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": depth}
    return {"FORMAT": form, "WHOLE": is_whole, **blocks, "num_warps": tile.num_warps, "num_stages": num_stages}


@jit()
def _dense_product(
    x: tl.tensor,  # pointers to rows, (BLOCK_T,)
    inside: tl.tensor,  # (BLOCK_T,)
    weight: tl.tensor,  # (N, K)
    n: tl.tensor,  # (BLOCK_N,) rows of the weight
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The product of a tile of rows with a tile of a weight's rows, (BLOCK_T, BLOCK_N) float32."""
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x[:, None] + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        sums += dot(values, w)
    return sums


@jit()
def _product(
    x: tl.tensor,  # pointers to rows, (BLOCK_T,)
    inside: tl.tensor,  # (BLOCK_T,)
    stack: tl.tensor,  # pointers to codes, scales, zeros and order of matrices (N, K), see `_tensors`
    index: tl.tensor,  # of one of them, int64
    n: tl.tensor,  # (BLOCK_N,) of its rows
    DTYPE: tl.constexpr,  # of x
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,  # `QuantizedMatrix.format`, or None
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The product of a tile of rows with a tile of one matrix's rows, (BLOCK_T, BLOCK_N) float32."""
    codes, scales, zeros, order = stack
    if FORMAT is None:
        sums = _dense_product(x, inside, codes + index * (N * K), n, N, K, BLOCK_T, BLOCK_N, BLOCK_K)
    else:
        NUM_SCALES: tl.constexpr = (N + FORMAT[1] - 1) // FORMAT[1] * FORMAT[0]
        matrix = (
            codes + index * (N * K * FORMAT[3] // 8),
            scales + index * NUM_SCALES,
            zeros + index * NUM_SCALES,
            order + index * K,
        )
        sums = product(x, inside, matrix, n, N, 0, K, DTYPE, K, FORMAT, WHOLE, BLOCK_T, BLOCK_N, BLOCK_K)
        sums = tl.trans(sums)
    return sums


@jit()
def _gate_up_kernel(
    hidden: tl.tensor,  # (R, F), in order of experts
    x: tl.tensor,  # (T, D)
    gate_up: tl.tensor,  # (2 E, F, D), or codes
    scales: tl.tensor,  # as `_tensors` has them
    zeros: tl.tensor,
    columns: tl.tensor,
    order: tl.tensor,  # (R,) int32
    starts: tl.tensor,  # (E + 1,) int32
    x_row: tl.tensor,  # stride
    S: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    FORMAT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    n, expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    DTYPE: tl.constexpr = x.dtype.element_ty
    gate, up, stack = expert.to(tl.int64), expert.to(tl.int64) + E, (gate_up, scales, zeros, columns)
    for begin in range(first + tl.program_id(2) * BLOCK_T, last, tl.num_programs(2) * BLOCK_T):
        place = begin + tl.arange(0, BLOCK_T)
        inside = place < last
        token = tl.load(order + place, mask=inside, other=0) // S
        row = x + token.to(tl.int64) * x_row
        gates = _product(row, inside, stack, gate, n, DTYPE, F, D, FORMAT, WHOLE, BLOCK_T, BLOCK_N, BLOCK_K)
        ups = _product(row, inside, stack, up, n, DTYPE, F, D, FORMAT, WHOLE, BLOCK_T, BLOCK_N, BLOCK_K)
        result = rounded(gates / (1.0 + tl.exp(-gates)) * ups, hidden.dtype.element_ty)
        pointers = hidden + place.to(tl.int64)[:, None] * F + n[None, :]
        tl.store(pointers, result, mask=inside[:, None] & (n < F)[None, :])


@jit()
def _down_kernel(
    parts: tl.tensor,  # (R, D), token after token
    hidden: tl.tensor,  # (R, F), in order of experts
    down: tl.tensor,  # (E, D, F), or codes
    scales: tl.tensor,  # as `_tensors` has them
    zeros: tl.tensor,
    columns: tl.tensor,
    order: tl.tensor,  # (R,) int32
    starts: tl.tensor,  # (E + 1,) int32
    weights: tl.tensor,  # (R,) float32
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    FORMAT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    n, expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    DTYPE: tl.constexpr = hidden.dtype.element_ty
    index, stack = expert.to(tl.int64), (down, scales, zeros, columns)
    for begin in range(first + tl.program_id(2) * BLOCK_T, last, tl.num_programs(2) * BLOCK_T):
        place = begin + tl.arange(0, BLOCK_T)
        inside = place < last
        row = hidden + place.to(tl.int64) * F
        sums = _product(row, inside, stack, index, n, DTYPE, D, F, FORMAT, WHOLE, BLOCK_T, BLOCK_N, BLOCK_K)
        visit = tl.load(order + place, mask=inside, other=0)
        sums *= tl.load(weights + visit, mask=inside, other=0.0)[:, None]
        pointers = parts + visit.to(tl.int64)[:, None] * D + n[None, :]
        tl.store(pointers, rounded(sums, parts.dtype.element_ty), mask=inside[:, None] & (n < D)[None, :])


@jit()
def _sum_kernel(
    out: tl.tensor,  # (T, D)
    parts: tl.tensor,  # (T, S, D)
    experts: tl.tensor,  # (T, S) int32
    out_row: tl.tensor,  # stride
    S: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    written = tl.where(tl.load(experts + token * S) < E, D, 0)  # what padding has in `parts` nobody wrote
    sums = tl.zeros((BLOCK,), tl.float32)
    for number in range(S):
        sums += tl.load(parts + (token * S + number) * D + n, mask=n < written, other=0.0).to(tl.float32)
    tl.store(out + token * out_row + n, rounded(sums, out.dtype.element_ty), mask=n < D)
