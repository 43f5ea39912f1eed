"""Slabs of one region of memory, lent to shapes of pages: integers, no tensor and no content.

[Note: the grid of pages]
A page holds keys and values of ``page_size`` tokens for all layers of its shape. The pages of one shape lie on a grid
over the whole region: page ``n`` is bytes ``[n P, (n + 1) P)``, where ``P`` is ``PageShape.nbytes``. A slab that is
lent to the shape holds those pages of the grid that lie wholly inside it. So a page number alone says where a page is,

    byte of (page, layer, K or V, head, token) = P page + L layer + V kv + (head page_size + token) head_dim itemsize

and a kernel needs one base pointer, the strides, and a table of plain page numbers (int32; times ``P`` it is int64),
whichever slabs the pages lie in. Other shapes have other grids over the same bytes, and never the same slab. The price
is less than two pages per slab where ``P`` does not divide the slab; ``SlabGrid.fitting`` finds a slab where it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

from yafsdp_like.inference.kv.ranked import Ranked
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment, aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
MAX_PAGES = 2**31  # page numbers are int32


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return -(-a // b)


def check(holds: bool, found: str) -> None:
    """Raise RuntimeError with what was found, unless ``holds``."""
    if not holds:
        raise RuntimeError(f"the books of pages are wrong; {found}")


@dataclass(frozen=True)
class PageShape:
    """What one page holds: the shape class that a slab is lent to. Equal shapes share slabs, whosever they are."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int  # tokens
    dtype: str = "bfloat16"  # as torch names it
    num_planes: int = 2  # of a layer: keys and values; 1: a page holds features of an image (`image_pages.py`)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "dtype" and value < 1:
                raise ValueError(f"a page's {field.name} must be at least 1, found {value}")
        if self.dtype not in ITEMSIZES:
            raise ValueError(f"a page's dtype must be one of {', '.join(ITEMSIZES)}, found {self.dtype!r}")
        assert self.nbytes % ALIGNMENT_NBYTES == 0 and self.plane_nbytes % self.itemsize == 0
        last = self.offset_nbytes(0, self.num_layers - 1, self.num_planes - 1) + self.num_kv_heads * self.head_nbytes
        assert last <= self.nbytes, f"the last head of a page ends at {last}, the page at {self.nbytes}"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ITEMSIZES[self.dtype]

    @property
    def head_nbytes(self) -> int:
        """One head's keys (or values) of a page, contiguous."""
        return self.page_size * self.head_dim * self.itemsize

    @cached_property
    def plane_nbytes(self) -> int:
        """One layer's keys (or values) of a page, padded to the alignment."""
        return aligned(self.num_kv_heads * self.head_nbytes)

    @cached_property
    def nbytes(self) -> int:
        """A whole page: what one copy to the host moves."""
        return self.num_layers * self.num_planes * self.plane_nbytes

    @property
    def strides(self) -> tuple[int, int, int, int, int, int]:
        """In elements, of a tensor (page, layer, K or V, kv head, token, head_dim) that begins with the region."""
        plane = self.plane_nbytes // self.itemsize
        head = self.page_size * self.head_dim
        return 2 * plane * self.num_layers, 2 * plane, plane, head, self.head_dim, 1

    def offset_nbytes(self, page: int, layer: int, kv: int) -> int:
        """Return where a page's keys (``kv`` 0) or values (1) of the shape's ``layer``-th layer begin in the region."""
        return page * self.nbytes + (self.num_planes * layer + kv) * self.plane_nbytes


@dataclass(frozen=True)
class SlabGrid:
    """A region cut into equal slabs; what is left at its end is not used."""

    region_nbytes: int
    slab_nbytes: int

    def __post_init__(self) -> None:
        if self.slab_nbytes < 1 or self.slab_nbytes % ALIGNMENT_NBYTES:
            raise ValueError(f"a slab must be a multiple of {ALIGNMENT_NBYTES} bytes, found {self.slab_nbytes}")
        if self.region_nbytes < self.slab_nbytes:
            raise ValueError(f"a region of {self.region_nbytes} bytes holds no slab of {self.slab_nbytes}")

    @classmethod
    def fitting(cls, region_nbytes: int, shapes: Iterable[PageShape], about_nbytes: int = 32 << 20) -> SlabGrid:
        """Make slabs of about the given size that whole pages of all ``shapes`` fill.

        If no such size is within four times it, slabs have that size, but at least two pages.
        """
        sizes = [shape.nbytes for shape in shapes]
        common, two_pages = math.lcm(*sizes), 2 * max(sizes)
        slab = aligned(about_nbytes, common)
        if slab > 4 * about_nbytes:
            slab = max(aligned(about_nbytes), two_pages)
        return cls(region_nbytes, slab)

    @property
    def num_slabs(self) -> int:
        """Slabs of the region."""
        return self.region_nbytes // self.slab_nbytes

    def check_shape(self, shape: PageShape) -> None:
        """Raise ValueError unless every slab holds a page of ``shape``, and its page numbers are int32."""
        if self.slab_nbytes < 2 * shape.nbytes and self.slab_nbytes % shape.nbytes:
            raise ValueError(
                f"a slab must be a page or at least two, {2 * shape.nbytes} bytes for {shape}; found {self.slab_nbytes}"
            )
        if self.region_nbytes // shape.nbytes > MAX_PAGES:
            raise ValueError(f"{self.region_nbytes} bytes are more than {MAX_PAGES} pages of {shape}")

    def segment(self, slab: int) -> Segment:
        """Return the bytes of ``slab`` in the region."""
        return Segment(slab * self.slab_nbytes, self.slab_nbytes)

    def pages(self, slab: int, shape: PageShape) -> range:
        """Return the numbers of the pages of ``shape`` that lie wholly inside ``slab``."""
        segment = self.segment(slab)
        return range(-(-segment.offset_nbytes // shape.nbytes), segment.end_nbytes // shape.nbytes)

    def slab_of(self, page: int, shape: PageShape) -> int:
        """Return the slab that a page lies in."""
        return page * shape.nbytes // self.slab_nbytes

    def by_slab(self, pages: Iterable[int], shape: PageShape) -> dict[int, list[int]]:
        """Return ``pages`` by the slab that they lie in, in order."""
        found: dict[int, list[int]] = {}
        page_nbytes, slab_nbytes = shape.nbytes, self.slab_nbytes
        for page in pages:
            found.setdefault(page * page_nbytes // slab_nbytes, []).append(page)
        return found

    def pages_per_slab(self, shape: PageShape) -> int:
        """Return the pages of ``shape`` that every slab holds at least."""
        whole, left = divmod(self.slab_nbytes, shape.nbytes)
        return whole if not left else max(1, whole - 1)


@dataclass(frozen=True)
class Lease:
    """A slab that is lent to a shape."""

    shape: PageShape
    pages: range
    free: list[int]  # of ``pages``, in no order


class SlabPool:
    """Which slab is lent to which shape, and which pages of it are free.

    ``take_all`` and ``put_all`` are O(pages + slabs touched x log slabs), plus O(pages of a slab) when a slab is lent.
    Pages come from the lowest slab that has one, so that high slabs become empty and return to the pool. Those of
    ``lend_late`` come behind all others, the later the higher their number there. A slab may be claimed for something
    else than pages.
    """

    def __init__(self, grid: SlabGrid, lend_late: Mapping[int, int] | None = None) -> None:
        self.grid = grid
        self.leases: dict[int, Lease] = {}  # slab -> its lease
        self.claimed: set[int] = set()
        self.num_written = [0] * grid.num_slabs  # how often each slab was lent or claimed, whose bytes are then others
        self._lend_late = dict(lend_late or {})
        self._idle: Ranked[int] = Ranked()  # neither lent nor claimed
        for slab in range(grid.num_slabs):
            self._idle.put(slab, self._rank(slab))
        self._roomy: dict[PageShape, Ranked[int]] = {}  # slabs with free pages
        self._num_free: dict[PageShape, int] = {}

    @property
    def num_idle(self) -> int:
        """Slabs that are neither lent nor claimed."""
        return len(self._idle)

    def claim(self, slab: int) -> None:
        """Take an idle slab away from pages, until it is ``returned``."""
        assert slab in self._idle, f"slab {slab} is lent or claimed: {self.leases.get(slab)}"
        self._idle.discard(slab)
        self.claimed.add(slab)
        self.num_written[slab] += 1

    def returned(self, slab: int) -> None:
        """Let pages have a claimed slab again."""
        self.claimed.remove(slab)
        self._idle.put(slab, self._rank(slab))

    def _rank(self, slab: int) -> tuple[int, int]:
        return self._lend_late.get(slab, 0), slab

    def admit(self, shape: PageShape) -> None:
        """Make ``shape`` known. Raises ValueError if slabs are too small for it."""
        self.grid.check_shape(shape)
        self._roomy.setdefault(shape, Ranked())
        self._num_free.setdefault(shape, 0)

    def num_free(self, shape: PageShape) -> int:
        """Return the pages that ``take_all`` would give without an eviction; a lower bound where slabs differ."""
        return self._num_free[shape] + self.num_idle * self.grid.pages_per_slab(shape)

    def take_all(self, shape: PageShape, count: int) -> list[int]:
        """Take up to ``count`` free pages, lending slabs for them if need be; fewer where there are no more."""
        roomy, taken = self._roomy[shape], list[int]()
        while len(taken) < count:
            slab = roomy.first()
            if slab is None:
                slab = self._lend(shape)
            if slab is None:
                break
            free = self.leases[slab].free
            first = max(0, len(free) - (count - len(taken)))
            taken += free[first:][::-1]
            del free[first:]
            if not free:
                roomy.discard(slab)
        self._num_free[shape] -= len(taken)
        return taken

    def put_all(self, shape: PageShape, pages: Iterable[int]) -> None:
        """Return pages, and slabs with their last pages."""
        for slab, returned in self.grid.by_slab(pages, shape).items():
            lease = self.leases[slab]
            for page in returned:
                assert lease.shape == shape and page in lease.pages, f"{page} of {shape} is not in slab {slab}: {lease}"
            lease.free.extend(returned)
            self._num_free[shape] += len(returned)
            self._roomy[shape].put(slab, self._rank(slab))
            if len(lease.free) == len(lease.pages):
                self._end(slab, lease)

    def take_back(self, slab: int) -> None:
        """End the lease of a slab whose pages are all given up at once; O(log slabs)."""
        lease = self.leases[slab]
        self._num_free[lease.shape] += len(lease.pages) - len(lease.free)
        self._end(slab, lease)

    def _lend(self, shape: PageShape) -> int | None:
        slab = self._idle.first()
        if slab is None:
            return None
        self._idle.discard(slab)
        self.num_written[slab] += 1
        pages = self.grid.pages(slab, shape)
        self.leases[slab] = Lease(shape, pages, list(reversed(pages)))
        self._num_free[shape] += len(pages)
        self._roomy[shape].put(slab, self._rank(slab))
        return slab

    def _end(self, slab: int, lease: Lease) -> None:
        del self.leases[slab]
        self._num_free[lease.shape] -= len(lease.pages)
        self._roomy[lease.shape].discard(slab)
        self._idle.put(slab, self._rank(slab))

    def check_integrity(self, used: Mapping[PageShape, Set[int]]) -> None:
        """Raise RuntimeError unless every slab is idle, claimed or lent, and its pages then free or ``used``."""
        slabs = sorted([*self._idle, *self.leases, *self.claimed])
        check(slabs == [*range(self.grid.num_slabs)], f"slabs idle, claimed or lent: {slabs} of {self.grid.num_slabs}")
        for shape in self._roomy:
            leases = {slab: lease for slab, lease in self.leases.items() if lease.shape == shape}
            free = [page for lease in leases.values() for page in lease.free]
            both = sorted([*free, *used.get(shape, ())])
            pages = sorted(page for lease in leases.values() for page in lease.pages)
            check(both == pages, f"{shape}: pages {pages} are lent, {both} are free or used")
            check(len(free) == self._num_free[shape], f"{shape}: {len(free)} are free, counted {self._num_free[shape]}")
            roomy = sorted(slab for slab, lease in leases.items() if lease.free)
            check(roomy == sorted(self._roomy[shape]), f"{shape}: slabs {roomy} have free pages")
            for slab, lease in leases.items():
                check(len(lease.free) < len(lease.pages), f"slab {slab} is empty and was not returned")
                check(lease.pages == self.grid.pages(slab, shape), f"slab {slab} has pages {lease.pages}")
