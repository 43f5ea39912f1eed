"""When requests must have ended: the earliest first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from yafsdp_like.inference.engine.batch import RequestStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.inference.engine.batch import ActiveRequest


class Deadlines:
    """The deadlines of requests that have not ended, in a heap; O(log n) a request, amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ActiveRequest]] = []

    def __bool__(self) -> bool:
        """Whether ``expired`` may find any, now or later."""
        return bool(self._heap)

    def add(self, sequence: ActiveRequest, num_open: int) -> None:
        """Add a request, if it has a deadline; those of ended ones go once they outnumber the ``num_open`` others."""
        if sequence.request.deadline is None:
            return
        heapq.heappush(self._heap, (sequence.request.deadline, sequence.number, sequence))
        if len(self._heap) > 2 * num_open:
            self._heap = [entry for entry in self._heap if entry[2].status is not RequestStatus.ENDED]
            heapq.heapify(self._heap)

    def expired(self, now: float) -> Iterator[ActiveRequest]:
        """Yield the requests whose deadlines are over, each once."""
        while self._heap and self._heap[0][0] <= now:
            _, _, sequence = heapq.heappop(self._heap)
            if sequence.status is not RequestStatus.ENDED:
                yield sequence
