"""Which experts each token visits, and the visits in order of experts: what grouped products read.

    p = softmax(logits),  the S largest p of a token are its weights, divided by their sum where that is asked for

A visit is a token and one of its experts; of equal p the expert with the lower number is chosen. Nothing is asked of
the device, and the grids depend on shapes alone, so that steps can be recorded. Source: Jiang et al., "Mixtral of
Experts", 2024, section 2.1.

Shapes: T tokens, E experts, S visits of a token, R = T S visits, token after token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.kernels.blocks import jit, launching_on, runs_on, tl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PADDING = -1  # instead of a slot, see `route`
_BLOCK_T = 4  # tokens of a program that chooses
_BLOCK_R = 1024  # visits that a program which sorts looks at together
_LEAST = tl and tl.constexpr(-3e38)  # below the scores of all experts


@dataclass(frozen=True)
class Visits:
    """The visits of a step's tokens: tables that `route` writes and grouped products read."""

    experts: Tensor  # (R,) int32; E for tokens that are padding
    weights: Tensor  # (R,) float32; 0 for padding
    order: Tensor  # (R,) int32: visits by expert, those of one expert in order; padding has no place in it
    starts: Tensor  # (E + 1,) int32: where each expert's visits begin in `order`, and where the last one's end

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.starts) - 1


def route(logits: Tensor, num_per_token: int, normalize: bool, slots: Tensor, visits: Visits) -> None:
    """Choose the experts of each token, and sort the visits by expert, on the current stream.

    Args:
        logits: `(T, E)`, rows dense.
        num_per_token: S.
        normalize: whether the weights of a token's experts add up to 1.
        slots: `(T,)` int32, `PADDING` for tokens that are padding, which visit nobody; other values do not matter.
        visits: of R visits; overwritten.

    Raises `ValueError` for shapes that do not fit.
    """
    num_tokens, num_experts = logits.shape
    num_visits = num_tokens * num_per_token
    tables = (visits.experts, visits.weights, visits.order)
    if any(table.shape != (num_visits,) for table in tables) or len(visits.starts) != num_experts + 1:
        raise ValueError(
            f"expected tables of {num_visits} visits and {num_experts + 1} starts for logits {tuple(logits.shape)}, "
            f"found {[tuple(table.shape) for table in (*tables, visits.starts)]}"
        )
    if not 1 <= num_per_token <= num_experts or slots.shape != (num_tokens,):
        raise ValueError(
            f"expected 1 to {num_experts} experts a token and {num_tokens} slots, found {num_per_token} and "
            f"{tuple(slots.shape)}"
        )
    if not runs_on(logits.device):
        route_reference(logits, num_per_token, normalize, slots, visits)
    elif num_tokens:
        with launching_on(logits.device):
            _launch(logits, num_per_token, normalize, slots, visits)


def route_reference(logits: Tensor, num_per_token: int, normalize: bool, slots: Tensor, visits: Visits) -> None:
    """What `route` does, in plain torch."""
    probs = logits.float().softmax(-1)
    weights, experts = (found[:, :num_per_token] for found in probs.sort(dim=-1, descending=True, stable=True))
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    is_padding = (slots == PADDING)[:, None]
    visits.experts.copy_(experts.masked_fill(is_padding, visits.num_experts).flatten())
    visits.weights.copy_(weights.masked_fill(is_padding, 0.0).flatten())
    visits.order.copy_(visits.experts.argsort(stable=True))
    counts = visits.experts.bincount(minlength=visits.num_experts + 1)
    visits.starts.copy_(counts.cumsum(0) - counts)


def visits_of_experts(visits: Visits) -> Iterator[tuple[int, Tensor]]:
    """Yield the experts that anybody visits, and the numbers of their visits (n,) int64; asks the device for them."""
    starts = visits.starts.tolist()
    for expert, (first, last) in enumerate(itertools.pairwise(starts)):
        if first < last:
            yield expert, visits.order[first:last].long()


def _launch(logits: Tensor, num_per_token: int, normalize: bool, slots: Tensor, visits: Visits) -> None:
    num_tokens, num_experts = logits.shape
    _choose_kernel[(-(-num_tokens // _BLOCK_T),)](
        visits.experts,
        visits.weights,
        logits,
        slots,
        num_tokens,
        logits.stride(0),
        E=num_experts,
        S=num_per_token,
        NORMALIZE=normalize,
        BLOCK_T=_BLOCK_T,
        BLOCK_E=_power_of_two(num_experts),
        BLOCK_S=_power_of_two(num_per_token),
    )
    num_visits = num_tokens * num_per_token
    block = min(_BLOCK_R, max(_power_of_two(num_visits), 32))
    _sort_kernel[(num_experts + 1,)](
        visits.order, visits.starts, visits.experts, num_visits, E=num_experts, BLOCK=block
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@jit("num_tokens")
def _choose_kernel(
    experts: tl.tensor,  # (T, S) int32
    weights: tl.tensor,  # (T, S) float32
    logits: tl.tensor,  # (T, E)
    slots: tl.tensor,  # (T,) int32
    num_tokens: tl.tensor,  # T
    logits_row: tl.tensor,  # stride
    E: tl.constexpr,
    S: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    t, e, s = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
    inside = t < num_tokens
    pointers = logits + t.to(tl.int64)[:, None] * logits_row + e[None, :]
    exists = (e < E)[None, :]
    scores = tl.load(pointers, mask=inside[:, None] & exists, other=0.0).to(tl.float32)
    scores = tl.where(exists, scores, _LEAST)
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(tl.where(exists, powers, 0.0), 1)[:, None]
    probs = tl.where(exists, powers / total, -1.0)
    chosen = tl.zeros((BLOCK_T, BLOCK_S), tl.int32)
    values = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for number in tl.static_range(S):
        index = tl.minimum(tl.argmax(probs, 1), E - 1)  # in the table, also where a row is NaN
        here = (s == number)[None, :]
        chosen = tl.where(here, index[:, None].to(tl.int32), chosen)
        values = tl.where(here, tl.max(probs, 1)[:, None], values)
        probs = tl.where(e[None, :] == index[:, None], -1.0, probs)
    if NORMALIZE:
        values = values / tl.sum(values, 1)[:, None]
    values = tl.where(total == total, values, total)  # NaN, which a maximum may pass over
    is_real = (tl.load(slots + t, mask=inside, other=-1) != -1)[:, None]  # PADDING
    places = t[:, None] * S + s[None, :]
    stored = inside[:, None] & (s < S)[None, :]
    tl.store(experts + places, tl.where(is_real, chosen, E), mask=stored)
    tl.store(weights + places, tl.where(is_real, values, 0.0), mask=stored)


@jit("num_visits")
def _sort_kernel(
    order: tl.tensor,  # (R,) int32
    starts: tl.tensor,  # (E + 1,) int32
    experts: tl.tensor,  # (R,) int32
    num_visits: tl.tensor,  # R
    E: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write one expert's part of the order: count what comes before it, then write its own; nothing is atomic."""
    expert, offsets = tl.program_id(0), tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_visits, BLOCK):
        found = tl.load(experts + start + offsets, mask=start + offsets < num_visits, other=E + 1)
        before += (found < expert).to(tl.int32)
    first = tl.sum(before, 0)
    tl.store(starts + expert, first)
    if expert < E:
        for start in range(0, num_visits, BLOCK):
            found = tl.load(experts + start + offsets, mask=start + offsets < num_visits, other=E + 1)
            mine = (found == expert).to(tl.int32)
            tl.store(order + first + tl.cumsum(mine, 0) - 1, start + offsets, mask=mine > 0)
            first += tl.sum(mine, 0)
