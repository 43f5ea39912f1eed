"""Simple policies beside ours, in the same simulator: what each model's turn is, and how long it lasts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.schedule import TokenScheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.inference.fleet.queues import ModelQueue

STEPS = 16  # of a turn of the round robin
MAX_QUOTA_S = 4.0  # QMAX of Aegaeon's artifact: ``max_batch_quota`` of decode_scheduler.py


class FirstCome(TokenScheduler):
    """The model of the oldest request runs until that request has ended: switches by request, not by token."""

    def _choose(self, working: Sequence[ModelQueue], now: float) -> ModelQueue:
        return min(working, key=lambda queue: min(s.reader.arrived for s in queue.requests()))

    def quota(self, queue: ModelQueue, working: Sequence[ModelQueue]) -> int:
        """Return a few steps, after which the oldest request is most often the same."""
        return 8


class RoundRobin(TokenScheduler):
    """Each model with work in turn, for as many steps."""

    def _choose(self, working: Sequence[ModelQueue], now: float) -> ModelQueue:
        return min(working, key=lambda queue: queue.waits_since)

    def quota(self, queue: ModelQueue, working: Sequence[ModelQueue]) -> int:
        """Return the same for all."""
        return STEPS


class PublishedQuotas(RoundRobin):
    """Each model with work in turn, for the time that Aegaeon's formula gives it (SOSP 2025).

    As in ``decode_scheduler.py`` of its artifact: with ``n = tpot / step`` of each model and ``c`` seconds of switches,
    ``alpha = max(c / (min(n) * QMAX) + sum(1 / n), 0.5)`` and a quota of ``c / (n * (alpha - sum(1 / n)))`` seconds.
    Prompts go first in a turn, where the paper has devices of their own for them.
    """

    def quota(self, queue: ModelQueue, working: Sequence[ModelQueue]) -> int:
        """Return the steps that fit into the time that the formula gives."""
        shares = {other.name: other.step_s / other.targets.tpot_s for other in working}  # 1 / n
        switches_s = sum(other.switch_s for other in working)
        alpha = max(switches_s * max(shares.values()) / MAX_QUOTA_S + sum(shares.values()), 0.5)
        quota_s = switches_s * shares[queue.name] / max(alpha - sum(shares.values()), 1e-9)
        return max(1, math.ceil(quota_s / queue.step_s))


POLICIES = {
    "ours": TokenScheduler,
    "first come": FirstCome,
    "round robin": RoundRobin,
    "published quotas": PublishedQuotas,
}
