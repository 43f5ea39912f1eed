"""Requests that arrive at random times, whether the engine is ready or not: latencies against rate."""

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from bench import serve_http
from bench.ranks import say
from bench.report import Row
from bench.serve_engine import Bench, Requests
from bench.serve_options import ServeBenchOptions
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.metrics import Metrics
from yafsdp_like.inference.engine.request import Request, RequestOutput

PERCENTS = (50, 95, 99)
MIN_REQUESTS = 8
IN_PROCESS, HTTP = "in process", "HTTP"
FILLS = 3  # of the largest batch, by which capacity is measured


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


Play = Callable[[Sequence[Arrival]], list[ServedRequest]]


def measure(bench: Bench) -> Iterator[Row]:
    """A row per way, budget and rate, in the order given; in process first."""
    options, beside = bench.options, rows_beside(bench.options.beside)
    most = capacity(bench) if options.capacity_shares else 0.0
    rates = *options.rates, *(share * most for share in options.capacity_shares)
    for way, play_all in ways(bench).items():
        for chunk, tpot_ms in options.budgets:
            with budget(bench.served.engine, chunk, tpot_ms):
                for rate in rates:
                    row = {"way": way, "chunk": chunk, "tpot_ms": tpot_ms, **measured(rate, bench, play_all)}
                    yield {**row, **(beside.get((rate, chunk), {}) if tpot_ms is None else {})}


def measured(rate: float, bench: Bench, play_all: Play) -> Row:
    """The row of one rate, and what the CPU and the device did while its requests were served."""
    arrivals = arrivals_at(rate, bench.options, bench.requests)
    before = bench.served.engine.metrics()
    served = play_all(arrivals)
    return {**row_of(rate, served), **waits(before, bench.served.engine.metrics())}


def measure_connections(bench: Bench) -> Iterator[Row]:
    """A row per way: clients that each send a request as soon as the one before has been answered."""
    count = bench.options.connections
    requests = bench.requests.many(FILLS * count, bench.options.prompt_tokens, bench.options.new_tokens)
    arrivals, rows = [Arrival(0.0, request) for request in requests], list[Row]()
    for way, play_all in ways(bench, count).items():
        before = bench.served.engine.metrics()
        row = row_of(None, play_all(arrivals))
        rows.append({"way": way, "connections": count, **row, **waits(before, bench.served.engine.metrics())})
        yield {**rows[-1], "of_in_process": row["tokens_per_second"] / rows[0]["tokens_per_second"]}


def ways(bench: Bench, most: int | None = None) -> dict[str, Play]:
    """How requests get to the engine, ``most`` at a time: by calls, and over HTTP where that is installed."""
    engine = bench.served.engine
    found: dict[str, Play] = {IN_PROCESS: lambda arrivals: play(engine, arrivals, most)}
    if bench.options.http:
        if obstacle := serve_http.obstacle():
            say(bench.world, f"HTTP is left out: {obstacle}")
        else:
            found[HTTP] = lambda arrivals: play_http(engine, arrivals, most)
    return found


def play_http(engine: Engine, arrivals: Sequence[Arrival], most: int | None) -> list[ServedRequest]:
    """The same by a client of its own process, whose clock it is."""
    asked = [serve_http.Asked(arrival.at, arrival.request.prompt, arrival.request.max_tokens) for arrival in arrivals]
    times = serve_http.play(engine, asked, most or len(asked))
    return [ServedRequest(arrival, tokens_at) for arrival, tokens_at in zip(arrivals, times, strict=True)]


@contextlib.contextmanager
def budget(engine: Engine, chunk: int, tpot_ms: float | None) -> Iterator[None]:
    """Have an engine make its steps with another budget, within the one that it was made for."""
    engine.set_budget(chunk, tpot_ms)
    try:
        yield
    finally:
        engine.set_budget(engine.options.max_batch_tokens, engine.options.tpot_ms)


def arrivals_at(rate: float, options: ServeBenchOptions, requests: Requests) -> list[Arrival]:
    """As many as the rate gives in ``options.seconds``; the times between them are exponentially distributed."""
    clock, at, arrivals = random.Random(f"arrivals {rate}"), 0.0, []
    for _ in range(max(MIN_REQUESTS, round(rate * options.seconds))):
        at += clock.expovariate(rate)
        arrivals.append(Arrival(at, requests.one(options.prompt_tokens, options.new_tokens)))
    return arrivals


def play(engine: Engine, arrivals: Sequence[Arrival], most: int | None = None) -> list[ServedRequest]:
    """Serves all, each from its time on, ``most`` at a time; QueueFullError where too many wait.

    Between steps it only notes the time: what came is sorted out at the end.
    """
    log: list[tuple[float, list[RequestOutput]]] = []
    coming, start, num_open = list(reversed(arrivals)), time.perf_counter(), 0
    while coming or engine.has_work:
        now = time.perf_counter() - start
        while coming and coming[-1].at <= now and (most is None or num_open < most):
            engine.add(coming.pop().request)
            num_open += 1
        if wait_s := engine.rest_s if engine.has_work else math.inf:
            may_come = coming and (most is None or num_open < most)
            time.sleep(min(wait_s, max(0.0, coming[-1].at - now) if may_come else math.inf))
            continue
        outputs = engine.step()
        log.append((time.perf_counter() - start, outputs))
        if most is not None:
            num_open -= sum(output.finish is not None for output in outputs)
    served = {arrival.request.id: ServedRequest(arrival) for arrival in arrivals}
    for now, outputs in log:
        for output in outputs:
            served[output.request_id].tokens_at += [now] * len(output.tokens)
    return list(served.values())


def capacity(bench: Bench) -> float:
    """Requests a second that the engine ends in the middle half of many that were there from the beginning."""
    options = bench.options
    requests = bench.requests.many(FILLS * options.max_batch_size, options.prompt_tokens, options.new_tokens)
    served = play(bench.served.engine, [Arrival(0.0, request) for request in requests])
    ends = sorted(one.tokens_at[-1] for one in served)
    first, last = len(ends) // 4, 3 * len(ends) // 4
    return (last - first) / max(ends[last] - ends[first], 1e-9)


def row_of(rate: float | None, served: Sequence[ServedRequest]) -> Row:
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


def waits(before: Metrics, after: Metrics) -> Row:
    """What share of the time the device waited for the CPU in between, and the CPU's ms of the last steps."""
    busy = after.device_busy_seconds - before.device_busy_seconds
    waiting = after.device_waiting_seconds - before.device_waiting_seconds
    return {
        "device_waiting_share": waiting / (busy + waiting),
        "mixed_cpu_ms": cpu_ms(after.mixed_step_cpu_p50_seconds, after.mixed_step_cpu_p99_seconds),
        "decode_cpu_ms": cpu_ms(after.decode_step_cpu_p50_seconds, after.decode_step_cpu_p99_seconds),
    }


def cpu_ms(p50: float, p99: float) -> dict[str, float]:
    """Seconds as percentiles in ms."""
    return {"p50": 1e3 * p50, "p99": 1e3 * p99}


def rows_beside(path: Path | None) -> dict[tuple[float, int], Row]:
    """Another engine's arrivals, by rate and chunk: fields that are added to rows of ours."""
    rows = [] if path is None else json.loads(path.read_text())["results"]["poisson"]
    return {
        (row["rate"], row["chunk"]): {
            "their_first_token_ms": row["first_token_ms"],
            "their_between_tokens_ms": row["between_tokens_ms"],
        }
        for row in rows
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The smallest value that so many per cent of all do not exceed; None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in PERCENTS}
