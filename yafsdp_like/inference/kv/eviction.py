"""What goes first when memory is short: policies, the tenants' floors, and the order of victims.

A victim is a page that nobody refers to and that keeps its content until its bytes are wanted. Lower priority goes
first, and within one priority what the policy ranks lowest. A tenant is charged for the pages it took until they are
free, wherever they are used; while evicting a page would leave it less than its floor, the page is a victim for the
tenant itself only. What it has beyond its floor is borrowed, and a victim for everybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from yafsdp_like.inference.kv.ranked import Rank, Ranked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Policy(Protocol):
    """Ranks pages when they become victims; lowest goes first, the longest-known of equals before others."""

    def rank(self, tick: int, num_uses: int, nbytes: int, cost: float) -> float:
        """Return the rank of a page that has become a victim.

        ``tick`` says when, counted in pages let go, ``num_uses`` how often it was taken or found again, and ``cost``
        how many seconds it takes to bring the content back.
        """

    def evicted(self, rank: float) -> None:
        """Note that a page of this rank was evicted."""


class LRU:
    """The page whose last reference went first."""

    def rank(self, tick: int, num_uses: int, nbytes: int, cost: float) -> float:
        """Return when the last reference went."""
        return tick

    def evicted(self, rank: float) -> None:
        """Do nothing: ranks do not depend on it."""


class GDSF:
    """Greedy dual size frequency: uses times cost to bring back, per byte freed.

    Ranks count from a clock that follows the ranks evicted, so that what was used much long ago goes in the end.
    Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (1998).
    """

    def __init__(self) -> None:
        self.clock = 0.0

    def rank(self, tick: int, num_uses: int, nbytes: int, cost: float) -> float:
        """Return the clock plus what the page is worth per byte."""
        return self.clock + num_uses * cost / nbytes

    def evicted(self, rank: float) -> None:
        """Advance the clock to this rank."""
        self.clock = max(self.clock, rank)


@dataclass(frozen=True)
class Costs:
    """What it takes to bring content back on this machine, as measured."""

    link_nbytes_per_s: float  # between pinned host memory and the device, one way
    prefill_tokens_per_s: float

    def __post_init__(self) -> None:
        if not (self.link_nbytes_per_s > 0 and self.prefill_tokens_per_s > 0):
            raise ValueError(f"rates must be above 0, found {self}")

    def copy_s(self, nbytes: int) -> float:
        """Return the seconds that one copy takes."""
        return nbytes / self.link_nbytes_per_s

    def recompute_s(self, num_tokens: int) -> float:
        """Return the seconds that computing so many tokens takes."""
        return num_tokens / self.prefill_tokens_per_s


@dataclass(frozen=True)
class Tenant:
    """Somebody whose pages are counted."""

    name: str
    floor_nbytes: int = 0  # what others leave of its pages
    priority: int = 0  # the lowest is evicted first

    def __post_init__(self) -> None:
        if self.floor_nbytes < 0:
            raise ValueError(f"tenant {self.name!r}: a floor must be at least 0 bytes, found {self.floor_nbytes}")


class Ledger:
    """What each tenant is charged for, in bytes. A tenant that nobody announced has no floor and priority 0."""

    def __init__(self, tenants: Iterable[Tenant], capacity_nbytes: int) -> None:
        self._tenants: dict[str, Tenant] = {}
        for tenant in tenants:
            if tenant.name in self._tenants:
                raise ValueError(f"tenant {tenant.name!r} is given twice")
            self._tenants[tenant.name] = tenant
        floors = sum(tenant.floor_nbytes for tenant in self._tenants.values())
        if floors > capacity_nbytes:
            raise ValueError(f"the tenants' floors are {floors} bytes in all, the slabs {capacity_nbytes}")
        self.charges: dict[str, int] = {}  # those that are not 0

    def tenant(self, name: str) -> Tenant:
        """Return the tenant of this name; one that was not announced has no floor and priority 0."""
        return self._tenants.get(name) or Tenant(name)

    def charge(self, name: str, nbytes: int) -> None:
        """Charge ``nbytes`` more, or fewer if negative."""
        charged = self.charges.get(name, 0) + nbytes
        assert charged >= 0, f"tenant {name!r} would be charged {charged} bytes"
        if charged:
            self.charges[name] = charged
        else:
            self.charges.pop(name, None)

    def surplus_nbytes(self, name: str) -> int:
        """Return what others may take of the tenant's bytes; negative below its floor."""
        return self.charges.get(name, 0) - self.tenant(name).floor_nbytes


class Victims:
    """The victims of one shape. Every operation is O(log n) amortised, in pages and in tenants."""

    def __init__(self, ledger: Ledger, page_nbytes: int) -> None:
        self._ledger = ledger
        self._page_nbytes = page_nbytes
        self._pages: dict[str, Ranked[int]] = {}  # tenant -> its victims, if it has any
        self._open: Ranked[str] = Ranked()  # tenants that others may take from, by their first victim
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (page for pages in self._pages.values() for page in pages)

    def put_all(self, ranked: Sequence[tuple[int, Rank]], tenant: str) -> None:
        """Add pages of ``tenant`` as victims."""
        pages = self._pages.get(tenant)
        if pages is None:
            pages = self._pages[tenant] = Ranked()
        pages.put_all(ranked)
        self._count += len(ranked)
        self.refresh(tenant)

    def remove_all(self, removed: Sequence[int], tenant: str) -> list[Rank]:
        """Remove victims of one tenant, and return their ranks."""
        pages = self._pages[tenant]
        ranks = [pages.rank(page) for page in removed]
        pages.remove_all(removed)
        self._removed(tenant, len(removed))
        return ranks

    def pop_all(self, tenant: str, count: int, bound: Rank | None) -> tuple[str, list[tuple[int, Rank]]]:
        """Remove up to ``count`` victims that pages of ``tenant`` evict first, all of one tenant: who, and which.

        Ranks are below ``bound``, if there is one. There are none only if none may go; others may follow of the same or
        of another tenant.
        """
        own, other = self._first_rank(tenant), self._open.first()
        if other is not None and other != tenant and (own is None or self._open.rank(other) < own):
            owner, count = other, min(count, self._ledger.surplus_nbytes(other) // self._page_nbytes)
        else:
            owner, own = tenant, None
        if owner not in self._pages:
            return owner, []
        self._open.discard(owner)
        rival = self._open.first()
        bounds = [rank for rank in (bound, own, None if rival is None else self._open.rank(rival)) if rank is not None]
        popped = self._pages[owner].pop_below(min(bounds, default=None), count)
        self._removed(owner, len(popped))
        return owner, popped

    def _removed(self, tenant: str, count: int) -> None:
        if not self._pages[tenant]:
            del self._pages[tenant]
        self._count -= count
        self.refresh(tenant)

    def refresh(self, tenant: str) -> None:
        """Update the order after the tenant's charge has changed."""
        if tenant not in self._pages and tenant not in self._open:  # as while nothing is cached
            return
        first = self._first_rank(tenant)
        if first is None or self._ledger.surplus_nbytes(tenant) < self._page_nbytes:
            self._open.discard(tenant)
        else:
            self._open.put(tenant, first)

    def _first_rank(self, tenant: str) -> Rank | None:
        """Return the rank of the tenant's first victim."""
        pages = self._pages.get(tenant)
        page = None if pages is None else pages.first()
        return None if pages is None or page is None else pages.rank(page)
