"""The benchmark from its command line to its tables: implementations take turns, round after round."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.accounting import account
from bench.largest import run_largest
from bench.machine import Machine, survey
from bench.measure import make_batch, measure, over_ranks
from bench.options import REFERENCE, Options
from bench.profile import profile_steps
from bench.ranks import say, unless_out_of_memory
from bench.report import (
    BenchCase,
    Measurement,
    Row,
    add_ratios,
    describe_run,
    format_metrics,
    heading,
    make_row,
    step_tables,
    write,
)
from bench.turns import Turn, built, forget, possible, turns
from bench.varying import run_varying
from launch import world as ranks
from launch.world import World
from yafsdp_like.memory.allocator import use_expandable_segments

NUM_ORDERS = 3  # of the reference's sums, beside its own
Rounds = dict[BenchCase, list[Measurement | None]]
Run = Callable[[Sequence[str], Options, World, Machine], Iterator[Row]]


def run(options: Options, arguments: Sequence[str]) -> None:
    """Run what the command line asks for, and print its tables last; `--out` gets the report as one JSON object."""
    world = ranks.join(options.device)
    use_expandable_segments()  # once for the process, so that each implementation's own setting holds afterwards
    names = possible(options, world)
    machine = survey(options, world)
    described = describe_run(options, world, machine, arguments)
    table = ""
    for result in run_of(options)(names, options, world, machine):  # one that is cut short leaves what it has
        table = result.pop("table")
        if world.is_first and options.out is not None:
            write({**described, **result}, options.out)
    ranks.leave()
    say(world, f"\n{heading(described)}\n\n{table}")


def run_of(options: Options) -> Run:
    """Return what the options ask for: it yields what the report holds so far, and a `table` to print."""
    if options.losses:
        return run_losses
    if options.varying:
        return run_varying
    return run_rounds if options.limit_gib is None else run_largest


# --- times ---


def run_rounds(names: Sequence[str], options: Options, world: World, machine: Machine) -> Iterator[Row]:
    """Yield the rows of a report after each round over all implementations."""
    rounds: Rounds = defaultdict(list)
    for round_index in range(options.rounds):
        for turn in turns(names, options):
            for case, measured in run_turn(turn, world, options.profile if round_index == 0 else None).items():
                rounds[case].append(measured)
                metrics = None if measured is None else measured.metrics
                say(world, f"round {round_index} {case.impl} {case.shape}: {format_metrics(metrics)}")
            forget(world)
        rows = [make_row(case, found, options, machine) for case, found in rounds.items()]
        add_ratios(rows)
        yield {"rows": rows, "table": step_tables(rows)}


def run_turn(turn: Turn, world: World, traces: Path | None) -> dict[BenchCase, Measurement | None]:
    """Build, and measure each shape. None: out of memory, at that shape or one of fewer tokens."""
    name, options = turn
    cases = [BenchCase(name, options.checkpointing[0], shape) for shape in options.shapes]
    results: dict[BenchCase, Measurement | None] = dict.fromkeys(cases)
    with built(name, options, world) as trainee:
        if trainee is None:
            return results
        for case in cases:
            batch = make_batch(options, world, case.shape)
            metrics = unless_out_of_memory(partial(measure, trainee, options, world, batch), world)
            if metrics is None:
                return results
            found = unless_out_of_memory(partial(account, trainee, batch, options.clip, world), world)
            if found is None:
                return results
            results[case] = Measurement(over_ranks(metrics, world), found)
        if traces is not None:  # last, because these steps train too
            for case in cases:
                file = traces / f"{case.impl}-{case.checkpointing}-{str(case.shape).replace(' ', '')}.json.gz"
                say(world, profile_steps(trainee, make_batch(options, world, case.shape), file, world))
    return results


# --- losses ---


def run_losses(names: Sequence[str], options: Options, world: World, machine: Machine) -> Iterator[Row]:
    """Yield the losses of each implementation that trains, and of the reference with its sums in other orders."""
    from bench import losses  # reads text, which takes the extra `train`; times do not

    text = losses.text_batches(options, world, options.seq_lens[0])
    labelled = [(name, name, one, 0) for name, one in turns(names, options) if name != "unsharded"]  # no optimizer
    orders = [(losses.reordered(seed), REFERENCE, labelled[0][2], seed) for seed in range(1, 1 + NUM_ORDERS)]
    per_step: dict[str, list[float]] = {}
    for label, name, one, seed in labelled + orders:
        with built(name, one, world) as trainee:
            if trainee is not None:
                per_step[label] = losses.train(trainee, options, world, text, seed)
        del trainee
        forget(world)
        say(world, losses.describe(label, per_step))
    table = f"orders of {REFERENCE}'s sums differ by up to {losses.spread(per_step)}"
    yield {"rows": [], "losses": losses.compare(per_step), "table": table}
