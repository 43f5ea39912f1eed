"""The one file where long-lived memory is allocated, and the one way to make a tensor on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yafsdp_like.memory.layout import Segment, aligned
from yafsdp_like.memory.plan import Region


class Arena:
    """Blocks of device memory, each allocated once for a list of regions and kept until the arena dies.

    ``nbytes`` counts exactly the regions reserved. Memory starts as zeros, so that padding never holds a NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.regions: dict[str, Region] = {}
        self._places: dict[str, tuple[torch.UntypedStorage, int]] = {}  # region name -> (block, offset in bytes)

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region in self.regions.values())

    def reserve(self, regions: Sequence[Region]) -> None:
        """Allocates one block that holds ``regions`` one after the other. Sizes must be multiples of the alignment.

        Raises ``torch.OutOfMemoryError`` (CUDA) or ``RuntimeError`` (CPU) when the device has no room for the block.
        """
        for region in regions:
            assert region.name not in self.regions, f"region {region.name!r} is reserved already"
            assert aligned(region.nbytes) == region.nbytes, f"region {region.name!r}: {region.nbytes} is not aligned"
        with torch.inference_mode(False):
            block = torch.zeros(sum(r.nbytes for r in regions), dtype=torch.uint8, device=self.device)
        offset = 0
        for region in regions:
            self.regions[region.name] = region
            self._places[region.name] = (block.untyped_storage(), offset)
            offset += region.nbytes

    def place(self, region: str) -> Place:
        """All of a region."""
        return Place(self, region, Segment(0, self.regions[region].nbytes))

    def storage(self, region: str) -> tuple[torch.UntypedStorage, int]:
        """The block that holds ``region``, and the byte in it where the region starts."""
        return self._places[region]


@dataclass(frozen=True, eq=False)
class Place:
    """A range of bytes in one region of an arena: where a slot, a shard or one parameter's part of either lies."""

    arena: Arena
    region: str
    segment: Segment

    def __post_init__(self) -> None:
        size = self.arena.regions[self.region].nbytes
        assert self.segment.end_nbytes <= size, f"{self.segment} ends outside region {self.region!r} of {size} bytes"

    def part(self, segment: Segment) -> Place:
        """The sub-range ``segment``, counted from the start of this one."""
        assert segment.end_nbytes <= self.segment.nbytes, f"{segment} ends outside {self.segment}"
        return Place(
            self.arena, self.region, Segment(self.segment.offset_nbytes + segment.offset_nbytes, segment.nbytes)
        )

    def overlaps(self, other: Place) -> bool:
        return self.arena is other.arena and self.region == other.region and self.segment.overlaps(other.segment)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor of ``shape`` on the first bytes of this place.

        [Note: version counters]
        Tensors cut from one tensor share its version counter, and a write through one makes autograd refuse the others
        that it saved. Every tensor made here has a counter of its own (``set_`` on the block's storage), also two on
        the same bytes. So a gather that writes through one tensor never disturbs the parameter that autograd saved
        through another: that the bytes are the same again in backward is the engine's promise, not autograd's to
        check.
        """
        numel = math.prod(shape)
        assert numel * dtype.itemsize <= self.segment.nbytes, f"{shape} of {dtype} does not fit {self.segment}"
        storage, start = self.arena.storage(self.region)
        offset = start + self.segment.offset_nbytes
        with torch.inference_mode(False), torch.no_grad():
            empty = torch.empty(0, dtype=dtype, device=self.arena.device)
            return empty.set_(storage, offset // dtype.itemsize, shape, _contiguous_stride(shape))


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
