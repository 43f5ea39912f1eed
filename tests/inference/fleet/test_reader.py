"""When tokens are due, and how long a reader is stalled who takes them at a pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yafsdp_like.inference.fleet.reader import Reader, Targets
from yafsdp_like.inference.fleet.times import LearnedTimes, StepLines


def read(targets: Targets, *times: float) -> Reader:
    reader = Reader(targets, 0.0)
    for at in times:
        reader.deliver(at)
    return reader


def test_the_share_in_time_is_that_of_the_published_example() -> None:
    """Targets of 3 and 2 s, tokens at 3, 6, 7 and 8 s: in time from 0 to 3 and from 6 to 8, of 8 s."""
    reader = read(Targets(3.0, 2.0), 3.0, 6.0, 7.0, 8.0)
    assert reader.share_in_time == 5 / 8 and reader.num_late == 1


def test_early_tokens_buy_time_for_later_ones() -> None:
    assert read(Targets(10.0, 1.0), 1.0, 1.1, 1.2, 12.9).num_late == 0
    assert read(Targets(10.0, 1.0), 1.0, 1.1, 1.2, 13.1).num_late == 1


def test_after_a_stall_the_reader_goes_on_from_the_late_token() -> None:
    reader = read(Targets(10.0, 1.0), 20.0, 21.0, 22.0, 24.0)
    assert (reader.num_late, reader.stalled_s, reader.due) == (2, 20.0 + 2.0, 25.0)
    assert reader.share_in_time == pytest.approx(2 / 24)


def test_a_request_of_no_time_was_in_time() -> None:
    assert read(Targets(1.0, 1.0), 0.0).share_in_time == 1.0


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30), st.integers(0, 60)), min_size=1, max_size=8),
    st.integers(1, 100),
    st.integers(1, 20),
)
def test_many_tokens_at_once_count_as_one_by_one(runs: list[tuple[int, int, int]], ttft: int, tpot: int) -> None:
    """Times are whole numbers, so that sums of floats are exact: runs of tokens with a spacing, pauses between them."""
    targets = Targets(float(ttft), float(tpot))
    together, single, at = Reader(targets, 0.0), Reader(targets, 0.0), 0
    for count, spacing, pause in runs:
        at += pause + 1
        together.deliver(float(at), count, float(spacing))
        for index in range(count):
            single.deliver(float(at + index * spacing))
        at += (count - 1) * spacing
    assert vars(together) == vars(single)
    assert 0.0 <= together.stalled_s <= together.last_at


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0), (float("nan"), 1.0)])
def test_targets_that_no_step_can_keep_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        Targets(*values)


def test_times_are_corrected_by_steps_and_by_no_single_one_much() -> None:
    times = LearnedTimes(StepLines(0.01, 0.001, prefill_base_s=0.002, prefill_row_s=1e-5))
    times.learn_decode(4, 0, 1.4)
    assert times.decode_s(4) == 1.4 and times.prefill_s(800) == 0.01
    for _ in range(200):
        times.learn_decode(4, 0, 0.028)
        times.learn_prefill(800, 0.005)
    assert times.decode_s(4) == pytest.approx(0.028, rel=1e-3)
    assert times.prefill_s(800) == pytest.approx(0.005, rel=1e-3)
    before = times.decode_s(4)
    times.learn_decode(4, 0, 100.0)
    assert before < times.decode_s(4) < 1.5 * before
    assert times.prefill_s(0) == 0.0


def test_lengths_are_a_mean_that_forgets() -> None:
    times = LearnedTimes(StepLines(0.01))
    assert times.num_drawn is None
    for count in (10, 20, 30):
        times.learn_length(count)
    assert times.num_drawn == 20
    for _ in range(2000):
        times.learn_length(100)
    assert times.num_drawn == pytest.approx(100)


def test_lines_of_no_time_are_refused() -> None:
    with pytest.raises(ValueError, match="decode_base_s above 0"):
        StepLines(0.0)
    with pytest.raises(ValueError, match="nothing below 0"):
        StepLines(0.1, decode_row_s=-1.0)
