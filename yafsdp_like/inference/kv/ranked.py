"""Items in order of rank, any of which may leave at any time."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Item = TypeVar("Item", int, str)
Rank = tuple[float, ...]


class Ranked(Generic[Item]):
    """A heap with removal: every operation is O(log n) amortised for each item.

    Entries that are no longer true stay in the heap until ``first`` meets them, or until they are most of it: its
    length is bounded by the number of items, not by the number of calls.
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
        self.put_all([(item, rank)])

    def put_all(self, ranked: Iterable[tuple[Item, Rank]]) -> None:
        """Add items, or give them other ranks."""
        ranks, heap = self._ranks, self._heap
        for item, rank in ranked:
            if ranks.get(item) != rank:
                ranks[item] = rank
                heapq.heappush(heap, (rank, item))
        self._bound_heap()

    def discard(self, item: Item) -> None:
        """Remove ``item`` if it is there."""
        if self._ranks.pop(item, None) is not None:
            self._bound_heap()

    def remove_all(self, items: Iterable[Item]) -> None:
        """Remove items that are there."""
        for item in items:
            del self._ranks[item]
        self._bound_heap()

    def first(self) -> Item | None:
        """Return the item of lowest rank, the lower of two items of one rank; None if there is none."""
        ranks, heap = self._ranks, self._heap
        while heap and ranks.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def pop_below(self, bound: Rank | None, count: int) -> list[tuple[Item, Rank]]:
        """Remove and return up to ``count`` items whose ranks are below ``bound``, if there is one, lowest first."""
        ranks, heap, popped = self._ranks, self._heap, list[tuple[Item, Rank]]()
        while heap and len(popped) < count and (bound is None or heap[0][0] < bound):
            rank, item = heapq.heappop(heap)
            if ranks.get(item) == rank:
                popped.append((item, rank))
                del ranks[item]
        self._bound_heap()
        return popped

    def _bound_heap(self) -> None:
        if len(self._heap) > 2 * len(self._ranks) + 16:
            self._heap = [(rank, item) for item, rank in self._ranks.items()]
            heapq.heapify(self._heap)
