"""Physical memory, and ranges of virtual addresses that map parts of it: CUDA's virtual memory management, and mmap.

[Note: aliased granules]
A gathered parameter is every rank's chunk in order, and a rank has its own chunk already, in its shard. So a gather
slot is a range of addresses that maps the shard's own memory where this rank's chunk belongs, and memory of the slots'
region elsewhere. What is in a shard is then in its slot, and is neither copied there nor stored twice.

A granule is the least that can be mapped by itself, so only ranges of whole granules can be aliased. The driver of a
GPU maps an allocation as a whole or not at all: each granule is an allocation. On the host, granules are pieces of a
file in memory. Both travel to other processes of the host as file descriptors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from yafsdp_like.memory.layout import Segment, aligned

if TYPE_CHECKING:
    from collections.abc import Sequence

try:
    from cuda.bindings import driver as driver
except ImportError:  # a build of torch without CUDA
    driver = None

GRANULE_NBYTES = 2 << 20  # the least that a GPU maps; the same on hosts, so that a plan is the same
_MAP_SHARED, _MAP_FIXED, _MAP_NOTHING = mmap.MAP_SHARED, 0x10, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class PhysicalMemory(Protocol):
    """Memory without an address, which lives as long as this object or a range that maps it."""

    nbytes: int  # a multiple of granule_nbytes
    granule_nbytes: int
    num_descriptors: int

    def export_descriptors(self, start: int, stop: int) -> list[int]:
        """Return new file descriptors of numbers ``start`` to ``stop``, for another process; the caller closes them."""

    def of_peer(self) -> PhysicalMemory:
        """Return an object for as much memory of another process, to be filled by ``import_descriptors``."""

    def import_descriptors(self, descriptors: Sequence[int]) -> None:
        """Take the next of the other process's descriptors; the caller may close them after."""

    def map_at(self, address: int, segment: Segment) -> None:
        """Map these bytes, whole granules, at a reserved address."""

    def map_range(self, parts: Sequence[Part]) -> MappedRange:
        """Do what the function ``map_range`` does, for memory of this kind."""


Part = tuple[PhysicalMemory, Segment]


@dataclass(frozen=True, eq=False)
class MappedRange:
    """A range of addresses, seen as ``bytes``, ``(nbytes,)`` uint8.

    It is unmapped when the last tensor on it is gone; where it maps a peer's memory, when ``addresses`` is gone.
    """

    bytes: torch.Tensor
    addresses: object


def map_range(parts: Sequence[Part]) -> MappedRange:
    """Map ``parts`` one after the other: whole granules of memory of one device, at least one byte in all."""
    return parts[0][0].map_range([part for part in parts if part[1].nbytes])


def allocate(nbytes: int, granule_nbytes: int, device: torch.device) -> PhysicalMemory:
    """Allocate at least ``nbytes`` on a GPU or in host memory.

    Raises ``torch.OutOfMemoryError`` when the GPU has no room, and ``RuntimeError`` for other errors of the driver.
    """
    nbytes = aligned(nbytes, granule_nbytes)
    if device.type == "cuda":
        return DeviceMemory.of(nbytes, granule_nbytes, device)
    return HostMemory.of(nbytes, granule_nbytes)


def obstacle(device: torch.device) -> str | None:
    """Say why other processes cannot map memory of ``device``; None if they can."""
    if device.type != "cuda":
        return None if sys.platform == "linux" else f"memory is shared on Linux only, this is {sys.platform}"
    missing = "the package cuda-bindings, which comes with CUDA builds of torch, is missing"
    return missing if driver is None else None


def _map_parts(parts: Sequence[Part], address: int) -> None:
    for memory, segment in parts:
        granule = memory.granule_nbytes
        is_whole = segment.offset_nbytes % granule == 0 and segment.nbytes % granule == 0
        assert is_whole, f"{segment} is not made of whole granules of {granule} bytes"
        memory.map_at(address, segment)
        address += segment.nbytes


def _nbytes(parts: Sequence[Part]) -> int:
    return sum(segment.nbytes for _, segment in parts)


# --- in host memory ---


class HostMemory:
    """A file in memory; its one descriptor stands for all granules."""

    num_descriptors = 1

    def __init__(self, nbytes: int, granule_nbytes: int) -> None:
        assert granule_nbytes % mmap.PAGESIZE == 0, f"{granule_nbytes} bytes are no multiple of {mmap.PAGESIZE}"
        self.nbytes, self.granule_nbytes = nbytes, granule_nbytes
        self._file = -1

    @classmethod
    def of(cls, nbytes: int, granule_nbytes: int) -> HostMemory:
        """Allocate ``nbytes``, zeros."""
        memory = cls(nbytes, granule_nbytes)
        memory._own(os.memfd_create("yafsdp_like"))
        os.ftruncate(memory._file, nbytes)
        return memory

    def _own(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    def export_descriptors(self, start: int, stop: int) -> list[int]:
        """See ``PhysicalMemory``."""
        return [os.dup(self._file) for _ in range(start, stop)]

    def of_peer(self) -> HostMemory:
        """See ``PhysicalMemory``."""
        return HostMemory(self.nbytes, self.granule_nbytes)

    def import_descriptors(self, descriptors: Sequence[int]) -> None:
        """See ``PhysicalMemory``."""
        (file,) = descriptors
        self._own(os.dup(file))

    def map_at(self, address: int, segment: Segment) -> None:
        """See ``PhysicalMemory``."""
        flags = _MAP_SHARED | _MAP_FIXED
        _map_host(address, segment.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, segment.offset_nbytes)

    def map_range(self, parts: Sequence[Part]) -> MappedRange:
        """See ``PhysicalMemory``."""
        nbytes = _nbytes(parts)
        address = _map_host(None, nbytes, 0, _MAP_NOTHING, -1, 0)
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)  # the tensor keeps it alive
        weakref.finalize(buffer, _libc().munmap, ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        _map_parts(parts, address)
        return MappedRange(torch.frombuffer(buffer, dtype=torch.uint8), buffer)


def _map_host(address: int | None, nbytes: int, access: int, flags: int, file: int, offset_nbytes: int) -> int:
    found = _libc().mmap(address, nbytes, access, flags, file, offset_nbytes)
    if found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {nbytes:,} bytes of host memory: {os.strerror(number)}")
    return int(found)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc


# --- on a GPU ---


class DeviceMemory:
    """Allocations of the CUDA driver, one a granule."""

    def __init__(self, nbytes: int, granule_nbytes: int, device: torch.device, is_peers: bool) -> None:
        assert granule_nbytes % GRANULE_NBYTES == 0, f"{granule_nbytes} bytes are no multiple of {GRANULE_NBYTES}"
        self.nbytes, self.granule_nbytes = nbytes, granule_nbytes
        self.num_descriptors = nbytes // granule_nbytes
        self._device, self._is_peers = device, is_peers
        self._handles: list[Any] = []
        weakref.finalize(self, _release, self._handles).atexit = False

    @classmethod
    def of(cls, nbytes: int, granule_nbytes: int, device: torch.device) -> DeviceMemory:
        """Allocate ``nbytes``, not initialized."""
        memory = cls(nbytes, granule_nbytes, device, is_peers=False)
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # which makes the driver's context, if nothing has
            memory._handles += (_create(granule_nbytes, device) for _ in range(memory.num_descriptors))
        return memory

    def export_descriptors(self, start: int, stop: int) -> list[int]:
        """See ``PhysicalMemory``."""
        handles = self._handles[start:stop]
        return [int(checked(driver.cuMemExportToShareableHandle(h, _descriptor(), 0))) for h in handles]

    def of_peer(self) -> DeviceMemory:
        """See ``PhysicalMemory``."""
        return DeviceMemory(self.nbytes, self.granule_nbytes, self._device, is_peers=True)

    def import_descriptors(self, descriptors: Sequence[int]) -> None:
        """See ``PhysicalMemory``."""
        self._handles += (checked(driver.cuMemImportFromShareableHandle(file, _descriptor())) for file in descriptors)

    def map_at(self, address: int, segment: Segment) -> None:
        """See ``PhysicalMemory``."""
        size = self.granule_nbytes
        first, stop = segment.offset_nbytes // size, segment.end_nbytes // size
        for number, handle in enumerate(self._handles[first:stop]):
            checked(driver.cuMemMap(address + number * size, size, 0, handle, 0))

    def map_range(self, parts: Sequence[Part]) -> MappedRange:
        """See ``PhysicalMemory``."""
        with torch.cuda.device(self._device):
            addresses = _Addresses(parts, self._device)
        if not self._is_peers:
            return MappedRange(torch.as_tensor(addresses, device=self._device), addresses)
        # torch takes a tensor for one of the GPU that has the memory, and would copy from it there; a bare storage is
        # on the device that it is given, but owns nothing.
        storage = torch._C._construct_storage_from_data_pointer(addresses.start, self._device, addresses.nbytes)
        whole = torch.empty(0, dtype=torch.uint8, device=self._device)
        return MappedRange(whole.set_(storage, 0, (addresses.nbytes,), (1,)), addresses)


_to_unmap: list[tuple[int, int]] = []  # addresses and bytes that nobody needs any more


class _Addresses:
    """A range of addresses of one GPU, mapped until this object is gone."""

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self.nbytes = _nbytes(parts)
        self.start = int(checked(driver.cuMemAddressReserve(self.nbytes, 0, 0, 0)))
        _map_parts(parts, self.start)
        access = driver.CUmemAccessDesc()
        access.location = _location(device)
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        checked(driver.cuMemSetAccess(self.start, self.nbytes, [access], 1))
        # The mapping keeps the memory alive by itself, without the objects of ``parts``.
        weakref.finalize(self, _unmap, self.start, self.nbytes, device).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.start, False), "version": 3}


def _unmap(start: int, nbytes: int, device: torch.device) -> None:
    """Unmap and free the addresses once the device has finished its work.

    While a CUDA graph is recorded, which must not wait for the device, they are left to the next call.
    """
    _to_unmap.append((start, nbytes))
    if torch.cuda.is_current_stream_capturing():
        return
    torch.cuda.synchronize(device)
    while _to_unmap:
        start, nbytes = _to_unmap.pop()
        checked(driver.cuMemUnmap(start, nbytes))
        checked(driver.cuMemAddressFree(start, nbytes))


def _release(handles: list[Any]) -> None:
    while handles:
        checked(driver.cuMemRelease(handles.pop()))


def _create(nbytes: int, device: torch.device) -> Any:
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.requestedHandleTypes = _descriptor()
    wanted.location = _location(device)
    error, handle = driver.cuMemCreate(nbytes, wanted, 0)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        torch.cuda.empty_cache()  # what the allocator keeps of past tensors may be enough
        error, handle = driver.cuMemCreate(nbytes, wanted, 0)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        free, total = torch.cuda.mem_get_info(device)
        raise torch.OutOfMemoryError(
            f"cannot allocate {nbytes:,} bytes on {device}: {free:,} of {total:,} bytes are free; "
            "see memory_plan() for what the model takes"
        )
    return checked((error, handle))


def _location(device: torch.device) -> Any:
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = torch.cuda.current_device() if device.index is None else device.index
    return location


def _descriptor() -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def checked(answer: tuple[Any, ...]) -> Any:
    """Return the result of a function of the CUDA driver; raise ``RuntimeError`` if it failed."""
    error, *found = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver refuses to map or share memory: {error.name}")
    return found[0] if found else None
