"""Lists of requests in the order of priority, then arrival. Owns nothing; the lists are the scheduler's."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.batch import ActiveRequest


def insert_in_order(sequences: list[ActiveRequest], sequence: ActiveRequest) -> None:
    """Insert a sequence among others behind those that go before it."""
    bisect.insort(sequences, sequence, key=lambda other: other.order)


def remove_in_order(sequences: list[ActiveRequest], sequence: ActiveRequest) -> None:
    """Remove a sequence from others."""
    index = bisect.bisect_left(sequences, sequence.order, key=lambda other: other.order)
    assert sequences[index] is sequence
    del sequences[index]
