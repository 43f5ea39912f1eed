"""Which sequence comes when: a pure function of one integer, the number of sequences consumed so far.

Knows nothing of files, of steps, or of what ran before. [Note: one integer]
The whole state of the data is ``position``, the number of sequences that all ranks together have consumed. Global batch
``position .. position + global_batch_size`` is a row of indices that depends on nothing else; a rank takes its slice of
it. Any number of ranks therefore sees the same sequences in the same order, and to resume is to pass the same integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Indices = npt.NDArray[np.uint64]
NUM_ROUNDS = 8


@dataclass(frozen=True)
class SequenceOrder:
    """Epochs over ``num_sequences``, each a permutation of its own that ``seed`` decides; None keeps them in order.

    A permutation is a Feistel network over the smallest even number of bits that holds every index (M. Luby,
    C. Rackoff, How to Construct Pseudorandom Permutations, SIAM J. Comput. 17(2), 1988), applied again to whatever
    falls outside, until it falls inside (cycle walking: J. Black, P. Rogaway, Ciphers with Arbitrary Finite Domains,
    CT-RSA 2002). It needs no memory, costs the same wherever one starts, and, being integer arithmetic written out
    here, is the same with every version of numpy, which numpy does not promise of its own permutations.
    """

    num_sequences: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.num_sequences < 1:
            raise ValueError(f"an order needs at least one sequence, found {self.num_sequences}")

    def indices(self, position: int, count: int) -> Indices:
        """(count,) indices of the sequences at positions ``position .. position + count``, over epochs."""
        if position < 0 or count < 0:
            raise ValueError(f"position and count must not be negative, found {position} and {count}")
        parts = []
        while count > 0:
            epoch, start = divmod(position, self.num_sequences)
            stop = min(start + count, self.num_sequences)
            parts.append(self._permuted(epoch, np.arange(start, stop, dtype=np.uint64)))
            position, count = position + stop - start, count - (stop - start)
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

    def _permuted(self, epoch: int, offsets: Indices) -> Indices:
        if self.seed is None:
            return offsets
        half_bits = max(1, -(-(self.num_sequences - 1).bit_length() // 2))
        keys = _round_keys(self.seed, epoch)
        permuted = _feistel(offsets, keys, half_bits)
        while (outside := permuted >= self.num_sequences).any():
            permuted[outside] = _feistel(permuted[outside], keys, half_bits)
        return permuted


@dataclass(frozen=True)
class Batches:
    """Rows of ``seq_len`` inputs and targets out of one flat run of tokens; the targets are the inputs, one ahead.

    Sequence ``i`` is tokens ``[i * seq_len, (i + 1) * seq_len]``, both ends included: neighbours share one token, so
    that each is a target once. What does not fill a sequence at the end is not used.
    """

    tokens: npt.NDArray[np.unsignedinteger]  # (num_tokens,), mapped from a file: only the rows asked for are read
    seq_len: int
    seed: int | None = 0
    name: str = "the text"  # of the tokens, in errors
    vocab_size: int | None = None  # no id is this large; None: unknown

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, found {self.seq_len}")
        if self.num_sequences < 1:
            raise ValueError(
                f"{self.name} has {len(self.tokens)} tokens, one sequence takes seq_len + 1 = {self.seq_len + 1}: "
                "lower seq_len, or give more text (where it is held-out text that is short, a larger heldout_fraction)"
            )

    @property
    def num_sequences(self) -> int:
        """Number of whole sequences in the tokens."""
        return (len(self.tokens) - 1) // self.seq_len

    @property
    def order(self) -> SequenceOrder:
        """The order in which sequences are drawn."""
        return SequenceOrder(self.num_sequences, self.seed)

    def batch(
        self, position: int, global_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of this rank, each (B, T) int64 on the CPU, B = global_batch_size / world_size.

        ``position`` is the number of sequences consumed before; the next call's is ``position + global_batch_size``.
        The ranks' rows, one rank after the other, are the global batch.
        """
        import torch  # here: options and text are checked before it is imported

        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), found {rank}")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size must be a positive multiple of the number of ranks, found {global_batch_size} on "
                f"{world_size} ranks"
            )
        num_rows = global_batch_size // world_size
        rows = self.order.indices(position + rank * num_rows, num_rows).astype(np.int64)
        columns = np.arange(self.seq_len + 1, dtype=np.int64)
        tokens = torch.from_numpy(self.tokens[rows[:, None] * self.seq_len + columns].astype(np.int64))  # (B, T + 1)
        if self.vocab_size is not None and (largest := int(tokens.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.name} has the token {largest}, and its vocabulary has {self.vocab_size}: the file is damaged; "
                "remove its directory, and it is made again"
            )
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _feistel(values: Indices, keys: Indices, half_bits: int) -> Indices:
    """A permutation of ``[0, 4 ** half_bits)``: each round swaps the halves and blends a hash of one into the other."""
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << shift) | right


def _round_keys(seed: int, epoch: int) -> Indices:
    """(NUM_ROUNDS,) keys; seed and epoch are hashed one after the other, so that no two pairs meet by arithmetic."""
    key: Indices = _mixed(_wrapped(seed)) ^ _wrapped(epoch)
    rounds: Indices = np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64)
    return _mixed(_mixed(key) + rounds)


def _wrapped(value: int) -> Indices:
    return np.array([value % 2**64], dtype=np.uint64)


def _mixed(values: Indices) -> Indices:
    """One step of SplitMix64 (G. Steele, D. Lea, C. Flood, Fast Splittable Pseudorandom Number Generators, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
