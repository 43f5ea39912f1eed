"""Requests that are all there from the beginning: tokens a second until the last has ended."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from bench.report import Row, spread
from bench.serve_engine import Bench
from bench.serve_floors import MeasuredRates, offline_floor_s

OURS = "ours"


def measure(bench: Bench, rates: MeasuredRates) -> Iterator[Row]:
    """A row per number of requests."""
    options = bench.options
    for count in options.num_requests:
        batch = min(count, options.max_batch_size)
        floor = offline_floor_s(bench.served.plan, count, batch, options.prompt_tokens, options.new_tokens, rates)
        row = row_of(OURS, count, bench, partial(generate_s, bench, count))
        yield {**row, "floor_seconds": floor, "share_of_floor": floor / row["seconds"]["median"]}


def generate_s(bench: Bench, count: int) -> float:
    """Seconds until all have ended."""
    requests = bench.requests.many(count, bench.options.prompt_tokens, bench.options.new_tokens)
    begin = time.perf_counter()
    completions = bench.served.engine.generate(requests)
    seconds = time.perf_counter() - begin
    check_count(sum(len(completion.tokens) for completion in completions.values()), count, bench)
    return seconds


def check_count(num_tokens: int, count: int, bench: Bench) -> None:
    """Raises RuntimeError unless all that was asked for was drawn: a rate of anything else means nothing."""
    expected = count * bench.options.new_tokens
    if num_tokens != expected:
        raise RuntimeError(f"{count} requests were to draw {expected} tokens in all, and drew {num_tokens}")


def row_of(impl: str, count: int, bench: Bench, round_s: Callable[[], float]) -> Row:
    """``round_s`` gives the seconds of one round; the first warms up."""
    round_s()
    seconds = spread([round_s() for _ in range(max(1, bench.options.rounds // 3))])
    assert seconds is not None
    num_tokens = count * bench.options.new_tokens
    return {
        "impl": impl,
        "num_requests": count,
        "status": "ok",
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds["median"],
    }
