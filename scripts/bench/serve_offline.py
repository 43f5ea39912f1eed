"""Requests that are all there from the beginning: tokens a second until the last has ended."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from bench.report import Row, spread
from bench.serve_engine import Bench
from bench.serve_floors import MeasuredRates, offline_floor_s
from bench.serve_poisson import waits

OURS = "ours"


def measure(bench: Bench, rates: MeasuredRates) -> Iterator[Row]:
    """A row per number of requests."""
    options = bench.options
    for count in options.num_requests:
        batch = min(count, options.max_batch_size)
        floor = offline_floor_s(bench.served.plan, count, batch, options.prompt_tokens, options.new_tokens, rates)
        before = bench.served.engine.metrics()
        row = row_of(OURS, count, bench, partial(generate_s, bench, count))
        waited = waits(before, bench.served.engine.metrics())
        yield {**row, "floor_seconds": floor, "share_of_floor": floor / row["seconds"]["median"], **waited}


def measure_mixed(bench: Bench) -> Iterator[Row]:
    """The one row, of requests of many lengths that are all there from the beginning."""
    lengths = bench.options.mixed_lengths
    before, begin = bench.served.engine.metrics(), time.perf_counter()
    completions = bench.served.engine.generate([bench.requests.one(*pair) for pair in lengths])
    seconds, num_tokens = time.perf_counter() - begin, sum(new for _, new in lengths)
    if sum(len(completion.tokens) for completion in completions.values()) != num_tokens:
        raise RuntimeError(f"{len(lengths)} requests were to draw {num_tokens} tokens in all")
    after = bench.served.engine.metrics()
    yield {
        "num_requests": len(lengths),
        "num_prompt_tokens": sum(prompt for prompt, _ in lengths),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "num_steps": after.num_steps - before.num_steps,
        "num_chunks": after.num_chunks - before.num_chunks,
        "num_preempted": after.num_preempted - before.num_preempted,
        **waits(before, after),
    }


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
