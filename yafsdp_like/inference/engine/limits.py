"""What a request may ask for, and which tokens it may draw next: fixed sets, first tokens, words, and a grammar.

Owns what is remembered of a sequence for the latter, but for the grammar's masks (``grammar_masks.py``). Tokens are
bits on the host, those of kernels/token_bits.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from yafsdp_like.inference.engine.grammar_masks import GrammarText, Words
from yafsdp_like.kernels.token_bits import num_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest
    from yafsdp_like.inference.engine.request import Request, TokenLimits
    from yafsdp_like.inference.plan.serving_plan import ServingPlan


class LimitedSequence:
    """What one sequence may draw, as it grows; O(W + words that are not to be said) a token, however long it is."""

    def __init__(self, sequence: ActiveRequest, limits: TokenLimits, vocab_size: int) -> None:
        self.text = None if limits.grammar is None else GrammarText(limits.grammar, len(sequence.request.prompt))
        self._request, self._limits, self._vocab_size = sequence.request, limits, vocab_size
        allowed = all_bits(vocab_size) if limits.allowed is None else bits_of(limits.allowed, vocab_size)
        singles = [word[0] for word in limits.bad_words if len(word) == 1]
        self._always = allowed & ~bits_of(singles, vocab_size) if singles else allowed
        self._longer = [word for word in limits.bad_words if len(word) > 1]
        self._num_read = max((len(word) - 1 for word in self._longer), default=0)  # last tokens that decide on words
        self._stops = bits_of(sequence.request.stop_tokens, vocab_size)

    def write(self, tokens: Sequence[int], bits: Words, drafted: tuple[int, ...] = ()) -> None:
        """Write which tokens may follow ``tokens``, the prompt's among them; where none may, those that stop.

        What was ``drafted`` behind them counts for this call alone; what may not be drafted is never reached. The mask
        of a grammar must not be late. Raises GrammarError where there is none.
        """
        num_prompt = len(self._request.prompt)
        bits[:] = self._always
        if self._longer:
            last = (*tokens[max(num_prompt, len(tokens) - self._num_read) :], *drafted)
            banned = [word[-1] for word in self._longer if last[1 - len(word) :] == word[:-1]]
            if banned:
                bits &= ~bits_of(banned, self._vocab_size)
        if self.text is not None:
            if self.text.error is not None:
                raise self.text.error
            allowed = self.text.masks[drafted]
            if allowed is not None:
                bits &= allowed[: len(bits)]
        if len(tokens) - num_prompt + len(drafted) < self._limits.min_tokens:
            bits &= ~self._stops
        if not bits.any():
            bits[:] = self._stops if self._stops.any() else self._always


def check_limits(request: Request, vocab_size: int, *, may_follow: bool = True) -> None:
    """Raise ValueError for tokens outside of the vocabulary, and where none may be drawn, nor one stop in its place.

    ``may_follow`` says whether grammars are served.
    """
    if request.has_grammar and not may_follow:
        raise ValueError(
            f"request {request.id!r}: tensor parallel ranks follow no grammars, since their clocks differ; serve it in "
            "another mode"
        )
    outside = [token for token in request.named_tokens if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"request {request.id!r}: token {outside[0]} is outside of the vocabulary of {vocab_size} tokens"
        )
    limits = request.limits
    if limits is None or any(0 <= token < vocab_size for token in request.stop_tokens):
        return
    bad = {word[0] for word in limits.bad_words if len(word) == 1 and 0 <= word[0] < vocab_size}
    num_left = vocab_size - len(bad) if limits.allowed is None else len(set(limits.allowed) - bad)
    if not num_left:
        raise ValueError(
            f"request {request.id!r}: all tokens that are allowed are bad words, and none stops: nothing may be drawn"
        )


@cache
def all_bits(vocab_size: int) -> Words:
    """Return words in which every token has its bit; they are shared and cannot be written."""
    words = np.packbits(np.arange(num_words(vocab_size) * 32) < vocab_size, bitorder="little").view(np.int32)
    words.flags.writeable = False
    return words


def bits_of(tokens: Iterable[int], vocab_size: int) -> Words:
    """Return a word for every 32 tokens, in which those of ``tokens`` have their bits; others are none of the model."""
    chosen = np.zeros(num_words(vocab_size) * 32, dtype=np.uint8)
    chosen[[token for token in tokens if 0 <= token < vocab_size]] = 1
    return np.packbits(chosen, bitorder="little").view(np.int32)


def check_length(request: Request, plan: ServingPlan) -> None:
    """Raise ValueError for a request of more tokens than a sequence may have, or than have room at once."""
    name, num_tokens = f"request {request.id!r}", len(request.prompt) + request.max_tokens
    if num_tokens > plan.max_seq_len:
        raise ValueError(
            f"{name}: {len(request.prompt)} tokens of prompt and max_tokens {request.max_tokens} are more than "
            f"max_seq_len {plan.max_seq_len}"
        )
    if not plan.capacity.fits(plan.grid, num_tokens):
        pages_nbytes = plan.grid.region_nbytes
        raise ValueError(f"{name}: keys and values of {num_tokens} tokens do not fit {pages_nbytes} bytes for pages")
