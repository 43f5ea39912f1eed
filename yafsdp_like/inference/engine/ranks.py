"""Lists of requests in order of rank: who goes first comes first. Owns nothing; the lists are the scheduler's."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.batch import ActiveRequest


def insert_by_rank(sequences: list[ActiveRequest], sequence: ActiveRequest) -> None:
    """Insert a sequence among others where it ranks."""
    bisect.insort(sequences, sequence, key=lambda other: other.rank)


def remove_by_rank(sequences: list[ActiveRequest], sequence: ActiveRequest) -> None:
    """Remove a sequence from others."""
    index = bisect.bisect_left(sequences, sequence.rank, key=lambda other: other.rank)
    assert sequences[index] is sequence
    del sequences[index]
