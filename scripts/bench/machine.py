"""The machine as found before anything is built: used memory, rate of a copy, and peak of its matrix products."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from bench.allocator import release_cached_memory, used_nbytes
from bench.options import Options
from bench.ranks import gathered
from launch.metrics import peak_tflops
from launch.probes import copy_rate
from launch.world import World

WARM_UP_NUMEL = 1 << 24  # of a collective's part on each rank


@dataclass(frozen=True)
class Machine:
    """What measurements are related to."""

    used_nbytes: int  # of this rank's device before the first implementation: the context, and other processes
    copy_rate: float  # bytes per second, read and written, of the slowest rank
    peak_tflops: float | None  # of bf16 matrix products; None where it is not known


def survey(options: Options, world: World) -> Machine:
    """Measure the machine; afterwards collectives have the buffers that every implementation finds."""
    used = used_nbytes(world)
    rate = min(gathered(copy_rate(world.device), world))
    warm_up_collectives(world)
    release_cached_memory(world)
    return Machine(used, rate, peak_tflops(world, options.peak_tflops))


def warm_up_collectives(world: World) -> None:
    """Run each collective once, small and large, so that no implementation pays for NCCL's buffers."""
    if world.device.type != "cuda":
        return
    for numel in (1, WARM_UP_NUMEL):
        for dtype in (torch.bfloat16, torch.float32):
            part = torch.zeros(numel, dtype=dtype, device=world.device)
            parts = [torch.empty_like(part) for _ in range(world.size)]
            dist.all_gather(parts, part)
            dist.reduce_scatter(part, parts)
            dist.all_reduce(part)
    world.synchronize()
