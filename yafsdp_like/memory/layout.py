"""Integers that say where a parameter lies: in its shard, and in the slot it is gathered into.

Nothing here touches a tensor. A layout proves itself when it is made: segments are aligned, in order, and disjoint.

[Note: zero-copy layout]
A parameter of ``rows`` rows is split over ``W`` ranks as ``torch.chunk`` does on dim 0: every rank holds
``ceil(rows / W)`` rows, the last ones fewer or none, padded. Its full tensor in a slot is the ranks' chunks one after
the other, so that rank ``r``'s chunk lands straight at its place, and the first ``rows`` rows are the parameter,
contiguous. A unit's shard on one rank is one flat range: its chunk of each parameter, each at a multiple of 256
bytes. A collective is therefore one piece per parameter with nothing to pack before or to unpack after:

    slot             | p0: r0 r1 .. | p1: r0 r1 .. | p2: r0 r1 .. |
    shard of rank r  | p0: r | p1: r | p2: r |

A parameter may be split on another dimension instead, evenly. Its chunks then do not lie one after the other in the
full tensor (``is_permuted``), and are copied to their places: see [Note: layout staging].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

ALIGNMENT_NBYTES = 256
GUARD_NBYTES = ALIGNMENT_NBYTES  # of a border between segments, where debug mode wants some


def aligned(nbytes: int, alignment_nbytes: int = ALIGNMENT_NBYTES) -> int:
    """Round ``nbytes`` up to a multiple of ``alignment_nbytes``."""
    return -(-nbytes // alignment_nbytes) * alignment_nbytes


@dataclass(frozen=True)
class RowShards:
    """How one parameter's rows (dim 0) are split over ``world_size`` ranks; counts are elements unless named so.

    With another ``dim``, rows are the parameter's slices on that dimension, as many on each rank.
    """

    shape: tuple[int, ...]
    world_size: int
    dim: int = 0

    def __post_init__(self) -> None:
        if not self.shape:
            raise ValueError("a parameter needs at least one dimension to be split by rows, found shape ()")
        if self.world_size < 1:
            raise ValueError(f"world size must be at least 1, found {self.world_size}")
        assert self.dim == 0 or self.shape[self.dim] % self.world_size == 0, f"padding inside of rows: {self}"

    @property
    def is_permuted(self) -> bool:
        """Whether ranks' chunks do not lie one after the other in the full parameter."""
        return self.world_size > 1 and math.prod(self.shape[: self.dim]) != 1

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[: self.dim]) * math.prod(self.shape[self.dim + 1 :])

    @property
    def rows_per_rank(self) -> int:
        """Rows of one rank's chunk, padding included."""
        return -(-self.shape[self.dim] // self.world_size)

    @property
    def chunk_numel(self) -> int:
        """Elements of one rank's chunk, padding included: the same on every rank."""
        return self.rows_per_rank * self.row_numel

    @property
    def padded_numel(self) -> int:
        """Elements that the full parameter takes in a slot, padding included."""
        return self.chunk_numel * self.world_size

    def row_range(self, rank: int) -> tuple[int, int]:
        """Return the rows ``[start, stop)`` of the full parameter that ``rank`` holds, possibly none."""
        start = min(rank * self.rows_per_rank, self.shape[self.dim])
        return start, min(start + self.rows_per_rank, self.shape[self.dim])

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the part of the parameter that ``rank`` holds, without padding."""
        start, stop = self.row_range(rank)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Segment:
    """Bytes ``[offset_nbytes, offset_nbytes + nbytes)`` of a region."""

    offset_nbytes: int
    nbytes: int

    @property
    def end_nbytes(self) -> int:
        """The first byte behind the segment."""
        return self.offset_nbytes + self.nbytes

    def overlaps(self, other: Segment) -> bool:
        """Return whether the two have a byte in common."""
        return max(self.offset_nbytes, other.offset_nbytes) < min(self.end_nbytes, other.end_nbytes)


@dataclass(frozen=True)
class FlatLayout:
    """One segment per parameter in one flat region, in order, each aligned, none overlapping."""

    segments: tuple[Segment, ...]
    nbytes: int
    granule_nbytes: int = ALIGNMENT_NBYTES  # where the region may end
    guard_nbytes: int = 0  # around each segment

    def __post_init__(self) -> None:
        end = 0
        for segment in self.segments:
            assert segment.offset_nbytes % ALIGNMENT_NBYTES == 0, f"misaligned {segment}"
            assert segment.offset_nbytes >= end and segment.nbytes >= 0, f"{segment} overlaps what ends at {end}"
            end = segment.end_nbytes
        behind = aligned(end) + (self.guard_nbytes if end else 0)
        assert aligned(behind, self.granule_nbytes) == self.nbytes, (
            f"segments end at {end}, the region at {self.nbytes}"
        )

    @classmethod
    def pack(
        cls,
        sizes_nbytes: Sequence[int],
        in_granules: Collection[int] = (),
        granule_nbytes: int = 0,
        guard_nbytes: int = 0,
    ) -> FlatLayout:
        """Lay out segments of the given sizes, in order, as close together as alignment allows.

        Those whose index is in ``in_granules`` start at a granule, and are whole granules, as the whole then is.
        ``guard_nbytes`` are left before each that is not empty, and behind the last: see ``gaps``.
        """
        segments, offset = [], 0
        for index, nbytes in enumerate(sizes_nbytes):
            if index in in_granules:
                assert nbytes % granule_nbytes == 0, f"{nbytes} bytes are not whole granules of {granule_nbytes}"
                offset = aligned(offset, granule_nbytes)
            offset += guard_nbytes if nbytes else 0
            segments.append(Segment(offset, nbytes))
            offset = aligned(offset + nbytes)
        offset += guard_nbytes if offset else 0
        granule_nbytes = granule_nbytes if in_granules else ALIGNMENT_NBYTES
        return cls(tuple(segments), aligned(offset, granule_nbytes), granule_nbytes, guard_nbytes)

    @property
    def gaps(self) -> list[tuple[int | None, int | None, Segment]]:
        """The bytes that no segment has: the numbers of the segments before and behind, or None, and where."""
        filled = [(k, segment) for k, segment in enumerate(self.segments) if segment.nbytes]
        ends = [(None, 0), *((k, segment.end_nbytes) for k, segment in filled)]
        starts = [*((k, segment.offset_nbytes) for k, segment in filled), (None, self.nbytes)]
        return [
            (before, behind, Segment(end, start - end))
            for (before, end), (behind, start) in zip(ends, starts, strict=True)
            if start > end
        ]


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of ``shape``."""
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))
