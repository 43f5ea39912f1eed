"""Targets of one model, and whether a request's tokens come in time for somebody who reads them at that pace.

[Note: a reader]
The first token is due ``ttft_s`` after the request arrived, each later one ``tpot_s`` after the one before was *due*: a
token that comes early buys time for the next. A token that comes late stalls the reader, who goes on from there, so
that the next one is due ``tpot_s`` after it came. All of the time since the reader had read the token before counts as
stalled. A request's share of time within targets is what is not stalled, from its arrival to its last token. So counts
the artifact of Aegaeon (SOSP 2025) too: the example in its ``plots/plot_e2e.py`` is one of the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Targets:
    """What one model's readers are promised, in seconds. Raises ValueError for what no step can keep."""

    ttft_s: float  # from a request's arrival to its first token
    tpot_s: float  # from one token to the next

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, found {value}")


class Reader:
    """When the tokens of one request are due, and how long its reader was stalled; see [Note: a reader]."""

    def __init__(self, targets: Targets, arrived: float) -> None:
        self.targets, self.arrived = targets, arrived
        self.due = arrived + targets.ttft_s  # of the next token
        self.num_tokens = self.num_late = 0
        self.first_at: float | None = None
        self.last_at = arrived
        self.stalled_s = 0.0

    def deliver(self, first_at: float, num_tokens: int = 1, spacing_s: float = 0.0) -> None:
        """Take ``num_tokens`` tokens, the first at ``first_at``, each next one ``spacing_s`` later.

        O(1) where steps are shorter than ``tpot_s``, else O(num_tokens).
        """
        if self.first_at is None:
            self.first_at = first_at
        tpot_s, left = self.targets.tpot_s, num_tokens
        at = first_at
        while left:
            if at > self.due:
                allowed = tpot_s if self.num_tokens else self.targets.ttft_s
                self.stalled_s += at - (self.due - allowed)
                self.num_late += 1
                self.due = at
            count = left if spacing_s <= tpot_s else 1  # once one is in time, so are those after it
            self.due += count * tpot_s
            self.num_tokens += count
            left -= count
            at += count * spacing_s
        self.last_at = first_at + (num_tokens - 1) * spacing_s

    @property
    def share_in_time(self) -> float:
        """The share of the time from arrival to the last token in which the reader was not stalled."""
        total = self.last_at - self.arrived
        return 1.0 if total <= 0 else 1.0 - self.stalled_s / total
