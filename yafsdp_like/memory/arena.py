"""The one file where long-lived memory is allocated, and the one way to make a tensor on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.memory import vmm
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment, aligned, contiguous_stride
from yafsdp_like.memory.plan import Region, readable
from yafsdp_like.memory.room import free_nbytes, ranks_of_this_host

if TYPE_CHECKING:
    from collections.abc import Sequence

WORTH_ASKING_NBYTES = 64 << 20  # smaller ones are allocated without asking what is free


@dataclass(frozen=True, eq=False)
class MemoryBlock:
    """One allocation, zeroed, which other processes of this host and other addresses can map."""

    bytes: torch.Tensor  # (nbytes,) uint8
    physical: vmm.PhysicalMemory

    @classmethod
    def allocate(cls, nbytes: int, device: torch.device, granule_nbytes: int = 0) -> MemoryBlock:
        """Allocate ``nbytes``, zeros, in granules of the given size, or of the device's for 0."""
        physical = vmm.allocate(nbytes, granule_nbytes or vmm.GRANULE_NBYTES, device)
        block = cls(vmm.map_range([(physical, Segment(0, physical.nbytes))]).bytes[:nbytes], physical)
        block.bytes.zero_()
        return block

    def find(self, part: torch.Tensor) -> tuple[int, int] | None:
        """Return where in this block the contiguous ``part`` lies: offset and size in bytes; None if elsewhere."""
        nbytes = part.numel() * part.itemsize
        offset = part.data_ptr() - self.bytes.data_ptr() if nbytes else 0  # an empty tensor has no address
        return (offset, nbytes) if offset >= 0 and offset + nbytes <= self.bytes.numel() else None


@dataclass(frozen=True)
class _Spot:
    """Where a region or a range of aliases is: bytes ``[offset, offset + nbytes)`` of a storage, and of a block."""

    storage: torch.UntypedStorage
    offset_nbytes: int
    nbytes: int
    block: MemoryBlock | None = None


class Arena:
    """Blocks of device memory, each allocated once for a list of regions and kept until the arena dies.

    ``nbytes`` counts exactly the regions reserved. Memory starts as zeros, so that padding never holds a NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.regions: dict[str, Region] = {}
        self.blocks: list[MemoryBlock] = []  # those that peers map
        self._spots: dict[str, _Spot] = {}  # by name of region or of aliases

    @property
    def nbytes(self) -> int:
        """Bytes of all regions."""
        return sum(region.nbytes for region in self.regions.values())

    def reserve(self, regions: Sequence[Region]) -> None:
        """Allocate a block for each kind of region, which holds the ``regions`` of that kind one after the other.

        One block is for those that stay private, one for those that peers map (found in ``blocks``), one for each size
        of granule. Sizes must be multiples of the alignment.

        Raises ``torch.OutOfMemoryError`` (CUDA) or ``RuntimeError`` (CPU) when the device has no room for the block.
        """
        if self.device.type == "cpu":
            refuse_what_the_host_cannot_hold(sum(region.nbytes for region in regions))
        for region in regions:
            assert region.name not in self._spots, f"region {region.name!r} is reserved already"
            assert aligned(region.nbytes, region.granule_nbytes or ALIGNMENT_NBYTES) == region.nbytes, f"{region}"
        for mapped, granule_nbytes in sorted({(r.mapped, r.granule_nbytes) for r in regions}):
            together = [r for r in regions if (r.mapped, r.granule_nbytes) == (mapped, granule_nbytes)]
            with torch.inference_mode(False):
                self._reserve(together, mapped, granule_nbytes)

    def _reserve(self, regions: Sequence[Region], mapped: bool, granule_nbytes: int) -> None:
        nbytes, block = sum(r.nbytes for r in regions), None
        if nbytes and (mapped or granule_nbytes):
            block = MemoryBlock.allocate(nbytes, self.device, granule_nbytes)
            storage = block.bytes.untyped_storage()
            self.blocks += [block] if mapped else []
        else:
            storage = torch.zeros(nbytes, dtype=torch.uint8, device=self.device).untyped_storage()
        offset = 0
        for region in regions:
            self.regions[region.name] = region
            self._spots[region.name] = _Spot(storage, offset, region.nbytes, block)
            offset += region.nbytes

    def alias(self, name: str, places: Sequence[Place]) -> Place:
        """Map ``places``, whole granules of this arena's regions, one after the other at a new range named ``name``."""
        assert name not in self._spots, f"range {name!r} is there already"
        parts = []
        for place in places:
            spot = self._spots[place.region]
            assert spot.block is not None, f"region {place.region!r} cannot be aliased"
            offset = spot.offset_nbytes + place.segment.offset_nbytes
            parts.append((spot.block.physical, Segment(offset, place.segment.nbytes)))
        with torch.inference_mode(False):
            mapped = vmm.map_range(parts).bytes
        self._spots[name] = _Spot(mapped.untyped_storage(), 0, mapped.numel())
        return self.place(name)

    def include(self, other: Arena) -> None:
        """Find ``other``'s regions here too, on the same memory, which both keep; ``nbytes`` of both counts them."""
        assert not other.regions.keys() & self._spots.keys(), "a region of that name is reserved already"
        self.regions |= other.regions
        self._spots |= {name: other._spots[name] for name in other.regions}
        self.blocks += other.blocks

    def part(self, prefix: str) -> Arena:
        """Return the regions whose names begin with ``prefix``, named without it, on the same memory."""
        found = Arena(self.device)
        for name in self.regions:
            if name.startswith(prefix):
                found.regions[name.removeprefix(prefix)] = self.regions[name]
                found._spots[name.removeprefix(prefix)] = self._spots[name]
        return found

    def place(self, name: str) -> Place:
        """Return the place of a whole region, or range of aliases."""
        return Place(self, name, Segment(0, self._spots[name].nbytes))

    def storage(self, name: str) -> tuple[torch.UntypedStorage, int]:
        """Return what holds a region or a range of aliases, and the byte in it where that starts."""
        return self._spots[name].storage, self._spots[name].offset_nbytes


def refuse_what_the_host_cannot_hold(nbytes: int) -> None:
    """Raise ``RuntimeError`` for memory that the kernel would promise now, and end the process for using later."""
    num_ranks = ranks_of_this_host()
    free = free_nbytes(torch.device("cpu")) if nbytes >= WORTH_ASKING_NBYTES else None
    if free is not None and nbytes * num_ranks > free:
        raise RuntimeError(
            f"not enough memory: {readable(nbytes)} on each of {num_ranks} ranks of this host are to be allocated, and "
            f"{readable(free)} are free; shard over more hosts, or take a smaller model"
        )


@dataclass(frozen=True, eq=False)
class Place:
    """A range of bytes in a region of an arena or a range of aliases: where a slot, a shard or a part of one lies."""

    arena: Arena
    region: str
    segment: Segment

    def __post_init__(self) -> None:
        size = self.arena._spots[self.region].nbytes
        assert self.segment.end_nbytes <= size, f"{self.segment} ends outside region {self.region!r} of {size} bytes"

    def part(self, segment: Segment) -> Place:
        """Return the sub-range ``segment``, counted from the start of this place."""
        assert segment.end_nbytes <= self.segment.nbytes, f"{segment} ends outside {self.segment}"
        return Place(
            self.arena, self.region, Segment(self.segment.offset_nbytes + segment.offset_nbytes, segment.nbytes)
        )

    def overlaps(self, other: Place) -> bool:
        """Return whether the two have a byte of one region in common, whichever arenas find that."""
        spot, others = self.arena._spots[self.region], other.arena._spots[other.region]
        return spot is others and self.segment.overlaps(other.segment)

    def flat(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """Return a tensor of ``numel`` elements, ``(numel,)``, for collectives and kernels.

        Complex elements are pairs of reals, ``(2 * numel,)``.
        """
        return self.tensor(dtype.to_real(), (2 * numel if dtype.is_complex else numel,))

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor of ``shape`` on the first bytes of this place.

        [Note: version counters]
        Tensors cut from one tensor share its version counter, and a write through one makes autograd refuse the others
        that it saved. Every tensor made here has a counter of its own (``set_``), also two on the same bytes. So a
        gather that writes through one tensor never disturbs the parameter that autograd saved through another: that
        the bytes are the same again in backward is ensured by the engine, and autograd does not check it.

        [Note: a storage of its own]
        The tensor's storage begins and ends with it, and keeps the arena alive. Whatever copies, saves or sends a
        tensor does so with its whole storage; and a ``DTensor``, which takes its local tensor's storage offset, can be
        copied and saved only where that is 0.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        assert nbytes <= self.segment.nbytes, f"{shape} of {dtype} does not fit {self.segment}"
        storage, start = self.arena.storage(self.region)
        offset = start + self.segment.offset_nbytes
        with torch.inference_mode(False), torch.no_grad():
            empty = torch.empty(0, dtype=dtype, device=self.arena.device)
            return empty.set_(storage[offset : offset + nbytes], 0, shape, contiguous_stride(shape))
