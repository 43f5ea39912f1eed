"""Time and memory of steps on one batch. Knows neither runtimes nor reports."""

import statistics
import time

import torch
from torch import Tensor

from bench.allocator import allocator_counts, memory_since, release_cached_memory, used_nbytes
from bench.options import FIRST_COUNTED_STEP, Options, Shape
from bench.ranks import gathered
from bench.trainee import Trainee
from launch.world import World

Metrics = dict[str, float]  # one measurement; what a device cannot tell is left out
Mark = torch.cuda.Event | float
Marks = tuple[Mark, Mark, Mark, Mark]  # of one step: its beginning, after backward, after clipping, after the update


def measure(trainee: Trainee, options: Options, world: World, batch: tuple[Tensor, Tensor]) -> Metrics:
    """Run steps on a batch: this rank's times in ms (medians over steps), memory and last loss."""
    release_cached_memory(world)
    marks: list[Marks] = []
    before, used = Metrics(), 0
    for step_index in range(options.warmup + options.steps):
        if step_index == FIRST_COUNTED_STEP:
            before = allocator_counts(world)
        begin = mark(world.device)
        loss = trainee.forward_backward(*batch)
        middle = mark(world.device)
        if step_index < options.warmup:  # asking takes time
            used = max(used, used_nbytes(world))
        trainee.clip(options.clip)
        clipped = mark(world.device)
        trainee.update()
        marks.append((begin, middle, clipped, mark(world.device)))
        if not options.free_running:
            world.synchronize()
    world.synchronize()
    memory = memory_since(before, used, world)
    if memory:
        num_counted_steps = options.warmup + options.steps - FIRST_COUNTED_STEP
        memory["allocator_requests_per_step"] = memory.pop("allocator_requests") / num_counted_steps
    return {**times_of(marks[options.warmup :], trainee, options), **memory, "loss": loss.item()}


def make_batch(options: Options, world: World, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, tokens (B, T) for most, a function of the sequence length and the rank."""
    generator = torch.Generator().manual_seed(1_000_003 * shape.seq_len + world.rank)
    inputs, targets = options.subject.batch(shape.batch_size, shape.seq_len, generator)
    return inputs.to(world.device), targets.to(world.device)


def over_ranks(metrics: Metrics, world: World) -> Metrics:
    """Return the mean loss, and of everything else the largest."""
    ranks = gathered(metrics, world)
    largest = {name: max(rank[name] for rank in ranks) for name in metrics}
    return {**largest, "loss": statistics.fmean(rank["loss"] for rank in ranks)}


# --- time ---


def mark(device: torch.device) -> Mark:
    """Return a point in time: of the compute stream on a GPU, of the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(begin: Mark, end: Mark) -> float:
    """Return the milliseconds between two marks of one kind."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return (end - begin) * 1e3
    return begin.elapsed_time(end)


def times_of(marks: list[Marks], trainee: Trainee, options: Options) -> Metrics:
    """Return medians over steps, in ms, of forward + backward and, with an optimizer, of clip, update and step."""
    begins, middles, clippeds, ends = zip(*marks, strict=True)
    spans = {"forward_backward_ms": (begins, middles)}
    if trainee.optimizer is not None:
        spans |= {"optimizer_ms": (clippeds, ends), "step_ms": (begins, ends)}
        spans |= {"clip_ms": (middles, clippeds)} if options.clip else {}
    return {
        name: statistics.median(elapsed_ms(first, last) for first, last in zip(*pair, strict=True))
        for name, pair in spans.items()
    }
