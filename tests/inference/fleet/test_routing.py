"""To which replica a request goes: the order of views, how many there should be, and what a router remembers."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yafsdp_like.inference.fleet.router import BLOCK, LOST_AFTER, MAX_BLOCKS, FleetRouter, blocks_of
from yafsdp_like.inference.fleet.routing import GATHER, ReplicaView, ranked, wanted_replicas
from yafsdp_like.inference.fleet.standing import ModelStanding, Standing

if TYPE_CHECKING:
    from random import Random

VIEWS = st.builds(
    ReplicaView,
    st.sampled_from([0.0, 0.99, 1.0, 1.5, 1.6]),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 2.0, math.inf]),
    st.sampled_from([0.0, 0.05, 3.0]),
    st.integers(0, 3),
)


def test_a_request_goes_where_its_model_is_at_work_then_where_it_is_awake_then_where_time_is() -> None:
    idle, busy = ReplicaView(0.1, wake_s=0.5), ReplicaView(0.6, wake_s=0.5)
    at_work, awake, full = ReplicaView(1.5, has_model=True), ReplicaView(0.5), ReplicaView(1.6, has_model=True)
    assert ranked([busy, idle, full, awake, at_work]) == [4, 3, 1, 0, 2]
    assert ranked([ReplicaView(1.0), full]) == [1, 0] and ranked([full, ReplicaView(0.9)]) == [1, 0]
    assert ranked([idle, idle]) == [0, 1] and ranked([]) == []


def test_nearest_to_awake_is_first_and_a_cached_prompt_counts_as_much_as_the_time_it_saves() -> None:
    near, far, absent = (ReplicaView(0.2, wake_s=s) for s in (0.1, 0.4, math.inf))
    assert ranked([far, absent, near]) == [2, 0]
    assert ranked([replace(far, saved_s=0.35), near]) == [0, 1], "0.05 s are less than 0.1"
    assert ranked([replace(far, saved_s=0.25), near]) == [1, 0]


@settings(deadline=None)
@given(st.lists(VIEWS, max_size=6), st.randoms())
def test_the_best_replica_can_serve_and_no_other_is_better_in_all_and_the_order_of_views_does_not_matter(
    views: list[ReplicaView], random: Random
) -> None:
    order = ranked(views)
    assert sorted(order) == [index for index, view in enumerate(views) if view.wake_s < math.inf]
    if order:
        best = views[order[0]]
        for other in (views[index] for index in order):
            has_time = [view.load < 1.0 + GATHER * view.has_model for view in (best, other)]
            assert has_time[0] or not has_time[1]
            if has_time[0] != has_time[1]:
                continue
            pairs = (
                (other.has_model, best.has_model),
                (best.wake_s - best.saved_s, other.wake_s - other.saved_s),
                (best.load, other.load),
                (best.num_requests, other.num_requests),
            )
            assert any(mine > its for its, mine in pairs) or all(mine == its for its, mine in pairs)
    shuffled = list(range(len(views)))
    random.shuffle(shuffled)
    again = ranked([views[index] for index in shuffled])
    assert [views[shuffled[index]] for index in again] == [views[index] for index in order]


LOADS = st.lists(st.floats(0, 3), max_size=12)


@settings(deadline=None)
@given(LOADS, st.integers(0, 3))
def test_replicas_that_are_wanted_once_are_wanted_still_when_they_are_there(loads: list[float], refused: int) -> None:
    """Load spreads evenly over what is there: adding or taking away replicas calls for no further change."""
    wanted = wanted_replicas(loads)
    settled = [math.fsum(loads) / wanted] * wanted
    assert wanted >= 1 and wanted_replicas(settled) == wanted
    assert wanted_replicas(loads, refused) >= (max(wanted, len(loads) + 1) if refused else wanted)
    assert wanted_replicas([*loads, 1.0], refused) >= wanted, "more load never takes replicas away"


def test_replicas_follow_the_load() -> None:
    assert [wanted_replicas(loads) for loads in ([], [0.0], [0.7], [0.9], [1.8], [0.7, 0.7])] == [1, 1, 1, 2, 3, 2]
    assert wanted_replicas([0.1, 0.1, 0.1]) == 1 and wanted_replicas([0.5, 0.5, 0.5]) == 3
    assert wanted_replicas([0.1, 0.1], num_refused=1) == 3
    with pytest.raises(ValueError, match="0 < aim < high"):
        wanted_replicas([1.0], aim=0.9, high=0.8)


# --- what a router remembers ---


def standing(number: int, load: float = 0.0, arrived: int = 0, **num_requests: int) -> Standing:
    models = {name: ModelStanding(count, 0.0 if count else 0.5, 1e-3, 0.25) for name, count in num_requests.items()}
    return Standing(load, models, {"alias": "a"}, number, {"me": arrived})


def test_what_was_sent_counts_until_a_report_counts_it() -> None:
    router = FleetRouter()
    for replica in ("x", "y"):
        router.heard(replica, standing(1, a=0, b=0))
    assert router.order(["x", "y"], "a", ()) == [0, 1]
    router.sent("y", "alias", (), "me", 7)
    assert router.order(["x", "y"], "a", ()) == [1, 0], "the model is at work there from now on"
    assert router.view("y", "a", ()) == ReplicaView(0.25, True, 0.5, 0.0, 1)
    router.heard("y", standing(2, a=0, b=0, arrived=6))
    assert router.view("y", "a", ()).has_model, "it was made before the request arrived"
    router.heard("y", standing(3, 0.25, a=1, b=0, arrived=7))
    assert router.view("y", "a", ()) == ReplicaView(0.25, True, 0.0, 0.0, 1), "it counts once"
    router.heard("y", standing(4, a=0, b=0, arrived=7))
    assert not router.view("y", "a", ()).has_model
    for number in range(8, 15):
        router.sent("y", "a", (), "me", number)
    assert router.order(["x", "y"], "a", ()) == [0, 1], "requests that are on their way fill it"


def test_a_report_that_was_made_before_a_request_arrived_does_not_send_another_model_after_it() -> None:
    """Two models sleep in two replicas. It did: the first model's request no longer counted once the report came."""
    router = FleetRouter()
    for replica in ("x", "y"):
        router.heard(replica, standing(1, a=0, b=0))
    router.sent("x", "a", (), "me", 1)
    router.heard("x", standing(2, a=0, b=0))
    assert router.order(["x", "y"], "b", ()) == [1, 0]


def test_a_request_that_is_counted_before_its_way_is_noted_counts_once() -> None:
    router = FleetRouter()
    router.heard("x", standing(1, 0.25, a=1, arrived=3))
    router.sent("x", "a", (), "me", 3)
    assert router.view("x", "a", ()).num_requests == 1


def test_requests_that_never_arrive_are_passed_by_the_next_one_or_by_time() -> None:
    """Of two senders: what one sends says nothing of the other's."""
    router = FleetRouter()
    router.heard("x", standing(5, a=0))
    router.sent("x", "a", (), "me", 1)
    router.sent("x", "a", (), "other", 9)
    assert router.view("x", "a", ()).num_requests == 2
    router.heard("x", standing(6, a=0, arrived=2))  # it arrived after 1, which does not come
    assert router.view("x", "a", ()).num_requests == 1
    router.heard("x", standing(5 + LOST_AFTER, a=0, arrived=2))
    assert router.view("x", "a", ()).num_requests == 1, "reports in between may be lost"
    router.heard("x", standing(6 + LOST_AFTER, a=0, arrived=2))
    assert router.view("x", "a", ()) == ReplicaView(0.0, False, 0.5, 0.0, 0)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["send", "arrive", "lose", "report", "hear"]), st.integers(0, 2)), max_size=LOST_AFTER
    )
)
def test_a_router_counts_what_is_on_its_way_and_nothing_twice_and_nothing_for_good(
    events: list[tuple[str, int]],
) -> None:
    """Requests of three senders reach a replica in the order of each, or not at all; reports reach the router, or not.

    Arrived requests never end here, so that a view that misses one, or has one twice, is seen.
    """
    router, sent, num_here = FleetRouter(), [deque[int]() for _ in range(3)], 0
    arrived, numbers = dict[str, int](), [count(1) for _ in range(3)]
    reports = [Standing(0.0, {"a": ModelStanding(0, 0.5, 1e-3, 0.25)}, number=1)]
    router.heard("x", reports[-1])
    for event, index in [*events, ("report", 0), ("hear", 0)]:
        name = str(index)
        if event == "send":
            sent[index].append(next(numbers[index]))
            router.sent("x", "a", (), name, sent[index][-1])
        elif event in ("arrive", "lose") and sent[index]:
            number = sent[index].popleft()
            if event == "arrive":
                arrived[name] = number
                num_here += 1
        elif event == "report":
            models = {"a": ModelStanding(num_here, 0.5, 1e-3, 0.25)}
            reports.append(Standing(num_here / 4, models, number=len(reports) + 1, arrived=dict(arrived)))
        elif event == "hear":
            router.heard("x", reports[-1])
            on_their_way = sum(map(len, sent))
            assert router.view("x", "a", ()).num_requests >= reports[-1].models["a"].num_requests + on_their_way
    for index, own in enumerate(numbers):  # each sender's next request arrives
        arrived[str(index)] = next(own)
        router.sent("x", "a", (), str(index), arrived[str(index)])
    models = {"a": ModelStanding(num_here + 3, 0.5, 1e-3, 0.25)}
    router.heard("x", Standing(0.0, models, number=len(reports) + 1, arrived=dict(arrived)))
    assert router.view("x", "a", ()).num_requests == num_here + 3


def test_a_standing_counts_requests_that_are_not_in_the_queues_yet() -> None:
    found = standing(1, 0.25, a=1, b=0).with_at_least({"alias": 1, "a": 1, "b": 1, "unknown": 5})
    assert found.load == 0.75 and {name: each.num_requests for name, each in found.models.items()} == {"a": 2, "b": 1}
    assert standing(1, 1.0, a=4).with_at_least({"a": 1}) == standing(1, 1.0, a=4), "one may be several in the queues"


def test_a_model_that_no_replica_is_known_to_have_goes_where_time_is() -> None:
    router = FleetRouter()
    router.heard("x", standing(1, 0.5, a=1))
    router.heard("y", standing(1, 0.1, b=1))
    assert router.order(["x", "y"], "unknown", ()) == [1, 0]
    assert router.order(["x", "y"], "b", ()) == [1]
    router.keep(["x"])
    assert router.order(["x", "y"], "b", ()) == [1], "one that has not reported may have it"


def test_a_prompt_goes_where_its_beginning_went_unless_another_replica_is_much_nearer_to_awake() -> None:
    router, text = FleetRouter(), bytes(range(256)) * 8
    for replica in ("x", "y"):
        router.heard(replica, standing(1, a=1, b=0))
    router.sent("y", "a", blocks_of("a", text), "me", 1)
    other = text[: 4 * BLOCK] + b"another end" * 200
    assert router.order(["x", "y"], "a", blocks_of("a", other)) == [1, 0]
    assert router.view("y", "a", blocks_of("a", other)).saved_s == pytest.approx(4 * BLOCK / 4 * 1e-3)
    assert router.view("y", "b", blocks_of("b", text)).saved_s == 0.0, "another model's pages are others"
    assert router.view("y", "a", blocks_of("a", b"x" + text)).saved_s == 0.0


def test_a_router_forgets_the_beginnings_that_were_sent_longest_ago() -> None:
    router = FleetRouter(most_blocks=4)
    router.heard("x", standing(1, a=1))
    texts = [blocks_of("a", bytes([index]) * 2 * BLOCK) for index in range(3)]
    for number, blocks in enumerate(texts, 1):
        router.sent("x", "a", blocks, "me", number)
    assert [router.view("x", "a", blocks).saved_s > 0 for blocks in texts] == [False, True, True]
    assert len(blocks_of("a", b"." * BLOCK * (MAX_BLOCKS + 5))) == MAX_BLOCKS
    assert blocks_of("a", b"." * (BLOCK - 1)) == ()
