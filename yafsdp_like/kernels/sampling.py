"""Drawing the next token of each sequence: penalties, temperature, top-k, top-p, min-p, and noise of the row's own.

A token's logit becomes a score, in float32, one rounding an operation:

    score = logit if the token is new, else logit / repetition if logit > 0 else logit * repetition
    score = score - frequency * times generated - presence if ever generated
    score = score / temperature

It stays a candidate if
    top-k: fewer than k tokens have a higher score;
    top-p: tokens with a higher score hold less than p of what top-k has left, as softmax weighs them;
    min-p: its softmax weight is at least min_p times the highest.
Tokens of equal scores stay or go together, so that no order of equals decides. Of the candidates the one is drawn
whose score plus Gumbel noise is highest, which draws in proportion to the softmax weights (Gumbel, 1954). At
temperature 0 it is the highest score that is drawn, and the lowest token of equals.

[Note: noise of the row's own]
The noise of token i at position t of a request is word i % 4 of Philox-4x32-10 (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", 2011) of counter (i // 4, t, 0, 0) and the request's seed as the key. So a request draws
the same tokens alone, in any batch, and after it was preempted. A word w stands for the uniform number
(w + 1/2) / 2^32; noise is -ln E with E = -ln(1 - uniform), which keeps its precision where E is small, and those win.

[Note: thresholds without sorting]
Top-k and top-p keep what is at or above some score. That score is looked for by halving the interval between two
scores that occur, each end moving to a score that occurs, so the search ends after about log2 of the number of
distinct scores between. Nothing is sorted, so nothing is allocated.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import jit, launching_on, runs_on, tl
from yafsdp_like.kernels.sampling_params import SamplingFloats, SamplingInts

BLOCK = 8192  # tokens that a program takes at a time
NUM_WARPS = 16
NUM_FLOATS, NUM_INTS = len(SamplingFloats._fields), len(SamplingInts._fields)
_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10
_LOW_WORD = 0xFFFFFFFF
_UNIFORM_END = 1 - 2.0**-24  # the largest float32 below 1


@dataclass(frozen=True)
class SamplingRows:
    """How each row of logits is drawn from, on the device; a step may add to the positions in place."""

    floats: Tensor  # (B, 7) float32: columns of SamplingFloats
    ints: Tensor  # (B, 4) int64: columns of SamplingInts
    history: Tensor | None = None  # (rows, V) int32, see `remember`; its rows that are in use differ


def remember(history_row: Tensor, prompt: Tensor, generated: Tensor) -> None:
    """Makes one request's row of the history, (V,) int32, from its tokens, int64, of any number.

    An element is twice the times its token was generated, plus 1 if it is in the prompt. `sample` keeps it up.
    """
    history_row.zero_().index_fill_(0, prompt, 1)
    history_row.index_add_(0, generated, torch.full_like(generated, 2, dtype=torch.int32))


def sample_reference(logits: Tensor, rows: SamplingRows, out: Tensor) -> None:
    """What `sample` does, in plain torch, by sorting; sums in float64."""
    for b, ((inverse, top_p, log_min_p, *penalties), (seed, position, top_k, history_index)) in enumerate(
        zip(rows.floats.tolist(), rows.ints.tolist(), strict=True)
    ):
        seen = None if rows.history is None or history_index < 0 else rows.history[history_index]
        scores = logits[b].float() if seen is None else _penalized(logits[b].float(), seen, *penalties)
        if inverse:
            scores = scores * inverse
            noise = gumbel_noise(seed, position, len(scores), scores.device)
            noisy = (scores + noise).masked_fill(~_candidates(scores, top_k, top_p, log_min_p), -torch.inf)
        else:
            noisy = scores
        token = noisy.argmax()
        out[b] = token
        if seen is not None:
            seen[token] += 2


def _penalized(
    logits: Tensor, seen: Tensor, repetition: float, inverse_repetition: float, presence: float, frequency: float
) -> Tensor:
    repeated = torch.where(logits > 0, logits * inverse_repetition, logits * repetition)
    count = seen >> 1
    return torch.where(seen != 0, repeated, logits) - (count.float() * frequency + (count > 0).float() * presence)


def _candidates(scores: Tensor, top_k: int, top_p: float, log_min_p: float) -> Tensor:
    """Which of the scores (V,) may be drawn."""
    descending = scores.sort(descending=True).values
    num_higher = torch.searchsorted(-descending, -scores)  # (V,): how many are strictly higher
    kept = num_higher < (top_k or len(scores))
    weights = (descending - descending[0]).exp().double()
    mass = torch.cat((weights.new_zeros(1), weights.cumsum(0)))  # of the first n
    kept &= (top_p >= 1) | (mass[num_higher] < top_p * mass[kept.sum()])
    return kept & (scores >= descending[0] + log_min_p) & (scores > -torch.inf)


def gumbel_noise(seed: int, position: int, num_tokens: int, device: torch.device) -> Tensor:
    """The noise (num_tokens,) float32 that a request has at a position: see [Note: noise of the row's own]."""
    words = torch.stack(_philox(seed, position, -(-num_tokens // 4), device), dim=1).flatten()[:num_tokens]
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=_UNIFORM_END)
    return -(-torch.log1p(-uniform)).log()


def _philox(seed: int, position: int, num_counters: int, device: torch.device) -> list[Tensor]:
    """Four words (num_counters,) of Philox-4x32 of each counter, as int64."""
    state = [torch.arange(num_counters, device=device)]
    state += [torch.full_like(state[0], word) for word in (position & _LOW_WORD, 0, 0)]
    key = [seed & _LOW_WORD, (seed >> 32) & _LOW_WORD]
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _product(state[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _product(state[2], _PHILOX_MULTIPLIERS[1])
        state = [high1 ^ state[1] ^ key[0], low1, high0 ^ state[3] ^ key[1], low0]
        key = [(word + step) & _LOW_WORD for word, step in zip(key, _PHILOX_KEY_STEPS, strict=True)]
    return state


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of products of words with a word; no sum here needs more than 49 bits."""
    low = words * (factor & 0xFFFF)
    high = words * (factor >> 16) + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _LOW_WORD


def sample(logits: Tensor, rows: SamplingRows, out: Tensor) -> None:
    """Draws one token for each row of logits on the current stream, and counts it in the row's history.

    Args:
        logits: `(B, V)`, rows dense; keep their values. Tokens at -inf are never drawn; no logit is NaN or inf.
        rows: how each is drawn; of B rows.
        out: `(B,)` int64.

    Raises `ValueError` for shapes or dtypes that do not fit.
    """
    _check(logits, rows, out)
    if not runs_on(logits.device):
        sample_reference(logits, rows, out)
    elif len(logits):
        history = logits if rows.history is None else rows.history
        with launching_on(logits.device):
            _sample_kernel[(len(logits),)](
                out,
                logits,
                rows.floats,
                rows.ints,
                history,
                logits.stride(0),
                history.stride(0),
                V=logits.shape[1],
                HISTORY=rows.history is not None,
                BLOCK=min(BLOCK, max(4, 1 << (logits.shape[1] - 1).bit_length())),
                NUM_FLOATS=NUM_FLOATS,
                NUM_INTS=NUM_INTS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,  # scores have the reference's bits
            )


def _check(logits: Tensor, rows: SamplingRows, out: Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.shape[1]:
        raise ValueError(f"expected dense logits (B, V), found {tuple(logits.shape)} with strides {logits.stride()}")
    batch_size, vocab_size = logits.shape
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("floats", rows.floats, (batch_size, NUM_FLOATS), torch.float32),
        ("ints", rows.ints, (batch_size, NUM_INTS), torch.int64),
        ("out", out, (batch_size,), torch.int64),
    ]
    if rows.history is not None:
        expected.append(("history", rows.history, (len(rows.history), vocab_size), torch.int32))
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected {shape} in {dtype}, contiguous, found {tuple(tensor.shape)} in {tensor.dtype}"
            )


@jit()
def _scores(row: tl.tensor, ids: tl.tensor, V: tl.constexpr, HISTORY: tl.constexpr) -> tl.tensor:
    """Scores of tokens ``ids``; -inf past the vocabulary."""
    logits, history, num_remembered, factor, repetition, inverse_repetition, presence, frequency = row
    scores = tl.load(logits + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    if HISTORY:
        seen = tl.load(history + ids, mask=ids < num_remembered, other=0)
        repeated = tl.where(scores > 0, scores * inverse_repetition, scores * repetition)
        count = seen >> 1
        penalty = count.to(tl.float32) * frequency + tl.where(count > 0, presence, 0.0)
        scores = tl.where(seen != 0, repeated, scores) - penalty
    return scores * factor


@jit()
def _extremes(row: tl.tensor, V: tl.constexpr, HISTORY: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """(lowest but -inf, highest) of a row's scores."""
    lanes = tl.arange(0, BLOCK)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    highest = tl.full((BLOCK,), -3e38, tl.float32)  # finite, even if there is no other: differences from it are taken
    for start in range(0, V, BLOCK):
        scores = _scores(row, start + lanes, V, HISTORY)
        lowest = tl.minimum(lowest, tl.where(scores == float("-inf"), float("inf"), scores))
        highest = tl.maximum(highest, scores)
    return tl.min(lowest, 0), tl.max(highest, 0)


@jit()
def _weights(scores: tl.tensor, peak: tl.tensor, COUNTED: tl.constexpr) -> tl.tensor:
    """1 each if COUNTED, else in proportion to the softmax."""
    return tl.full(scores.shape, 1.0, tl.float32) if COUNTED else tl.exp(scores - peak)


@jit()
def _mass(
    row: tl.tensor, cut: tl.tensor, peak: tl.tensor, V: tl.constexpr, HISTORY: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """What the scores from ``cut`` on weigh."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        scores = _scores(row, start + lanes, V, HISTORY)
        total += tl.where(scores >= cut, _weights(scores, peak, COUNTED=False), 0.0)
    return tl.sum(total, 0)


@jit()
def _threshold(
    row: tl.tensor,
    low: tl.tensor,  # a score that occurs, not above the one looked for
    peak: tl.tensor,  # the highest score
    target: tl.tensor,
    COUNTED: tl.constexpr,
    V: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The lowest score, from ``low`` on, above which less than ``target`` weighs.

    See [Note: thresholds without sorting].
    """
    lanes = tl.arange(0, BLOCK)
    high = peak
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle < high, middle, low)
        total = tl.zeros((BLOCK,), tl.float32)
        above = tl.full((BLOCK,), float("inf"), tl.float32)
        below = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            scores = _scores(row, start + lanes, V, HISTORY)
            higher = scores > middle
            total += tl.where(higher, _weights(scores, peak, COUNTED), 0.0)
            above = tl.minimum(above, tl.where(higher, scores, float("inf")))
            below = tl.maximum(below, tl.where(higher, float("-inf"), scores))
        enough = tl.sum(total, 0) >= target
        low = tl.where(enough, tl.min(above, 0), low)
        high = tl.where(enough, high, tl.max(below, 0))
    return low


@jit()
def _noise(seed: tl.tensor, position: tl.tensor, start: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The noise of BLOCK tokens from ``start`` on, a multiple of 4: see [Note: noise of the row's own]."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + position, zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    uniform = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)  # 2^-32, 1 - 2^-24
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + uniform * 0.25)))  # of -ln(1 - uniform)
    return -tl.log(tl.where(uniform < 0.01, series, -tl.log(1.0 - uniform)))


@jit()
def _highest(
    row: tl.tensor,
    cut: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    NOISY: tl.constexpr,
    V: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The token from ``cut`` on with the highest score, noise added if NOISY; the lowest token of equals."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = lanes
    for start in range(0, V, BLOCK):
        scores = _scores(row, start + lanes, V, HISTORY)
        if NOISY:
            scores = tl.where(scores >= cut, scores + _noise(seed, position, start, BLOCK), float("-inf"))
        better = scores > best
        best, best_id = tl.where(better, scores, best), tl.where(better, start + lanes, best_id)
    return tl.min(tl.where(best == tl.max(best, 0), best_id, V - 1), 0)


@jit()
def _columns(row: tl.tensor, NUM: tl.constexpr) -> tl.tensor:
    """Load the NUM elements of a row."""
    columns = ()
    for i in tl.static_range(NUM):
        columns = columns + (tl.load(row + i),)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@jit()
def _sample_kernel(
    out: tl.tensor,  # (B,) int64
    logits: tl.tensor,  # (B, V)
    floats: tl.tensor,  # (B, NUM_FLOATS) float32
    ints: tl.tensor,  # (B, NUM_INTS) int64
    history: tl.tensor,  # (rows, V) int32 if HISTORY
    logits_row: tl.tensor,  # strides
    history_row: tl.tensor,
    V: tl.constexpr,
    HISTORY: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_FLOATS: tl.constexpr,
    NUM_INTS: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64)
    # In the order of SamplingFloats and SamplingInts:
    inverse_temperature, top_p, log_min_p, repetition, inverse_repetition, presence, frequency = _columns(
        floats + b * NUM_FLOATS, NUM_FLOATS
    )
    seed, position, top_k, history_index = _columns(ints + b * NUM_INTS, NUM_INTS)
    position = position.to(tl.int32)
    history_pointer = history + history_index * history_row
    row = (
        logits + b * logits_row,
        history_pointer,
        tl.where(history_index >= 0, V, 0),
        tl.where(inverse_temperature == 0.0, 1.0, inverse_temperature),
        repetition,
        inverse_repetition,
        presence,
        frequency,
    )
    if inverse_temperature == 0.0:
        token = _highest(row, float("-inf"), seed, position, False, V, HISTORY, BLOCK)
    else:
        cut, peak = _extremes(row, V, HISTORY, BLOCK)
        if (top_k > 0) & (top_k < V):
            cut = _threshold(row, cut, peak, top_k.to(tl.float32), True, V, HISTORY, BLOCK)
        if top_p < 1.0:
            target = top_p * _mass(row, cut, peak, V, HISTORY, BLOCK)
            cut = _threshold(row, cut, peak, target, False, V, HISTORY, BLOCK)
        token = _highest(row, tl.maximum(cut, peak + log_min_p), seed, position, True, V, HISTORY, BLOCK)
    tl.store(out + b, token.to(tl.int64))
    if HISTORY:
        counted, remembers = history_pointer + token, history_index >= 0
        tl.store(counted, tl.load(counted, mask=remembers, other=0) + 2, mask=remembers)
