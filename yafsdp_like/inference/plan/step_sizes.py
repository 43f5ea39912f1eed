"""The sizes that steps are padded to, so that each can be a CUDA graph.

A step that only decodes has one of few batch sizes. Any other has one of few numbers of tokens, and one of few numbers
of sequences; matrix products cost by the former, attention and drawing by the latter. Sizes are chosen from what a step
needs alone, whether it is recorded or not, so graphs do not change the shapes of products, and hence no bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from yafsdp_like.inference.plan.buffers import ROW_ALIGNMENT

if TYPE_CHECKING:
    from yafsdp_like.inference.options import EngineOptions

# Up to which number of tokens padding is to a multiple of what. Measured on an H200 with the shape of Llama 3 8B in
# bf16: sizes that are left out take as long as the next one, or longer (448 tokens 14.3 ms, 512 tokens 11.0 ms).
_TOKEN_STEPS = ((16, 8), (128, 16), (256, 32), (384, 64), (512, 128), (640, 64), (1280, 128), (4096, 256))
_LARGEST_TOKEN_STEP = 512
_NUM_SEQUENCES = (8, 32, 128, 512)
_MAX_CHUNKS = 32  # where that suffices: a size has a row of logits for each, with work or without


@dataclass(frozen=True)
class StepSize:
    """How many rows of what a step has, padding included; see `forward.py`, [Note: padded steps]."""

    num_tokens: int
    num_single: int  # sequences with one token
    num_chunks: int = 0  # sequences with several
    num_drawing: int = 0  # rows whose next token is drawn
    adapted: bool = False  # whether some rows have adapters

    @classmethod
    def decode(cls, batch_size: int) -> StepSize:
        """Make a step of one token for each sequence, all of which draw, in order."""
        return cls(batch_size, batch_size, num_drawing=batch_size)

    @property
    def first_chunk(self) -> int:
        """The row of tables at which chunks begin."""
        return -(-self.num_single // ROW_ALIGNMENT) * ROW_ALIGNMENT

    @property
    def num_table_rows(self) -> int:
        """Rows of tables of sequences up to the last one in use."""
        return self.first_chunk + self.num_chunks if self.num_chunks else self.num_single

    @property
    def draws_in_order(self) -> bool:
        """Whether every row draws, in order, so that no index is needed."""
        return self.num_chunks == 0 and self.num_drawing == self.num_single


@dataclass(frozen=True)
class StepBuckets:
    """Sizes of steps of at most ``max_batch_size`` sequences and ``max_batch_tokens`` tokens."""

    max_batch_size: int
    max_batch_tokens: int
    max_decode_rows: int = 0  # where steps that only decode have more than one row of some sequences

    @classmethod
    def of(cls, options: EngineOptions) -> StepBuckets:
        """Make the sizes of an engine's steps."""
        return cls(options.max_batch_size, options.max_batch_tokens, options.max_decode_rows)

    @cached_property
    def decode(self) -> list[StepSize]:
        """Sizes of steps that only decode.

        Powers of two to 8, then multiples of 8, of 16 above 64, and the largest.
        """
        most = max(self.max_batch_size, self.max_decode_rows)
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
        return [StepSize.decode(size) for size in (*(size for size in sizes if size < most), most)]

    @cached_property
    def mixed(self) -> list[StepSize]:
        """Sizes of all other steps, those with fewer tokens first, then those with fewer sequences."""
        sizes = (self._mixed(tokens, *limits) for tokens in self._tokens for limits in self._sequences)
        return list(dict.fromkeys(sizes))

    def fit(self, size: StepSize) -> StepSize:
        """Return the smallest size that holds a step of ``size``."""
        if size.draws_in_order:
            return next(fit for fit in self.decode if fit.num_single >= size.num_single)
        tokens = self.padded(size.num_tokens)
        return next(
            self._mixed(tokens, *limits)
            for limits in self._sequences
            if all(
                most >= n for most, n in zip(limits, (size.num_single, size.num_chunks, size.num_drawing), strict=True)
            )
        )

    def padded(self, num_tokens: int) -> int:
        """Return the number of tokens that a step is padded to, if it does more than decode.

        Above the largest size it is ``num_tokens`` itself.
        """
        return next((tokens for tokens in self._tokens if tokens >= num_tokens), num_tokens)

    def least(self, num_tokens: int) -> StepSize:
        """Return the size of a step of so many tokens with the fewest sequences of both kinds."""
        return self.fit(StepSize(num_tokens, min(1, num_tokens - 1), 1, 1))

    @cached_property
    def _tokens(self) -> list[int]:
        """Numbers of tokens that steps are padded to."""
        tokens, last = list[int](), 0
        for end, step in (*_TOKEN_STEPS, (self.max_batch_tokens, _LARGEST_TOKEN_STEP)):
            tokens += range(last + step, end + 1, step)
            last = max(last, end)
        return [*(n for n in tokens if n < self.max_batch_tokens), self.max_batch_tokens]

    @cached_property
    def _sequences(self) -> list[tuple[int, int, int]]:
        """Limits of sequences that decode, of chunks, and of rows that draw.

        The first are for steps of prompts' chunks alone, after which nothing is drawn.
        """
        most = self.max_batch_size
        few = [(n, min(n, _MAX_CHUNKS)) for n in (*(n for n in _NUM_SEQUENCES if n < most), most)]
        return [(0, min(8, most), 0), *((n, c, min(n + c, most)) for n, c in (*few, (most, most)))]

    def _mixed(self, num_tokens: int, num_single: int, num_chunks: int, num_drawing: int) -> StepSize:
        single, chunks, drawing = (min(n, num_tokens) for n in (num_single, num_chunks, num_drawing))
        return StepSize(num_tokens, single, chunks, drawing)
