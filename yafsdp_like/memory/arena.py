"""The one file where long-lived memory is allocated, and the one way to make a tensor on it."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import _symmetric_memory

from yafsdp_like.memory.layout import Segment, aligned
from yafsdp_like.memory.plan import Region


@dataclass(frozen=True, eq=False)
class Block:
    """One allocation of memory that other processes of this host can map, zeroed."""

    bytes: torch.Tensor  # (nbytes,) uint8
    file: Path | None  # under which they find it, of host memory

    @classmethod
    def allocate(cls, nbytes: int, device: torch.device) -> Block:
        """Symmetric memory of a GPU, or a file in the host's shared memory."""
        if device.type == "cuda":
            block = cls(_symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device), None)
            block.bytes.zero_()
            return block
        directory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.NamedTemporaryFile(prefix="yafsdp_", dir=directory, delete=False) as file:
            file.truncate(nbytes)
        block = cls(torch.from_file(file.name, shared=True, size=nbytes, dtype=torch.uint8), Path(file.name))
        weakref.finalize(block.bytes, Path(file.name).unlink, missing_ok=True)  # should nobody map it
        return block

    def find(self, part: torch.Tensor) -> tuple[int, int] | None:
        """Where in this block the contiguous tensor ``part`` lies, as (offset, size) in bytes; None if elsewhere."""
        offset = part.data_ptr() - self.bytes.data_ptr()
        nbytes = part.numel() * part.itemsize
        return (offset, nbytes) if offset >= 0 and offset + nbytes <= self.bytes.numel() else None


class Arena:
    """Blocks of device memory, each allocated once for a list of regions and kept until the arena dies.

    ``nbytes`` counts exactly the regions reserved. Memory starts as zeros, so that padding never holds a NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.regions: dict[str, Region] = {}
        self.blocks: list[Block] = []  # those that peers map
        self._places: dict[str, tuple[torch.UntypedStorage, int]] = {}  # region name -> (block, offset in bytes)

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region in self.regions.values())

    def reserve(self, regions: Sequence[Region]) -> None:
        """Allocates one block that holds ``regions`` one after the other, and another for those that peers map (to be
        found in ``blocks``). Sizes must be multiples of the alignment.

        Raises ``torch.OutOfMemoryError`` (CUDA) or ``RuntimeError`` (CPU) when the device has no room for the block.
        """
        for region in regions:
            assert region.name not in self.regions, f"region {region.name!r} is reserved already"
            assert aligned(region.nbytes) == region.nbytes, f"region {region.name!r}: {region.nbytes} is not aligned"
        for mapped in (False, True):
            self._reserve([r for r in regions if r.mapped is mapped], mapped)

    def _reserve(self, regions: Sequence[Region], mapped: bool) -> None:
        nbytes = sum(r.nbytes for r in regions)
        with torch.inference_mode(False):
            if mapped and nbytes:
                self.blocks.append(Block.allocate(nbytes, self.device))
                block = self.blocks[-1].bytes
            else:
                block = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
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
