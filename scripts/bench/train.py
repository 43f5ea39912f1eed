"""The benchmark from its command line to its last line of output: implementations take turns, round after round."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from bench.implementations import IMPLEMENTATIONS
from bench.measure import Metrics, make_batch, measure, over_ranks, release_cached_memory
from bench.options import REFERENCE, Options, parse_options
from bench.profile import profile_steps
from bench.ranks import gathered, say, unless_out_of_memory
from bench.report import Row, add_ratios, describe_run, format_metrics, format_table, make_row, write
from bench.trainee import Trainee
from launch import world as ranks
from launch.world import World

NUM_ORDERS = 3  # of the reference's sums, beside its own
Rounds = dict[tuple[str, int], list[Metrics | None]]  # by implementation and sequence length


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; the last line of output is the report as one JSON object."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments, IMPLEMENTATIONS)
    world = ranks.join(options.device)
    names = possible(options, world)
    run = run_losses if options.losses else run_rounds
    report: Row = {}
    for result in run(names, options, world):  # one that is cut short leaves what it has
        report = {**describe_run(options, world, arguments), **result}
        if world.is_first and options.out is not None:
            write(report, options.out)
    ranks.leave()
    say(world, json.dumps(report))


def possible(options: Options, world: World) -> list[str]:
    """The implementations that every rank can build; of each other one a line says why it is left out."""
    names = []
    for name in options.impls:
        obstacles = [obstacle for obstacle in gathered(IMPLEMENTATIONS[name].obstacle(world), world) if obstacle]
        if obstacles:
            say(world, f"{name} is left out: {obstacles[0]}")
        else:
            names.append(name)
    return names


# --- times ---


def run_rounds(names: Sequence[str], options: Options, world: World) -> Iterator[Row]:
    """After each round over all implementations, the rows of a report."""
    rounds: Rounds = defaultdict(list)
    rows: list[Row] = []
    for round_index in range(options.rounds):
        for name in names:
            results = run_round(name, options, world, options.profile if round_index == 0 else None)
            for seq_len, metrics in results.items():
                rounds[name, seq_len].append(metrics)
                say(world, f"round {round_index} {name} T {seq_len}: {format_metrics(metrics)}")
            forget(world)
        rows = [make_row(name, seq_len, metrics, options) for (name, seq_len), metrics in rounds.items()]
        add_ratios(rows)
        yield {"rows": rows}
    say(world, format_table(rows))


def run_round(name: str, options: Options, world: World, traces: Path | None) -> dict[int, Metrics | None]:
    """Build, and measure at each sequence length. None: out of memory, at that length or a shorter one."""
    results: dict[int, Metrics | None] = dict.fromkeys(options.seq_lens)
    with built(name, options, world) as trainee:
        if trainee is None:
            return results
        for seq_len in options.seq_lens:
            metrics = unless_out_of_memory(partial(measure, trainee, options, world, seq_len), world)
            if metrics is None:
                return results
            results[seq_len] = over_ranks(metrics, world)
        if traces is not None:  # last, because these steps train too
            for seq_len in options.seq_lens:
                batch = make_batch(options, world, seq_len)
                say(world, profile_steps(trainee, batch, traces / f"{name}-T{seq_len}.json.gz", world))
    return results


@contextmanager
def built(name: str, options: Options, world: World) -> Iterator[Trainee | None]:
    """A trainee for a while; None on every rank if it does not fit on one."""
    trainee = unless_out_of_memory(partial(IMPLEMENTATIONS[name].build, options, world), world)
    try:
        yield trainee
    finally:
        if trainee is not None:
            trainee.close()


def forget(world: World) -> None:
    """Free what the last implementation left, compiled code included."""
    torch.compiler.reset()
    release_cached_memory(world)


# --- losses ---


def run_losses(names: Sequence[str], options: Options, world: World) -> Iterator[Row]:
    """The losses of each implementation that trains, and of the reference with its sums in other orders."""
    from bench import losses  # reads text, which takes the extra `train`; times do not

    text = losses.text_batches(options, world, options.seq_lens[0])
    turns = [(name, name, 0) for name in names if name != "unsharded"]  # which has no optimizer
    turns += [(losses.reordered(seed), REFERENCE, seed) for seed in range(1, 1 + NUM_ORDERS)]
    per_step: dict[str, list[float]] = {}
    for label, name, seed in turns:
        with built(name, options, world) as trainee:
            if trainee is not None:
                per_step[label] = losses.train(trainee, options, world, text, seed)
        del trainee
        forget(world)
        say(world, losses.describe(label, per_step))
    say(world, f"orders of {REFERENCE}'s sums differ by up to {losses.spread(per_step)}")
    yield {"rows": [], "losses": losses.compare(per_step)}
