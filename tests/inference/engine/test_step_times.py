"""How many rows a step has: by the rule without a target, and by measured times with one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.inference.engine.test_engine import PENALIZED, TINY, check_idle, engine, pages_nbytes
from tests.inference.engine.test_scheduler import SHAPE, SWAPPING, add, pool, read, schedule, step
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.engine.scheduler import Scheduler
from yafsdp_like.inference.engine.step_times import MIN_CHUNK, StepTimes
from yafsdp_like.inference.kv.kv_cache import KVCache
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.batch import ActiveRequest
    from yafsdp_like.inference.engine.engine import Engine

TABLE = {64: 0.004, 128: 0.006, 256: 0.010, 512: 0.015, 1024: 0.030}


def scheduler(tpot_ms: float | None = None, size: int = 32, tokens: int = 2048) -> Scheduler:
    """With room for everybody, and a device that ``TABLE`` describes."""
    cache = KVCache([LayerGroup((0,), SHAPE)], SWAPPING, pool(40_000))
    options = EngineOptions(max_batch_size=size, max_batch_tokens=tokens, tpot_ms=tpot_ms)
    return Scheduler(cache, options, None if tpot_ms is None else StepTimes(TABLE))


def decoding(it: Scheduler, count: int) -> list[ActiveRequest]:
    """That many sequences that draw in every step."""
    added = [add(it, f"d{number}", 1, max_tokens=10_000) for number in range(count)]
    while any(sequence.num_left != 1 or len(sequence.tokens) < 2 for sequence in added):
        step(it)
    return added


# --- times ---


def test_a_step_takes_as_long_as_the_next_larger_one_that_was_measured() -> None:
    it = StepTimes(TABLE)
    assert [it.seconds(rows) for rows in (1, 64, 65, 512, 1024)] == [0.004, 0.004, 0.006, 0.015, 0.030]
    assert it.seconds(2048) == pytest.approx(0.060)


def test_more_rows_never_count_as_faster() -> None:
    it = StepTimes({64: 0.004, 128: 0.003, 256: 0.010})
    assert it.seconds(128) == 0.004 and it.max_rows(0.004, 0) == 128


def test_the_most_rows_within_a_target_are_a_size_that_was_measured_or_the_least_that_moves_prompts() -> None:
    it = StepTimes(TABLE)
    assert [it.max_rows(seconds, 4) for seconds in (0.015, 0.0149, 0.006, 0.001)] == [512, 256, 128, 4 + MIN_CHUNK]
    assert it.max_rows(0.120, 4) == 4096  # as the largest that was measured
    assert it.max_rows(0.006, 100) == 100 + MIN_CHUNK


@pytest.mark.parametrize("table", [{}, {64: 0.0}, {0: 1.0}])
def test_a_table_that_says_nothing_is_refused(table: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="at least one number of rows"):
        StepTimes(table)


def test_what_keys_add_and_by_how_much_chunks_are_slower_is_learned_from_steps() -> None:
    """The device takes half a millisecond for each decoding row, and 1.5 times the table's seconds in mixed steps."""
    it = StepTimes(TABLE)
    for _ in range(100):
        it.learn(16, 16, 0.004 + 16 * 0.0005)
        it.learn(500, 20, 1.5 * 0.015 + 20 * 0.0005)
    assert it.seconds(250, 10) == pytest.approx(1.5 * 0.010 + 10 * 0.0005, rel=1e-3)
    assert it.max_rows(0.0225 + 10 * 0.0005 + 1e-4, 10) == 512
    assert it.max_rows(0.0225 + 10 * 0.0005 - 1e-4, 10) == 256


def test_one_slow_step_changes_little_and_one_that_was_fast_does_not_go_below_the_table() -> None:
    it = StepTimes(TABLE)
    it.learn(500, 1, 60.0)
    assert it.seconds(500) == pytest.approx(0.015 * 1.3)
    it = StepTimes(TABLE)
    it.learn(16, 16, 0.001)
    assert it.seconds(16, 16) == 0.004


# --- without a target ---


def test_beside_rows_that_decode_a_prompt_has_a_chunk_and_alone_the_whole_step() -> None:
    it = scheduler()
    add(it, "long", 5000)
    assert step(it) == [("long", 0, 2048)]
    it = scheduler()
    decoding(it, 1)
    add(it, "long", 1100)
    chunks = [step(it)[1:] for _ in range(3)]
    assert chunks == [[("long", 0, 575)], [("long", 575, 525)], [("long", 1100, 1)]]  # of 576 rows, as it is padded to


def test_prompts_that_came_together_are_computed_one_after_the_other() -> None:
    it = scheduler()
    for name in "abc":
        add(it, name, 640)
    assert step(it) == [("a", 0, 640)]
    assert step(it) == [("a", 640, 1), ("b", 0, 575)]
    assert step(it) == [("a", 641, 1), ("b", 575, 65), ("c", 0, 510)]


def test_where_many_prompts_could_be_computed_chunks_are_larger() -> None:
    for count, chunk in ((4, 575), (8, 1151), (20, 2047)):
        it = scheduler()
        decoding(it, 1)
        for number in range(count):
            add(it, str(number), 3000)
        assert step(it)[1:] == [("0", 0, chunk)]
    it = scheduler(size=3)  # only two of the prompts could run
    decoding(it, 1)
    for number in range(20):
        add(it, str(number), 3000)
    assert step(it)[1:] == [("0", 0, 575)]


# --- with a target ---


def test_a_target_says_how_many_rows_a_step_has_where_somebody_decodes() -> None:
    for tpot_ms, rows in ((15.0, 512), (14.0, 256), (30.0, 1024), (1.0, 3 + MIN_CHUNK), (1e3, 2048)):
        it = scheduler(tpot_ms)
        decoding(it, 3)
        add(it, "long", 5000)
        batch = schedule(it)
        assert batch is not None and batch.num_tokens == rows and len(batch.runs) == 4
    it = scheduler(15.0)
    add(it, "long", 5000)
    assert step(it) == [("long", 0, 2048)]  # nobody waits for it


@pytest.mark.parametrize("tpot_ms", [1.0, 10.0, 30.0])
def test_no_token_waits_longer_than_the_target_but_for_the_least_that_moves_prompts(tpot_ms: float) -> None:
    """The gap between two tokens of a sequence is the time of the steps in between: of one, which keeps the target."""
    draw, it, times = random.Random(tpot_ms), scheduler(tpot_ms), StepTimes(TABLE)
    last: dict[ActiveRequest, int] = {}  # the step in which it drew
    num_mixed = 0
    for number in range(400):
        if draw.random() < 0.3:
            add(it, str(number), draw.choice([3, 90, 700]), max_tokens=draw.randint(2, 40))
        batch = schedule(it)
        assert batch is not None
        num_drawing = sum(run.num_tokens == 1 for run in batch.runs)
        for run in batch.runs:
            if run.sequence in last:
                assert last[run.sequence] == number - 1
            if run.draws:
                last[run.sequence] = number
        if num_drawing and batch.num_tokens > num_drawing + MIN_CHUNK:
            assert times.seconds(batch.num_tokens) <= tpot_ms / 1e3
            num_mixed += 1
        read(it, batch)
    assert num_mixed > 10 or tpot_ms == 1.0


def test_a_prompt_moves_under_any_load_and_in_order_of_arrival() -> None:
    """Prevents: a target that cannot be kept, for which prompts wait for ever."""
    it = scheduler(tpot_ms=0.001)
    decoding(it, 20)
    names = ("first", "second")
    for name in names:
        add(it, name, 10 * MIN_CHUNK)
    done_after: dict[str, int] = {}
    for number in range(1, 30):
        batch = schedule(it)
        assert batch is not None
        done_after |= {run.sequence.request.id: number for run in batch.runs if run.draws and run.num_tokens > 1}
        assert sum(run.num_tokens == 1 for run in batch.runs) >= 20
        read(it, batch)
    assert [done_after[name] for name in names] == [10, 20]


@pytest.mark.parametrize("tpot_ms", [0.0, -1, float("nan"), float("inf"), 10**400])
def test_a_target_of_no_time_or_without_end_is_refused(tpot_ms: float) -> None:
    """Prevents: an overflow in the first step that mixes, which ends the server."""
    with pytest.raises(ValueError, match="tpot_ms must be above 0 and at most 1e9, found"):
        EngineOptions(tpot_ms=tpot_ms)


@pytest.mark.parametrize("stall_s", [0.2, 2.0, 200.0])
def test_chunks_recover_after_a_step_that_was_held_up_though_none_only_decodes_any_more(stall_s: float) -> None:
    """Prevents: decoding rows count as slow for good, so that prompts move by the least chunk until none are left."""
    it, device = StepTimes(TABLE), StepTimes(TABLE)
    for seconds in (*[0.0048] * 50, stall_s):
        it.learn(8, 8, seconds)
    for _ in range(20):
        rows = it.max_rows(0.025, 8)
        it.learn(rows, 8, device.seconds(rows) + 8 * 1e-4)
    assert it.max_rows(0.025, 8) == 512


def test_many_decoding_rows_bound_what_each_takes_by_a_step_that_mixes() -> None:
    it = StepTimes(TABLE)
    for _ in range(60):
        it.learn(8, 8, 0.100)
    assert it.max_rows(0.025, 8) == 8 + MIN_CHUNK
    for _ in range(60):
        rows = it.max_rows(0.025, 8)
        it.learn(rows, 8, StepTimes(TABLE).seconds(rows))
    assert it.max_rows(0.025, 8) >= 512


# --- the engine ---


def test_an_engine_with_a_target_measures_its_steps_and_learns_from_them() -> None:
    it = engine(max_batch_tokens=64, tpot_ms=1.0)
    assert it._times is not None
    measured = it._times.seconds(64)
    assert measured > 0
    it.generate([Request(str(number), tuple(range(20)), max_tokens=4) for number in range(6)])
    assert it._times.seconds(64) != measured
    check_idle(it)


def served(it: Engine, count: int) -> dict[str, list[int]]:
    """Tokens of random requests, which come one or a few a step, share beginnings, and are cancelled at times."""
    draw, arrivals = random.Random(3), random.Random(4)
    starts = [tuple(draw.randrange(97) for _ in range(length)) for length in (5, 30, 60)]
    tokens: dict[str, list[int]] = {}
    coming = []
    for number in range(count):
        text = [*draw.choice(starts), *(draw.randrange(97) for _ in range(draw.randint(1, 40)))]
        sampling = replace(PENALIZED, seed=number) if draw.random() < 0.3 else SamplingParams(temperature=0.0)
        coming.append(Request(str(number), tuple(text), sampling, max_tokens=draw.randint(1, 16), priority=number % 2))
    coming.reverse()
    while coming or it.has_work:
        for _ in range(min(len(coming), arrivals.choice([0, 0, 1, 3]))):
            request = coming.pop()
            it.add(request)
            tokens[request.id] = []
            if int(request.id) % 10 == 9:
                it.cancel(str(int(request.id) - 5))
        for output in it.step():
            tokens[output.request_id] += [token.id for token in output.tokens]
    return tokens


def test_a_budget_may_be_set_within_what_the_engine_was_made_for() -> None:
    it = engine(TINY, max_batch_tokens=64, max_batch_size=4)
    it.set_budget(4)
    it.set_budget(7)
    it.add(Request("0", tuple(range(1, 30)), max_tokens=1))
    steps = 0
    while it.metrics().num_running + it.metrics().num_waiting:
        it.step()
        steps += 1
    assert steps >= 29 / 7
    bounds = "from max_batch_size, 4, to 64, .* found"
    for tokens, tpot_ms, words in ((3, None, f"{bounds} 3"), (65, None, f"{bounds} 65"), (8, 5.0, "made with a tpot")):
        with pytest.raises(ValueError, match=words):
            it.set_budget(tokens, tpot_ms)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_tokens_are_the_same_for_every_budget_and_target(count: int) -> None:
    """Of a request that was cancelled, as many as it had by then."""
    config = replace(TINY, dim=16, num_heads=2, num_kv_heads=1, ffn_dim=16, num_layers=1)
    reference: dict[str, list[int]] | None = None
    for tokens, tpot_ms in ((200, None), (13, None), (200, 1e-3), (200, 1e6), (90, 0.5)):
        it = engine(
            config,
            kv_nbytes=pages_nbytes(config, 60),
            host_kv_nbytes=pages_nbytes(config, 40),
            max_seq_len=128,
            max_batch_size=8,
            max_batch_tokens=tokens,
            tpot_ms=tpot_ms,
            max_waiting=count,
        )
        found = served(it, count)
        reference = reference or found
        for name, ids in found.items():
            shared = min(len(ids), len(reference[name])) if int(name) % 10 == 4 else None
            assert ids[:shared] == reference[name][:shared], (name, tokens, tpot_ms)
        metrics = it.metrics()
        assert metrics.num_preempted > 0 and metrics.num_tokens_cached > 0
        check_idle(it)
