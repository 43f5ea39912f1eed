"""Device memory: what is used, what PyTorch's allocator did, and how it takes memory from the device.

Knows neither runtimes nor what is measured. On a CPU nothing is counted and nothing can be set.

[Note: expandable segments in one process]
`expandable_segments` is a setting that the allocator reads at each request to the device, and that may change while a
process runs: while it is off, free blocks of expandable segments are skipped (`get_free_block` in torch's
CUDACachingAllocator.cpp), and after the cache is emptied no block of either kind is left to be found. So
implementations with and without take turns in one process, each behind an emptied cache, where they share clocks,
temperature and NCCL's buffers. Every implementation says which it wants; PYTORCH_CUDA_ALLOC_CONF decides for none.
"""

import gc

import torch

from bench.ranks import gathered
from launch.metrics import GIB
from launch.world import World


def set_expandable_segments(wanted: bool, world: World) -> None:
    """Set how the allocator grows from here on; to be called behind `release_cached_memory`."""
    if world.device.type == "cuda":
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")


def release_cached_memory(world: World) -> None:
    """Give unused memory back, on all ranks before any goes on, and count peaks from here."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    gathered(None, world)


def used_nbytes(world: World) -> int:
    """Return what the device counts as used, by the context, NCCL and other processes too; 0 on a CPU."""
    if world.device.type != "cuda":
        return 0
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(world.device)
    return total_nbytes - free_nbytes


def limit_allocator(nbytes: int | None, world: World) -> None:
    """Let PyTorch's allocator take so many bytes at most, or None: as many as there are."""
    if world.device.type == "cuda":
        total_nbytes = torch.cuda.get_device_properties(world.device).total_memory
        fraction = 1.0 if nbytes is None else min(max(nbytes / total_nbytes, 0.0), 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, world.device)


def allocator_counts(world: World) -> dict[str, float]:
    """Return PyTorch's counters of requests so far; empty on a CPU.

    `device_allocs` went on to the device: cudaMalloc, or cuMemMap with expandable segments. `alloc_retries` freed the
    cache and tried again.
    """
    if world.device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats(world.device)
    return {
        "allocator_requests": stats["allocation.all.allocated"],
        "device_allocs": stats["num_device_alloc"],
        "alloc_retries": stats["num_alloc_retries"],
    }


def memory_since(before: dict[str, float], used: int, world: World) -> dict[str, float]:
    """Return peaks in GiB since cached memory was last released, and what the counters have moved; empty on a CPU.

    `used` is the most that the device counted as used meanwhile.
    """
    if world.device.type != "cuda":
        return {}
    moved = {name: count - before[name] for name, count in allocator_counts(world).items()}
    return {
        "device_used_gib": max(used, used_nbytes(world)) / GIB,
        "peak_allocated_gib": torch.cuda.max_memory_allocated(world.device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(world.device) / GIB,
        **moved,
    }
