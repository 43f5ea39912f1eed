"""Arrivals of the serving benchmark: budgets of a step, capacity, other engines' figures, and requests over HTTP."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from bench import serve_http, serve_poisson
from bench.serve_engine import Bench, Requests
from bench.serve_poisson import Arrival, budget, capacity, play, play_http, rows_beside, waits
from tests.scripts.test_bench_serve import TINY, options_of, tiny_engine
from yafsdp_like.inference.engine.step_log import StepFigures
from yafsdp_like.inference.text.codec import Transcript

if TYPE_CHECKING:
    from pathlib import Path

    from yafsdp_like.inference.engine.metrics import Metrics


def test_rates_are_requests_a_second_or_shares_of_what_is_possible() -> None:
    options = options_of("--batch", "2", "--rate", "12,70%,24,90%", "--chunk", "32,8", "--tpot-ms", "15")
    assert options.rates == (12.0, 24.0) and options.capacity_shares == (0.7, 0.9)
    assert options.budgets == [(8, None), (32, None), (32, 15.0)]
    assert options_of("--batch", "2").budgets == [(32, None)]


def test_requests_of_mixed_lengths_are_the_same_in_every_run_and_have_room() -> None:
    options = options_of("--batch", "2", "--mixed-requests", "50")
    lengths = options.mixed_lengths
    assert lengths == options.mixed_lengths and len(set(lengths)) == 50
    assert all(64 <= prompt <= 1024 and 32 <= new <= 256 for prompt, new in lengths)
    assert options.num_context_tokens >= sum(sorted(map(sum, lengths))[-2:])
    assert options.max_seq_len >= max(map(sum, lengths))


def test_an_engine_has_another_budget_for_a_while() -> None:
    engine = tiny_engine(options_of("--batch", "2"))
    with pytest.raises(ZeroDivisionError), budget(engine, 8, None):
        assert engine._scheduler.options.max_batch_tokens == 8
        raise ZeroDivisionError
    assert engine._scheduler.options == engine.options


def test_no_more_requests_are_open_than_there_are_clients() -> None:
    engine = tiny_engine(options_of("--batch", "4"))
    requests = Requests(TINY.vocab_size).many(7, 5, 3)
    most, plain = list[int](), engine.step

    def counted() -> object:
        most.append(engine.metrics().num_running + engine.metrics().num_waiting)
        return plain()

    engine.step = counted  # type: ignore[assignment,method-assign]
    served = play(engine, [Arrival(0.0, request) for request in requests], most=2)
    assert max(most) == 2 and [len(one.tokens_at) for one in served] == [3] * 7


def test_capacity_is_the_rate_at_which_requests_end_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 that end a second apart but for the first and the last."""
    ends = [100.0, *(101.0 + number for number in range(10)), 500.0]
    monkeypatch.setattr(
        serve_poisson, "play", lambda engine, arrivals: [SimpleNamespace(tokens_at=[end]) for end in ends]
    )
    bench = SimpleNamespace(
        options=options_of("--batch", "4"), requests=Requests(TINY.vocab_size), served=SimpleNamespace(engine=None)
    )
    assert capacity(cast("Bench", bench)) == pytest.approx(1.0)


def test_another_engines_figures_are_found_by_rate_and_chunk(tmp_path: Path) -> None:
    path = tmp_path / "theirs.json"
    row = {"rate": 12.0, "chunk": 512, "first_token_ms": {"p50": 1.0}, "between_tokens_ms": {"p50": 2.0}}
    path.write_text(json.dumps({"results": {"poisson": [row]}}))
    theirs = {"their_first_token_ms": {"p50": 1.0}, "their_between_tokens_ms": {"p50": 2.0}}
    assert rows_beside(path) == {(12.0, 512): theirs} and rows_beside(None) == {}


def figures(**known: float) -> Metrics:
    return cast("Metrics", StepFigures(**{**dict.fromkeys(StepFigures.__dataclass_fields__, 0.0), **known}))


def test_the_share_of_waiting_is_of_the_time_in_between() -> None:
    before = figures(device_busy_seconds=5.0, device_waiting_seconds=5.0)
    after = figures(device_busy_seconds=8.0, device_waiting_seconds=6.0, mixed_step_cpu_p99_seconds=0.002)
    row = waits(before, after)
    assert row["device_waiting_share"] == 0.25 and row["mixed_cpu_ms"] == {"p50": 0.0, "p99": 2.0}


# --- over HTTP ---


def test_requests_over_http_are_answered_token_by_token() -> None:
    if obstacle := serve_http.obstacle():
        pytest.skip(obstacle)
    engine = tiny_engine(options_of("--batch", "4"))
    requests = Requests(TINY.vocab_size).many(5, 20, 6)
    served = play_http(engine, [Arrival(0.05 * number, request) for number, request in enumerate(requests)], 2)
    for number, one in enumerate(served):
        assert len(one.tokens_at) == 6 and one.tokens_at == sorted(one.tokens_at)
        assert one.first_ms > 0 and one.arrival.request is requests[number]
    assert not engine.has_work
    engine.generate(requests[:1])  # in this thread again


def test_clients_that_are_refused_are_an_error() -> None:
    if obstacle := serve_http.obstacle():
        pytest.skip(obstacle)
    engine = tiny_engine(options_of("--batch", "2"))
    with pytest.raises(RuntimeError, match="the clients ended with status 1"):
        serve_http.play(engine, [serve_http.Asked(0.0, (TINY.vocab_size,), 2)], 1)


def test_every_token_is_a_word() -> None:
    if obstacle := serve_http.obstacle():
        pytest.skip(obstacle)
    codec = serve_http.words(40)
    assert codec.vocab_size == 40 and not codec.stop_tokens
    assert codec.decode([3, 39]) == "w3 w39" and Transcript(codec, (1, 2)).finish is None
