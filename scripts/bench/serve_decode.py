"""Steps in which every sequence of a batch draws a token, against batch."""

import statistics
import time
from collections.abc import Iterator

import torch

from bench.measure import elapsed_ms, mark
from bench.report import Row, spread
from bench.serve_engine import Bench, Decoding
from bench.serve_floors import MeasuredRates, decode_floor_s, streaming_floor_s
from bench.serve_options import NUM_HELD

HOLD_CYCLES = 60_000_000  # of a device at up to 2 GHz: longer than the CPU takes to issue a step


def measure(bench: Bench, rates: MeasuredRates) -> Iterator[Row]:
    """A row per batch."""
    for batch in bench.options.batches:
        row = measured(bench, batch)
        plan = bench.served.plan
        floor = max(decode_floor_s(plan, batch, row["context"], rates), streaming_floor_s(plan, rates))
        yield {**row, **beside_the_floor(row, floor)}


def measured(bench: Bench, batch: int) -> Row:
    """Times of one batch's steps in ms; ``context`` is the mean of its sequences in the middle of the timed steps."""
    options, engine = bench.options, bench.served.engine
    room = options.decode_length(batch) - options.decode_prompt
    preempted = engine.metrics().num_preempted
    decoding = Decoding(engine, bench.requests.many(batch, options.decode_prompt, room))
    decoding.fill()
    for _ in range(options.warmup):
        decoding.step()
    first = decoding.context
    times = [step_ms(decoding) for _ in range(options.steps)]
    context = (first + decoding.context) / 2
    held = [held_ms(decoding, bench.served.device) for _ in range(NUM_HELD)] if bench.world.size == 1 else []
    decoding.stop()
    if engine.metrics().num_preempted != preempted:
        raise RuntimeError(f"a batch of {batch} did not fit: sequences were preempted while it was measured")
    return {
        "batch": batch,
        "context": context,
        "step_ms": spread(times),
        "device_ms": spread([ms for ms in held if ms is not None]),
        "tokens_per_second": batch / (statistics.median(times) / 1e3),
    }


def step_ms(decoding: Decoding) -> float:
    """By the clock, from return to return: tokens of the step before have been read then."""
    begin = time.perf_counter()
    decoding.step()
    return (time.perf_counter() - begin) * 1e3


def held_ms(decoding: Decoding, device: torch.device) -> float | None:
    """Of the device alone, which is held busy until it has all of the step's work; None where there are no events."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HOLD_CYCLES)
    begin = mark(device)
    decoding.step()
    end = mark(device)
    torch.cuda.synchronize(device)
    return elapsed_ms(begin, end)


def beside_the_floor(row: Row, floor_s: float) -> Row:
    """Shares of the floor's rate that are reached, by the clock and by the device's own time."""
    floor_ms, device_ms = 1e3 * floor_s, row["device_ms"]
    return {
        "floor_ms": floor_ms,
        "floor_tokens_per_second": row["batch"] / floor_s,
        "share_of_floor": floor_ms / row["step_ms"]["median"],
        "device_share_of_floor": None if device_ms is None else floor_ms / device_ms["median"],
    }
