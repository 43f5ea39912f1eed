"""The serving benchmark from its command line to its last line of output: one engine, one measurement after another."""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence

from bench import (
    serve_adapters,
    serve_decode,
    serve_limits,
    serve_memory,
    serve_modes,
    serve_offline,
    serve_peers,
    serve_poisson,
    serve_prefill,
    serve_speculation,
)
from bench.ranks import say
from bench.report import Row, write
from bench.serve_engine import Bench, Requests, serve
from bench.serve_floors import MeasuredRates, rates_of
from bench.serve_options import ServeBenchOptions
from bench.serve_report import describe, describe_run
from launch import world as ranks
from launch.world import World

Result = Row | list[Row]


def measure_offline(bench: Bench, rates: MeasuredRates) -> Result:
    """Ours, then transformers', which takes memory that ours does not give back to it."""
    ours = list(serve_offline.measure(bench, rates))
    if not bench.options.peers:
        return ours
    if obstacle := serve_peers.obstacle():
        say(bench.world, f"transformers is left out: {obstacle}")
        return ours
    return [*ours, *serve_peers.measure(bench, ours)]


RUNS: dict[str, Callable[[Bench, MeasuredRates], Result]] = {  # by the name of a measurement
    "memory": lambda bench, rates: serve_memory.measure(bench),
    "decode": lambda bench, rates: list(serve_decode.measure(bench, rates)),
    "prefill": serve_prefill.measure,
    "poisson": lambda bench, rates: list(serve_poisson.measure(bench)),
    "connections": lambda bench, rates: list(serve_poisson.measure_connections(bench)),
    "mixed": lambda bench, rates: list(serve_offline.measure_mixed(bench)),
    "offline": measure_offline,
    "speculation": lambda bench, rates: list(serve_speculation.measure(bench)),
    "limits": lambda bench, rates: list(serve_limits.measure(bench)),
    "adapters": lambda bench, rates: list(serve_adapters.measure(bench)),
    "modes": lambda bench, rates: list(serve_modes.measure(bench, rates)),
}


def run(options: ServeBenchOptions, arguments: Sequence[str]) -> None:
    """Run what the command line asks for; the last line of output is the report as one JSON object."""
    world = ranks.join(options.device)
    report: Row = {}
    try:
        for report in reports(options, world, arguments):  # one that is cut short leaves what it has
            if world.is_first and options.out is not None:
                write(report, options.out)
    finally:
        gc.unfreeze()  # what `serve` froze
        ranks.leave()
    say(world, json.dumps(report))


def reports(options: ServeBenchOptions, world: World, arguments: Sequence[str]) -> Iterator[Row]:
    """The report so far, after each measurement; what was measured is printed as it comes."""
    seconds: dict[str, float] = {}
    with timed("rates", seconds):
        rates = rates_of(options, world.device)
    say(world, f"rates\n  memory {rates.hbm.value:.4g} B/s ({rates.hbm.how})")
    say(world, f"  matrix products {rates.matmul.value:.4g} FLOP/s ({rates.matmul.how})")
    with timed("engine", seconds):
        served = serve(options, world)
    say(world, f"{served.plan}\nready after {seconds['engine']:.1f} s")
    bench = Bench(options, world, served, Requests(served.plan.config.vocab_size))
    results: dict[str, Result] = {}
    with contextlib.closing(served.engine):
        for name in options.measures:
            with timed(name, seconds):
                results[name] = RUNS[name](bench, rates)
            say(world, f"{describe(name, results[name])}\n  measured in {seconds[name]:.1f} s")
            yield {**describe_run(bench, rates, arguments), "wall_seconds": seconds, "results": results}


@contextlib.contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Notes how long something takes, by the clock."""
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
