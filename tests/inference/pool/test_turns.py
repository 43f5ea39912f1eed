"""Turns of a real pool by the slack of readers: the tokens stay, refusals say when to come, and books are kept."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.inference.engine.test_engine import (
    GREEDY,
    RECOMPUTING,
    SWAPPING,
    decoder,
    expected,
    prompts,
    requests,
)
from tests.inference.pool.test_model_pool import (
    CONFIGS,
    LARGE,
    ONE,
    SMALL,
    alone,
    buffers_nbytes,
    check_idle,
    pooled,
    tokens,
)
from yafsdp_like.inference.engine.request import FinishReason, QueueFullError, Request
from yafsdp_like.inference.fleet.admission import Refusal
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.fleet.times import LearnedTimes, StepLines
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.pool.plan import plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.pool.turns import SlackTurns
from yafsdp_like.inference.weights.loading import model_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.inference.engine.request import RequestOutput
    from yafsdp_like.inference.fleet.queues import ModelQueue

TARGETS = {name: Targets(100.0, 10.0) for name in CONFIGS}  # that a slow machine keeps, too


class Ticks:
    """A clock on which every look takes as long."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def slack_pool(
    slabs_nbytes: int = SMALL, options: EngineOptions = ONE, targets: Any = None, tick_s: float = 0.01, **more: Any
) -> ModelPool:
    limit = buffers_nbytes(options) + slabs_nbytes
    plan = plan_pool(pooled(options), PoolOptions(limit, **{"host_kv_nbytes": 256 << 10, **more}))
    models = {name: model_of(decoder(config)) for name, config in CONFIGS.items()}
    pool = ModelPool(plan, models, targets=targets or TARGETS)
    assert isinstance(pool.turns, SlackTurns)
    pool.turns = SlackTurns(pool.turns._members, targets or TARGETS, plan.options, Ticks(tick_s))
    for name in CONFIGS:
        pool.load(name)
    return pool


def served(pool: ModelPool) -> Iterator[tuple[str, str]]:
    """Step to the end, and yield the model and id of each request that ends well."""
    while pool.has_work:
        for name, output in pool.step():
            if output.finish is FinishReason.LENGTH:
                yield name, output.request_id


@pytest.mark.parametrize(
    ("slabs_nbytes", "costs", "lookahead"),
    [(SMALL, SWAPPING, True), (SMALL, RECOMPUTING, False)],
)
def test_turns_by_slack_change_no_token(slabs_nbytes: int, costs: Any, lookahead: bool) -> None:
    pool = slack_pool(slabs_nbytes, replace(ONE, costs=costs, lookahead=lookahead), tick_s=0.5)
    texts = {name: prompts(6, longest=30, seed=i) for i, name in enumerate(CONFIGS)}
    done = pool.generate({name: requests(found) for name, found in texts.items()})
    assert tokens(done) == {name: alone(name, found) for name, found in texts.items()}
    assert (len(pool.switches) > 3) is (slabs_nbytes == SMALL)
    check_idle(pool)
    scheduler = pool.turns.scheduler
    assert not any(queue.has_work for queue in scheduler.queues.values()) and not scheduler._tenants


def test_the_same_calls_and_the_same_clock_make_the_same_turns() -> None:
    runs = []
    for _ in range(2):
        pool = slack_pool()
        texts = {name: prompts(4, longest=30, seed=i) for i, name in enumerate(CONFIGS)}
        pool.generate({name: requests(found) for name, found in texts.items()})
        runs.append([switch.model for switch in pool.switches])
    assert runs[0] == runs[1] and len(runs[0]) >= 3


def test_a_quota_of_steps_is_served_before_another_model_wakes() -> None:
    """Two models in each other's way with twenty tokens to draw each: quotas hold, and both are served in turn."""
    targets = {name: Targets(1000.0, 10.0) for name in CONFIGS}
    pool = slack_pool(targets=targets, tick_s=0.001)
    for name in ("plain", "windows"):
        pool.add(name, Request("0", (1, 2, 3), max_tokens=40))
    least = pool.turns.scheduler.options.min_round * 1000.0 / 10.0
    steps: list[str] = []
    while pool.has_work:
        steps += [name for name, output in pool.step() if output.tokens]
    changes = sum(one != other for one, other in itertools.pairwise(steps))
    assert steps.count("plain") == steps.count("windows") == 40 and changes <= 1 + 80 // least
    assert len(pool.switches) == changes + 1


def test_when_to_come_again_is_in_whole_seconds_that_are_not_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the header retry-after, which is rounded up, says it beside the message."""
    pool = slack_pool()
    monkeypatch.setattr(pool.turns.scheduler, "refusal", lambda job: Refusal("busy", 1.2))
    with pytest.raises(QueueFullError, match="come again in 2 s"):
        pool.add("plain", Request("0", (1, 2, 3), max_tokens=3))


def test_who_would_miss_its_targets_is_told_when_to_come_and_then_is_served() -> None:
    """On a clock on which a step takes longer than half of the pace, a second model does not fit beside the first."""
    targets = {name: Targets(4.0, 0.2) for name in CONFIGS}
    pool = slack_pool(targets=targets, tick_s=0.06)
    pool.add("plain", Request("0", (1, 2, 3), max_tokens=30))
    for _ in range(5):
        pool.step()
    with pytest.raises(QueueFullError, match="come again in") as refused:
        for number in range(9):
            pool.add("windows", Request(str(number), (1, 2, 3), max_tokens=4))
    assert refused.value.retry_after_s >= 1.0
    assert not any(len(pool.turns._open[name]) > 1 for name in ("plain", "wide, tied"))
    ended = list(served(pool))
    assert ("plain", "0") in ended
    pool.add("windows", Request("again", (1, 2, 3), max_tokens=4))
    assert list(served(pool)) == [("windows", "again")]
    check_idle(pool)


def test_all_are_admitted_where_no_load_is_said() -> None:
    pool = slack_pool(targets={name: Targets(0.1, 0.001) for name in CONFIGS}, admission_load=None)
    for name in CONFIGS:
        for number in range(3):
            pool.add(name, Request(str(number), (1, 2, 3), max_tokens=3))
    assert len(list(served(pool))) == 9


def test_requests_are_taken_until_their_pages_fill_what_the_home_of_their_model_leaves() -> None:
    """Targets that nobody could miss: memory alone decides, and then nobody loses pages."""
    wide = replace(ONE, max_batch_size=64, max_batch_tokens=64)
    pool = slack_pool(SMALL, wide, dict.fromkeys(CONFIGS, Targets(1e6, 1e3)), host_kv_nbytes=0)
    engine, plan = pool.engine("plain"), pool.plan.models["plain"]
    room = pool.plan.grid.region_nbytes - len(plan.home) * pool.plan.grid.slab_nbytes
    taken = 0
    with pytest.raises(QueueFullError, match="keys and values would take"):
        for number in range(64):
            pool.add("plain", Request(str(number), (1, 2, 3), max_tokens=29))
            taken += 1
    assert taken == int(room // (32 * plan.token_nbytes)) > 1
    assert len(list(served(pool))) == taken
    assert engine.metrics().num_preempted == 0


def test_what_an_engine_refuses_is_in_no_book() -> None:
    pool = slack_pool()
    pool.add("plain", Request("0", (1, 2, 3), max_tokens=4))
    for wrong in (Request("0", (1, 2)), Request("long", (1,) * 1000)):
        with pytest.raises(ValueError, match=r"0|long"):
            pool.add("plain", wrong)
    assert list(pool.turns._open["plain"]) == ["0"]
    assert list(served(pool)) == [("plain", "0")]


def test_cancelled_requests_leave_the_books_and_teach_no_length() -> None:
    pool = slack_pool()
    for name in CONFIGS:
        pool.add(name, Request("0", (1, 2, 3), max_tokens=50))
    for _ in range(4):
        pool.step()
    for name in CONFIGS:
        pool.cancel(name, "0")
    assert list(served(pool)) == []
    queues = pool.turns.scheduler.queues.values()
    assert not any(queue.has_work for queue in queues) and all(queue.times.num_drawn is None for queue in queues)
    check_idle(pool)


def test_times_and_switches_are_learned_from_the_pool_s_clock() -> None:
    pool = slack_pool(tick_s=0.25)
    before = {name: queue.switch_s for name, queue in pool.turns.scheduler.queues.items()}
    for name in ("plain", "windows"):
        pool.add(name, Request("0", (1, 2, 3), max_tokens=12))
    assert len(list(served(pool))) == 2
    for name in ("plain", "windows"):
        queue = pool.turns.scheduler.queues[name]
        assert queue.switch_s > before[name] and queue.times.num_drawn == 12
        assert queue.times.decode_s(1, 10) > 0.05


def test_a_turn_goes_on_while_units_of_the_next_model_are_on_their_way() -> None:
    """Two models whose homes do not meet; the one that sleeps is brought while the other serves, unit by unit."""
    pool = slack_pool(LARGE, targets={name: Targets(1000.0, 10.0) for name in CONFIGS})
    told: list[tuple[str, float]] = []
    pool.turns.scheduler.copying = lambda name, ready_at: told.append((name, ready_at))
    missing = pool._members["windows"].residence.missing_nbytes()
    assert missing == pool.plan.models["windows"].image_nbytes
    for name in ("plain", "windows"):
        pool.add(name, Request("0", (1, 2, 3), max_tokens=30))
    pool.step()
    assert [name for name, _ in told] == ["windows"]
    left = pool._members["windows"].residence.missing_nbytes()
    assert 0 < left < missing and told[0][1] == pytest.approx(pool.turns._clock.now, abs=0.1)
    assert len(list(served(pool))) == 2 and pool._members["windows"].residence.missing_nbytes() == 0
    assert pool.switches[-1].nbytes < missing


def test_models_have_no_turn_before_they_are_loaded_and_leave_the_books_where_that_fails() -> None:
    def unreadable(device: object) -> None:
        raise OSError("the disk is gone")

    plan = plan_pool(pooled(ONE), PoolOptions(buffers_nbytes(ONE) + SMALL, host_kv_nbytes=256 << 10))
    models = {name: model_of(decoder(config)) for name, config in CONFIGS.items()}
    models["windows"] = replace(models["windows"], source=unreadable)
    pool, reasons = ModelPool(plan, models, targets=TARGETS), dict[str, FinishReason]()
    for name in CONFIGS:
        pool.add(name, Request("0", (1, 2, 3), max_tokens=5))
    while pool.has_work:
        reasons |= {name: output.finish for name, output in pool.step() if output.finish is not None}
    assert {name for name, reason in reasons.items() if reason is FinishReason.LENGTH} == {"plain", "wide, tied"}
    assert reasons["windows"] is FinishReason.FAILED
    assert not any(queue.has_work for queue in pool.turns.scheduler.queues.values())


def timed(pool: ModelPool, name: str, wake_s: float = 0.0) -> ModelQueue:
    """Have a model's steps take 5 ms where they decode and 10 ms a token of prompts, which its scheduler must learn."""
    clock, queue, engine = pool.turns._clock, pool.turns.scheduler.queues[name], pool.engine(name)
    queue.times = LearnedTimes(StepLines(0.001, prefill_row_s=0.002))
    step, wake_up, log = engine.step, pool.wake_up, engine.step_log

    def timed_step() -> list[RequestOutput]:
        num_steps, num_prompt_tokens = log.num_steps, log.num_prompt_tokens
        outputs = step()
        if log.num_steps > num_steps:
            clock.now += 0.01 * (log.num_prompt_tokens - num_prompt_tokens) or 0.005
        return outputs

    def timed_wake_up(name: str) -> None:
        clock.now += wake_s
        wake_up(name)

    engine.step, pool.wake_up = timed_step, timed_wake_up
    return queue


def test_parts_of_prompts_and_cached_ones_teach_right_times() -> None:
    """Prompts of three parts, alone, beside a request that decodes, and found in the cache but for the last part."""
    pool = slack_pool(LARGE, tick_s=0.0)
    queue, text = timed(pool, "plain"), tuple(range(1, 46))
    for number, prompt in enumerate([text, text[::-1], (*text[:30], *text[:15]), text]):
        pool.add("plain", Request(str(number), prompt, max_tokens=15))
        for _ in range(6):
            pool.step()
    assert ("plain", "3") in served(pool)
    assert pool.engine("plain").metrics().num_tokens_cached > 0 < pool.engine("plain").metrics().num_chunks
    assert queue.times._counts["decode"] > 3 and queue.times._counts["prefill"] > 3
    assert (queue.times.decode_scale, queue.times.prefill_scale) == (pytest.approx(5), pytest.approx(5))


def test_the_time_of_a_prompt_is_not_that_of_the_switch_before_it() -> None:
    pool = slack_pool(LARGE, tick_s=0.0)
    queue = timed(pool, "plain", wake_s=0.25)
    queue.times.decode_scale = queue.times.prefill_scale = 5.0
    queue.switch_s = 0.25
    pool.add("plain", Request("0", tuple(range(1, 46)), max_tokens=4))
    assert list(served(pool)) == [("plain", "0")]
    assert queue.switch_s == pytest.approx(0.25) and [switch.model for switch in pool.switches] == ["plain"]


def test_a_model_that_idled_since_it_was_woken_for_nothing_has_not_switched_meanwhile() -> None:
    pool = slack_pool(LARGE)
    pool.add("plain", Request("0", (1, 2, 3), max_tokens=4))
    assert pool.step() == [] and pool.is_awake("plain")
    pool.cancel("plain", "0")
    assert [output.finish for _, output in pool.step()] == [FinishReason.CANCELLED]
    pool.turns._clock.now += 600.0
    pool.add("plain", Request("1", (1, 2, 3), max_tokens=4))
    assert list(served(pool)) == [("plain", "1")]
    assert pool.turns.scheduler.queues["plain"].switch_s < 1.0


def test_a_model_whose_last_request_has_just_been_cancelled_is_not_woken() -> None:
    pool = slack_pool()
    pool.add("plain", Request("0", (1, 2, 3), max_tokens=4))
    pool.cancel("plain", "0")
    assert [output.finish for _, output in pool.step()] == [FinishReason.CANCELLED]
    assert not pool.switches and not pool.is_awake("plain")
    check_idle(pool)


def until_stopped(pool: ModelPool) -> None:
    """Serve a request of ``plain`` until a stop token ends it, with a step under way that is one too many."""
    stop = frozenset(expected(CONFIGS["plain"], (1, 2, 3))[2:3])
    pool.add("plain", Request("ends", (1, 2, 3), GREEDY, max_tokens=40, stop_tokens=stop))
    while not any(output.finish is FinishReason.STOP for _, output in pool.step()):
        pass
    assert pool.engine("plain")._unread is not None


def test_who_leaves_an_awake_model_without_the_turn_is_told_at_once_and_the_model_is_idle_then() -> None:
    pool = slack_pool(LARGE, targets={name: Targets(1000.0, 10.0) for name in CONFIGS})
    pool.wake_up("plain")
    for name in ("windows", "plain"):
        pool.add(name, Request("0", (1, 2, 3), GREEDY, max_tokens=50))
    while not any(name == "windows" for name, _ in pool.step()):
        pass
    assert pool.is_awake("plain") and pool.is_awake("windows")
    pool.cancel("plain", "0")
    told = [(name, output.request_id) for name, output in pool.step() if output.finish is FinishReason.CANCELLED]
    assert told == [("plain", "0")]
    assert not pool.engine("plain").has_work and pool.engine("windows").has_requests
    assert list(served(pool)) == [("windows", "0")]
    check_idle(pool)


def test_a_model_is_idle_once_a_stop_token_has_ended_its_last_request_though_another_is_busy() -> None:
    pool = slack_pool(LARGE, targets={name: Targets(1000.0, 10.0) for name in CONFIGS})
    pool.add("windows", Request("0", (1, 2, 3), GREEDY, max_tokens=55))
    until_stopped(pool)
    assert pool.engine("windows").has_work
    pool.step()
    assert pool.engine("windows").has_requests and not pool.engine("plain").has_work
    assert pool.engine("plain").metrics().num_tokens_dropped == 1
    assert list(served(pool)) == [("windows", "0")]
    check_idle(pool)


def test_a_model_is_unloaded_whose_last_step_beyond_the_end_of_its_requests_is_not_read_yet() -> None:
    pool = slack_pool(LARGE)
    until_stopped(pool)
    pool.unload("plain")
    check_idle(pool)


def test_targets_of_other_models_are_refused() -> None:
    pool = slack_pool()
    with pytest.raises(ValueError, match="expected targets of the models"):
        SlackTurns(pool.turns._members, {"plain": Targets(1.0, 1.0)}, pool.plan.options)
