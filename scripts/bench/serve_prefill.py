"""One long prompt, in chunks that fill a step each."""

import statistics
import time
from itertools import pairwise

from bench.measure import elapsed_ms, mark
from bench.report import Row, spread
from bench.serve_engine import Bench, Served
from bench.serve_floors import MeasuredRates, prefill_floor_s, streaming_floor_s
from yafsdp_like.inference.engine.request import Request


def measure(bench: Bench, rates: MeasuredRates) -> list[Row]:
    """The one row."""
    row = measured(bench)
    plan, num_chunks = bench.served.plan, len(row["chunk_ms"])
    computing = prefill_floor_s(plan, bench.options.prefill_tokens, rates)
    floor = max(computing, num_chunks * streaming_floor_s(plan, rates))
    seconds = row["seconds"]["median"]
    return [
        {
            **row,
            "tflops": computing * rates.matmul.value / seconds / 1e12,
            "floor_seconds": floor,
            "share_of_floor": floor / seconds,
        }
    ]


def measured(bench: Bench) -> Row:
    """Seconds by the clock, from ``add`` until the first token is read; and chunks' own ms, by their place."""
    options, served = bench.options, bench.served
    chunks, seconds = [], []
    for round_index in range(1 + options.rounds):
        request = bench.requests.one(options.prefill_tokens, 1)
        begin = time.perf_counter()
        chunks_ms = prefill(served, request)
        if round_index > 0:  # the first warms up
            seconds.append(time.perf_counter() - begin)
            chunks.append(chunks_ms)
    return {
        "num_tokens": options.prefill_tokens,
        "chunk": min(options.max_batch_tokens, options.prefill_tokens),
        "seconds": spread(seconds),
        "tokens_per_second": options.prefill_tokens / statistics.median(seconds),
        "chunk_ms": [statistics.median(times) for times in zip(*chunks, strict=True)],
    }


def prefill(served: Served, request: Request) -> list[float]:
    """The first token of a request: ms of each step until it is drawn, by events on the device where it has them."""
    served.engine.add(request)
    num_chunks = -(-len(request.prompt) // served.engine.options.max_batch_tokens)
    marks = [mark(served.device)]
    for _ in range(num_chunks):
        served.engine.step()
        marks.append(mark(served.device))
    served.drain()
    return [elapsed_ms(begin, end) for begin, end in pairwise(marks)]
