"""Laws of a scheduler of models: whom it serves, for how long, and that nobody starves, on clocks made of numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yafsdp_like.inference.fleet.queues import Job, ModelSpec
from yafsdp_like.inference.fleet.reader import Reader, Targets
from yafsdp_like.inference.fleet.schedule import ScheduleOptions, TokenScheduler, Turn
from yafsdp_like.inference.fleet.times import StepLines

LINES = StepLines(0.01, 0.0005, 1e-7, 0.01, 1e-5)
TARGETS = Targets(4.0, 0.1)
ALL = ScheduleOptions(admission_load=None)


def spec(targets: Targets = TARGETS, lines: StepLines = LINES, switch_s: float = 0.1, max_batch: int = 8) -> ModelSpec:
    return ModelSpec(targets, lines, switch_s, max_batch)


@dataclass
class Play:
    """Runs what a scheduler says, with steps that take what the lines say and switches that are never hidden."""

    scheduler: TokenScheduler
    now: float = 0.0
    turns: list[tuple[float, Turn]] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    last: str | None = None

    def ask(self, job: Job, num_tokens: int) -> bool:
        if self.scheduler.arrived(job, self.now) is not None:
            return False
        self.left[job.id] = num_tokens
        return True

    def step(self, most: int = 10**9) -> Turn | None:
        turn = self.scheduler.next(self.now)
        if turn is None:
            return None
        queue, lines = self.scheduler.queues[turn.model], self.scheduler.queues[turn.model].spec.lines
        if turn.model != self.last:
            self.now += queue.spec.switch_s
            self.scheduler.switched(turn.model, queue.spec.switch_s)
            self.last = turn.model
        self.turns.append((self.now, turn))
        began = self.now
        if turn.prefill:
            self.now += lines.prefill_s(sum(queue.waiting[each].job.num_prompt_tokens for each in turn.prefill))
            served, count = list(turn.prefill), 1
            self.scheduler.prefilled(turn.model, served, began, self.now)
        else:
            count = min(turn.num_steps, most, min(self.left[each] for each in queue.running))
            served = list(queue.running)
            keys = sum(request.num_keys for request in queue.running.values())
            self.now += count * lines.decode_s(len(served), keys)
            self.scheduler.decoded(turn.model, count, began, self.now)
        for each in served:
            self.left[each] -= count
            if not self.left[each]:
                del self.left[each]
                self.readers[each] = self.scheduler.ended(turn.model, each)
        return turn

    def drain(self) -> None:
        while self.step() is not None:
            assert len(self.turns) < 100_000, "it goes on for ever"


def play(num_models: int, options: ScheduleOptions = ALL, **more: object) -> Play:
    return Play(TokenScheduler({f"m{i}": spec(**more) for i in range(num_models)}, options))


def job(number: int, model: str, num_prompt_tokens: int = 100, tenant: str = "") -> Job:
    return Job(str(number), model, num_prompt_tokens, 1000, tenant)


def longest_turn_s(played: Play) -> float:
    """See [Note: nobody starves]: a switch, two groups, a quota or a step, and the copy that a turn is extended for."""
    options, longest = played.scheduler.options, 0.0
    shortest_s = min(queue.targets.ttft_s for queue in played.scheduler.queues.values())
    for queue in played.scheduler.queues.values():
        lines, tpot_s = queue.spec.lines, queue.targets.tpot_s
        step_s = lines.decode_s(queue.spec.max_batch, queue.spec.max_batch * 3000)
        quota = max(1, math.ceil(shortest_s / tpot_s))
        group_s = lines.prefill_s(max(options.group_tokens, 2000))
        longest = max(longest, 2 * queue.spec.switch_s + 2 * group_s + quota * step_s)
    return longest


arrivals = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 2000), st.integers(1, 60), st.integers(0, 40), st.integers(0, 2)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(arrivals, st.integers(1, 8), st.sampled_from([0.5, 4.0, 30.0]), st.sampled_from([0.3, 3.0]))
def test_nobody_starves(asked: list[tuple[int, ...]], max_batch: int, ttft_s: float, patience: float) -> None:
    """Every model has a turn within the stated bound, the oldest request is in its first group, and all ends."""
    options = ScheduleOptions(admission_load=None, patience=patience)
    played = play(5, options, targets=Targets(ttft_s, 0.05), max_batch=max_batch)
    waits: dict[str, float] = {}
    bound_s = patience * ttft_s + 5 * longest_turn_s(played)
    queue = list(enumerate(asked))
    while queue or played.scheduler.next(played.now) is not None:
        for _ in range(min(len(queue), 3)):
            number, (model, prompt, tokens, _, tenant) = queue.pop(0)
            played.ask(job(number, f"m{model}", prompt, f"tenant {tenant}"), tokens)
            waits.setdefault(f"m{model}", played.now)
        oldest = {name: next(iter(q.waiting), None) for name, q in played.scheduler.queues.items()}
        turn = played.step(most=1 + asked[0][3])
        assert turn is not None
        began = played.turns[-1][0]
        assert began - waits[turn.model] <= bound_s
        assert not turn.prefill or turn.prefill[0] == oldest[turn.model]
        waits[turn.model] = played.now
        for name, found in played.scheduler.queues.items():
            if not found.has_work:
                waits.pop(name, None)
    assert sorted(played.readers, key=int) == [str(number) for number in range(len(asked))]


@settings(max_examples=40, deadline=None)
@given(arrivals, st.integers(1, 6), st.integers(1, 3000))
def test_turns_are_bounded_and_name_what_there_is(asked: list[tuple[int, ...]], size: int, num_tokens: int) -> None:
    options = ScheduleOptions(admission_load=None, group_size=size, group_tokens=num_tokens)
    played = play(5, options)
    for number, (model, prompt, tokens, _, _) in enumerate(asked):
        played.ask(job(number, f"m{model}", prompt), tokens)
    most = math.ceil(TARGETS.ttft_s / TARGETS.tpot_s)
    while True:
        prompts = {
            key: r.job.num_prompt_tokens for q in played.scheduler.queues.values() for key, r in q.waiting.items()
        }
        turn = played.step()
        if turn is None:
            break
        assert (turn.num_steps > 0) != bool(turn.prefill) and turn.num_steps <= most
        assert len(turn.prefill) <= size
        assert len(turn.prefill) <= 1 or sum(prompts[each] for each in turn.prefill) <= num_tokens
        assert turn.prefetch != turn.model
        assert len(played.scheduler.queues[turn.model].running) <= 8
    assert len(played.readers) == len(asked)


def test_the_same_calls_make_the_same_turns() -> None:
    runs = []
    for _ in range(2):
        played = play(4)
        for number in range(30):
            played.ask(job(number, f"m{number * 7 % 4}", 50 + number), 20 + number)
            played.step(most=5)
        played.drain()
        runs.append(played.turns)
    assert runs[0] == runs[1] and len(runs[0]) > 30


def test_below_capacity_all_tokens_come_in_time() -> None:
    """Three models whose steps take a third of the time together, all with requests from the start."""
    played = play(3)
    for number in range(12):
        played.ask(job(number, f"m{number % 3}"), 200)
    played.drain()
    assert [reader.num_late for reader in played.readers.values()] == [0] * 12
    switches = [model for model, _ in itertools.groupby(turn.model for _, turn in played.turns)]
    assert 9 < len(switches) < 90


def test_above_capacity_time_goes_where_it_keeps_most_readers_from_stalling() -> None:
    """Two models take 80 % of the device each: the one with six readers is served in time, the one with one is not."""
    played = play(2, lines=StepLines(0.08, 0.0, 0.0, 0.01, 0.0), switch_s=0.05)
    for number in range(7):
        played.ask(job(number, "m0" if number else "m1"), 300)
    played.drain()
    shares = {each: reader.share_in_time for each, reader in played.readers.items()}
    assert min(share for each, share in shares.items() if each != "0") > 0.9
    assert 0.05 < shares["0"] < 0.7


def test_a_first_token_that_is_in_time_yet_is_worth_more_than_pacing() -> None:
    """A model with one new request has its turn before the request is due, though another's readers fill the device."""
    played = play(2, lines=StepLines(0.098, 0.0, 0.0, 0.01, 0.0))
    for number in range(8):
        played.ask(job(number, "m0"), 200)
    for _ in range(20):
        played.step(most=5)
    played.ask(job(8, "m1"), 1)
    played.drain()
    assert played.readers["8"].num_late == 0


def test_many_requests_of_one_tenant_outweigh_no_other_tenant() -> None:
    """The flood has eight readers on one model; the other tenant's only reader weighs as much as all of them."""
    drawn = {}
    for tenants in (("flood", "other"), ("", "")):
        played = play(2, lines=StepLines(0.08, 0.0, 0.0, 0.01, 0.0), switch_s=0.05)
        for number in range(9):
            played.ask(job(number, "m0" if number else "m1", tenant=tenants[number == 0]), 1000)
        while played.now < 20.0:
            played.step(most=5)
        drawn[tenants] = [
            played.scheduler.queues[name].find(each).reader.num_tokens for name, each in (("m1", "0"), ("m0", "1"))
        ]
    assert 0.7 < drawn["flood", "other"][0] / drawn["flood", "other"][1] < 1.4
    assert drawn["", ""][0] < drawn["", ""][1] / 2


def test_a_group_has_the_oldest_request_and_then_shares_by_weight() -> None:
    options = ScheduleOptions(admission_load=None, group_size=7, tenant_weights={"paying": 2.0})
    scheduler = TokenScheduler({"m0": spec()}, options)
    for number in range(30):
        tenant = "flood" if number < 20 else "paying" if number < 25 else "other"
        assert scheduler.arrived(job(number, "m0", 10, tenant), 0.0) is None
    turn = scheduler.next(0.0)
    assert turn is not None and turn.prefill[0] == "0"
    tenants = Counter("flood" if int(each) < 20 else "paying" if int(each) < 25 else "other" for each in turn.prefill)
    assert tenants == {"flood": 2, "paying": 3, "other": 2}


def test_a_reader_whose_model_is_worth_least_still_has_turns_within_the_bound() -> None:
    """Another model's eight readers fill the device for ever: who leaves is replaced at once."""
    played = play(2, lines=StepLines(0.098, 0.0, 0.0, 0.01, 0.0))
    played.ask(job(0, "m1"), 40)
    gaps, last, number = list[float](), 0.0, 1
    while "0" in played.left:
        while len(played.left) < 9:
            played.ask(job(number, "m0"), 500)
            number += 1
        turn = played.step(most=20)
        if turn is not None and turn.model == "m1":
            gaps.append(played.now - last)
            last = played.now
        assert played.now < 2000, "it starves"
    assert max(gaps) <= ALL.patience * TARGETS.ttft_s + 2 * longest_turn_s(played)
    assert max(gaps) > 2 * TARGETS.ttft_s, "it was not worth least, and this shows nothing"


def test_what_is_prefetched_runs_next_even_if_another_is_more_urgent_by_then() -> None:
    models = {"m0": spec(), "m1": spec(), "tight": spec(Targets(1.0, 0.1))}
    played = Play(TokenScheduler(models, ALL))
    for number in range(2):
        played.ask(job(number, f"m{number}"), 500)
    turn = played.step()
    assert turn is not None and (turn.model, turn.prefetch) == ("m0", "m1")
    played.ask(job(2, "tight"), 500)
    while (turn := played.step()) is not None and turn.model == "m0":
        pass
    assert turn is not None and (turn.model, turn.prefetch) == ("m1", "tight")


def test_what_is_prefetched_runs_next() -> None:
    played = play(4)
    for number in range(16):
        played.ask(job(number, f"m{number % 4}"), 150)
    played.drain()
    follows = [
        (one.prefetch, other.model)
        for (_, one), (_, other) in itertools.pairwise(played.turns)
        if one.model != other.model
    ]
    assert len(follows) > 8 and all(prefetched == model for prefetched, model in follows)


def test_a_turn_goes_on_while_the_next_weights_are_on_their_way() -> None:
    played = play(2)
    for number in range(2):
        played.ask(job(number, f"m{number}"), 500)
    turn = played.step()
    assert turn is not None and turn.prefetch is not None
    first = turn.model
    while (turn := played.step(most=1)) is not None and played.scheduler._current.num_steps > 0:
        pass
    step_s = played.scheduler.queues[first].step_s
    played.scheduler.copying(turn.prefetch, played.now + 5.5 * step_s)
    models = [played.step(most=1).model for _ in range(6)]
    assert models == [first] * 5 + [turn.prefetch]


def test_prompts_that_come_in_a_turn_are_taken_off_its_steps() -> None:
    scheduler = TokenScheduler({"m0": spec(), "m1": spec()}, ALL)
    for number in range(2):
        scheduler.arrived(job(number, f"m{number}"), 0.0)
    turn = scheduler.next(0.0)
    scheduler.prefilled(turn.model, turn.prefill, 0.0, 0.05)
    steps = scheduler.next(0.05).num_steps
    scheduler.arrived(job(2, turn.model), 0.05)
    group = scheduler.next(0.05)
    assert group.prefill == ("2",)
    scheduler.prefilled(turn.model, group.prefill, 0.05, 0.07)
    assert scheduler.next(0.07).num_steps == steps - math.ceil(0.02 / scheduler.queues[turn.model].step_s)


def test_a_step_that_decodes_and_computes_prompts_counts_once() -> None:
    scheduler = TokenScheduler({"m0": spec()}, ALL)
    for number in range(3):
        scheduler.arrived(job(number, "m0"), 0.0)
    steps = scheduler._begin(scheduler._working(), 0.0).num_steps
    for ids, began, ended in ((["0", "1"], 0.0, 0.02), (["0", "1", "2"], 0.02, 0.05), (["0", "1", "2"], 0.05, 0.06)):
        scheduler.drew("m0", ids, began, ended)
        scheduler.spent("m0")
    queue = scheduler.queues["m0"]
    assert [request.reader.num_tokens for request in queue.running.values()] == [3, 3, 2] and not queue.waiting
    assert scheduler._current.num_steps == steps - 3


def test_a_request_that_is_cancelled_says_nothing_of_lengths() -> None:
    scheduler = TokenScheduler({"m0": spec()}, ALL)
    scheduler.arrived(job(0, "m0"), 0.0)
    scheduler.ended("m0", "0", was_cancelled=True)
    assert scheduler.queues["m0"].times.num_drawn is None and scheduler.next(0.0) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 0},
        {"min_round": 0.5, "max_round": 0.4},
        {"patience": 0.0},
        {"admission_load": 0.0},
        {"tenant_weights": {"a": 0.0}},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be above 0"):
        ScheduleOptions(**wrong)
