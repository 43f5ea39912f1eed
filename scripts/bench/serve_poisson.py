"""Requests that arrive at random times, whether the engine is ready or not: latencies against rate."""

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.report import Row
from bench.serve_engine import Bench, Requests
from bench.serve_options import ServeBenchOptions
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request

PERCENTS = (50, 95, 99)
MIN_REQUESTS = 8


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes, in seconds after the start."""

    at: float
    request: Request


@dataclass
class ServedRequest:
    """When a request's tokens came, in seconds after the start."""

    arrival: Arrival
    tokens_at: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        """From its arrival, whenever the engine took notice."""
        return 1e3 * (self.tokens_at[0] - self.arrival.at)

    @property
    def between_ms(self) -> list[float]:
        """The times between its tokens."""
        return [1e3 * (after - before) for before, after in pairwise(self.tokens_at)]


def measure(bench: Bench) -> Iterator[Row]:
    """A row per rate, in the order given."""
    for rate in bench.options.rates:
        arrivals = arrivals_at(rate, bench.options, bench.requests)
        yield row_of(rate, play(bench.served.engine, arrivals))


def arrivals_at(rate: float, options: ServeBenchOptions, requests: Requests) -> list[Arrival]:
    """As many as the rate gives in ``options.seconds``; the times between them are exponentially distributed."""
    clock, at, arrivals = random.Random(f"arrivals {rate}"), 0.0, []
    for _ in range(max(MIN_REQUESTS, round(rate * options.seconds))):
        at += clock.expovariate(rate)
        arrivals.append(Arrival(at, requests.one(options.prompt_tokens, options.new_tokens)))
    return arrivals


def play(engine: Engine, arrivals: Sequence[Arrival]) -> list[ServedRequest]:
    """Serves all, each from its time on; QueueFullError where too many wait."""
    served = {arrival.request.id: ServedRequest(arrival) for arrival in arrivals}
    coming, start = list(reversed(arrivals)), time.perf_counter()
    while coming or engine.has_work:
        now = time.perf_counter() - start
        while coming and coming[-1].at <= now:
            engine.add(coming.pop().request)
        if not engine.has_work:
            time.sleep(max(0.0, coming[-1].at - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            served[output.request_id].tokens_at += [now] * len(output.tokens)
    return list(served.values())


def row_of(rate: float, served: Sequence[ServedRequest]) -> Row:
    """Return the row of one rate: percentiles of latencies, and tokens a second."""
    seconds = max(one.tokens_at[-1] for one in served) - served[0].arrival.at
    num_tokens = sum(len(one.tokens_at) for one in served)
    return {
        "rate": rate,
        "num_requests": len(served),
        "seconds": seconds,
        "first_token_ms": percentiles([one.first_ms for one in served]),
        "between_tokens_ms": percentiles([ms for one in served for ms in one.between_ms]),
        "tokens_per_second": num_tokens / seconds,
        "requests_per_second": len(served) / seconds,
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The smallest value that so many per cent of all do not exceed; None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTS}
