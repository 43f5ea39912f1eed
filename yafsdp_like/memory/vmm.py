"""Physical pages, and windows: ranges of addresses that show pages of several places one after the other.

[Note: windows]
A gathered parameter is every rank's chunk in order, and a rank has its own chunk already, in its shard. So a gather
slot is a window: where this rank's chunk belongs it shows the shard's own pages, elsewhere pages of the slots' region.
What is in a shard is then in its slot, and is neither copied there nor stored twice.

A page is the least that can be shown by itself, so only ranges of whole pages can be. Pages on a GPU are allocations of
the driver, which maps an allocation as a whole or not at all: each page is one. On the host they are pieces of a file
in memory. Both travel to other processes of the host as file descriptors.
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

PAGE_NBYTES = 2 << 20  # the least that a GPU maps; the same on hosts, so that a plan is the same
_MAP_SHARED, _MAP_FIXED, _MAP_NOTHING = mmap.MAP_SHARED, 0x10, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Pages(Protocol):
    """Physical memory that lives as long as this object or a window shows it."""

    nbytes: int  # a multiple of page_nbytes
    page_nbytes: int
    num_descriptors: int

    def descriptors(self, start: int, stop: int) -> list[int]:
        """New file descriptors of numbers ``start`` to ``stop``, for another process; the caller closes them."""

    def of_peer(self) -> Pages:
        """Pages of the same sizes in another process's memory, none yet: ``adopt`` brings them."""

    def adopt(self, descriptors: Sequence[int]) -> None:
        """The next of the other process's descriptors; they may be closed after."""

    def show(self, address: int, segment: Segment) -> None:
        """Maps these bytes, whole pages, at a reserved address."""

    def window(self, parts: Sequence[Part]) -> Window:
        """As ``window``, for pages of this kind."""


Part = tuple[Pages, Segment]


@dataclass(frozen=True, eq=False)
class Window:
    """``bytes``, ``(nbytes,)`` uint8, on a range of addresses that is given back when the last tensor on it is gone;
    where it shows a peer's pages, when ``addresses`` is gone.
    """

    bytes: torch.Tensor
    addresses: object


def window(parts: Sequence[Part]) -> Window:
    """What shows ``parts``, whole pages on one device, one after the other, to this process; at least one byte."""
    return parts[0][0].window([part for part in parts if part[1].nbytes])


def allocate(nbytes: int, page_nbytes: int, device: torch.device) -> Pages:
    """Pages for at least ``nbytes`` on a GPU or in host memory; see ``DevicePages`` for what it raises."""
    nbytes = aligned(nbytes, page_nbytes)
    return DevicePages.of(nbytes, page_nbytes, device) if device.type == "cuda" else HostPages.of(nbytes, page_nbytes)


def obstacle(device: torch.device) -> str | None:
    """Why memory of ``device`` cannot be shared in pages; None if it can."""
    if device.type != "cuda":
        return None if sys.platform == "linux" else f"memory is shared on Linux only, this is {sys.platform}"
    return (
        None if driver is not None else "the package cuda-bindings, which comes with CUDA builds of torch, is missing"
    )


# --- in host memory ---


class HostPages:
    """A file in memory; its one descriptor stands for all pages."""

    num_descriptors = 1

    def __init__(self, nbytes: int, page_nbytes: int) -> None:
        assert page_nbytes % mmap.PAGESIZE == 0, f"pages of {page_nbytes} bytes are no multiple of {mmap.PAGESIZE}"
        self.nbytes, self.page_nbytes = nbytes, page_nbytes
        self._file = -1

    @classmethod
    def of(cls, nbytes: int, page_nbytes: int) -> HostPages:
        pages = cls(nbytes, page_nbytes)
        pages._keep(os.memfd_create("yafsdp_like"))
        os.ftruncate(pages._file, nbytes)
        return pages

    def _keep(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    def descriptors(self, start: int, stop: int) -> list[int]:
        return [os.dup(self._file) for _ in range(start, stop)]

    def of_peer(self) -> HostPages:
        return HostPages(self.nbytes, self.page_nbytes)

    def adopt(self, descriptors: Sequence[int]) -> None:
        (file,) = descriptors
        self._keep(os.dup(file))

    def show(self, address: int, segment: Segment) -> None:
        flags = _MAP_SHARED | _MAP_FIXED
        _map_host(address, segment.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._file, segment.offset_nbytes)

    def window(self, parts: Sequence[Part]) -> Window:
        nbytes = _nbytes(parts)
        address = _map_host(None, nbytes, 0, _MAP_NOTHING, -1, 0)
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)  # the tensor keeps it alive
        weakref.finalize(buffer, _libc().munmap, ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
        _show(parts, address)
        return Window(torch.frombuffer(buffer, dtype=torch.uint8), buffer)


def _nbytes(parts: Sequence[Part]) -> int:
    return sum(segment.nbytes for _, segment in parts)


def _show(parts: Sequence[Part], address: int) -> None:
    for pages, segment in parts:
        whole = segment.offset_nbytes % pages.page_nbytes == 0 and segment.nbytes % pages.page_nbytes == 0
        assert whole, f"{segment} is not made of whole pages of {pages.page_nbytes} bytes"
        pages.show(address, segment)
        address += segment.nbytes


def _map_host(address: int | None, nbytes: int, access: int, flags: int, file: int, offset_nbytes: int) -> int:
    found = _libc().mmap(address, nbytes, access, flags, file, offset_nbytes)
    if found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {nbytes:,} bytes of host memory: {os.strerror(number)}")
    return int(found)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return libc


# --- on a GPU ---


class DevicePages:
    """Allocations of the CUDA driver, one a page.

    Raises ``torch.OutOfMemoryError`` when the GPU has no room, and ``RuntimeError`` for other errors of the driver.
    """

    def __init__(self, nbytes: int, page_nbytes: int, device: torch.device, is_foreign: bool) -> None:
        assert page_nbytes % PAGE_NBYTES == 0, f"pages of {page_nbytes} bytes are no multiple of {PAGE_NBYTES}"
        self.nbytes, self.page_nbytes = nbytes, page_nbytes
        self.num_descriptors = nbytes // page_nbytes
        self._device, self._is_foreign = device, is_foreign
        self._handles: list[Any] = []
        weakref.finalize(self, _release, self._handles).atexit = False

    @classmethod
    def of(cls, nbytes: int, page_nbytes: int, device: torch.device) -> DevicePages:
        pages = cls(nbytes, page_nbytes, device, is_foreign=False)
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # which makes the driver's context, if nothing has
            pages._handles += (_create(page_nbytes, device) for _ in range(pages.num_descriptors))
        return pages

    def descriptors(self, start: int, stop: int) -> list[int]:
        return [
            int(checked(driver.cuMemExportToShareableHandle(h, _descriptor(), 0))) for h in self._handles[start:stop]
        ]

    def of_peer(self) -> DevicePages:
        return DevicePages(self.nbytes, self.page_nbytes, self._device, is_foreign=True)

    def adopt(self, descriptors: Sequence[int]) -> None:
        self._handles += (checked(driver.cuMemImportFromShareableHandle(file, _descriptor())) for file in descriptors)

    def show(self, address: int, segment: Segment) -> None:
        first = segment.offset_nbytes // self.page_nbytes
        for number in range(segment.nbytes // self.page_nbytes):
            checked(
                driver.cuMemMap(
                    address + number * self.page_nbytes, self.page_nbytes, 0, self._handles[first + number], 0
                )
            )

    def window(self, parts: Sequence[Part]) -> Window:
        with torch.cuda.device(self._device):
            addresses = _Addresses(parts, self._device)
        if not self._is_foreign:
            return Window(torch.as_tensor(addresses, device=self._device), addresses)
        # torch takes a tensor for one of the GPU that has the memory, and would copy from it there; a bare storage it
        # believes to be where it is told, but that owns nothing.
        storage = torch._C._construct_storage_from_data_pointer(addresses.start, self._device, addresses.nbytes)
        whole = torch.empty(0, dtype=torch.uint8, device=self._device)
        return Window(whole.set_(storage, 0, (addresses.nbytes,), (1,)), addresses)


_given_back: list[tuple[int, int]] = []  # addresses and bytes, still mapped


class _Addresses:
    """A range of addresses of one GPU while something is shown there."""

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self.nbytes = _nbytes(parts)
        self.start = int(checked(driver.cuMemAddressReserve(self.nbytes, 0, 0, 0)))
        _show(parts, self.start)
        access = driver.CUmemAccessDesc()
        access.location = _location(device)
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        checked(driver.cuMemSetAccess(self.start, self.nbytes, [access], 1))
        # What is shown holds the memory, not the objects that it was shown from.
        weakref.finalize(self, _unmap, self.start, self.nbytes, device).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.start, False), "version": 3}


def _unmap(start: int, nbytes: int, device: torch.device) -> None:
    """Once nothing reads or writes there any more. In the middle of a recording, which must not wait for the device,
    what is given back is left to the next call.
    """
    _given_back.append((start, nbytes))
    if torch.cuda.is_current_stream_capturing():
        return
    torch.cuda.synchronize(device)
    while _given_back:
        start, nbytes = _given_back.pop()
        checked(driver.cuMemUnmap(start, nbytes))
        checked(driver.cuMemAddressFree(start, nbytes))


def _release(handles: list[Any]) -> None:
    while handles:
        checked(driver.cuMemRelease(handles.pop()))


def _properties(device: torch.device) -> Any:
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.requestedHandleTypes = _descriptor()
    wanted.location = _location(device)
    return wanted


def _create(nbytes: int, device: torch.device) -> Any:
    wanted = _properties(device)
    error, handle = driver.cuMemCreate(nbytes, wanted, 0)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        torch.cuda.empty_cache()  # what the allocator keeps of past tensors may be enough
        error, handle = driver.cuMemCreate(nbytes, wanted, 0)
    if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        free, total = torch.cuda.mem_get_info(device)
        raise torch.OutOfMemoryError(
            f"no page of {nbytes:,} bytes is left on {device}: {free:,} of {total:,} bytes are free; "
            "see memory_plan() for what the model takes"
        )
    return checked((error, handle))


def _location(device: torch.device) -> Any:
    location = driver.CUmemLocation()
    location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = _number(device)
    return location


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _descriptor() -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def checked(answer: tuple[Any, ...]) -> Any:
    """What a function of the driver gave, beside its error."""
    error, *found = answer
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver refuses to share memory: {error.name}")
    return found[0] if found else None
