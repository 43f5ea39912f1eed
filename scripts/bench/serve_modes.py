"""Weights shared by ranks: steps that decode and chunks of prompts on all at once, beside computing and gathering."""

import statistics
import time
from collections.abc import Iterator

from bench import serve_decode, serve_prefill
from bench.ranks import gathered
from bench.report import Row
from bench.serve_engine import Bench
from bench.serve_floors import (
    MeasuredRates,
    Rate,
    decode_floor_s,
    gather_floor_s,
    known_peer_rate,
    num_sharers,
    prefill_floor_s,
)

GATHERS = 5  # forwards without a reader, which gather and do no more


def measure(bench: Bench, rates: MeasuredRates) -> Iterator[Row]:
    """A row per batch, and one of chunks; ms of the slowest rank, tokens a second of all."""
    plan, options = bench.served.plan, bench.options
    gather = gathering(bench) if plan.mode == "gathered" else {"gather_floor_ms": 0.0}
    for batch in options.batches:
        wait_for_all_ranks(bench)
        row = serve_decode.measured(bench, batch)
        floor = slowest(bench, 1e3 * decode_floor_s(plan, batch, row["context"], rates))
        step = slowest(bench, row["step_ms"]["median"])
        yield whole({"work": "decode", "batch": batch, "context": row["context"], **gather}, batch, step, floor, bench)
    yield chunk_row(bench, rates, gather)


def gathering(bench: Bench) -> Row:
    """What gathering takes by itself, at least and measured."""
    alone = slowest(bench, statistics.median(gather_ms(bench) for _ in range(GATHERS)))
    peer = known_peer_rate(bench.options, bench.world.device) or measured_peer_rate(bench, alone)
    return {
        "gather_alone_ms": alone,
        "gather_floor_ms": 1e3 * gather_floor_s(bench.served.plan, peer.value),
        "peer_rate": peer.value,
        "peer_rate_is": peer.how,
    }


def chunk_row(bench: Bench, rates: MeasuredRates, gather: Row) -> Row:
    """Of all of a long prompt's chunks together, so that ``floor_ms`` counts as many gathers as there are chunks."""
    wait_for_all_ranks(bench)
    row, num_tokens = serve_prefill.measured(bench), bench.options.prefill_tokens
    num_chunks = len(row["chunk_ms"])
    floor = slowest(bench, 1e3 * prefill_floor_s(bench.served.plan, num_tokens, rates)) / num_chunks
    step = slowest(bench, 1e3 * row["seconds"]["median"]) / num_chunks
    described = {"work": "prefill", "batch": 1, "chunk": row["chunk"], **gather}
    return whole(described, num_tokens / num_chunks, step, floor, bench)


def whole(row: Row, num_tokens: float, step_ms: float, compute_floor_ms: float, bench: Bench) -> Row:
    """``num_tokens`` are those of one rank's step, which ranks that compute together share."""
    num_steps = bench.world.size // num_sharers(bench.served.plan)  # at a time
    floor = max(compute_floor_ms, row["gather_floor_ms"])
    return {
        **row,
        "step_ms": step_ms,
        "compute_floor_ms": compute_floor_ms,
        "floor_ms": floor,
        "ratio_to_floor": step_ms / floor,
        "tokens_per_second": num_steps * num_tokens / (step_ms / 1e3),
    }


def gather_ms(bench: Bench) -> float:
    """Everything that a forward gathers, and nothing computed."""
    weights = bench.served.weights
    wait_for_all_ranks(bench)
    begin = time.perf_counter()
    weights.embedding()
    for index in range(weights.config.num_layers):
        weights.layer(index)
        weights.release(index)
    weights.head()
    bench.world.synchronize()
    return (time.perf_counter() - begin) * 1e3


def measured_peer_rate(bench: Bench, alone_ms: float) -> Rate:
    """From the gathers that were timed, where the device's is not known: a floor that only computing can raise."""
    return Rate(gather_floor_s(bench.served.plan, 1.0) / (alone_ms / 1e3), "measured: gathering alone")


def wait_for_all_ranks(bench: Bench) -> None:
    """So that all ranks load the link at the same time."""
    bench.world.synchronize()
    gathered(None, bench.world)


def slowest(bench: Bench, value: float) -> float:
    """Return the largest value of all ranks."""
    return max(gathered(value, bench.world))
