"""The KV cache's books: where pages lie, whose they are, and that no two things are ever in one place.

The last test drives two models over one pair of pools by chance, on a memory that remembers what was written where.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from yafsdp_like.inference.kv.eviction import GDSF, LRU, Costs, Policy, Tenant
from yafsdp_like.inference.kv.kv_cache import Copy, KVCache, Shortage, Tier, check_integrity
from yafsdp_like.inference.kv.kv_sequence import NO_PAGE, KVSequence
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.kv.pages import PagePool
from yafsdp_like.inference.kv.prefix import Content, PrefixTree
from yafsdp_like.inference.kv.slabs import PageShape, SlabGrid
from yafsdp_like.inference.plan.capacity import Capacity

COSTS = Costs(link_nbytes_per_s=50e9, prefill_tokens_per_s=10e3)
SMALL = PageShape(num_layers=1, num_kv_heads=1, head_dim=32, page_size=4)  # 512 bytes
LLAMA = PageShape(num_layers=32, num_kv_heads=8, head_dim=128, page_size=16)  # 2 MiB
# --- a cache, its engine, and a memory that remembers ---

Value = tuple[Hashable, tuple[int, ...]]  # what a token's keys depend on: the group's salt, and all tokens up to it


class Memory:
    """A region in cells of 256 bytes; every cell of a page remembers what was written to each token of that page."""

    def __init__(self, grid: SlabGrid) -> None:
        self.cells: list[tuple[object, dict[int, Value]]] = [(None, {})] * (grid.region_nbytes // 256)

    def cells_of(self, shape: PageShape, page: int) -> range:
        return range(page * shape.nbytes // 256, (page + 1) * shape.nbytes // 256)

    def write(self, shape: PageShape, page: int, values: dict[int, Value]) -> None:
        for cell in self.cells_of(shape, page):
            owner, old = self.cells[cell]
            self.cells[cell] = ((shape, page), {**(old if owner == (shape, page) else {}), **values})

    def read(self, shape: PageShape, page: int) -> dict[int, Value]:
        """The tokens of which every cell of the page remembers the same."""
        found = [self.cells[cell] for cell in self.cells_of(shape, page)]
        whole = all(owner == (shape, page) for owner, _ in found)
        return dict(set.intersection(*(set(values.items()) for _, values in found))) if whole else {}


class Engine:
    """Does what the books say, and knows what every sequence must find."""

    def __init__(self, cache: KVCache, memories: dict[Tier, Memory], name: str = "model") -> None:
        self.cache, self.memories, self.name = cache, memories, name
        self.texts: dict[KVSequence, list[int]] = {}
        self.salts: dict[KVSequence, Hashable] = {}

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            content = self.memories[copy.source_tier].read(copy.shape, copy.source)
            self.memories[copy.destination_tier].write(copy.shape, copy.destination, content)

    def open(self, tokens: Sequence[int], tenant: str = "", salt: Hashable = None) -> KVSequence:
        sequence, copies = self.cache.open(tokens, tenant, salt)
        self.copy(copies)
        self.texts[sequence], self.salts[sequence] = list(tokens[: sequence.num_tokens]), salt
        self.check(sequence)
        return sequence

    def append(self, sequence: KVSequence, tokens: Sequence[int], num_spare: int = 0) -> Shortage | None:
        shortage = self.cache.reserve(sequence, len(tokens) + num_spare)
        if shortage is not None:
            return shortage
        start = len(self.texts[sequence])
        self.texts[sequence] += tokens
        for position in range(start, len(self.texts[sequence])):
            self._write(sequence, position)
        self.cache.commit(sequence, tokens)
        return None

    def _write(self, sequence: KVSequence, position: int) -> None:
        index, slot = divmod(position, self.cache.page_size)
        for number, group in enumerate(self.cache.groups):
            page = sequence.tables[number][index]
            self.memories[Tier.DEVICE].write(group.shape, page, {slot: self.value(sequence, number, position)})

    def value(self, sequence: KVSequence, group: int, position: int) -> Value:
        return (self.name, group, self.salts[sequence]), tuple(self.texts[sequence][: position + 1])

    def run(self, tokens: Sequence[int], tenant: str = "", salt: Hashable = None) -> KVSequence:
        """A sequence with all of ``tokens``."""
        sequence = self.open(tokens, tenant, salt)
        assert self.append(sequence, tokens[sequence.num_tokens :]) is None
        return sequence

    def close(self, sequence: KVSequence) -> None:
        self.cache.close(sequence)
        del self.texts[sequence], self.salts[sequence]

    def swap(self, sequence: KVSequence, out: bool) -> tuple[Copy, ...] | Shortage:
        copies = self.cache.swap_out(sequence) if out else self.cache.swap_in(sequence)
        if not isinstance(copies, Shortage):
            self.copy(copies)
        return copies

    def check(self, sequence: KVSequence) -> None:
        """Every token that the next one reads is where the table says, whole."""
        tier = Tier.HOST if sequence.state.name == "SWAPPED" else Tier.DEVICE
        for number, group in enumerate(self.cache.groups):
            first = 0 if group.window is None else max(0, sequence.num_tokens - group.window + 1)
            for position in range(first, sequence.num_tokens):
                index, slot = divmod(position, self.cache.page_size)
                held = self.memories[tier].read(group.shape, sequence.tables[number][index])
                assert held.get(slot) == self.value(sequence, number, position)


def engine(
    num_pages: int,
    num_host_pages: int = 0,
    window: int | None = None,
    policy: Policy | None = None,
    tenants: Sequence[Tenant] = (),
) -> Engine:
    """One layer of one window, or two layers of which the second has a window; slabs of four pages of four tokens."""
    windows = [None] if window is None else [None, window]
    grids = {Tier.DEVICE: SlabGrid(num_pages * 512, 2048)}
    if num_host_pages:
        grids[Tier.HOST] = SlabGrid(num_host_pages * 512, 2048)
    pools = {tier: PagePool(grid, policy, tenants) for tier, grid in grids.items()}
    cache = KVCache(LayerGroup.of_windows(windows, 1, 32, 4), COSTS, pools[Tier.DEVICE], pools.get(Tier.HOST))
    return Engine(cache, {tier: Memory(grid) for tier, grid in grids.items()})


def text(start: int, num_tokens: int) -> list[int]:
    return list(range(start, start + num_tokens))


def ok(found: Engine) -> None:
    """All books agree, and all sequences find what they wrote."""
    check_integrity([found.cache])
    for sequence in found.texts:
        found.check(sequence)


# --- prefixes ---


def test_a_prefix_is_found_after_its_sequence_has_ended() -> None:
    e = engine(8)
    e.close(e.run(text(0, 10)))
    again = e.open([*text(0, 6), 77, 78, 79])
    assert again.num_tokens == 4
    ok(e)


def test_the_last_token_is_left_to_compute() -> None:
    """Prevents: a request that is cached to its end and has no logits to sample from."""
    e = engine(8)
    e.close(e.run(text(0, 8)))
    assert e.open(text(0, 8)).num_tokens == 4
    assert e.open(text(0, 9)).num_tokens == 8
    ok(e)


def test_texts_below_different_salts_do_not_meet() -> None:
    e = engine(8)
    e.close(e.run(text(0, 9), salt="adapter"))
    assert e.open(text(0, 9)).num_tokens == 0
    assert e.open(text(0, 9), salt="adapter").num_tokens == 8
    ok(e)


def test_tokens_of_equal_hash_do_not_meet() -> None:
    """Prevents: a collision that gives one user another's text."""
    modulus = 2**61 - 1
    assert hash((0, (5, 6, 7, 8))) == hash((0, (5 + modulus, 6, 7, 8)))
    e = engine(8)
    e.close(e.run([5, 6, 7, 8, 9]))
    assert e.open([5 + modulus, 6, 7, 8, 9]).num_tokens == 0
    assert e.open([5, 6, 7, 8, 9]).num_tokens == 4


def test_the_end_of_a_text_goes_before_its_beginning() -> None:
    e = engine(4)
    e.close(e.run(text(0, 16)))
    e.run(text(100, 5))
    assert e.open(text(0, 16)).num_tokens == 8
    ok(e)


def test_a_page_is_found_again_once_its_evicted_parent_was_computed_anew() -> None:
    """Prevents: children that are cached and out of reach until they are evicted."""
    e = engine(8)
    first = e.run(text(0, 9))
    pool, content = e.cache.pools[Tier.DEVICE], Content(0, first.prefixes[0])
    e.close(first)
    page = pool.find(e.cache.groups[0].shape, content)
    assert page is not None
    pool._evict(e.cache.groups[0].shape, [page])
    assert e.open(text(0, 9)).num_tokens == 0
    e.close(e.run(text(0, 5)))
    assert e.open(text(0, 9)).num_tokens == 8
    ok(e)


def test_prefixes_that_nobody_needs_are_forgotten_and_a_long_chain_goes_without_recursion() -> None:
    tree = PrefixTree()
    node = tree.root()
    for token in range(20_000):
        (node,) = tree.extend(node, [(token,)])
    assert len(tree) == 20_001 and node.num_pages == 20_000
    del node
    assert len(tree) == 0


def test_the_same_text_computed_twice_at_once_is_cached_once() -> None:
    e = engine(8)
    one, two = e.open(text(0, 9)), e.open(text(0, 9))
    for sequence in (one, two):
        assert e.append(sequence, text(0, 9)) is None
    ok(e)
    e.close(one)
    e.close(two)
    assert len(e.cache.pools[Tier.DEVICE].stocks[e.cache.groups[0].shape].pages) == 2
    ok(e)


# --- windows ---


def test_a_windowed_group_keeps_the_pages_that_the_next_token_reads() -> None:
    e = engine(24, window=6)
    sequence = e.open(text(0, 30))
    for token in range(30):
        assert e.append(sequence, [token]) is None
        held = [index for index, page in enumerate(sequence.tables[1]) if page != NO_PAGE]
        assert held == sorted({position // 4 for position in range(max(0, token + 1 - 5), token + 1)})
        ok(e)
    assert NO_PAGE not in sequence.tables[0]


def test_a_prefix_counts_only_where_the_window_behind_it_is_cached_too() -> None:
    e = engine(24, window=6)
    sequence = e.run(text(0, 20))
    pool, (full, windowed) = e.cache.pools[Tier.DEVICE], e.cache.groups
    contents = [Content(1, prefix) for prefix in sequence.prefixes]
    e.close(sequence)
    for index in (3, 0):  # the next token after 20 reads pages 3 and 4, after 16 pages 2 and 3, after 12 pages 1 and 2
        page = pool.find(windowed.shape, contents[index])
        assert page is not None
        pool._evict(windowed.shape, [page])
    assert full.shape == windowed.shape
    again = e.open(text(0, 21))
    assert again.num_tokens == 12 and again.tables[1][0] == NO_PAGE
    ok(e)


# --- preemption ---


def test_a_second_swap_copies_only_what_the_host_does_not_have() -> None:
    e = engine(8, 8)
    sequence = e.run(text(0, 10))
    assert e.cache.reserve(sequence, 4) is None
    first = e.swap(sequence, out=True)
    assert not isinstance(first, Shortage) and len(first) == 3
    assert len(sequence.tables[0]) == 3 and sequence.num_reserved == 0
    ok(e)
    assert not isinstance(e.swap(sequence, out=False), Shortage)
    assert e.append(sequence, text(10, 3)) is None
    ok(e)
    second = e.swap(sequence, out=True)
    assert not isinstance(second, Shortage) and len(second) == 2  # the page filled since, and the page that is not full
    ok(e)


def test_swapping_in_shares_what_is_still_on_the_device() -> None:
    e = engine(4, 8)
    sequence = e.run(text(0, 10))
    e.swap(sequence, out=True)
    other = e.run(text(100, 5))  # takes the two free pages
    assert e.swap(sequence, out=False) == Shortage(Tier.DEVICE, SMALL, 1)
    e.close(other)
    back = e.swap(sequence, out=False)
    assert not isinstance(back, Shortage) and len(back) == 1
    ok(e)


def test_a_prefix_that_only_the_host_has_is_brought_back_for_another_request() -> None:
    e = engine(4, 8)
    e.swap(e.run(text(0, 10)), out=True)
    other = e.run(text(100, 16))
    assert e.open(text(0, 10)).num_tokens == 0  # no page may go: a prefix is a help, not a need
    e.close(other)
    again = e.open(text(0, 10))
    assert again.num_tokens == 8
    ok(e)


def test_too_few_pages_is_an_answer_that_changes_nothing() -> None:
    e = engine(4, 4)
    one, two = e.run(text(0, 8)), e.run(text(100, 4))
    short = e.append(two, text(200, 9))
    assert short == Shortage(Tier.DEVICE, SMALL, 3)
    assert (len(two.tables[0]), two.num_reserved, two.num_tokens) == (1, 0, 4)
    ok(e)
    assert isinstance(e.swap(one, out=True), tuple)
    assert e.append(two, text(200, 9)) is None
    assert isinstance(e.swap(two, out=True), Shortage)  # the host holds two pages of four, two needs three
    assert two.state.name == "RESIDENT" and isinstance(e.swap(one, out=False), Shortage)
    ok(e)


def test_protocols_that_are_broken_say_what_was_expected() -> None:
    e = engine(8)
    sequence = e.open([1, 2, 3])
    with pytest.raises(RuntimeError, match="0 places are reserved; call reserve"):
        e.cache.commit(sequence, [1])
    with pytest.raises(RuntimeError, match="needs a host pool"):
        e.cache.swap_out(sequence)
    with pytest.raises(RuntimeError, match="must be SWAPPED here, this one is RESIDENT"):
        e.cache.swap_in(sequence)
    e.close(sequence)
    with pytest.raises(RuntimeError, match="closed already"):
        e.cache.close(sequence)
    with pytest.raises(RuntimeError, match="must be RESIDENT here, this one is CLOSED"):
        e.cache.reserve(sequence, 1)


def test_preemption_goes_the_way_that_the_rates_make_cheaper() -> None:
    group = LayerGroup(tuple(range(32)), LLAMA)
    for link, swaps in ((50e9, True), (1e8, False)):
        pools = [PagePool(SlabGrid(64 << 20, 32 << 20)) for _ in range(2)]
        cache = KVCache([group], Costs(link, prefill_tokens_per_s=20e3), *pools)
        sequence, _ = cache.open(text(0, 65))
        cache.reserve(sequence, 65)
        cache.commit(sequence, text(0, 65))
        assert cache.prefers_swap(sequence) is swaps


def test_what_fits_is_what_can_be_reserved_alone() -> None:
    for window in (None, 6):
        e = engine(16, window=window)
        grid, capacity = e.cache.pools[Tier.DEVICE].grid, Capacity(e.cache.groups, chunk=4)
        most = max(n for n in range(200) if capacity.fits(grid, n))
        sequence = e.open(text(0, most))
        for start in range(0, most, 4):
            assert e.append(sequence, text(start, min(4, most - start))) is None
        assert most >= 48 - 16
        ok(e)


# --- the check itself ---


def leak(e: Engine, sequence: KVSequence) -> None:
    e.cache.pools[Tier.DEVICE].take(SMALL)


def alias(e: Engine, sequence: KVSequence) -> None:
    sequence.tables[0][1] = sequence.tables[0][0]


def double_free(e: Engine, sequence: KVSequence) -> None:
    e.cache.pools[Tier.DEVICE].slabs.leases[0].free.append(sequence.tables[0][0])


def forget_a_charge(e: Engine, sequence: KVSequence) -> None:
    e.cache.pools[Tier.DEVICE].ledger.charge("", -512)


def lose_a_slab(e: Engine, sequence: KVSequence) -> None:
    idle = e.cache.pools[Tier.DEVICE].slabs._idle
    idle.discard(next(iter(idle)))


def keep_a_page_outside_the_window(e: Engine, sequence: KVSequence) -> None:
    sequence.firsts[0] = 1


FAULTS: list[Callable[[Engine, KVSequence], None]] = [
    leak, alias, double_free, forget_a_charge, lose_a_slab, keep_a_page_outside_the_window,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: Callable[[Engine, KVSequence], None]) -> None:
    e = engine(8)
    sequence = e.run(text(0, 9))
    ok(e)
    fault(e, sequence)
    with pytest.raises(RuntimeError, match=r"books of pages are wrong"):
        check_integrity([e.cache])


# --- anything, in any order ---

TENANTS = (Tenant("a", floor_nbytes=1536), Tenant("b", floor_nbytes=1024, priority=1), Tenant("c"))
NAMES = st.sampled_from([tenant.name for tenant in TENANTS])
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Serving(RuleBasedStateMachine):
    """Two models, one hybrid, on one device pool and one host pool.

    After every operation all books agree, every sequence finds what it wrote, and no tenant has less than its floor.
    """

    @initialize(policy=st.sampled_from([LRU, GDSF]), num_slabs=st.integers(2, 6), num_host_slabs=st.integers(1, 4))
    def start(self, policy: type[LRU] | type[GDSF], num_slabs: int, num_host_slabs: int) -> None:
        slab_nbytes = 3072 + 256  # holds a page more or less, by where it begins
        grids = {Tier.DEVICE: SlabGrid(num_slabs * slab_nbytes, slab_nbytes)}
        grids[Tier.HOST] = SlabGrid(num_host_slabs * slab_nbytes, slab_nbytes)
        self.pools = {
            tier: PagePool(grid, policy(), TENANTS if tier is Tier.DEVICE else ()) for tier, grid in grids.items()
        }
        memories = {tier: Memory(grid) for tier, grid in grids.items()}
        hybrid = LayerGroup.of_windows([None, 5, 5], 1, 32, 4)
        plain = LayerGroup.of_windows([None], 2, 96, 2)
        self.engines = [
            Engine(KVCache(groups, COSTS, self.pools[Tier.DEVICE], self.pools[Tier.HOST]), memories, name)
            for groups, name in ((hybrid, "hybrid"), (plain, "plain"))
        ]

    def sequences(self, state: str) -> list[tuple[Engine, KVSequence]]:
        return [(e, sequence) for e in self.engines for sequence in e.texts if sequence.state.name == state]

    def pick(self, state: str, choice: int) -> tuple[Engine, KVSequence]:
        found = self.sequences(state)
        return found[choice % len(found)]

    def guarded(self, tenant: str, operate: Callable[[], object]) -> None:
        """Runs what ``tenant`` asks for; what others lose by it is above their floors."""
        ledger = self.pools[Tier.DEVICE].ledger
        before = dict(ledger.charges)
        operate()
        for name, nbytes in before.items():
            now = ledger.charges.get(name, 0)
            assert name == tenant or now >= min(nbytes, ledger.tenant(name).floor_nbytes)

    @rule(model=st.integers(0, 1), tokens=TOKENS, tenant=NAMES, salt=st.sampled_from([None, None, None, "salt"]))
    def arrive(self, model: int, tokens: list[int], tenant: str, salt: str | None) -> None:
        e = self.engines[model]
        device_only = longest_prefix(e, tokens, salt, (Tier.DEVICE,))
        best = longest_prefix(e, tokens, salt, (Tier.DEVICE, Tier.HOST))

        def operate() -> None:
            sequence = e.open(tokens, tenant, salt)
            assert sequence.num_tokens in (device_only, best)
            e.append(sequence, tokens[sequence.num_tokens :])

        self.guarded(tenant, operate)

    @precondition(lambda self: self.sequences("RESIDENT"))
    @rule(choice=st.integers(0, 99), tokens=TOKENS, num_spare=st.integers(0, 5))
    def append(self, choice: int, tokens: list[int], num_spare: int) -> None:
        e, sequence = self.pick("RESIDENT", choice)
        (shape, *others), pool = (group.shape for group in e.cache.groups), self.pools[Tier.DEVICE]
        own = [page.tenant == sequence.tenant and not page.num_references for page in pool.stocks[shape].pages.values()]
        num_sure = pool.slabs.num_free(shape) + sum(own)

        def operate() -> None:
            short = e.append(sequence, tokens, num_spare)
            assert short is None or others or short.num_wanted > num_sure

        self.guarded(sequence.tenant, operate)

    @precondition(lambda self: self.sequences("RESIDENT"))
    @rule(choice=st.integers(0, 99))
    def close(self, choice: int) -> None:
        e, sequence = self.pick("RESIDENT", choice)
        self.guarded(sequence.tenant, lambda: e.close(sequence))

    @precondition(lambda self: self.sequences("RESIDENT"))
    @rule(choice=st.integers(0, 99))
    def swap_out(self, choice: int) -> None:
        e, sequence = self.pick("RESIDENT", choice)
        self.guarded(sequence.tenant, lambda: e.swap(sequence, out=True))

    @precondition(lambda self: self.sequences("SWAPPED"))
    @rule(choice=st.integers(0, 99), cancelled=st.booleans())
    def swap_in(self, choice: int, cancelled: bool) -> None:
        e, sequence = self.pick("SWAPPED", choice)
        self.guarded(sequence.tenant, lambda: e.close(sequence) if cancelled else e.swap(sequence, out=False))

    @rule(choice=st.integers(0, 99))
    def claim_a_slab(self, choice: int) -> None:
        """As weights do, or give it back; a page that is referred to stays."""
        pool = self.pools[Tier.DEVICE]
        slab = choice % pool.grid.num_slabs
        written, held = pool.slabs.num_written[slab], pool.is_held(slab)
        if slab in pool.slabs.claimed:
            pool.slabs.returned(slab)
        elif pool.claim(slab):
            assert not held and pool.slabs.num_written[slab] == written + 1
        else:
            assert held

    @invariant()
    def all_is_well(self) -> None:
        for e in getattr(self, "engines", []):
            for sequence in e.texts:
                e.check(sequence)
        check_integrity([e.cache for e in getattr(self, "engines", [])])

    def teardown(self) -> None:
        for e in getattr(self, "engines", []):
            for sequence in list(e.texts):
                e.close(sequence)
        self.all_is_well()
        for pool in getattr(self, "pools", {}).values():
            for slab in list(pool.slabs.claimed):
                pool.slabs.returned(slab)
            pool.clear()
            assert pool.slabs.num_idle == pool.grid.num_slabs and not pool.ledger.charges


def longest_prefix(e: Engine, tokens: Sequence[int], salt: Hashable, tiers: Sequence[Tier]) -> int:
    """How many tokens are cached, found by reading all cached pages rather than by the index."""
    held = {value for tier in tiers for value in last_values(e, tier)}
    size, best = e.cache.page_size, 0
    for num_pages in range(1, (len(tokens) - 1) // size + 1):
        best = num_pages if all(
            ((e.name, number, salt), tuple(tokens[: (index + 1) * size])) in held
            for number, group in enumerate(e.cache.groups)
            for index in range(group.first_page(num_pages * size), num_pages)
        ) else best  # fmt: skip
    return best * size


def last_values(e: Engine, tier: Tier) -> Iterator[Value]:
    """What the last token of each page that has content says of itself."""
    for shape, stock in e.cache.pools[tier].stocks.items():
        for page, record in stock.pages.items():
            if record.content is not None:
                yield e.memories[tier].read(shape, page)[shape.page_size - 1]


Serving.TestCase.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestServing = Serving.TestCase


def test_ten_thousand_requests_leave_the_books_as_they_were() -> None:
    """Prevents: heaps, nodes or counters that grow with requests rather than with pages."""
    e = engine(16)
    chance = random.Random(0)
    for _ in range(10_000):
        sequence, _ = e.cache.open([chance.randrange(3) for _ in range(9)])
        if e.cache.reserve(sequence, 5) is None:
            e.cache.commit(sequence, [chance.randrange(3) for _ in range(5)])
        e.cache.close(sequence)
    check_integrity([e.cache])
    del sequence
    pool = e.cache.pools[Tier.DEVICE]
    assert len(e.cache.tree) <= 1 + 16 * 4 and not e.cache.sequences
    pool.clear()
    assert len(e.cache.tree) == 0 and not pool.ledger.charges and pool.slabs.num_idle == 4
