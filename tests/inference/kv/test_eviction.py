"""Which page is evicted first: policies, priorities, tenants' floors, and slabs of other shapes."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.kv.test_kv_cache import COSTS, SMALL, Engine, engine, ok, text
from yafsdp_like.inference.kv.eviction import GDSF, Tenant
from yafsdp_like.inference.kv.kv_cache import (
    KVCache,
    Shortage,
    Tier,
    check_integrity,
)
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.kv.pages import PagePool
from yafsdp_like.inference.kv.prefix import Content, PrefixTree
from yafsdp_like.inference.kv.ranked import Ranked
from yafsdp_like.inference.kv.slabs import PageShape, SlabGrid

if TYPE_CHECKING:
    from collections.abc import Sequence


def filled(e: Engine, num_texts: int, tenants: Sequence[str] = ("",)) -> None:
    """Texts of one page each, at 1000 i, by the tenants in turn."""
    for i in range(num_texts):
        e.close(e.run(text(1000 * i, 4), tenants[i % len(tenants)]))


def cached(e: Engine, num_texts: int) -> list[int]:
    """Which of those texts are cached, without changing anything."""
    tree, pool, (group, *_) = e.cache.tree, e.cache.pools[Tier.DEVICE], e.cache.groups
    known = [list(tree.known(tree.root(), text(1000 * i, 4), 4)) for i in range(num_texts)]
    return [i for i, nodes in enumerate(known) if nodes and pool.find(group.shape, Content(0, nodes[0])) is not None]


def test_lru_evicts_what_was_let_go_longest_ago() -> None:
    e = engine(4)
    filled(e, 4)
    e.close(e.open([*text(0, 4), 7]))
    e.close(e.run(text(9000, 8)))
    assert cached(e, 4) == [0, 3]


def test_gdsf_keeps_what_is_used_often_until_time_has_passed() -> None:
    e = engine(4, policy=GDSF())
    filled(e, 4)
    for _ in range(3):
        e.close(e.open([*text(0, 4), 7]))
    for start in range(1, 4):
        e.close(e.run(text(9000 * start, 4)))
    assert cached(e, 4) == [0]
    for start in range(4, 24):
        e.close(e.run(text(9000 * start, 4)))
    assert cached(e, 4) == []
    ok(e)


def test_gdsf_evicts_first_what_the_host_can_bring_back_sooner() -> None:
    e = engine(4, 4, policy=GDSF())
    filled(e, 3)
    last = e.run(text(3000, 4))
    e.swap(last, out=True)
    e.close(last)
    e.close(e.run(text(9000, 4)))
    assert cached(e, 4) == [0, 1, 2]
    ok(e)


def test_low_priority_goes_first() -> None:
    e = engine(4, tenants=[Tenant("paying", priority=1), Tenant("free")])
    filled(e, 4, ["paying", "free"])
    e.close(e.run(text(9000, 8), "free"))
    assert cached(e, 4) == [0, 2]
    ok(e)


def test_a_tenants_floor_is_left_to_it_and_its_surplus_is_not() -> None:
    e = engine(8, tenants=[Tenant("a", floor_nbytes=2 * 512)])
    filled(e, 4, ["a"])
    e.close(e.run(text(9000, 24), "b"))
    assert e.cache.pools[Tier.DEVICE].ledger.charges == {"a": 1024, "b": 6 * 512}
    assert cached(e, 4) == [2, 3]
    assert isinstance(e.append(e.run(text(8000, 24), "b"), [1]), Shortage)
    ok(e)
    e.close(e.run(text(7000, 8), "a"))
    assert cached(e, 4) == []
    ok(e)


def test_floors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5000 bytes in all, the slabs 4096"):
        engine(8, tenants=[Tenant("a", 2500), Tenant("b", 2500)])


WIDE = PageShape(num_layers=2, num_kv_heads=1, head_dim=32, page_size=4)  # 1024 bytes


def cached_after(texts: Sequence[tuple[PageShape, list[int], str]], *tenants: Tenant) -> tuple[int, int]:
    """Pages of SMALL and of WIDE after these texts, on two slabs that hold four of the one or two of the other."""
    pool = PagePool(SlabGrid(2 * 2048, 2048), tenants=tenants)
    caches = {s: KVCache([LayerGroup(tuple(range(s.num_layers)), s)], COSTS, pool) for s in (SMALL, WIDE)}
    for shape, tokens, tenant in texts:
        cache = caches[shape]
        sequence, _ = cache.open(tokens, tenant)
        assert cache.reserve(sequence, len(tokens)) is None
        cache.commit(sequence, tokens)
        cache.close(sequence)
        check_integrity(caches.values())
    return len(pool.stocks[SMALL].pages), len(pool.stocks[WIDE].pages)


def test_a_slab_of_another_shape_is_taken_when_all_of_it_is_older() -> None:
    small, wide, more = (SMALL, text(0, 16), "a"), (WIDE, text(0, 8), "b"), (WIDE, text(8, 8), "b")
    assert cached_after([small, wide]) == (4, 2)
    assert cached_after([small, wide, more]) == (0, 4)
    assert cached_after([wide, small, more]) == (4, 2)  # its own page is older than any of that slab
    assert cached_after([small, wide, more], Tenant("a", floor_nbytes=2048)) == (4, 2)


def books(pool: PagePool) -> tuple[object, ...]:
    """What is cached, in the order in which it goes, and whose it is."""
    contents = [
        [(stock.pages[page].tenant, stock.pages[page].content) for page in stock.victims]
        for stock in pool.stocks.values()
    ]
    return contents, pool.ledger.charges, pool.num_evicted, pool.used_and_cached_nbytes


@pytest.mark.parametrize("seed", range(8))
def test_many_pages_at_once_are_as_one_after_the_other(seed: int) -> None:
    """Prevents: evictions of many that go past what comes first, or past another tenant's floor."""
    tenants = [Tenant("a", floor_nbytes=4 * 512), Tenant("b", priority=seed % 2), Tenant("c", floor_nbytes=2 * 512)]
    together, apart = (
        PagePool(SlabGrid(6 * 2048, 2048), GDSF() if seed < 4 else None, tenants, {1: 2}) for _ in range(2)
    )
    for shape, pool in itertools.product((SMALL, WIDE), (together, apart)):
        pool.admit(shape)
    draw, held = random.Random(seed), list[tuple[PageShape, list[int], list[int]]]()
    for number in range(200):
        if held and draw.random() < 0.5:
            shape, mine, others = held.pop(draw.randrange(len(held)))
            together.drop_all(shape, mine)
            for page in others:
                apart.drop(shape, page)
        else:
            shape, tenant, count = draw.choice((SMALL, WIDE)), draw.choice("abc"), draw.randrange(1, 9)
            mine = together.take_all(shape, count, tenant)
            others = [page for _ in range(count) if (page := apart.take(shape, tenant)) is not None]
            assert len(mine) == len(others)
            tree, cost = PrefixTree(), draw.random()
            named = [Content(0, prefix) for prefix in tree.extend(tree.root(), [(number, i) for i in range(count)])]
            num_full = draw.randrange(len(mine) + 1)
            for pool, pages in ((together, mine), (apart, others)):
                pool.publish_all(shape, pages[:num_full], named[:num_full], [cost] * num_full)
            held.append((shape, mine, others))
        assert books(together) == books(apart)
    for shape, mine, _ in held:
        together.drop_all(shape, mine)
    together.check_integrity({})
    together.clear()
    assert together.slabs.num_idle == together.grid.num_slabs and together.num_evicted > 50


def test_clear_evicts_all_that_nobody_refers_to() -> None:
    e = engine(8)
    kept = e.run(text(0, 5))
    filled(e, 4)
    e.cache.pools[Tier.DEVICE].clear()
    assert cached(e, 4) == [0] and kept.num_tokens == 5  # the first text is the page that is in use
    ok(e)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 5)), max_size=200))
@settings(max_examples=25, deadline=None)
def test_ranked_items_come_in_order_and_leave_nothing_behind(changes: list[tuple[int, int]]) -> None:
    ranked: Ranked[int] = Ranked()
    naive: dict[int, int] = {}
    for item, rank in changes:
        if rank < 0:
            ranked.discard(item)
            naive.pop(item, None)
        else:
            ranked.put(item, (rank,))
            naive[item] = rank
        assert list(ranked) == sorted(naive, key=lambda item: (naive[item], item))
        assert ranked.first() == next(iter(ranked), None)
        assert len(ranked._heap) <= 2 * len(naive) + 18
