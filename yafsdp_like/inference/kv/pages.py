"""Pages of many shapes on one region: each is free, cached, or referred to by so many.

    free --take--> referenced --drop, without content--> free
                   referenced --drop, with content--> cached --add_references--> referenced
                                                      cached --evicted--> free, or taken at once

A page has content once ``publish_all`` was called for it, and is found by it from then on, until it is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.inference.kv.eviction import LRU, Ledger, Policy, Tenant, Victims
from yafsdp_like.inference.kv.prefix import Content
from yafsdp_like.inference.kv.ranked import Rank, Ranked
from yafsdp_like.inference.kv.slabs import PageShape, SlabGrid, SlabPool, check

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from yafsdp_like.inference.kv.prefix import ImageContent, Prefix


@dataclass(slots=True)
class Page:
    """A page that is not free."""

    tenant: str  # who is charged for it
    num_references: int = 1
    num_uses: int = 1
    content: Content | ImageContent | None = None
    cost: float = 0.0  # seconds to bring the content back


class Stock:
    """The pages of one shape that are not free, and those of them that may go."""

    def __init__(self, ledger: Ledger, shape: PageShape) -> None:
        self.pages: dict[int, Page] = {}
        self.by_content: dict[Content | ImageContent, int] = {}
        self.victims = Victims(ledger, shape.nbytes)
        self.unheld: Ranked[int] = Ranked()  # slabs with victims and no referenced page, by their highest victim


class PagePool:
    """The pages of one tier: a region on the device, or one of pinned host memory.

    Operations take many pages at once, as prompts begin and requests end with many. They are O(log n) amortised in
    pages, slabs and tenants for each page, times the few shapes that share the pool; evicting a slab of another shape
    is O(log n) for each of its pages. Where that slab is protected by a tenant's floor, all slabs without referenced
    pages are looked at.
    """

    def __init__(
        self,
        grid: SlabGrid,
        policy: Policy | None = None,
        tenants: Iterable[Tenant] = (),
        lend_late: Mapping[int, int] | None = None,
    ) -> None:
        self.grid = grid
        self.slabs = SlabPool(grid, lend_late)
        self.policy = policy or LRU()
        self.ledger = Ledger(tenants, grid.num_slabs * grid.slab_nbytes)
        self.stocks: dict[PageShape, Stock] = {}
        self.num_evicted = 0
        self._tick = 0
        self._held: dict[int, int] = {}  # slab -> its referenced pages, where there are any
        self._ranks: dict[int, Rank] = {}  # slab -> the highest rank that a page of it had while it was lent

    def admit(self, shape: PageShape) -> None:
        """Make ``shape`` known. Raises ValueError if slabs are too small for it."""
        self.slabs.admit(shape)
        self.stocks.setdefault(shape, Stock(self.ledger, shape))

    @property
    def used_and_cached_nbytes(self) -> tuple[int, int]:
        """Bytes of pages with references, and of those that are only cached."""
        leases = self.slabs.leases
        used = sum(num_pages * leases[slab].shape.nbytes for slab, num_pages in self._held.items())
        return used, sum(self.ledger.charges.values()) - used

    def num_available(self, shape: PageShape) -> int:
        """Return the pages that ``take`` could give, those that floors protect included."""
        per_slab = self.grid.pages_per_slab(shape)
        others = sum(len(stock.unheld) for other, stock in self.stocks.items() if other != shape)
        return self.slabs.num_free(shape) + len(self.stocks[shape].victims) + others * per_slab

    def content(self, shape: PageShape, page: int) -> Content | ImageContent | None:
        """Return what a page that is not free holds; None if that was not published."""
        return self.stocks[shape].pages[page].content

    def find(self, shape: PageShape, content: Content | ImageContent) -> int | None:
        """Return the page that holds ``content``; None if there is none. Changes nothing."""
        return self.stocks[shape].by_content.get(content)

    def find_all(self, shape: PageShape, contents: Iterable[Content | None]) -> list[int | None]:
        """Return the pages that hold ``contents``; None where there is none. Changes nothing."""
        by_content = self.stocks[shape].by_content
        return [None if content is None else by_content.get(content) for content in contents]

    def take(self, shape: PageShape, tenant: str = "") -> int | None:
        """Take one page as ``take_all`` does; None if nothing may go."""
        return next(iter(self.take_all(shape, 1, tenant)), None)

    def take_all(self, shape: PageShape, count: int, tenant: str = "") -> list[int]:
        """Take ``count`` pages with one reference each and any bytes in them, evicting if need be.

        There are fewer only where nothing else may go.
        """
        taken = self._take_free(shape, count, tenant)
        while len(taken) < count:
            more = self._make_room(shape, count - len(taken), tenant)
            if not more:
                break
            taken += more
        return taken

    def _take_free(self, shape: PageShape, count: int, tenant: str) -> list[int]:
        pages = self.slabs.take_all(shape, count)
        if pages:
            self._enter(shape, pages, tenant)
        return pages

    def _enter(self, shape: PageShape, pages: Sequence[int], tenant: str) -> None:
        """Give ``tenant`` pages that nobody has, with one reference each."""
        records = self.stocks[shape].pages
        for page in pages:
            records[page] = Page(tenant)
        self._charge(tenant, shape.nbytes * len(pages))
        self._hold(shape, pages)

    def add_references(self, shape: PageShape, pages: Sequence[int]) -> None:
        """Add a reference to each of ``pages``, none of which is free."""
        stock, kept = self.stocks[shape], dict[str, list[int]]()
        for page in pages:
            record = stock.pages[page]
            if not record.num_references:
                kept.setdefault(record.tenant, []).append(page)
            record.num_references += 1
            record.num_uses += 1
        for tenant, found in kept.items():
            stock.victims.remove_all(found, tenant)
            self._hold(shape, found)

    def drop(self, shape: PageShape, page: int) -> None:
        """Drop a reference to one page as ``drop_all`` does."""
        self.drop_all(shape, [page])

    def drop_all(self, shape: PageShape, pages: Iterable[int]) -> None:
        """Drop a reference to each page; with its last one a page is free, or cached if it has content."""
        records = self.stocks[shape].pages
        empty, kept = list[int](), list[int]()
        for page in pages:
            record = records[page]
            assert record.num_references > 0, f"nobody refers to page {page} of {shape}"
            record.num_references -= 1
            if not record.num_references:
                (empty if record.content is None else kept).append(page)
        let_go = self._let_go(shape, [*empty, *kept])
        self._free(shape, empty)
        self._keep(shape, kept)
        for slab in let_go:
            self._note_unheld(shape, slab)

    def _keep(self, shape: PageShape, pages: Sequence[int]) -> None:
        """Have pages that nobody refers to any longer, and that have content, wait for their eviction."""
        stock, priorities = self.stocks[shape], dict[str, int]()
        ranked: dict[str, list[tuple[int, Rank]]] = {}
        for page in pages:
            record = stock.pages[page]
            if record.tenant not in ranked:
                ranked[record.tenant], priorities[record.tenant] = [], self.ledger.tenant(record.tenant).priority
            self._tick += 1
            worth = self.policy.rank(self._tick, record.num_uses, shape.nbytes, record.cost)
            ranked[record.tenant].append((page, (priorities[record.tenant], worth, self._tick)))
        for tenant, found in ranked.items():
            stock.victims.put_all(found, tenant)
            ranks = dict(found)
            for slab, on_slab in self.grid.by_slab(ranks, shape).items():
                highest = max([ranks[page] for page in on_slab])
                self._ranks[slab] = max(highest, self._ranks.get(slab, highest))

    def publish_all(
        self,
        shape: PageShape,
        pages: Iterable[int],
        contents: Iterable[Content | ImageContent],
        costs: Iterable[float],
    ) -> None:
        """Record what is in each page, and the seconds that it costs to bring it back.

        A page holds just that from now on. Where another page holds the same, that one goes on being found, and this
        one has no content.
        """
        stock = self.stocks[shape]
        for page, content, cost in zip(pages, contents, costs, strict=True):
            record = stock.pages[page]
            assert record.content is None or record.content == content, f"page {page} of {shape} holds something else"
            record.cost = cost
            if stock.by_content.setdefault(content, page) == page:
                record.content = content

    def claim(self, slab: int) -> bool:
        """Take a whole slab for something else than pages, and return whether it could be had.

        It cannot while a page of it is referred to. What is cached in it is evicted, floors or not.
        """
        if not self.may_claim(slab):
            return False
        if slab in self.slabs.leases:
            self._evict_slab(slab)
        self.slabs.claim(slab)
        return True

    def may_claim(self, slab: int) -> bool:
        """Return whether ``claim`` could have a slab."""
        return slab not in self._held and slab not in self.slabs.claimed

    def is_held(self, slab: int) -> bool:
        """Return whether a page of a slab is referred to."""
        return slab in self._held

    def clear(self, prefixes: Container[Prefix] | None = None) -> None:
        """Evict all that nobody refers to, floors or not, or just the pages of some ``prefixes``."""
        for shape, stock in self.stocks.items():
            gone = list[int]()
            for page in stock.victims:
                content = stock.pages[page].content
                if prefixes is None or (isinstance(content, Content) and content.prefix in prefixes):
                    gone.append(page)
            self._evict(shape, gone)

    def _make_room(self, shape: PageShape, count: int, tenant: str) -> list[int]:
        """Take up to ``count`` pages for others: those of ``shape`` that go first, or of another shape's slab before.

        There are none only where nothing may go.
        """
        slabs = [found for other in self.stocks if other != shape and (found := self._first_slab(other, tenant))]
        first = min(slabs, default=None)
        owner, evicted = self.stocks[shape].victims.pop_all(tenant, count, first and first[0])
        if evicted:
            pages = [page for page, _ in evicted]
            self._forget(shape, evicted, owner)
            self._enter(shape, pages, tenant)
            return pages
        if first is None:
            return []
        self._evict_slab(first[1])
        return self._take_free(shape, count, tenant)

    def _forget(self, shape: PageShape, evicted: Sequence[tuple[int, Rank]], owner: str) -> None:
        """Forget what is in pages of ``owner`` that are victims no longer; they belong to nobody then."""
        stock = self.stocks[shape]
        for page, rank in evicted:
            record = stock.pages.pop(page)
            assert not record.num_references, f"page {page} of {shape} is referred to {record.num_references} times"
            assert record.content is not None, f"page {page} of {shape} is cached without content"
            del stock.by_content[record.content]
            self.policy.evicted(rank[1])
        self._charge(owner, -shape.nbytes * len(evicted))
        self.num_evicted += len(evicted)

    def _first_slab(self, shape: PageShape, tenant: str) -> tuple[Rank, int] | None:
        """Return rank and number of the slab without referenced pages that goes first for ``tenant``."""
        unheld = self.stocks[shape].unheld
        slab = unheld.first()
        if slab is not None and not self._may_go(slab, tenant):
            slab = next((slab for slab in unheld if self._may_go(slab, tenant)), None)
        return None if slab is None else (unheld.rank(slab), slab)

    def _victims_of(self, slab: int) -> list[int]:
        lease = self.slabs.leases[slab]
        return [page for page in lease.pages if page in self.stocks[lease.shape].pages]

    def _may_go(self, slab: int, tenant: str) -> bool:
        """Whether evicting all of a slab's pages leaves every other tenant its floor."""
        shape = self.slabs.leases[slab].shape
        lost: dict[str, int] = {}
        for page in self._victims_of(slab):
            owner = self.stocks[shape].pages[page].tenant
            lost[owner] = lost.get(owner, 0) + shape.nbytes
        return all(name == tenant or nbytes <= self.ledger.surplus_nbytes(name) for name, nbytes in lost.items())

    def _evict_slab(self, slab: int) -> None:
        """Evict all pages of a slab that holds no others, at the price of a few dictionary entries each."""
        shape = self.slabs.leases[slab].shape
        self._forget_all(shape, self._victims_of(slab))
        self.slabs.take_back(slab)
        self._note_unheld(shape, slab)

    def _evict(self, shape: PageShape, pages: Sequence[int]) -> None:
        """Evict pages that nobody refers to."""
        self._forget_all(shape, pages)
        self.slabs.put_all(shape, pages)
        for slab in self.grid.by_slab(pages, shape):
            self._note_unheld(shape, slab)

    def _forget_all(self, shape: PageShape, pages: Iterable[int]) -> None:
        """Forget what is in victims, whose ever they are."""
        stock, owned = self.stocks[shape], dict[str, list[int]]()
        for page in pages:
            owned.setdefault(stock.pages[page].tenant, []).append(page)
        for tenant, found in owned.items():
            ranks = stock.victims.remove_all(found, tenant)
            self._forget(shape, [*zip(found, ranks, strict=True)], tenant)

    def _free(self, shape: PageShape, pages: Sequence[int]) -> None:
        """Return pages that nobody refers to, and that have no content."""
        stock, charges = self.stocks[shape], dict[str, int]()
        for page in pages:
            tenant = stock.pages.pop(page).tenant
            charges[tenant] = charges.get(tenant, 0) + shape.nbytes
        for tenant, nbytes in charges.items():
            self._charge(tenant, -nbytes)
        self.slabs.put_all(shape, pages)

    def _charge(self, tenant: str, nbytes: int) -> None:
        self.ledger.charge(tenant, nbytes)
        for stock in self.stocks.values():
            stock.victims.refresh(tenant)

    def _hold(self, shape: PageShape, pages: Iterable[int]) -> None:
        """Count the first references to pages."""
        unheld = self.stocks[shape].unheld
        for slab, found in self.grid.by_slab(pages, shape).items():
            self._held[slab] = self._held.get(slab, 0) + len(found)
            unheld.discard(slab)

    def _let_go(self, shape: PageShape, pages: Iterable[int]) -> list[int]:
        """Count the last references to pages no longer, and return their slabs."""
        slabs = self.grid.by_slab(pages, shape)
        for slab, found in slabs.items():
            self._held[slab] -= len(found)
            if not self._held[slab]:
                del self._held[slab]
        return list(slabs)

    def _note_unheld(self, shape: PageShape, slab: int) -> None:
        """Put a slab without referenced pages among the victims, unless it was just returned."""
        if slab not in self.slabs.leases:
            self._ranks.pop(slab, None)
            self.stocks[shape].unheld.discard(slab)
        elif slab not in self._held:
            self.stocks[shape].unheld.put(slab, self._ranks[slab])

    def check_integrity(self, references: Mapping[PageShape, Mapping[int, int]]) -> None:
        """Raise RuntimeError unless every page has just the references that ``references`` counts.

        ``references`` is shape -> page -> count. All other books must agree, too. O(everything).
        """
        self.slabs.check_integrity({shape: stock.pages.keys() for shape, stock in self.stocks.items()})
        check(set(references) <= set(self.stocks), f"references to shapes {set(references) - set(self.stocks)}")
        charges: dict[str, int] = {}
        held: dict[int, int] = {}
        for shape, stock in self.stocks.items():
            _check_stock(shape, stock, references.get(shape, {}))
            for page, record in stock.pages.items():
                charges[record.tenant] = charges.get(record.tenant, 0) + shape.nbytes
                if record.num_references:
                    slab = self.grid.slab_of(page, shape)
                    held[slab] = held.get(slab, 0) + 1
        check(charges == self.ledger.charges, f"tenants have {charges}, are charged {self.ledger.charges}")
        check(held == self._held, f"slabs have {held} referenced pages, {self._held} were counted")
        check(set(self._ranks) <= set(self.slabs.leases), f"slabs {set(self._ranks)} have ranks, not all are lent")
        for shape, stock in self.stocks.items():
            unheld = {slab for slab, lease in self.slabs.leases.items() if lease.shape == shape and slab not in held}
            check(unheld == set(stock.unheld), f"{shape}: slabs {unheld} hold victims only, not {set(stock.unheld)}")


def _check_stock(shape: PageShape, stock: Stock, references: Mapping[int, int]) -> None:
    found = {page: record.num_references for page, record in stock.pages.items() if record.num_references}
    check(found == dict(references), f"{shape}: pages are referred to {dict(references)}, counted {found}")
    cached = {page for page, record in stock.pages.items() if not record.num_references}
    check(cached == set(stock.victims), f"{shape}: {cached} are cached, {set(stock.victims)} may go")
    check(len(cached) == len(stock.victims), f"{shape}: {len(cached)} are cached, counted {len(stock.victims)}")
    named = {record.content: page for page, record in stock.pages.items() if record.content is not None}
    check(named == stock.by_content, f"{shape}: contents {named} are found as {stock.by_content}")
    check(all(stock.pages[page].content for page in cached), f"{shape}: a cached page of {cached} has no content")
