"""A small model that drafts what a large one is likely to draw: an engine of its own, which is asked between two steps.

It draws with the request's own parameters and noise: where the two models agree on what is likely, the same noise makes
them draw the same token, also at a temperature (Daliri et al., "Coupling without communication and drafter-invariant
speculative decoding", 2024). Its engine finds the pages of a text by their content, and computes the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.engine.speculator import Prospect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from yafsdp_like.inference.engine.batch import ActiveRequest
    from yafsdp_like.inference.engine.request import Completion

_PRIOR = 0.7


class Generating(Protocol):
    """What is needed of the draft model's engine."""

    max_seq_len: int

    def generate(self, requests: Iterable[Request]) -> dict[str, Completion]:
        """Serve all of ``requests`` to the end."""


class DraftModel:
    """A `speculator.Drafter` that asks another engine, which shares this one's stream."""

    def __init__(self, engine: Generating) -> None:
        self.engine = engine

    def prospect_of(self, sequence: ActiveRequest, most: int) -> Prospect | None:
        """Return how many tokens the model can draft: of a text that is longer than it takes, none."""
        count = min(most, self.engine.max_seq_len - sequence.length)
        return Prospect(count, kind=0, prior=_PRIOR) if count > 0 else None

    def draft(self, wanted: Mapping[ActiveRequest, int]) -> dict[ActiveRequest, tuple[int, ...]]:
        """Generate so many tokens behind each sequence."""
        requests = [
            Request(str(row), tuple(it.tokens), it.request.sampling, max_tokens=count, salt=it.request.salt)
            for row, (it, count) in enumerate(wanted.items())
        ]
        done = self.engine.generate(requests)
        return {sequence: tuple(done[str(row)].ids) for row, sequence in enumerate(wanted)}
