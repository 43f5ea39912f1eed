"""Time and memory of steps at one sequence length. Knows neither runtimes nor reports."""

import gc
import statistics
import time

import torch
from torch import Tensor

from bench.options import FIRST_COUNTED_STEP, Options
from bench.ranks import gathered
from bench.trainee import Trainee
from launch.world import World

GIB = 2**30

Metrics = dict[str, float]  # one measurement; what a device cannot tell is left out
Mark = torch.cuda.Event | float
Marks = tuple[Mark, Mark, Mark]  # of one step: its beginning, after backward, after the optimizer


def measure(trainee: Trainee, options: Options, world: World, seq_len: int) -> Metrics:
    """Steps at one sequence length: this rank's times in ms (medians over steps), memory and last loss."""
    batch = make_batch(options, world, seq_len)
    release_cached_memory(world)
    marks: list[Marks] = []
    before: Metrics = {}
    for step_index in range(options.warmup + options.steps):
        if step_index == FIRST_COUNTED_STEP:
            before = allocator_counts(world)
        begin = mark(world.device)
        loss = trainee.forward_backward(*batch)
        middle = mark(world.device)
        trainee.update()
        marks.append((begin, middle, mark(world.device)))
        if not options.free_running:
            world.synchronize()
    world.synchronize()
    num_counted_steps = options.warmup + options.steps - FIRST_COUNTED_STEP
    memory = memory_metrics(before, allocator_counts(world), num_counted_steps, world)
    return {**times_of(marks[options.warmup :], trainee), **memory, "loss": loss.item()}


def make_batch(options: Options, world: World, seq_len: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T), a function of the sequence length and the rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seq_len + world.rank)
    shape = (options.batch_size, seq_len + 1)
    tokens = torch.randint(options.config.vocab_size, shape, generator=generator).to(world.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def over_ranks(metrics: Metrics, world: World) -> Metrics:
    """The mean loss, and of everything else the largest."""
    ranks = gathered(metrics, world)
    largest = {name: max(rank[name] for rank in ranks) for name in metrics}
    return {**largest, "loss": statistics.fmean(rank["loss"] for rank in ranks)}


# --- time ---


def mark(device: torch.device) -> Mark:
    """A point in time: of the compute stream on a GPU, of the clock elsewhere."""
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


def times_of(marks: list[Marks], trainee: Trainee) -> Metrics:
    """Return medians over steps, in ms, of forward + backward and, with an optimizer, of update and step."""
    times = {"forward_backward_ms": statistics.median(elapsed_ms(begin, middle) for begin, middle, _ in marks)}
    if trainee.optimizer is not None:
        times["optimizer_ms"] = statistics.median(elapsed_ms(middle, end) for _, middle, end in marks)
        times["step_ms"] = statistics.median(elapsed_ms(begin, end) for begin, _, end in marks)
    return times


# --- memory ---


def release_cached_memory(world: World) -> None:
    """Give unused memory back, on all ranks before any goes on, and count peaks from here."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    gathered(None, world)


def allocator_counts(world: World) -> Metrics:
    """Return PyTorch's counters of requests so far; empty on a CPU."""
    if world.device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(world.device)
    return {
        "allocator_requests": stats["allocation.all.allocated"],
        "device_allocs": stats["num_device_alloc"],
        "alloc_retries": stats["num_alloc_retries"],
    }


def memory_metrics(before: Metrics, after: Metrics, num_steps: int, world: World) -> Metrics:
    """Peaks since cached memory was last released, and what the allocator did in `num_steps` steps."""
    if world.device.type != "cuda":
        return {}
    delta = {name: after[name] - before[name] for name in after}
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(world.device)
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(world.device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(world.device) / GIB,
        "device_used_gib": (total_nbytes - free_nbytes) / GIB,
        "allocator_requests_per_step": delta["allocator_requests"] / num_steps,
        "device_allocs": delta["device_allocs"],
        "alloc_retries": delta["alloc_retries"],
    }
