"""What steps took, by times that the tests give."""

from __future__ import annotations

import time

import pytest
import torch

from tests.inference.engine.test_engine import engine, prompts, requests
from yafsdp_like.inference.engine.step_log import NUM_KEPT, StepLog, quantile
from yafsdp_like.memory.streams import Timer


def log() -> StepLog:
    return StepLog(Timer(torch.device("cpu")))  # whose events are seconds


def test_a_device_waits_from_the_end_of_a_step_to_the_beginning_of_the_next() -> None:
    it = log()
    assert it.add_device(10.0, 12.0) == (2.0, 0.0)
    assert it.add_device(12.5, 15.5) == (3.0, 0.5)
    it.pause()  # nobody asked anything: no wait
    assert it.add_device(100.0, 101.0) == (1.0, 0.0)
    figures = it.figures()
    assert (figures.device_busy_seconds, figures.device_waiting_seconds) == (6.0, 0.5)
    assert figures.device_waiting_share == pytest.approx(0.5 / 6.5)


def test_a_step_has_to_spare_what_the_device_computes_beside_the_cpu_and_a_seventh_of_itself_in_any_case() -> None:
    it = log()
    assert it.spare_s == 0.0
    it.add_device(10.0, 12.0)
    it.add_cpu(0.5, mixed=False)
    assert it.spare_s == pytest.approx(0.9 * 2.0 - 0.5)
    it.add_device(12.5, 14.0)
    it.add_cpu(1.9, mixed=True)
    assert it.spare_s == pytest.approx(0.15 * 2.0)


def test_the_share_is_of_the_last_steps_and_sums_are_of_all() -> None:
    it = log()
    it.add_device(0.0, 1.0)
    it.add_device(3.0, 4.0)
    for number in range(NUM_KEPT):
        it.add_device(4.0 + number, 5.0 + number)
    figures = it.figures()
    assert (figures.device_waiting_share, figures.device_waiting_seconds) == (0.0, 2.0)
    assert figures.device_busy_seconds == 2 + NUM_KEPT


def test_the_cpus_time_is_told_apart_by_whether_prompts_were_computed() -> None:
    it = log()
    assert set(vars(it.figures()).values()) == {0.0}
    for number in range(1, 101):
        it.add_cpu(number / 100, mixed=False)
    it.add_cpu(7.0, mixed=True)
    figures = it.figures()
    assert (figures.decode_step_cpu_p50_seconds, figures.decode_step_cpu_p99_seconds) == (0.5, 0.99)
    assert figures.mixed_step_cpu_p50_seconds == figures.mixed_step_cpu_p99_seconds == 7.0


def test_a_quantile_is_one_of_the_values() -> None:
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("lookahead", [True, False])
def test_an_engine_counts_the_seconds_of_its_steps(lookahead: bool) -> None:
    it = engine(lookahead=lookahead)
    begin = time.perf_counter()
    it.generate(requests(prompts(5)))
    whole, metrics = time.perf_counter() - begin, it.metrics()
    assert 0 < metrics.device_busy_seconds < metrics.device_busy_seconds + metrics.device_waiting_seconds <= whole
    assert 0 < metrics.device_waiting_share < 1
    assert 0 < metrics.decode_step_cpu_p50_seconds <= metrics.decode_step_cpu_p99_seconds < whole
    assert 0 < metrics.mixed_step_cpu_p50_seconds <= metrics.mixed_step_cpu_p99_seconds < whole
    assert it.step_log._last_done is None  # while nobody asks, it does not wait: see `pause`
