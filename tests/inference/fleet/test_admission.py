"""Who is refused, why, and that coming back after the time that was told helps; and where requests are sent."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.fleet.test_schedule import TARGETS, Play, job, play, spec
from yafsdp_like.inference.fleet.admission import MIN_WAIT_S
from yafsdp_like.inference.fleet.queues import UNKNOWN_TOKENS
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.fleet.schedule import ScheduleOptions, TokenScheduler
from yafsdp_like.inference.fleet.times import StepLines

LIMITED = ScheduleOptions()
HALF = StepLines(0.04, 0.0, 0.0, 0.01, 0.0)  # 40 % of a device, and switches


def test_a_model_that_does_not_fit_beside_others_is_refused_until_they_have_ended() -> None:
    played = play(3, LIMITED, lines=HALF, switch_s=0.05)
    assert played.ask(job(0, "m0"), 100) and played.ask(job(1, "m1"), 100)
    refusal = played.scheduler.arrived(job(2, "m2"), played.now)
    assert refusal is not None and "of the device" in refusal.reason
    assert played.ask(job(3, "m0"), 100), "one more for a model that runs costs next to nothing"
    while played.now < refusal.retry_after_s:
        if played.step(most=10) is None:
            played.now = refusal.retry_after_s
    assert played.ask(job(4, "m2"), 100)


def test_prompts_that_leave_no_time_are_refused_and_so_is_a_full_batch() -> None:
    slow = spec(lines=StepLines(0.01, 0.0, 0.0, 0.0, 0.01))
    scheduler = TokenScheduler({"m0": slow, "m1": spec()}, LIMITED)
    assert scheduler.arrived(job(0, "m0", 390), 0.0) is None
    refusal = scheduler.arrived(job(1, "m0", 390), 0.0)
    assert refusal is not None and "prompts that wait" in refusal.reason
    assert scheduler.arrived(job(2, "m1", 1), 0.0) is not None, "another model's prompts would wait as long"
    full = TokenScheduler({"m0": spec(max_batch=2)}, LIMITED)
    assert [full.arrived(job(number, "m0"), 0.0) is None for number in range(3)] == [True, True, False]


def test_a_prompt_that_is_too_long_itself_is_said_to_be_and_may_come_once_nothing_is_under_way() -> None:
    slow = spec(lines=StepLines(0.01, 0.0, 0.0, 0.0, 0.01))
    scheduler = TokenScheduler({"m0": slow, "m1": spec()}, LIMITED)
    assert scheduler.arrived(job(0, "m1", 1), 0.0) is None
    refusal = scheduler.arrived(job(1, "m0", 500), 0.0)
    assert refusal is not None and "its own prompt and the switch to its model take 5.1 s" in refusal.reason
    assert refusal.retry_after_s == pytest.approx(UNKNOWN_TOKENS * TARGETS.tpot_s)
    scheduler.ended("m1", "0")
    assert scheduler.arrived(job(1, "m0", 500), 0.0) is None


def test_a_step_that_is_longer_than_the_pace_is_refused() -> None:
    scheduler = TokenScheduler({"m0": spec(lines=StepLines(0.06, 0.02), max_batch=64)}, LIMITED)
    admitted = [scheduler.arrived(job(number, "m0"), 0.0) is None for number in range(4)]
    assert admitted == [True, True, False, False]


def test_keys_and_values_that_have_no_room_beside_the_models_under_way_are_refused() -> None:
    """A token has 10 bytes; a request ends with 100 + 256 tokens, as nobody knows better yet, of which two fit."""
    homes = {"m0": range(1000), "m1": range(500, 1500)}
    specs = {name: replace(spec(), kv_nbytes=10.0, home=home) for name, home in homes.items()}
    scheduler = TokenScheduler(specs, replace(LIMITED, memory_nbytes=1500 + 2 * 3560 + 100))
    assert scheduler.arrived(job(0, "m0"), 0.0) is None and scheduler.arrived(job(1, "m1"), 0.0) is None
    refusal = scheduler.arrived(job(2, "m1"), 0.0)
    assert refusal is not None and "would take 11.89 KiB of 8.52 KiB" in refusal.reason
    assert refusal.retry_after_s == pytest.approx(UNKNOWN_TOKENS * TARGETS.tpot_s)
    scheduler.ended("m0", "0")
    assert scheduler.arrived(job(3, "m1"), 0.0) is None


def test_a_tenant_with_more_than_its_share_is_refused_first() -> None:
    scheduler = TokenScheduler({f"m{i}": spec(lines=StepLines(0.02), switch_s=0.0) for i in range(6)}, LIMITED)
    for number in range(4):
        assert scheduler.arrived(job(number, f"m{number}", tenant="flood"), 0.0) is None
    assert scheduler.arrived(job(4, "m0", tenant="other"), 0.0) is None
    assert scheduler.arrived(job(5, "m4", tenant="flood"), 0.0) is not None
    assert scheduler.arrived(job(6, "m4", tenant="other"), 0.0) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 400), st.integers(1, 80)), min_size=1, max_size=80))
def test_whoever_is_admitted_is_served_in_time_and_others_are_told_when_to_come(asked: list[tuple[int, ...]]) -> None:
    """Requests of eight models, far more than fit, come as fast as the device makes turns."""
    played = Play(TokenScheduler({f"m{i}": spec(TARGETS, HALF, 0.05) for i in range(8)}, LIMITED))
    for number, (model, prompt, tokens) in enumerate(asked):
        before = set(played.left)
        refusal = played.scheduler.arrived(job(number, f"m{model}", prompt), played.now)
        if refusal is None:
            played.left[str(number)] = tokens
        else:
            assert set(played.left) == before and refusal.retry_after_s >= MIN_WAIT_S
        played.step(most=5)
    played.drain()
    assert [reader.num_late for reader in played.readers.values()] == [0] * len(played.readers)
    assert played.readers


def test_targets_differ_by_model() -> None:
    """The one with tight targets is served in time beside one with loose ones."""
    models = {"tight": spec(Targets(0.5, 0.03)), "loose": spec(Targets(10.0, 0.5))}
    played = Play(TokenScheduler(models, ScheduleOptions(admission_load=None, min_round=0.2)))
    for number in range(6):
        played.ask(job(number, "tight" if number % 2 else "loose"), 60)
    played.drain()
    assert [reader.num_late for reader in played.readers.values()] == [0] * 6
