"""All that a request may ask for, in one batch, with arrivals, ends and preemptions at any step: the same tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.inference.engine.test_engine import (
    ARCHITECTURES,
    GREEDY,
    PENALIZED,
    RECOMPUTING,
    SWAPPING,
    VOCAB_SIZE,
    check_idle,
    engine,
    ids,
    pages_nbytes,
    prompts,
)
from tests.inference.engine.test_late_masks import make_late
from tests.inference.engine.test_limits import OddAfterEven
from tests.inference.engine.test_speculation import SAMPLED, speculating
from yafsdp_like.inference.engine.request import Completion, Request, RequestOutput, TokenLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.inference.engine.engine import Engine

REPEATING = replace(PENALIZED, repetition_penalty=0.7, frequency_penalty=-0.2)  # which draws tokens again and again
LIMITS = (None, None, TokenLimits(grammar=OddAfterEven()), TokenLimits(biases=((3, 4.0),)), TokenLimits(min_tokens=5))


def random_requests(draw: random.Random, count: int) -> list[Request]:
    return [
        Request(
            str(number),
            text,
            draw.choice((GREEDY, SAMPLED, PENALIZED, PENALIZED, REPEATING)),
            max_tokens=draw.randint(3, 18),
            limits=draw.choice(LIMITS),
            stop_tokens=frozenset(draw.sample(range(VOCAB_SIZE), 3)),
            priority=draw.choice((0, 0, 1)),
        )
        for number, text in enumerate(prompts(count, longest=24, seed=draw.randrange(1000)))
    ]


def check_histories(it: Engine) -> None:
    """Each row of the history is free or one sequence's."""
    histories = it._runner._staging.histories
    held = [row for each in histories._held.values() for row in each.rows.values()]
    assert sorted(held + histories._free) == [*range(len(histories._history))]


def serve(it: Engine, asked: list[Request], draw: random.Random) -> tuple[dict[str, list[int]], set[str]]:
    """Serve requests that come, are cancelled and are preempted at random; return tokens, and who was cancelled."""
    left, told, cancelled = asked[::-1], list[RequestOutput](), set[str]()
    while left or it.has_work:
        while left and (not it.has_work or draw.random() < 0.35):
            it.add(left.pop())
        if it._sequences and draw.random() < 0.06:
            name = draw.choice(sorted(it._sequences))
            cancelled.add(name)
            it.cancel(name)
        if draw.random() < 0.05:
            told += it.suspend()
        told += it.step()
        check_histories(it)
    found = {each.id: Completion.of([one for one in told if one.request_id == each.id]).ids for each in asked}
    return found, cancelled


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 30))])
def test_tokens_are_those_of_an_engine_without_all_that(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drafts, late masks, preemptions, a prefix cache, and steps that are launched ahead."""
    draw = random.Random(seed)
    config = ARCHITECTURES[draw.choice(("grouped queries", "windows", "windows in one layer of three"))]
    asked = random_requests(draw, 9)
    answers = ids(engine(config, kv_nbytes=1 << 20, lookahead=False, prefix_cache=False).generate(asked))
    make_late(monkeypatch, seed)
    it = speculating(
        answers,
        config,
        kv_nbytes=pages_nbytes(config, 26),
        costs=draw.choice((SWAPPING, RECOMPUTING)),
        lookahead=draw.random() < 0.6,
        max_batch_size=draw.choice((4, 6)),
    )
    found, cancelled = serve(it, asked, draw)
    for name, answer in answers.items():
        assert found[name] == (answer[: len(found[name])] if name in cancelled else answer)
    metrics = it.metrics()
    assert 0 < metrics.num_tokens_accepted < metrics.num_tokens_drafted
    check_idle(it)


KINDS = (  # of drawing, which share nothing
    GREEDY,
    replace(SAMPLED, temperature=3.0, top_k=0, top_p=1.0, min_p=0.0, seed=1),
    replace(SAMPLED, temperature=0.7, top_k=2, seed=2),
    PENALIZED,
    REPEATING,
)


@pytest.mark.parametrize("limits", [(None,), (None, TokenLimits(biases=((3, 4.0),)), TokenLimits(allowed=(5, 6, 7)))])
def test_each_row_is_drawn_as_its_sequence_asks_whoever_had_the_row_before(
    limits: Sequence[TokenLimits | None],
) -> None:
    """Prevents: parameters that stay in a row when its sequence ends and the next one's moves there.

    As one ends another begins, so that there are as many rows as before.
    """
    asked = [
        Request(str(number), text, KINDS[number % len(KINDS)], 2 + number * 3 % 5, limits=limits[number % len(limits)])
        for number, text in enumerate(prompts(10, longest=6))
    ]
    alone = [ids(engine(lookahead=False, max_batch_size=1).generate([request])) for request in asked]
    for lookahead in (True, False):
        it = engine(kv_nbytes=1 << 20, max_batch_size=3, lookahead=lookahead)
        found = ids(it.generate(asked))
        assert [{request.id: found[request.id]} for request in asked] == alone
        check_idle(it)
