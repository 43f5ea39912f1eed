"""Which pages hold the keys and values of which tokens: page tables of many sequences over a device and a host tier.

Integers only. What has to be copied is handed out as a list of ``Copy``, and the engine copies.

[Note: order of copies]
Copies are to be made in the order in which they are handed out, after all forwards that were scheduled before and
ahead of all that are scheduled after. Then a page may be given to somebody else as soon as its copy is handed out, and
content may be found by others before its copy is done.

[Note: windows]
A model's layers are split into groups of one window each, a group has a shape and page tables of its own, and all
groups have pages of equally many tokens. In a group with a window of ``w`` keys, its own included, the next token at
position ``n`` reads positions from ``n - w + 1`` on: pages before ``(n - w + 1) // page_size`` are dropped. So a prefix
of ``n`` tokens is cached if each group still has its pages from that one on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from yafsdp_like.inference.kv.kv_sequence import NO_PAGE, KVSequence, KVSequenceState
from yafsdp_like.inference.kv.prefix import Content, Prefix, PrefixTree
from yafsdp_like.inference.kv.slabs import ceil_div, check

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from yafsdp_like.inference.kv.eviction import Costs
    from yafsdp_like.inference.kv.layer_groups import LayerGroup
    from yafsdp_like.inference.kv.pages import PagePool
    from yafsdp_like.inference.kv.slabs import PageShape


class Tier(Enum):
    """Which memory pages lie in."""

    DEVICE = auto()
    HOST = auto()


@dataclass(frozen=True)
class Copy:
    """Copy all of page ``source`` to page ``destination``, which is on the other tier."""

    shape: PageShape
    source_tier: Tier
    source: int
    destination_tier: Tier
    destination: int


@dataclass(frozen=True)
class Shortage:
    """A tier has too few pages that are free or may go. Nothing was changed but what was evicted in the attempt."""

    tier: Tier
    shape: PageShape
    num_wanted: int


class WantedPage(NamedTuple):
    """What should be in a page that a table wants, if it is full, and the page of the other tier that has it."""

    content: Content | None
    source: int


class KVCache:
    """The sequences of one model on a device pool and, if there is one, a host pool; pools may be other models' too.

    Work is O(pages touched), each at the price of ``PagePool``; a token that fills no page and needs none is O(groups).
    """

    def __init__(
        self, groups: Sequence[LayerGroup], costs: Costs, device: PagePool, host: PagePool | None = None
    ) -> None:
        sizes = {group.shape.page_size for group in groups}
        if len(sizes) != 1:
            raise ValueError(f"all groups of layers need pages of equally many tokens, found {sorted(sizes)}")
        (self.page_size,) = sizes
        self.groups = tuple(groups)
        self._windowed = [(index, group) for index, group in enumerate(groups) if group.window is not None]
        self.costs = costs
        self.pools = {Tier.DEVICE: device} if host is None else {Tier.DEVICE: device, Tier.HOST: host}
        self.tree = PrefixTree()
        self.sequences: set[KVSequence] = set()
        for pool in self.pools.values():
            for group in groups:
                pool.admit(group.shape)

    # --- what a sequence goes through ---

    def open(
        self, tokens: Sequence[int], tenant: str = "", salt: Hashable = None
    ) -> tuple[KVSequence, tuple[Copy, ...]]:
        """Open a sequence that begins with the longest cached prefix of ``tokens``.

        The last token is left to be computed. Copies are of pages that only the host has.
        """
        root = self.tree.root(salt)
        known = list(self.tree.known(root, tokens[:-1], self.page_size))
        sequence = self._empty(tenant, root)
        for tiers in (tuple(self.pools), (Tier.DEVICE,)):
            copies = self._adopt(sequence, known[: self._num_cached(known, tiers)])
            if not isinstance(copies, Shortage):
                break
        assert not isinstance(copies, Shortage), f"pages on the device were found, and are not there: {copies}"
        self.sequences.add(sequence)
        return sequence, copies

    def reserve(self, sequence: KVSequence, num_tokens: int) -> Shortage | None:
        """Reserve pages for the next ``num_tokens`` tokens, and for more up to the end of the last page.

        To be called before the forward that writes them. Returns None, or the shortage of pages that prevents it.
        """
        self._require(sequence, KVSequenceState.RESIDENT)
        if num_tokens <= sequence.num_reserved:
            return None
        end = ceil_div(sequence.num_tokens + num_tokens, self.page_size)
        taken = self._take(Tier.DEVICE, sequence.tenant, [max(0, end - len(table)) for table in sequence.tables])
        if isinstance(taken, Shortage):
            return taken
        for table, pages in zip(sequence.tables, taken, strict=True):
            table.extend(pages)
        sequence.num_reserved = end * self.page_size - sequence.num_tokens
        return None

    def commit(self, sequence: KVSequence, tokens: Sequence[int]) -> None:
        """Commit tokens of one sequence as ``commit_all`` does."""
        self.commit_all([(sequence, tokens)])

    def commit_all(self, written: Iterable[tuple[KVSequence, Sequence[int]]]) -> None:
        """Record that keys and values of each one's tokens are written, or will be before what is scheduled later.

        Full pages can be found from now on; pages that left a window are dropped.
        """
        for sequence, tokens in written:
            if sequence.state is not KVSequenceState.RESIDENT:
                self._require(sequence, KVSequenceState.RESIDENT)
            count, tail = len(tokens), sequence.tail
            if count > sequence.num_reserved:
                raise RuntimeError(
                    f"commit of {count} tokens behind {sequence.num_tokens}: {sequence.num_reserved} places are "
                    "reserved; call reserve() before the forward that writes them"
                )
            sequence.num_reserved -= count
            sequence.num_tokens += count
            tail += tokens
            if len(tail) >= self.page_size:
                self._publish_tail(sequence)
            if self._windowed:
                self._drop_outside_windows(sequence)

    def close(self, sequence: KVSequence) -> None:
        """Drop all pages of a sequence, the last first, so that the end of a text is evicted before its beginning.

        Full pages stay cached until their bytes are wanted. Preemption by recompute is this, and ``open`` with the same
        tokens later.
        """
        if sequence.state is KVSequenceState.CLOSED:
            raise RuntimeError("close of a sequence that is closed already")
        self._drop_pages(sequence)
        sequence.state = KVSequenceState.CLOSED
        self.sequences.remove(sequence)

    # --- preemption by swapping ---

    def swap_out(self, sequence: KVSequence) -> tuple[Copy, ...] | Shortage:
        """Move a sequence to the host; reserved pages are dropped.

        Copies are of what the host does not have yet.
        """
        self._require(sequence, KVSequenceState.RESIDENT)
        if Tier.HOST not in self.pools:
            raise RuntimeError(
                "swap_out needs a host pool, this cache has none; close() the sequence and open() it again"
            )
        copies = self._move(sequence, Tier.HOST)
        if not isinstance(copies, Shortage):
            sequence.state = KVSequenceState.SWAPPED
        return copies

    def swap_in(self, sequence: KVSequence) -> tuple[Copy, ...] | Shortage:
        """Move a sequence back to the device; the host keeps full pages, cached.

        Copies are of what is no longer on the device.
        """
        self._require(sequence, KVSequenceState.SWAPPED)
        copies = self._move(sequence, Tier.DEVICE)
        if not isinstance(copies, Shortage):
            sequence.state = KVSequenceState.RESIDENT
        return copies

    def prefers_swap(self, sequence: KVSequence) -> bool:
        """Whether moving a sequence out and back takes less time than computing it again, by the costs given."""
        self._require(sequence, KVSequenceState.RESIDENT)
        if Tier.HOST not in self.pools:
            return False
        back = out = 0
        for group, wanted in enumerate(self._written(sequence)):
            nbytes = self.groups[group].shape.nbytes
            back += nbytes * len(wanted)
            out += nbytes * self._find(Tier.HOST, group, [want.content for want in wanted]).count(None)
        return self.costs.copy_s(out + back) < self.costs.recompute_s(sequence.num_tokens)

    # --- pages of a sequence ---

    def _empty(self, tenant: str, root: Prefix) -> KVSequence:
        return KVSequence(tenant, root, tuple([] for _ in self.groups), [0] * len(self.groups))

    def _pool(self, sequence: KVSequence) -> PagePool:
        return self.pools[Tier.DEVICE if sequence.state is KVSequenceState.RESIDENT else Tier.HOST]

    def _pages(self, sequence: KVSequence) -> Iterator[tuple[int, int, int]]:
        """Yield (group, index, page) of all that the tables hold, first to last."""
        for group, table in enumerate(sequence.tables):
            for index in range(sequence.firsts[group], len(table)):
                yield group, index, table[index]

    def _written(self, sequence: KVSequence) -> list[list[WantedPage]]:
        """Return, per group, the pages that hold tokens and what is in them, as the other tier may want them."""
        return [
            [
                WantedPage(sequence.content(group, index), table[index])
                for index in range(sequence.firsts[group], sequence.num_pages)
            ]
            for group, table in enumerate(sequence.tables)
        ]

    def _drop_pages(self, sequence: KVSequence) -> None:
        """Drop all that the tables hold, the last pages of all groups first."""
        pool, firsts = self._pool(sequence), sequence.firsts
        held = [
            (-index, group, page, self.groups[group].shape)
            for group, table in enumerate(sequence.tables)
            for index, page in enumerate(table[firsts[group] :], firsts[group])
        ]
        for shape, found in groupby(sorted(held), itemgetter(3)):
            pool.drop_all(shape, [page for _, _, page, _ in found])

    def _find(self, tier: Tier, group: int, contents: Sequence[Content | None]) -> list[int | None]:
        """Return which page of a tier holds what, if any does."""
        if tier not in self.pools:
            return [None] * len(contents)
        return self.pools[tier].find_all(self.groups[group].shape, contents)

    def _take(self, tier: Tier, tenant: str, counts: Sequence[int]) -> list[list[int]] | Shortage:
        """Take so many pages for each group, all or none; what is plainly too much evicts nothing."""
        pool = self.pools[tier]
        taken: list[list[int]] = [[] for _ in self.groups]
        for group, count in enumerate(counts):
            if not count:
                continue
            shape = self.groups[group].shape
            if count <= pool.num_available(shape):
                taken[group] = pool.take_all(shape, count, tenant)
            if len(taken[group]) < count:
                for other, pages in zip(self.groups, taken, strict=True):
                    pool.drop_all(other.shape, pages)
                return Shortage(tier, shape, count)
        return taken

    def _publish_tail(self, sequence: KVSequence) -> None:
        """Publish the pages that the tail of a sequence fills; the rest of it remains."""
        size, tail, first = self.page_size, sequence.tail, len(sequence.prefixes)
        num_full = len(tail) // size * size
        texts = [tuple(tail[start : start + size]) for start in range(0, num_full, size)]
        del tail[:num_full]
        prefixes = self.tree.extend(sequence.prefixes[-1] if first else sequence.root, texts)
        sequence.prefixes += prefixes
        for group, table in enumerate(sequence.tables):
            contents = [Content(group, prefix) for prefix in prefixes]
            self._publish(Tier.DEVICE, group, table[first : first + len(contents)], contents)

    def _publish(self, tier: Tier, group: int, pages: Sequence[int], contents: Sequence[Content]) -> None:
        """Publish pages; content that the host has too costs a copy, if that is less than computing it."""
        shape, cost = self.groups[group].shape, self.costs.recompute_s(self.page_size)
        costs = [cost] * len(pages)
        if tier is Tier.DEVICE and Tier.HOST in self.pools:
            copied = min(cost, self.costs.copy_s(shape.nbytes))
            costs = [cost if page is None else copied for page in self._find(Tier.HOST, group, contents)]
        self.pools[tier].publish_all(shape, pages, contents, costs)

    def _drop_outside_windows(self, sequence: KVSequence) -> None:
        for group, layers in self._windowed:
            first = layers.first_page(sequence.num_tokens)
            before, table = sequence.firsts[group], sequence.tables[group]
            if first > before:
                self.pools[Tier.DEVICE].drop_all(layers.shape, table[before:first])
                table[before:first] = [NO_PAGE] * (first - before)
                sequence.firsts[group] = first

    # --- content from where it is to where it is wanted ---

    def _num_cached(self, prefixes: Sequence[Prefix], tiers: Sequence[Tier]) -> int:
        """Return the most pages n such that every group has what it reads of the first n, on one of ``tiers``."""
        runs = [self._runs_cached(group, prefixes, tiers) for group in range(len(self.groups))]
        for num_pages in range(len(prefixes), 0, -1):
            firsts = [group.first_page(num_pages * self.page_size) for group in self.groups]
            if all(run[num_pages - 1] >= num_pages - first for run, first in zip(runs, firsts, strict=True)):
                return num_pages
        return 0

    def _runs_cached(self, group: int, prefixes: Sequence[Prefix], tiers: Sequence[Tier]) -> list[int]:
        """Return for each prefix how many pages up to its last one are cached without a gap."""
        contents = [Content(group, prefix) for prefix in prefixes]
        is_cached = [False] * len(contents)
        for tier in tiers:
            found = self._find(tier, group, contents)
            is_cached = [page is not None or before for page, before in zip(found, is_cached, strict=True)]
        return list(accumulate(is_cached, lambda run, is_there: (run + 1) * is_there, initial=0))[1:]

    def _adopt(self, sequence: KVSequence, prefixes: Sequence[Prefix]) -> tuple[Copy, ...] | Shortage:
        """Fill an empty sequence with cached prefixes: refer to the device's pages, copy the rest from the host."""
        num_tokens = len(prefixes) * self.page_size
        firsts = [group.first_page(num_tokens) for group in self.groups]
        wanted = []
        for group, first in enumerate(firsts):
            contents = [Content(group, prefix) for prefix in prefixes[first:]]
            sources = self._find(Tier.HOST, group, contents)
            wanted.append([WantedPage(c, NO_PAGE if s is None else s) for c, s in zip(contents, sources, strict=True)])
        acquired = self._acquire(wanted, Tier.DEVICE, sequence.tenant)
        if isinstance(acquired, Shortage):
            return acquired
        sequence.prefixes, sequence.firsts, sequence.num_tokens = list(prefixes), firsts, num_tokens
        pages, copies = acquired
        for table, first, found in zip(sequence.tables, firsts, pages, strict=True):
            table[:] = [NO_PAGE] * first + found
        return copies

    def _move(self, sequence: KVSequence, tier: Tier) -> tuple[Copy, ...] | Shortage:
        """Acquire the sequence's pages on ``tier`` from the other one; the caller changes the state."""
        wanted = self._written(sequence)
        acquired = self._acquire(wanted, tier, sequence.tenant)
        if isinstance(acquired, Shortage):
            return acquired
        if tier is Tier.HOST:
            for group, moved in enumerate(wanted):  # cheaper to bring back now
                full = [(want.source, want.content) for want in moved if want.content is not None]
                self._publish(Tier.DEVICE, group, [page for page, _ in full], [content for _, content in full])
        self._drop_pages(sequence)
        sequence.num_reserved = 0
        pages, copies = acquired
        for table, first, found in zip(sequence.tables, sequence.firsts, pages, strict=True):
            table[first:] = found
        return copies

    def _acquire(
        self, wanted: Sequence[Sequence[WantedPage]], tier: Tier, tenant: str
    ) -> tuple[list[list[int]], tuple[Copy, ...]] | Shortage:
        """Acquire a page on ``tier`` for each that a group wants, all or none, with the copies that fill new ones.

        Pages that are there get their reference before any is taken, since taking evicts.
        """
        pool, other = self.pools[tier], Tier.HOST if tier is Tier.DEVICE else Tier.DEVICE
        found = [self._find(tier, group, [want.content for want in wants]) for group, wants in enumerate(wanted)]
        for group, pages in zip(self.groups, found, strict=True):
            pool.add_references(group.shape, [page for page in pages if page is not None])
        taken = self._take(tier, tenant, [pages.count(None) for pages in found])
        if isinstance(taken, Shortage):
            for group, pages in zip(self.groups, found, strict=True):
                pool.drop_all(group.shape, [page for page in pages if page is not None])
            return taken
        acquired, copies = list[list[int]](), list[Copy]()
        for index, (wants, pages) in enumerate(zip(wanted, found, strict=True)):
            shape, new = self.groups[index].shape, iter(taken[index])
            acquired.append([next(new) if page is None else page for page in pages])
            absent = [
                (want, page) for want, page, before in zip(wants, acquired[-1], pages, strict=True) if before is None
            ]
            copies += [Copy(shape, other, want.source, tier, page) for want, page in absent]
            full = [(page, want.content) for want, page in absent if want.content is not None]
            self._publish(tier, index, [page for page, _ in full], [content for _, content in full])
        return acquired, tuple(copies)

    # --- faults ---

    def _require(self, sequence: KVSequence, state: KVSequenceState) -> None:
        if sequence.state is not state:
            raise RuntimeError(f"a sequence must be {state.name} here, this one is {sequence.state.name}")

    def references(self) -> dict[Tier, dict[PageShape, Counter[int]]]:
        """Count how often each page stands in a table."""
        found: dict[Tier, dict[PageShape, Counter[int]]] = {tier: {} for tier in self.pools}
        for sequence in self.sequences:
            tier = Tier.DEVICE if sequence.state is KVSequenceState.RESIDENT else Tier.HOST
            for group, _, page in self._pages(sequence):
                found[tier].setdefault(self.groups[group].shape, Counter())[page] += 1
        return found

    def check_tables(self) -> None:
        """Raise RuntimeError unless every table has just the pages that its sequence needs, with its content."""
        for sequence in self.sequences:
            full = len(sequence.prefixes) * self.page_size
            pages = [prefix.num_pages for prefix in sequence.prefixes]
            check(
                full + len(sequence.tail) == sequence.num_tokens, f"{sequence.num_tokens} tokens: {full} in full pages"
            )
            check(pages == list(range(1, len(pages) + 1)), f"prefixes of {pages} pages")
            check(len(sequence.tail) < self.page_size, f"{len(sequence.tail)} tokens in a page that is not full")
            for group, table in enumerate(sequence.tables):
                first = self.groups[group].first_page(sequence.num_tokens)
                gone = [index for index, page in enumerate(table) if page == NO_PAGE]
                check(sequence.firsts[group] == first, f"first page {sequence.firsts[group]}, expected {first}")
                check(gone == list(range(first)), f"no pages at {gone}, expected up to {first}")
                num_places = len(table) * self.page_size - sequence.num_tokens
                check(
                    num_places >= sequence.num_reserved >= 0, f"{num_places} places, {sequence.num_reserved} reserved"
                )
            for group, index, page in self._pages(sequence):
                held = self._pool(sequence).content(self.groups[group].shape, page)
                expected = sequence.content(group, index)
                check(held in (None, expected) or expected is None, f"page {page} is {expected}, holds {held}")


def check_integrity(caches: Iterable[KVCache]) -> None:
    """Raise RuntimeError unless every page of the pools is free, cached or referred to, and only one of them.

    ``caches`` must be all that use these pools. O(everything): for tests, and for when the scheduler is idle.
    """
    counted: dict[PagePool, dict[PageShape, Counter[int]]] = {}
    for cache in caches:
        cache.check_tables()
        for tier, shapes in cache.references().items():
            counts = counted.setdefault(cache.pools[tier], {})
            for shape, pages in shapes.items():
                counts.setdefault(shape, Counter()).update(pages)
    for pool, counts in counted.items():
        pool.check_integrity(counts)
