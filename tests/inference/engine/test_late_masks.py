"""Masks of grammars that are late: nobody waits for them, and each text has the tokens that it has when none is."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.inference.engine.test_engine import (
    ARCHITECTURES,
    PENALIZED,
    RECOMPUTING,
    SWAPPING,
    TINY,
    VOCAB_SIZE,
    check_idle,
    engine,
    expected,
    ids,
    pages_nbytes,
    prompts,
    requests,
)
from tests.inference.engine.test_limits import OddAfterEven
from tests.inference.engine.test_speculation import check_drafted, speculating
from yafsdp_like.inference.engine import grammar_masks
from yafsdp_like.inference.engine.batch import ActiveRequest, RequestStatus
from yafsdp_like.inference.engine.grammar_masks import MAX_HELD_S, SLOW_S, AskedMasks, GrammarText, MaskLanes
from yafsdp_like.inference.engine.limits import check_limits
from yafsdp_like.inference.engine.request import Completion, FinishReason, Request, TokenLimits

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from yafsdp_like.inference.engine.request import RequestOutput
    from yafsdp_like.inference.kv.eviction import Costs

SECONDS = 30.0  # that nothing here should take, on the slowest machine
ALTERNATING = TokenLimits(grammar=OddAfterEven())


class Gated(OddAfterEven):
    """A grammar that says nothing until it is let."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self._gate = gate

    def start(self) -> Gated:
        return Gated(self._gate)

    def allowed(self) -> Any:
        assert self._gate.wait(SECONDS)
        return super().allowed()


def some_sequence(number: int) -> ActiveRequest:
    return ActiveRequest(Request(str(number), (1, 2, 3)), number, "", [1, 2, 3])


def bound(asked: list[Request], limits: TokenLimits = ALTERNATING) -> list[Request]:
    """Every second one is bound."""
    return [replace(each, limits=limits) if index % 2 else each for index, each in enumerate(asked)]


@pytest.mark.parametrize("lookahead", [True, False], ids=["ahead", "in step"])
def test_others_go_on_to_their_end_while_a_grammar_does_not_say_what_may_follow(lookahead: bool) -> None:
    """Prevents: a client whose grammar takes long holding up every stream."""
    texts, gate = prompts(4, seed=3), threading.Event()
    asked = requests(texts)
    it = engine(kv_nbytes=1 << 20, lookahead=lookahead)
    told: list[RequestOutput] = []
    for request in bound(asked, TokenLimits(grammar=Gated(gate))):
        it.add(request)
    finished = set[str]()
    while finished != {"0", "2"}:
        told += it.step()
        finished = {each.request_id for each in told if each.finish is not None}
    assert it.metrics().num_draws_late > 0
    assert {each.request_id for each in told} == {"0", "2"}
    gate.set()
    while it.has_work:
        told += it.step()
    found = {name: Completion.of([each for each in told if each.request_id == name]).ids for name in "0123"}
    assert found == ids(engine(kv_nbytes=1 << 20).generate(bound(asked)))
    assert found["0"] == expected(TINY, texts[0])
    check_idle(it)


def make_late(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Have every third mask be late, by no clock."""
    draw, find_late = random.Random(seed), MaskLanes.find_late

    def find_some_late(self: MaskLanes, asked: Collection[AskedMasks], *_: Any, **__: Any) -> set[ActiveRequest]:
        while find_late(self, asked, SECONDS, alone=True):
            pass
        return {each.sequence for each in asked if draw.random() < 1 / 3}

    monkeypatch.setattr(MaskLanes, "find_late", find_some_late)


@pytest.mark.parametrize(
    ("name", "costs", "lookahead"),
    [
        ("grouped queries", SWAPPING, True),
        ("grouped queries", RECOMPUTING, False),
        ("windows in one layer of three", RECOMPUTING, True),
        ("windows in one layer of three", SWAPPING, False),
        ("windows", SWAPPING, True),
    ],
)
def test_tokens_are_the_same_whoever_is_late(
    name: str, costs: Costs, lookahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ARCHITECTURES[name]
    asked = bound(requests(prompts(8, longest=22), PENALIZED, max_tokens=20, num_logprobs=1))
    wanted = engine(config, kv_nbytes=1 << 20).generate(asked)
    make_late(monkeypatch)
    it = engine(config, kv_nbytes=pages_nbytes(config, 16), costs=costs, lookahead=lookahead, debug=True)
    found = it.generate(asked)
    assert ids(found) == ids(wanted)
    assert it.metrics().num_draws_late > 0 and (it.metrics().num_preempted > 0 or name == "windows")
    check_idle(it)


def test_drafts_of_a_late_sequence_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(4)
    asked = bound(requests(texts))
    answers = ids(engine(kv_nbytes=1 << 20).generate(asked))
    make_late(monkeypatch)
    it = speculating(answers)
    assert ids(it.generate(asked)) == answers
    assert it.metrics().num_draws_late > 0
    check_drafted(it)


def test_a_prompt_is_scored_and_told_once_however_late_its_first_token_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = bound(requests(prompts(4), num_prompt_logprobs=2, max_tokens=4))
    wanted = engine(kv_nbytes=1 << 20).generate(asked)
    make_late(monkeypatch)
    found = engine(kv_nbytes=1 << 20).generate(asked)
    assert ids(found) == ids(wanted)
    for name, completion in wanted.items():
        assert [token.id for token in found[name].prompt] == [token.id for token in completion.prompt]


def test_no_step_waits_for_a_text_that_has_been_slow_until_it_is_quick_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of threads whose CPU time is what the test says; who is awaited is seen, not timed."""
    cost, clock, lanes, awaited = [2 * SLOW_S], dict[int, float](), list[str](), list[bool]()
    wait = grammar_masks.wait

    class Costly(OddAfterEven):
        def start(self) -> Costly:
            return Costly()

        def allowed(self) -> Any:
            lanes.append(threading.current_thread().name.split()[0])
            clock[threading.get_ident()] = clock.get(threading.get_ident(), 0.0) + cost[0]
            return super().allowed()

    def see(jobs: Any, _: Any, *first: Any) -> Any:
        if not first:
            awaited.append(bool(jobs))
        return wait(jobs, SECONDS, *first)

    monkeypatch.setattr(grammar_masks, "wait", see)
    monkeypatch.setattr(grammar_masks, "_ALONE_S", SECONDS)
    monkeypatch.setattr(time, "thread_time", lambda: clock.get(threading.get_ident(), 0.0))
    it = engine(kv_nbytes=1 << 20, max_batch_size=2)
    (request,) = requests(prompts(1), max_tokens=6)
    it.add(replace(request, limits=TokenLimits(grammar=Costly())))
    while len(awaited) < 3:
        it.step()
    cost[0] = 0.0
    while it.has_work:
        it.step()
    assert lanes == ["quick", *["slow"] * 3, *["quick"] * 2]
    assert awaited[1:4] == [False] * 3
    assert not it.metrics().num_draws_late  # since nobody else runs
    check_idle(it)


def test_a_text_that_keeps_the_interpreter_too_long_ends_and_its_lane_rests_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: a tenth of a second in which no thread goes on, for each token of an ambiguous grammar."""
    clock, rests = dict[int, float](), list[float]()

    class Ambiguous(OddAfterEven):
        def start(self) -> Ambiguous:
            return Ambiguous()

        def accept(self, tokens: Sequence[int]) -> None:
            super().accept(tokens)
            thread = threading.get_ident()
            clock[thread] = clock.get(thread, 0.0) + len(self.seen) * MAX_HELD_S / 3

    monkeypatch.setattr(time, "thread_time", lambda: clock.get(threading.get_ident(), 0.0))
    monkeypatch.setattr(time, "sleep", rests.append)
    monkeypatch.setattr(grammar_masks, "_ALONE_S", SECONDS)
    it = engine(kv_nbytes=1 << 20)
    (request,) = requests(prompts(1))
    it.add(replace(request, limits=TokenLimits(grammar=Ambiguous())))
    told: list[RequestOutput] = []
    while it.has_work:
        told += it.step()
    assert (told[-1].finish, sum(len(each.tokens) for each in told)) == (FinishReason.GRAMMAR, 4)
    assert told[-1].error is not None and "its last token took 7 ms, at most 5 are allowed" in told[-1].error
    assert rests == pytest.approx([20 * number * MAX_HELD_S / 3 for number in (1, 2, 3)])  # none for its end
    check_idle(it)


class Ambiguous(OddAfterEven):
    """A grammar that keeps the interpreter for 4 ms a token, by a clock that is not a real one."""

    def __init__(self, clock: dict[int, float]) -> None:
        super().__init__()
        self._clock = clock

    def start(self) -> Ambiguous:
        return Ambiguous(self._clock)

    def accept(self, tokens: Sequence[int]) -> None:
        super().accept(tokens)
        thread = threading.get_ident()
        self._clock[thread] = self._clock.get(thread, 0.0) + 4e-3


def test_other_grammars_go_on_to_their_end_while_the_lane_of_one_that_keeps_the_interpreter_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents: one request every tenth of a second that stops the grammars of all others."""
    texts, gate, clock, rests = prompts(4, seed=3), threading.Event(), dict[int, float](), list[tuple[str, float]]()

    def sleep(seconds: float) -> None:
        lane = threading.current_thread().name.split()[0]
        rests.append((lane, seconds))
        assert lane == "quick" or gate.wait(SECONDS)

    monkeypatch.setattr(time, "thread_time", lambda: clock.get(threading.get_ident(), 0.0))
    monkeypatch.setattr(time, "sleep", sleep)
    it = engine(kv_nbytes=1 << 20)
    quick, ambiguous = (
        bound(requests(texts), ALTERNATING),
        bound(requests(texts), TokenLimits(grammar=Ambiguous(clock))),
    )
    asked = [ambiguous[3], *quick[:3]]
    for request in asked:
        it.add(request)
    told: list[RequestOutput] = []
    try:
        while {each.request_id for each in told if each.finish is not None} != {"0", "1", "2"}:
            told += it.step()
        assert rests == [("slow", pytest.approx(20 * 4e-3))]
    finally:
        gate.set()
    while it.has_work:
        told += it.step()
    found = {name: Completion.of([each for each in told if each.request_id == name]).ids for name in "0123"}
    assert found == ids(engine(kv_nbytes=1 << 20).generate(quick))
    check_idle(it)


def test_a_text_that_ends_while_its_lane_is_busy_has_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, gate, rests = [some_sequence(number) for number in range(2)], threading.Event(), list[float]()
    gated, ended = GrammarText(Gated(gate), 3, is_slow=True), GrammarText(OddAfterEven(), 3, is_slow=True, held_s=4e-3)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one thread
    monkeypatch.setattr(time, "sleep", rests.append)
    lanes = MaskLanes()
    asked = [AskedMasks(sequence, text, [()]) for sequence, text in zip(sequences, (gated, ended), strict=True)]
    assert lanes.find_late(asked, 0.0, alone=False) == set(sequences)
    sequences[1].status = RequestStatus.ENDED
    gate.set()
    for text in (gated, ended):
        assert text.job is not None
        text.job.result(SECONDS)
    assert rests == [0.0] and gated.masks and not ended.masks


def test_masks_of_several_texts_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: steps that wait for as many masks, one after the other, as they have bound rows."""

    class Together(OddAfterEven):
        def start(self) -> Together:
            return Together()

        def allowed(self) -> Any:
            together.wait(SECONDS)
            return super().allowed()

    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    sequences, together = [some_sequence(number) for number in range(3)], threading.Barrier(3)
    asked = [AskedMasks(sequence, GrammarText(Together(), 3), [()]) for sequence in sequences]
    assert not MaskLanes().find_late(asked, SECONDS, alone=False)
    assert all(each.text.error is None for each in asked)


def test_no_step_waits_for_more_than_the_masks_that_it_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two texts that one step gives to the quick lane: the first is there while the second is not."""
    sequences, is_waiting, gate = [some_sequence(number) for number in range(2)], threading.Event(), threading.Event()
    wait = grammar_masks.wait

    def see(jobs: Any, seconds: float, *first: Any) -> Any:
        if first:
            is_waiting.set()
        return wait(jobs, seconds, *first)

    monkeypatch.setattr(grammar_masks, "wait", see)
    monkeypatch.setattr(grammar_masks, "_ALONE_S", SECONDS)
    texts = [GrammarText(Gated(event), 3) for event in (is_waiting, gate)]
    asked = [AskedMasks(sequence, text, [()]) for sequence, text in zip(sequences, texts, strict=True)]
    began = time.monotonic()
    try:
        assert MaskLanes().find_late(asked, 0.0, alone=True) == {sequences[1]}
        assert time.monotonic() - began < SECONDS / 2
    finally:
        gate.set()


def test_ranks_whose_clocks_differ_follow_no_grammar() -> None:
    (request,) = requests(prompts(1))
    with pytest.raises(ValueError, match="tensor parallel ranks follow no grammars"):
        check_limits(replace(request, limits=ALTERNATING), VOCAB_SIZE, may_follow=False)


def test_what_goes_wrong_in_a_lane_is_an_error_of_the_step() -> None:
    class Wrong(OddAfterEven):
        def start(self) -> Wrong:
            return Wrong()

        def allowed(self) -> Any:
            raise ZeroDivisionError("a fault of ours")

    it = engine(kv_nbytes=1 << 20)
    (request,) = requests(prompts(1))
    it.add(replace(request, limits=TokenLimits(grammar=Wrong())))
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        while it.has_work:
            it.step()


def test_a_late_request_can_be_cancelled() -> None:
    gate = threading.Event()
    it = engine(kv_nbytes=1 << 20)
    (request,) = requests(prompts(1))
    it.add(replace(request, limits=TokenLimits(grammar=Gated(gate))))
    try:
        while not it.metrics().num_draws_late:
            assert not it.step()
        it.cancel("0")
        told = it.step()
        assert [each.finish for each in told] == [FinishReason.CANCELLED]
        while it.has_work:
            assert not it.step()
        check_idle(it)
    finally:
        gate.set()
