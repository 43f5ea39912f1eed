"""The longest sequence that trains in a given amount of device memory, by bisection.

[Note: a limit of device memory]
`torch.cuda.set_per_process_memory_fraction` limits PyTorch's allocator alone, and a runtime that maps memory of its own
would not notice. So the allocator gets what the limit leaves when everything else is taken off that the device counts
as used (the context, NCCL's buffers, mapped memory), the most of any rank; and a length fits if its steps ran and the
device stayed below the limit. After a length that does not fit everything is built anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from bench.allocator import (
    allocator_counts,
    limit_allocator,
    memory_since,
    release_cached_memory,
    used_nbytes,
)
from bench.machine import Machine
from bench.measure import Metrics, make_batch
from bench.options import Options, Shape
from bench.ranks import gathered, say, unless_out_of_memory
from bench.report import Columns, Row, format_table
from bench.trainee import Trainee
from bench.turns import built, forget, turns
from launch.metrics import GIB
from launch.world import World

STEP = 512  # lengths are multiples of it
NUM_STEPS = 3  # that a length must train
COLUMNS: Columns = {
    "impl": ("impl", ""),
    "checkpointing": ("ckpt", ""),
    "batch_size": ("B", "d"),
    "limit_gib": ("limit GiB", ".1f"),
    "largest_seq_len": ("largest T", "d"),
    "device_gib": ("device GiB", ".2f"),
    "peak_allocated_gib": ("alloc", ".2f"),
}


def run_largest(names: Sequence[str], options: Options, world: World, machine: Machine) -> Iterator[Row]:
    """Yield the rows of a report after each implementation: the longest sequence, and what it took."""
    rows: list[Row] = []
    for name, one in turns(names, options):
        largest, memory = search(name, one, world)
        if memory:
            memory["device_gib"] = memory["device_used_gib"] - machine.used_nbytes / GIB
        subject = {"impl": name, "checkpointing": one.checkpointing[0], "batch_size": one.batch_sizes[0]}
        rows.append({**subject, "status": "ok", "limit_gib": one.limit_gib, "largest_seq_len": largest, **memory})
        yield {"rows": rows, "table": format_table(rows, COLUMNS)}


def search(name: str, options: Options, world: World) -> tuple[int, Metrics]:
    """Return the largest multiple of STEP up to the most of `--seq-len` that trains, 0 if none does, and its memory."""
    low, high, memory = 0, options.seq_lens[-1] // STEP + 1, Metrics()
    while high - low > 1:
        with built(name, options, world) as trainee:
            ready = trainee and unless_out_of_memory(partial(set_limit, trainee, options, world), world)
            while trainee and ready and high - low > 1:
                middle = (low + high) // 2
                attempt = unless_out_of_memory(partial(train, trainee, middle * STEP, options, world), world)
                say(world, f"{name} T {middle * STEP}: {'does not fit' if attempt is None else 'fits'}")
                if attempt is None:
                    high = middle
                    break
                low, memory = middle, attempt
        del trainee
        limit_allocator(None, world)
        forget(world)
        if not ready:
            break
    return low * STEP, memory


def set_limit(trainee: Trainee, options: Options, world: World) -> bool:
    """Train the shortest sequence, after which everything is there, and limit the allocator to what is left."""
    train(trainee, STEP, dataclasses.replace(options, limit_gib=None), world)
    if world.device.type == "cuda":
        assert options.limit_gib is not None
        outside = max(gathered(used_nbytes(world) - torch.cuda.memory_reserved(world.device), world))
        limit_allocator(int(options.limit_gib * GIB) - outside, world)
    return True


def train(trainee: Trainee, seq_len: int, options: Options, world: World) -> Metrics:
    """Run a few steps and return their memory; raise OutOfMemoryError where the device holds more than the limit."""
    release_cached_memory(world)
    batch = make_batch(options, world, Shape(options.batch_sizes[0], seq_len))
    before, used = allocator_counts(world), 0
    for _ in range(NUM_STEPS):
        trainee.forward_backward(*batch)
        used = max(used, used_nbytes(world))
        trainee.clip(options.clip)
        trainee.update()
    world.synchronize()
    if options.limit_gib is not None and used > options.limit_gib * GIB:
        raise torch.OutOfMemoryError(f"{used} bytes are used, and {options.limit_gib} GiB are the limit")
    return memory_since(before, used, world)
