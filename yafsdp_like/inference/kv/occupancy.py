"""Who has which bytes of a planned memory now: a map in the order of addresses, for people to look at."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from yafsdp_like.inference.kv.pages import PagePool
    from yafsdp_like.inference.kv.slabs import PageShape
    from yafsdp_like.memory.plan import Region

WEIGHTS, PAGES, FREE = "weights", "pages", "free"


class Stretch(NamedTuple):
    """Neighbouring bytes with one use."""

    use: str  # ``PAGES``, ``FREE``, or what a plan calls the kind of a region, as ``WEIGHTS``
    owner: str  # the region's name, the model whose weights are there, or what pages hold
    nbytes: int
    held: float = 0.0  # the share of it in pages that sequences hold
    cached: float = 0.0  # and in pages that are kept for prompts that begin alike


def occupancy(
    regions: Sequence[Region], slabs_region: str, pages: PagePool, claims: Mapping[int, str] | None = None
) -> list[Stretch]:
    """Return what the device's long-lived ``regions`` hold, the one of slabs as these are lent now.

    ``claims`` are the models whose weights lie in slabs. O(slabs + pages).
    """
    found: list[Stretch] = []
    for region in regions:
        if region.transient or region.on_host:
            continue
        if region.name == slabs_region:
            found += _of_slabs(region.nbytes, pages, claims or {})
        else:
            found.append(Stretch(region.kind, region.name, region.nbytes))
    return found


def _of_slabs(nbytes: int, pages: PagePool, claims: Mapping[int, str]) -> Iterator[Stretch]:
    grid, held, cached = pages.grid, Counter[int](), Counter[int]()
    for shape, stock in pages.stocks.items():
        for page, record in stock.pages.items():
            (held if record.num_references else cached)[grid.slab_of(page, shape)] += shape.nbytes

    def use_of(slab: int) -> tuple[str, str]:
        if slab in pages.slabs.claimed:
            return WEIGHTS, claims.get(slab, "")
        lease = pages.slabs.leases.get(slab)
        return (FREE, "") if lease is None else (PAGES, _words(lease.shape))

    for (use, owner), slabs in groupby(range(grid.num_slabs), use_of):
        run = list(slabs)
        size = len(run) * grid.slab_nbytes
        yield Stretch(use, owner, size, sum(held[s] for s in run) / size, sum(cached[s] for s in run) / size)
    if rest := nbytes - grid.num_slabs * grid.slab_nbytes:
        yield Stretch(FREE, "", rest)


def _words(shape: PageShape) -> str:
    if shape.num_planes == 1:
        return f"images, {shape.page_size} rows of {shape.head_dim}, {shape.dtype}"
    return f"{shape.num_layers} layers, {shape.num_kv_heads} heads of {shape.head_dim}, {shape.dtype}"
