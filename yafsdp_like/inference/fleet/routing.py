"""To which replica of many a request goes, and how many replicas there should be: plain numbers in, numbers out.

A replica is a device or a host with models of its own choosing awake. Routers see replicas a moment late, so a replica
may still refuse what it is sent; the request then goes to the next one in the order.

[Note: order of replicas]
1. Those whose time is not all taken come before others; ``GATHER`` more may be taken where the model is at work.
2. A step takes nearly as long for one request as for ten, so requests of a model gather where it is at work already:
   what that saves, a step's time for each token, is far more than a copy of weights or a prompt costs. That is also why
   a replica with more to do than it has time for is left late: a model that is at work in two places takes twice the
   time, and batches grow where readers wait. (Simulated: 8 devices with 10 models each keep 99 % of their readers' time
   in targets and 86 % of requests, and 98 and 66 % where 1 is the limit for all.)
3. Then what comes first counts: the seconds until the model's weights are on the device, less those of the prompt that
   need not be computed because its beginning is cached there.
4. Then the replica with most time left, then the one with fewer requests, then the first.

[Note: number of replicas]
Load is the share of its time that a replica needs to keep the pace of all its readers. Replicas are added where the
mean is above ``high``, so many that it becomes ``aim``, and one where all replicas that a request was offered to have
refused it; they are taken away where the mean over those left would still be at most ``aim``. As ``aim < high``, what
is added for load is not taken away at the same load, nor the other way round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

GATHER = 0.6  # of a replica's time
_ROUNDING = 1e-9  # of sums of loads


@dataclass(frozen=True)
class ReplicaView:
    """What a router knows of one replica, for one request of one model."""

    load: float  # the share of its time that models at work take, 1: all
    has_model: bool = False  # requests of the model are under way there
    wake_s: float = 0.0  # until the model's weights are on the device; inf: it cannot be had there
    saved_s: float = 0.0  # of the prompt's time, since its beginning is cached there
    num_requests: int = 0  # that are under way there, of all models


def ranked(replicas: Sequence[ReplicaView], max_load: float = 1.0) -> list[int]:
    """Return the indices of the replicas that can serve a request, the best first; see [Note: order of replicas]."""

    def key(index: int) -> tuple[bool, bool, float, float, int, int]:
        view = replicas[index]
        first_s = view.wake_s - view.saved_s
        has_time = view.load < max_load + GATHER * view.has_model
        return not has_time, not view.has_model, first_s, view.load, view.num_requests, index

    return sorted((index for index, view in enumerate(replicas) if view.wake_s < math.inf), key=key)


def wanted_replicas(loads: Sequence[float], num_refused: int = 0, aim: float = 0.6, high: float = 0.8) -> int:
    """Return how many replicas there should be for the ``loads`` of those there are, at least one.

    ``num_refused``: requests, of late, that were refused by all replicas that they were offered to. Raises ValueError
    unless ``0 < aim < high``. See [Note: number of replicas].
    """
    if not 0 < aim < high:
        raise ValueError(f"expected 0 < aim < high, found aim={aim} and high={high}")
    there, total = max(1, len(loads)), math.fsum(loads)
    fitting = max(1, math.ceil(total / aim - _ROUNDING))
    if num_refused or total > high * there + _ROUNDING:
        return max(there + bool(num_refused), fitting)
    return min(there, fitting)
