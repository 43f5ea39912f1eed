"""A request's life in an engine: how it ends, when it is cancelled or late, and what is refused."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.inference.engine.test_engine import (
    GREEDY,
    MAX_STEPS,
    OPTIONS,
    RECOMPUTING,
    SWAPPING,
    TINY,
    VOCAB_SIZE,
    check_idle,
    engine,
    expected,
    pages_nbytes,
    prompts,
    requests,
)
from yafsdp_like.inference.engine.request import FinishReason, QueueFullError, Request
from yafsdp_like.inference.kv.kv_cache import Tier

if TYPE_CHECKING:
    from yafsdp_like.inference.kv.eviction import Costs


@pytest.mark.parametrize("lookahead", [True, False])
def test_a_stop_token_is_the_last_that_is_told(lookahead: bool) -> None:
    it = engine(lookahead=lookahead)
    by_text = {text: expected(TINY, text) for text in prompts(8)}
    text, tokens = max(by_text.items(), key=lambda found: len(set(found[1])))
    stop = list(dict.fromkeys(tokens))[2]  # the third token that is new
    (request,) = requests([text], stop_tokens=frozenset({stop}))
    done = it.generate([request])["0"]
    assert (done.ids, done.finish) == (tokens[: tokens.index(stop) + 1], FinishReason.STOP)
    assert it.metrics().num_tokens_dropped == lookahead
    check_idle(it)


def test_events_come_token_by_token_and_the_last_says_why() -> None:
    it, text = engine(), prompts(1)[0]
    it.add(Request("a", text, GREEDY, max_tokens=3))
    outputs = [output for _ in range(20) if it.has_work for output in it.step()]
    assert [token.id for output in outputs for token in output.tokens] == expected(TINY, text, 3)
    assert [output.finish for output in outputs] == [None, None, FinishReason.LENGTH]


def test_a_step_is_launched_before_the_one_before_is_read() -> None:
    it = engine()
    it.add(Request("a", (1, 2, 3), GREEDY, max_tokens=4))
    assert it.step() == [] and it._unread is not None
    assert len(it.step()) == 1 and it.metrics().num_steps == 2


def test_what_is_cancelled_ends_with_the_next_step_wherever_it_is() -> None:
    it = engine(kv_nbytes=pages_nbytes(TINY, 16), max_batch_size=2)
    for i, text in enumerate(prompts(4, longest=22)):
        it.add(Request(str(i), text, GREEDY, max_tokens=30))
    for _ in range(6):
        it.step()
    for name in ("0", "3", "0", "nobody"):
        it.cancel(name)
    outputs = it.step()
    assert [e.request_id for e in outputs if e.finish is FinishReason.CANCELLED] == ["0", "3"]
    it.cancel("0")
    it.add(Request("0", (1, 2), GREEDY, max_tokens=1))
    rest = [output for _ in range(MAX_STEPS) if it.has_work for output in it.step()]
    assert {e.request_id: e.finish for e in rest if e.finish} == dict.fromkeys("012", FinishReason.LENGTH)
    check_idle(it)


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits() -> None:
    it = engine(max_batch_size=1)
    now = time.monotonic()
    it.add(Request("runs", (1, 2, 3), GREEDY, max_tokens=40, deadline=now + 0.5))
    it.add(Request("waits", (1, 2, 3), GREEDY, max_tokens=40, deadline=now + 0.5))
    first = [output for _ in range(3) for output in it.step()]
    assert first and all(output.finish is None for output in first)
    time.sleep(max(0.0, now + 0.55 - time.monotonic()))
    outputs = it.step()
    assert {e.request_id: e.finish for e in outputs if e.finish} == dict.fromkeys(
        ["runs", "waits"], FinishReason.DEADLINE
    )
    it.step()
    check_idle(it)


# --- what is refused ---


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": (1, VOCAB_SIZE)}, "token 97 is outside of the vocabulary of 97 tokens"),
        ({"prompt": (-1,)}, "token -1 is outside"),
        ({"prompt": (1,) * 60, "max_tokens": 5}, "60 tokens of prompt and max_tokens 5 are more than max_seq_len 64"),
        ({"prompt": ()}, "at least one token"),
        ({"prompt": (1,), "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"prompt": (1,), "num_logprobs": 21}, "num_logprobs must be between 0 and 20"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(request_: dict[str, Any], message: str) -> None:
    it = engine()
    with pytest.raises(ValueError, match=message):
        it.add(Request("a", **request_))
    check_idle(it)


def test_an_id_in_use_and_more_than_may_wait_are_refused() -> None:
    it = engine(max_waiting=2)
    it.add(Request("a", (1,)))
    with pytest.raises(ValueError, match="the id is in use"):
        it.add(Request("a", (2,)))
    it.add(Request("b", (1,)))
    with pytest.raises(QueueFullError):
        it.add(Request("c", (1,)))
    it.generate([])
    assert len(it.generate(requests(prompts(9)))) == 9


def test_where_one_of_many_is_refused_none_is_served() -> None:
    """Prevents: requests that stay behind in an engine whose caller was told of an error."""
    it = engine()
    for wrong in (Request("b", (VOCAB_SIZE,)), Request("a", (1,))):
        with pytest.raises(ValueError, match=r"vocabulary|different ids"):
            it.generate([Request("a", (1,)), wrong])
        check_idle(it)


def test_options_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(ValueError, match="policy must be one of lru, gdsf"):
        replace(OPTIONS, policy="fifo")
    with pytest.raises(ValueError, match="max_waiting"):
        replace(OPTIONS, max_waiting=0)


@pytest.mark.parametrize("costs", [SWAPPING, RECOMPUTING])
def test_an_engine_that_is_suspended_between_any_two_steps_draws_the_same_tokens(costs: Costs) -> None:
    """As when another model needs the memory: with nothing referred to on the device meanwhile."""
    texts = prompts(4, longest=22)
    it, drawn = engine(costs=costs), dict[str, list[int]]()
    for request in requests(texts, max_tokens=8):
        it.add(request)
    num_held = 0
    while it.has_work:
        outputs = it.step()
        num_held += it.metrics().kv_nbytes_used > 0
        outputs += it.suspend()
        assert it.metrics().kv_nbytes_used == 0
        it.check_integrity()
        for output in outputs:
            drawn[output.request_id] = [*drawn.get(output.request_id, []), *(token.id for token in output.tokens)]
    assert drawn == {str(i): expected(TINY, text, 8) for i, text in enumerate(texts)}
    assert num_held > 8 and (it.metrics().num_swapped_out > 8) is (costs is SWAPPING)


def test_only_sequences_with_pages_in_the_slabs_that_are_wanted_are_suspended() -> None:
    it = engine(max_batch_tokens=32)
    for request in requests(prompts(3, longest=12), max_tokens=20):
        it.add(request)
    for _ in range(6):
        it.step()
    pool = it.cache.pools[Tier.DEVICE]
    held = [slab for slab in range(pool.grid.num_slabs) if pool.is_held(slab)]
    assert it.metrics().num_running == 3
    it.suspend(held[-1:])
    assert 0 < it.metrics().num_running < 3 and not pool.is_held(held[-1]) and pool.is_held(held[0])
    it.check_integrity()
