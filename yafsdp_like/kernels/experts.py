"""Grouped products of a mixture of experts: each visit of a token by the weights of the expert that it visits.

    out[t] = sum over t's visits v of weight[v] * down[e] (silu(gate[e] x[t]) * up[e] x[t])          e = expert of v

Three launches: gate, up and SwiGLU of all visits in order of experts; down, times the router's weight; and the sum over
a token's visits, in their order. A program has a tile of one expert's columns, and goes over this expert's visits, a
tile of rows at a time. Where visits begin and end it reads on the device (`routing.py`), so the grids depend on shapes
alone, and programs of experts that nobody visits end at once: their weights are not read. Sums are float32; what is
between the launches is rounded to the weights' dtype.

Shapes: T tokens, R visits, D model, F feed-forward, E experts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F

from yafsdp_like.kernels.blocks import dot, jit, launching_on, rounded, runs_on, tl
from yafsdp_like.kernels.routing import Visits, visits_of_experts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK_SUM = 1024  # columns of a program that adds up visits


@dataclass(frozen=True)
class ExpertWeights:
    """All experts' matrices, dense and of one dtype."""

    gate_up: Tensor  # (2 E, F, D): every expert's gate, then every expert's up
    down: Tensor  # (E, D, F)


def feed_experts(
    rows: Tensor, weights: ExpertWeights, visits: Visits, hidden: Tensor, parts: Tensor, out: Tensor
) -> None:
    """Write what its experts make of each row, on the current stream.

    Args:
        rows: `(T, D)`, rows dense.
        weights: of all experts, in the dtype of `rows`.
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
        gate, up = (F.linear(chosen, weights.gate_up[i].float()) for i in (expert, visits.num_experts + expert))
        mine = hidden[first : first + len(numbers)]
        mine.copy_(F.silu(gate) * up)
        fed = F.linear(mine.float(), weights.down[expert].float())
        parts[numbers] = (fed * visits.weights[numbers, None]).to(parts.dtype)
        first += len(numbers)
    out.copy_(parts.unflatten(0, (len(rows), -1)).float().sum(1))


def _launch(rows: Tensor, weights: ExpertWeights, visits: Visits, hidden: Tensor, parts: Tensor, out: Tensor) -> None:
    (num_tokens, dim), num_experts, ffn_dim = rows.shape, visits.num_experts, hidden.shape[1]
    num_per_token = len(visits.order) // num_tokens
    up, down = _tiles(len(visits.order), num_experts)
    shapes = {"D": dim, "F": ffn_dim, "E": num_experts}
    _gate_up_kernel[(-(-ffn_dim // up.columns), num_experts, up.num_shares)](
        hidden,
        rows,
        weights.gate_up,
        visits.order,
        visits.starts,
        rows.stride(0),
        S=num_per_token,
        **shapes,
        **up.launch(rows.dtype),
    )
    _down_kernel[(-(-dim // down.columns), num_experts, down.num_shares)](
        parts, hidden, weights.down, visits.order, visits.starts, visits.weights, **shapes, **down.launch(rows.dtype)
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

    def launch(self, dtype: torch.dtype) -> dict[str, int]:
        """Return it as keywords of a kernel; in float32, half as deep and with fewer stages, for shared memory."""
        wide = dtype.itemsize > 2
        blocks = {"BLOCK_T": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth // 2 if wide else self.depth}
        return {**blocks, "num_warps": self.num_warps, "num_stages": 2 if wide else self.num_stages}


# Of gate and up together, and of down, for at most so many visits of an expert, were they even. Measured on an H200
# at the shapes of Mixtral-8x7B and Qwen3-30B-A3B, 1 to 2,048 tokens (scripts/results/LOG.md). Rows are mostly twice the
# visits: an expert with more of them than that reads its weights twice.
_TILES = (
    (1, _Tile(16, 32, 128, 1, 2, 4), _Tile(16, 32, 128, 1, 2, 4)),
    (8, _Tile(16, 64, 128, 1, 4, 3), _Tile(16, 64, 128, 1, 4, 3)),
    (64, _Tile(64, 64, 64, 1, 4, 4), _Tile(64, 128, 64, 1, 8, 3)),
    (sys.maxsize, _Tile(128, 128, 64, 2, 8, 4), _Tile(128, 256, 64, 2, 8, 3)),
)


def _tiles(num_visits: int, num_experts: int) -> tuple[_Tile, _Tile]:
    """Return what programs of the two products compute at a time."""
    even = -(-num_visits // num_experts)
    return next((up, down) for most, up, down in _TILES if even <= most)


@jit()
def _product(
    x: tl.tensor,  # pointers to rows, (BLOCK_T, 1)
    weight: tl.tensor,  # pointers to rows of the weight, (1, BLOCK_N)
    t_inside: tl.tensor,  # (BLOCK_T, 1)
    n_inside: tl.tensor,  # (1, BLOCK_N)
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The product of a tile of rows with a tile of a weight's rows, float32."""
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + k[None, :], mask=t_inside & (k < K)[None, :], other=0.0)
        w = tl.load(weight + k[:, None], mask=n_inside & (k < K)[:, None], other=0.0)
        sums += dot(values, w)
    return sums


@jit()
def _gate_up_kernel(
    hidden: tl.tensor,  # (R, F), in order of experts
    x: tl.tensor,  # (T, D)
    gate_up: tl.tensor,  # (2 E, F, D)
    order: tl.tensor,  # (R,) int32
    starts: tl.tensor,  # (E + 1,) int32
    x_row: tl.tensor,  # stride
    S: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    n, expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    gate = gate_up + (expert.to(tl.int64) * F + n)[None, :] * D
    up = gate_up + ((expert + E).to(tl.int64) * F + n)[None, :] * D
    n_inside = (n < F)[None, :]
    for begin in range(first + tl.program_id(2) * BLOCK_T, last, tl.num_programs(2) * BLOCK_T):
        place = begin + tl.arange(0, BLOCK_T)
        inside = place < last
        token = tl.load(order + place, mask=inside, other=0) // S
        row = x + token.to(tl.int64)[:, None] * x_row
        gates = _product(row, gate, inside[:, None], n_inside, D, BLOCK_T, BLOCK_N, BLOCK_K)
        ups = _product(row, up, inside[:, None], n_inside, D, BLOCK_T, BLOCK_N, BLOCK_K)
        result = rounded(gates / (1.0 + tl.exp(-gates)) * ups, hidden.dtype.element_ty)
        pointers = hidden + place.to(tl.int64)[:, None] * F + n[None, :]
        tl.store(pointers, result, mask=inside[:, None] & n_inside)


@jit()
def _down_kernel(
    parts: tl.tensor,  # (R, D), token after token
    hidden: tl.tensor,  # (R, F), in order of experts
    down: tl.tensor,  # (E, D, F)
    order: tl.tensor,  # (R,) int32
    starts: tl.tensor,  # (E + 1,) int32
    weights: tl.tensor,  # (R,) float32
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    n, expert = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    weight = down + (expert.to(tl.int64) * D + n)[None, :] * F
    n_inside = (n < D)[None, :]
    for begin in range(first + tl.program_id(2) * BLOCK_T, last, tl.num_programs(2) * BLOCK_T):
        place = begin + tl.arange(0, BLOCK_T)
        inside = place < last
        row = hidden + place.to(tl.int64)[:, None] * F
        sums = _product(row, weight, inside[:, None], n_inside, F, BLOCK_T, BLOCK_N, BLOCK_K)
        visit = tl.load(order + place, mask=inside, other=0)
        sums *= tl.load(weights + visit, mask=inside, other=0.0)[:, None]
        pointers = parts + visit.to(tl.int64)[:, None] * D + n[None, :]
        tl.store(pointers, rounded(sums, parts.dtype.element_ty), mask=inside[:, None] & n_inside)


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
