"""PyTorch's CUDA allocator as arithmetic: how much memory it reserves for a timeline of births and deaths.

Owns a model of its expandable segments (``CUDACachingAllocator.cpp``), which ``fully_shard`` lets it use. No memory.

[Note: expandable segments as arithmetic]
There are two ranges of addresses, one for blocks of at most 1 MiB and one for larger ones, each mapped from its start
in steps of 2 and of 20 MiB. A request takes the smallest free block that is large enough; the last one counts as large
as it could grow. What is left of it stays a free block, and free neighbours are one. Where nothing fits, memory is
mapped behind the last block, or in the first gap that is large enough. What is mapped stays so until the cache is
emptied, which unmaps steps that are wholly free.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import aligned
from yafsdp_like.shard.forecast.storages import BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yafsdp_like.shard.forecast.storages import StorageTimeline

MAX_SMALL_NBYTES = 1 << 20  # kSmallSize
SMALL_STEP_NBYTES, LARGE_STEP_NBYTES = 2 << 20, 20 << 20  # kSmallBuffer, kLargeBuffer
WORKSPACE_NBYTES = 32 << 20  # of cuBLAS on Hopper (CUDABlas' default there)
NO_END = 1 << 62


@dataclass(eq=False)
class _Block:
    """A range of addresses: in use, free, or not mapped."""

    start: int
    nbytes: int
    is_mapped: bool
    is_used: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def is_free(self) -> bool:
        """Whether it is mapped and not in use."""
        return self.is_mapped and not self.is_used

    @property
    def growing_nbytes(self) -> int:
        """Its bytes, and those that could be mapped right behind it."""
        return self.nbytes + (self.after.nbytes if self.after is not None and not self.after.is_mapped else 0)


class _Range:
    """One range of addresses."""

    def __init__(self, step_nbytes: int) -> None:
        self._step = step_nbytes
        self._free: list[tuple[int, int]] = []  # sizes and starts, in order
        self._at: dict[int, _Block] = {}  # free blocks by their start
        self._first = _Block(0, NO_END, is_mapped=False)
        self.reserved_nbytes = 0

    def take(self, nbytes: int) -> _Block:
        """Return a block of so many bytes, in use."""
        index = bisect_left(self._free, (nbytes, -1))
        block = self._best_from(index) if index < len(self._free) else self._grown(nbytes)
        self._remove(block)
        if block.nbytes - nbytes >= BLOCK_NBYTES:
            self._add(self._split(block, nbytes))
        block.is_used = True
        return block

    def give_back(self, block: _Block) -> None:
        """Free a block, and join it with free neighbours."""
        block.is_used = False
        self._add(self._joined(block))

    def empty(self) -> None:
        """Unmap every whole step that is free."""
        for start in sorted(self._at):
            block = self._at.get(start)
            if block is None:
                continue
            low = aligned(block.start, self._step)
            high = (block.start + block.nbytes) // self._step * self._step
            if high <= low:
                continue
            self._remove(block)
            if low > block.start:
                rest = self._split(block, low - block.start)
                self._add(block)
                block = rest
            if high < block.start + block.nbytes:
                self._add(self._split(block, high - block.start))
            self.reserved_nbytes -= block.nbytes
            block.is_mapped = False
            self._joined(block)

    def _best_from(self, index: int) -> _Block:
        best = self._at[self._free[index][1]]
        for _, start in self._free[index + 1 :]:
            following = self._at[start]
            if following.growing_nbytes >= best.growing_nbytes:
                break
            best = following
        return best

    def _grown(self, nbytes: int) -> _Block:
        """Map memory where so many bytes fit first; return the free block that has them."""
        gap: _Block | None = self._first
        while gap is not None:
            if not gap.is_mapped:
                begin = gap.before if gap.before is not None and gap.before.is_free else gap
                if self._room(begin, nbytes):
                    break
            gap = gap.after
        assert gap is not None, "the range has no end"
        block = begin
        while not block.is_mapped or block.nbytes < nbytes:
            if block.is_mapped:
                self._remove(block)
                assert block.after is not None
                block = self._mapped(block.after, nbytes - block.nbytes)
            else:
                block = self._mapped(block, nbytes)
        return block

    def _room(self, block: _Block | None, nbytes: int) -> bool:
        room = 0
        while block is not None and not block.is_used and room < nbytes:
            room += block.nbytes
            block = block.after
        return room >= nbytes

    def _mapped(self, block: _Block, nbytes: int) -> _Block:
        """Map the beginning of a block that is not, at least so many bytes of it; return it joined with free ones."""
        if not block.is_mapped:
            size = min(block.nbytes, aligned(block.start + nbytes, self._step) - block.start)
            if size < block.nbytes:
                self._split(block, size)
            block.is_mapped = True
            self.reserved_nbytes += size
        joined = self._joined(block)
        self._add(joined)
        return joined

    def _split(self, block: _Block, nbytes: int) -> _Block:
        """Cut a block behind so many bytes; return the rest."""
        rest = _Block(block.start + nbytes, block.nbytes - nbytes, block.is_mapped, False, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.nbytes = rest, nbytes
        return rest

    def _joined(self, block: _Block) -> _Block:
        """Join a block that is not in use with neighbours like it."""
        for other in (block.before, block.after):
            if other is None or other.is_used or other.is_mapped != block.is_mapped:
                continue
            if other.is_mapped:
                self._remove(other)
            first, second = (other, block) if other is block.before else (block, other)
            first.nbytes += second.nbytes
            first.after = second.after
            if second.after is not None:
                second.after.before = first
            block = first
        return block

    def _add(self, block: _Block) -> None:
        insort(self._free, (block.nbytes, block.start))
        self._at[block.start] = block

    def _remove(self, block: _Block) -> None:
        if self._at.pop(block.start, None) is not None:
            del self._free[bisect_left(self._free, (block.nbytes, block.start))]


class CachingAllocator:
    """Sizes and places of blocks, of one stream."""

    def __init__(self) -> None:
        self._ranges = _Range(SMALL_STEP_NBYTES), _Range(LARGE_STEP_NBYTES)
        self._peak = 0

    @property
    def peak_reserved_nbytes(self) -> int:
        """The most that was mapped at a time since the cache was emptied last."""
        return self._peak

    def take(self, nbytes: int) -> tuple[_Range, _Block]:
        """Return a block of so many bytes, and where it is."""
        found = self._ranges[nbytes > MAX_SMALL_NBYTES]
        block = found.take(aligned(max(nbytes, 1), BLOCK_NBYTES))
        self._peak = max(self._peak, sum(each.reserved_nbytes for each in self._ranges))
        return found, block

    def empty_cache(self) -> None:
        """Unmap what is free."""
        for each in self._ranges:
            each.empty()
        self._peak = sum(each.reserved_nbytes for each in self._ranges)


def _workspaces(timeline: StorageTimeline) -> Iterator[int]:
    """Yield the numbers of the events before which cuBLAS takes a workspace for good: the first of a phase's products.

    Each of autograd's threads has one of its own.
    """
    for phase in ("forward", "backward"):
        large = (
            index
            for index, (event, place) in enumerate(zip(timeline.events, timeline.places, strict=True))
            if place.phase == phase and event >= 0 and timeline.born[event].nbytes > MAX_SMALL_NBYTES
        )
        second = next(islice(large, 1, None), None)
        if second is not None:
            yield second + 1


def reserved_nbytes(held: Sequence[int], states: Sequence[int], timeline: StorageTimeline, num_steps: int = 3) -> int:
    """Return the most that the allocator reserves in a run of like steps.

    Args:
        held: bytes of each tensor that is there from the start.
        states: of each that the first update makes, behind an emptied cache.
        timeline: births and deaths of one forward and backward; what is left goes before the next forward.
        num_steps: after which a run is taken to have settled, at least 2.
    """
    allocator = CachingAllocator()
    for nbytes in held:
        allocator.take(nbytes)
    for step in range(num_steps):
        blocks: dict[int, tuple[_Range, _Block]] = {}
        waiting = [] if step else list(_workspaces(timeline))
        for index, event in enumerate(timeline.events):
            if waiting and waiting[0] == index:
                waiting.pop(0)
                allocator.take(WORKSPACE_NBYTES)
            if event < 0:
                place = blocks.pop(~event, None)
                if place is not None:
                    place[0].give_back(place[1])
            elif timeline.born[event].nbytes:
                blocks[event] = allocator.take(timeline.born[event].nbytes)
        if step == 0 and states:
            allocator.empty_cache()
            for nbytes in states:
                allocator.take(nbytes)
        for found, block in blocks.values():
            found.give_back(block)
    return allocator.peak_reserved_nbytes
