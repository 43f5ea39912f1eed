"""Items in order of rank, any of which may leave at any time."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

Item = TypeVar("Item", int, str)
Rank = tuple[float, ...]


class Ranked(Generic[Item]):
    """A heap with removal: ``put`` and ``discard`` are O(log n) amortised, ``first`` is O(1).

    Entries that are no longer true stay in the heap until they surface, or until they are most of it: its length is
    bounded by the number of items, not by the number of calls.
    """

    def __init__(self) -> None:
        self._ranks: dict[Item, Rank] = {}
        self._heap: list[tuple[Rank, Item]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, item: Item) -> bool:
        return item in self._ranks

    def __iter__(self) -> Iterator[Item]:
        """Lowest rank first; O(n log n)."""
        return iter(sorted(self._ranks, key=lambda item: (self._ranks[item], item)))

    def rank(self, item: Item) -> Rank:
        """Return the rank of an item that is there."""
        return self._ranks[item]

    def put(self, item: Item, rank: Rank) -> None:
        """Add ``item``, or give it another rank."""
        if self._ranks.get(item) != rank:
            self._ranks[item] = rank
            heapq.heappush(self._heap, (rank, item))
        self._tidy()

    def discard(self, item: Item) -> None:
        """Remove ``item`` if it is there."""
        self._ranks.pop(item, None)
        self._tidy()

    def first(self) -> Item | None:
        """Return the item of lowest rank, the lower of two items of one rank; None if there is none."""
        return self._heap[0][1] if self._heap else None

    def _tidy(self) -> None:
        """Remove outdated entries from the top."""
        if len(self._heap) > 2 * len(self._ranks) + 16:
            self._heap = [(rank, item) for item, rank in self._ranks.items()]
            heapq.heapify(self._heap)
        while self._heap and self._ranks.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
