"""Who runs next, in literal lists: names, first positions and numbers of tokens. No tensor, no model."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from yafsdp_like.inference.engine.batch import ActiveRequest, Batch, RequestStatus
from yafsdp_like.inference.engine.request import FinishReason, QueueFullError, Request
from yafsdp_like.inference.engine.scheduler import Scheduler
from yafsdp_like.inference.kv.eviction import Costs, Tenant
from yafsdp_like.inference.kv.kv_cache import KVCache, Tier, check_integrity
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.kv.pages import PagePool
from yafsdp_like.inference.kv.slabs import PageShape, SlabGrid
from yafsdp_like.inference.options import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_SIZE = 4
SHAPE = PageShape(num_layers=1, num_kv_heads=1, head_dim=32, page_size=PAGE_SIZE)  # 512 bytes
SWAPPING = Costs(link_nbytes_per_s=1e15, prefill_tokens_per_s=1.0)
RECOMPUTING = Costs(link_nbytes_per_s=1.0, prefill_tokens_per_s=1e15)


def pool(num_pages: int, tenants: Sequence[Tenant] = ()) -> PagePool:
    return PagePool(SlabGrid(num_pages * SHAPE.nbytes, SHAPE.nbytes), tenants=tenants)


def scheduler(
    num_pages: int,
    size: int = 4,
    tokens: int = 16,
    *,
    costs: Costs = SWAPPING,
    host_pages: int = 64,
    window: int | None = None,
    tenants: Sequence[Tenant] = (),
    max_waiting: int = 100,
) -> Scheduler:
    cache = KVCache([LayerGroup((0,), SHAPE, window)], costs, pool(num_pages, tenants), pool(host_pages))
    return Scheduler(cache, EngineOptions(max_batch_size=size, max_batch_tokens=tokens, max_waiting=max_waiting))


def add(to: Scheduler, name: str, num_prompt: int, max_tokens: int = 100, **more: object) -> ActiveRequest:
    """A request whose prompt is like no other's."""
    base = 1000 * (1 + to._num_added)
    return to.add(Request(name, tuple(range(base, base + num_prompt)), max_tokens=max_tokens, **more), None)  # type: ignore[arg-type]


def runs(batch: Batch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(run.sequence.request.id, run.start, run.num_tokens) for run in batch.runs]


def read(of: Scheduler, batch: Batch | None, token: int = 7) -> None:
    assert batch is not None
    for run in batch.runs:
        if run.draws and run.sequence.status is not RequestStatus.ENDED:
            of.read([run], [token])


def schedule(of: Scheduler) -> Batch | None:
    batch = of.schedule()
    if batch is not None:
        of.launched(batch)
    return batch


def step(of: Scheduler) -> list[tuple[str, int, int]]:
    batch = schedule(of)
    read(of, batch)
    return runs(batch)


# --- a step ---


def test_everybody_who_draws_has_a_token_and_prompts_have_the_rest_in_chunks() -> None:
    it = scheduler(num_pages=100)
    add(it, "a", 3)
    assert step(it) == [("a", 0, 3)]
    add(it, "b", 40)
    add(it, "c", 2)
    assert step(it) == [("a", 3, 1), ("b", 0, 15)]
    assert step(it) == [("a", 4, 1), ("b", 15, 15)]
    assert step(it) == [("a", 5, 1), ("b", 30, 10), ("c", 0, 2)]
    assert step(it) == [("a", 6, 1), ("b", 40, 1), ("c", 2, 1)]
    assert it.counts.num_chunks == 2


def test_those_that_draw_never_wait_for_a_prompt_before_them() -> None:
    it = scheduler(num_pages=100, tokens=4)
    add(it, "long", 20)
    assert step(it) == [("long", 0, 4)]
    it.options = EngineOptions(max_batch_size=4, max_batch_tokens=8)
    add(it, "short", 2)
    assert step(it) == [("long", 4, 8)]
    assert step(it) == [("long", 12, 8)]
    assert step(it) == [("long", 20, 1), ("short", 0, 2)]
    add(it, "late", 30, priority=1)
    assert step(it) == [("long", 21, 1), ("short", 2, 1), ("late", 0, 6)]
    assert step(it) == [("long", 22, 1), ("short", 3, 1), ("late", 6, 6)]


def test_no_more_run_than_a_batch_holds_and_the_next_comes_when_one_ends() -> None:
    it = scheduler(num_pages=100, size=2)
    for name in "abc":
        add(it, name, 2, max_tokens=2)
    assert step(it) == [("a", 0, 2), ("b", 0, 2)]
    assert step(it) == [("a", 2, 1), ("b", 2, 1)]
    assert step(it) == [("c", 0, 2)]


def test_who_has_drawn_its_last_token_is_not_computed_again() -> None:
    it = scheduler(num_pages=100)
    one = add(it, "a", 2, max_tokens=1)
    batch = schedule(it)
    assert runs(batch) == [("a", 0, 2)]
    assert runs(schedule(it)) == []
    assert batch is not None and it.read(batch.runs[:1], [5]) == [FinishReason.LENGTH]
    assert one.status is RequestStatus.ENDED and not it.running


def test_a_stop_token_ends_a_sequence_and_is_one_of_its_tokens() -> None:
    it = scheduler(num_pages=100)
    sequence = add(it, "a", 2, stop_tokens=frozenset({5}))
    batch = schedule(it)
    assert batch is not None and it.read(batch.runs[:1], [5]) == [FinishReason.STOP]
    assert sequence.tokens[-1] == 5 and it.cache.sequences == set()


def test_sequences_keep_their_rows_while_others_come_and_go() -> None:
    it = scheduler(num_pages=100)
    add(it, "a", 2, max_tokens=2)
    b = add(it, "b", 2)
    add(it, "c", 2)
    assert step(it) == [("a", 0, 2), ("b", 0, 2), ("c", 0, 2)]
    assert step(it) == [("a", 2, 1), ("b", 2, 1), ("c", 2, 1)]
    assert step(it) == [("c", 3, 1), ("b", 3, 1)]
    add(it, "d", 2)
    assert step(it) == [("c", 4, 1), ("b", 4, 1), ("d", 0, 2)]
    it.end(b)
    assert step(it) == [("c", 5, 1), ("d", 2, 1)]


# --- steps ahead of their tokens ---


def test_a_step_is_scheduled_before_the_tokens_of_the_one_before_are_read() -> None:
    it = scheduler(num_pages=100)
    add(it, "a", 3)
    first, second = schedule(it), schedule(it)
    assert first is not None and second is not None
    assert (runs(first), runs(second)) == ([("a", 0, 3)], [("a", 3, 1)])
    assert [run.is_pending for run in (*first.runs, *second.runs)] == [False, True]
    read(it, first, 11)
    third = schedule(it)
    read(it, second, 12)
    assert runs(third) == [("a", 4, 1)] and it.running[0].tokens[3:] == [11, 12]
    check_integrity([it.cache])


def test_nobody_is_preempted_before_its_tokens_are_read() -> None:
    """Prevents: a sequence that is computed again without the token that was drawn last."""
    it = scheduler(num_pages=5, costs=RECOMPUTING)
    add(it, "a", 7)
    add(it, "b", 7)
    first = schedule(it)
    assert runs(first) == [("a", 0, 7), ("b", 0, 7)]
    second = schedule(it)
    assert runs(second) == [("a", 7, 1), ("b", 7, 1)]
    read(it, first)
    assert schedule(it) is None
    read(it, second)
    assert step(it) == [("a", 8, 1)]
    assert it.counts.num_recomputed == 1 and [sequence.request.id for sequence in it.waiting] == ["b"]


# --- pages are short ---


def test_the_last_in_rank_makes_room_and_comes_back_where_it_was() -> None:
    it = scheduler(num_pages=5)
    add(it, "a", 7, max_tokens=3)
    add(it, "b", 7)
    assert step(it) == [("a", 0, 7), ("b", 0, 7)]
    assert step(it) == [("a", 7, 1), ("b", 7, 1)]
    batch = schedule(it)
    assert batch is not None and runs(batch) == [("a", 8, 1)]
    out = [(copy.source_tier, copy.destination_tier) for copy in batch.copies]
    assert out == [(Tier.DEVICE, Tier.HOST)] * 2 and it.waiting[0].is_swapped
    read(it, batch)
    batch = schedule(it)
    assert batch is not None and runs(batch) == [("b", 8, 1)]
    assert [copy.destination_tier for copy in batch.copies] in ([], [Tier.DEVICE], [Tier.DEVICE] * 2)
    assert (it.counts.num_swapped_out, it.counts.num_recomputed) == (1, 0)


def test_recomputing_is_taken_where_it_is_cheaper_and_where_the_host_is_full() -> None:
    for costs, host_pages in ((RECOMPUTING, 64), (SWAPPING, 1)):
        it = scheduler(num_pages=5, costs=costs, host_pages=host_pages)
        add(it, "a", 7, max_tokens=3)
        add(it, "b", 7)
        for _ in range(3):
            step(it)
        assert (it.counts.num_swapped_out, it.counts.num_recomputed) == (0, 1)
        ((name, start, num_tokens),) = step(it)
        assert (name, start + num_tokens) == ("b", 9)


def test_a_prompt_waits_until_its_pages_and_one_more_of_everybody_are_free() -> None:
    it = scheduler(num_pages=8)
    add(it, "a", 11, max_tokens=8)
    assert step(it) == [("a", 0, 11)]
    add(it, "b", 16)
    for start in range(11, 18):
        assert step(it) == [("a", start, 1)]
    assert step(it) == [("b", 0, 16)]
    assert it.counts.num_recomputed == it.counts.num_swapped_out == 0


def test_what_found_no_room_is_looked_at_again_only_when_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a long prompt that is searched for in the cache in every step that it waits."""
    it, opened = scheduler(num_pages=16), list[int]()
    plain = it.cache.open

    def counted(tokens: Sequence[int], *more: object) -> object:
        opened.append(len(tokens))
        return plain(tokens, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(it.cache, "open", counted)
    add(it, "a", 30, max_tokens=20)
    add(it, "long", 40)
    for _ in range(10):
        step(it)
    assert opened == [30, 40]
    it.end(it.running[0])
    assert step(it) == [("long", 0, 16)] and opened == [30, 40, 40]


def test_higher_priority_goes_first_and_takes_the_place_of_a_lower_one() -> None:
    it = scheduler(num_pages=100, size=1)
    add(it, "low", 2)
    assert step(it) == [("low", 0, 2)]
    add(it, "same", 2)
    assert step(it) == [("low", 2, 1)]
    add(it, "high", 2, max_tokens=1, priority=1)
    assert step(it) == [("high", 0, 2)]
    assert step(it) == [("low", 3, 1)]


def test_floors_of_tenants_who_are_away_do_not_stop_a_sequence_that_was_promised_room() -> None:
    """Prevents: a sequence alone that finds no page and waits for ever."""
    floor = Tenant("away", floor_nbytes=6 * SHAPE.nbytes)
    it = scheduler(num_pages=8, tenants=[floor])
    add(it, "theirs", 16, max_tokens=8, tenant="away")
    while it.running or it.waiting:
        step(it)
    add(it, "a", 16, max_tokens=12, tenant="here")
    while it.running or it.waiting:
        assert step(it)
    assert it.counts.num_tokens_drawn == 20


# --- the queue ---


def test_more_than_may_wait_are_refused() -> None:
    it = scheduler(num_pages=100, max_waiting=2)
    add(it, "a", 2)
    add(it, "b", 2)
    with pytest.raises(QueueFullError, match="2 requests wait, of 2"):
        add(it, "c", 2)
    step(it)
    add(it, "c", 2)


def test_deadlines_are_told_once_and_only_of_those_that_have_not_ended() -> None:
    it = scheduler(num_pages=100)
    early, late = add(it, "early", 2, deadline=1.0), add(it, "late", 2, deadline=2.0)
    gone = add(it, "gone", 2, deadline=1.0)
    it.end(gone)
    assert list(it.deadlines.expired(0.5)) == []
    assert list(it.deadlines.expired(1.0)) == [early]
    assert list(it.deadlines.expired(3.0)) == [late]


def test_sequences_that_ended_are_not_kept_until_their_deadlines() -> None:
    """Prevents: a server that holds every prompt for as long as its client would have waited."""
    it = scheduler(num_pages=100)
    for i in range(20):
        sequence = add(it, str(i), 2, max_tokens=1, deadline=1e9)
        assert step(it) == [(str(i), 0, 2)] and sequence.status is RequestStatus.ENDED
    assert len(it.deadlines._heap) <= 2
    last = add(it, "last", 2, deadline=1e9)
    assert list(it.deadlines.expired(2e9)) == [last]


# --- by chance ---


@pytest.mark.parametrize("seed", range(8))
def test_by_chance_every_token_is_computed_once_between_preemptions_and_nothing_is_left(seed: int) -> None:
    draw = random.Random(seed)
    it = scheduler(
        num_pages=draw.randint(8, 9),
        tokens=draw.choice([4, 8, 16]),
        costs=draw.choice([SWAPPING, RECOMPUTING]),
        host_pages=draw.choice([4, 64]),
        window=draw.choice([None, 12]),
        tenants=[Tenant("floor", draw.choice([0, 4]) * SHAPE.nbytes)],
    )
    unread: Batch | None = None
    reach: dict[ActiveRequest, tuple[int, int]] = {}  # admission, and tokens computed since
    ended: list[ActiveRequest] = []
    sequences: list[ActiveRequest] = []
    while len(sequences) < 60 or it.running or it.waiting:
        if len(sequences) < 60 and draw.random() < 0.4:
            more = {
                "priority": draw.randint(0, 1),
                "max_tokens": draw.randint(1, 8),
                "tenant": draw.choice(["", "floor"]),
            }
            sequences.append(add(it, str(len(sequences)), draw.randint(1, 23), **more))
        if it.running and draw.random() < 0.05:
            it.end(draw.choice(it.running))
        batch = schedule(it)
        if batch is None:
            read(it, unread)
            unread, batch = None, it.schedule()
        assert batch is not None and batch.num_tokens <= it.options.max_batch_tokens
        assert len(batch.runs) <= it.options.max_batch_size
        for run in batch.runs:
            admission, computed = reach.get(run.sequence, (0, 0))
            assert run.start == computed or run.sequence.num_admitted > admission
            assert not run.is_pending or run.num_tokens == 1
            reach[run.sequence] = run.sequence.num_admitted, run.end
        if unread is not None:
            read(it, unread, draw.randint(0, 3))
        unread = batch
        it.check_integrity()
        check_integrity([it.cache])
        ended += [
            sequence for sequence in sequences if sequence.status is RequestStatus.ENDED and sequence not in ended
        ]
    assert len(ended) == 60 and it.cache.sequences == set()
    assert it.counts.num_swapped_out + it.counts.num_recomputed > 0
