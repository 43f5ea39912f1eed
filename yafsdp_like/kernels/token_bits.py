"""Scores of tokens that may not be drawn become -inf; a bit for each token says which may.

Bit t % 32 of word t // 32 of a row is token t's. Tokens beyond the words may not be drawn.

Shapes: B sequences, V vocabulary, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yafsdp_like.kernels.blocks import jit, launching_on, runs_on, tl

BLOCK = 4096  # tokens of a program


def num_words(vocab_size: int) -> int:
    """Words of 32 bits that a vocabulary needs."""
    return -(-vocab_size // 32)


def forbid_reference(scores: Tensor, bits: Tensor) -> None:
    """What `forbid` does, in plain torch."""
    tokens = torch.arange(scores.shape[1], device=scores.device)
    scores.masked_fill_((bits[:, tokens // 32] >> (tokens % 32)) & 1 == 0, -torch.inf)


def forbid(scores: Tensor, bits: Tensor) -> None:
    """Set scores to -inf where the token's bit is 0, on the current stream.

    Args:
        scores: `(B, V)` float32, rows dense.
        bits: `(B, W)` int32, rows dense.

    Raises `ValueError` for shapes or dtypes that do not fit.
    """
    expected = len(scores), num_words(scores.shape[1])
    if scores.dtype != torch.float32 or bits.dtype != torch.int32 or tuple(bits.shape) != expected:
        raise ValueError(
            f"expected scores (B, V) in float32 and bits {expected} in int32, found {tuple(scores.shape)} in "
            f"{scores.dtype} and {tuple(bits.shape)} in {bits.dtype}"
        )
    if not runs_on(scores.device):
        forbid_reference(scores, bits)
    elif scores.numel():
        with launching_on(scores.device):
            grid = (len(scores), -(-scores.shape[1] // BLOCK))
            _forbid_kernel[grid](scores, bits, scores.stride(0), bits.stride(0), V=scores.shape[1], BLOCK=BLOCK)


@jit()
def _forbid_kernel(
    scores: tl.tensor,  # (B, V) float32
    bits: tl.tensor,  # (B, W) int32
    scores_row: tl.tensor,  # strides
    bits_row: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bits + b * bits_row + ids // 32, mask=ids < V, other=-1)
    forbidden = ((words >> (ids % 32)) & 1) == 0
    tl.store(scores + b * scores_row + ids, tl.full((BLOCK,), float("-inf"), tl.float32), mask=(ids < V) & forbidden)
