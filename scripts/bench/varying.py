"""Memory over many steps of varying lengths, with an evaluation and a checkpoint behind each cycle of them.

What fragments an allocator is what a real run does and a benchmark of equal steps does not: lengths that never repeat,
forwards without gradients, and states that are copied out. Ranks draw the same lengths, as bucketed batches have.
"""

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from bench.allocator import allocator_counts, memory_since, release_cached_memory, used_nbytes
from bench.machine import Machine
from bench.measure import Metrics, make_batch, over_ranks
from bench.options import Options, Shape
from bench.ranks import say, unless_out_of_memory
from bench.report import Columns, Row, format_metrics, format_table
from bench.trainee import Trainee
from bench.turns import built, forget, turns
from launch.metrics import GIB
from launch.world import World

NUM_EVALUATIONS = 4  # forwards behind each cycle
STAGING_NBYTES = 256 << 20  # of host memory, through which states are copied out
COLUMNS: Columns = {
    "impl": ("impl", ""),
    "checkpointing": ("ckpt", ""),
    "cycle": ("cycle", "d"),
    "seconds": ("s", ".1f"),
    "device_gib": ("device GiB", ".2f"),
    "peak_allocated_gib": ("alloc", ".2f"),
    "peak_reserved_gib": ("reserved", ".2f"),
    "device_over_allocated": ("device / alloc", ".3f"),
    "device_allocs": ("cudaMallocs", "d"),
    "alloc_retries": ("retries", "d"),
    "loss": ("loss", ".4f"),
}


def run_varying(names: Sequence[str], options: Options, world: World, machine: Machine) -> Iterator[Row]:
    """Yield the rows of a report after each implementation, one for each cycle."""
    rows: list[Row] = []
    for name, one in turns(names, options):
        subject: Row = {"impl": name, "checkpointing": one.checkpointing[0]}
        with built(name, one, world) as trainee:
            fits = trainee is not None and unless_out_of_memory(
                partial(run_cycles, trainee, one, world, machine, subject, rows), world
            )
        del trainee
        forget(world)
        rows += [] if fits else [{**subject, "status": "OOM"}]
        yield {"rows": rows, "table": format_table(rows, COLUMNS)}


def run_cycles(
    trainee: Trainee, options: Options, world: World, machine: Machine, subject: Row, rows: list[Row]
) -> bool:
    """Append a row for each cycle."""
    lengths = random.Random(0)
    staging = torch.empty(STAGING_NBYTES, dtype=torch.uint8, pin_memory=world.device.type == "cuda")
    release_cached_memory(world)
    for cycle in range(-(-options.varying // options.cycle)):
        num_steps = min(options.cycle, options.varying - cycle * options.cycle)
        metrics = over_ranks(run_cycle(trainee, num_steps, lengths, staging, options, world), world)
        if "device_used_gib" in metrics:
            metrics["device_gib"] = metrics["device_used_gib"] - machine.used_nbytes / GIB
            metrics["device_over_allocated"] = metrics["device_gib"] / metrics["peak_allocated_gib"]
        rows.append({**subject, "status": "ok", "cycle": cycle, **metrics})
        say(world, f"{subject['impl']} cycle {cycle}: {format_metrics(metrics)}")
    return True


def run_cycle(
    trainee: Trainee, num_steps: int, lengths: random.Random, staging: Tensor, options: Options, world: World
) -> Metrics:
    """Train, evaluate and copy the states out; return this rank's time, memory and last loss."""
    before, used, begin = allocator_counts(world), 0, time.perf_counter()

    def batch() -> tuple[Tensor, Tensor]:
        seq_len = lengths.randint(options.seq_lens[0], options.seq_lens[-1])
        return make_batch(options, world, Shape(options.batch_sizes[0], seq_len))

    for _ in range(num_steps):
        loss = trainee.forward_backward(*batch())
        used = max(used, used_nbytes(world))
        trainee.clip(options.clip)
        trainee.update()
    trainee.model.eval()
    with torch.no_grad():
        for _ in range(NUM_EVALUATIONS):
            trainee.model(*batch())
    trainee.model.train()
    copy_out(trainee, staging)
    world.synchronize()
    memory = memory_since(before, used, world)
    return {**memory, "seconds": time.perf_counter() - begin, "loss": loss.item()}


def copy_out(trainee: Trainee, staging: Tensor) -> None:
    """Copy this rank's part of both state dicts to host memory, as a checkpoint does; nothing is written to disk."""
    states = [trainee.model.state_dict(), {} if trainee.optimizer is None else trainee.optimizer.state_dict()]
    for value in pytree.tree_leaves(states):
        if isinstance(value, Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            place = staging.view(local.dtype)
            for part in local.detach().reshape(-1).split(place.numel()):
                place[: part.numel()].copy_(part)
